"""What a token of a file larger than memory costs: before it is loaded, and after a few tokens.

Without help the kernel reads a window around each missing page, before and behind it. llama.cpp doubles the
device's read-ahead (``POSIX_FADV_SEQUENTIAL``), so a slice of S bytes costs about S + 2 x read-ahead.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan, nan

import psutil

from dfqs_nb.core.bandwidth import Disk
from dfqs_nb.core.display import size
from dfqs_nb.core.machine import available_memory
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.placement import Layout
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.paging import LINUX
from dfqs_nb.llama.timing import random_tokens, seconds_of

NOT_MEASURED = "not measured"
MUCH = 1.5  # times what is needed, from which on reading is amplified


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
        rows = {
            "a token uses": f"{size(self.dense)} of dense weights, {size(self.experts)} of experts",
            "experts that stay in memory": f"{self.cached:.0%}",
        }
        for how, n in (("with help", self.helped), ("without", self.plain)):
            seconds = f", {n / disk.pieces:.2f} s of it" if n and disk.pieces else ""
            rows[f"a token reads, {how}"] = f"{size(n)}{seconds}"
        known = "not known" if ahead is None else size(ahead)
        rows["the disk"] = f"{disk.device or 'no block device'}, read-ahead {known}"
        speeds = {"in order": disk.in_order, f"in pieces of {size(self.slice_bytes)}": disk.pieces}
        rows |= {f"its speed {how}": f"{size(n)}/s" if n else NOT_MEASURED for how, n in speeds.items()}
        if not self.seconds:
            return rows
        times = f", {self.read_bytes / self.helped:.1f} x what is needed" if self.helped else ""
        return rows | {
            "measured, a token": f"{self.seconds:.3g} s, without a processor {round(self.waiting, 4):g} s",
            "read": NOT_MEASURED if isnan(self.read_bytes) else f"{size(self.read_bytes)}{times}",
            "stops for the disk": NOT_MEASURED if isnan(self.major_faults) else f"{self.major_faults:,.0f}",
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
    """What a token will read, from the headers of all shards, with so much memory for weights.

    ``disk``: as measured before; None: measure it now. ``helped``: bytes that a token reads, where they are
    known better, as from a routing profile.
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
    batches = [[token] for token in random_tokens(model, n_tokens + 2)]
    model.clear()
    seconds_of(model, batches[:2])
    before = _counts()
    seconds_of(model, batches[2:])
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
