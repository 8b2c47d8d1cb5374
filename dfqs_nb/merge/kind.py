"""What a file that should be a model really is, found in milliseconds and without reading its tensors.

A model that does not load is rarely explained by the error that a runtime gives: a raw concatenation of two
shards is an "invalid split file name", an error page of a web server has "invalid magic characters". This
module looks at the first bytes, at every GGUF header inside the file, at the sizes these call for, and at the
names of the neighbours, and says in one sentence what it found and what to do next.

`loader_verdict` (from `loader`) says what llama.cpp makes of the same file.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.errors import DfqsError, HeaderError, ShardError
from dfqs_nb.gguf.header import CUT_OFF, MAGIC, GGUFHeader, Tensor, padded, read_header
from dfqs_nb.gguf.shards import SHARD_NAME, shard_path
from dfqs_nb.llama.check import loader_verdict, loader_verdicts

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Diagnosis",
    "Kind",
    "Part",
    "byte_parts",
    "diagnose",
    "diagnosis_table",
    "loader_verdict",
    "raw_concatenation",
]

OPENING_BYTES = 4096
MAX_PARTS = 10_000  # headers followed inside one file
SHOWN_BYTES = 16


class Kind(StrEnum):
    """What a file turned out to be."""

    SINGLE_FILE = "sound single file"
    SHARD = "shard"
    RAW_CONCATENATION = "raw concatenation"  # of all shards of one model: can be repaired
    DAMAGED_CONCATENATION = "damaged raw concatenation"
    GLUED_MODELS = "several models in one file"
    TRUNCATED = "truncated"
    TRAILING_BYTES = "trailing bytes"
    OVERLAPPING_TENSORS = "overlapping tensors"
    GAPS_BETWEEN_TENSORS = "gaps between tensors"
    BYTE_PART = "byte part"
    EMPTY = "empty file"
    ZEROS = "zeros"
    LFS_POINTER = "Git LFS pointer"
    HTML = "HTML page"
    XML = "XML document"
    JSON = "JSON document"
    TEXT = "text"
    BIG_ENDIAN = "big-endian GGUF"
    OLD_VERSION = "GGUF version 1"
    BROKEN_HEADER = "broken header"
    OTHER_FORMAT = "another format"
    NOT_GGUF = "not a GGUF"


# Nobody cuts a model so that a part is one of these, whatever its name.
_CONCLUSIVE = (Kind.EMPTY, Kind.LFS_POINTER, Kind.HTML, Kind.XML, Kind.JSON, Kind.TEXT)


@dataclass(frozen=True)
class Part:
    """One GGUF header inside a file, and the bytes that are its own.

    Attributes:
        start: where its magic stands, in bytes from the start of the file.
        nbytes: bytes up to the next header, or to the end of the file.
        expected_nbytes: bytes that the header accounts for.
        number, count: shard ``number`` (from 1) of ``count``; 1 of 1 for a model in a single file.
        n_tensors: rows of its tensor table.
    """

    start: int
    nbytes: int
    expected_nbytes: int
    number: int
    count: int
    n_tensors: int


@dataclass(frozen=True)
class Diagnosis:
    """What a file is, and what to do with it.

    Attributes:
        finding: one sentence.
        next_step: what to do, as a sentence or a command; empty when nothing is to be done.
        evidence: rows of (what, value) that the finding rests on.
        parts: the GGUF headers found inside, in the file's order.
    """

    path: Path
    kind: Kind
    finding: str
    next_step: str = ""
    evidence: tuple[tuple[str, str], ...] = ()
    parts: tuple[Part, ...] = field(default=(), repr=False)

    @property
    def sound(self) -> bool:
        """A model, or a shard of one, with nothing wrong in this file."""
        return self.kind in (Kind.SINGLE_FILE, Kind.SHARD)


def diagnose(path: str | Path) -> Diagnosis:
    """Say what a file is: see `Kind` for what is told apart.

    Reads the headers inside and at most 4 KiB of anything else; changes nothing.

    Raises:
        HeaderError: the file cannot be read at all (missing, a folder, no permission).
    """
    path = Path(path)
    opening, size = _opening(path)
    if not opening.startswith(MAGIC):
        found = _no_gguf(path, opening, size)
        return found if found.kind in _CONCLUSIVE else _byte_part(path) or found
    try:
        walk = _walk(path)
    except HeaderError as error:
        return _refused_header(path, opening, size, error)
    found = _of_one(path, walk) if len(walk.headers) == 1 else _of_several(path, walk)
    return (_byte_part(path) or found) if found.kind is Kind.TRUNCATED else found


def raw_concatenation(path: str | Path) -> tuple[GGUFHeader, ...]:
    """The headers of a raw concatenation of all shards of one model, in the file's order.

    Each header's ``start`` says where its shard begins, its ``data_offset`` where (in the file) its tensors
    do; the shard ends where the next begins. The order need not be that of the shards: ``split.no`` says.

    Raises:
        HeaderError: the file is not a GGUF.
        ShardError: it is something else, or a shard in it is missing, doubled or cut off; says which.
    """
    path = Path(path)
    opening, _ = _opening(path)
    if opening.startswith(MAGIC):
        walk = _walk(path)
        found = _of_one(path, walk) if len(walk.headers) == 1 else _of_several(path, walk)
        if found.kind is Kind.RAW_CONCATENATION:
            return walk.headers
    else:
        found = diagnose(path)
    raise ShardError(
        f"is not a raw concatenation of shards: {found.finding}", where=path, hint=found.next_step
    )


# ---- the headers inside ----


@dataclass(frozen=True)
class _Walk:
    """The headers of a file one after another; ``end`` is where the last one's data end, or should."""

    headers: tuple[GGUFHeader, ...]
    end: int
    size: int
    error: HeaderError | None = None  # why the header that starts at `end` cannot be read


