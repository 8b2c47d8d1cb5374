"""What a file that should be a model really is, found in milliseconds and without reading its tensors.

A runtime's error rarely explains why a model does not load: for a raw concatenation of two shards llama.cpp
prints "invalid split file name". This module looks at the first bytes, at every GGUF header inside, at sizes,
holes and neighbours. It gives one sentence on what the file is, and the next step.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from dfqs_nb.core.display import plain, quoted
from dfqs_nb.core.errors import DfqsError, HeaderError, LayoutError, ShardError
from dfqs_nb.gguf import facts
from dfqs_nb.gguf import header as reader
from dfqs_nb.gguf.header import CUT_OFF, MAGIC, GGUFHeader, check_layout, read_header, unreadable
from dfqs_nb.gguf.shards import check_set, find_shards
from dfqs_nb.merge.disk import missing_bytes

if TYPE_CHECKING:
    import pandas as pd

OPENING_BYTES = 4096
MAX_PARTS = 10_000  # headers followed inside one file
AGAIN = "get it from its source again"
RESUME = "resume the download; or, if a merge with --consume was stopped, run the same command again"
PART = "resume the download, or repeat it; if it is a part of a file, name its parts like model.gguf.part1of2"
ENCODER = re.compile(r"(v|mm|a)\.")  # tensors of a vision or audio encoder
FORMATS = {  # what other files are, by their first bytes
    rb"PK\x03\x04|\x1f\x8b|\x28\xb5\x2f\xfd|Rar!|7z\xbc\xaf": "an archive, perhaps a PyTorch checkpoint",
    rb"\x80[\x02-\x05]": "a Python pickle, perhaps a PyTorch checkpoint",
    rb"\x89HDF": "an HDF5 file",
    rb'.{4}\0{4}\{"': "a safetensors file",
    rb"lmgg|tjgg|fmgg": "a GGML file (from before GGUF)",
}
DOWNLOADING = re.compile(r"\.(incomplete|crdownload|part|partial|download|opdownload|!qB|!ut)$")
PART_NAME = re.compile(  # of a file cut by bytes: model.gguf.part1of2, model.gguf-split-a
    r"(?P<whole>.+\.gguf)[._-](part|split)[._-]?(?P<index>\d{1,5}|[a-z]{1,3})"
    r"(?P<tail>([._-]?of[._-]?(?P<count>\d{1,5}))?)",
    re.I,
)


class Kind(StrEnum):
    """What a file turned out to be. Kinds differ in what a user does next."""

    SINGLE_FILE = "sound single file"  # use it
    SHARD = "shard"  # merge it with the others
    BYTE_PART = "byte part"  # join it with the others: `dfqs-nb merge` does
    RAW_CONCATENATION = "raw concatenation"  # of all shards of one model: `dfqs-nb repair`
    TRAILING_BYTES = "trailing bytes"  # cut them off
    COMPANION = "no language model"  # a LoRA adapter, a projector: use it beside one
    FOREIGN = "for another runtime"  # run it there, or quantize the original again
    UNFINISHED = "unfinished download"  # resume it
    DAMAGED = "damaged"  # download it again
    LFS_POINTER = "Git LFS pointer"  # `git lfs pull`
    DOCUMENT = "document"  # a server's answer: check the address, and what you may download
    OTHER_FORMAT = "another format"  # convert it, or get the GGUF


REFUSED = {  # what a file is whose header the reader refuses, by the hint; else it is damaged
    CUT_OFF: Kind.UNFINISHED,
    reader.FORK: Kind.FOREIGN,
    reader.OTHER_ORDER: Kind.OTHER_FORMAT,
    reader.OTHER_VERSION: Kind.OTHER_FORMAT,
}
Finding = tuple[Kind, str, str]  # and the finding in one sentence, and the next step


@dataclass(frozen=True)
class Diagnosis:
    """What a file is, in a sentence, and the next step, if there is one.

    ``headers`` are those inside, in the file's order, and ``end`` is where what they account for ends.
    """

    path: Path
    kind: Kind
    finding: str
    next_step: str = ""
    nbytes: int = 0
    headers: tuple[GGUFHeader, ...] = field(default=(), repr=False)
    end: int = 0

    @property
    def sound(self) -> bool:
        """Whether it is a model, or a shard of one, with nothing wrong in this file."""
        return self.kind in (Kind.SINGLE_FILE, Kind.SHARD)

    @property
    def mergeable(self) -> bool:
        """Whether it is sound, or a byte part whose other parts lie beside it."""
        return self.sound or (self.kind is Kind.BYTE_PART and self.end > 0)

    @property
    def parts(self) -> list[dict[str, int]]:
        """A row for each header: where it starts, its bytes (in fact, and by itself), which shard it is."""
        rows, stops = [], [*(header.start for header in self.headers[1:]), self.end]
        for header, stop in zip(self.headers, stops, strict=False):
            number, count = shard_number(header)
            sizes = {"nbytes": stop - header.start, "expected_nbytes": header.end_offset - header.start}
            which = {"number": number, "count": count, "n_tensors": len(header.tensors)}
            rows.append({"start": header.start, **sizes, **which})
        return rows

    @property
    def evidence(self) -> dict[str, str]:
        """What the finding rests on, by name."""
        sizes = [part["nbytes"] for part in self.parts]
        whole = 1 < len(sizes) <= 6 and sum(sizes) == self.nbytes
        terms = f" = {' + '.join(f'{size:,}' for size in sizes)}" if whole else ""
        rows = {"file size": f"{self.nbytes:,} bytes{terms}"}
        for part in self.parts[:12]:
            what = "shard {number} of {count}, {n_tensors:,} tensors, {nbytes:,} bytes; it accounts for "
            rows[f"header at byte {part['start']:,}"] = f"{what}{{expected_nbytes:,}}".format(**part)
        return rows


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
    diagnosis = _by_headers(path, size)
    if not allow_holes:
        (missing, _), mark = missing_bytes(path), download_mark(path)
        seems_fine = diagnosis.kind in (Kind.SINGLE_FILE, Kind.SHARD, Kind.COMPANION, Kind.DAMAGED)
        if seems_fine and (missing or mark):
            what = f"of which {missing:,} of its {size:,} bytes were never stored and read as zeros"
            what = f"a GGUF {what if missing else f'of the right size, but {mark}'}"
            diagnosis = replace(diagnosis, kind=Kind.UNFINISHED, finding=what, next_step=RESUME)
    return (_byte_part(path) or diagnosis) if diagnosis.kind is Kind.UNFINISHED else diagnosis


def opening(path: Path) -> tuple[bytes, int]:
    """The first bytes of a file, and its size; `HeaderError`: it cannot be read, or is no regular file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise HeaderError(f"is {what}, not a model", where=path, hint="name a file")
        with path.open("rb", buffering=0) as file:
            return file.read(OPENING_BYTES), status.st_size
    except OSError as error:
        raise unreadable(path, error) from error


