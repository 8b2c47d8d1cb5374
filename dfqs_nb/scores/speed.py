"""How fast a model runs, below the roof that bandwidth sets: a token of decode reads every active weight."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dfqs_nb.core.budget import Fitted, fit
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.machine import random_read_speed, usable_cores, watched_load
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.memory import FLASH, ActiveBytes, active_bytes, cache_bytes_read
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.timing import Pace, measure_speed

if TYPE_CHECKING:
    import pandas as pd

BUFFER_BYTES = 256 << 20  # that each thread reads: more than the processor's caches hold
DISK_BYTES = 256 << 20
METRIC_DEPTH = 512  # of ``cpu_tokens_per_sec``
GB = 1e9
CUTS = (
    {"repetitions": 3},
    {"n_tokens": 32},
    {"depths": 2},
    {"repetitions": 1},
    {"n_tokens": 8},
    {"depths": 1},
)
NAMES = {"repetitions": "timed repetitions", "n_tokens": "timed tokens", "depths": "timed depths"}


def memory_bandwidth(n_threads: int = 0) -> float:
    """Bytes a second that threads (by default one a core) read from memory together; the best of 3 tries.

    Each thread searches its own buffer for a byte that is not there, by the C library's ``memchr``, which
    reads as fast as the processor can and lets Python's other threads run.
    """
    search = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).memchr
    search.argtypes, search.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    n_threads, seconds = n_threads or usable_cores(), []
    buffers = [np.zeros(BUFFER_BYTES, np.uint8) for _ in range(n_threads)]
    for buffer in buffers:
        buffer[::4096] = 2  # touches each page, so that it is memory and not a promise
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(3):
            started = time.perf_counter()
            list(pool.map(lambda buffer: search(buffer.ctypes.data, 1, BUFFER_BYTES), buffers))
            seconds.append(time.perf_counter() - started)
    return n_threads * BUFFER_BYTES / min(seconds)


def disk_bandwidth(folder: str | Path) -> float | None:
    """Bytes a second read from the disk under ``folder``, in pieces of 2 MiB of a temporary file.

    None where the file cannot be kept out of the cache.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for seed in range(DISK_BYTES >> 22):
            file.write(np.random.default_rng(seed).bytes(1 << 22))
        file.flush()
        os.fsync(file.fileno())
        return random_read_speed(file.name)


def speed_by_depth(
    model: Model, depths: Iterable[int], n_tokens: int, repetitions: int, *, bandwidth: float, seed: int = 42
) -> pd.DataFrame:
    """Prefill and decode speed at several depths, beside the roof that the memory of this machine sets.

    One row a phase and depth: ``phase``, ``depth``, ``n_threads``, ``repetitions``, ``tokens``, ``median``,
    ``min``, ``max``, ``values`` (tokens a second); for decode ``roof`` (tokens a second) and ``utilisation``
    (median / roof); ``other_cores`` and ``contended``. ``bandwidth``: bytes a second that all cores read
    together. A depth whose tokens exceed ``n_ctx`` is a `ContextFullError`.
    """
    import pandas as pd

    weights, rows = active_bytes(model.header).total, []
    for depth in depths:
        with watched_load() as load:
            timed = measure_speed(model, depth, n_tokens, repetitions, seed)
        types = model.settings.type_k, model.settings.type_v
        roof = bandwidth / (weights + cache_bytes_read(model.header, depth + n_tokens // 2, *types))
        busy = {"other_cores": load.other_cores, "contended": load.contended}
        prefill, decode = (row | busy for row in timed)
        rows += [prefill, decode | {"roof": roof, "utilisation": decode["median"] / roof}]
    return pd.DataFrame(rows)


def plan_speeds(depths: Sequence[int], pace: Pace, seconds: float) -> tuple[list[int], Fitted]:
    """Depths to time and ``repetitions`` and ``n_tokens`` of each, cut to these seconds; depth 512 stays."""
    order = sorted(depths, key=lambda depth: (depth != METRIC_DEPTH, depth))

    def cost(plan: dict[str, int]) -> float:
        timed = order[: plan["depths"]]
        return (plan["repetitions"] + 0.3) * sum(pace.seconds(depth, plan["n_tokens"]) for depth in timed)

    fitted = fit({"repetitions": 5, "n_tokens": 128, "depths": len(order)}, CUTS, cost, seconds, NAMES)
    return sorted(order[: fitted.values["depths"]]), fitted


def metric_row(speeds: pd.DataFrame) -> pd.Series:
    """The row of decode that gives ``cpu_tokens_per_sec``: depth 512, else the deepest that was timed."""
    decode = speeds[speeds["phase"] == "decode"].set_index("depth", drop=False)
    return decode.loc[METRIC_DEPTH if METRIC_DEPTH in decode.index else decode.index[-1]]


def sentence(row: pd.Series) -> str:
    """A row of decode in words."""
    spread = f"({row['min']:,.1f} to {row['max']:,.1f}, n = {row['repetitions']})"
    busy = ", contended" if row["contended"] else ""
    return f"decode {row['median']:,.1f} tokens/s at depth {row['depth']} {spread}{busy}"


# What weights are read from: its name, bytes of them that it holds, bytes a second.
Place = tuple[str, float, float]


def speed_bound(weights: ActiveBytes, places: Sequence[Place]) -> tuple[float, dict[str, float]]:
    """The most tokens a second that reading allows, and what part of a token's bytes comes from each place.

    ``places`` in order of preference: what every token uses lies in the first, as a cache would have it;
    experts fill what is left, and are chosen evenly. The parts of a token are read one after another.

    >>> weights = ActiveBytes(dense=4, routed=1, routed_total=10, weights=14)
    >>> speed_bound(weights, [("memory", 9, 9.0), ("disk", 99, 1.0)])
    (1.0, {'memory': 0.9, 'disk': 0.1})
    """
    experts = weights.weights - weights.dense
    dense, routed, seconds, shares = float(weights.dense), float(experts), 0.0, {}
    for name, capacity_bytes, bytes_per_sec in places:
        here = min(dense, capacity_bytes)
        there = min(routed, capacity_bytes - here)
        dense, routed = dense - here, routed - there
        read = here + weights.routed * (there / max(experts, 1))
        seconds += read / bytes_per_sec
        shares[name] = read / weights.total
    if dense + routed > 1:
        raise DfqsError(f"no place holds {(dense + routed) / GB:,.1f} GB of the weights", hint="add a disk")
    return 1 / seconds, shares


def card_table(weights: ActiveBytes = FLASH) -> pd.DataFrame:
    """What the card claims beside what reading allows.

    Columns: ``machine``, ``claimed_low``, ``claimed_high``, ``bound`` (tokens a second), ``from_disk`` (share
    of a token's bytes), ``reached`` (the claim's upper end / the bound; NaN where nothing is claimed).
    ``weights``: bytes a token, by default those of DeepSeek-V4-Flash-IQ1_S-XL.
    """
    import pandas as pd

    card = tomllib.loads((data_dir() / "spec" / "card_speeds.toml").read_text(encoding="utf-8"))["machine"]
    rows = []
    for machine in card:
        low, high = machine.get("claimed", (nan, nan))
        bound, shares = speed_bound(weights, [tuple(place) for place in machine["places"]])
        rows.append((machine["name"], low, high, bound, shares.get("disk", 0.0), high / bound))
    names = ["machine", "claimed_low", "claimed_high", "bound", "from_disk", "reached"]
    return pd.DataFrame(rows, columns=names)