def _walk(path: Path) -> _Walk:
    """Follow the headers: where one's data end, the next one's magic may stand."""
    headers = [read_header(path)]
    size, error = headers[0].file_size, None
    with path.open("rb", buffering=0) as file:
        while True:
            end, more = _next_header(file, headers[-1], size)
            if not more or len(headers) == MAX_PARTS or _misplaced(headers[-1]):
                break
            try:
                headers.append(read_header(path, start=end))
            except HeaderError as found:
                error = found
                break
    return _Walk(tuple(headers), end, size, error)


def _next_header(file: Any, header: GGUFHeader, size: int) -> tuple[int, bool]:
    """Where a header's data end, with or without padding, and whether another header starts there."""
    for end in dict.fromkeys((_data_end(header), _padded_end(header))):
        if end < size:
            file.seek(end)
            if file.read(4) == MAGIC:
                return end, True
    ends = _data_end(header), _padded_end(header)
    return (ends[1] if size >= ends[1] else ends[0]), False


def _data_end(header: GGUFHeader) -> int:
    """Where the last tensor's bytes end, without padding."""
    return header.data_offset + max((t.offset + t.nbytes for t in header.tensors), default=0)


def _padded_end(header: GGUFHeader) -> int:
    """Where the file ends as llama.cpp writes it: it pads the last tensor, and a header without tensors."""
    return header.start + padded(_data_end(header) - header.start, header.alignment)


def _misplaced(header: GGUFHeader) -> list[tuple[Tensor, int]]:
    """The tensors that do not start where the one before ends, each with the offset it should have."""
    wrong, expected = [], 0
    for tensor in header.tensors:
        if tensor.offset != expected:
            wrong.append((tensor, expected))
        expected = padded(tensor.offset + tensor.nbytes, header.alignment)
    return wrong


def _split(header: GGUFHeader) -> tuple[int, int]:
    """Shard number (from 1) and count by the header; 1 of 1 for a single file, or without numbers."""
    number, count = header.get("split.no", 0), header.get("split.count", 0)
    if not isinstance(number, int) or not isinstance(count, int) or count <= 1:
        return 1, 1
    return number + 1, count


def _parts(walk: _Walk) -> tuple[Part, ...]:
    starts = [header.start for header in walk.headers]
    ends = [*starts[1:], walk.size if walk.error is None else walk.end]
    return tuple(
        Part(
            header.start,
            end - header.start,
            _padded_end(header) - header.start,
            *_split(header),
            len(header.tensors),
        )
        for header, end in zip(walk.headers, ends, strict=True)
    )


# ---- a file with one header ----


