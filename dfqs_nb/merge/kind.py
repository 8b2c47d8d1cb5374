"""What a file that should be a model really is, found in milliseconds and without reading its tensors.

A runtime's error rarely explains why a model does not load: for a raw concatenation of two shards llama.cpp
says "invalid split file name", for an error page of a web server "invalid magic characters". This module
looks at the first bytes, at every GGUF header inside the file, at the sizes that these call for, at holes,
and at the names of the neighbours. It says in one sentence what the file is, and what to do next.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dfqs_nb.core.display import plain, quoted
from dfqs_nb.core.errors import DfqsError, HeaderError, LayoutError, ShardError
from dfqs_nb.gguf import facts
from dfqs_nb.gguf.header import CUT_OFF, MAGIC, GGUFHeader, check_layout, ends, next_start, read_header
from dfqs_nb.gguf.shards import SHARD_NAME, check_set, shard_path
from dfqs_nb.merge import disk
from dfqs_nb.merge.byte_parts import (
    OPENING_BYTES,
    are_parts,
    byte_parts,
    check_sum,
    opening,
    part_name,
    siblings,
)

if TYPE_CHECKING:
    import pandas as pd

MAX_PARTS = 10_000  # headers followed inside one file
AGAIN = "get it from its source again"
CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py, or get the GGUF of the model"
ANSWER = "a server sent this in place of the model: check the address, and that you may download it"
RESUME = "resume the download; or, if a merge with --consume was stopped, run the same command again"
ENCODER = re.compile(r"(v|mm|a)\.")  # tensors of a vision or audio encoder
DOWNLOADING = re.compile(r"\.(incomplete|crdownload|part|partial|download|opdownload|!qB|!ut)$")
ARCHIVES = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"Rar!", b"7z\xbc\xaf")  # of gzip, zstd, RAR and 7-Zip
# The first bytes of other files, what these are, and what to do with them.
FORMATS: tuple[tuple[bytes | tuple[bytes, ...], str, str], ...] = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)", "unpack it, or get the GGUF of the model"),
    (ARCHIVES, "a compressed archive", "unpack it, or get the GGUF of the model"),
    (b"\x89HDF", "an HDF5 file", CONVERT),
    (b"\x80\x02", "a Python pickle (a PyTorch checkpoint?)", CONVERT),
    ((b"lmgg", b"tjgg", b"fmgg"), "a GGML file from before GGUF", CONVERT),
    (b"FUGG", "a GGUF with its bytes swapped in fours", AGAIN),
)


class Kind(StrEnum):
    """What a file turned out to be. Kinds differ in what a user does next."""

    SINGLE_FILE = "sound single file"  # use it
    SHARD = "shard"  # merge it with the others
    BYTE_PART = "byte part"  # join it with the others: `dfqs-nb merge` does
    RAW_CONCATENATION = "raw concatenation"  # of all shards of one model: `dfqs-nb repair`
    SEVERAL_MODELS = "several models in one file"  # cut it
    TRAILING_BYTES = "trailing bytes"  # cut them off
    COMPANION = "no language model"  # a LoRA adapter, a projector: use it beside one
    FOREIGN = "for another runtime"  # run it there, or quantize the original again
    UNFINISHED = "unfinished download"  # resume it
    DAMAGED = "damaged"  # download it again
    LFS_POINTER = "Git LFS pointer"  # `git lfs pull`
    DOCUMENT = "document"  # a server's answer: check the address, and what you may download
    OTHER_FORMAT = "another format"  # convert it, or get the GGUF


Finding = tuple[Kind, str, str]  # and the finding in one sentence, and the next step


@dataclass(frozen=True)
class Part:
    """One GGUF header inside a file, and the bytes that are its own, from ``start`` in the file.

    The header accounts for ``expected_nbytes``. It is shard ``number`` (from 1) of ``count``; 1 of 1 for a
    model in a single file.
    """

    start: int
    nbytes: int
    expected_nbytes: int
    number: int
    count: int
    n_tensors: int


@dataclass(frozen=True)
class Diagnosis:
    """What a file is, in one sentence, and what to do with it, if anything.

    ``parts`` and ``headers`` are the GGUF headers found inside, in the file's order. ``never_stored``: how
    many bytes, and where the first of them is.
    """

    path: Path
    kind: Kind
    finding: str
    next_step: str = ""
    nbytes: int = 0
    never_stored: tuple[int, int] = (0, 0)
    parts: tuple[Part, ...] = field(default=(), repr=False)
    headers: tuple[GGUFHeader, ...] = field(default=(), repr=False)

    @property
    def sound(self) -> bool:
        """A model, or a shard of one, with nothing wrong in this file."""
        return self.kind in (Kind.SINGLE_FILE, Kind.SHARD)

    @property
    def evidence(self) -> tuple[tuple[str, str], ...]:
        """Rows of (what, value) that the finding rests on."""
        sizes = [part.nbytes for part in self.parts]
        whole = len(sizes) > 1 and sum(sizes) == self.nbytes
        terms = f" = {' + '.join(f'{size:,}' for size in sizes)}" if whole and len(sizes) <= 6 else ""
        rows = [("file size", f"{self.nbytes:,} bytes{terms}")]
        for part in self.parts[:12]:
            what = f"shard {part.number} of {part.count}, {part.n_tensors:,} tensors, {part.nbytes:,} bytes"
            accounts = f"{what}; it accounts for {part.expected_nbytes:,}"
            rows.append((f"header at byte {part.start:,}", accounts))
        missing, first = self.never_stored
        if missing:
            rows.append(("never stored", f"{missing:,} of {self.nbytes:,} bytes, from byte {first:,} on"))
        return tuple(rows)


def diagnose(path: str | Path, *, allow_holes: bool = False) -> Diagnosis:
    """Say what a file is: see `Kind` for what is told apart.

    Reads the headers inside and at most 4 KiB of anything else; changes nothing. ``allow_holes``: do not take
    bytes that were never stored for an unfinished download.

    Raises:
        HeaderError: the file cannot be read at all (missing, a folder, no permission).
    """
    path = Path(path)
    first, size = opening(path)
    if not first.startswith(MAGIC):
        diagnosis = Diagnosis(path, *by_first_bytes(first, size), size)
        conclusive = not size or diagnosis.kind in (Kind.LFS_POINTER, Kind.DOCUMENT)
        return (None if conclusive else _byte_part(path)) or diagnosis  # nobody cuts a model into these
    try:
        diagnosis = _of_headers(path, _walk(path))
    except HeaderError as error:
        diagnosis = Diagnosis(path, *_refused_header(first[4:8], size, error), error.hint, size)
    if not allow_holes:  # nor a name, or a downloader's control file, that says unfinished
        missing, mark = disk.missing_bytes(path), download_mark(path)
        diagnosis = replace(diagnosis, never_stored=missing)
        finding = f"a GGUF of the right size, but {mark}"
        if missing[0]:
            finding = (
                f"a GGUF of which {missing[0]:,} of its {size:,} bytes were never stored and read as zeros"
            )
        seems_fine = diagnosis.kind in (Kind.SINGLE_FILE, Kind.SHARD, Kind.COMPANION, Kind.DAMAGED)
        if seems_fine and (missing[0] or mark):
            diagnosis = replace(diagnosis, kind=Kind.UNFINISHED, finding=finding, next_step=RESUME)
    return (_byte_part(path) or diagnosis) if diagnosis.kind is Kind.UNFINISHED else diagnosis


def download_mark(path: Path) -> str:
    """What in a file's name, or beside it, says that its download has not ended; empty when nothing does."""
    if path.with_name(f"{path.name}.aria2").exists():
        return f"the control file {plain(path.name)}.aria2 says that aria2 has not finished it"
    suffix = DOWNLOADING.search(path.name)
    return f"its name ends in {suffix[0]}, as that of a download that has not ended" if suffix else ""


