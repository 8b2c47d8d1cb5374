"""Holes in files: give a range of bytes back to the file system, and see what was given back.

Punching needs Linux's ``fallocate(2)`` and a file system that has it (ext4, xfs, btrfs, tmpfs, zfs).
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02


def punch(handle: int, start: int, end: int) -> int:
    """Release the whole blocks between the bytes ``start`` and ``end``; they then read as zeros.

    Returns:
        Where the part that was not released begins: the last, unfinished block, or ``start``.

    Raises:
        OSError: the system or the file system cannot.
    """
    block = os.fstat(handle).st_blksize
    first, last = -(-start // block) * block, end // block * block
    if last <= first:
        return start
    if _fallocate()(handle, _PUNCH_HOLE | _KEEP_SIZE, first, last - first):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return last


@cache
def _fallocate():
    if not sys.platform.startswith("linux"):
        raise OSError(errno.EOPNOTSUPP, "this system has no fallocate")
    call = ctypes.CDLL(None, use_errno=True).fallocate64
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return call


def can_punch(folder: str | Path) -> bool:
    """Whether files in ``folder`` can give bytes back; tried on a small temporary file there."""
    with tempfile.TemporaryFile(dir=folder) as file:
        block = os.fstat(file.fileno()).st_blksize
        file.write(bytes([1]) * 4 * block)
        file.flush()
        os.fsync(file.fileno())
        before = os.fstat(file.fileno()).st_blocks
        try:
            punch(file.fileno(), 0, 3 * block)
        except OSError:
            return False
        return os.fstat(file.fileno()).st_blocks < before


def first_hole(path: str | Path) -> int | None:
    """Where the first hole of a file begins, in bytes; ``None`` when every byte is stored."""
    if not hasattr(os, "SEEK_HOLE"):
        return None
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        at = os.lseek(file.fileno(), 0, os.SEEK_HOLE) if size else size
        return at if at < size else None
