"""Files that were cut by bytes: ``model.gguf.part1of2``, ``model.gguf-split-a``, ``model.gguf.001``.

Such parts are cuts of one file, not GGUF shards, and *are* to be concatenated as they are.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import HeaderError, ShardError
from dfqs_nb.gguf.header import CUT_OFF, MAGIC, ends, read_header, unreadable

OPENING_BYTES = 4096
COUNT = r"(?:[._-]?of[._-]?(?P<count>\d{1,5}))?"
NAMES = (
    re.compile(
        r"(?P<head>(?P<whole>.+\.gguf)[._-](?P<mark>(?:part|split)[._-]?)?)(?P<index>\d{1,5}|[a-z]{1,3})"
        rf"(?P<tail>{COUNT})",
        re.I,
    ),
    re.compile(
        r"(?P<head>(?P<whole>.+)[._-](?P<mark>(?:part|split)[._-]?))(?P<index>\d{1,5})"
        rf"(?P<tail>{COUNT}\.gguf)",
        re.I,
    ),
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


@dataclass(frozen=True)
class PartName:
    """A byte part's name taken apart.

    ``whole`` is the name of the file that was cut, ``family`` what its siblings share with it, ``text`` its
    place as it is written, ``index`` the same as a number, ``count`` how many there are, where the name says
    so. ``explicit``: it says "part" or "split".
    """

    whole: str
    family: tuple[str, ...]
    text: str
    index: int
    count: int | None
    explicit: bool

    def like(self, index: int) -> str:
        """A place written as this one is."""
        if self.text.isdigit():
            return str(index).zfill(len(self.text))
        letters = ""
        for _ in self.text:
            index, rest = divmod(index, 26)
            letters = ascii_lowercase[rest] + letters
        return letters


def part_name(name: str) -> PartName | None:
    """Take a byte part's name apart; None when it is not one.

    >>> part_name("m.gguf.part2of3").index, part_name("m.gguf-split-b").index, part_name("m.gguf") is None
    (2, 1, True)
    """
    match = NAMES[0].fullmatch(name) or NAMES[1].fullmatch(name)
    if match is None:
        return None
    text, tail, index = match["index"], match["tail"], 0
    for letter in text.lower():  # letters count as `split` counts them: a = 0; aa = 0, ab = 1, ba = 26
        index = index * 10 + int(letter) if letter.isdigit() else index * 26 + ascii_lowercase.index(letter)
    family = (match["head"], tail, "digits" if text.isdigit() else f"{len(text)} letters")
    whole = match["whole"] + (tail[-5:] if tail.lower().endswith(".gguf") else "")
    count = int(match["count"]) if match["count"] else None
    return PartName(whole, family, text, index, count, bool(match["mark"]))


def siblings(path: Path, name: PartName) -> dict[int, Path]:
    """The byte parts of the same file in the folder, by their place; `ShardError`: two have one place."""
    parts: dict[int, Path] = {}
    for other in sorted(path.parent.iterdir()):
        sibling = part_name(other.name)
        if sibling and sibling.family == name.family and other.is_file():
            if sibling.index in parts:
                what = f"part {sibling.index} is there twice: {parts[sibling.index].name} and {other.name}"
                raise ShardError(what, where=path.parent, hint="keep one of them")
            parts[sibling.index] = other
    return dict(sorted(parts.items()))


def byte_parts(path: str | Path) -> tuple[Path, ...]:
    """All parts of the file that ``path`` is a part of, in order, found by name and checked by content.

    The first begins with a GGUF header, no later one does, and the sizes add up to what the header needs.

    Raises:
        ShardError: the name is not a part's, or a part is missing, doubled, or of a wrong size; says which.
        HeaderError: the first part cannot be read, or is not a GGUF.
    """
    path = Path(path)
    name = part_name(path.name)
    if name is None:
        hint = "byte parts are named like model.gguf.part1of2 or model.gguf-split-a"
        raise ShardError("is not named as a byte part", where=path, hint=hint)
    parts = siblings(path, name)
    start = min(next(iter(parts)), 1) if name.text.isdigit() else 0
    n_parts = name.count if name.count is not None else max(parts) + 1 - start
    missing = [name.like(index) for index in range(start, start + n_parts) if index not in parts]
    if missing:
        what = f"{len(missing)} of {n_parts} byte parts of {name.whole} missing: {', '.join(missing[:10])}"
        raise ShardError(what, where=path.parent, hint="download what is missing into that folder")
    if len(parts) > n_parts:
        what = f"{len(parts)} byte parts, and their names say {n_parts}"
        raise ShardError(what, where=path.parent, hint="keep the parts of one file only")
    for index, part in list(parts.items())[1:]:
        if opening(part)[0].startswith(MAGIC):
            what = f"part {name.like(index)} begins with a GGUF header of its own, so it is a shard"
            hint = f"`dfqs-nb inspect {quoted(part)}` shows the name that it needs"
            raise ShardError(what, where=part, hint=hint)
    check_sum(tuple(parts.values()))
    return tuple(parts.values())


def check_sum(parts: Sequence[Path]) -> bool:
    """Check that the sizes add up to what the header needs; False when it goes on in the second part.

    Raises:
        ShardError: they do not.
        HeaderError: the first part cannot be read, or is not a GGUF.
    """
    total = sum(part.stat().st_size for part in parts)
    try:
        least, most = ends(read_header(parts[0]))
    except HeaderError as error:
        if error.hint == CUT_OFF and len(parts) > 1 and parts[0].stat().st_size:
            return False
        raise
    if total in (least, most):
        return True
    what, hint = f"{most - total:,} less than their header needs", "one is missing or cut off"
    if total > most:
        what, hint = f"{total - most:,} more than their header accounts for", "one is not of this file"
    what = f"the {len(parts)} byte parts hold {total:,} bytes, {what} ({most:,})"
    raise ShardError(what, where=parts[0].parent, hint=f"compare their sizes with the source: {hint}")


def are_parts(name: PartName, parts: dict[int, Path]) -> bool:
    """Whether the content of files agrees with their names: a GGUF header in the first only."""
    with_header = [index for index, part in parts.items() if opening(part)[0].startswith(MAGIC)]
    if with_header not in ([], [next(iter(parts))]):
        return False  # a later one has its own: shards, or copies, under other names
    if not name.explicit and (len(parts) < 2 or not with_header):
        return False  # model.gguf.1 or model.gguf.bak alone is no part
    could_be_first = name.index == 0 or (name.index == 1 and name.text.isdigit())
    return bool(with_header) or not could_be_first
