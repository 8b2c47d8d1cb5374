"""How fast this machine reads: from memory with all cores, and from the disk under a file."""

from __future__ import annotations

import ctypes
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from dfqs_nb.core.machine import usable_cores

MEMORY_BYTES = 256 << 20  # that each thread reads: more than the processor's caches hold
PIECE_BYTES = 2 << 20  # read at once
DISK_SECONDS = 1.0  # that a measurement of the disk takes
MIN_PIECES = 64  # that a file must hold
SMALL_READ_AHEAD = 128 << 10
WINDOW_BYTES = 128 << 10  # what one advice reads at least


def memory_bandwidth(n_threads: int = 0) -> float:
    """Bytes a second that threads (by default one a core) read from memory together; the best of 3 tries.

    Each thread searches its own buffer for a byte that is not there, by the C library's ``memchr``, which
    reads as fast as the processor can and lets Python's other threads run.
    """
    search = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).memchr
    search.argtypes, search.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    n_threads, seconds = n_threads or usable_cores(), []
    buffers = [bytearray(MEMORY_BYTES) for _ in range(n_threads)]
    for buffer in buffers:
        buffer[::4096] = b"\2" * (MEMORY_BYTES // 4096)  # so that each page is memory and not a promise
    places = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in buffers]
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(3):
            started = time.perf_counter()
            list(pool.map(lambda place: search(place, 1, MEMORY_BYTES), places))
            seconds.append(time.perf_counter() - started)
    return n_threads * MEMORY_BYTES / min(seconds)


def disk_bandwidth(path: str | Path, piece_bytes: int = PIECE_BYTES, at_once: int = 1) -> float | None:
    """Bytes a second of pieces from random places of a file, as experts lie all over it.

    ``at_once``: pieces that are asked for together, as the paging help does. None if the file holds under 64
    pieces, or the kernel did not count the pieces as read from the disk.
    """
    counters = getattr(psutil.Process(), "io_counters", None)
    n_pieces = Path(path).stat().st_size // piece_bytes
    if counters is None or not hasattr(os, "posix_fadvise") or n_pieces < MIN_PIECES:
        return None
    draw, total, before = random.Random(0), 0, counters().read_bytes
    with Path(path).open("rb", buffering=0) as file:
        handle, window, began = file.fileno(), window_bytes(file.fileno()), time.perf_counter()
        while time.perf_counter() - began < DISK_SECONDS:
            places = [at * piece_bytes for at in draw.sample(range(n_pieces), at_once)]
            for at in places:  # whole pieces: the kernel drops no part of a large page
                os.posix_fadvise(handle, at, piece_bytes, os.POSIX_FADV_DONTNEED)
            for at in places if at_once > 1 else ():
                advise_read(handle, at, at + piece_bytes, window)
            total += sum(len(os.pread(handle, piece_bytes, at)) for at in places)
            if counters().read_bytes == before:
                return None  # the cache cannot be emptied here
        took, from_disk = time.perf_counter() - began, counters().read_bytes - before
    return total / took if from_disk >= 0.9 * total else None


@dataclass(frozen=True)
class Disk:
    """The disk under a file; a speed is None where the cache could not be kept out."""

    device: str  # its name in /dev; empty where there is none (a network file system)
    read_ahead_bytes: int | None  # that the kernel adds to a miss; None: not known
    pieces: float | None  # bytes a second, in pieces of an expert's size from random places

    @classmethod
    def under(cls, path: str | Path, piece_bytes: int) -> Disk:
        """Look, and measure for about a second."""
        with Path(path).open("rb") as file:
            folder = block_folder(file.fileno())
        read_ahead = int((folder / "queue/read_ahead_kb").read_text()) << 10 if folder else None
        speed = disk_bandwidth(path, piece_bytes, MIN_PIECES)
        return cls(folder.name if folder else "", read_ahead, speed)

    @property
    def command(self) -> str:
        """What lowers the read-ahead, as root."""
        place = self.device.replace("!", "/")  # as in cciss!c0d0
        return f"blockdev --setra {SMALL_READ_AHEAD >> 9} /dev/{place}" if place else ""


def block_folder(file: int) -> Path | None:
    """What Linux tells of the disk under an open file; None where there is none, as on a network."""
    if not hasattr(os, "major"):
        return None
    device = os.fstat(file).st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    return next((at for at in (folder, folder.parent) if (at / "queue/read_ahead_kb").exists()), None)


def window_bytes(file: int) -> int:
    """The most that one advice makes the kernel read: the read-ahead, or the device's largest request."""
    folder = block_folder(file)
    names = ("read_ahead_kb", "max_sectors_kb") if folder else ()
    known = [int((folder / "queue" / name).read_text()) << 10 for name in names if folder]
    return min(max(known, default=0) or WINDOW_BYTES, 1 << 20)


def advise_read(file: int, start: int, end: int, window: int) -> None:
    """Have the kernel read these bytes; it returns when they are under way, not when they are there."""
    for at in range(start, end, window):
        os.posix_fadvise(file, at, min(window, end - at), os.POSIX_FADV_WILLNEED)
