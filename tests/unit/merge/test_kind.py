"""What a file really is: every kind made from the real reference shards, and what llama.cpp's loader says of it."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf_fixtures as fixtures
import pytest
from gguf_fixtures import Spec, field, gguf_bytes
from models_apart import Apart
from no_hang import no_hang
from read_chars import read_chars

from conftest import REFERENCE
from dfqs_nb.core.errors import DfqsError, HeaderError, IntegrityError, ShardError
from dfqs_nb.gguf.header import read_header
from dfqs_nb.llama import check
from dfqs_nb.llama.check import loader_verdict
from dfqs_nb.merge import merge_model, merge_once, open_source, repair
from dfqs_nb.merge.kind import Kind, diagnose, diagnosis_table

# Sizes of the published artifact: shard 1, shard 2, and the file that was said to be their merge
# (arishma108/deepseek-v4-gguf and the DFQS 1.0 document).
PUBLISHED = (49_952_658_368, 11_588_146_976, 61_540_805_344)
SHARDS = [REFERENCE / f"DFQS-Nano-IQ1_S-XL-0000{number}-of-00002.gguf" for number in (1, 2)]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 61540805344\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>\n Sign in &mdash; Hub </title></head><body>no</body></html>"


@dataclass(frozen=True)
class Case:
    """A file's bytes, and what we and llama.cpp say of it; ``says`` is empty where llama.cpp loads it."""

    make: Callable[[Made], bytes]
    kind: Kind
    finding: str
    says: str = ""


@dataclass(frozen=True)
class Made:
    """The reference model: whole, and as its two shards."""

    whole: bytes
    first: bytes
    second: bytes


@pytest.fixture(scope="module")
def made(merged_reference: Path) -> Made:
    return Made(merged_reference.read_bytes(), *(path.read_bytes() for path in SHARDS))


def shifted(step: int) -> bytes:
    """Two tensors, the second ``step`` bytes from where it should be."""
    return gguf_bytes(
        [field("general.architecture", "STRING", "llama")],
        [Spec("a", shape=(64,)), Spec("b", shape=(64,), offset=256 + step), Spec("c", offset=512 + step)],
    ) + bytes(max(step, 0))


