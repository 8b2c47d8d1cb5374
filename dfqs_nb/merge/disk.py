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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, SpaceError
from dfqs_nb.core.files import lock

KEEP_SIZE, PUNCH_HOLE = 0x01, 0x02
AT_FDCWD, NO_REPLACE = -100, 1
LIBC = ctypes.CDLL(None, use_errno=True)  # two of its functions Python does not offer; macOS lacks them
Identity = dict[str, int | str]  # of a file: its name, nbytes and mtime_ns


def punch(handle: int, start: int, end: int) -> int:
    """Give the whole blocks between two offsets back to the file system; they then read as zeros.

    Returns where the bytes begin that were kept: the last, unfinished block, or ``start``. An `OSError`: the
    system or the file system cannot do it.
    """
    block = os.fstat(handle).st_blksize
    first, last = -(-start // block) * block, end // block * block
    if last <= first:
        return start
    if (fallocate := getattr(LIBC, "fallocate64", None)) is None:
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


def stores(handle: int, start: int, end: int) -> bool:
    """Whether every byte between two offsets is stored."""
    hole = next_hole(handle, start)
    return hole is None or hole >= end


def next_data(handle: int, start: int) -> int:
    """Where the first stored byte at or after ``start`` is; the file's size when none is."""
    try:
        return os.lseek(handle, start, os.SEEK_DATA)
    except OSError:  # ENXIO: nothing but a hole up to the end
        return os.fstat(handle).st_size


def missing_bytes(path: str | Path) -> int:
    """How many bytes of a file were never stored and read as zeros; it asks the file system only."""
    missing, end = 0, 0
    with Path(path).open("rb", buffering=0) as file:
        while (at := next_hole(file.fileno(), end)) is not None:
            end = next_data(file.fileno(), at)
            missing += end - at
    return missing


@contextmanager
def readable_errors(output: Path, nbytes: int, left: str) -> Iterator[None]:
    """Turn an `OSError` into an error with a next step; ``left`` says what became of the partial output."""
    try:
        yield
    except OSError as error:
        kind: type[DfqsError] = OutputError
        what, where = "cannot be written", error.filename or output
        hint = f"choose a folder that you may write, on a disk that takes a file of {nbytes:,} bytes"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kind, what = SpaceError, f"the disk filled up while {nbytes:,} bytes were written"
            hint = "free some space, or write to another disk"
        raise kind(f"{what} ({error.strerror}); {left}", where=where, hint=hint) from error


def changed(path: Path) -> IntegrityError:
    """The error for a source that is not as it was."""
    hint = "put the file back as it was and run the same command again"
    return IntegrityError("changed since its merge began", where=path, hint=hint)


def part_path(output: Path, ending: str = "part") -> Path:
    """Where the bytes of an output grow."""
    return output.with_name(f".{output.name}.{ending}")


# where a consuming copy records what it has proven
journal_path = partial(part_path, ending="journal")


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

    `OutputError`: another process reads or consumes it; or, ``alone``, its file system has no locks.
    """
    file = _opened(path, os.O_RDWR | os.O_NOFOLLOW) if alone else _opened(path, os.O_RDONLY, "rb")
    free = lock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    if free or (free is None and not alone):
        return file
    file.close()
    if free is None:
        raise OutputError("its file system has no locks", where=path, hint="merge without --consume")
    raise OutputError("another process is merging this file", where=path, hint="wait for it to end")


def lock_part(file: IO[bytes], output: Path) -> None:
    """Lock the part file of ``output`` until it is closed; `OutputError`: another process writes it."""
    path = Path(file.name)
    if lock(file) is False or not is_at(file.fileno(), path):
        hint = "wait for it, or choose another name"
        raise OutputError("another process is writing it", where=output, hint=hint)


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    return path.exists() and os.path.samestat(path.lstat(), os.fstat(handle))


def rename_new(path: Path, target: Path) -> None:
    """Rename a file to a name that nothing has; `FileExistsError` where something took it."""
    if rename := getattr(LIBC, "renameat2", None):
        if rename(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(target), NO_REPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(target))
    if os.path.lexists(target):  # macOS, or a network's file system: look, then rename
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    path.rename(target)


def buffer(nbytes: int) -> memoryview:
    """Memory that begins on a page, as direct writes need it; of huge pages, which make them cheaper."""
    memory = mmap.mmap(-1, nbytes)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)  # Linux, where it is allowed
    return memoryview(memory)


class SourceFile:
    """A source file, open, that nobody else may change.

    Its status-change time (ctime) is compared too. Nothing can set it back, so it shows a change whose
    modification time was reset, as our own release of bytes resets it.
    """

    def __init__(self, path: Path, file: IO[bytes], identity: Identity) -> None:
        self.path, self.file, self.handle, self.identity = path, file, file.fileno(), identity
        self.ctime_ns = os.fstat(self.handle).st_ctime_ns
        # of the bytes copied in one piece: from where they are stored yet, their end, the padding behind it
        self.stored_from = self.copied_to = self.padding = 0

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

    def release(self, start: int, end: int, padding: int, earlier: bool) -> None:
        """Give these bytes back, whole blocks at a time, and keep the file's time.

        A block that is partly copied waits for its rest: of blocks of 4,096 bytes, 0 to 5,000 gives back one,
        and 5,000 to 9,000 then gives back 4,096 to 8,192. The bytes of ``padding`` after these go with them.
        A header between two runs does not: it is what a later run finds the tensors by. ``earlier``: a run
        before this one gave them back.
        """
        if not self.copied_to <= start <= self.copied_to + self.padding:
            self.stored_from = start  # another piece
        self.copied_to, self.padding = end, padding
        if earlier:
            block = os.fstat(self.handle).st_blksize
            self.stored_from = max(self.stored_from, end // block * block)
            return
        self.check()
        self.stored_from = punch(self.handle, self.stored_from, end)
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
        self.spare = threading.local()
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
            direct = self.direct  # as it is when this call begins
            try:
                n = call(self.handle, view[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                # Direct calls refuse the odd piece at the end. The thread that meets it first turns them off
                # for the file; another's call may have begun before that, and is tried again, too.
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
        back: memoryview | None = getattr(self.spare, "buffer", None)
        if back is None or len(back) < nbytes:
            back = self.spare.buffer = buffer(nbytes)
        return back[: self.read(back[:nbytes], offset)]

    def has(self, view: memoryview, offset: int) -> bool:
        """Whether an earlier run wrote these bytes. Every one is compared: a hash can be made to fit."""
        end = offset + len(view)
        if end > self.size or not stores(self.handle, offset, end):
            return False
        return bytes(self.from_disk(offset, len(view), flush=False)) == bytes(view)

    def finish(self, nbytes: int) -> None:
        """Cut off what an earlier run wrote behind the end, and flush."""
        os.ftruncate(self.handle, nbytes)
        os.fsync(self.handle)
        self.mtime_ns = os.fstat(self.handle).st_mtime_ns

    def check(self, nbytes: int) -> None:
        """Raise `IntegrityError` unless the file of this name is the one that was written, and unchanged."""
        now = os.fstat(self.handle)
        if not is_at(self.handle, self.path) or (now.st_size, now.st_mtime_ns) != (nbytes, self.mtime_ns):
            raise IntegrityError("changed while it was checked", where=self.path, hint="see who writes to it")
