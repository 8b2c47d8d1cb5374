"""What this process has read so far."""

from __future__ import annotations

from pathlib import Path


def read_chars() -> int:
    """Bytes this process has asked the system for so far; Linux alone tells."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