def _of_one(path: Path, walk: _Walk) -> Diagnosis:
    header = walk.headers[0]
    number, count = _split(header)
    what = f"shard {number} of {count}" if count > 1 else "a model in a single file"
    evidence = [
        *_identity(header),
        ("file size", f"{walk.size:,} bytes"),
        ("header accounts for", f"{_padded_end(header):,} bytes"),
    ]

    def diagnosis(kind: Kind, finding: str, step: str, *rows: tuple[str, str]) -> Diagnosis:
        return Diagnosis(path, kind, finding, step, (*evidence, *rows), _parts(walk))

    if wrong := _misplaced(header):
        return diagnosis(*_layout(wrong))
    if walk.size < _data_end(header):
        return diagnosis(*_cut_off(header, walk.size))
    if walk.error is not None:
        return diagnosis(
            Kind.DAMAGED_CONCATENATION,
            f"{what}, and the beginning of another GGUF at byte {walk.end:,} that is cut off or broken",
            "get the file, or its shards, from the source again",
            ("second header", walk.error.what),
        )
    if walk.size > walk.end:
        return diagnosis(*_trailing(path, walk, what))
    stored = _stored(path, walk.size)
    if count > 1:
        finding, step = _shard(path, number, count)
        return diagnosis(Kind.SHARD, finding, step, *stored)
    return diagnosis(Kind.SINGLE_FILE, f"a sound model in a single file of {walk.size:,} bytes", "", *stored)


def _identity(header: GGUFHeader) -> list[tuple[str, str]]:
    rows = [("GGUF version", str(header.version)), ("tensors", f"{len(header.tensors):,}")]
    for key, label in (("general.name", "name"), ("general.architecture", "architecture")):
        value = header.get(key)
        if isinstance(value, str) and value:
            rows.insert(0, (label, value[:80]))
    return rows


def _layout(wrong: Sequence[tuple[Tensor, int]]) -> tuple[Any, ...]:
    tensor, expected = wrong[0]
    overlaps = [t for t, at in wrong if t.offset < at]
    kind = Kind.OVERLAPPING_TENSORS if overlaps else Kind.GAPS_BETWEEN_TENSORS
    what = (
        "overlap or leave gaps" if 0 < len(overlaps) < len(wrong) else "overlap" if overlaps else "leave gaps"
    )
    return (
        kind,
        f"its tensors {what}: {len(wrong)} of them are out of place, the first is {tensor.name!r}",
        "the file was written wrongly: get it from its source again",
        (f"offset of {tensor.name}", f"{tensor.offset:,}, expected {expected:,}"),
    )


def _cut_off(header: GGUFHeader, size: int) -> tuple[Any, ...]:
    short = _padded_end(header) - size
    first = next(t for t in header.tensors if header.data_offset + t.offset + t.nbytes > size)
    whole = header.tensors.index(first)
    return (
        Kind.TRUNCATED,
        f"cut off: {short:,} bytes short, from tensor {first.name!r} on",
        f"resume the download, or repeat it ({_padded_end(header):,} bytes in all)",
        ("bytes missing", f"{short:,}"),
        ("tensors that are whole", f"{whole:,} of {len(header.tensors):,}"),
        ("first tensor that is not", first.name),
    )


def _trailing(path: Path, walk: _Walk, what: str) -> tuple[Any, ...]:
    surplus = walk.size - walk.end
    with path.open("rb", buffering=0) as file:
        file.seek(walk.end)
        after = file.read(SHOWN_BYTES)
    finding = f"{what}, and {surplus:,} bytes after its end"
    step = f"keep the first {walk.end:,} bytes, or get it from its source again"
    if _split(walk.headers[0])[1] > 1:
        step = "other shards may follow in a damaged form: get the shards from their source again"
    return (
        Kind.TRAILING_BYTES,
        finding,
        step,
        ("bytes after the end", f"{surplus:,}, from byte {walk.end:,} on"),
        ("they begin with", _shown(after)),
    )


def _stored(path: Path, size: int) -> list[tuple[str, str]]:
    """A row when the disk holds much less than the file's size: a sparse or compressed file."""
    blocks = getattr(path.stat(), "st_blocks", None)
    if blocks is None or blocks * 512 >= size // 2 or size < 1 << 20:
        return []
    return [
        (
            "stored on the disk",
            f"{blocks * 512:,} bytes: the rest was never written (it reads as zeros), "
            "or the file system compresses",
        )
    ]


