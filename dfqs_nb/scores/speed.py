"""How fast a model runs, and how fast this machine's memory (or disk) would let it run.

Decode reads every active weight once a token, so bandwidth divided by those bytes is a roof that no decode
exceeds. The same arithmetic says what the real artifact can reach on a machine that is described, not owned.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.facts import INTEGER_TYPES, class_of, experts
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import CACHE_TYPES, CSA_RATIO, HCA_RATIO, kv_cache_bytes
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.timing import measure_speed

if TYPE_CHECKING:
    import pandas as pd

BUSY_CORES = 0.15  # of others' work beside a measurement, from which on it counts as contended
BANDWIDTH_BYTES = 256 << 20  # read by each thread: more than the processor's caches hold
DISK_BYTES = 256 << 20
GB = 1e9


# ---- bytes a token ----


@dataclass(frozen=True)
class ActiveBytes:
    """Bytes of weights that one token of decode reads.

    Attributes:
        dense: of what every token uses: attention, shared experts, output. Of look-up tables, one row.
        routed: of the routed experts that it is sent to.
        routed_total: of all routed experts.
        weights: of all weights.
    """

    dense: int
    routed: int
    routed_total: int
    weights: int

    @property
    def total(self) -> int:
        """Bytes a token."""
        return self.dense + self.routed


# DeepSeek-V4-Flash-IQ1_S-XL. Experts: from the shapes and types of its configuration. The rest: what the
# published file's 61,540,805,344 bytes leave, less the embedding (129,280 x 4096 at Q8_0), of which a token
# reads a row. With everything but experts at Q8_0 or F32, shapes alone would say 8.7 GB a token instead of
# 7.6.
FLASH = ActiveBytes(
    dense=6_301_231_840, routed=1_281_490_944, routed_total=54_676_946_944, weights=61_540_805_344
)


def active_bytes(headers: GGUFHeader | Sequence[GGUFHeader]) -> ActiveBytes:
    """Bytes that a token reads, from the tensor tables of a model's file or its shards (first one first)."""
    headers = [headers] if isinstance(headers, GGUFHeader) else list(headers)
    layout = experts(headers[0])
    tensors = [tensor for header in headers for tensor in header.tensors]
    has_output = any(tensor.name == "output.weight" for tensor in tensors)
    dense = routed_total = 0
    for tensor in tensors:
        kind = class_of(tensor.name)
        is_table = tensor.type in INTEGER_TYPES or (kind == "embedding" and has_output)
        if kind == "routed experts" and layout.total:
            routed_total += tensor.nbytes
        elif is_table:
            dense += tensor.nbytes // max(tensor.shape[-1], 1)
        else:
            dense += tensor.nbytes
    routed = round(routed_total * layout.used / layout.total) if layout.total else 0
    return ActiveBytes(dense, routed, routed_total, sum(tensor.nbytes for tensor in tensors))


