"""Merging: byte-identical to llama.cpp's own tool, whole or not at all, and nothing lost on the way."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import libggml
import pytest
from gguf_fixtures import Spec, field, gguf_bytes, split_fields, split_like_llama

from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, SpaceError
from dfqs_nb.core.files import sha256_of
from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.gguf.header import check_layout, read_header
from dfqs_nb.gguf.shards import open_shards, shard_path
from dfqs_nb.llama import check
from dfqs_nb.merge import copy, disk, merge_model
from dfqs_nb.merge import merge as merging
from dfqs_nb.merge.verify import manifest_path

pytestmark = pytest.mark.usefixtures("parser_is_asked_once_a_header")

REFERENCE = data_dir() / "reference"
RECORDED = json.loads((Path(__file__).resolve().parents[2] / "data/merge_hashes.json").read_text())["models"]
SHARD = {name: shard_path(REFERENCE / f"DFQS-Nano-{name}", 1, 2) for name in RECORDED}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [Path(shutil.copy(shard_path(REFERENCE / "DFQS-Nano-IQ1_S-XL", n, 2), tmp_path)) for n in (1, 2)]


def leftovers(folder: Path, *expected: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {path.name for path in expected}


@pytest.mark.parametrize("name", RECORDED)
def test_shipped_pair_merges_as_the_reference_tool_does(tmp_path, name):
    result = merge_model(SHARD[name], tmp_path / "out.gguf")
    assert sha256(result.path) == result.sha256 == RECORDED[name]["merged"]
    assert result.nbytes == result.path.stat().st_size == RECORDED[name]["bytes"]


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("n_shards", ["2", "3", "7"])
def test_splits_merge_as_the_reference_tool_does(tmp_path, merged_reference, name, n_shards):
    recorded = RECORDED[name]["splits"][n_shards]
    whole = merged_reference if name == "IQ1_S-XL" else merge_model(SHARD[name], tmp_path / "w").path
    paths = split_like_llama(whole, recorded["split_max_tensors"], tmp_path / "m")
    assert [sha256(path) for path in paths] == recorded["shards"], "the fixture is not the tool's split"
    assert merge_model(paths[-1], tmp_path / "out.gguf").sha256 == recorded["merged"]


def test_manifest_holds_the_hashes(tmp_path):
    result = merge_model(SHARD["IQ1_S-XL"], tmp_path / "out.gguf")
    kept = json.loads(manifest_path(result.path).read_text())
    assert kept["sha256"] == result.sha256 and kept["file"] == "out.gguf"
    assert kept["tensors"] == open_shards(result.path).tensor_hashes()
    assert str(tmp_path) not in manifest_path(result.path).read_text(), "a path of this machine was kept"


def test_llama_cpp_accepts_the_result(merged_reference):
    assert check.parse(merged_reference).accepted and libggml.table(merged_reference).n_tensors == 126


def test_merging_a_merged_file_changes_nothing(tmp_path, merged_reference):
    assert merge_model(merged_reference, tmp_path / "again.gguf").sha256 == sha256(merged_reference)


def test_one_dimensional_tails_and_alignment(tmp_path):
    """Shapes with trailing ones, a zero-length array, and an alignment of 64 (see the module's note)."""
    specs = [Spec("a", "F32", (3, 1, 1)), Spec("b", "Q8_0", (32, 5, 1, 1)), Spec("c", "F32", (1, 1))]
    keys = [
        field("general.architecture", "STRING", "x"),
        field("general.alignment", "UINT32", 64),
        field("none", "[STRING]", []),
    ]
    paths = [shard_path(tmp_path / "m", n, 2) for n in (1, 2)]
    paths[0].write_bytes(gguf_bytes([*keys, *split_fields(0, 2, 3)], specs[:2], alignment=64))
    paths[1].write_bytes(gguf_bytes([keys[1], *split_fields(1, 2, 3)], specs[2:], alignment=64))
    header = read_header(merge_model(paths[0], tmp_path / "out.gguf").path)
    check_layout(header)
    assert [t.shape for t in header.tensors] == [(3,), (32, 5), (1,)]
    assert header["split.count"] == 0 and list(header)[-1] == "split.count"
    data = header.path.read_bytes()[header.data_offset :]
    assert [data[t.offset :][: t.nbytes] for t in header.tensors] == [spec.bytes() for spec in specs]


def test_a_first_shard_without_tensors(tmp_path):
    """As `llama-gguf-split --no-tensor-first-split` writes it: metadata and padding only."""
    header = read_header(merge_model(SHARD["IQ1_S-XL"], tmp_path / "whole.gguf").path)
    kept = [header.raw[slice(*entry.record)] for name, entry in header.fields.items() if "split" not in name]
    whole = header.path.read_bytes()
    specs = [
        Spec(t.name, t.type_code, t.shape, data=whole[header.data_offset + t.offset :][: t.nbytes])
        for t in header.tensors
    ]
    first, second = (shard_path(tmp_path / "m", n, 2) for n in (1, 2))
    lead = gguf_bytes([*kept, *split_fields(0, 2, 126)])
    first.write_bytes(lead + bytes(-len(lead) % 32))
    second.write_bytes(gguf_bytes(split_fields(1, 2, 126), specs))
    assert len(lead) % 32, "the padding is what this tests"
    assert merge_model(first, tmp_path / "out.gguf").sha256 == RECORDED["IQ1_S-XL"]["merged"]


# Nothing is written over, nothing is left behind.


def refused(
    error: type[DfqsError], *words: str, output: Path, model: Path = SHARD["IQ1_S-XL"], **options
) -> None:
    before = output.read_bytes() if output.is_file() else None
    kept = set(output.parent.iterdir()) if output.parent.is_dir() else set()
    with pytest.raises(error) as caught:
        merge_model(model, output, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert (output.read_bytes() if output.is_file() else None) == before
    assert (set(output.parent.iterdir()) if output.parent.is_dir() else set()) == kept, "something was left"


def test_existing_output_is_kept(tmp_path):
    output = tmp_path / "out.gguf"
    output.write_bytes(b"precious")
    refused(OutputError, "exists already", "--overwrite", output=output)
    assert merge_model(SHARD["IQ1_S-XL"], output, overwrite=True).sha256 == sha256(output)


def test_output_may_not_be_a_shard(pair):
    for output in pair:
        refused(OutputError, "is one of the files", output=output, model=pair[0], overwrite=True)
    link = pair[0].with_name("link.gguf")
    link.symlink_to(pair[1])
    refused(OutputError, "is one of the files", output=link, model=pair[0], overwrite=True)


def test_folder_missing(tmp_path):
    refused(OutputError, "its folder does not exist", output=tmp_path / "none" / "out.gguf")


def test_no_space_is_seen_before_the_first_byte(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(SpaceError, "needs 5,752,960 bytes", "1,000 are free", output=tmp_path / "out.gguf")


def test_consume_is_advised_only_where_it_makes_room(pair, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(SpaceError, match="free 4,752,960 bytes$"):
        merge_model(pair[0], tmp_path / "out.gguf")
    monkeypatch.setattr(merging, "CONSUME_EXTRA_BYTES", 0)
    with pytest.raises(SpaceError, match="free 4,752,960 bytes, or pass --consume .repair: --in-place."):
        merge_model(pair[0], tmp_path / "out.gguf")


@pytest.fixture
def small_windows(monkeypatch):
    """The reference model in 88 windows, not in one."""
    monkeypatch.setattr(copy, "WINDOW_BYTES", 1 << 16)


@pytest.mark.parametrize("nth", [1, 5, 60])
def test_no_space_on_the_way(tmp_path, monkeypatch, small_windows, nth):
    calls, real = [], os.pwrite

    def pwrite(*arguments):
        calls.append(1)
        if len(calls) >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    refused(SpaceError, "filled up", "removed", output=tmp_path / "out.gguf")


def test_no_space_on_a_real_full_disk(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        refused(SpaceError, "needs 5,752,960 bytes", output=disk / "out.gguf")
        monkeypatch.setattr(merging, "check_output", lambda *_, **__: None)
        refused(SpaceError, "filled up", "removed", output=disk / "out.gguf")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_read_only_folder(tmp_path):
    """As an ordinary user: root may write everywhere."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    script = (
        "import os, sys\n"
        "from dfqs_nb.merge import merge_model\n"
        "from dfqs_nb.core.errors import OutputError\n"
        "os.getuid() or os.setuid(65534)\n"
        "try: merge_model(sys.argv[1], sys.argv[2])\n"
        "except OutputError as error: print(error)\n"
    )
    shards = [shutil.copy(path, tmp_path) for path in open_shards(SHARD["IQ1_S-XL"]).paths]
    for place in (tmp_path, *tmp_path.parents):
        if place.stat().st_uid == os.getuid() and place.is_relative_to("/tmp"):
            place.chmod(place.stat().st_mode | 0o055)
            if place.parent == Path("/tmp"):
                break
    folder.chmod(0o555)
    ran = subprocess.run(
        [sys.executable, "-c", script, shards[0], str(folder / "out.gguf")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert "locked: the folder may not be written; choose another" in ran.stdout, ran.stderr
    assert list(folder.iterdir()) == []


def test_second_process_on_one_output_is_refused(tmp_path):
    output = tmp_path / "out.gguf"
    with disk.open_own(disk.part_path(output)) as part:
        disk.lock_part(part, output)
        with pytest.raises(OutputError, match="another process is writing it"):
            merge_model(SHARD["IQ1_S-XL"], output)
    assert disk.part_path(output).exists(), "the first one's file was removed"
    disk.part_path(output).unlink()
    with disk.open_own(disk.part_path(output)) as part:
        disk.part_path(output).rename(output)
        with pytest.raises(OutputError, match="another process is writing it"):
            disk.lock_part(part, output)


def test_a_header_that_llama_cpp_refuses_releases_nothing(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "parse", lambda path: check.Verdict(False, "key 'x' is odd"))
    for consume in (False, True):
        with pytest.raises(IntegrityError, match="llama.cpp refuses the result: key 'x' is odd"):
            merge_model(pair[0], tmp_path / "o", consume=consume)
        assert leftovers(tmp_path, *pair) == set()
    assert [path.read_bytes() for path in pair] == [
        path.read_bytes() for path in open_shards(SHARD["IQ1_S-XL"]).paths
    ]


def test_stale_part_of_a_killed_merge_is_no_obstacle(tmp_path):
    (tmp_path / ".out.gguf.part").write_bytes(os.urandom(9_000_000))
    result = merge_model(SHARD["IQ1_S-XL"], tmp_path / "out.gguf")
    assert result.sha256 == RECORDED["IQ1_S-XL"]["merged"] == sha256(result.path)


def test_bit_flipped_on_the_way_to_disk_is_caught(tmp_path, monkeypatch, small_windows):
    real, calls = os.pwrite, []

    def pwrite(handle, view, offset):
        calls.append(1)
        data = bytearray(view)
        if len(calls) == 40:
            data[len(data) // 2] ^= 1
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    refused(IntegrityError, "came back from the disk changed", output=tmp_path / "out.gguf")


def test_file_systems_without_direct_writes(tmp_path, monkeypatch, small_windows):
    """It is not there at all, or refused when it is used."""
    real = os.pwrite

    def pwrite(handle, view, offset):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, view, offset)

    direct = getattr(os, "O_DIRECT", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        assert merge_model(SHARD["IQ1_S-XL"], tmp_path / "a").sha256 == RECORDED["IQ1_S-XL"]["merged"]
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    result = merge_model(SHARD["IQ1_S-XL"], tmp_path / "b")
    assert result.sha256 == RECORDED["IQ1_S-XL"]["merged"] == sha256(result.path) == sha256(tmp_path / "a")


def test_shard_cut_while_merging_is_caught(pair, tmp_path, monkeypatch):
    real = merging.plan_merge

    def plan_then_cut(shards):
        os.truncate(pair[1], 900_000)
        return real(shards)

    monkeypatch.setattr(merging, "plan_merge", plan_then_cut)
    output = tmp_path / "o"
    with pytest.raises(IntegrityError, match="ended inside tensor"):
        merge_model(pair[0], output)
    assert leftovers(tmp_path, *pair) == set()


def test_shard_changed_while_merging_is_caught(pair, tmp_path, monkeypatch):
    real = copy.Part.finish
    monkeypatch.setattr(copy.Part, "finish", lambda *a: (real(*a), os.utime(pair[0], (1, 1))))
    with pytest.raises(IntegrityError, match="changed since its merge began"):
        merge_model(pair[0], tmp_path / "o")
    assert leftovers(tmp_path, *pair) == set()


def test_published_hash(merged_reference):
    whole = hashlib.sha256(merged_reference.read_bytes()).hexdigest()
    assert sha256_of(merged_reference) == whole == RECORDED["IQ1_S-XL"]["merged"]