# ---- a file without a readable header ----


def by_first_bytes(first: bytes, size: int) -> Finding:
    """What a file is that does not begin with the magic, by its first 4 KiB."""
    if size == 0:
        return Kind.UNFINISHED, "an empty file", "download it again: nothing arrived"
    if first.startswith(b"version https://git-lfs"):
        length = re.search(rb"^size (\d{1,18})$", first, re.M)
        target = f"{int(length[1]):,} bytes" if length else "an unknown number of bytes"
        step = "run `git lfs pull` in the clone, or download the file from its 'resolve' address"
        return Kind.LFS_POINTER, f"a Git LFS pointer to the model ({target}), not the model itself", step
    for magic, name, step in FORMATS:
        if first.startswith(magic):
            return Kind.OTHER_FORMAT, f"{name}, not a GGUF", step
    if first[8:10] == b'{"' and int.from_bytes(first[:8], "little") < 1 << 30:
        return Kind.OTHER_FORMAT, "a safetensors file, not a GGUF", CONVERT
    if not first.strip(b"\0"):
        finding = f"zeros: the first {len(first):,} bytes of {size:,} were never written"
        return Kind.UNFINISHED, finding, "only its room was reserved: resume or repeat the download"
    if text := _text(first):
        return Kind.DOCUMENT, f"a text or web page saved as a model: {text}", ANSWER
    finding = "not a GGUF: it does not begin with these four letters"
    return Kind.OTHER_FORMAT, finding, "check what you downloaded"


