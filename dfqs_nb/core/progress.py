"""Signs of life of long work: what the processes do, and a bar while a large file is loaded."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from dfqs_nb.core.display import size, tqdm

LARGE_BYTES = 1 << 30
BEAT_SECONDS = 1.0


class Activity:
    """What this process (with ``own``) and its children do: bytes read from the disk, memory, cores."""

    def __init__(self, *, own: bool = False) -> None:
        self.own, self.seen, self.total, self.at = own, dict[int, tuple[int, float]](), 0, time.monotonic()

    def text(self) -> str:
        """The work since the last call, and all bytes read; of a process that just began, its memory."""
        this, before, reads, seconds, resident = psutil.Process(), self.seen, 0, 0.0, 0
        self.seen = {}
        for process in [this] * self.own + this.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                read = process.io_counters().read_bytes if hasattr(process, "io_counters") else 0
                used = sum(process.cpu_times()[:2])
                self.seen[process.pid] = read, used
                then = before.get(process.pid, (read, used))
                reads, seconds = reads + read - then[0], seconds + used - then[1]
                resident += process.memory_info().rss
        now, self.total = time.monotonic(), self.total + reads
        elapsed, self.at = max(now - self.at, 1e-3), now
        facts = [f"{size(self.total)} read from the disk, {size(reads / elapsed)}/s"] if self.total else []
        facts += [f"{size(resident)} in memory"]
        facts += [f"{seconds / elapsed:.1f} cores"] if self.seen.keys() & before.keys() else []
        return ", ".join(facts)


@contextmanager
def heartbeat(what: str, n_bytes: int) -> Iterator[None]:
    """A bar for the bytes that this process and its children read while a file of over 1 GiB is loaded."""
    if n_bytes < LARGE_BYTES:
        yield
        return
    done, activity = threading.Event(), Activity(own=True)
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc=what, leave=False) as bar:

        def watch() -> None:
            while not done.wait(BEAT_SECONDS):
                bar.set_postfix_str(activity.text(), refresh=False)
                bar.n = min(activity.total, n_bytes)
                bar.refresh()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
