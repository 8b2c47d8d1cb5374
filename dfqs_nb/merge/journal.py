"""The journal of a consuming copy: what is proven, and whose bytes were given back.

One JSON line an event: the plan and its sources; ``end`` and ``xxh3`` (XXH3-64) of each window that is on the
disk and proven; ``released``, when its source bytes were given back. A torn last line counts as never
written. `core.journal` is for rows in any order whose loss costs time. Here a line must be on the disk before
bytes go.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dfqs_nb.core.errors import IntegrityError
from dfqs_nb.core.files import parse_json
from dfqs_nb.merge import disk

if TYPE_CHECKING:
    from dfqs_nb.merge.copy import Source
    from dfqs_nb.merge.plan import Plan

MAX_WINDOW_BYTES = 256 << 20
TORN_SECONDS = (
    60  # how long after the journal's last line a punched hole may still have changed a file's time
)
Event = dict[str, Any]


class Journal:
    """The journal of one plan, open.

    Raises:
        IntegrityError: the file is the journal of another plan that is unfinished.

    Attributes:
        window: bytes of a window; an earlier run's where there was one.
    """

    def __init__(self, file: IO[bytes], plan: Plan, window: int) -> None:
        self.file, self.path, self.plan = file, Path(file.name), plan
        self.written_ns = os.fstat(file.fileno()).st_mtime_ns
        self.lines, self.nbytes = _events(file.read())
        self.window = window
        if not self.windows:
            self.lines, self.nbytes = [], 0
            return
        head = self.lines[0]
        earlier = head.get("window")
        if not isinstance(earlier, int) or head.get("plan") != plan.fingerprint:
            raise in_the_way(self.path)
        if not 0 < earlier <= MAX_WINDOW_BYTES or earlier % mmap.PAGESIZE:
            raise in_the_way(self.path)
        self.window = earlier

    @property
    def windows(self) -> dict[int, str]:
        """The hash of each window done so far, by its end."""
        return windows(self.lines)

    @property
    def released(self) -> int:
        """Up to where in the target the source bytes were given back."""
        return max((line["released"] for line in self.lines if type(line.get("released")) is int), default=0)

    def begin(self, sources: Sequence[Source]) -> None:
        """Write the first line, or go on where an earlier run ended.

        Raises:
            IntegrityError: a source changed since.
        """
        if self.lines:
            self._check(sources)
        self.file.truncate(self.nbytes)
        self.file.seek(self.nbytes)
        if not self.lines:
            head = {"plan": self.plan.fingerprint, "window": self.window}
            self.add({**head, "sources": list(self.plan.identities)}, durable=True)

    def _check(self, sources: Sequence[Source]) -> None:
        """Check that the sources are those of the first line.

        Releasing bytes changes a file's time, which is set back at once. A kill between the two shows as a
        window without its ``released`` line: then a time soon after that line is the release's own.
        """
        recorded = self.lines[0].get("sources")
        if not isinstance(recorded, list) or len(recorded) != len(sources):
            raise in_the_way(self.path)
        latest = self.written_ns + TORN_SECONDS * 10**9
        for source, then in zip(sources, recorded, strict=True):
            mtime = then.get("mtime_ns") if isinstance(then, dict) else None
            if "end" in self.lines[-1] and type(mtime) is int and mtime < source.mtime_ns <= latest:
                source.set_time(mtime)
            if source.identity != then:
                raise changed(source.path)

    def add(self, event: Event, *, durable: bool = False) -> None:
        """Append a line; ``durable``: and wait until it is on the disk."""
        rest = line_of(event)
        while rest:  # a disk that is almost full may take a part of a line
            rest = rest[self.file.write(rest) :]
        self.lines.append(event)
        if durable:
            os.fsync(self.file.fileno())


def read_journal(output: Path) -> list[Event]:
    """The events recorded for ``output``; empty without a journal.

    Raises:
        OutputError: what has the journal's name is no plain file.
    """
    try:
        with disk.open_own(disk.journal_path(output), create=False) as file:
            return _events(file.read())[0]
    except FileNotFoundError:
        return []


def windows(lines: Sequence[Event]) -> dict[int, str]:
    """The hash of each window that a journal's events record, by the window's end."""
    done = [line for line in lines[1:] if type(line.get("end")) is int and type(line.get("xxh3")) is str]
    return {line["end"]: line["xxh3"] for line in done}


def _events(raw: bytes) -> tuple[list[Event], int]:
    """The events up to the first line that is none, and where they end."""
    events: list[Event] = []
    end = 0
    for line in raw.split(b"\n")[:-1]:
        try:
            event = parse_json(line)
        except ValueError:
            break
        if not isinstance(event, dict):
            break
        events.append(event)
        end += len(line) + 1
    return events, end


def line_of(event: Event) -> bytes:
    """An event as it is written."""
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def in_the_way(journal: Path) -> IntegrityError:
    """The error for a copy that would overwrite an unfinished one that consumes its sources."""
    return IntegrityError(
        "an unfinished merge that consumes its sources is in the way",
        where=journal,
        hint="finish it with the same command first: its part file holds what the sources no longer have. "
        "Remove both only if all sources are whole",
    )


def changed(path: Path) -> IntegrityError:
    """The error for a source that is not as it was."""
    hint = "put the file back as it was and run the same command again"
    return IntegrityError("changed since its merge began", where=path, hint=hint)