def download_mark(path: Path) -> str:
    """What in a file's name, or beside it, shows that its download has not ended; empty without one."""
    if path.with_name(f"{path.name}.aria2").exists():
        return f"the control file {plain(path.name)}.aria2 says that aria2 has not finished it"
    suffix = DOWNLOADING.search(path.name)
    return f"its name ends in {suffix[0]}, as that of a download that has not ended" if suffix else ""


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
    text = first.decode("utf-8-sig", "ignore" if len(first) == OPENING_BYTES else "replace").strip()
    if "\ufffd" not in text and all(char.isprintable() or char.isspace() for char in text):
        title = re.search(r"<title[^>]*>(.*?)</title", text, re.I | re.S)
        words = " ".join(re.sub(r"<[^>]*>", " ", title[1] if title else text).split())[:200] or text[:80]
        step = "a server sent this in place of the model: check the address, and that you may download it"
        return Kind.DOCUMENT, f"a text or web page saved as a model: {words}", step
    step = "get the GGUF of the model, or convert it with llama.cpp's convert_hf_to_gguf.py"
    known = (f"{what}, not a GGUF" for magic, what in FORMATS.items() if re.match(magic, first, re.DOTALL))
    return Kind.OTHER_FORMAT, next(known, f"not a GGUF: it begins with {first[:8]!r}"), step


