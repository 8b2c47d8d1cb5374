"""What a file that should be a model really is, found in milliseconds and without reading its tensors.

A runtime's error rarely explains why a model does not load: for a raw concatenation of two shards llama.cpp
says "invalid split file name", for an error page of a web server "invalid magic characters". This module
looks at the first bytes, at every GGUF header inside the file, at the sizes that these call for, at holes,
and at the names of the neighbours. It says in one sentence what the file is, and what to do next.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dfqs_nb.core.display import plain, quoted
from dfqs_nb.core.errors import DfqsError, HeaderError, LayoutError, ShardError
from dfqs_nb.gguf import facts
from dfqs_nb.gguf.header import CUT_OFF, MAGIC, GGUFHeader, check_layout, read_header
from dfqs_nb.gguf.shards import SHARD_NAME, check_set, shard_path
from dfqs_nb.merge import disk
from dfqs_nb.merge.byte_parts import are_parts, byte_parts, check_sum, ends, opening, part_name, siblings
from dfqs_nb.merge.first_bytes import AGAIN, Finding, Kind, Row, by_first_bytes, shown_bytes

if TYPE_CHECKING:
    import pandas as pd

MAX_PARTS = 10_000  # headers followed inside one file
SHOWN_BYTES = 16
RESUME = "resume the download; or, if a merge with --consume was stopped, run the same command again"
ENCODER = re.compile(r"(v|mm|a)\.")  # tensors of a vision or audio encoder
DOWNLOADING = re.compile(r"\.(incomplete|crdownload|part|partial|download|!qB)$")


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
        headers: the same headers, as they were read.
    """

    path: Path
    kind: Kind
    finding: str
    next_step: str = ""
    evidence: tuple[Row, ...] = ()
    parts: tuple[Part, ...] = field(default=(), repr=False)
    headers: tuple[GGUFHeader, ...] = field(default=(), repr=False)

    @property
    def sound(self) -> bool:
        """A model, or a shard of one, with nothing wrong in this file."""
        return self.kind in (Kind.SINGLE_FILE, Kind.SHARD)


def diagnose(path: str | Path, *, allow_holes: bool = False) -> Diagnosis:
    """Say what a file is: see `Kind` for what is told apart.

    Reads the headers inside and at most 4 KiB of anything else; changes nothing.

    Args:
        allow_holes: do not take bytes that were never stored for an unfinished download.

    Raises:
        HeaderError: the file cannot be read at all (missing, a folder, no permission).
    """
    path = Path(path)
    first, size = opening(path)
    if not first.startswith(MAGIC):
        kind, finding, step, rows = by_first_bytes(first, size)
        shown = (
            ("file size", f"{size:,} bytes"),
            ("it begins with", shown_bytes(first[:SHOWN_BYTES])),
            *rows,
        )
        conclusive = not size or kind in (Kind.LFS_POINTER, Kind.DOCUMENT)  # nobody cuts a model into these
        return (None if conclusive else _byte_part(path)) or Diagnosis(path, kind, finding, step, shown)
    try:
        walk = _walk(path)
    except HeaderError as error:
        kind, finding, step, rows = _refused_header(first, size, error)
        diagnosis = Diagnosis(
            path, kind, finding, step, (("header", error.what), ("file size", f"{size:,} bytes"))
        )
    else:
        diagnosis = _of_headers(path, walk)
    if not allow_holes:
        diagnosis = _unless_unfinished(diagnosis, size)
    return (_byte_part(path) or diagnosis) if diagnosis.kind is Kind.UNFINISHED else diagnosis


def _unless_unfinished(diagnosis: Diagnosis, size: int) -> Diagnosis:
    """A diagnosis in the light of holes, of the file's name, and of a downloader's control file."""
    missing, first = disk.missing_bytes(diagnosis.path)
    mark, evidence = download_mark(diagnosis.path), diagnosis.evidence
    if missing:
        evidence = (*evidence, ("never stored", f"{missing:,} of {size:,} bytes, from byte {first:,} on"))
        mark = f"{missing:,} of its {size:,} bytes were never stored (they read as zeros)"
    if mark and diagnosis.kind in (Kind.SINGLE_FILE, Kind.SHARD, Kind.COMPANION, Kind.DAMAGED):
        finding = f"a GGUF of which {mark}" if missing else f"a GGUF of the right size, but {mark}"
        return replace(diagnosis, kind=Kind.UNFINISHED, finding=finding, next_step=RESUME, evidence=evidence)
    return replace(diagnosis, evidence=evidence)


