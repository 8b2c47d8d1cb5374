"""What this machine may use: memory and cores, as the container's limits leave them."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Memory:
    """Bytes of memory: what there is, what can be had now, and where the smaller limit comes from."""

    total_bytes: int
    available_bytes: int
    source: str


def available_memory() -> Memory:
    """Memory that this process can still take, in bytes.

    Linux: ``MemAvailable`` of ``/proc/meminfo``, lowered to what the control group (v2 or v1) leaves; file
    cache that the kernel can drop counts as available in both. Elsewhere: psutil, which JupyterLab's kernel
    brings.
    """
    if not sys.platform.startswith("linux"):
        return _memory_of_psutil()
    facts = _meminfo(MEMINFO.read_text())
    memory = Memory(facts["MemTotal"], facts["MemAvailable"], "/proc/meminfo")
    group = _cgroup_memory(CGROUP)
    if group is None or group.available_bytes >= memory.available_bytes:
        return memory
    return group


def _memory_of_psutil() -> Memory:
    import psutil

    facts = psutil.virtual_memory()
    return Memory(facts.total, facts.available, "psutil")


def _meminfo(text: str) -> dict[str, int]:
    """Bytes by name of a ``/proc/meminfo``, whose figures are in KiB."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) >= 2}


def _cgroup_memory(root: Path) -> Memory | None:
    """The limit of the control group mounted at ``root``; None where there is no limit to read."""
    for folder, limit, usage, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        total, used = _number(folder / limit), _number(folder / usage)
        if total is None or used is None or total > 1 << 60:
            continue
        dropped = _stat(folder / "memory.stat").get(cache, 0)
        return Memory(total, max(0, total - max(0, used - dropped)), str(folder / limit))
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # missing, or "max"
        return None


def _stat(path: Path) -> dict[str, int]:
    try:
        rows = (line.split() for line in path.read_text().splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2}
    except OSError:
        return {}


def usable_cores() -> int:
    """Physical cores that this process may use: affinity and the container's CPU quota lower the count."""
    allowed = _allowed_cpus()
    cores = min(_physical_cores(allowed), len(allowed))
    quota = _cpu_quota(CGROUP)
    return max(1, cores if quota is None else min(cores, int(quota)))


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(allowed: set[int]) -> int:
    """Distinct (package, core) pairs among the allowed CPUs; all of them where Linux does not say."""
    try:
        blocks = CPUINFO.read_text().split("\n\n")
    except OSError:
        return _physical_cores_of_psutil(len(allowed))
    rows = [dict(_pair(line) for line in block.splitlines() if ":" in line) for block in blocks]
    cores = {
        (row["physical id"], row["core id"])
        for row in rows
        if {"processor", "physical id", "core id"} <= row.keys() and int(row["processor"]) in allowed
    }
    return len(cores) or len(allowed)


def _physical_cores_of_psutil(default: int) -> int:
    import psutil

    return psutil.cpu_count(logical=False) or default


def _pair(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def _cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time that the control group grants, or None without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = (
            str(_number(root / "cpu/cpu.cfs_quota_us")),
            str(_number(root / "cpu/cpu.cfs_period_us")),
        )
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


PACKAGES = ("llama-cpp-python", "gguf", "numpy", "pandas", "matplotlib")


def describe() -> dict[str, str | int]:
    """Versions and the machine, for the top of a notebook and the conditions of a measurement."""
    from importlib.metadata import version

    memory = available_memory()
    return {
        "Python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _cpu_name(),
        "usable cores": usable_cores(),
        "memory (GiB)": f"{memory.total_bytes / 2**30:.1f}, {memory.available_bytes / 2**30:.1f} free",
    }


def _cpu_name() -> str:
    try:
        names = [line for line in CPUINFO.read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return _pair(names[0])[1] if names else platform.processor() or "not stated"
