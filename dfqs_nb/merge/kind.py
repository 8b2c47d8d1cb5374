"""What a file that should be a model really is, found in milliseconds and without reading its tensors.

A runtime's error rarely explains why a model does not load: for a raw concatenation of two shards llama.cpp
prints "invalid split file name". This module looks at the first bytes, at every GGUF header inside, at sizes,
holes and neighbours. It gives one sentence on what the file is, and the next step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from dfqs_nb.core.display import plain, quoted
from dfqs_nb.core.errors import DfqsError, HeaderError, LayoutError, ShardError
from dfqs_nb.gguf import facts
from dfqs_nb.gguf import header as reader
from dfqs_nb.gguf.header import CUT_OFF, MAGIC, GGUFHeader, check_layout, headers_inside, opened
from dfqs_nb.gguf.shards import ShardSet, check_set, find_shards, open_shards
from dfqs_nb.merge.disk import missing_bytes, part_path

if TYPE_CHECKING:
    import pandas as pd

OPENING_BYTES = 4096
COMPRESSED = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh"  # gzip, zstd, xz, bzip2
MAX_PARTS = 10_000  # headers followed inside one file
AGAIN = "get it from its source again"
RESUME = "resume the download; if holes are meant, fill them with `cp --sparse=never`"
DOWNLOADING = re.compile(r"\.(incomplete|crdownload|part|partial|download|opdownload|!qB|!ut)$")
PART_NAME = re.compile(  # of a file cut by bytes: model.gguf.part1of2, model.gguf-split-a
    r"((?P<whole>.+\.gguf)[._-](part|split)[._-]?)(\d{1,5}|[a-z]{1,3})([._-]?of[._-]?\d{1,5})?", re.I
)


class Kind(StrEnum):
    """What a file turned out to be. Kinds differ in what a user does next."""

    SINGLE_FILE = "sound single file"  # use it
    SHARD = "shard"  # merge it with the others
    RAW_CONCATENATION = "raw concatenation"  # of all shards of one model: `dfqs-nb repair`
    TRAILING_BYTES = "trailing bytes"  # cut them off
    COMPANION = "no language model"  # a LoRA adapter, a projector: use it beside one
    FOREIGN = "for another runtime"  # run it there, or quantize the original again
    UNFINISHED = "unfinished download"  # resume it
    STOPPED_MERGE = "stopped merge"  # that consumes: go on with it
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

    def shards(self) -> ShardSet:
        """The model that this file is, or holds in its glued shards, or is a shard of, as `open_shards`."""
        glued = self.kind is Kind.RAW_CONCATENATION
        return check_set(self.headers, glued=True) if glued else open_shards(self.headers[0])

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


def diagnose(path: str | Path, *, allow_holes: bool = False) -> Diagnosis:
    """Identify a file as one `Kind`: reads its headers and at most 4 KiB more, and changes nothing.

    ``allow_holes``: do not take bytes that were never stored for an unfinished download. `HeaderError`: the
    file cannot be read at all (missing, a folder, no permission).
    """
    path = Path(path)
    first, size = opening(path)
    if first.startswith(MAGIC):
        diagnosis = _by_headers(path, size)
    else:
        diagnosis = Diagnosis(path, *by_first_bytes(first, size), size)
    part = PART_NAME.fullmatch(path.name)
    seems_fine = diagnosis.kind in (Kind.SINGLE_FILE, Kind.SHARD, Kind.COMPANION, Kind.DAMAGED)
    # 1. An unfinished download can look like anything, so that is said first; 2. a piece of a cut file looks
    # unfinished, or like no model, so how to join it is said in place of that.
    if (part or seems_fine) and not allow_holes and (found := unfinished(path)):
        return replace(diagnosis, kind=found[0], finding=found[1], next_step=found[2])
    if part and diagnosis.kind in (Kind.UNFINISHED, Kind.OTHER_FORMAT):
        parts, whole = (quoted(path.with_name(name)) for name in (part[1], part["whole"]))
        # `set -C`: not over a file that is there; `sort`: a shell has 10 before 2
        join = f"`(set -C; printf '%s\\0' {parts}* | sort -zV | xargs -0 cat > {whole})`"
        step = f"if it is a part of one file, join all of its parts in the order of their numbers: {join}"
        return replace(diagnosis, next_step=step)
    return diagnosis


def opening(path: Path) -> tuple[bytes, int]:
    """The first bytes of a file, and its size; `HeaderError`: it cannot be read, or is no regular file."""
    with opened(path) as file:
        return file.read(OPENING_BYTES), file.seek(0, 2)


def unfinished(path: Path) -> Finding | None:
    """What shows that not all bytes of a file are there: holes, its name, a control file; else None."""
    if missing := missing_bytes(path):
        what = f"{missing:,} of its {path.stat().st_size:,} bytes"
        if output := _taken_by(path):
            what = f"a merge that was stopped moved {what} to {plain(part_path(output).name)}"
            step = f"merge {quoted(path)} -o {quoted(output)} --consume"
            step = f"repair {quoted(path)} --in-place" if output == path else step
            return Kind.STOPPED_MERGE, what, f"go on with it: dfqs-nb {step}"
        what += " were never stored and read as zeros"
    elif path.with_name(f"{path.name}.aria2").exists():
        what = f"the control file {plain(path.name)}.aria2 says that aria2 has not finished it"
    elif suffix := DOWNLOADING.search(path.name):
        what = f"its name ends in {suffix[0]}, as that of a download that has not ended"
    else:
        return None
    return Kind.UNFINISHED, what, RESUME


def _taken_by(path: Path) -> Path | None:
    """The output in this folder whose merge consumes this file, by its journal, which anybody can write."""
    from dfqs_nb.merge.copy import read_journal

    outputs = [path.with_name(journal.name[1:-8]) for journal in path.parent.glob(".?*.journal")]
    for output in filter(lambda output: part_path(output).exists(), outputs):
        with suppress(DfqsError, OSError, LookupError, TypeError):
            if path.name in [source["name"] for source in read_journal(output)[0]["sources"]]:
                return output
    return None


def by_first_bytes(first: bytes, size: int) -> Finding:
    """What a file is that does not begin with the magic, by its first 4 KiB."""
    if size == 0:
        return Kind.UNFINISHED, "an empty file", "download it again: nothing arrived"
    if first.startswith(b"version https://git-lfs"):
        step = "run `git lfs pull` in the clone, or download the file from its 'resolve' address"
        return Kind.LFS_POINTER, "a Git LFS pointer to the model, not the model itself", step
    if not first.strip(b"\0"):
        finding = f"zeros: the first {len(first):,} bytes of {size:,} were never written"
        return Kind.UNFINISHED, finding, "only its room was reserved: resume or repeat the download"
    if first.startswith(COMPRESSED):
        return Kind.OTHER_FORMAT, "a compressed file", "unpack it: gzip -d, zstd -d, xz -d or bzip2 -d"
    text = first.decode("utf-8-sig", "ignore" if len(first) == OPENING_BYTES else "replace").strip()
    if "\ufffd" not in text and all(char.isprintable() or char.isspace() for char in text):
        words = " ".join(re.sub(r"<[^>]*>", " ", text).split())[:200] or text[:80]
        step = "a server sent this in place of the model: check the address, and that you may download it"
        return Kind.DOCUMENT, f"a text or web page saved as a model: {words}", step
    step = "get the GGUF of the model, or convert it with llama.cpp's convert_hf_to_gguf.py"
    return Kind.OTHER_FORMAT, f"not a GGUF: it begins with {first[:8]!r}", step


def shard_number(header: GGUFHeader) -> tuple[int, int]:
    """Shard number (from 1) and count by the header; 1 of 1 for a single file, or without numbers."""
    number, count = header.get("split.no", 0), header.get("split.count", 0)
    if type(number) is not int or type(count) is not int or count <= 1:
        return 1, 1
    return number + 1, count


def _by_headers(path: Path, size: int) -> Diagnosis:
    """Follow the headers: where one's data end, with or without padding, the next one's magic may stand."""
    headers, error = list[GGUFHeader](), None
    with opened(path) as file:
        try:
            for header in islice(headers_inside(path, file), MAX_PARTS):
                headers.append(header)
        except HeaderError as refused:
            error = refused
        start = headers[-1].next_start(file) if headers else 0
    if not headers and error:
        kind, step = REFUSED.get(error.hint, Kind.DAMAGED), error.hint
        what = "a GGUF that llama.cpp does not read"
        if kind is Kind.UNFINISHED:
            what, step = f"cut off inside its header, after {size:,} bytes", RESUME
        return Diagnosis(path, kind, f"{what}: {error.what}", step, size)
    last = headers[-1]
    end = start or (last.end_offset if size >= last.end_offset else last.data_end)
    inside = Diagnosis(path, Kind.SINGLE_FILE, "", "", size, tuple(headers), start or size)
    problem = f"the header at byte {end:,} cannot be read: {error.what}" if error else ""
    if len(headers) > 1 and any(shard_number(header)[1] > 1 for header in headers):
        if size > end and not problem:
            problem = f"{size - end:,} bytes follow that belong to no shard"
        finding = _several(inside, problem)
    else:
        end = headers[1].start if len(headers) > 1 else end  # another whole model follows
        finding = _layout(inside, end, problem) or _role(inside)
    return replace(inside, kind=finding[0], finding=finding[1], next_step=finding[2])


def _several(inside: Diagnosis, problem: str) -> Finding:
    """What a file with the headers of several shards is; ``problem``: what is wrong, if that is known."""
    order = [shard_number(header)[0] for header in inside.headers]
    what = "shards glued together byte for byte"
    try:
        for header in inside.headers:
            check_layout(header)
        check_set(inside.headers, glued=True)
    except DfqsError as error:
        problem = problem or error.what
    if problem:
        finding = f"{what}, and not all of them sound: {problem}"
        return Kind.DAMAGED, finding, "get the shards from their source again"
    how = "" if order == sorted(order) else f" in the order {', '.join(map(str, order))}"
    finding = f"{len(order)} {what}{how}, which is no merge: llama.cpp refuses it"
    return Kind.RAW_CONCATENATION, finding, f"dfqs-nb repair {quoted(inside.path)} --in-place"


def _layout(inside: Diagnosis, end: int, problem: str) -> Finding | None:
    """What is wrong with where the tensors lie, or where the file ends."""
    header, size = inside.headers[0], inside.nbytes
    number, count = shard_number(header)
    what = f"shard {number} of {count}" if count > 1 else "a model in a single file"
    try:
        check_layout(header)
    except LayoutError as error:
        if error.hint == CUT_OFF:
            step = f"resume the download, or repeat it ({header.end_offset:,} bytes in all)"
            return Kind.UNFINISHED, f"cut off: {error.what}", step
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


def _role(inside: Diagnosis) -> Finding:
    """What a sound file is for; of a shard, what its set lacks."""
    path, header = inside.path, inside.headers[0]
    number, count = shard_number(header)
    if count > 1:
        what = f"shard {number} of {count}"
        try:
            shards = find_shards(header)
        except ShardError as error:
            told = f"{what}: {error.what}".replace(f": is {what} ", " ")  # it may begin so itself
            return Kind.SHARD, plain(told), plain(error.hint)
        for shard in shards:
            if not opening(shard)[0].startswith(MAGIC):
                step = f"`dfqs-nb inspect {quoted(shard)}` says what it is"
                return Kind.SHARD, f"{what}; but {plain(shard.name)} is no GGUF", step
        merged = path.with_name(f"{path.name[: path.name.rindex('-of-') - 6]}.gguf")
        step = f"dfqs-nb merge {quoted(path)} -o {quoted(merged)}"
        return Kind.SHARD, f"{what}; all {count} are here", step
    if role := facts.role(header):
        step = "give it to a runtime beside the model that it was made for"
        return Kind.COMPANION, f"{role}, not a language model", step
    what = f"header and size of a sound model in a single file of {inside.nbytes:,} bytes"
    return Kind.SINGLE_FILE, f"{what}; the weights were not read (`dfqs-nb verify FILE` reads them)", ""


def diagnosis_table(paths: Iterable[str | Path]) -> pd.DataFrame:
    """What each file is, one row a file: ``bytes``, ``kind``, ``finding``, ``next_step``, ``llama_cpp``.

    The last is the answer of llama.cpp's loader: ``loads``, or its error.
    """
    import pandas as pd

    from dfqs_nb.llama import check

    diagnoses = [diagnose(path) for path in paths]
    rows = [(plain(d.path.name), d.nbytes, str(d.kind), d.finding, d.next_step) for d in diagnoses]
    table = pd.DataFrame(rows, columns=["file", "bytes", "kind", "finding", "next_step"]).set_index("file")
    verdicts = check.verdicts([diagnosis.path for diagnosis in diagnoses])
    return table.assign(llama_cpp=[verdict.reason or "loads" for verdict in verdicts])