def byte_parts(path: str | Path) -> tuple[Path, ...]:
    """All parts of the file that ``path`` is a byte part of, in order; empty when it is none.

    Such parts are cuts of one file, not GGUF shards, and *are* to be concatenated as they are. A GGUF header
    in a later part shows shards under other names. `ShardError`: a part is missing, or of a wrong size.
    """
    path = Path(path)
    if (name := PART_NAME.fullmatch(path.name)) is None:
        return ()
    family, numbered = (name["whole"], name["tail"], name["index"].isdigit()), {}
    for other in path.parent.iterdir():
        match = PART_NAME.fullmatch(other.name)
        if match and (match["whole"], match["tail"], match["index"].isdigit()) == family and other.is_file():
            index = match["index"].lstrip("0")
            numbered[len(index), index] = other
    parts = tuple(numbered[index] for index in sorted(numbered))
    begins = [opening(part)[0].startswith(MAGIC) for part in parts]
    if any(begins[1:]) or (not begins[0] and re.fullmatch("0*1?|a+", name["index"], re.I)):
        return ()
    here = ", ".join(part.name for part in parts[:10]) + " ..." * (len(parts) > 10)
    what, hint = "", "keep all parts of one file there, and no others; compare their sizes with the source"
    if name["count"] and len(parts) != int(name["count"]):
        what = f"{len(parts)} byte parts of {name['whole']}, and their names say {int(name['count'])}"
    elif not begins[0]:
        what = f"the first byte part of {name['whole']} is missing or damaged"
    else:
        total = sum(part.stat().st_size for part in parts)
        try:
            header = read_header(parts[0])
        except HeaderError as error:
            if error.hint == CUT_OFF and len(parts) > 1 and parts[0].stat().st_size:
                return parts  # the header goes on in the second part
            raise
        surplus = total - header.end_offset
        if total not in (header.data_end, header.end_offset):
            how = f"{surplus:,} more than" if surplus > 0 else f"{-surplus:,} less than"
            what = f"the {len(parts)} byte parts hold {total:,} bytes, {how} their header accounts for"
    if what:
        raise ShardError(f"{what}: {here}", where=path.parent, hint=hint)
    return parts


def _byte_part(path: Path) -> Diagnosis | None:
    """The diagnosis of a byte part, or None."""
    name = PART_NAME.fullmatch(path.name)
    if not name:
        return None
    what, first, total, missing = f"a byte part of {plain(name['whole'])}", path, 0, ""
    try:
        if not (files := byte_parts(path)):
            return None
        first, total = files[0], sum(file.stat().st_size for file in files)
        finding = f"{what}; all {len(files)} are here, together {total:,} bytes"
    except DfqsError as error:
        finding, missing = f"{what}: {error.what}", f"{error.hint.replace('FILE', quoted(path))}; then "
    step = f"{missing}join them: dfqs-nb merge {quoted(first)} -o {quoted(path.with_name(name['whole']))}"
    return Diagnosis(path, Kind.BYTE_PART, finding, step, path.stat().st_size, end=total)


def shard_number(header: GGUFHeader) -> tuple[int, int]:
    """Shard number (from 1) and count by the header; 1 of 1 for a single file, or without numbers."""
    number, count = header.get("split.no", 0), header.get("split.count", 0)
    if type(number) is not int or type(count) is not int or count <= 1:
        return 1, 1
    return number + 1, count