def _shard(path: Path, number: int, count: int) -> tuple[str, str]:
    """Finding and next step for a sound shard, from its name and its neighbours."""
    match = SHARD_NAME.fullmatch(path.name)
    if match is None or (int(match["number"]), int(match["count"])) != (number, count):
        wanted = shard_path(match["prefix"] if match else path.stem, number, count).name
        return (
            f"shard {number} of {count} by its header, but not named so",
            f"rename it to {wanted!r}, or name all {count} shards to `dfqs-nb merge`",
        )
    if not 1 <= number <= count <= 65_535:
        return (
            f"shard {number} of {count}: numbers that llama.cpp cannot have",
            "get it from its source again",
        )
    prefix = path.parent / match["prefix"]
    missing = [i for i in range(1, count + 1) if not shard_path(prefix, i, count).is_file()]
    if not missing:
        return f"shard {number} of {count}; all {count} are here", _command("merge", path)
    names = ", ".join(shard_path(prefix, i, count).name for i in missing[:3])
    return (
        f"shard {number} of {count}; {len(missing)} missing here: {names}" + " ..." * (len(missing) > 3),
        "download what is missing into the same folder, then merge",
    )


# ---- a file with several headers ----


def _of_several(path: Path, walk: _Walk) -> Diagnosis:
    parts = _parts(walk)
    evidence = [*_identity(walk.headers[0]), ("file size", f"{walk.size:,} bytes = {_sum(walk, parts)}")]
    for part in parts[:12]:
        evidence.append(
            (
                f"header at byte {part.start:,}",
                f"shard {part.number} of {part.count}, {part.n_tensors:,} tensors, {part.nbytes:,} bytes",
            )
        )
    problems = _problems(walk, parts)
    count = parts[0].count
    if all(part.count == 1 for part in parts):
        finding = f"{len(parts)} models glued together; a runtime sees the first only"
        return Diagnosis(
            path,
            Kind.GLUED_MODELS,
            "; ".join([finding, *problems]),
            f"cut it at byte {parts[1].start:,}, or get the files from their source again",
            tuple(evidence),
            parts,
        )
    if problems:
        evidence += [("problem", problem) for problem in problems]
        return Diagnosis(
            path,
            Kind.DAMAGED_CONCATENATION,
            f"shards glued together byte for byte, and not all of them sound: {problems[0]}",
            "get the shards from their source again",
            tuple(evidence),
            parts,
        )
    order = [part.number for part in parts]
    how = "" if order == sorted(order) else f" in the order {', '.join(map(str, order))}"
    finding = f"{count} shards glued together byte for byte{how}, which is no merge: no runtime loads it"
    return Diagnosis(path, Kind.RAW_CONCATENATION, finding, _command("repair", path), tuple(evidence), parts)


def _sum(walk: _Walk, parts: Sequence[Part]) -> str:
    shown = [f"{part.nbytes:,}" for part in parts[:6]] + ["..."] * (len(parts) > 6)
    rest = walk.size - sum(part.nbytes for part in parts)
    return " + ".join(shown + ([f"{rest:,} unread"] if rest else []))


def _problems(walk: _Walk, parts: Sequence[Part]) -> list[str]:
    """Why the shards in a file are not all the shards of one model; empty when they are."""
    last, count = walk.headers[-1], parts[0].count
    problems = []
    if any(part.count != count for part in parts):
        problems.append(f"they say that they are of {', '.join(str(part.count) for part in parts)} shards")
    numbers = [part.number for part in parts]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1 and count > 1}):
        problems.append(f"shard {', '.join(map(str, twice))} is there twice")
    missing = [number for number in range(1, min(count, MAX_PARTS) + 1) if number not in numbers]
    if missing:
        problems.append(f"shard {', '.join(map(str, missing[:10]))} of {count} is missing")
    for header, part in zip(walk.headers, parts, strict=True):
        if wrong := _misplaced(header):
            problems.append(
                f"the tensors of shard {part.number} are out of place from {wrong[0][0].name!r} on"
            )
    if walk.error is not None:
        problems.append(f"the header at byte {walk.end:,} cannot be read: {walk.error.what}")
    elif walk.size < _data_end(last):
        problems.append(f"shard {parts[-1].number} is cut off, {_padded_end(last) - walk.size:,} bytes short")
    elif walk.size > walk.end:
        problems.append(f"{walk.size - walk.end:,} bytes follow that belong to no shard")
    return problems if problems or count == 1 else _tensor_problems(walk)