BOUNDS = "data is not within the file bounds, model is corrupted or incomplete"
CASES = {
    "single": Case(lambda m: m.whole, Kind.SINGLE_FILE, "a sound model in a single file of 5,752,"),
    "two shards glued": Case(
        lambda m: m.first + m.second,
        Kind.RAW_CONCATENATION,
        "2 shards glued together byte for byte",
        "invalid split file name: case.gguf",
    ),
    "two shards glued in the wrong order": Case(
        lambda m: m.second + m.first,
        Kind.RAW_CONCATENATION,
        "2 shards glued together byte for byte in the order 2, 1",
        "illegal split file idx: 1 (file: case.gguf), model must be loaded with the first split",
    ),
    "shard twice": Case(
        lambda m: m.first + m.first, Kind.DAMAGED, "shard 1 of 2 is there twice", "invalid split file name"
    ),
    "both shards, one of them twice": Case(
        lambda m: m.first + m.second + m.second,
        Kind.DAMAGED,
        "shard 2 of 2 is there twice",
        "invalid split file name",
    ),
    "glued and cut off": Case(
        lambda m: (m.first + m.second)[:-1000], Kind.DAMAGED, "1,000 bytes short", "invalid split file name"
    ),
    "glued and cut off in the second header": Case(
        lambda m: m.first + m.second[:900],
        Kind.DAMAGED,
        "another GGUF follows: the header at byte 3,849,728",
        "invalid split file name",
    ),
    "glued, with more after it": Case(
        lambda m: m.first + m.second + b"more",
        Kind.DAMAGED,
        "4 bytes follow that belong to no shard",
        "invalid split file name",
    ),
    "two models glued": Case(
        lambda m: m.whole + m.whole, Kind.TRAILING_BYTES, "and 5,752,960 bytes after its end"
    ),
    "cut off in the data": Case(
        lambda m: m.whole[:-1000],
        Kind.UNFINISHED,
        "cut off: 1,000 bytes short (has 5,751,960, needs 5,752,960)",
        BOUNDS,
    ),
    "cut off in the header": Case(
        lambda m: m.whole[:10_000],
        Kind.UNFINISHED,
        "cut off inside its header",
        "exceeds remaining file size",
    ),
    "cut off in the preamble": Case(
        lambda m: m.whole[:6], Kind.UNFINISHED, "cut off inside its header", "failed to read header"
    ),
    "more after the end": Case(
        lambda m: m.whole + b"<!-- bye -->", Kind.TRAILING_BYTES, "and 12 bytes after its end"
    ),
    "gap": Case(
        lambda m: shifted(32),
        Kind.DAMAGED,
        "tensor 'b' leaves a gap (offset 288, expected 256)",
        "has offset 288, expected 256",
    ),
    "overlap": Case(
        lambda m: shifted(-32),
        Kind.DAMAGED,
        "tensor 'b' overlaps the tensor before it (offset 224, expected 256)",
        "has offset 224, expected 256",
    ),
    "empty": Case(lambda m: b"", Kind.UNFINISHED, "an empty file", "failed to read magic"),
    "Git LFS pointer": Case(
        lambda m: POINTER,
        Kind.LFS_POINTER,
        "a Git LFS pointer to the model",
        "invalid magic characters: 'vers', expected 'GGUF'",
    ),
    "web page": Case(
        lambda m: PAGE,
        Kind.DOCUMENT,
        "a text or web page saved as a model: Sign in &mdash; Hub",
        "invalid magic characters: '<!DO'",
    ),
    "json": Case(
        lambda m: b'{"error":"Repository not found"}',
        Kind.DOCUMENT,
        "Repository not found",
        "invalid magic characters",
    ),
    "xml": Case(
        lambda m: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>expired</Message></Error>",
        Kind.DOCUMENT,
        "AccessDenied expired",
        "invalid magic characters: '<?xm'",
    ),
    "text": Case(
        lambda m: b"Entry not found", Kind.DOCUMENT, "Entry not found", "invalid magic characters: 'Entr'"
    ),
    "compressed": Case(
        lambda m: gzip.compress(m.first), Kind.OTHER_FORMAT, "a compressed file", "invalid magic characters"
    ),
    "zeros": Case(lambda m: bytes(100_000), Kind.UNFINISHED, "zeros", "invalid magic characters"),
    "big-endian": Case(
        lambda m: gguf_bytes([field("a", "UINT8", 1, ">")], order=">"),
        Kind.OTHER_FORMAT,
        "big-endian",
        "is there a mismatch between the host and model endianness",
    ),
    "version 1": Case(
        lambda m: m.whole[:4] + struct.pack("<I", 1) + m.whole[8:],
        Kind.OTHER_FORMAT,
        "GGUF version 1",
        "GGUFv1 is no longer supported",
    ),
    "broken header": Case(
        lambda m: gguf_bytes([field("a", "UINT8", 1)] * 2),
        Kind.DAMAGED,
        "'a' stands twice",
        "duplicate key 'a'",
    ),
    "safetensors": Case(
        lambda m: struct.pack("<Q", 40) + b'{"a": {}}',
        Kind.OTHER_FORMAT,
        "not a GGUF: it begins with",
        "invalid magic characters",
    ),
    "zip": Case(
        lambda m: b"PK\x03\x04" + bytes(100),
        Kind.OTHER_FORMAT,
        "not a GGUF: it begins with b'PK",
        "invalid magic characters: 'PK",
    ),
    "noise": Case(
        lambda m: bytes(range(255, 0, -1)), Kind.OTHER_FORMAT, "not a GGUF", "invalid magic characters"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_kind_is_told_apart_and_left_as_it_was(name: str, made: Made, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "case.gguf"
    path.write_bytes(content := case.make(made))
    before = path.stat().st_mtime_ns
    diagnosis = diagnose(path)
    assert (diagnosis.kind, case.finding in diagnosis.finding) == (case.kind, True), diagnosis.finding
    assert diagnosis.next_step or diagnosis.sound
    assert "\n" not in diagnosis.finding
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, before)
    assert list(tmp_path.iterdir()) == [path]


def test_llama_cpp_says_of_each_what_the_table_shows(made: Made, tmp_path: Path) -> None:
    paths = []
    for number, case in enumerate(CASES.values()):
        (tmp_path / str(number)).mkdir()
        paths.append(tmp_path / str(number) / "case.gguf")
        paths[-1].write_bytes(case.make(made))
    verdicts = check.verdicts(paths)
    assert [
        (name, verdict.reason)
        for (name, case), verdict in zip(CASES.items(), verdicts, strict=True)
        if verdict.accepted != (not case.says) or case.says not in verdict.reason
    ] == []
    assert str(tmp_path) not in "".join(verdict.reason for verdict in verdicts)
    table = diagnosis_table(paths)
    assert table["kind"].tolist() == [case.kind for case in CASES.values()]
    assert table["llama_cpp"].iloc[0] == "loads" and "invalid split" in table["llama_cpp"].iloc[1]


# ---- raw concatenations ----


def llama_shard(number: int, count: int, n_tensors: int) -> list[bytes]:
    """Metadata of a shard; the first one says the architecture."""
    architecture = [] if number else [field("general.architecture", "STRING", "llama")]
    return [*architecture, *fixtures.split_fields(number, count, n_tensors)]


@pytest.mark.parametrize("n_shards", [2, 3, 7])
def test_every_inner_header_of_a_raw_concatenation_is_found(
    n_shards: int, merged_reference: Path, tmp_path: Path
) -> None:
    shards = fixtures.split_like_llama(merged_reference, -(-126 // n_shards), tmp_path / "s")
    assert len(shards) == n_shards
    glued = tmp_path / "glued.gguf"
    glued.write_bytes(b"".join(path.read_bytes() for path in shards))
    diagnosis, sizes = diagnose(glued), [path.stat().st_size for path in shards]
    assert diagnosis.kind is Kind.RAW_CONCATENATION and str(n_shards) in diagnosis.finding
    assert [part["nbytes"] for part in diagnosis.parts] == sizes and sum(sizes) == glued.stat().st_size
    assert [part["start"] for part in diagnosis.parts] == [sum(sizes[:i]) for i in range(n_shards)]
    assert [(part["number"], part["count"]) for part in diagnosis.parts] == [
        (i + 1, n_shards) for i in range(n_shards)
    ]
    headers = diagnosis.headers
    assert [header.start for header in headers] == [part["start"] for part in diagnosis.parts]
    assert sum(len(header.tensors) for header in headers) == 126
    assert diagnosis.next_step == f"dfqs-nb repair {glued} --in-place"


def test_missing_shards_are_named(merged_reference: Path, tmp_path: Path) -> None:
    shards = fixtures.split_like_llama(merged_reference, 18, tmp_path / "s")
    glued = tmp_path / "glued.gguf"
    glued.write_bytes(b"".join(shards[i].read_bytes() for i in (0, 1, 4, 6)))
    diagnosis = diagnose(glued)
    assert (diagnosis.kind, "shard 3, 4, 6 of 7 is missing" in diagnosis.finding) == (Kind.DAMAGED, True)
    with pytest.raises(ShardError, match="shard 3, 4, 6 of 7 is missing"):
        repair(glued, in_place=True)


def test_shards_of_two_models_are_no_concatenation_of_one(made: Made, tmp_path: Path) -> None:
    glued = tmp_path / "glued.gguf"
    glued.write_bytes(made.second + (REFERENCE / "DFQS-Nano-Q8_0-00001-of-00002.gguf").read_bytes())
    assert (
        diagnose(glued).kind is Kind.RAW_CONCATENATION
    )  # same tensors, other types: what merging would refuse
    specs = [Spec("a"), Spec("b")]
    shards = [
        gguf_bytes(llama_shard(i, 2, n), [spec])
        for i, (spec, n) in enumerate(zip(specs, (2, 3), strict=True))
    ]
    glued.write_bytes(b"".join(shards))
    assert "says the model has 3 tensors; the shards hold 2" in diagnose(glued).finding
    shards = [gguf_bytes(llama_shard(i, 2, 2), [Spec("a")]) for i in range(2)]
    glued.write_bytes(b"".join(shards))
    assert "tensor 'a' is in 2 shards" in diagnose(glued).finding


def test_an_unpadded_last_tensor_hides_no_shard(tmp_path: Path) -> None:
    parts = [gguf_bytes(llama_shard(i, 3, 3), [Spec(name, shape=(5,))]) for i, name in enumerate("abc")]
    for cuts in ((12, 12, 12), (0, 12, 0), (12, 0, 12)):
        glued = tmp_path / "glued.gguf"
        glued.write_bytes(b"".join(part[: len(part) - cut] for part, cut in zip(parts, cuts, strict=True)))
        assert diagnose(glued).kind is Kind.RAW_CONCATENATION
        assert [header.tensors[0].name for header in diagnose(glued).headers] == ["a", "b", "c"]


def test_a_first_shard_without_tensors_is_followed(tmp_path: Path) -> None:
    """``llama-gguf-split --no-tensor-first-split`` pads a header that has no tensors after it."""
    first = gguf_bytes(llama_shard(0, 2, 1))
    glued = tmp_path / "glued.gguf"
    glued.write_bytes(
        first + bytes(-len(first) % 32) + gguf_bytes(fixtures.split_fields(1, 2, 1), [Spec("a")])
    )
    assert diagnose(glued).kind is Kind.RAW_CONCATENATION


@pytest.mark.parametrize("name", ["single", "cut off in the data", "web page", "empty", "two models glued"])
def test_anything_else_is_no_raw_concatenation_and_the_error_says_what(
    name: str, made: Made, tmp_path: Path
) -> None:
    path = tmp_path / "case.gguf"
    path.write_bytes(CASES[name].make(made))
    with pytest.raises(DfqsError, match="is not a raw concatenation") as caught:
        repair(path, in_place=True)
    assert CASES[name].finding in str(caught.value)


def test_a_file_of_endless_headers_ends(tmp_path: Path) -> None:
    path = tmp_path / "endless.gguf"
    path.write_bytes(gguf_bytes() * 20_000)
    with no_hang():
        assert diagnose(path).kind is Kind.TRAILING_BYTES


# ---- shards ----


def test_a_shard_says_which_it_is_and_which_are_not_here(made: Made, tmp_path: Path) -> None:
    assert diagnose(SHARDS[0]).finding == "shard 1 of 2; all 2 are here"
    assert loader_verdict(SHARDS[0]).accepted
    alone = tmp_path / SHARDS[1].name
    alone.write_bytes(made.second)
    assert diagnose(alone).finding.startswith(f"shard 2 of 2: 1 of 2 shards missing: {SHARDS[0].name}")
    renamed = alone.rename(tmp_path / "second.gguf")
    assert diagnose(renamed).finding == "shard 2 of 2 by its header, but is not named so"
    assert "second-00002-of-00002.gguf" in diagnose(renamed).next_step
    first = tmp_path / SHARDS[0].name
    first.write_bytes(made.first)
    assert f"failed to open GGUF file '{SHARDS[1].name}'" in loader_verdict(first).reason


# ---- byte parts ----


@pytest.mark.parametrize(
    "names",
    [
        ["m.gguf.part1of3", "m.gguf.part2of3", "m.gguf.part3of3"],
        ["m.gguf-split-a", "m.gguf-split-b", "m.gguf-split-c"],
        ["my m.gguf.partaa", "my m.gguf.partab", "my m.gguf.partac"],
        [f"my m.gguf.part{n}of12" for n in range(1, 13)],
    ],
)
def test_a_byte_part_says_how_to_join_it(names: list[str], made: Made, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in names]
    size = len(made.whole) // len(names) + 1
    for number, path in enumerate(paths):
        path.write_bytes(made.whole[number * size : (number + 1) * size])
    kinds = [Kind.UNFINISHED, *[Kind.OTHER_FORMAT] * (len(names) - 1)]
    assert [diagnose(path).kind for path in paths] == kinds
    (step,) = {diagnose(path).next_step for path in paths}
    subprocess.run(["sh", "-c", step.split("`")[1]], check=True)
    joined = tmp_path / f"{names[0].split('.gguf')[0]}.gguf"
    assert diagnose(joined).kind is Kind.SINGLE_FILE and joined.read_bytes() == made.whole
    joined.write_bytes(b"another file of that name")
    assert subprocess.run(["sh", "-c", step.split("`")[1]], check=False, capture_output=True).returncode
    assert joined.read_bytes() == b"another file of that name"
    with paths[2].open("r+b") as file:
        file.truncate(1 << 20)
        file.truncate(2 << 20)
    assert "were never stored" in diagnose(paths[2]).finding, "`cat` would hide the hole"
    paths[1].write_bytes(PAGE)
    assert diagnose(paths[1]).kind is Kind.DOCUMENT


@pytest.mark.parametrize(
    ("first", "second"), [("m.gguf.part1of2", "m.gguf.part2of2"), ("m.gguf-split-a", "m.gguf-split-b")]
)
def test_shards_named_like_byte_parts_are_still_shards(
    first: str, second: str, made: Made, tmp_path: Path
) -> None:
    (tmp_path / first).write_bytes(made.first)
    (tmp_path / second).write_bytes(made.second)
    assert [diagnose(tmp_path / name).kind for name in (first, second)] == [Kind.SHARD] * 2


@pytest.mark.parametrize("name", ["m.gguf.1", "m.gguf.bak", "m.gguf.tmp", "m.gguf", "m-00001-of-00002.gguf"])
def test_a_cut_off_file_under_a_common_name_is_no_byte_part(name: str, made: Made, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(made.whole[:3_000_000])
    assert (
        diagnose(tmp_path / name).kind is Kind.UNFINISHED
        and "cat " not in diagnose(tmp_path / name).next_step
    )


# ---- nothing but headers is read ----


def published(folder: Path) -> Path:
    """A sparse file of the published artifact's shape: two shards of its exact sizes, glued. The model's tensors
    as far as they fit, and one more in each shard that fills it up."""
    path, left = folder / "DeepSeek-V4-Flash-IQ1_S-XL.gguf", fixtures.real_size_tensors()
    groups: list[list[Spec]] = []
    for room in PUBLISHED[:2]:
        group, room = [], room - 10_000_000
        while left and room > left[0].nbytes + 64:
            room -= left[0].nbytes + 64
            group.append(left.pop(0))
        groups.append(group)
    n_tensors = sum(map(len, groups)) + 2
    with path.open("wb") as file:
        for number, (group, size) in enumerate(zip(groups, PUBLISHED, strict=False)):
            fields = [
                *([] if number else fixtures.real_size_fields()),
                *fixtures.split_fields(number, 2, n_tensors),
            ]
            filler = Spec(f"filler.{number}", "I8", (1,))
            used = len(fixtures.header_bytes(fields, [*group, filler])) + sum(
                -(-s.nbytes // 32) * 32 for s in group
            )
            file.seek(sum(PUBLISHED[:number]))
            file.write(fixtures.header_bytes(fields, [*group, replace(filler, shape=(size - used,))]))
        file.truncate(PUBLISHED[2])
    return path


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc/self/io")
def test_the_published_file_is_seen_through_by_10_megabytes_of_reading(tmp_path: Path) -> None:
    assert PUBLISHED[0] + PUBLISHED[1] == PUBLISHED[2]
    path = published(tmp_path)
    before = read_chars()
    diagnosis = diagnose(path)
    n_read = read_chars() - before
    assert (diagnosis.kind, [part["nbytes"] for part in diagnosis.parts]) == (
        Kind.RAW_CONCATENATION,
        list(PUBLISHED[:2]),
    )
    assert sum(part["n_tensors"] for part in diagnosis.parts) > 1200
    assert n_read < 10_000_000
    path.rename(other := tmp_path / "model-00001-of-00002.gguf")
    assert diagnose(other).kind is Kind.RAW_CONCATENATION  # whatever it is called


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc/self/io")
@pytest.mark.parametrize("size", [None, 61_000_000_000, 3_000_000])
def test_real_sizes_are_read_by_their_headers_only(size: int | None, tmp_path: Path) -> None:
    path = fixtures.real_size_header(tmp_path / "real.gguf", sparse_size=size)
    before = read_chars()
    diagnosis = diagnose(path)
    assert read_chars() - before < 10_000_000
    assert diagnosis.kind is Kind.UNFINISHED
    assert diagnose(path, allow_holes=True).kind is (Kind.SINGLE_FILE if size is None else Kind.UNFINISHED)
    if size is None:
        assert "were never stored" in diagnosis.finding


def test_the_import_is_light() -> None:
    code = "import sys, dfqs_nb.merge.kind; print(sorted({'pandas', 'llama_cpp', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- what cannot be read at all ----


def test_what_is_no_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="a folder"):
        diagnose(tmp_path)
    with pytest.raises(HeaderError, match="No such file"):
        diagnose(tmp_path / "missing.gguf")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")
        with pytest.raises(HeaderError, match="no regular file"):
            diagnose(tmp_path / "pipe.gguf")


def test_a_file_that_aborts_llama_cpp_gives_a_verdict_and_the_next_file_is_asked(
    made: Made, tmp_path: Path
) -> None:
    """A token that stands twice fails an assertion while the tokenizer is loaded."""
    paths = [tmp_path / f"{i}.gguf" for i in range(3)]
    for path in (paths[0], paths[2]):
        path.write_bytes(made.whole)
    tokens = read_header(paths[0])["tokenizer.ggml.tokens"]
    twice = Apart.of(paths[0]).with_field("tokenizer.ggml.tokens", "[STRING]", [*tokens[:-1], tokens[0]])
    paths[1].write_bytes(twice.bytes())
    verdicts = check.verdicts(paths)
    assert [verdict.accepted for verdict in verdicts] == [True, False, True]
    assert (verdicts[1].death, "id_to_token.size()" in verdicts[1].reason) == ("SIGABRT", True)


# ---- every byte must be stored ----


def sparse(path: Path, raw: bytes, stored: int) -> Path:
    """A file of its full size of which only the first bytes were written."""
    with path.open("wb") as file:
        file.write(raw[:stored])
        file.truncate(len(raw))
    return path


@pytest.mark.parametrize("stored", [8192, 3_000_000, 5_700_000])
def test_a_file_with_holes_is_an_unfinished_download(stored: int, made: Made, tmp_path: Path) -> None:
    path = sparse(tmp_path / "m.gguf", made.whole, stored // 4096 * 4096)
    diagnosis = diagnose(path)
    missing = len(made.whole) - stored // 4096 * 4096
    assert (diagnosis.kind, diagnosis.sound) == (Kind.UNFINISHED, False)
    assert "were never stored" in diagnosis.finding and "resume the download" in diagnosis.next_step
    assert f"{missing:,} of its 5,752,960 bytes" in diagnosis.finding
    with path.open("r+b") as file:
        file.write(made.whole)
    assert diagnose(path).kind is Kind.SINGLE_FILE


@pytest.mark.parametrize(
    "name",
    ["m.gguf.incomplete", "0123abcd.incomplete", "m.gguf.crdownload", "m.gguf.part", "m.gguf.opdownload"],
)
def test_a_name_that_says_unfinished_is_believed(name: str, made: Made, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(made.whole)
    diagnosis = diagnose(tmp_path / name)
    assert diagnosis.kind is Kind.UNFINISHED and "has not ended" in diagnosis.finding


@pytest.mark.parametrize("shard", [False, True])
def test_a_control_file_of_aria2_says_unfinished(shard: bool, made: Made, tmp_path: Path) -> None:
    path = tmp_path / (SHARDS[0].name if shard else "m.gguf")
    path.write_bytes(made.first if shard else made.whole)
    path.with_name(f"{path.name}.aria2").write_bytes(b"\0\1")
    diagnosis = diagnose(path)
    assert diagnosis.kind is Kind.UNFINISHED and "aria2 has not finished it" in diagnosis.finding
    if shard:
        shutil.copy(SHARDS[1], tmp_path)
        with pytest.raises(IntegrityError, match="aria2"):
            merge_model(path, tmp_path / "out.gguf")


# ---- files that go with a model, or with another runtime ----


def llama(*fields: bytes, tensors: list[Spec] | None = None) -> bytes:
    """A small file that says it is a llama model."""
    base = [field("general.architecture", "STRING", "llama"), field("llama.block_count", "UINT32", 1)]
    return gguf_bytes(
        [*base, *fields], [Spec("token_embd.weight", shape=(32, 8))] if tensors is None else tensors
    )


COMPANIONS = {
    "a file of the type 'dataset'": gguf_bytes(
        [field("general.architecture", "STRING", "llama"), field("general.type", "STRING", "dataset")],
        [Spec("x", "F32", (32,))],
    ),
    "a file of the type 'mmproj'": gguf_bytes(
        [field("general.architecture", "STRING", "clip"), field("general.type", "STRING", "mmproj")],
        [Spec("v.patch_embd.weight", shape=(16, 16))],
    ),
    "a file of the type 'adapter'": llama(
        field("general.type", "STRING", "adapter"),
        field("adapter.type", "STRING", "lora"),
        tensors=[Spec("blk.0.attn_q.weight.lora_a", shape=(32, 4))],
    ),
    "a file of the type 'imatrix'": gguf_bytes(
        [field("general.type", "STRING", "imatrix"), field("imatrix.datasets", "[STRING]", ["wiki"])],
        [Spec("blk.0.attn_q.weight.in_sum2", shape=(32,))],
    ),
    "a file of the type 'controlvector'": gguf_bytes(
        [field("general.architecture", "STRING", "controlvector")], [Spec("direction.1", shape=(32,))]
    ),
    "a vocabulary without weights": llama(
        field("tokenizer.ggml.model", "STRING", "gpt2"),
        field("tokenizer.ggml.tokens", "[STRING]", ["a", "b"]),
        tensors=[],
    ),
}


@pytest.mark.parametrize("what", COMPANIONS)
def test_a_file_that_goes_with_a_model_is_no_model(what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(COMPANIONS[what])
    diagnosis = diagnose(path)
    assert (diagnosis.kind, diagnosis.sound) == (Kind.COMPANION, False)
    assert diagnosis.finding == f"{what}, not a language model" and diagnosis.next_step
    with pytest.raises(DfqsError, match=what):
        merge_once(open_source(path), tmp_path / "out.gguf")


def test_a_first_shard_without_tensors_is_no_vocabulary(tmp_path: Path) -> None:
    tokens = [
        field("tokenizer.ggml.tokens", "[STRING]", ["a"]),
        field("tokenizer.ggml.model", "STRING", "gpt2"),
    ]
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(llama(*tokens, *fixtures.split_fields(0, 2, 1), tensors=[]))
    assert diagnose(path).kind is Kind.SHARD


@pytest.mark.parametrize(("code", "words"), [(31, "fork"), (144, "fork")])
def test_a_tensor_type_of_another_runtime(code: int, words: str, tmp_path: Path) -> None:
    head = fixtures.header_bytes(
        [field("general.architecture", "STRING", "llama")], [Spec("a", "F32", (256, 8))]
    )
    at = len(head.rstrip(b"\0")) // 32 * 32
    raw = head.replace(struct.pack("<2qI", 256, 8, 0), struct.pack("<2qI", 256, 8, code))
    assert raw != head and at
    path = tmp_path / "m.gguf"
    path.write_bytes(raw + bytes(13_824))
    diagnosis = diagnose(path)
    assert diagnosis.kind is Kind.FOREIGN and str(code) in diagnosis.finding
    assert words in diagnosis.finding + diagnosis.next_step


def test_a_type_that_a_fork_numbers_otherwise_shows_as_a_gap(tmp_path: Path) -> None:
    """The first tensor takes 144 bytes here, and 192 in the fork that wrote the file."""
    specs = [Spec("blk.0.ffn_down.weight", "Q4_0", (256, 1)), Spec("blk.0.ffn_norm.weight", offset=192)]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([field("general.architecture", "STRING", "llama")], specs) + bytes(64))
    diagnosis = diagnose(path)
    assert diagnosis.kind is Kind.DAMAGED and "a fork of llama.cpp" in diagnosis.next_step


# ---- names and neighbours ----


@pytest.mark.parametrize(
    ("second", "words"),
    [(b"", "an empty file"), (POINTER, "a Git LFS pointer"), (PAGE, "a text or web page")],
    ids=["empty", "pointer", "page"],
)
def test_a_second_shard_that_is_none_is_told_at_the_first(
    second: bytes, words: str, made: Made, tmp_path: Path
) -> None:
    (tmp_path / SHARDS[0].name).write_bytes(made.first)
    (tmp_path / SHARDS[1].name).write_bytes(second)
    diagnosis = diagnose(tmp_path / SHARDS[0].name)
    assert diagnosis.kind is Kind.SHARD and "are here" not in diagnosis.finding
    assert diagnosis.finding == f"shard 1 of 2; but {SHARDS[1].name} is no GGUF"
    assert words in diagnose(tmp_path / SHARDS[1].name).finding and SHARDS[1].name in diagnosis.next_step
    with pytest.raises(DfqsError):
        merge_model(tmp_path / SHARDS[0].name, tmp_path / "out.gguf")


def test_an_extension_in_capitals(made: Made, tmp_path: Path) -> None:
    paths = [tmp_path / path.with_suffix(".GGUF").name for path in SHARDS]
    for path, body in zip(paths, (made.first, made.second), strict=True):
        path.write_bytes(body)
    diagnosis = diagnose(paths[0])
    assert diagnosis.kind is Kind.SHARD and SHARDS[0].name in diagnosis.next_step
    with pytest.raises(ShardError, match="rename it to"):
        merge_model(paths[0], tmp_path / "out.gguf")
    assert merge_model(paths, tmp_path / "out.gguf").path.read_bytes() == made.whole


def test_swapped_names_of_shards_are_never_moved_over_each_other(tmp_path):
    first, second = (
        Path(shutil.copy(path, tmp_path)) for path in sorted(REFERENCE.glob("DFQS-Nano-IQ1_S-XL-*"))
    )
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    for path in (first, second):
        step = diagnose(path).next_step
        assert "mv " not in step and "move that one away first" in step
        with pytest.raises(ShardError, match="move that one away first"):
            open_source(path)


def test_split_keys_of_another_type(tmp_path: Path) -> None:
    odd = {
        "text": [field("split.no", "STRING", "one"), field("split.count", "STRING", "two")],
        "array": [field("split.no", "[UINT16]", [0]), field("split.count", "[UINT16]", [2])],
        "float": [field("split.no", "FLOAT32", 0.0), field("split.count", "FLOAT32", 2.0)],
        "total": [field("split.tensors.count", "STRING", "many")],
    }
    for name, fields in odd.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(llama(*fields))
        assert diagnose(path).kind is (Kind.SINGLE_FILE if name == "total" else Kind.DAMAGED)
        with contextlib.suppress(DfqsError):
            merge_model(path, tmp_path / f"{name}.out")


def test_a_name_that_is_not_utf_8(made: Made, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le.gguf"))
    path.write_bytes(made.whole)
    diagnosis = diagnose(path)
    assert diagnosis.kind is Kind.SINGLE_FILE
    glued = path.with_name(os.fsdecode(b"gl\xfced.gguf"))
    glued.write_bytes(made.first + made.second)
    (diagnosis.finding + diagnose(glued).next_step).encode()
    assert diagnosis_table([path, glued]).index.str.encode("utf-8").size == 2
    assert merge_model(path, tmp_path / "out.gguf").path.read_bytes() == made.whole
    ran = subprocess.run(
        [sys.executable, "-m", "dfqs_nb", "inspect", path],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_shards_of_a_per_layer_recipe_merge(tmp_path: Path) -> None:
    """Experts of the first layers in one type, in shard 1; those of the others in another, in shard 2."""
    shards = []
    for number, kind in enumerate(("Q8_0", "Q4_0")):
        names = [
            f"blk.{2 * number + layer}.ffn_{part}_exps.weight"
            for layer in (0, 1)
            for part in ("up", "down", "gate")
        ]
        head = [field("general.architecture", "STRING", "llama")] if number == 0 else []
        shards.append(tmp_path / f"m-0000{number + 1}-of-00002.gguf")
        specs = [Spec(name, kind, (64, 4)) for name in names]
        shards[-1].write_bytes(gguf_bytes([*head, *fixtures.split_fields(number, 2, 12)], specs))
    result = merge_model(shards[0], tmp_path / "out.gguf")
    assert len(result.tensors) == 12 and diagnose(result.path).kind is Kind.SINGLE_FILE
