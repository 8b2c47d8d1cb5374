"""What this process may use (memory, cores, GPUs, disk), and what else the machine does meanwhile."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")
BUSY_CORES = 0.15  # used by other programs, above which a measurement counts as contended
PACKAGES = ("llama-cpp-python", "gguf", "numpy", "pandas", "matplotlib")


@dataclass(frozen=True)
class Memory:
    """Bytes of memory, total and free, and where the smaller limit comes from."""

    total_bytes: int
    available_bytes: int
    source: str


def available_memory() -> Memory:
    """Memory that this process can still take: psutil's number, or the control group's if it is smaller.

    File cache that the kernel can drop counts as available in both.
    """
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
    """Free bytes of each NVIDIA GPU, or of an Apple chip's GPU; empty without one.

    Apple's shares the machine's memory. We count two thirds, which macOS allows on small machines (Metal's
    ``recommendedMaxWorkingSetSize``).
    """
    if (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        memory = available_memory()
        return [min(memory.available_bytes, memory.total_bytes * 2 // 3)]
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):  # there is none, or it does not answer
        return []
    return [int(line) << 20 for line in done.stdout.split() if line.isdigit()]


def describe() -> dict[str, str | int]:
    """Versions and hardware, for the top of a notebook and the conditions of a measurement."""
    from importlib.metadata import version

    memory, text = available_memory(), CPUINFO.read_text(errors="replace") if CPUINFO.exists() else ""
    # on Linux neither psutil nor Python knows the processor's name
    name = re.search(r"^model name\s*: *(.*\S)", text, re.MULTILINE)
    return {
        "Python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": name[1] if name else platform.processor() or "not stated",
        "usable cores": usable_cores(),
        "memory (GiB)": f"{memory.total_bytes / 2**30:.1f}, {memory.available_bytes / 2**30:.1f} free",
    }


# ---- control groups (version 2): no library reads them ----


def _own_groups(root: Path, listed: Path) -> Iterator[Path]:
    """The mounted root, all that a container sees, and this process's groups up to the root."""
    yield root
    for line in listed.read_text().splitlines() if listed.exists() else ():
        folder = root / line.split(":", 2)[2].lstrip("/")
        yield from (place for place in (folder, *folder.parents) if root in place.parents)


def _cgroup_memory(folder: Path) -> Memory | None:
    """The limit of a control group; None without one."""
    total, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if total is None or used is None:
        return None
    text = (folder / "memory.stat").read_text() if (folder / "memory.stat").exists() else ""
    # the kernel can also drop files that were read twice ("active")
    droppable = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)$", text, re.MULTILINE)))
    return Memory(total, max(0, total - max(0, used - droppable)), str(folder / "memory.max"))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # missing, or "max"
        return None


def _cpu_quota(root: Path) -> float | None:
    """CPUs that the control group grants; None without a limit."""
    path = root / "cpu.max"
    quota, period = path.read_text().split() if path.exists() else ("max", "0")
    return int(quota) / int(period) if quota.isdigit() else None