def _tensor_problems(walk: _Walk) -> list[str]:
    names = [tensor.name for header in walk.headers for tensor in header.tensors]
    if len(set(names)) != len(names):
        return ["they are of different models: a tensor is in two shards"]
    totals = {header.get("split.tensors.count", len(names)) for header in walk.headers}
    if totals != {len(names)}:
        return [
            f"they hold {len(names):,} tensors and say the model has "
            f"{', '.join(map(str, sorted(totals, key=str)))}"
        ]
    return []


# ---- a file without a readable header ----


def _opening(path: Path) -> tuple[bytes, int]:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise HeaderError(f"is {what}, not a model", where=path, hint="name a file")
        with path.open("rb", buffering=0) as file:
            return file.read(OPENING_BYTES), status.st_size
    except OSError as error:
        raise HeaderError(
            f"cannot be read ({error.strerror})", where=path, hint="check the path and its permissions"
        ) from error


def _refused_header(path: Path, opening: bytes, size: int, error: HeaderError) -> Diagnosis:
    """A file that begins as a GGUF and whose header the reader refuses."""
    rows = (("header", error.what), ("file size", f"{size:,} bytes"))
    version = opening[4:8]
    if len(version) == 4 and version[:2] == b"\0\0" and version[2:] != b"\0\0":
        kind, finding = Kind.BIG_ENDIAN, "a big-endian GGUF, for machines with the other byte order"
    elif version == b"\1\0\0\0":
        kind, finding = Kind.OLD_VERSION, "GGUF version 1, which llama.cpp no longer reads"
    elif error.hint == CUT_OFF:
        part = _byte_part(path)
        if part:
            return part
        kind, finding = Kind.TRUNCATED, f"cut off inside its header, after {size:,} bytes: {error.what}"
    else:
        kind, finding = Kind.BROKEN_HEADER, f"a GGUF with a broken header: {error.what}"
    return Diagnosis(path, kind, finding, error.hint, rows)


_FORMATS = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"lmgg", "a GGML file from before GGUF"),
    (b"tjgg", "a GGJT file from before GGUF"),
    (b"fmgg", "a GGMF file from before GGUF"),
    (b"FUGG", "a GGUF with its bytes swapped in fours"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80\x02", "a Python pickle (a PyTorch checkpoint?)"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
)


def _no_gguf(path: Path, opening: bytes, size: int) -> Diagnosis:
    """A file that does not begin with the magic: by its first 4 KiB."""
    rows = [("file size", f"{size:,} bytes"), ("it begins with", _shown(opening[:SHOWN_BYTES]))]

    def diagnosis(kind: Kind, finding: str, step: str, *more: tuple[str, str]) -> Diagnosis:
        return Diagnosis(path, kind, finding, step, (*rows, *more))

    if size == 0:
        return diagnosis(Kind.EMPTY, "an empty file", "download it again: nothing arrived")
    if opening.startswith(b"version https://git-lfs"):
        return diagnosis(*_lfs(opening))
    for magic, name in _FORMATS:
        if opening.startswith(magic):
            return diagnosis(
                Kind.OTHER_FORMAT, f"{name}, not a GGUF", "unpack it, or get the GGUF of the model"
            )
    if opening[8:10] == b'{"' and int.from_bytes(opening[:8], "little") < 1 << 30:
        return diagnosis(
            Kind.OTHER_FORMAT,
            "a safetensors file, not a GGUF",
            "convert it with llama.cpp's convert_hf_to_gguf.py, or get the GGUF of the model",
        )
    if not opening.strip(b"\0"):
        return diagnosis(
            Kind.ZEROS,
            f"zeros: the first {len(opening):,} bytes of {size:,} were never written",
            "the room was reserved and the download did not arrive: repeat it",
        )
    return _document(path, opening, rows) or diagnosis(
        Kind.NOT_GGUF, "not a GGUF: it does not begin with the four letters", "check what you downloaded"
    )


