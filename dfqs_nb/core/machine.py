"""What this process may use (memory, cores, GPUs), how fast memory and disk are read, and what others do."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import random
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from dfqs_nb.core.display import counted

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
# of a control group, versions 2 and 1: limit, use, prefix of the sums over groups below in memory.stat
GROUP_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
NO_LIMIT = 1 << 60  # bytes, which version 1 says where there is none
CPUINFO = Path("/proc/cpuinfo")
BUSY_CORES = 0.15  # used by other programs, above which a measurement counts as contended
MEMORY_BYTES = 256 << 20  # that each thread reads: more than the processor's caches hold
DISK_SECONDS = 1.0  # that a measurement of the disk takes
MIN_PIECES = 64  # asked for together, which a file must hold
SMALL_READ_AHEAD = 128 << 10
WINDOW_BYTES = 128 << 10  # what one advice reads at least
PACKAGES = ("llama-cpp-python", "gguf", "numpy", "pandas", "matplotlib")


@dataclass(frozen=True)
class Memory:
    """Bytes of memory, total and free, and where the smaller limit comes from."""

    total_bytes: int
    available_bytes: int
    source: str


def available_memory() -> Memory:
    """Memory that this process can take, with file cache that can be dropped: psutil's, or its group's."""
    facts = psutil.virtual_memory()
    groups = filter(None, map(_cgroup_memory, _own_groups(CGROUP, OWN_GROUPS)))
    machine = Memory(facts.total, facts.available, "psutil")
    return min(machine, *groups, machine, key=lambda memory: memory.available_bytes)


def usable_cores() -> int:
    """Physical cores that this process may use, by its affinity and the container's CPU quota."""
    process = psutil.Process()
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1
    cores = min(psutil.cpu_count(logical=False) or allowed, allowed)
    quota = _cpu_quota(CGROUP)
    return max(1, cores if quota is None else min(cores, int(quota)))


@dataclass
class Load:
    """Cores that other programs used during a measurement; None until it ends."""

    other_cores: float | None = None

    @property
    def contended(self) -> bool:
        """Whether that was enough to disturb the measurement."""
        return (self.other_cores or 0.0) > BUSY_CORES


@contextmanager
def watched_load() -> Iterator[Load]:
    """Measure the work of other programs while the block runs."""
    load, others, started = Load(), _seconds_of_others(), time.perf_counter()
    yield load
    seconds = time.perf_counter() - started
    load.other_cores = max(0.0, (_seconds_of_others() - others) / max(seconds, 1e-9))


def _seconds_of_others() -> float:
    """CPU seconds of everything but this process, a hypervisor's other guests included."""
    machine, mine = psutil.cpu_times(), os.times()
    quiet = ("idle", "iowait", "guest", "guest_nice")  # user time includes that of guests
    return float(sum(machine) - sum(getattr(machine, name, 0.0) for name in quiet) - mine.user - mine.system)


def has_amx() -> bool:
    """Whether this processor has AMX, on which llama.cpp's extra buffers crash (ggml-org/llama.cpp#20824)."""
    return CPUINFO.exists() and "amx_tile" in CPUINFO.read_text(errors="replace")


