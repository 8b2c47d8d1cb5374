"""Nothing is deleted that was not asked for, and no file is trusted because of where it lies or what it is called."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killable import SMALL_WINDOW_BYTES

from dfqs_nb import merge
from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, SpaceError
from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.gguf import broken
from dfqs_nb.merge import copy, disk
from dfqs_nb.merge.copy import Journal, Plan, read_journal, windows
from dfqs_nb.merge.disk import journal_path, part_path
from dfqs_nb.merge.merge import earlier_result
from dfqs_nb.merge.verify import manifest_path, read_manifest

pytestmark = pytest.mark.usefixtures("parser_is_asked_once_a_header")

MERGED = json.loads((Path(__file__).resolve().parents[2] / "data/merge_hashes.json").read_text())["models"][
    "IQ1_S-XL"
]["merged"]
SHARDS = broken.reference_shards().paths
needs_holes = pytest.mark.skipif(not disk.can_punch(tempfile.gettempdir()), reason="no holes here")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    (tmp_path / "shards").mkdir()
    return [Path(shutil.copy(path, tmp_path / "shards")) for path in SHARDS]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "WINDOW_BYTES", SMALL_WINDOW_BYTES)


def merged(model: Any, output: Path, **options: Any) -> str:
    return merge.merge_model(model, output, **options).sha256


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is never consumed ----


def hub_cache(pair: list[Path]) -> list[Path]:
    """The shards as the hub's cache keeps them: blobs, and links with the names."""
    cache = pair[0].parent / "cache"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/c0ffee").mkdir(parents=True)
    links = []
    for path in pair:
        blob = path.rename(cache / "blobs" / sha256(path))
        links.append(cache / "snapshots/c0ffee" / path.name)
        links[-1].symlink_to(f"../../blobs/{blob.name}")
    return links


def hard_linked(pair: list[Path]) -> list[Path]:
    os.link(pair[1], pair[1].with_name("second-name.gguf"))
    return pair


def soft_linked(pair: list[Path]) -> list[Path]:
    real = pair[1].rename(pair[1].with_name("elsewhere.gguf"))
    pair[1].symlink_to(real)
    return pair


@pytest.mark.parametrize("make", [hub_cache, hard_linked, soft_linked])
def test_a_shared_file_is_never_consumed(make: Callable, pair: list[Path], tmp_path: Path) -> None:
    model = make(pair)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="must not be deleted"):
        merged(model[0], tmp_path / "out.gguf", consume=True)
    assert contents(tmp_path) == before
    assert merged(model[0], tmp_path / "out.gguf") == MERGED, "reading it is fine"
    assert {path: data for path, data in contents(tmp_path).items() if path in before} == before


def test_a_blob_of_the_hub_cache_is_not_consumed_under_its_own_name(pair: list[Path], tmp_path: Path) -> None:
    blobs = [link.resolve() for link in hub_cache(pair)]
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="cache of the Hugging Face hub"):
        merged(blobs, tmp_path / "out.gguf", consume=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("model", ["dfqs-nano-iq1_s-xl", "path", "odd path"])
def test_the_workbook_s_own_data_is_never_consumed(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(data_dir(), tmp_path / "data"))
    monkeypatch.setenv("DFQS_DATA", str(data))
    (tmp_path / "link").symlink_to(data)
    places = {"path": data, "odd path": tmp_path / "link/../data"}
    given = places[model] / "reference" / SHARDS[0].name if model in places else model
    before = contents(data)
    with pytest.raises(OutputError, match="the workbook's own data"):
        merged(given, tmp_path / "out.gguf", consume=True)
    glued = broken.glue(data / "reference")
    before = contents(data)
    with pytest.raises(OutputError, match="the workbook's own data"):
        merge.repair(glued, in_place=True)
    assert contents(data) == before


def test_repair_in_place_through_a_link_is_refused(tmp_path: Path) -> None:
    glued = broken.glue(tmp_path)
    link = tmp_path / "link.gguf"
    link.symlink_to(glued)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="a link to"):
        merge.repair(link, in_place=True)
    assert contents(tmp_path) == before and link.is_symlink()


@needs_holes
def test_a_repeated_consuming_merge_says_where_the_model_is(pair: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    assert merged(pair[0], output, consume=True) == MERGED and not any(path.exists() for path in pair)
    for call in (
        lambda: merged(pair[0], output, consume=True),
        lambda: merge.open_source(str(pair[0]), merged_to=tmp_path),
    ):
        with pytest.raises(DfqsError, match="was merged and then deleted.*out.gguf"):
            call()
    assert sha256(output) == MERGED
    manifest = manifest_path(output)
    kept = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**kept, "sources": [{}]}))
    with pytest.raises(DfqsError, match="no such file"):
        merge.open_source(str(pair[0]), merged_to=tmp_path)


