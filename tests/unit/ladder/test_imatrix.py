"""Importance matrices against llama-imatrix, the routing recorder, and llama.cpp's own parser."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import libggml
import llama_cpp
import llama_cpp_tools
import numpy as np
import pytest

from dfqs_nb import routing
from dfqs_nb.core.errors import DfqsError, HeaderError, OutputError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.header import read_header
from dfqs_nb.ladder import divergence, imatrix
from dfqs_nb.ladder.imatrix import Entry, ImportanceMatrix
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama import settings as llama_settings

F16 = data_dir() / "reference" / "DFQS-Nano-F16.gguf"
ONE_THREAD = llama_settings.OpenSettings(n_ctx=128, n_threads=1)
LIBRARIES = Path(llama_cpp.__file__).parent / "lib"


@pytest.fixture(scope="module")
def pieces() -> list[list[int]]:
    with llama_model.open_model(F16, ONE_THREAD) as model:
        return divergence.load_text("calibration-nano", "calibration").chunks(model, 128, 2)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> ImportanceMatrix:
    how = {"chunk_tokens": 128, "n_chunks": 2, "n_threads": 1}
    return imatrix.collect(F16, "calibration-nano", tmp_path_factory.mktemp("matrix") / "m.gguf", **how)


def test_each_expert_is_counted_as_often_as_the_router_chose_it(matrix, pieces):
    """Against the routing recorder, which reads the router's own nodes and not the products."""
    with routing.open_recorded(F16, ONE_THREAD) as recorded:
        for piece in pieces:
            recorded.model.clear()
            recorded.feed(piece)
        found = recorded.recorder.arrays()
    for column, layer in enumerate(found["layers"]):
        chosen = np.bincount(found["experts"][:, column].ravel(), minlength=found["n_experts"])
        for part in ("gate", "up", "down"):
            assert (matrix.entries[f"blk.{layer}.ffn_{part}_exps.weight"].counts == chosen).all()


