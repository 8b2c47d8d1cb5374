"""What the copy needs of a file system: holes, locks, renames that replace nothing, and files opened safely.

Holes need Linux's ``fallocate(2)`` and a file system that has them (ext4, xfs, btrfs, tmpfs, zfs).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from dfqs_nb.core.errors import DfqsError, OutputError, SpaceError

KEEP_SIZE, PUNCH_HOLE = 0x01, 0x02
AT_FDCWD, NO_REPLACE = -100, 1
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre, CIFS or NFS without lock support
BUSY = (errno.EAGAIN, errno.EACCES)


# ---- holes ----


@cache
def _libc(name: str) -> Callable[..., int] | None:
    """A function of the C library that Python does not offer; None where it is missing (macOS)."""
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)  # type: ignore[no-any-return]
    except AttributeError:
        return None


def punch(handle: int, start: int, end: int) -> int:
    """Give the whole blocks between two offsets back to the file system; they then read as zeros.

    Returns:
        Where the bytes begin that were kept: the last, unfinished block, or ``start``.

    Raises:
        OSError: the system or the file system cannot do it.
    """
    block = os.fstat(handle).st_blksize
    first, last = -(-start // block) * block, end // block * block
    if last <= first:
        return start
    fallocate = _libc("fallocate64")
    if fallocate is None:
        raise OSError(errno.EOPNOTSUPP, "this system cannot punch holes")
    if fallocate(handle, PUNCH_HOLE | KEEP_SIZE, ctypes.c_int64(first), ctypes.c_int64(last - first)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return last


def can_punch(folder: str | Path) -> bool:
    """Whether files in ``folder`` can give bytes back; tried on a small temporary file there."""
    with tempfile.TemporaryFile(dir=folder) as file:
        block = os.fstat(file.fileno()).st_blksize
        file.write(bytes([1]) * 4 * block)
        file.flush()
        os.fsync(file.fileno())
        try:
            punch(file.fileno(), 0, 3 * block)
        except OSError:
            return False
        return next_hole(file.fileno(), 0) == 0


def next_hole(handle: int, start: int) -> int | None:
    """Where the first hole at or after ``start`` begins; None when every byte from there on is stored."""
    size = os.fstat(handle).st_size
    if start >= size or not hasattr(os, "SEEK_HOLE"):
        return None
    at = os.lseek(handle, start, os.SEEK_HOLE)
    return at if at < size else None


def missing_bytes(path: str | Path) -> tuple[int, int]:
    """How many bytes of a file were never stored (they read as zeros), and where the first of them is.

    It asks the file system only, so it takes the same time at any size. ``(0, size)`` for a whole file.
    """
    with Path(path).open("rb", buffering=0) as file:
        handle, size = file.fileno(), os.fstat(file.fileno()).st_size
        missing, first = 0, size
        at = next_hole(handle, 0)
        while at is not None:
            first = min(first, at)
            try:
                end = os.lseek(handle, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole up to the end
                end = size
            missing += end - at
            at = next_hole(handle, end)
        return missing, first


# ---- files of our own ----


def part_path(output: Path) -> Path:
    """Where the bytes of ``output`` grow until they are proven."""
    return output.with_name(f".{output.name}.part")


def journal_path(output: Path) -> Path:
    """Where a consuming copy records what it has proven."""
    return output.with_name(f".{output.name}.journal")


def lock_path(output: Path) -> Path:
    """The file whose lock says that ``output`` is being written."""
    return output.with_name(f".{output.name}.lock")


def open_own(path: Path, *, create: bool = True) -> IO[bytes]:
    """Open a working file beside the output for reading and writing.

    Raises:
        OutputError: something else has that name: a link, a pipe, a folder, a file with a second name. To
            write to it would change what it stands for.
        FileNotFoundError: there is none, and ``create`` is false.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    foreign = OutputError("is not a plain file with one name", where=path, hint="remove it: it is in the way")
    try:
        file = open(path, "r+b", buffering=0, opener=lambda name, _: os.open(name, flags, 0o666))  # noqa: SIM115
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise foreign from error
        raise
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        file.close()
        raise foreign
    return file


def open_source(path: Path, *, alone: bool) -> IO[bytes]:
    """Open a source and lock it until it is closed: alone, to give its bytes back, or beside other readers.

    Where the file system has no locks, only the check of its times guards it (see `copy.Source`).

    Raises:
        OutputError: another process reads or consumes it.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW if alone else os.O_RDONLY
    file = open(path, "r+b" if alone else "rb", buffering=0, opener=lambda name, _: os.open(name, flags))  # noqa: SIM115
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return file
        file.close()
        if error.errno in BUSY:
            what = "another process is merging this file"
            raise OutputError(what, where=path, hint="wait for it to end") from None
        raise
    return file


def rename_new(path: Path, target: Path) -> None:
    """Rename a file to a name that nothing has.

    Raises:
        FileExistsError: something took that name.
    """
    rename = _libc("renameat2")
    if rename is not None:
        names = os.fsencode(path), os.fsencode(target)
        if rename(AT_FDCWD, names[0], AT_FDCWD, names[1], NO_REPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(target))
    try:
        os.link(path, target)  # fails where the name is taken, too
    except FileExistsError:
        raise
    except OSError:  # no hard links either: look, then rename
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        path.rename(target)
    else:
        path.unlink()


@contextmanager
def only_writer(output: Path, path: Path) -> Iterator[None]:
    """Be the only process that writes ``output``; ``path`` is the lock's file.

    Raises:
        OutputError: another process writes it.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    locks = _has_locks(output.parent)
    lock = FileLock(path, timeout=0) if locks else SoftFileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        hint = f"wait for it, or choose another name; if there is none, remove {path.name}"
        raise OutputError("another process is writing it", where=output, hint=hint) from None
    try:
        yield
    finally:
        if locks:
            path.unlink(missing_ok=True)  # while it is held: filelock leaves the file behind
        lock.release()


def _has_locks(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS
    return True


@contextmanager
def readable_errors(output: Path, nbytes: int, left: str) -> Iterator[None]:
    """Make of an `OSError` an error that says what to do; ``left`` says what became of the partial output."""
    try:
        yield
    except OSError as error:
        raise _readable(error, output, nbytes, left) from error


def _readable(error: OSError, output: Path, nbytes: int, left: str) -> DfqsError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceError(
            f"the disk filled up while {nbytes:,} bytes were written ({error.strerror}); {left}",
            where=output,
            hint="free some space, or write to another disk",
        )
    if error.errno == errno.EFBIG:
        return OutputError(
            f"the file system allows no file of {nbytes:,} bytes ({error.strerror}); {left}",
            where=output,
            hint="write to another file system (FAT32 ends at 4 GiB), or raise `ulimit -f`",
        )
    return OutputError(
        f"cannot be written ({error.strerror}); {left}",
        where=error.filename or output,
        hint="choose a folder you may write",
    )
