"""Our header reader against two that we did not write: gguf-py, field by field and tensor by tensor,
and libggml, on what it accepts and what it refuses."""

from __future__ import annotations

import math
import os
import random
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import libggml
import llama_cpp_tools
import pytest
import record_references as records
from gguf import GGUFReader
from gguf_fixtures import SCALARS, Spec, every_type, field, gguf_bytes, real_size_header, small_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfqs_nb.core.errors import DfqsError, HeaderError
from dfqs_nb.gguf.header import GGUFHeader, check_layout, read_header
from dfqs_nb.llama import check

VOCABULARIES = records.read("vocabulary_digests.json")["files"]
LIVE = ("bert-bge", "deepseek-coder", "llama-spm", "phi-3")  # gguf-py takes a minute for all of them


@pytest.fixture(scope="session")
def vocabularies() -> dict[str, Path]:
    try:
        return {path.name: path for path in llama_cpp_tools.vocabularies()}
    except llama_cpp_tools.Unavailable as reason:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(reason))


def our_fields(header: GGUFHeader) -> Iterator[tuple[str, str, bool, object]]:
    for name, entry in header.fields.items():
        is_array = entry.count is not None
        kind = "" if is_array and entry.count == 0 else entry.type
        yield name, kind, is_array, header[name]


def same(ours: object, theirs: object) -> bool:
    """Equality in which a NaN equals a NaN."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    both_nan = (
        isinstance(ours, float) and isinstance(theirs, float) and math.isnan(ours) and math.isnan(theirs)
    )
    return both_nan or (type(ours) is type(theirs) and ours == theirs)


def assert_agrees_with_gguf_py(path: Path) -> None:
    header = read_header(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's on overflow, in gguf-py's own arithmetic
        peer = GGUFReader(path)
    ours, theirs = list(our_fields(header)), list(records.peer_fields(peer))
    assert [row[:3] for row in ours] == [row[:3] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert same(mine[3], other[3]), f"{mine[0]}: {mine[3]!r} != {other[3]!r}"
    assert [
        (t.name, t.shape, t.type, t.n_elements, t.nbytes, header.data_offset + t.offset)
        for t in header.tensors
    ] == [
        (
            t.name,
            tuple(map(int, t.shape)),
            t.tensor_type.name,
            int(t.n_elements),
            int(t.n_bytes),
            int(t.data_offset),
        )
        for t in peer.tensors
    ]


def assert_agrees_with_libggml(path: Path, theirs: libggml.Table) -> None:
    header = read_header(path)
    assert (header.version, len(header), len(header.tensors), header.alignment, header.data_offset) == (
        theirs.version,
        theirs.n_kv,
        theirs.n_tensors,
        theirs.alignment,
        theirs.data_offset,
    )
    assert [(t.name, t.type.upper(), t.offset, t.nbytes) for t in header.tensors] == [
        (t.name, t.type, t.offset, t.nbytes) for t in theirs.tensors
    ]


# Every vocabulary file of llama.cpp, and the reference model


@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_field_of_a_vocabulary_is_what_gguf_py_recorded(vocabularies, name):
    ours = {key: records.digest(*rest) for key, *rest in our_fields(read_header(vocabularies[name]))}
    assert ours == VOCABULARIES[name] and list(ours) == list(VOCABULARIES[name])


def test_no_vocabulary_is_left_out(vocabularies):
    assert set(vocabularies) == set(VOCABULARIES)


@pytest.mark.parametrize("name", LIVE)
def test_a_vocabulary_read_side_by_side_with_gguf_py(vocabularies, name):
    assert_agrees_with_gguf_py(vocabularies[f"ggml-vocab-{name}.gguf"])


def test_every_vocabulary_lies_where_libggml_says(vocabularies):
    for path, theirs in zip(vocabularies.values(), libggml.tables(list(vocabularies.values())), strict=True):
        header = read_header(path)
        assert (header.version, len(header), header.data_offset) == (
            theirs.version,
            theirs.n_kv,
            theirs.data_offset,
        ), path.name


@pytest.mark.parametrize("path", sorted(records.MODELS.glob("*.gguf")), ids=lambda path: path.stem)
def test_every_field_and_tensor_of_the_reference_model(path):
    assert_agrees_with_gguf_py(path)
    assert_agrees_with_libggml(path, libggml.table(path))


@pytest.mark.slow
def test_models_that_llama_cpps_own_test_writes(tmp_path):
    """Random models of several architectures, made by no one here (the tool takes minutes to build)."""
    tool = str(llama_cpp_tools.tool("test-llama-archs"))
    only = ["-a", "^(deepseek4|deepseek2|qwen3moe|gpt-oss|llama)$", "-s", "1", "-o", str(tmp_path)]
    subprocess.run([tool, *only], check=True, capture_output=True)
    paths = sorted(tmp_path.glob("*.gguf"))
    assert len(paths) >= 5
    for path in paths:
        assert_agrees_with_gguf_py(path)
        assert_agrees_with_libggml(path, libggml.table(path))


def test_a_header_of_the_real_size_lies_where_libggml_says(tmp_path):
    path = real_size_header(tmp_path / "real.gguf")
    assert path.stat().st_size > 60e9 and len(read_header(path).tensors) == 1328
    assert_agrees_with_libggml(path, libggml.table(path))


def test_a_version_2_file_reads_alike(tmp_path):
    path = tmp_path / "v2.gguf"
    path.write_bytes(gguf_bytes(every_type(), [Spec("t", "F16", (7, 3))], version=2))
    assert_agrees_with_gguf_py(path)
    assert_agrees_with_libggml(path, libggml.table(path))


# Files drawn at random

ROW = {"F32": 1, "F16": 1, "I32": 1, "BF16": 1, "Q8_0": 32, "Q4_0": 32, "Q2_K": 256, "IQ1_S": 256}
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=15).filter(
    lambda name: not name.startswith("general.") and len(name.encode()) < 64
)


@st.composite
def any_field(draw: st.DrawFn) -> tuple[str, object]:
    kind = draw(st.sampled_from([kind for kind in SCALARS if kind != "ARRAY"]))
    form = SCALARS[kind]
    if kind == "STRING":
        item = st.text(st.characters(codec="utf-8"), max_size=20)
    elif kind == "BOOL":
        item = st.integers(0, 1)
    elif form in "fd":
        item = st.floats(width=32 if form == "f" else 64)
    else:
        bits = {"b": 8, "h": 16, "i": 32, "q": 64}[form.lower()]
        low = -(1 << bits - 1) if form.islower() else 0
        item = st.integers(low, low + (1 << bits) - 1)
    if draw(st.booleans()):
        return f"[{kind}]", draw(st.lists(item, max_size=20))
    return kind, draw(item)


@st.composite
def any_file(draw: st.DrawFn) -> bytes:
    alignment = draw(st.sampled_from([None, 8, 32, 64, 4096]))
    fields = [] if alignment is None else [field("general.alignment", "UINT32", alignment)]
    fields += [field(name, *draw(any_field())) for name in draw(st.lists(names, max_size=8, unique=True))]
    specs = []
    for name in draw(st.lists(names, max_size=6, unique=True)):
        kind = draw(st.sampled_from(sorted(ROW)))
        shape = [ROW[kind] * draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 4), max_size=3))]
        specs.append(Spec(name, kind, tuple(shape)))
    return gguf_bytes(fields, specs, alignment=alignment or 32, version=draw(st.sampled_from([2, 3])))


def test_any_valid_file_reads_as_gguf_py_and_libggml_read_it(tmp_path):
    paths: list[Path] = []

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(raw=any_file())
    def read(raw: bytes) -> None:
        paths.append(tmp_path / f"{len(paths)}.gguf")
        paths[-1].write_bytes(raw)
        assert_agrees_with_gguf_py(paths[-1])
        check_layout(read_header(paths[-1]))

    read()
    for path, theirs in zip(paths, libggml.tables(paths), strict=True):
        assert_agrees_with_libggml(path, theirs)


# Broken files: never another exception than ours, and never accepted where libggml refuses


def ours_accepts(path: Path) -> bool:
    try:
        check_layout(read_header(path))
    except DfqsError:
        return False
    return True


def assert_no_laxer_than_libggml(paths: list[Path]) -> None:
    accepted = [ours_accepts(path) for path in paths]
    for path, mine, theirs in zip(paths, accepted, check.verdicts(paths, "parse"), strict=True):
        assert theirs.accepted or not mine, f"{path.name}: we accept it, libggml: {theirs.reason}"


def mutated(draw: random.Random, whole: bytes) -> bytes:
    """One to four changes: a byte, an extreme 64-bit number, a run doubled or cut out."""
    raw = bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.randrange(len(raw))
        match draw.randrange(4):
            case 0:
                raw[at] = draw.randrange(256)
            case 1:
                extreme = draw.choice([0, 1, 255, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
                raw[at : at + 8] = extreme.to_bytes(8, "little")
            case 2:
                raw[at:at] = raw[at : at + draw.randrange(1, 40)]
            case 3:
                del raw[at : at + draw.randrange(1, 40)]
    return bytes(raw)


def test_three_thousand_mutations_are_refused_cleanly_wherever_libggml_refuses(tmp_path):
    draw, whole, paths = random.Random(20260519), small_gguf(), []
    header_end = read_back(tmp_path, whole).data_offset
    for i in range(3000):
        paths.append(tmp_path / f"{i}.gguf")
        paths[-1].write_bytes(mutated(draw, whole[:header_end]) + whole[header_end:])
    assert_no_laxer_than_libggml(paths)


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    """Up to the last tensor's last byte: llama.cpp reads a file without the padding after that."""
    whole = small_gguf()
    header = read_back(tmp_path, whole)
    data_end = header.data_offset + header.tensors[-1].offset + header.tensors[-1].nbytes
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    for end in range(len(whole), -1, -1):
        os.truncate(path, end)
        if end < header.data_offset:
            with pytest.raises(HeaderError):
                read_header(path)
        assert ours_accepts(path) == (end >= data_end), f"cut at {end} of {len(whole)}"


def read_back(folder: Path, raw: bytes) -> GGUFHeader:
    path = folder / "whole.gguf"
    path.write_bytes(raw)
    return read_header(path)