def _by_headers(path: Path, size: int) -> Diagnosis:
    """Follow the headers: where one's data end, with or without padding, the next one's magic may stand."""
    headers: list[GGUFHeader] = []
    start: int | None = 0
    error: HeaderError | None = None
    with path.open("rb", buffering=0) as file:
        while start is not None and len(headers) < MAX_PARTS and error is None:
            try:
                headers.append(read_header(path, start, file=file))
                start = headers[-1].next_start(file)
            except HeaderError as refused:
                error = refused
    if not headers and error:
        kind = REFUSED.get(error.hint, Kind.DAMAGED)
        what = "a GGUF that llama.cpp does not read"
        what = f"cut off inside its header, after {size:,} bytes" if kind is Kind.UNFINISHED else what
        step = PART if error.hint == CUT_OFF else error.hint
        return Diagnosis(path, kind, f"{what}: {error.what}", step, size)
    last = headers[-1]
    end = start or (last.end_offset if size >= last.end_offset else last.data_end)
    inside = Diagnosis(path, Kind.SINGLE_FILE, "", "", size, tuple(headers), start or size)
    problem = f"the header at byte {end:,} cannot be read: {error.what}" if error else ""
    if len(headers) > 1 and any(shard_number(header)[1] > 1 for header in headers):
        finding = _several(inside, problem or _problem(headers, size - end))
    else:
        sound: Finding = (Kind.SINGLE_FILE, f"a sound model in a single file of {size:,} bytes", "")
        end = headers[1].start if len(headers) > 1 else end  # another whole model follows
        finding = _layout(inside, end, problem) or _role(last) or _shard(path, last) or sound
    return replace(inside, kind=finding[0], finding=finding[1], next_step=finding[2])


def _layout(inside: Diagnosis, end: int, problem: str) -> Finding | None:
    """What is wrong with where the tensors lie, or where the file ends."""
    header, size = inside.headers[0], inside.nbytes
    number, count = shard_number(header)
    what = f"shard {number} of {count}" if count > 1 else "a model in a single file"
    if size < header.data_end:
        cut = next(t for t in header.tensors if header.data_offset + t.offset + t.nbytes > size)
        finding = f"cut off: {header.end_offset - size:,} bytes short, from tensor {cut.name!r} on"
        return (
            Kind.UNFINISHED,
            finding,
            f"resume the download, or repeat it ({header.end_offset:,} bytes in all)",
        )
    try:
        check_layout(header)
    except LayoutError as error:
        return Kind.DAMAGED, f"{what}, but {error.what}", error.hint
    for key in ("split.no", "split.count"):
        if key in header and type(header[key]) is not int:
            return Kind.DAMAGED, f"its key {key} is not a number, as llama.cpp needs it", AGAIN
    if problem:
        return Kind.DAMAGED, f"{what}, and another GGUF follows: {problem}", AGAIN
    if size > end:
        step = f"keep the first {end:,} bytes: `truncate -s {end} {quoted(inside.path)}`"
        step = f"other shards may follow in a damaged form: {AGAIN}" if count > 1 else step
        return Kind.TRAILING_BYTES, f"{what}, and {size - end:,} bytes after its end", step
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
    return Kind.SHARD, f"{what}; all {count} are here", f"dfqs-nb merge {quoted(path)} -o {quoted(merged)}"


def _several(inside: Diagnosis, problem: str) -> Finding:
    """What a file with the headers of several shards is."""
    order = [shard_number(header)[0] for header in inside.headers]
    if problem:
        finding = f"shards glued together byte for byte, and not all of them sound: {problem}"
        return Kind.DAMAGED, finding, "get the shards from their source again"
    how = "" if order == sorted(order) else f" in the order {', '.join(map(str, order))}"
    finding = f"{len(order)} shards glued together byte for byte{how}, which is no merge: no runtime loads it"
    return Kind.RAW_CONCATENATION, finding, f"dfqs-nb repair {quoted(inside.path)} --in-place"


def _problem(headers: Sequence[GGUFHeader], surplus: int) -> str:
    """Why the headers in a file are not all the shards of one model; empty when they are."""
    if surplus > 0:
        return f"{surplus:,} bytes follow that belong to no shard"
    try:
        for header in headers:
            check_layout(header)
        check_set(headers, glued=True)
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
