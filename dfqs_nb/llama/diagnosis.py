"""What a token of a file larger than memory costs: before it is loaded, and after a few tokens.

Without help the kernel reads a window around each missing page, before and behind it. llama.cpp doubles the
device's read-ahead (``POSIX_FADV_SEQUENTIAL``), so a slice of S bytes costs about S + 2 x read-ahead.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from pathlib import Path

import numpy as np
import psutil

from dfqs_nb.core.display import size
from dfqs_nb.core.machine import available_memory, random_read_speed
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.placement import Layout
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.paging import LINUX, advise_read, block_folder, window_bytes

PIECES, SEQUENTIAL_BYTES = 64, 32 << 20
SMALL_READ_AHEAD = 128 << 10
NOT_MEASURED = "not measured"
MUCH = 1.5  # times what is needed, from which on reading is amplified


@dataclass(frozen=True)
class Disk:
    """The disk under a file; a speed is None where the cache could not be kept out."""

    device: str  # its name in /dev; empty where there is none (a network file system)
    read_ahead_bytes: int | None  # that the kernel adds to a miss; None: not known
    in_order: float | None  # bytes a second
    pieces: float | None  # the same in pieces of an expert's size from random places

    @classmethod
    def under(cls, path: str | Path, piece_bytes: int) -> Disk:
        """Look, and measure for about two seconds."""
        with Path(path).open("rb") as file:
            folder = block_folder(file.fileno())
        device = folder.name if folder else ""
        read_ahead = int((folder / "queue/read_ahead_kb").read_text()) << 10 if folder else None
        in_order = random_read_speed(path, SEQUENTIAL_BYTES)
        return cls(device, read_ahead, in_order, _pieces_speed(path, piece_bytes))

    @property
    def command(self) -> str:
        """What lowers the read-ahead, as root."""
        place = self.device.replace("!", "/")  # as in cciss!c0d0
        return f"blockdev --setra {SMALL_READ_AHEAD // 512} /dev/{place}" if place else ""


def _pieces_speed(path: str | Path, piece_bytes: int) -> float | None:
    """Bytes a second of pieces from random places, read as the paging help reads; None where unsure."""
    counters = getattr(psutil.Process(), "io_counters", None)
    room = Path(path).stat().st_size - piece_bytes
    if counters is None or not hasattr(os, "posix_fadvise") or room < PIECES * piece_bytes:
        return None
    draw = random.Random(1)
    places = [draw.randrange(room) for _ in range(PIECES)]
    with Path(path).open("rb", buffering=0) as file:
        handle = file.fileno()
        for place in places:
            os.posix_fadvise(handle, place, piece_bytes, os.POSIX_FADV_DONTNEED)
        before, began, window = counters().read_bytes, time.perf_counter(), window_bytes(handle)
        for place in places:
            advise_read(handle, place, place + piece_bytes, window)
        for place in places:
            os.pread(handle, piece_bytes, place)
        took, read = time.perf_counter() - began, counters().read_bytes - before
    return read / took if read > PIECES * piece_bytes / 2 else None


@dataclass(frozen=True)
class Diagnosis:
    """What a token of decode reads, and what it took where that was measured; bytes and seconds, on average.

    The forecast comes from the header, the free memory and the disk. It assumes that experts are chosen
    evenly, the worst case, so its bytes are upper bounds. NaN: the system does not count it.
    """

    dense: int  # that it uses
    experts: int
    slice_bytes: int  # of one expert in one tensor, on average
    cached: float  # share of all experts that memory keeps
    helped: int  # read from the disk with the paging help
    plain: int  # and without it
    disk: Disk
    help_on: bool = False  # when it was measured
    seconds: float = 0.0  # 0: not measured
    waiting: float = 0.0  # of these, without work for a processor
    read_bytes: float = nan  # from the disk
    major_faults: float = nan  # stops of a thread for the disk

    @property
    def rows(self) -> dict[str, str]:
        """All of it for people."""
        disk, ahead = self.disk, self.disk.read_ahead_bytes
        speeds = {"in order": disk.in_order, f"in pieces of {size(self.slice_bytes)}": disk.pieces}
        known = "not known" if ahead is None else size(ahead)
        rows = {
            "a token uses": f"{size(self.dense)} of dense weights, {size(self.experts)} of experts",
            "experts that stay in memory": f"{self.cached:.0%}",
        }
        for how, n in (("with help", self.helped), ("without", self.plain)):
            seconds = f", {n / disk.pieces:.2f} s of it" if n and disk.pieces else ""
            rows[f"a token reads, {how}"] = f"{size(n)}{seconds}"
        rows["the disk"] = f"{disk.device or 'no block device'}, read-ahead {known}"
        rows |= {f"its speed {how}": f"{size(n)}/s" if n else NOT_MEASURED for how, n in speeds.items()}
        if not self.seconds:
            return rows
        times = f", {self.read_bytes / self.helped:.1f} x what is needed" if self.helped else ""
        read, faults = f"{size(self.read_bytes)}{times}", f"{self.major_faults:,.0f}"
        return rows | {
            "measured, a token": f"{self.seconds:.3g} s, {self.waiting:.3g} s of it without a processor",
            "read": NOT_MEASURED if isnan(self.read_bytes) else read,
            "stops for the disk": NOT_MEASURED if isnan(self.major_faults) else faults,
            "bound by": self.bound,
        }

    @property
    def bound(self) -> str:
        """``compute``, ``disk`` or ``amplification``, or that it was not measured."""
        waiting, read = self.waiting, self.read_bytes
        if self.disk.pieces and self.help_on:
            # a busy machine makes a token wait, too: the disk explains no more than its reads take
            waiting = min(waiting, read / self.disk.pieces)
        if waiting < self.seconds / 2 or read < 0.01 * self.dense:
            return "compute"
        if isnan(read):
            return NOT_MEASURED if self.helped else "compute"
        return "disk" if self.help_on or read < MUCH * max(self.helped, self.experts) else "amplification"

    @property
    def sentence(self) -> str:
        """What would make it faster."""
        lower = f", or as root `{command}`" if (command := self.disk.command) else ""
        return {
            "amplification": f"It reads more than it needs: open it with paging='on'{lower}.",
            "disk": "The disk bounds it: a faster disk or more free memory helps.",
            "compute": "The disk does not bound it: computing does, or other work on this machine.",
            NOT_MEASURED: "It waits. Whether for the disk is not known: this system does not count reads.",
        }[self.bound]


def forecast(
    headers: Sequence[GGUFHeader], memory_bytes: int, disk: Disk | None = None, helped: float | None = None
) -> Diagnosis:
    """What a token will read.

    Args:
        headers: of all shards.
        memory_bytes: for weights: what is free, less cache and compute buffers.
        disk: measured before; None: look now.
        helped: bytes that it reads, where they are known better, as from a routing profile.
    """
    layout = Layout.of(headers)
    parts = [part for layer in layout.experts.values() for part in layer]
    total, token = sum(part.end - part.start for part in parts), layout.token_bytes
    piece = sum(part.slice_bytes for part in parts) // len(parts) if parts else 1 << 20
    disk = disk or Disk.under(headers[0].path, piece)
    room = memory_bytes - layout.dense_bytes
    cached = min(1.0, max(0.0, room / total)) if total else 1.0
    again = min(max(0, -room), layout.dense_bytes)
    missing = round(token * (1 - cached)) if helped is None else max(0, round(helped) - again)
    windows = min(total, missing * (1 + 2 * (disk.read_ahead_bytes or 0) / piece))  # of no more than there is
    plain = round(max(missing, windows)) + again
    return Diagnosis(layout.dense_bytes, token, piece, cached, missing + again, plain, disk)


def diagnose(model: Model, n_tokens: int = 4) -> Diagnosis:
    """Forecast and measure an open model, over ``n_tokens`` of decode; two more come first."""
    pinned = model.paging.pinned_bytes if model.paging else 0
    free = available_memory().available_bytes + pinned - (model.memory.compute_bytes or 0)
    expected = forecast(open_shards(model.path).headers, free)
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, n_tokens + 2).tolist()
    model.clear()
    for token in tokens[:2]:
        model.evaluate([token])
    before = _counts()
    for token in tokens[2:]:
        model.evaluate([token])
    seconds, processor, read, faults = ((b - a) / n_tokens for a, b in zip(before, _counts(), strict=True))
    model.clear()
    waiting, on = max(0.0, seconds - processor / (model.settings.n_threads or 1)), model.paging is not None
    measured = replace(expected, help_on=on, seconds=seconds, waiting=waiting)
    return replace(measured, read_bytes=read, major_faults=faults)


def _counts() -> tuple[float, float, float, float]:
    """Seconds by the clock and of the processor, bytes read and major faults so far."""
    counters, faults = getattr(psutil.Process(), "io_counters", None), nan
    if LINUX:
        import resource

        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    read = counters().read_bytes if counters else nan
    return time.perf_counter(), time.process_time(), read, faults
