"""Verification: what it proves, and which tensor it names when it cannot."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from llama_cpp_tools import Unavailable, tool

from dfqs_nb.core.errors import IntegrityError, LayoutError, OutputError
from dfqs_nb.core.files import sha256_of
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf import models as registry
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.shards import open_shards, shard_path
from dfqs_nb.merge import merge_model
from dfqs_nb.merge import verify_model as verify
from dfqs_nb.merge.verify import hash_file, manifest_path

pytestmark = pytest.mark.usefixtures("parser_is_asked_once_a_header")

SHARDS = [shard_path(data_dir() / "reference/DFQS-Nano-IQ1_S-XL", n, 2) for n in (1, 2)]
DATA = Path(__file__).resolve().parents[2] / "data"
MERGED_SHA256 = json.loads((DATA / "merge_hashes.json").read_text())["models"]["IQ1_S-XL"]["merged"]
RECORDED = DATA / "xxh64_reference.txt"  # what llama-gguf-hash --xxh64 printed, by the slow test below


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return merge_model(SHARDS[0], tmp_path / "model.gguf").path


@pytest.fixture
def glued(tmp_path: Path) -> Path:
    path = tmp_path / "glued.gguf"
    path.write_bytes(b"".join(shard.read_bytes() for shard in SHARDS))
    return path


def damage(path: Path, tensor: str) -> None:
    header = read_header(path)
    row = next(t for t in header.tensors if t.name == tensor)
    flip(path, header.data_offset + row.offset + row.nbytes // 2)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def recorded() -> dict[str, str]:
    """Tensor to XXH64, from lines like ``xxh64  0123456789abcdef  model.gguf:token_embd.weight``."""
    rows = [line.split() for line in RECORDED.read_text().splitlines()]
    return {row[2].split(":", 1)[1]: row[1] for row in rows if len(row) == 3 and ":" in row[2]}


def test_hashes_are_those_of_llama_gguf_hash(model):
    assert len(recorded()) == 126
    assert open_shards(model).tensor_hashes() == recorded()
    assert hash_file(model, [read_header(model)])[:2] == (MERGED_SHA256, recorded())


@pytest.mark.slow
def test_recorded_hashes_are_still_those_of_the_tool(model):
    try:
        program = tool("llama-gguf-hash")
    except Unavailable as reason:
        pytest.skip(str(reason))
    ran = subprocess.run(
        [str(program), "--xxh64", model.name], cwd=model.parent, capture_output=True, text=True, check=True
    )
    assert {tuple(line.split()[1:]) for line in ran.stdout.splitlines() if ":" in line} == {
        (value, f"model.gguf:{name}") for name, value in recorded().items()
    }


def test_merged_model_passes_everything(model):
    proof = verify(model, sha256=MERGED_SHA256.upper(), against=SHARDS[0])
    assert (proof.sha256, proof.tensors, proof.nbytes) == (MERGED_SHA256, recorded(), model.stat().st_size)
    assert proof.compared == (
        "its manifest",
        "the tensors of its shards",
        "the SHA-256 that was given",
        "the SHA-256 in its manifest",
    )
    assert not proof.published and "was not tried" in proof.meaning[-1]


def test_damaged_tensor_is_named(model):
    damage(model, "blk.3.ffn_gate_exps.weight")
    words = "1 of 126 tensors differ from its manifest: blk.3.ffn_gate_exps.weight; get it"
    with pytest.raises(IntegrityError, match=words):
        verify(model)
    manifest_path(model).unlink()
    with pytest.raises(
        IntegrityError, match="differ from the tensors of its shards: blk.3.ffn_gate_exps.weight"
    ):
        verify(model, against=SHARDS)
    with pytest.raises(IntegrityError, match="SHA-256 is .* the SHA-256 that was given is"):
        verify(model, sha256=MERGED_SHA256)


def test_two_damaged_tensors_are_named(model):
    damage(model, "token_embd.weight")
    damage(model, "output_norm.weight")
    with pytest.raises(
        IntegrityError,
        match="2 of 126 .*: token_embd.weight, output_norm.weight|2 of 126 .*: "
        "output_norm.weight, token_embd.weight",
    ):
        verify(model)


def test_damaged_header_is_told_from_damaged_tensors(model):
    header = read_header(model)
    flip(model, header.fields["general.name"].value_start + 9)
    with pytest.raises(IntegrityError, match="its tensors are those of its manifest, so header or padding"):
        verify(model)


def test_cut_model(model):
    with model.open("r+b") as file:
        file.truncate(model.stat().st_size - 1000)
    with pytest.raises(IntegrityError, match="its manifest says 5,752,960"):
        verify(model)
    manifest_path(model).unlink()
    with pytest.raises(LayoutError, match="short"):
        verify(model)


def test_manifest_for_a_file_that_has_none(model):
    before = json.loads(manifest_path(model).read_text())
    manifest_path(model).unlink()
    assert verify(model).compared == ()
    assert "compared with nothing" in verify(model).meaning[0]
    after = json.loads(manifest_path(verify(model, write_manifest=True).path).read_text())
    assert after["tensors"] == before["tensors"] and after["sha256"] == before["sha256"]
    damage(model, "output.weight")
    with pytest.raises(IntegrityError, match="output.weight"):
        verify(model)


def test_a_wrong_hash_that_was_given_does_not_blame_a_file_that_equals_its_manifest(model):
    with pytest.raises(IntegrityError, match="the SHA-256 that was given is 0") as caught:
        verify(model, sha256="0" * 64)
    assert "was changed" not in caught.value.what


def test_a_folder_that_takes_no_manifest_is_named_before_the_file_is_read(model, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("dfqs_nb.merge.verify.hash_file", lambda *_: pytest.fail("hours of reading"))
    with pytest.raises(OutputError, match="no manifest can be written here"):
        verify(model, write_manifest=True)


def test_an_unfinished_download_verifies_as_such_and_gets_no_manifest(model):
    manifest_path(model).unlink()
    raw = model.read_bytes()
    with model.open("wb") as file:
        file.write(raw[:4_000_000])
        file.truncate(len(raw))
    proof = verify(model)
    assert not proof.diagnosis.sound and "were never stored" in proof.meaning[-1]
    with pytest.raises(IntegrityError, match="gets no manifest"):
        verify(model, write_manifest=True)
    assert not manifest_path(model).exists()


def test_broken_manifest_is_said_so(model):
    manifest_path(model).write_text("{")
    with pytest.raises(IntegrityError, match="manifest.json: cannot be read"):
        verify(model)


def test_shards_of_another_model(model):
    with pytest.raises(IntegrityError, match="tensors differ from the tensors of its shards"):
        verify(model, against=shard_path(data_dir() / "reference/DFQS-Nano-Q8_0", 1, 2))


def test_registered_shard_is_authentic(tmp_path):
    shard = Path(shutil.copy(SHARDS[1], tmp_path))
    proof = verify(shard)
    assert proof.published == f"{shard.name} of dfqs-nano-iq1_s-xl"
    assert "its published SHA-256" in proof.compared and "authentic" in proof.meaning[1]
    flip(shard, shard.stat().st_size - 500)
    with pytest.raises(IntegrityError, match="its published SHA-256 is e29da"):
        verify(shard)


def test_authentic_is_not_loadable(glued, monkeypatch):
    """What the published hash of the DFQS 1.0 artifact proves: its file is glued together likewise."""
    known = registry.ModelFile("DeepSeek.gguf", glued.stat().st_size, sha256_of(glued))
    artifact = registry.registered()["deepseek-v4-flash-iq1_s-xl-single"]
    monkeypatch.setattr(registry, "registered", lambda: {artifact.name: replace(artifact, files=(known,))})
    proof = verify(glued, against=SHARDS[0])
    _, authentic, loads = proof.meaning
    assert "byte for byte what was published as DeepSeek.gguf" in authentic
    assert loads.startswith("yet it does not load: 2 shards glued together")
    assert proof.tensors == recorded()


def test_hash_once_reads_across_every_piece(model, monkeypatch):
    from dfqs_nb.core import files

    monkeypatch.setattr(files, "CHUNK_BYTES", 4099)
    assert hash_file(model, [read_header(model)])[:2] == (MERGED_SHA256, recorded())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "[" * 4000,
        '{"a":' * 5000,
        '{"nbytes": "5", "tensors": []}',
        '{"nbytes": 1e999}',
        "NaN",
    ],
)
def test_a_manifest_of_junk_is_said_so(text, model, tmp_path):
    manifest_path(model).write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest.json: cannot be read"):
        verify(model)
    shard = SHARDS[0]
    assert merge_model(shard, model, overwrite=True).sha256 == MERGED_SHA256


@pytest.mark.parametrize(
    "change", [{"tensors": {"a": 1}}, {"sources": ["x"]}, {"sha256": 5}, {"nbytes": None}]
)
def test_a_manifest_with_values_of_another_type_is_said_so(change, model):
    kept = json.loads(manifest_path(model).read_text())
    manifest_path(model).write_text(json.dumps({**kept, **change}))
    with pytest.raises(IntegrityError, match="cannot be read as a manifest"):
        verify(model)


def test_tensors_of_only_zeros_are_told_as_what_a_stopped_download_leaves(model):
    manifest_path(model).unlink()
    last = max((header := read_header(model)).tensors, key=lambda tensor: tensor.offset)
    before = verify(model).zeros
    with model.open("r+b") as file:
        file.seek(header.data_offset + last.offset)
        file.write(bytes(last.nbytes))
    result = verify(model)
    assert set(result.zeros) == {*before, last.name}
    assert f"{len(result.zeros)} of {len(result.tensors)} tensors hold only zeros" in result.meaning[-2]
    assert "weights were not read" in result.diagnosis.finding