def test_gate_and_up_see_the_same_rows_and_dense_weights_all_of_them(matrix):
    for layer in range(4):
        gate, up = (matrix.entries[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up"))
        shared = matrix.entries[f"blk.{layer}.ffn_gate_shexp.weight"]
        assert np.array_equal(gate.sums, up.sums)
        assert shared.counts.tolist() == [256]
        # every token goes to k experts, so their sums are k times those of the shared expert's same input
        used = read_header(F16).arch("expert_used_count")
        assert np.allclose(gate.sums.sum(axis=0), used * shared.sums[0], rtol=1e-5)


def test_what_is_written_is_read_again_and_llama_cpp_parses_it(matrix, tmp_path):
    written = matrix.save(tmp_path / "m.gguf")
    found = imatrix.read_imatrix(written.path)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (matrix.datasets, 2, 128)
    assert set(found.entries) == set(matrix.entries)
    for name, entry in matrix.entries.items():
        assert np.array_equal(found.entries[name].sums, entry.sums)
        assert np.array_equal(found.entries[name].counts, entry.counts)
    assert libggml.table(written.path).n_tensors == 2 * len(matrix.entries)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_matrix_is_collected_once_and_again_where_its_file_is_damaged(matrix, tmp_path, monkeypatch):
    how = {"chunk_tokens": 128, "n_chunks": 2, "n_threads": 1}
    path, whole = tmp_path / "new" / "m.gguf", Path(matrix.path).read_bytes()
    path.parent.mkdir()
    path.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(imatrix, "open_model", lambda *_: pytest.fail("the model was opened"))
        assert imatrix.collect(F16, "calibration-nano", path, **how).datasets == matrix.datasets
    for other in (
        whole[:5000],
        Path(replace(matrix, datasets=("a night's work",)).save(path).path).read_bytes(),
    ):
        path.write_bytes(other)
        with pytest.raises(OutputError, match="exists already"):
            imatrix.collect(F16, "calibration-nano", path, **how)
        assert path.read_bytes() == other
        imatrix.collect(F16, "calibration-nano", path, overwrite=True, **how)
        assert path.read_bytes() == whole


def test_entries_of_another_size_than_their_tensor_are_left_out(matrix):
    """llama-quantize refuses them: deepseek4 multiplies attn_output_a in groups."""
    kept = matrix.fitting(read_header(F16), re.compile("."))
    assert {name.split(".")[2] for name in matrix.entries.keys() - kept} == {"attn_output_a"}
    experts = matrix.fitting(read_header(F16), re.compile("_exps"))
    assert len(experts) == 12 and all("_exps" in name for name in experts)


def test_an_expert_that_was_never_chosen_weighs_all_columns_alike():
    entry = Entry(np.array([[2.0, 4.0], [0.0, 0.0]], np.float32), np.array([2, 0]))
    assert entry.weights().tolist() == [1.0, 2.0, 1.0, 1.0]
    table = ImportanceMatrix({"blk.1.ffn_up_exps.weight": entry}).coverage()
    columns = ["matrices", "unused", "least", "most", "class"]
    assert table.loc[0, columns].tolist() == [2, 1, 0, 2, "routed experts"]


def test_what_is_no_importance_matrix_is_refused(tmp_path, matrix):
    with pytest.raises(DfqsError, match="a GGUF of type model"):
        imatrix.read_imatrix(F16)
    with pytest.raises(HeaderError, match="cannot be read"):
        imatrix.read_imatrix(tmp_path / "missing")
    for raw in (b"", b"abc", struct.pack("<ii1sii1f", 1, 1, b"a", 1, 1, 2.0)):
        (tmp_path / "old.dat").write_bytes(raw)
        with pytest.raises(HeaderError):
            imatrix.read_imatrix(tmp_path / "old.dat")
    whole = matrix.save(tmp_path / "m.gguf")
    Path(whole.path).write_bytes(Path(whole.path).read_bytes()[:500])
    with pytest.raises(HeaderError):
        imatrix.read_imatrix(whole.path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_no_sum_of_squares_has_blame_the_importance_matrix(tmp_path, matrix, value):
    """llama.cpp would say that the weights hold NaN."""
    broken = {name: Entry(entry.sums.copy(), entry.counts) for name, entry in matrix.entries.items()}
    next(iter(broken.values())).sums[0, 0] = value
    with pytest.raises(DfqsError, match="the importance matrix has values for blk.* not finite or negative"):
        ImportanceMatrix(broken)
    written = Path(matrix.save(tmp_path / "m.gguf").path)
    header = read_header(written)
    with written.open("rb+") as file:
        file.seek(header.data_offset)
        file.write(struct.pack("<f", value))
    with pytest.raises(DfqsError, match="m.gguf: the importance matrix has values for"):
        imatrix.read_imatrix(written)


def test_sums_without_counts_are_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "none")
    writer.add_type("imatrix")
    writer.add_tensor("a.in_sum2", np.ones((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DfqsError, match="a.counts is missing"):
        imatrix.read_imatrix(tmp_path / "m.gguf")


def test_too_short_a_text_is_refused(tmp_path):
    with pytest.raises(DfqsError, match="tokens of t fill fewer than 1 chunks of 128"):
        text = divergence.Text("t", (("one two",),))
        imatrix.collect(F16, text, tmp_path / "m.gguf", chunk_tokens=128, n_threads=1)


def test_the_calibration_text_is_what_its_generator_makes_and_holds_no_scored_item():
    done = subprocess.run(
        [sys.executable, "-B", str(data_dir() / "prompts" / "calibration_nano.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    parts = [
        {one[0] for one in divergence.load_text("calibration-nano", part).documents}
        for part in ("calibration", "held_out")
    ]
    assert parts[0] & parts[1] <= {"Explain mixture-of-experts routing"}


# ---- against the tool ----


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A text without control tokens, which the tool reads as we do."""
    documents = divergence.load_text("calibration-nano", "calibration").documents[:90]
    path = tmp_path_factory.mktemp("text") / "plain.txt"
    path.write_text(" ".join(" ".join(document) for document in documents), encoding="utf-8")
    return path


def tool_imatrix(*arguments: object) -> None:
    """llama-imatrix on the libraries that llama-cpp-python runs on, so that only the collecting differs."""
    command = [str(llama_cpp_tools.tool("llama-imatrix")), *map(str, arguments)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(LIBRARIES)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_matrix_is_llama_imatrix_s_on_the_same_text(plain, tmp_path):
    path = plain
    tool_imatrix(
        "-m",
        F16,
        "-f",
        path,
        "-o",
        tmp_path / "theirs.gguf",
        "-c",
        256,
        "-b",
        256,
        "-ub",
        256,
        "-t",
        1,
        "--chunks",
        8,
        "--no-repack",
        "--no-ppl",
        "-fa",
        "off",
    )
    theirs = imatrix.read_imatrix(tmp_path / "theirs.gguf")
    text = divergence.load_text(path)
    how = {"chunk_tokens": 256, "n_chunks": 8, "n_threads": 1}
    ours = imatrix.collect(F16, text, tmp_path / "ours.gguf", **how)
    assert set(ours.entries) == set(theirs.entries)
    assert theirs.chunk_count == ours.chunk_count == 8
    for name, entry in ours.entries.items():
        assert np.array_equal(entry.counts, theirs.entries[name].counts), name
        # the tool adds up in single precision
        assert np.allclose(entry.weights(), theirs.entries[name].weights(), rtol=1e-4, atol=1e-9), name


@pytest.mark.slow
def test_llama_imatrix_reads_our_file_and_gives_it_back(matrix, tmp_path):
    written = matrix.save(tmp_path / "ours.gguf")
    tool_imatrix("-m", F16, "--in-file", written.path, "-o", tmp_path / "back.gguf", "-c", 128)
    back = imatrix.read_imatrix(tmp_path / "back.gguf")
    assert back.datasets == matrix.datasets
    for name, entry in matrix.entries.items():
        assert np.array_equal(back.entries[name].sums, entry.sums)
        assert np.array_equal(back.entries[name].counts, entry.counts)
