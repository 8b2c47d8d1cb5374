"""What a file that should be a model really is, found in milliseconds and without reading its tensors.

A runtime's error rarely explains why a model does not load: for a raw concatenation of two shards llama.cpp
prints "invalid split file name". This module looks at the first bytes, at every GGUF header inside, at sizes,
holes and neighbours. It gives one sentence on what the file is, and the next step.
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
from dfqs_nb.gguf.shards import check_set, find_shards
from dfqs_nb.merge import byte_parts, disk
from dfqs_nb.merge.byte_parts import OPENING_BYTES, opening

if TYPE_CHECKING:
    import pandas as pd

MAX_PARTS = 10_000  # headers followed inside one file
AGAIN = "get it from its source again"
RESUME = "resume the download; or, if a merge with --consume was stopped, run the same command again"
ENCODER = re.compile(r"(v|mm|a)\.")  # tensors of a vision or audio encoder
FORMATS = {  # what other files are, by their first bytes
    rb"PK\x03\x04|\x1f\x8b|\x28\xb5\x2f\xfd|Rar!|7z\xbc\xaf": "an archive, perhaps a PyTorch checkpoint",
    rb"\x80[\x02-\x05]": "a Python pickle, perhaps a PyTorch checkpoint",
    rb"\x89HDF": "an HDF5 file",
    rb'.{4}\0{4}\{"': "a safetensors file",
    rb"lmgg|tjgg|fmgg": "a GGML file (from before GGUF)",
}
DOWNLOADING = re.compile(r"\.(incomplete|crdownload|part|partial|download|opdownload|!qB|!ut)$")


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

    The header accounts for ``expected_nbytes``. It is shard ``number`` (from 1) of ``count``.
    """

    start: int
    nbytes: int
    expected_nbytes: int
    number: int
    count: int
    n_tensors: int


@dataclass(frozen=True)
class Diagnosis:
    """What a file is, in a sentence, and the next step, if there is one.

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
        """Whether it is a model, or a shard of one, with nothing wrong in this file."""
        return self.kind in (Kind.SINGLE_FILE, Kind.SHARD)

    @property
    def evidence(self) -> tuple[tuple[str, str], ...]:
        """Rows of (what, value) that the finding rests on."""
        sizes, (missing, first) = [part.nbytes for part in self.parts], self.never_stored
        whole = 1 < len(sizes) <= 6 and sum(sizes) == self.nbytes
        terms = f" = {' + '.join(f'{size:,}' for size in sizes)}" if whole else ""
        rows = [("file size", f"{self.nbytes:,} bytes{terms}")]
        for part in self.parts[:12]:
            what = f"shard {part.number} of {part.count}, {part.n_tensors:,} tensors, {part.nbytes:,} bytes"
            what = f"{what}; it accounts for {part.expected_nbytes:,}"
            rows.append((f"header at byte {part.start:,}", what))
        if missing:
            rows.append(("never stored", f"{missing:,} of {self.nbytes:,} bytes, from byte {first:,} on"))
        return tuple(rows)


def diagnose(path: str | Path, *, allow_holes: bool = False) -> Diagnosis:
    """Identify a file as one `Kind`: reads its headers and at most 4 KiB more, and changes nothing.

    ``allow_holes``: do not take bytes that were never stored for an unfinished download. `HeaderError`: the
    file cannot be read at all (missing, a folder, no permission).
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
    if not allow_holes:
        (missing, at), mark = disk.missing_bytes(path), download_mark(path)
        diagnosis = replace(diagnosis, never_stored=(missing, at))
        seems_fine = diagnosis.kind in (Kind.SINGLE_FILE, Kind.SHARD, Kind.COMPANION, Kind.DAMAGED)
        if seems_fine and (missing or mark):
            what = f"of the right size, but {mark}"
            if missing:
                what = f"of which {missing:,} of its {size:,} bytes were never stored and read as zeros"
            what = f"a GGUF {what}"
            diagnosis = replace(diagnosis, kind=Kind.UNFINISHED, finding=what, next_step=RESUME)
    return (_byte_part(path) or diagnosis) if diagnosis.kind is Kind.UNFINISHED else diagnosis


def download_mark(path: Path) -> str:
    """What in a file's name, or beside it, shows that its download has not ended; empty without one."""
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
    if not first.strip(b"\0"):
        finding = f"zeros: the first {len(first):,} bytes of {size:,} were never written"
        return Kind.UNFINISHED, finding, "only its room was reserved: resume or repeat the download"
    if text := _text(first):
        step = "a server sent this in place of the model: check the address, and that you may download it"
        return Kind.DOCUMENT, f"a text or web page saved as a model: {text}", step
    step = "get the GGUF of the model, or convert it with llama.cpp's convert_hf_to_gguf.py"
    known = (f"{what}, not a GGUF" for magic, what in FORMATS.items() if re.match(magic, first, re.DOTALL))
    return Kind.OTHER_FORMAT, next(known, f"not a GGUF: it begins with {first[:8]!r}"), step