def cache_bytes_read(header: GGUFHeader, depth: int, type_k: str = "f16", type_v: str = "f16") -> int:
    """Bytes of KV cache that a token at ``depth`` must read at least; 0 where the header does not say
    exactly.

    ``deepseek4``: the sliding window in every layer; in layers of ratio 4 the indexer's keys and the entries
    that it picks; in layers of ratio 128 every entry.
    """
    if header.architecture != "deepseek4":
        cache = kv_cache_bytes(header, max(depth, 1), type_k=type_k, type_v=type_v)
        return cache.total * depth // (-(-max(depth, 1) // 256) * 256) if cache.exactness == "exact" else 0
    block_bytes, block = CACHE_TYPES[type_k]
    width, indexer = (
        int(header.arch(key, 0)) for key in ("attention.key_length", "attention.indexer.key_length")
    )
    ratios = list(header.arch("attention.compress_ratios", []))[: int(header.arch("block_count", 0))]
    picked = min(depth // CSA_RATIO, int(header.arch("attention.indexer.top_k", 0)))
    elements = len(ratios) * min(depth, int(header.arch("attention.sliding_window", 0))) * width
    elements += ratios.count(CSA_RATIO) * (picked * width + depth // CSA_RATIO * indexer)
    elements += ratios.count(HCA_RATIO) * (depth // HCA_RATIO) * width
    return elements * block_bytes // block


# ---- what this machine gives ----


def memory_bandwidth(n_threads: int, nbytes: int = BANDWIDTH_BYTES, repetitions: int = 3) -> float:
    """Bytes a second that ``n_threads`` read from memory together, the best of several tries.

    Each thread searches its own buffer for a byte that is not there (the C library's ``memchr``, which reads
    as fast as the processor can and lets Python's other threads run).
    """
    search = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).memchr
    search.argtypes, search.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    buffers = [np.zeros(nbytes, np.uint8) for _ in range(n_threads)]
    for buffer in buffers:
        buffer[::4096] = 2  # touches each page, so that it is memory and not a promise
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(repetitions):
            started = time.perf_counter()
            list(pool.map(lambda buffer: search(buffer.ctypes.data, 1, nbytes), buffers))
            best = max(best, n_threads * nbytes / (time.perf_counter() - started))
    return best


def disk_bandwidth(folder: str | Path, nbytes: int = DISK_BYTES) -> float | None:
    """Bytes a second read in order from the disk under ``folder``; None where the file cache cannot be
    emptied.

    Writes a temporary file of random bytes, has the kernel drop it from memory, and reads it back; the
    kernel's own count says whether it came from the disk.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    with tempfile.TemporaryFile(dir=folder) as file:
        chunk = np.random.default_rng(0).bytes(1 << 22)
        for _ in range(nbytes >> 22):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before, started = _read_from_disk(), time.perf_counter()
        file.seek(0)
        while file.read(1 << 22):
            pass
        seconds = time.perf_counter() - started
        after = _read_from_disk()
    if before is None or after is None or after - before < 0.9 * nbytes:
        return None
    return nbytes / seconds


def _read_from_disk() -> int | None:
    """Bytes that this process has had fetched from storage so far."""
    try:
        rows = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(dict(rows)["read_bytes"])
    except (OSError, KeyError):
        return None


@dataclass
class Load:
    """Work of others while something was measured, in cores; None where the system does not say."""

    other_cores: float | None = None

    @property
    def contended(self) -> bool:
        """Whether others worked enough to disturb a measurement."""
        return (self.other_cores or 0.0) > BUSY_CORES


@contextmanager
def watched_load() -> Iterator[Load]:
    """Watch what the machine does beside this process while the block runs."""
    load, before, started = Load(), _busy_seconds(), time.perf_counter()
    yield load
    after, seconds = _busy_seconds(), time.perf_counter() - started
    if before is not None and after is not None and seconds > 0:
        load.other_cores = max(0.0, (after[0] - before[0] - (after[1] - before[1])) / seconds)


def _busy_seconds() -> tuple[float, float] | None:
    """CPU seconds that all processes (and a hypervisor) have used, and those of this one."""
    try:
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return None
    idle, waiting = fields[3], fields[4]
    busy = sum(fields[:8]) - idle - waiting
    mine = os.times()
    return busy / os.sysconf("SC_CLK_TCK"), mine.user + mine.system


# ---- measurements ----


def speed_by_depth(
    model: Model,
    depths: Iterable[int],
    n_tokens: int = 128,
    repetitions: int = 5,
    bandwidth: float | None = None,
    seed: int = 42,
    n_weights: ActiveBytes | None = None,
) -> pd.DataFrame:
    """Prefill and decode speed at several depths, beside the roof that memory sets.

    One row a phase and depth: ``phase``, ``depth``, ``n_threads``, ``repetitions``, ``tokens``, ``median``,
    ``min``, ``max``, ``values`` (tokens a second); for decode ``roof`` (tokens a second) and ``utilisation``
    (median / roof); ``other_cores`` and ``contended``.

    Args:
        bandwidth: bytes a second; measured here when not given.
        n_weights: bytes a token; from the model's header when not given.

    Raises:
        ContextFullError: a depth and its tokens exceed ``n_ctx``.
    """
    import pandas as pd

    bandwidth = bandwidth or memory_bandwidth(model.settings.n_threads or 1)
    weights = n_weights or active_bytes(model.header)
    rows = []
    for depth in depths:
        with watched_load() as load:
            speed = measure_speed(model, depth, n_tokens, repetitions, seed)
        settings = model.settings
        cache = cache_bytes_read(model.header, depth + n_tokens // 2, settings.type_k, settings.type_v)
        roof = bandwidth / (weights.total + cache)
        for row in speed.rows():
            is_decode = row["phase"] == "decode"
            rows.append(
                row
                | {
                    "roof": roof if is_decode else float("nan"),
                    "utilisation": row["median"] / roof if is_decode else float("nan"),
                    "other_cores": load.other_cores,
                    "contended": load.contended,
                }
            )
    return pd.DataFrame(rows)


# ---- what a described machine gives ----


@dataclass(frozen=True)
class Place:
    """A place that weights are read from: its name, how many bytes of them it holds, bytes a second."""

    name: str
    capacity_bytes: float
    bytes_per_sec: float


@dataclass(frozen=True)
class Bound:
    """A bound on decode speed: ``shares`` says what part of a token's bytes comes from each place."""

    tokens_per_sec: float
    shares: dict[str, float]


def speed_bound(weights: ActiveBytes, places: Sequence[Place]) -> Bound:
    """The most tokens a second that reading allows, from places in order of preference.

    What every token uses lies in the first place, as a cache would have it; experts fill what is left, and
    are asked for evenly. The parts of a token are read one after another.

    >>> weights = ActiveBytes(dense=4, routed=1, routed_total=10, weights=14)
    >>> speed_bound(weights, [Place("memory", 9, 9.0), Place("disk", 99, 1.0)])
    Bound(tokens_per_sec=1.0, shares={'memory': 0.9, 'disk': 0.1})

    Raises:
        DfqsError: the places together hold less than the weights.
    """
    dense, routed = float(weights.dense), float(weights.weights - weights.dense)
    seconds, shares = 0.0, {}
    for place in places:
        room = place.capacity_bytes
        here = min(dense, room)
        there = min(routed, room - here)
        dense, routed = dense - here, routed - there
        read = here + weights.routed * (there / max(weights.weights - weights.dense, 1))
        seconds += read / place.bytes_per_sec
        shares[place.name] = read / weights.total
    if dense + routed > 1:
        raise DfqsError(f"{(dense + routed) / GB:,.1f} GB of the weights lie nowhere", hint="add a disk")
    return Bound(1 / seconds, shares)


# The card's table (tokens a second) and a machine for each row. Bandwidths: JEDEC's rates for two channels
# (DDR4-3200: 51.2 GB/s, DDR5-5600: 89.6 GB/s), NVIDIA's data sheets (RTX 3090: 936 GB/s and 24 GB; H100 SXM:
# 3,350 GB/s and 80 GB), SATA's limit (0.55 GB/s) and a PCIe 3 drive (3.5 GB/s).
DISK = float("inf")
_RAM = Place("memory", 120 * GB, 51.2 * GB)
CARD: tuple[tuple[str, tuple[float, float], tuple[Place, ...]], ...] = (
    ("CPU, 128 GB of DDR5-5600", (0.2, 0.5), (Place("memory", 120 * GB, 89.6 * GB),)),
    ("CPU, 128 GB of DDR4-3200", (0.2, 0.5), (_RAM,)),
    (
        "CPU, 32 GB, NVMe disk",
        (0.2, 0.5),
        (Place("memory", 28 * GB, 51.2 * GB), Place("disk", DISK, 3.5 * GB)),
    ),
    (
        "CPU, 32 GB, SATA disk",
        (0.2, 0.5),
        (Place("memory", 28 * GB, 51.2 * GB), Place("disk", DISK, 0.55 * GB)),
    ),
    ("RTX 3090", (1.0, 3.0), (Place("GPU", 22 * GB, 936 * GB), _RAM)),
    ("2 x RTX 3090", (5.0, 8.0), (Place("GPU", 44 * GB, 936 * GB), _RAM)),
    ("H100", (15.0, 25.0), (Place("GPU", 76 * GB, 3350 * GB),)),
)


def card_table(weights: ActiveBytes | None = None, here: Sequence[Place] = ()) -> pd.DataFrame:
    """What the card claims beside what reading allows.

    Columns: ``machine``, ``claimed_low``, ``claimed_high``, ``bound`` (tokens a second), ``from_disk``
    (share of
    a token's bytes), ``reached`` (the claim's upper end / the bound); of this machine nothing is claimed.

    Args:
        weights: bytes a token; DeepSeek-V4-Flash-IQ1_S-XL's when not given.
        here: this machine's places, for a row of its own.
    """
    import pandas as pd

    rows, weights, no_claim = [], weights or FLASH, (float("nan"), float("nan"))
    for name, (low, high), places in (*CARD, *([("this machine", no_claim, tuple(here))] if here else [])):
        bound = speed_bound(weights, places)
        rows.append(
            (
                name,
                low,
                high,
                bound.tokens_per_sec,
                bound.shares.get("disk", 0.0),
                high / bound.tokens_per_sec,
            )
        )
    return pd.DataFrame(
        rows, columns=["machine", "claimed_low", "claimed_high", "bound", "from_disk", "reached"]
    )


def places_here(
    n_threads: int, free_bytes: int, folder: str | Path, bandwidth: float | None = None
) -> tuple[Place, ...]:
    """This machine as places: its free memory and its disk (left out where it cannot be measured)."""
    memory = Place("memory", float(free_bytes), bandwidth or memory_bandwidth(n_threads))
    disk = disk_bandwidth(folder)
    return (memory, Place("disk", DISK, disk)) if disk else (memory,)