# ---- the headers inside ----


@dataclass(frozen=True)
class _Walk:
    """The headers of a file one after another; ``end`` is where the last one's data end, or should."""

    headers: tuple[GGUFHeader, ...]
    end: int
    size: int
    error: HeaderError | None = None  # why the header that starts at `end` cannot be read

    @property
    def parts(self) -> tuple[Part, ...]:
        starts = [header.start for header in self.headers]
        stops = [*starts[1:], self.size if self.error is None else self.end]
        return tuple(
            Part(h.start, stop - h.start, ends(h)[1] - h.start, *shard_number(h), len(h.tensors))
            for h, stop in zip(self.headers, stops, strict=True)
        )


def _walk(path: Path) -> _Walk:
    """Follow the headers: where one's data end, the next one's magic may stand."""
    headers = [read_header(path)]
    size = headers[0].file_size
    with path.open("rb", buffering=0) as file:
        while True:
            end, more = _next_header(file, headers[-1], size)
            if not more or len(headers) == MAX_PARTS or _misplaced(headers[-1]):
                return _Walk(tuple(headers), end, size)
            try:
                headers.append(read_header(path, start=end))
            except HeaderError as error:
                return _Walk(tuple(headers), end, size, error)


def _next_header(file: IO[bytes], header: GGUFHeader, size: int) -> tuple[int, bool]:
    """Where a header's data end, with or without padding, and whether another header starts there."""
    bare, full = ends(header)
    for end in (bare, full):
        file.seek(end)
        if end < size and file.read(4) == MAGIC:
            return end, True
    return (full if size >= full else bare), False


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
    kind, finding, step, more = (_of_one if len(walk.headers) == 1 else _of_several)(path, walk)
    named = (("name", header.text("general.name")), ("architecture", header.architecture))
    rows = [(label, value[:80]) for label, value in named if value]
    rows += [("GGUF version", str(header.version)), ("tensors", f"{len(header.tensors):,}"), *more]
    return Diagnosis(path, kind, finding, step, tuple(rows), walk.parts, walk.headers)


def download_mark(path: Path) -> str:
    """What in a file's name, or beside it, says that its download has not ended; empty when nothing does."""
    if path.with_name(f"{path.name}.aria2").exists():
        return f"the control file {plain(path.name)}.aria2 says that aria2 has not finished it"
    suffix = DOWNLOADING.search(path.name)
    return f"its name ends in {suffix[0]}, as that of a download that has not ended" if suffix else ""


# ---- a file with one header ----


def _of_one(path: Path, walk: _Walk) -> Finding:
    header = walk.headers[0]
    diagnosis = _layout(path, walk) or _role(header) or _shard(path, header)
    if diagnosis is None:
        diagnosis = Finding(Kind.SINGLE_FILE, f"a sound model in a single file of {walk.size:,} bytes", "")
    rows = (("file size", f"{walk.size:,} bytes"), ("header accounts for", f"{ends(header)[1]:,} bytes"))
    return diagnosis._replace(rows=(*rows, *diagnosis.rows))


def _role(header: GGUFHeader) -> Finding | None:
    """A sound file that llama.cpp does not take for a model; a shard shows only together with the others."""
    if shard_number(header)[1] > 1:
        return None
    if (role := facts.role(header)) != facts.MODEL:
        step = "give it to a runtime beside the model that it was made for"
        return Finding(Kind.COMPANION, f"{role}, not a language model", step)
    if encoder := [tensor.name for tensor in header.tensors if ENCODER.match(tensor.name)]:
        finding = f"a language model and {len(encoder)} tensors of an encoder ({encoder[0]}) in one file"
        step = "llama.cpp refuses it (wrong number of tensors): get the model and its mmproj as two files"
        return Finding(Kind.FOREIGN, finding, step)
    return None


