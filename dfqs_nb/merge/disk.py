"""What the copy needs of a file system: holes, locks, renames that replace nothing, and files opened safely.

Holes need Linux's ``fallocate(2)`` and a file system that has them (ext4, xfs, btrfs, tmpfs, zfs).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, SpaceError

KEEP_SIZE, PUNCH_HOLE = 0x01, 0x02
AT_FDCWD, NO_REPLACE = -100, 1
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre, CIFS or NFS without lock support
Identity = dict[str, int | str]  # of a file: its name, nbytes and mtime_ns


@cache
def _libc(name: str) -> Callable[..., int] | None:
    """A function of the C library that Python does not offer; None where it is missing (macOS)."""
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)  # type: ignore[no-any-return]
    except AttributeError:
        return None


def punch(handle: int, start: int, end: int) -> int:
    """Give the whole blocks between two offsets back to the file system; they then read as zeros.

    Returns where the bytes begin that were kept: the last, unfinished block, or ``start``. An `OSError`: the
    system or the file system cannot do it.
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
        os.pwrite(file.fileno(), b"\1" * 4 * block, 0)
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


def next_data(handle: int, start: int) -> int:
    """Where the first stored byte at or after ``start`` is; the file's size when none is."""
    try:
        return os.lseek(handle, start, os.SEEK_DATA)
    except OSError:  # ENXIO: nothing but a hole up to the end
        return os.fstat(handle).st_size


def missing_bytes(path: str | Path) -> tuple[int, int]:
    """How many bytes of a file were never stored (they read as zeros), and where the first of them is.

    It asks the file system only, so it takes the same time at any size. ``(0, size)`` for a whole file.
    """
    with Path(path).open("rb", buffering=0) as file:
        missing, first, end = 0, os.fstat(file.fileno()).st_size, 0
        while (at := next_hole(file.fileno(), end)) is not None:
            end = next_data(file.fileno(), at)
            missing, first = missing + end - at, min(first, at)
        return missing, first


@contextmanager
def readable_errors(output: Path, nbytes: int, left: str) -> Iterator[None]:
    """Turn an `OSError` into an error with a next step; ``left`` says what became of the partial output."""
    try:
        yield
    except OSError as error:
        kind: type[DfqsError] = OutputError
        what, hint, where = "cannot be written", "choose a folder you may write", output
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kind, what = SpaceError, f"the disk filled up while {nbytes:,} bytes were written"
            hint = "free some space, or write to another disk"
        elif error.errno == errno.EFBIG:
            what = f"the file system allows no file of {nbytes:,} bytes"
            hint = "write to another file system (FAT32 ends at 4 GiB), or raise `ulimit -f`"
        else:
            where = error.filename or output
        raise kind(f"{what} ({error.strerror}); {left}", where=where, hint=hint) from error


def changed(path: Path) -> IntegrityError:
    """The error for a source that is not as it was."""
    hint = "put the file back as it was and run the same command again"
    return IntegrityError("changed since its merge began", where=path, hint=hint)


def part_path(output: Path, ending: str = "part") -> Path:
    """Where the bytes of an output grow."""
    return output.with_name(f".{output.name}.{ending}")


# where a consuming copy records what it has proven, and whose lock shows that the output is being written
journal_path, lock_path = (partial(part_path, ending=ending) for ending in ("journal", "lock"))


def _opened(path: Path, flags: int, mode: str = "r+b") -> IO[bytes]:
    return open(path, mode, buffering=0, opener=lambda name, _: os.open(name, flags, 0o666))