def _lfs(opening: bytes) -> tuple[Any, ...]:
    text = opening.decode("utf-8", "replace")
    oid, size = re.search(r"^oid (\S+)", text, re.M), re.search(r"^size (\d+)", text, re.M)
    target = f"{int(size[1]):,} bytes" if size else "an unknown number of bytes"
    return (
        Kind.LFS_POINTER,
        f"a Git LFS pointer to the model ({target}), not the model itself",
        "run `git lfs pull` in the clone, or download the file from its 'resolve' address",
        ("points to", oid[1] if oid else "nothing"),
        ("of size", target),
    )


def _document(path: Path, opening: bytes, rows: list[tuple[str, str]]) -> Diagnosis | None:
    """A web server's answer that was saved under the model's name; ``None`` when it is no text."""
    text = opening.decode("utf-8-sig", "ignore" if len(opening) == OPENING_BYTES else "replace").strip()
    if not text or sum(not char.isprintable() and not char.isspace() for char in text) or "\ufffd" in text:
        return None
    step = "a server answered with this in place of the model: check the address and that you may download it"
    lower = text[:500].lower()
    if lower.startswith("<") and ("<html" in lower or "<!doctype html" in lower):
        title = re.search(r"<title[^>]*>(.*?)</title", text, re.I | re.S)
        label = " ".join(title[1].split())[:200] if title else "without a title"
        return Diagnosis(
            path, Kind.HTML, f"a web page saved as a model: {label}", step, (*rows, ("title", label))
        )
    if lower.startswith("<"):
        found = re.findall(r"<(code|message|error)>([^<]*)</", text, re.I)
        said = ": ".join(value.strip() for _, value in found) or text[:80]
        return Diagnosis(
            path, Kind.XML, f"an XML document saved as a model: {said}", step, (*rows, ("it says", said))
        )
    if text[0] in "{[":
        said = _json_message(text)
        return Diagnosis(
            path, Kind.JSON, f"a JSON document saved as a model: {said}", step, (*rows, ("it says", said))
        )
    said = " ".join(text.split())[:200]
    return Diagnosis(
        path, Kind.TEXT, f"a text saved as a model: {said[:80]}", step, (*rows, ("it says", said))
    )


def _json_message(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text[:80]
    for key in ("error", "message", "detail", "error_description", "title"):
        if isinstance(value, dict) and key in value:
            return str(value[key])[:200]
    return " ".join(text.split())[:80]


def _shown(raw: bytes) -> str:
    """Bytes as people read them: hex, and the letters among them.

    >>> _shown(b"GGUF\\x03")
    '47 47 55 46 03 (GGUF.)'
    """
    letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in raw)
    return f"{raw.hex(' ')} ({letters})" if raw else "nothing"


# ---- plain byte parts ----

# model.gguf.part1of2, model.gguf-split-a, model.gguf.001, model.gguf.partaa, model-part2of3.gguf
_PART_NAMES = (
    re.compile(
        r"(?P<stem>.+\.gguf)(?P<mark>[._-]?(?:part|split)[._-]?)(?P<index>\d{1,5}|[a-z]{1,3})"
        r"(?P<of>[._-]?of[._-]?)?(?P<count>(?<=of)\d{1,5}|(?<=of[._-])\d{1,5})?(?P<tail>)",
        re.I,
    ),
    re.compile(
        r"(?P<stem>.+\.gguf)(?P<mark>[._-])(?P<index>\d{1,5}|[a-z]{2,3})(?P<of>)(?P<count>)(?P<tail>)", re.I
    ),
    re.compile(
        r"(?P<stem>.+)(?P<mark>[._-](?:part|split)[._-]?)(?P<index>\d{1,5})"
        r"(?P<of>[._-]?of[._-]?)?(?P<count>(?<=of)\d{1,5}|(?<=of[._-])\d{1,5})?(?P<tail>\.gguf)",
        re.I,
    ),
)


@dataclass(frozen=True)
class _PartName:
    """A file name taken apart: the whole's name, the pattern that its siblings share, the place in the row,
    and whether it says "part" or "split"."""

    whole: str
    family: tuple[str, ...]
    index: int
    count: int | None
    text: str
    explicit: bool