# ---- planted working files ----


def planted_part(output: Path, plan: Plan) -> bytes:
    """A part file of the right size, header and tensor table, with other weights in it."""
    forged = plan.header + os.urandom(plan.nbytes - len(plan.header))
    part_path(output).write_bytes(forged)
    return forged


def planted_journal(output: Path, planned: Plan, forged: bytes, **more: Any) -> None:
    """A journal that claims that the forged part is a proven copy of these sources."""
    import xxhash

    step = SMALL_WINDOW_BYTES
    head = {"plan": planned.fingerprint, "window": step, "sources": list(planned.identities), **more}
    lines: list[dict[str, Any]] = [head]
    for start in range(0, planned.nbytes, step):
        window = forged[start : start + step]
        lines.append({"end": start + len(window), "xxh3": xxhash.xxh3_64_hexdigest(window)})
        lines.append({"released": start + len(window)})
    digest = hashlib.sha256(forged).hexdigest()
    lines.append({"valid": {"sha256": digest, "hashes": {}, "nbytes": planned.nbytes}})
    journal_path(output).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_planted_part_is_not_adopted(pair: list[Path], tmp_path: Path, small: None) -> None:
    output = tmp_path / "out.gguf"
    planted_part(output, merge.open_source(pair[0]).plan)
    assert merged(pair[0], output) == MERGED == sha256(output)


@needs_holes
@pytest.mark.parametrize("action", ["consume", "repair"])
def test_a_planted_journal_does_not_stand_for_bytes_that_exist(
    action: str, pair: list[Path], tmp_path: Path, small: None
) -> None:
    bystander = tmp_path / "bystander.gguf"
    bystander.write_bytes(b"precious")
    glued = broken.glue(tmp_path)
    output = glued if action == "repair" else tmp_path / "out.gguf"
    plan = merge.open_source(glued if action == "repair" else pair[0]).plan
    forged = planted_part(output, plan)
    planted_journal(output, plan, forged, paths=[str(bystander)] * len(plan.sources), consume=True)
    if action == "repair":
        result = merge.repair(glued, in_place=True)
    else:
        result = merge.merge_model(pair[0], output, consume=True)
    assert result.sha256 == MERGED == sha256(output)
    assert bystander.read_bytes() == b"precious" and not journal_path(output).exists()


@needs_holes
def test_a_planted_journal_of_a_finished_merge_deletes_nothing_whole(
    pair: list[Path], tmp_path: Path
) -> None:
    """Output and manifest are there and agree, as after a merge that was killed before it deleted its sources."""
    output = tmp_path / "out.gguf"
    output.write_bytes(b"GGUF" + bytes(100))
    plan = merge.open_source(pair[0]).plan
    planted_journal(output, plan, bytes(plan.nbytes))
    stat = output.stat()
    manifest = {
        "file": output.name,
        "nbytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "inode": stat.st_ino,
        "sha256": sha256(output),
        "seconds": 1.0,
        "sources": list(plan.identities),
        "tensors": {},
    }
    manifest_path(output).write_text(json.dumps(manifest))
    merge.merge_model(pair[0], output, consume=True)
    assert [path.read_bytes() for path in pair] == [path.read_bytes() for path in SHARDS]


