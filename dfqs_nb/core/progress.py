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
    """What the child processes do: bytes read from the disk, memory, cores; ``own``: this process, too."""

    def __init__(self, *, own: bool = False) -> None:
        self.own = own
        self.seen: dict[int, tuple[int, float]] = {}
        self.total, self.at = 0, time.monotonic()

    def text(self) -> str:
        """The work since the last call, and all bytes read."""
        reads, seconds, resident = 0, 0.0, 0
        this = psutil.Process()
        for process in [*([this] if self.own else []), *this.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                read = process.io_counters().read_bytes if hasattr(process, "io_counters") else 0
                times = process.cpu_times()
                used = times.user + times.system
                before = self.seen.get(process.pid, (read, used))
                self.seen[process.pid] = read, used
                reads += max(0, read - before[0])
                seconds += max(0.0, used - before[1])
                resident += process.memory_info().rss
        now = time.monotonic()
        elapsed, self.at = max(now - self.at, 1e-3), now
        self.total += reads
        disk = f"{size(self.total)} read from the disk, {size(reads / elapsed)}/s, " if self.total else ""
        return f"{disk}{size(resident)} in memory, {seconds / elapsed:.1f} cores"


@contextmanager
def heartbeat(what: str, n_bytes: int) -> Iterator[None]:
    """A bar for the bytes that this process and its children read while a file of over 1 GiB is loaded."""
    if n_bytes < LARGE_BYTES:
        yield
        return
    bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc=what, leave=False)
    done, activity = threading.Event(), Activity(own=True)

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
        bar.close()