def _text(first: bytes) -> str:
    """What a server sent in place of a model, without its tags; empty when it is no text."""
    text = first.decode("utf-8-sig", "ignore" if len(first) == OPENING_BYTES else "replace").strip()
    if "\ufffd" in text or any(not char.isprintable() and not char.isspace() for char in text):
        return ""
    title = re.search(r"<title[^>]*>(.*?)</title", text, re.I | re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", title[1] if title else text).split())[:200] or text[:80]


def _refused_header(version: bytes, size: int, error: HeaderError) -> tuple[Kind, str]:
    """A file that begins as a GGUF and whose header the reader refuses."""
    if len(version) == 4 and version[:2] == b"\0\0" and version[2:] != b"\0\0":
        return Kind.OTHER_FORMAT, "a big-endian GGUF, for machines with the other byte order"
    if version == b"\1\0\0\0":
        return Kind.OTHER_FORMAT, "GGUF version 1, which llama.cpp no longer reads"
    if error.hint == CUT_OFF:
        return Kind.UNFINISHED, f"cut off inside its header, after {size:,} bytes: {error.what}"
    if re.search(r"has the type \d+,", error.what):
        return Kind.FOREIGN, f"a GGUF for another runtime: {error.what}"
    return Kind.DAMAGED, f"a GGUF with a broken header: {error.what}"


def _byte_part(path: Path) -> Diagnosis | None:
    """The diagnosis of a byte part, or None when its name or the parts' content speak against it."""
    name = part_name(path.name)
    if name is None:
        return None
    try:
        parts = siblings(path, name)
    except ShardError:
        parts = {name.index: path}
    if not are_parts(name, parts):
        return None
    total = sum(part.stat().st_size for part in parts.values())
    what = f"byte part {name.like(name.index)} of {plain(name.whole)}"
    try:
        files = byte_parts(path)
        needs = "that its header needs" if check_sum(files) else "(the header spans several parts)"
        finding = f"{what}; all {len(parts)} are here, together the {total:,} bytes {needs}"
        step = f"join them: dfqs-nb merge {quoted(files[0])} -o {quoted(path.with_name(name.whole))}"
    except DfqsError as error:
        finding, step = f"{what}: {error.what}", error.hint
    return Diagnosis(path, Kind.BYTE_PART, finding, step, path.stat().st_size)


# ---- the headers inside ----


class _Walk(NamedTuple):
    """The headers of a file one after another; ``end`` is where the last one's data end, or should."""

    headers: tuple[GGUFHeader, ...]
    end: int
    size: int
    error: HeaderError | None  # why the header that starts at `end` cannot be read


def _walk(path: Path) -> _Walk:
    """Follow the headers: where one's data end, with or without padding, the next one's magic may stand."""
    headers = [read_header(path)]
    size, error = headers[0].file_size, None
    with path.open("rb", buffering=0) as file:
        while True:
            bare, full = ends(headers[-1])
            start = next_start(headers[-1], file)
            end = start or (full if size >= full else bare)
            if start is None or len(headers) == MAX_PARTS or _misplaced(headers[-1]):
                return _Walk(tuple(headers), end, size, error)
            try:
                headers.append(read_header(path, start=end))
            except HeaderError as refused:
                return _Walk(tuple(headers), end, size, refused)


def _misplaced(header: GGUFHeader) -> LayoutError | None:
    """Why the tensors do not lie one after another in the file; None when they do."""
    try:
        check_layout(header)
    except LayoutError as error:
        return error
    return None


def shard_number(header: GGUFHeader) -> tuple[int, int]:
    """Shard number (from 1) and count by the header; 1 of 1 for a single file, or without numbers."""
    number, count = header.get("split.no", 0), header.get("split.count", 0)
    if type(number) is not int or type(count) is not int or count <= 1:
        return 1, 1
    return number + 1, count


def _of_headers(path: Path, walk: _Walk) -> Diagnosis:
    header = walk.headers[0]
    stops = [*(header.start for header in walk.headers[1:]), walk.end if walk.error else walk.size]
    parts = tuple(
        Part(h.start, stop - h.start, ends(h)[1] - h.start, *shard_number(h), len(h.tensors))
        for h, stop in zip(walk.headers, stops, strict=True)
    )
    if len(parts) == 1:
        sound: Finding = (Kind.SINGLE_FILE, f"a sound model in a single file of {walk.size:,} bytes", "")
        finding = _layout(path, walk) or _role(header) or _shard(path, header) or sound
    else:
        finding = _several(path, walk, parts)
    return Diagnosis(path, *finding, walk.size, parts=parts, headers=walk.headers)


def _layout(path: Path, walk: _Walk) -> Finding | None:
    """What is wrong with where the tensors lie, or where the file ends."""
    header, (bare, full) = walk.headers[0], ends(walk.headers[0])
    number, count = shard_number(header)
    what = f"shard {number} of {count}" if count > 1 else "a model in a single file"
    if walk.size < bare:
        cut = next(t for t in header.tensors if header.data_offset + t.offset + t.nbytes > walk.size)
        finding = f"cut off: {full - walk.size:,} bytes short, from tensor {cut.name!r} on"
        step = f"resume the download, or repeat it ({full:,} bytes in all)"
        return Kind.UNFINISHED, finding, step
    if error := _misplaced(header):
        return Kind.DAMAGED, f"{what}, but {error.what}", error.hint
    for key in ("split.no", "split.count"):
        if key in header and type(header[key]) is not int:
            return Kind.DAMAGED, f"its key {key} is not a number, as llama.cpp needs it", AGAIN
    if walk.error is not None:
        finding = f"{what}, and another GGUF at byte {walk.end:,} that is cut off or broken"
        return Kind.DAMAGED, f"{finding}: {walk.error.what}", AGAIN
    if walk.size > walk.end:
        step = f"keep the first {walk.end:,} bytes: `truncate -s {walk.end} {quoted(path)}`"
        if count > 1:
            step = f"other shards may follow in a damaged form: {AGAIN}"
        finding = f"{what}, and {walk.size - walk.end:,} bytes after its end"
        return Kind.TRAILING_BYTES, finding, step
    return None


def _role(header: GGUFHeader) -> Finding | None:
    """A sound file that llama.cpp does not take for a model; a shard shows only together with the others."""
    if shard_number(header)[1] > 1:
        return None
    if (role := facts.role(header)) != facts.MODEL:
        step = "give it to a runtime beside the model that it was made for"
        return Kind.COMPANION, f"{role}, not a language model", step
    if encoder := [tensor.name for tensor in header.tensors if ENCODER.match(tensor.name)]:
        finding = f"a language model and {len(encoder)} tensors of an encoder ({encoder[0]}) in one file"
        step = "llama.cpp refuses it (wrong number of tensors): get the model and its mmproj as two files"
        return Kind.FOREIGN, finding, step
    return None


def _shard(path: Path, header: GGUFHeader) -> Finding | None:
    """A sound shard, by its name and its neighbours."""
    number, count = shard_number(header)
    if count == 1:
        return None
    what, name = f"shard {number} of {count}", path.stem + path.suffix.lower()
    match = SHARD_NAME.fullmatch(name)
    if not 1 <= number <= count <= 65_535:
        return Kind.SHARD, f"{what}: numbers that llama.cpp cannot have", AGAIN
    if match is None or name != path.name or (int(match["number"]), int(match["count"])) != (number, count):
        wanted = plain(shard_path(match["prefix"] if match else path.stem, number, count).name)
        step = f"rename it: mv {quoted(path)} {quoted(path.with_name(wanted))}"
        if path.with_name(wanted).exists():  # perhaps the other shard: moving this one there would destroy it
            step = f"another file has its name, {wanted}: move that one away first, then rename this one"
        return Kind.SHARD, f"{what} by its header, but not named so, as llama.cpp needs it", step
    others = [shard_path(path.parent / match["prefix"], i, count) for i in range(1, count + 1)]
    missing = [plain(other.name) for other in others if not other.is_file()]
    if missing:
        names = ", ".join(missing[:3]) + " ..." * (len(missing) > 3)
        finding = f"{what}; {len(missing)} missing here: {names}"
        return Kind.SHARD, finding, "download what is missing into the same folder, then merge"
    for other in others:
        first, size = opening(other)
        if not first.startswith(MAGIC):
            _, finding, step = by_first_bytes(first, size)
            return Kind.SHARD, f"{what}; but {plain(other.name)} is {finding}", step
    step = f"dfqs-nb merge {quoted(path)} -o {quoted(path.with_name(match['prefix'] + '.gguf'))}"
    return Kind.SHARD, f"{what}; all {count} are here", step


def _several(path: Path, walk: _Walk, parts: Sequence[Part]) -> Finding:
    """A file with several headers."""
    problem = _problem(walk)
    if all(part.count == 1 for part in parts):
        finding = f"{len(parts)} models glued together; a runtime sees the first only"
        step = f"cut it at byte {parts[1].start:,}, or get the files from their source again"
        return Kind.SEVERAL_MODELS, f"{finding}; {problem}".rstrip("; "), step
    if problem:
        finding = f"shards glued together byte for byte, and not all of them sound: {problem}"
        return Kind.DAMAGED, finding, "get the shards from their source again"
    order = [part.number for part in parts]
    how = "" if order == sorted(order) else f" in the order {', '.join(map(str, order))}"
    finding = f"{len(parts)} shards glued together byte for byte{how}, which is no merge: no runtime loads it"
    return Kind.RAW_CONCATENATION, finding, f"dfqs-nb repair {quoted(path)} --in-place"


def _problem(walk: _Walk) -> str:
    """Why the shards in a file are not all the shards of one model; empty when they are."""
    last, count = walk.headers[-1], len(walk.headers)
    if walk.error is not None:
        return f"the header at byte {walk.end:,} cannot be read: {walk.error.what}"
    if walk.size < ends(last)[0]:
        return f"the last of {count} is cut off, {ends(last)[1] - walk.size:,} bytes short"
    if walk.size > walk.end:
        return f"{walk.size - walk.end:,} bytes follow that belong to no shard"
    numbers = [number for number, count in map(shard_number, walk.headers) if count > 1]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        return f"shard {', '.join(map(str, twice))} is there twice"
    try:
        for header in walk.headers:
            check_layout(header)
        if numbers:
            check_set(walk.headers, glued=True, allow_mixed=True)
    except DfqsError as error:
        return error.what
    return ""


def diagnosis_table(paths: Iterable[str | Path]) -> pd.DataFrame:
    """What each file is, one row a file: ``bytes``, ``kind``, ``finding``, ``next_step``, ``llama_cpp``.

    The last is what llama.cpp's loader says: ``loads``, or its error.
    """
    import pandas as pd

    from dfqs_nb.llama.check import loader_verdicts

    diagnoses = [diagnose(path) for path in paths]
    rows = [
        (plain(d.path.name), d.path.stat().st_size, str(d.kind), d.finding, d.next_step) for d in diagnoses
    ]
    table = pd.DataFrame(rows, columns=["file", "bytes", "kind", "finding", "next_step"]).set_index("file")
    verdicts = loader_verdicts([diagnosis.path for diagnosis in diagnoses])
    deaths = [f" ({verdict.death})" if verdict.death else "" for verdict in verdicts]
    table["llama_cpp"] = [v.reason + death or "loads" for v, death in zip(verdicts, deaths, strict=True)]
    return table