def _part_name(name: str) -> _PartName | None:
    """
    >>> _part_name("m.gguf.part2of3").index, _part_name("m.gguf-split-b").index, _part_name("m.gguf") is None
    (2, 1, True)
    """
    for pattern in _PART_NAMES:
        match = pattern.fullmatch(name)
        if match:
            index = match["index"].lower()
            kind = "digits" if index.isdigit() else f"{len(index)} letters"
            number = int(index) if index.isdigit() else _in_letters(index)
            family = (
                match["stem"],
                match["mark"],
                match["of"] or "",
                match["count"] or "",
                match["tail"],
                kind,
            )
            return _PartName(
                match["stem"] + match["tail"],
                family,
                number,
                int(match["count"]) if match["count"] else None,
                match["index"],
                "part" in match["mark"].lower() or "split" in match["mark"].lower(),
            )
    return None


def _in_letters(text: str) -> int:
    """Place of a suffix as ``split`` counts them: a = 0, b = 1; aa = 0, ab = 1, ba = 26."""
    number = 0
    for letter in text:
        number = number * 26 + ord(letter) - ord("a")
    return number


def _part_siblings(path: Path) -> dict[int, Path]:
    """The byte parts of the same whole in the folder, by their place; several of one place are an error."""
    name = _part_name(path.name)
    found: dict[int, Path] = {}
    for other in sorted(path.parent.iterdir()):
        sibling = _part_name(other.name)
        if name and sibling and sibling.family == name.family and other.is_file():
            if sibling.index in found:
                raise ShardError(
                    f"part {sibling.index} is there twice: {found[sibling.index].name} and {other.name}",
                    where=path.parent,
                    hint="keep one of them",
                )
            found[sibling.index] = other
    return dict(sorted(found.items()))


def byte_parts(path: str | Path) -> tuple[Path, ...]:
    """The parts of a file that was cut by bytes, in order: these *are* to be concatenated as they are.

    Found by name (``model.gguf.part1of2``, ``model.gguf-split-a``, ``model.gguf.001``) and by content:
    the first part begins with a GGUF header, no later one does, and the sizes add up to what it needs.
    When the header itself goes on in the second part the sizes are checked after joining only.

    Raises:
        ShardError: the name is not a part's, or a part is missing, doubled, or of a wrong size; says which.
        HeaderError: the first part cannot be read, or is not a GGUF.
    """
    path = Path(path)
    name = _part_name(path.name)
    if name is None:
        raise ShardError(
            "is not named as a byte part",
            where=path,
            hint="byte parts are named like model.gguf.part1of2 or model.gguf-split-a",
        )
    parts = _complete(path, name, _part_siblings(path))
    for number, part in enumerate(parts[1:], 2):
        if _opening(part)[0].startswith(MAGIC):
            raise ShardError(
                f"part {number} begins with a GGUF header of its own, so it is a shard, not a byte part",
                where=part,
                hint="name it as its header says (`dfqs-nb inspect` shows it), then merge",
            )
    _check_sum(parts)
    return parts


def _complete(path: Path, name: _PartName, found: dict[int, Path]) -> tuple[Path, ...]:
    indices = list(found)
    start = 0 if not name.text.isdigit() else min(indices[0], 1)
    if name.count is not None and start == 0 and name.count in found:
        raise ShardError(
            f"parts 0 to {name.count} of {name.count}: one too many",
            where=path.parent,
            hint="keep the parts of one file only",
        )
    stop = start + name.count if name.count is not None else indices[-1] + 1
    missing = [i for i in range(start, stop) if i not in found]
    if missing:
        places = ", ".join(_like(name, i) for i in missing[:10])
        raise ShardError(
            f"{len(missing)} of {stop - start} byte parts of {name.whole} missing: {places}",
            where=path.parent,
            hint="download what is missing into that folder",
        )
    if len(found) > stop - start:
        raise ShardError(
            f"{len(found)} byte parts, and their names say {stop - start}",
            where=path.parent,
            hint="keep the parts of one file only",
        )
    return tuple(found.values())


