"""A merge or repair in a process of its own that kills, or stops, itself at a chosen point.

``python tests/killable.py '{"action": "consume", "model": ..., "output": ..., "at": 17}'``

Every call that touches a disk counts three ticks: before it, half-way (where it writes: half of the bytes are
then written), and after it. At tick ``at`` the process sends itself ``signal``. It prints ``ready`` when it
starts, and at the end the number of ticks.
"""

import json
import os
import signal
import sys
from pathlib import Path

from dfqs_nb.merge import copy as transfer
from dfqs_nb.merge import holes, merge, repair

SMALL = {"CHUNK_BYTES": 1 << 16, "WINDOW_BYTES": 1 << 18, "CONSUME_WINDOW_BYTES": 1 << 17}
PLAIN = [
    (os, "preadv"),
    (os, "fdatasync"),
    (os, "fsync"),
    (os, "utime"),
    (os, "replace"),
    (os, "posix_fadvise"),
    (holes, "punch"),
    (Path, "unlink"),
    (Path, "touch"),
]
ACTIONS = {
    "merge": lambda model, output: merge.merge(model, output, progress=False),
    "consume": lambda model, output: merge.merge(model, output, consume=True, progress=False),
    "join": lambda model, output: repair.merge_any(model, output, consume=True, progress=False),
    "repair": lambda model, output: repair.repair(model, in_place=True, progress=False),
}


class Ticks:
    def __init__(self, at, number):
        self.at, self.number, self.count = at, number, 0

    def __call__(self):
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)


def install(tick):
    """Wrap what touches a disk."""
    for owner, name in PLAIN:
        setattr(owner, name, _around(getattr(owner, name), tick))
    pwrite, append = os.pwrite, transfer.Journal.append

    def torn_pwrite(handle, data, offset):
        tick()
        half = len(data) // 2
        done = pwrite(handle, data[:half], offset) if half else 0
        tick()
        done += pwrite(handle, data[done:], offset + done)
        tick()
        return done

    def torn_append(self, durable=False, **event):
        line, at = transfer._line(event), self.file.tell()
        tick()
        self.file.write(line[: len(line) // 2])
        tick()
        self.file.seek(at)
        append(self, durable, **event)
        tick()

    os.pwrite, transfer.Journal.append = torn_pwrite, torn_append


def _around(real, tick):
    def wrapped(*arguments, **options):
        tick()
        result = real(*arguments, **options)
        tick()
        return result

    return wrapped


def main(job):
    for name, value in SMALL.items():
        setattr(transfer, name, value)
    tick = Ticks(job.get("at", 0), job.get("signal", signal.SIGKILL))
    install(tick)
    print("ready", flush=True)
    ACTIONS[job["action"]](job["model"], job["output"])
    print(tick.count, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