def open_own(path: Path, *, create: bool = True) -> IO[bytes]:
    """Open a working file beside the output for reading and writing.

    `OutputError`: something else has that name (a link, a pipe, a folder, a file with a second name), and to
    write there would change what it stands for. `FileNotFoundError`: there is none, and ``create`` is false.
    """
    foreign = OutputError("is not a plain file with one name", where=path, hint="remove it: it is in the way")
    try:
        file = _opened(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise foreign from error
        raise
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        file.close()
        raise foreign
    return file


def open_locked(path: Path, *, alone: bool) -> IO[bytes]:
    """Open a source and lock it until it is closed: alone, to give its bytes back, or beside other readers.

    Where the file system has no locks, only the check of its times guards it (see `SourceFile`).
    `OutputError`: another process reads or consumes it.
    """
    file = _opened(path, os.O_RDWR | os.O_NOFOLLOW) if alone else _opened(path, os.O_RDONLY, "rb")
    if _locked(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH) is False:
        file.close()
        raise OutputError("another process is merging this file", where=path, hint="wait for it to end")
    return file


def _locked(file: IO[bytes], how: int) -> bool | None:
    """Lock a file until it is closed: whether nobody else had it; None where there are no locks."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def rename_new(path: Path, target: Path) -> None:
    """Rename a file to a name that nothing has; `FileExistsError` where something took it."""
    if rename := _libc("renameat2"):
        if rename(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(target), NO_REPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(target))
    if os.path.lexists(target):  # macOS, or a network's file system: look, then rename
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    path.rename(target)


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Be the only process that writes ``output``; `OutputError` where another one does."""
    from filelock import FileLock, SoftFileLock, Timeout

    path = lock_path(output)
    with tempfile.TemporaryFile(dir=output.parent) as file:
        locks = _locked(file, fcntl.LOCK_EX)
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


class SourceFile:
    """A source file, open, that nobody else may change.

    Its status-change time (ctime) is compared too. Nothing can set it back, so it shows a change whose
    modification time was reset, as our own release of bytes resets it.
    """

    def __init__(self, path: Path, file: IO[bytes], identity: Identity) -> None:
        self.path, self.file, self.handle, self.identity = path, file, file.fileno(), identity
        self.ctime_ns = os.fstat(self.handle).st_ctime_ns
        self.low = self.high = self.gap = 0  # the run of copied bytes whose last block is not given back yet

    def set_time(self, mtime_ns: int) -> None:
        """Set the modification time, as it was before bytes were given back."""
        os.utime(self.handle, ns=(os.fstat(self.handle).st_atime_ns, mtime_ns))
        self.identity = {**self.identity, "mtime_ns": mtime_ns}
        self.ctime_ns = os.fstat(self.handle).st_ctime_ns

    def check(self) -> None:
        """Raise `IntegrityError` unless the file is as it was."""
        now, was = os.fstat(self.handle), (self.identity["nbytes"], self.identity["mtime_ns"], self.ctime_ns)
        if was != (now.st_size, now.st_mtime_ns, now.st_ctime_ns):
            raise changed(self.path)

    def read(self, view: memoryview, offset: int, name: str) -> None:
        """Fill ``view`` from ``offset``; an `IntegrityError` names the tensor where that is not possible."""
        while len(view):
            try:
                n = os.preadv(self.handle, [view], offset)
            except OSError as error:
                what = f"tensor {name!r} cannot be read ({error.strerror})"
                hint = "the disk may be failing: copy or download the file again"
                raise IntegrityError(what, where=self.path, hint=hint) from error
            if n == 0:
                hint = "it was cut off or changed meanwhile: download it again"
                raise IntegrityError(f"ended inside tensor {name!r}", where=self.path, hint=hint)
            view, offset = view[n:], offset + n

    def stores(self, start: int, end: int) -> bool:
        """Whether every byte between two offsets is stored."""
        hole = next_hole(self.handle, start)
        return hole is None or hole >= end

    def release(self, start: int, end: int, gap: int, earlier: bool) -> None:
        """Give these bytes back, whole blocks at a time, and keep the file's time.

        A block that is partly copied waits for its rest. The ``gap`` bytes of padding after these go with
        them. A header between two runs does not: it is what a later run finds the tensors by. ``earlier``: a
        run before this one gave them back.
        """
        if not self.high <= start <= self.high + self.gap:
            self.low = start
        self.high, self.gap = end, gap
        if earlier:
            block = os.fstat(self.handle).st_blksize
            self.low = max(self.low, end // block * block)
            return
        self.check()
        self.low = punch(self.handle, self.low, end)
        self.set_time(int(self.identity["mtime_ns"]))


class Part:
    """The part file, written and read past the page cache (O_DIRECT) where the file system allows it.

    What is read back then comes from the disk for sure, and the processor is left to the hashes: through the
    cache the same merge took two to three times as long (tests/benchmarks/RESULTS.md).
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.path, self.handle = Path(file.name), file.fileno()
        self.size = os.fstat(self.handle).st_size
        self.direct = self._past_cache(True)
        self.spare = memoryview(b"")
        self.mtime_ns = 0

    def _past_cache(self, wanted: bool) -> bool:
        direct, flags = getattr(os, "O_DIRECT", 0), fcntl.fcntl(self.handle, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.handle, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
        except OSError:
            return False
        return bool(direct) and wanted

    def _each(self, call: Callable[[int, Any, int], int], view: memoryview, offset: int) -> int:
        """Call until the view is done; return the bytes done."""
        done = 0
        while done < len(view):
            try:
                n = call(self.handle, view[done:], offset + done)
            except OSError as error:  # EINVAL: direct calls need whole blocks
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self.direct = self._past_cache(False)
                continue
            if n == 0:
                break
            done += n
        return done

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of ``view``."""
        self._each(os.pwrite, view, offset)

    def read(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` as far as the file goes; the bytes read."""
        return self._each(lambda handle, rest, at: os.preadv(handle, [rest], at), view, offset)

    def from_disk(self, offset: int, nbytes: int, *, flush: bool) -> memoryview:
        """Read bytes back from the disk. ``flush``: wait first until they would survive a loss of power."""
        if flush or not self.direct:
            getattr(os, "fdatasync", os.fsync)(self.handle)  # macOS has no fdatasync
            if not self.direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.handle, offset, nbytes, os.POSIX_FADV_DONTNEED)
        if len(self.spare) < nbytes:
            self.spare = memoryview(mmap.mmap(-1, nbytes))
        return self.spare[: self.read(self.spare[:nbytes], offset)]

    def has(self, view: memoryview, offset: int) -> bool:
        """Whether an earlier run wrote these bytes. Every one is compared: a hash can be made to fit."""
        if offset + len(view) > self.size:
            return False
        return bytes(self.from_disk(offset, len(view), flush=False)) == bytes(view)

    def finish(self, nbytes: int) -> None:
        """Cut off what an earlier run wrote behind the end, and flush."""
        os.ftruncate(self.handle, nbytes)
        os.fsync(self.handle)
        self.mtime_ns = os.fstat(self.handle).st_mtime_ns

    def check(self, nbytes: int) -> None:
        """Raise `IntegrityError` unless the file of this name is the one that was written, and unchanged."""
        now, there = os.fstat(self.handle), self.path.lstat()
        if not os.path.samestat(now, there) or (now.st_size, now.st_mtime_ns) != (nbytes, self.mtime_ns):
            raise IntegrityError("changed while it was checked", where=self.path, hint="see who writes to it")