def gpu_memories() -> list[int]:
    """Free bytes of each NVIDIA GPU, or of an Apple chip's GPU; empty without one."""
    if (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        memory = available_memory()  # shared; of it Metal's recommendedMaxWorkingSetSize is two thirds
        return [min(memory.available_bytes, memory.total_bytes * 2 // 3)]
    return [int(mib) << 20 for mib in _nvidia("memory.free") if mib.isdigit()]


def _nvidia(fact: str) -> list[str]:
    """A fact of each NVIDIA GPU, as ``nvidia-smi`` names it."""
    query = ["nvidia-smi", f"--query-gpu={fact}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):  # there is none, or it does not answer
        return []
    return list(filter(None, map(str.strip, done.stdout.splitlines())))


def describe() -> dict[str, str | int]:
    """Versions and hardware, for the top of a notebook and the conditions of a measurement."""
    from importlib.metadata import version

    memory, cards = available_memory(), ", ".join(_nvidia("name"))
    text = CPUINFO.read_text(errors="replace") if CPUINFO.exists() else ""
    # on Linux neither psutil nor Python knows the processor's name
    name = re.search(r"^model name\s*: *(.*\S)", text, re.MULTILINE)
    return {
        "Python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": name[1] if name else platform.processor() or "not stated",
        "usable cores": usable_cores(),
        "memory (GiB)": f"{memory.total_bytes / 2**30:.1f}, {memory.available_bytes / 2**30:.1f} free",
        **({"graphics cards": cards} if cards else {}),
    }


def machine_line(*more: str) -> str:
    """The versions and the machine that decide results, on one line; ``more``: `llama.kernels`."""
    known = describe()
    memory = str(known["memory (GiB)"]).replace(", ", " GiB of memory (")
    place = [counted(int(known["usable cores"]), "cores"), f"{memory})", known["system"]]
    cards = [known["graphics cards"]] if "graphics cards" in known else []
    versions = ", ".join(f"{name} {known[name]}" for name in ("Python", PACKAGES[0]))
    return "; ".join([versions, f"{known['processor']}: {', '.join(map(str, place + cards))}", *more])


def memory_bandwidth(n_threads: int = 0) -> float:
    """Bytes a second that threads (by default one a core) read from memory together; the best of 3 tries.

    Each thread searches its own buffer for a byte that is not there, by the C library's ``memchr``, which
    reads as fast as the processor can and lets Python's other threads run.
    """
    search = ctypes.CDLL(None).memchr
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


def disk_bandwidth(path: str | Path, piece_bytes: int) -> tuple[float | None, str]:
    """Bytes a second of pieces from random places of a file, as experts lie all over it; else why not.

    64 pieces are asked for together, as the paging help does.
    """
    n_pieces, before = Path(path).stat().st_size // piece_bytes, read_bytes()
    cached = "the file stays in the cache: another process may have mapped it"
    if math.isnan(before) or not hasattr(os, "posix_fadvise"):
        return None, "this system does not count what is read from the disk"
    if n_pieces < MIN_PIECES:
        return None, f"the file has fewer than {MIN_PIECES} such pieces"
    draw, total = random.Random(0), 0
    with Path(path).open("rb", buffering=0) as file:
        handle, window, began = file.fileno(), window_bytes(file.fileno()), time.perf_counter()
        while time.perf_counter() - began < DISK_SECONDS:
            places = [at * piece_bytes for at in draw.sample(range(n_pieces), MIN_PIECES)]
            for at in places:  # whole pieces: the kernel drops no part of a large page
                os.posix_fadvise(handle, at, piece_bytes, os.POSIX_FADV_DONTNEED)
            for at in places:
                advise_read(handle, at, at + piece_bytes, window)
            total += sum(len(os.pread(handle, piece_bytes, at)) for at in places)
            if read_bytes() == before:
                return None, cached
        took, from_disk = time.perf_counter() - began, read_bytes() - before
    # an open model keeps a part of its file in the cache, and the kernel can read more than we asked for
    return (min(total, from_disk) / took, "") if from_disk >= total / 2 else (None, cached)


def read_bytes() -> float:
    """Bytes that this process and its ended children have read from the disk; NaN on macOS: not counted."""
    process = psutil.Process()
    return process.io_counters().read_bytes if hasattr(process, "io_counters") else math.nan


@dataclass(frozen=True)
class Disk:
    """The disk under a file."""

    device: str  # its name in /dev; empty where there is none (a network file system)
    read_ahead_bytes: int | None  # that the kernel adds to a miss; None: not known

    @classmethod
    def under(cls, path: str | Path) -> Disk:
        """Look; nothing is read."""
        with Path(path).open("rb") as file:
            folder = block_folder(file.fileno())
        read_ahead = int((folder / "queue/read_ahead_kb").read_text()) << 10 if folder else None
        return cls(folder.name if folder else "", read_ahead)

    @property
    def command(self) -> str:
        """What lowers the read-ahead, as root."""
        place = self.device.replace("!", "/")  # as in cciss!c0d0
        return f"blockdev --setra {SMALL_READ_AHEAD >> 9} /dev/{place}" if place else ""


def block_folder(file: int) -> Path | None:
    """What Linux tells of the disk under an open file; None where there is none, as on a network."""
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


# ---- control groups, versions 2 and 1: no library reads them ----


def _own_groups(root: Path, listed: Path) -> Iterator[Path]:
    """The mounted roots, all that a container sees, and this process's groups up to the root."""
    yield from (root, root / "memory")
    for line in listed.read_text().splitlines() if listed.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            folder = root / controllers / path.lstrip("/")
            yield from (place for place in (folder, *folder.parents) if root in place.parents)


def _cgroup_memory(folder: Path) -> Memory | None:
    """The limit of a control group; None without one."""
    for limit, usage, prefix in GROUP_FILES:
        total, used = _number(folder / limit), _number(folder / usage)
        if total is None or used is None or total > NO_LIMIT:
            continue
        text = (folder / "memory.stat").read_text() if (folder / "memory.stat").exists() else ""
        # the kernel can also drop files that were read twice ("active")
        droppable = sum(map(int, re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", text, re.MULTILINE)))
        return Memory(total, max(0, total - max(0, used - droppable)), str(folder / limit))
    return None


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):  # missing, or "max"
        return int(path.read_text())
    return None


def _cpu_quota(root: Path) -> float | None:
    """CPUs that the control group grants; None without a limit."""
    if (root / "cpu.max").exists():
        quota, period = (root / "cpu.max").read_text().split()
    else:
        quota, period = (str(_number(root / f"cpu/cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
