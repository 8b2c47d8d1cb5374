"""A guard against work that never ends. It says nothing about speed: the limit is far above what a busy machine needs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def no_hang(seconds: float = 60) -> Iterator[None]:
    """Fail the block of code that still runs after ``seconds``; for the main thread of Linux and macOS."""

    def fail(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"it still runs after {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