@needs_holes
def test_a_journal_of_other_sources_is_refused_and_kept(
    pair: list[Path], tmp_path: Path, small: None
) -> None:
    output = tmp_path / "out.gguf"
    plan = merge.open_source(pair[0]).plan
    forged = planted_part(output, plan)
    others = [{**identity, "mtime_ns": 5} for identity in plan.identities]
    planted_journal(output, plan, forged, sources=others)
    before = contents(tmp_path)
    with pytest.raises(IntegrityError, match="changed since its merge began"):
        merged(pair[0], output, consume=True)
    planted_journal(output, plan, forged, plan="0" * 64)
    with pytest.raises(IntegrityError, match="is in the way"):
        merged(pair[0], output, consume=True)
    assert contents(pair[0].parent) == {path: data for path, data in before.items() if path in pair}


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\n",
        b"[" * 4000 + b"\n",
        b"[1]\n",
        b'{"plan": 1}\n{"end": "x"}\n',
        b"\xff\xfe\n",
        b'{"a":' * 9000,
    ],
    ids=["empty", "line", "deep", "list", "types", "bytes", "deeper"],
)
@needs_holes
def test_a_journal_of_junk_is_no_journal(junk: bytes, pair: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    journal_path(output).write_bytes(junk)
    assert merged(pair[0], output, consume=True) == MERGED == sha256(output)


@needs_holes
def test_sources_with_holes_and_a_lost_journal_are_not_copied_as_zeros(
    pair: list[Path], tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal lost its last lines: what they stand for is nowhere but in the part file."""
    output, real, calls = tmp_path / "out.gguf", disk.punch, []

    def punch(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(disk, "punch", punch)
    with pytest.raises(KeyboardInterrupt):
        merged(pair[0], output, consume=True)
    lines = journal_path(output).read_bytes().splitlines(keepends=True)
    journal_path(output).write_bytes(b"".join(lines[:5]))
    part = part_path(output).read_bytes()
    with pytest.raises(IntegrityError, match="have holes where bytes"):
        merged(pair[0], output, consume=True)
    assert part_path(output).read_bytes() == part and all(path.exists() for path in pair)
    journal_path(output).write_bytes(b"".join(lines))
    assert merged(pair[0], output, consume=True) == MERGED


# ---- links, pipes and names ----


@pytest.mark.parametrize("consume", [False, pytest.param(True, marks=needs_holes)])
@pytest.mark.parametrize("place", [part_path, journal_path])
@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard link", "pipe", "folder"])
def test_what_lies_at_a_working_file_s_place_is_not_followed(
    kind: str, place: Callable[[Path], Path], consume: bool, pair: list[Path], tmp_path: Path
) -> None:
    output, victim = tmp_path / "out.gguf", tmp_path / "victim"
    victim.write_bytes(b"precious")
    trap = place(output)
    make = {
        "symlink": lambda: trap.symlink_to(victim),
        "dangling": lambda: trap.symlink_to(tmp_path / "new"),
        "hard link": lambda: os.link(victim, trap),
        "pipe": lambda: os.mkfifo(trap),
        "folder": trap.mkdir,
    }
    make[kind]()
    signal.alarm(60)  # a pipe must not hang
    try:
        digest = merged(pair[0], output, consume=consume)
        assert digest == MERGED == sha256(output), "it was in nobody's way"
    except OutputError as error:
        assert error.hint and not output.exists()
        assert [path.read_bytes() for path in pair] == [path.read_bytes() for path in SHARDS]
        assert os.path.lexists(trap), "what is not ours was removed"
    finally:
        signal.alarm(0)
    assert victim.read_bytes() == b"precious" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("consume", [False, pytest.param(True, marks=needs_holes)])
def test_a_file_that_takes_the_name_meanwhile_is_kept(
    consume: bool, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real = tmp_path / "out.gguf", disk.rename_new

    def taken(path: Path, target: Path) -> None:
        target.write_bytes(b"precious")
        real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "rename_new", taken)
        with pytest.raises(OutputError, match="took this name"):
            merged(pair[0], output, consume=consume)
    assert output.read_bytes() == b"precious" and not manifest_path(output).exists()
    assert sha256(part_path(output)) == MERGED, "the result is not lost"
    output.unlink()
    assert merged(pair[0], output, consume=consume) == MERGED == sha256(output)


@pytest.mark.parametrize("missing", [False, True])
def test_a_rename_replaces_nothing(missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        monkeypatch.setattr(disk, "LIBC", object())
    first, second, third = (tmp_path / name for name in "abc")
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    with pytest.raises(FileExistsError):
        disk.rename_new(first, second)
    assert (first.read_bytes(), second.read_bytes()) == (b"1", b"2")
    third.symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError):
        disk.rename_new(first, third)
    disk.rename_new(first, tmp_path / "d")
    assert not first.exists() and (tmp_path / "d").read_bytes() == b"1"


@pytest.mark.parametrize("consume", [False, pytest.param(True, marks=needs_holes)])
@pytest.mark.parametrize("how", ["truncate", "write", "replace"])
def test_a_part_that_is_changed_after_its_checks_is_not_named(
    how: str, consume: bool, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real = tmp_path / "out.gguf", copy.Run.check_sources
    part = part_path(output)

    def tampered(self: copy.Run) -> None:
        real(self)
        if how == "truncate":
            os.truncate(part, 5_000_000)
        elif how == "write":
            with part.open("r+b") as file:
                file.seek(3_000_000)
                file.write(b"changed")
        else:
            part.rename(tmp_path / "other")
            part.write_bytes(bytes(5_752_960))

    monkeypatch.setattr(copy.Run, "check_sources", tampered)
    with pytest.raises(IntegrityError, match="changed while it was checked"):
        merged(pair[0], output, consume=consume)
    assert not output.exists() and all(path.exists() for path in pair)


@needs_holes
@pytest.mark.parametrize("reset", [False, True], ids=["changed", "and its time set back"])
def test_a_source_that_is_changed_on_the_way_is_noticed(
    reset: bool, pair: list[Path], tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real, calls = tmp_path / "out.gguf", copy.Part.write, []
    before = pair[1].stat()

    def write(self: copy.Part, view: memoryview, offset: int) -> None:
        calls.append(1)
        if len(calls) == 35:
            with pair[1].open("r+b") as file:
                file.seek(1_500_000)
                file.write(b"changed")
            if reset:
                os.utime(pair[1], ns=(before.st_atime_ns, before.st_mtime_ns))
        real(self, view, offset)

    monkeypatch.setattr(copy.Part, "write", write)
    with pytest.raises(IntegrityError, match="changed since its merge began; nothing more was released"):
        merged(pair[0], output, consume=True)
    assert not output.exists() and all(path.exists() for path in pair)
    for folder_file in (part_path(output), journal_path(output)):
        assert folder_file.exists(), "it holds what the sources no longer have"
    assert b"changed" in pair[1].read_bytes()


@pytest.mark.parametrize("consume", [False, pytest.param(True, marks=needs_holes)])
@pytest.mark.parametrize(
    "name",
    ["x" * 237 + ".gguf", "é" * 120 + ".gguf", "folder", "pipe"],
    ids=["long", "long in bytes", "folder", "pipe"],
)
def test_a_name_that_cannot_be_is_refused_before_the_first_byte(
    name: str, consume: bool, pair: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = contents(tmp_path)
    with pytest.raises(OutputError) as caught:
        merged(pair[0], tmp_path / name, consume=consume, overwrite=True)
    assert caught.value.hint and contents(tmp_path) == before
    assert (tmp_path / "folder").is_dir() and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    "name", ["x" * 236, "é" * 118, "line\nbreak.gguf", "-o", os.fsdecode(b"mod\xe8le.gguf")]
)
def test_a_name_that_can_be_is_taken(name: str, tmp_path: Path) -> None:
    assert merged(SHARDS[0], tmp_path / name) == MERGED == sha256(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.manifest.json"}


def test_merge_once_replaces_no_file_that_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"precious")
    source = merge.open_source(SHARDS[0])
    with pytest.raises(OutputError, match="exists already"):
        merge.merge_once(source, output)
    assert output.read_bytes() == b"precious"
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    with pytest.raises(OutputError, match="exists already"):
        merge.merge_once(source, output, fresh=True)
    assert output.read_bytes() == b"precious", "under the outputs can lie what no run made"
    output.unlink()
    merge.merge_once(source, output)
    assert merge.merge_once(source, output, fresh=True).sha256 == MERGED, "its manifest shows it to be ours"
    output.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        merge.merge_once(source, output)
    assert output.read_bytes() == b"precious", "the manifest is of another file"


@needs_holes
def test_a_file_that_takes_a_sources_name_meanwhile_is_not_deleted(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = copy.Run.give_name

    def give_name(run: Any, *options: Any) -> None:
        real(run, *options)
        pair[1].unlink()
        pair[1].write_bytes(b"a new download")

    monkeypatch.setattr(copy.Run, "give_name", give_name)
    assert merged(pair[0], tmp_path / "out.gguf", consume=True) == MERGED
    assert not pair[0].exists() and pair[1].read_bytes() == b"a new download"


def test_a_file_that_has_the_name_of_the_manifest_stays(tmp_path: Path) -> None:
    output, other = tmp_path / "out.gguf", tmp_path / "out.gguf.manifest.json"
    other.write_text('{"what": "a manifest of another program"}')
    with pytest.raises(IntegrityError, match="cannot be read as a manifest; remove it"):
        merge.merge_model(SHARDS[0], output)
    assert {path.name for path in tmp_path.iterdir()} == {other.name} and "another" in other.read_text()
    assert merge.merge_model(SHARDS[0], output, overwrite=True).sha256 == MERGED
    output.unlink()
    assert merge.merge_model(SHARDS[0], output).sha256 == MERGED, "of a file that we made, and that is gone"


@pytest.mark.parametrize("place", [part_path, journal_path, manifest_path])
def test_a_source_is_no_working_file(place: Callable[[Path], Path], pair: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    named = pair[1].rename(place(output))
    whole = named.read_bytes()
    for options in ({}, {"overwrite": True}, {"consume": True}):
        with pytest.raises(OutputError, match="is a working file of out.gguf; rename it first"):
            merge.merge_model([pair[0], named], output, **options)
    assert named.read_bytes() == whole and list(tmp_path.glob("*out.gguf*")) == [named]


# ---- file systems ----


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(
    number: int, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert merged(pair[0], tmp_path / "out.gguf") == MERGED
    if disk.can_punch(tmp_path):
        with pytest.raises(OutputError, match="has no locks; merge without --consume"):
            merged(pair[0], tmp_path / "second.gguf", consume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "out.gguf", "out.gguf.manifest.json"}


def test_a_file_that_is_too_large_is_not_a_full_disk(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    command = [
        sys.executable,
        "-m",
        "dfqs_nb",
        "merge",
        str(SHARDS[0]),
        "-o",
        str(tmp_path / "out.gguf"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, check=False, preexec_fn=limit
    )
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr
    assert "a file of 5,752,960 bytes" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["can_punch", "open_own"])
def test_a_full_disk_before_the_first_byte_is_no_traceback(
    call: str, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, create: bool = True) -> None:
        if not create:
            raise FileNotFoundError
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, call, full)
    with pytest.raises(SpaceError, match="filled up"):
        merged(pair[0], tmp_path / "out.gguf", consume=True)
    assert [path.read_bytes() for path in pair] == [path.read_bytes() for path in SHARDS]


def test_no_journal_is_left_by_a_plain_merge_after_a_consuming_one_that_did_nothing(
    pair: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    journal_path(output).write_text('{"plan":"x","window":4096,"sources":[]}\n')
    assert merged(pair[0], output) == MERGED and read_journal(output) == []
    assert not journal_path(output).exists()


# ---- mutated manifests and journals ----


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, inserted or cut, or a value replaced by one of another kind."""
    data = bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        action = draw.randrange(5)
        if action == 0:
            data[at] = draw.randrange(256)
        elif action == 1:
            del data[at : at + draw.randint(1, 200)]
        elif action == 2:
            data[at:at] = draw.choice(
                [b"[" * 3000, b'{"a":' * 3000, b"1e999", b"9" * 5000, b"\xff\xfe", b"null"]
            )
        elif action == 3:
            data[at:] = b""
        else:
            value = draw.choice([b"null", b"[]", b"{}", b'"x"', b"-1", b"1e308", b"true"])
            data = bytearray(
                re.sub(rb'(": ?)[^,{\[\n]+', rb"\g<1>" + value, bytes(data), count=draw.randint(1, 3))
            )
        if not data:
            return b""
    return bytes(data)


def survive(count: int, pair: list[Path], folder: Path) -> None:
    """Whatever stands in a manifest or a journal, it is read, or refused with a next step."""
    result = merge.merge_model(pair[0], folder / "out.gguf")
    place, plan = manifest_path(result.path), merge.open_source(pair[0]).plan
    manifest = place.read_bytes()
    planted_journal(result.path, plan, result.path.read_bytes())
    journal = journal_path(result.path).read_bytes()
    for seed in range(count):
        draw = random.Random(seed)
        place.write_bytes(mutated(manifest, draw))
        journal_path(result.path).write_bytes(mutated(journal, draw))
        for call in (
            lambda: read_manifest(result.path),
            lambda: earlier_result(result.path),
            lambda: windows(read_journal(result.path)),
            lambda: begin(result.path, plan),
        ):
            with contextlib.suppress(DfqsError):
                call()
    assert [path.read_bytes() for path in pair] == [path.read_bytes() for path in SHARDS]
    assert sha256(result.path) == MERGED


def begin(output: Path, plan: Plan) -> None:
    with contextlib.ExitStack() as stack:
        pairs = zip(plan.sources, plan.identities, strict=True)
        files = [(path, stack.enter_context(disk.open_locked(path, alone=True)), who) for path, who in pairs]
        own = stack.enter_context(disk.open_own(journal_path(output)))
        Journal(own, plan, [disk.SourceFile(*file) for file in files])


def test_mutated_manifests_and_journals_are_refused(pair: list[Path], tmp_path: Path, small: None) -> None:
    survive(300, pair, tmp_path)


@pytest.mark.slow
def test_20_000_mutated_manifests_and_journals_are_refused(
    pair: list[Path], tmp_path: Path, small: None
) -> None:
    survive(20_000, pair, tmp_path)
