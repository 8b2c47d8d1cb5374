"""A merge or repair in a process of its own that kills, or stops, itself at a chosen point.

``python tests/support/killable.py '{"action": "consume", "model": ..., "output": ..., "at": 17}'``

Every call that touches a disk counts three ticks: before it, half-way (where it writes: half of the bytes are
then written), and after it. At tick ``at`` the process sends itself ``signal``. It prints ``ready`` when it
starts, and at the end the number of ticks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfqs_nb import merge
from dfqs_nb.merge import copy, disk

SMALL_WINDOW_BYTES = 1 << 17  # the reference model in 44 windows
PLAIN: list[tuple[Any, str]] = [
    (os, "preadv"),
    (os, "fdatasync"),
    (os, "fsync"),
    (os, "utime"),
    (os, "replace"),
    (os, "unlink"),
    (os, "ftruncate"),
    (os, "posix_fadvise"),
    (disk, "punch"),
    (disk, "rename_new"),
    (Path, "unlink"),
]
ACTIONS: dict[str, Callable[[str | Path, str | Path], Any]] = {
    "merge": lambda model, output: merge.merge_model(model, output),
    "consume": lambda model, output: merge.merge_model(model, output, consume=True),
    "repair": lambda model, output: merge.repair(model, in_place=True),
}


class Ticks:
    def __init__(self, at: int, number: int) -> None:
        self.at, self.number, self.count = at, number, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)


def install(tick: Ticks) -> None:
    """Wrap what touches a disk."""
    for owner, name in PLAIN:
        setattr(owner, name, _around(getattr(owner, name), tick))
    pwrite, append = os.pwrite, copy.Journal.add

    def torn_pwrite(handle: int, data: memoryview, offset: int) -> int:
        tick()
        half = len(data) // 8192 * 4096  # whole blocks: direct writes need them
        done = pwrite(handle, data[:half], offset) if half else 0
        tick()
        done += pwrite(handle, data[done:], offset + done)
        tick()
        return done

    def torn_add(self: copy.Journal, event: dict[str, Any], *, durable: bool = False) -> None:
        line, at = json.dumps(event).encode(), self.file.tell()
        tick()
        self.file.write(line[: len(line) // 2])
        tick()
        self.file.seek(at)
        append(self, event, durable=durable)
        tick()

    os.pwrite, copy.Journal.add = torn_pwrite, torn_add  # type: ignore[assignment, method-assign]


def _around(real: Callable[..., Any], tick: Ticks) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        tick()
        result = real(*arguments, **options)
        tick()
        return result

    return wrapped


def main(job: dict[str, Any]) -> None:
    copy.WINDOW_BYTES = SMALL_WINDOW_BYTES
    tick = Ticks(job.get("at", 0), job.get("signal", signal.SIGKILL))
    install(tick)
    print("ready", flush=True)
    ACTIONS[job["action"]](job["model"], job["output"])
    print(tick.count, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
