"""Files that were cut by bytes: ``model.gguf.part1of2``, ``model.gguf-split-a``, ``model.gguf.001``.

Such parts are cuts of one file, not GGUF shards, and *are* to be concatenated as they are.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import HeaderError, ShardError
from dfqs_nb.gguf.header import CUT_OFF, MAGIC, ends, read_header, unreadable

OPENING_BYTES = 4096
COUNT, MARK = r"(?:[._-]?of[._-]?(?P<count>\d{1,5}))?", r"(?P<mark>(?:part|split)[._-]?)"
INDEX = r"(?P<index>\d{1,5}|[a-z]{1,3})"
NAMES = (
    re.compile(rf"(?P<head>(?P<whole>.+\.gguf)[._-]{MARK}?){INDEX}(?P<tail>{COUNT})", re.I),
    re.compile(rf"(?P<head>(?P<whole>.+)[._-]{MARK})(?P<index>\d{{1,5}})(?P<tail>{COUNT}\.gguf)", re.I),
)


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


def part_name(name: str) -> re.Match[str] | None:
    """A byte part's name taken apart; None when it is not one.

    >>> part_name("m.gguf.part2of3")["index"], part_name("m.gguf-split-b")["index"], part_name("m.gguf")
    ('2', 'b', None)
    """
    return NAMES[0].fullmatch(name) or NAMES[1].fullmatch(name)


def whole_name(name: re.Match[str]) -> str:
    """The name of the file that was cut."""
    return name["whole"] if name["whole"].lower().endswith(".gguf") else f"{name['whole']}.gguf"


def siblings(path: Path, name: re.Match[str]) -> tuple[Path, ...]:
    """The byte parts of the same file in the folder, in order."""

    def family(match: re.Match[str]) -> tuple[object, ...]:
        text = match["index"]
        return match["head"], match["tail"], "digits" if text.isdigit() else len(text)

    names = [(other, match) for other in path.parent.iterdir() if (match := part_name(other.name))]
    parts = [(match["index"].lstrip("0"), other) for other, match in names if family(match) == family(name)]
    return tuple(part for index, part in sorted(parts, key=lambda it: (len(it[0]), it)) if part.is_file())


def byte_parts(path: str | Path) -> tuple[Path, ...]:
    """All parts of the file that ``path`` is a part of, in order, found by name and checked by content.

    `ShardError`: the name is not a part's, or a part is missing, a shard, or of a wrong size. `HeaderError`:
    the first part cannot be read, or is not a GGUF.
    """
    path = Path(path)
    name = part_name(path.name)
    if name is None:
        hint = "byte parts are named like model.gguf.part1of2 or model.gguf-split-a"
        raise ShardError("is not named as a byte part", where=path, hint=hint)
    parts = siblings(path, name)
    whole, here = whole_name(name), ", ".join(part.name for part in parts[:10]) + " ..." * (len(parts) > 10)
    if name["count"] and len(parts) != int(name["count"]):
        what = f"{len(parts)} byte parts of {whole}, and their names say {int(name['count'])}: {here}"
        raise ShardError(what, where=path.parent, hint="keep all parts of one file there, and no others")
    if not opening(parts[0])[0].startswith(MAGIC):
        what = f"the first byte part of {whole} is missing or damaged; there are {here}"
        raise ShardError(what, where=path.parent, hint="download it into that folder")
    for part in parts[1:]:
        if opening(part)[0].startswith(MAGIC):
            hint = f"`dfqs-nb inspect {quoted(part)}` shows the name that it needs"
            raise ShardError("begins with a GGUF header of its own, so it is a shard", where=part, hint=hint)
    total = sum(part.stat().st_size for part in parts)
    try:
        least, most = ends(read_header(parts[0]))
    except HeaderError as error:
        if error.hint == CUT_OFF and len(parts) > 1 and parts[0].stat().st_size:
            return parts  # the header goes on in the second part
        raise
    if total not in (least, most):
        what, hint = f"{most - total:,} less than their header needs", "one is missing or cut off"
        if total > most:
            what, hint = f"{total - most:,} more than their header accounts for", "one is not of this file"
        what = f"the {len(parts)} byte parts hold {total:,} bytes, {what} ({most:,}): {here}"
        raise ShardError(what, where=parts[0].parent, hint=f"compare their sizes with the source: {hint}")
    return parts


def are_parts(name: re.Match[str], parts: tuple[Path, ...]) -> bool:
    """Whether the content of files agrees with their names: a GGUF header in the first only."""
    has_header = [opening(part)[0].startswith(MAGIC) for part in parts]
    if any(has_header[1:]):
        return False  # shards, or copies, under other names
    if not name["mark"] and not (len(parts) > 1 and has_header[0]):
        return False  # model.gguf.1 or model.gguf.bak alone is no part
    return has_header[0] or not re.fullmatch("0*1?|a+", name["index"], re.I)