def _text(first: bytes) -> str:
    """What a server sent in place of a model, without its tags; empty when it is no text."""
    text = first.decode("utf-8-sig", "ignore" if len(first) == OPENING_BYTES else "replace").strip()
    if "\ufffd" in text or any(not char.isprintable() and not char.isspace() for char in text):
        return ""
    title = re.search(r"<title[^>]*>(.*?)</title", text, re.I | re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", title[1] if title else text).split())[:200] or text[:80]


def _refused_header(version: bytes, size: int, error: HeaderError) -> tuple[Kind, str]:
    """What a file is that begins as a GGUF and whose header the reader refuses."""
    if len(version) == 4 and (version[:2] == b"\0\0" != version[2:] or version == b"\1\0\0\0"):
        return Kind.OTHER_FORMAT, error.what  # the other byte order, or the first version
    if error.hint == CUT_OFF:
        return Kind.UNFINISHED, f"cut off inside its header, after {size:,} bytes: {error.what}"
    if re.search(r"has the type \d+,", error.what):
        return Kind.FOREIGN, f"a GGUF for another runtime: {error.what}"
    return Kind.DAMAGED, f"a GGUF with a broken header: {error.what}"


def _byte_part(path: Path) -> Diagnosis | None:
    """The diagnosis of a byte part, or None when its name or the parts' content speak against it."""
    name = byte_parts.part_name(path.name)
    if name is None:
        return None
    parts, whole = byte_parts.siblings(path, name), byte_parts.whole_name(name)
    if not byte_parts.are_parts(name, parts):
        return None
    what = f"a byte part of {plain(whole)}"
    try:
        files = byte_parts.byte_parts(path)
        total = sum(file.stat().st_size for file in files)
        finding = f"{what}; all {len(files)} are here, together {total:,} bytes"
        step = f"join them: dfqs-nb merge {quoted(files[0])} -o {quoted(path.with_name(whole))}"
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
    size = headers[0].file_size
    with path.open("rb", buffering=0) as file:
        while True:
            bare, full = ends(headers[-1])
            start = next_start(headers[-1], file)
            end = start or (full if size >= full else bare)
            if start is None or len(headers) == MAX_PARTS or _misplaced(headers[-1]):
                return _Walk(tuple(headers), end, size, None)
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
        return Kind.UNFINISHED, finding, f"resume the download, or repeat it ({full:,} bytes in all)"
    if error := _misplaced(header):
        return Kind.DAMAGED, f"{what}, but {error.what}", error.hint
    for key in ("split.no", "split.count"):
        if key in header and type(header[key]) is not int:
            return Kind.DAMAGED, f"its key {key} is not a number, as llama.cpp needs it", AGAIN
    if walk.error is not None:
        finding = f"another GGUF at byte {walk.end:,} that is cut off or broken: {walk.error.what}"
        return Kind.DAMAGED, f"{what}, and {finding}", AGAIN
    if walk.size > walk.end:
        step = f"keep the first {walk.end:,} bytes: `truncate -s {walk.end} {quoted(path)}`"
        if count > 1:
            step = f"other shards may follow in a damaged form: {AGAIN}"
        return Kind.TRAILING_BYTES, f"{what}, and {walk.size - walk.end:,} bytes after its end", step
    return None


def _role(header: GGUFHeader) -> Finding | None:
    """What a sound file is that llama.cpp takes for no model; of a shard only the whole set shows it."""
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
    """What a sound shard lacks, by its name and its neighbours."""
    number, count = shard_number(header)
    if count == 1:
        return None
    what = f"shard {number} of {count}"
    try:
        shards = find_shards(path)
    except ShardError as error:
        told = f"{what}: {error.what}".replace(f": is {what} ", " ")  # it may begin so itself
        return Kind.SHARD, plain(told), plain(error.hint)
    for shard in shards:
        first, size = opening(shard)
        if not first.startswith(MAGIC):
            _, finding, step = by_first_bytes(first, size)
            return Kind.SHARD, f"{what}; but {plain(shard.name)} is {finding}", step
    merged = path.with_name(f"{path.name[: path.name.rindex('-of-') - 6]}.gguf")
    step = f"dfqs-nb merge {quoted(path)} -o {quoted(merged)}"
    return Kind.SHARD, f"{what}; all {count} are here", step


def _several(path: Path, walk: _Walk, parts: Sequence[Part]) -> Finding:
    """What a file with several headers is."""
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
    if walk.error is not None:
        return f"the header at byte {walk.end:,} cannot be read: {walk.error.what}"
    if walk.size > walk.end:
        return f"{walk.size - walk.end:,} bytes follow that belong to no shard"
    numbers = [number for number, count in map(shard_number, walk.headers) if count > 1]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        return f"shard {', '.join(map(str, twice))} is there twice"
    try:
        for header in walk.headers:
            check_layout(header)
        if numbers:
            check_set(walk.headers, glued=True)
    except DfqsError as error:
        return error.what
    return ""


def diagnosis_table(paths: Iterable[str | Path]) -> pd.DataFrame:
    """What each file is, one row a file: ``bytes``, ``kind``, ``finding``, ``next_step``, ``llama_cpp``.

    The last is the answer of llama.cpp's loader: ``loads``, or its error.
    """
    import pandas as pd

    from dfqs_nb.llama import check

    diagnoses = [diagnose(path) for path in paths]
    verdicts = check.verdicts([diagnosis.path for diagnosis in diagnoses])
    answers = [v.reason + (f" ({v.death})" if v.death else "") or "loads" for v in verdicts]
    rows = [
        (plain(d.path.name), d.path.stat().st_size, str(d.kind), d.finding, d.next_step, answer)
        for d, answer in zip(diagnoses, answers, strict=True)
    ]
    columns = ["file", "bytes", "kind", "finding", "next_step", "llama_cpp"]
    return pd.DataFrame(rows, columns=columns).set_index("file")