def _like(name: _PartName, index: int) -> str:
    """The part's place written as its siblings write it."""
    if name.text.isdigit():
        return str(index).zfill(len(name.text))
    letters = ""
    for _ in name.text:
        index, rest = divmod(index, 26)
        letters = chr(ord("a") + rest) + letters
    return letters


def _check_sum(parts: Sequence[Path]) -> GGUFHeader | None:
    """Check that the sizes add up to what the header needs; ``None`` when it goes on in the second part."""
    total = sum(part.stat().st_size for part in parts)
    try:
        header = read_header(parts[0])
    except HeaderError as error:
        if error.hint == CUT_OFF and len(parts) > 1 and parts[0].stat().st_size:
            return None
        raise
    least, most = _data_end(header), _padded_end(header)
    if total < least:
        raise ShardError(
            f"the {len(parts)} byte parts hold {total:,} bytes, {most - total:,} less than their header "
            f"needs ({most:,})",
            where=parts[0].parent,
            hint="a part is missing at the end, or was cut off: compare their sizes with the source",
        )
    if total not in (least, most):
        raise ShardError(
            f"the {len(parts)} byte parts hold {total:,} bytes, {total - most:,} more than their header "
            f"accounts for ({most:,})",
            where=parts[0].parent,
            hint="a part is there that is not of this file",
        )
    return header


def _byte_part(path: Path) -> Diagnosis | None:
    """The diagnosis of a byte part, or ``None`` when the name or the parts' content speak against it."""
    name = _part_name(path.name)
    if name is None:
        return None
    try:
        siblings = _part_siblings(path)
    except ShardError:
        siblings = {name.index: path}
    if not _parts_of_a_gguf(name, siblings):
        return None
    total = sum(part.stat().st_size for part in siblings.values())
    rows = (
        ("byte parts found", ", ".join(part.name for part in siblings.values())),
        ("bytes together", f"{total:,}"),
    )
    what = f"byte part {_like(name, name.index)} of {name.whole}"
    try:
        parts = byte_parts(path)
        header = _check_sum(parts)
    except DfqsError as error:
        return Diagnosis(path, Kind.BYTE_PART, f"{what}: {error.what}", error.hint, rows)
    needs = "that its header needs" if header else "(the header spans several parts)"
    return Diagnosis(
        path,
        Kind.BYTE_PART,
        f"{what}; all {len(parts)} are here, together the {total:,} bytes {needs}",
        f"join them: {_command('merge', parts[0])}",
        rows,
    )


def _parts_of_a_gguf(name: _PartName, siblings: dict[int, Path]) -> bool:
    """Whether the content of the parts agrees with their names: a GGUF header in the first only."""
    with_header = [index for index, part in siblings.items() if _opening(part)[0].startswith(MAGIC)]
    if with_header not in ([], [next(iter(siblings))]):
        return False  # a later one has its own: shards, or copies, under other names
    if not name.explicit and (len(siblings) < 2 or not with_header):
        return False  # model.gguf.1 or model.gguf.bak alone is no part
    could_be_first = name.index == 0 or (name.index == 1 and name.text.isdigit())
    return bool(with_header) or not could_be_first


def _command(verb: str, path: Path) -> str:
    return f"dfqs-nb {verb} {shlex.quote(path.name)}"


# ---- a table for the notebook ----


def diagnosis_table(paths: Iterable[str | Path], *, with_llama_cpp: bool = True) -> pd.DataFrame:
    """One row a file: index ``file``; columns ``bytes``, ``kind``, ``finding``, ``next_step`` and, unless
    told not to ask, ``llama_cpp``: what its loader says (``loads``, or its error)."""
    import pandas as pd

    found = [diagnose(path) for path in paths]
    table = pd.DataFrame(
        {
            "file": [one.path.name for one in found],
            "bytes": [one.path.stat().st_size for one in found],
            "kind": [str(one.kind) for one in found],
            "finding": [one.finding for one in found],
            "next_step": [one.next_step for one in found],
        }
    ).set_index("file")
    if with_llama_cpp:
        verdicts = loader_verdicts([one.path for one in found])
        table["llama_cpp"] = [
            "loads" if verdict.accepted else verdict.reason + (f" ({verdict.death})" if verdict.death else "")
            for verdict in verdicts
        ]
    return table