def _layout(path: Path, walk: _Walk) -> Finding | None:
    """What is wrong with where the tensors lie, or where the file ends."""
    header, (bare, full) = walk.headers[0], ends(walk.headers[0])
    number, count = shard_number(header)
    what = f"shard {number} of {count}" if count > 1 else "a model in a single file"
    if walk.size < bare:
        cut = next(t for t in header.tensors if header.data_offset + t.offset + t.nbytes > walk.size)
        whole = f"{header.tensors.index(cut):,} of {len(header.tensors):,}"
        finding = f"cut off: {full - walk.size:,} bytes short, from tensor {cut.name!r} on"
        step = f"resume the download, or repeat it ({full:,} bytes in all)"
        return Finding(Kind.UNFINISHED, finding, step, (("tensors that are whole", whole),))
    if error := _misplaced(header):
        return Finding(Kind.DAMAGED, f"{what}, but {error.what}", error.hint)
    for key in ("split.no", "split.count"):
        if key in header and type(header[key]) is not int:
            return Finding(Kind.DAMAGED, f"its key {key} is not a number, as llama.cpp needs it", AGAIN)
    if walk.error is not None:
        finding = f"{what}, and the beginning of another GGUF at byte {walk.end:,} that is cut off or broken"
        return Finding(Kind.DAMAGED, finding, AGAIN, (("second header", walk.error.what),))
    if walk.size > walk.end:
        with path.open("rb", buffering=0) as file:
            file.seek(walk.end)
            rows = (("the bytes after the end begin with", shown_bytes(file.read(SHOWN_BYTES))),)
        step = f"keep the first {walk.end:,} bytes: `truncate -s {walk.end} {quoted(path)}`"
        if count > 1:
            step = f"other shards may follow in a damaged form: {AGAIN}"
        finding = f"{what}, and {walk.size - walk.end:,} bytes after its end"
        return Finding(Kind.TRAILING_BYTES, finding, step, rows)
    return None


def _shard(path: Path, header: GGUFHeader) -> Finding | None:
    """A sound shard, by its name and its neighbours."""
    number, count = shard_number(header)
    if count == 1:
        return None
    what, name = f"shard {number} of {count}", path.stem + path.suffix.lower()
    match = SHARD_NAME.fullmatch(name)
    if not 1 <= number <= count <= 65_535:
        return Finding(Kind.SHARD, f"{what}: numbers that llama.cpp cannot have", AGAIN)
    if match is None or name != path.name or (int(match["number"]), int(match["count"])) != (number, count):
        wanted = plain(shard_path(match["prefix"] if match else path.stem, number, count).name)
        step = f"rename it: mv {quoted(path)} {quoted(path.with_name(wanted))}"
        return Finding(Kind.SHARD, f"{what} by its header, but not named so, as llama.cpp needs it", step)
    others = [shard_path(path.parent / match["prefix"], i, count) for i in range(1, count + 1)]
    missing = [plain(other.name) for other in others if not other.is_file()]
    if missing:
        names = ", ".join(missing[:3]) + " ..." * (len(missing) > 3)
        finding = f"{what}; {len(missing)} missing here: {names}"
        return Finding(Kind.SHARD, finding, "download what is missing into the same folder, then merge")
    for other in others:
        first, size = opening(other)
        if not first.startswith(MAGIC):
            _, finding, step, _ = by_first_bytes(first, size)
            return Finding(Kind.SHARD, f"{what}; but {plain(other.name)} is {finding}", step)
    step = f"dfqs-nb merge {quoted(path)} -o {quoted(path.with_name(match['prefix'] + '.gguf'))}"
    return Finding(Kind.SHARD, f"{what}; all {count} are here", step)


# ---- a file with several headers ----


def _of_several(path: Path, walk: _Walk) -> Finding:
    parts, problem = walk.parts, _problem(walk)
    rest = walk.size - sum(part.nbytes for part in parts)
    terms = [f"{part.nbytes:,}" for part in parts[:6]] + ["..."] * (len(parts) > 6)
    terms += [f"{rest:,} unread"] if rest else []
    rows = [("file size", f"{walk.size:,} bytes = {' + '.join(terms)}")]
    for part in parts[:12]:
        what = f"shard {part.number} of {part.count}, {part.n_tensors:,} tensors, {part.nbytes:,} bytes"
        rows.append((f"header at byte {part.start:,}", what))
    if all(part.count == 1 for part in parts):
        finding = f"{len(parts)} models glued together; a runtime sees the first only"
        step = f"cut it at byte {parts[1].start:,}, or get the files from their source again"
        return Finding(Kind.SEVERAL_MODELS, f"{finding}; {problem}".rstrip("; "), step, tuple(rows))
    if problem:
        finding = f"shards glued together byte for byte, and not all of them sound: {problem}"
        return Finding(Kind.DAMAGED, finding, "get the shards from their source again", tuple(rows))
    order = [part.number for part in parts]
    how = "" if order == sorted(order) else f" in the order {', '.join(map(str, order))}"
    finding = f"{len(parts)} shards glued together byte for byte{how}, which is no merge: no runtime loads it"
    return Finding(Kind.RAW_CONCATENATION, finding, f"dfqs-nb repair {quoted(path)} --in-place", tuple(rows))


def _problem(walk: _Walk) -> str:
    """Why the shards in a file are not all the shards of one model; empty when they are."""
    last, count = walk.headers[-1], len(walk.headers)
    if walk.error is not None:
        return f"the header at byte {walk.end:,} cannot be read: {walk.error.what}"
    if walk.size < ends(last)[0]:
        return f"the last of {count} is cut off, {ends(last)[1] - walk.size:,} bytes short"
    if walk.size > walk.end:
        return f"{walk.size - walk.end:,} bytes follow that belong to no shard"
    numbers = [part.number for part in walk.parts if part.count > 1]
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


# ---- a file without a readable header ----


def _refused_header(first: bytes, size: int, error: HeaderError) -> Finding:
    """A file that begins as a GGUF and whose header the reader refuses."""
    version = first[4:8]
    if len(version) == 4 and version[:2] == b"\0\0" and version[2:] != b"\0\0":
        finding = "a big-endian GGUF, for machines with the other byte order"
        return Finding(Kind.OTHER_FORMAT, finding, error.hint)
    if version == b"\1\0\0\0":
        return Finding(Kind.OTHER_FORMAT, "GGUF version 1, which llama.cpp no longer reads", error.hint)
    if error.hint == CUT_OFF:
        finding = f"cut off inside its header, after {size:,} bytes: {error.what}"
        return Finding(Kind.UNFINISHED, finding, error.hint)
    if re.search(r"has the type \d+,", error.what):
        return Finding(Kind.FOREIGN, f"a GGUF for another runtime: {error.what}", error.hint)
    return Finding(Kind.DAMAGED, f"a GGUF with a broken header: {error.what}", error.hint)


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
    names = ", ".join(plain(part.name) for part in parts.values())
    rows = (("byte parts found", names), ("bytes together", f"{total:,}"))
    what = f"byte part {name.like(name.index)} of {plain(name.whole)}"
    try:
        files = byte_parts(path)
        needs = "that its header needs" if check_sum(files) else "(the header spans several parts)"
    except DfqsError as error:
        return Diagnosis(path, Kind.BYTE_PART, f"{what}: {error.what}", error.hint, rows)
    finding = f"{what}; all {len(parts)} are here, together the {total:,} bytes {needs}"
    step = f"join them: dfqs-nb merge {quoted(files[0])} -o {quoted(path.with_name(name.whole))}"
    return Diagnosis(path, Kind.BYTE_PART, finding, step, rows)


# ---- a table for the notebook ----


def diagnosis_table(paths: Iterable[str | Path], *, with_llama_cpp: bool = True) -> pd.DataFrame:
    """What each file is, one row a file: ``bytes``, ``kind``, ``finding``, ``next_step``, ``llama_cpp``.

    The last is what llama.cpp's loader says: ``loads``, or its error; ``with_llama_cpp=False`` leaves it out.
    """
    import pandas as pd

    from dfqs_nb.llama.check import loader_verdicts

    diagnoses = [diagnose(path) for path in paths]
    rows = [
        (plain(d.path.name), d.path.stat().st_size, str(d.kind), d.finding, d.next_step) for d in diagnoses
    ]
    table = pd.DataFrame(rows, columns=["file", "bytes", "kind", "finding", "next_step"]).set_index("file")
    if with_llama_cpp:
        verdicts = loader_verdicts([diagnosis.path for diagnosis in diagnoses])
        deaths = [f" ({verdict.death})" if verdict.death else "" for verdict in verdicts]
        table["llama_cpp"] = [v.reason + death or "loads" for v, death in zip(verdicts, deaths, strict=True)]
    return table
