"""Copy bytes from source files into one new file: streamed, hashed, read back from the disk, and resumable.

The engine under merge and repair. A plan says which bytes go where. They pass in windows of 12 MiB: a window
is read from the sources, written, read back from the disk and compared, while other threads compute the
SHA-256 and read the next one. The bytes grow in ``.X.part`` beside the output ``X``, which gets its name at
the very end.

A copy that only reads its sources trusts nothing that it finds on the disk: when it goes on after a kill, it
compares what is there with the sources. A copy that consumes its sources gives the bytes of a window back to
the file system (it punches a hole) after the window came back right from the disk and ``.X.journal`` says so.
When it goes on, a window counts as copied only if the journal has its hash, the part has these bytes, *and*
the sources have holes there. So whatever lies about in a journal, bytes that still exist are copied again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import xxhash

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import IntegrityError, OutputError
from dfqs_nb.core.files import fsync_dir
from dfqs_nb.merge import disk
from dfqs_nb.merge.journal import Journal, changed, in_the_way, read_journal, windows
from dfqs_nb.merge.plan import Identity, Plan

WINDOW_BYTES = 12 << 20  # in a consuming copy at most two windows are on the disk twice
N_BUFFERS = 3  # one is filled, one hashed, one written
GET_AGAIN = "it was cut off or changed meanwhile: download it again"
FAILING = "power was lost, or the disk or the memory is failing"


@dataclass(frozen=True)
class Copied:
    """What was copied: SHA-256 of the whole, XXH64 of each tensor, and the identities of the sources."""

    sha256: str
    hashes: dict[str, str]
    sources: tuple[Identity, ...]


def copy(
    plan: Plan,
    output: Path,
    *,
    accept: Callable[[Path], None],
    record: Callable[[Path, Copied], None],
    consume: bool = False,
    replace: bool = False,
    read_back: bool = True,
    allow_holes: bool = False,
    progress: bool = True,
) -> Copied:
    """Carry out ``plan`` into ``output``, or go on with a run that was killed.

    Args:
        accept: checks the complete part file, before it gets its name.
        record: keeps its hashes, likewise.
        consume: give each window's source bytes back once it is proven, and delete the sources at the end.
        replace: take the name from a file that has it.
        read_back: read each window from the disk again; a consuming copy always does.
        allow_holes: copy holes of the sources as zeros.

    Raises:
        OutputError: another process writes this output or uses a source, or the file cannot be written.
        SpaceError: the disk filled up.
        IntegrityError: a source changed, or the disk gave back other bytes.

    When it fails, a consuming copy keeps its part file, which holds bytes that the sources no longer have.
    Any other removes it, unless a person stopped it, or it is complete and its name is taken.
    """
    part, journal = disk.part_path(output), disk.journal_path(output)
    ours: list[Path] = []  # what this call opened, and may remove when it fails
    left = "run the same command again to go on" if consume else "the partial output was removed"
    with disk.readable_errors(output, plan.nbytes, left), disk.only_writer(output, disk.lock_path(output)):
        try:
            with ExitStack() as stack:
                run = _Run(plan, output, stack, ours, consume, read_back or consume, allow_holes)
                copied = run.copy(progress)
                accept(part)
                run.check_sources()
                record(part, copied)
                run.part.check(plan.nbytes)
                _give_name(part, output, replace)
        except (KeyboardInterrupt, SystemExit, _NameTaken):
            raise
        except BaseException as error:
            if journal in ours and windows(read_journal(output)):
                if isinstance(error, IntegrityError):
                    hint = f"nothing more was released; keep {part.name}: it has what the sources lack now"
                    raise IntegrityError(
                        error.what, where=error.where, hint=f"{hint}. {error.hint}"
                    ) from error
                raise
            for path in ours:
                path.unlink(missing_ok=True)
            raise
        if consume:
            for path in plan.sources:
                if path != output:
                    path.unlink(missing_ok=True)
            journal.unlink()
        return copied


class _NameTaken(OutputError):
    """Another file took the output's name during the copy."""


def _give_name(part: Path, output: Path, replace: bool) -> None:
    if replace:
        part.replace(output)
    else:
        try:
            disk.rename_new(part, output)
        except FileExistsError:
            hint = f"the result is {part.name}: move the other file away, then run the same command again"
            raise _NameTaken("another file took this name meanwhile", where=output, hint=hint) from None
    fsync_dir(output.parent)


class _Run:
    """One pass over all windows of a plan."""

    def __init__(
        self,
        plan: Plan,
        output: Path,
        stack: ExitStack,
        ours: list[Path],
        consume: bool,
        read_back: bool,
        allow_holes: bool,
    ) -> None:
        self.plan, self.read_back, self.allow_holes = plan, read_back, allow_holes

        def opened(path: Path) -> IO[bytes]:
            file = stack.enter_context(disk.open_own(path))
            ours.append(path)
            return file

        if not consume and (earlier := read_journal(output)):
            if windows(earlier):
                raise in_the_way(disk.journal_path(output))
            disk.journal_path(output).unlink()  # of a consuming copy that was killed before its first window
        self.journal = Journal(opened(disk.journal_path(output)), plan, WINDOW_BYTES) if consume else None
        self.part = Part(opened(disk.part_path(output)))
        self.sources = []
        for path, identity in zip(plan.sources, plan.identities, strict=True):
            file = stack.enter_context(disk.open_source(path, alone=consume))
            self.sources.append(Source(path, file, identity))
        if self.journal is not None:
            self.journal.begin(self.sources)
        for source in self.sources:
            source.check()
        self.window = self.journal.window if self.journal is not None else WINDOW_BYTES
        self.failed = False
        self.done = self.journal.windows if self.journal is not None else {}
        self.released = self.journal.released if self.journal is not None else 0
        fsync_dir(output.parent)

    def copy(self, progress: bool) -> Copied:
        """Copy every window; one is hashed and written while the next is read.

        Each thread takes the windows in order.
        """
        sha256, digests = hashlib.sha256(), {tensor.name: xxhash.xxh64() for tensor in self.plan.tensors}
        buffers = [memoryview(mmap.mmap(-1, self.window)) for _ in range(N_BUFFERS)]  # they begin on a page
        jobs: list[list[Future[None]]] = [[] for _ in buffers]  # that still need a buffer's bytes
        total = self.plan.nbytes
        with (
            ThreadPoolExecutor(1) as hasher,
            ThreadPoolExecutor(1) as writer,
            tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=not progress) as bar,
        ):
            for number, start in enumerate(range(0, total, self.window)):
                turn = number % N_BUFFERS
                for job in jobs[turn]:
                    job.result()
                view = buffers[turn][: min(self.window, total - start)]
                copied = self._load(view, start)
                jobs[turn] = [
                    hasher.submit(sha256.update, view),
                    writer.submit(self._keep, view, start, copied),
                ]
                for tensor, low, high in self.plan.within(self.plan.tensors, start, len(view)):
                    at = tensor.target_offset - start
                    digests[tensor.name].update(view[at + low : at + high])
                bar.update(len(view))
            for job in (job for pair in jobs for job in pair):
                job.result()
        self.part.finish(total)
        hashes = {name: digest.hexdigest() for name, digest in digests.items()}
        return Copied(sha256.hexdigest(), hashes, tuple(source.identity for source in self.sources))

    def _load(self, view: memoryview, start: int) -> bool:
        """Fill a window; say whether it came from the part file, because its sources were given back."""
        end = start + len(view)
        if self.journal is not None and not self._stored(start, len(view)):
            expected = self.done.get(end)
            if expected is not None:
                self.part.read(view, start)
                if xxhash.xxh3_64_hexdigest(view) != expected:
                    what, hint = f"bytes {start:,} to {end:,} changed since they were written", FAILING
                    raise IntegrityError(what, where=self.part.path, hint=hint)
                return True
            if not self.allow_holes:
                what = f"the sources have holes where bytes {start:,} to {end:,} come from"
                hint = "the journal that belongs to them was lost: download the sources again"
                raise IntegrityError(what, where=self.part.path, hint=hint)
        view[: max(len(self.plan.header) - start, 0)] = self.plan.header[start:end]
        for copy, low, high in self.plan.within(self.plan.copies, start, len(view)):
            at = copy.target_offset - start
            self.sources[copy.source].read(view[at + low : at + high], copy.source_offset + low, copy.name)
            if high >= copy.nbytes:
                padding = view[at + high : at + copy.nbytes + copy.padding]
                padding[:] = bytes(len(padding))
        return False

    def _stored(self, start: int, nbytes: int) -> bool:
        """Whether the sources hold every byte of a window."""
        return not any(
            self.sources[copy.source].has_hole(copy.source_offset + low, copy.source_offset + high)
            for copy, low, high in self.plan.within(self.plan.copies, start, nbytes)
        )

    def _keep(self, view: memoryview, start: int, copied: bool) -> None:
        """Write a window, prove it, record it, and only then release what it was made from.

        Windows come in order. After a failure none is written any more, so nothing more is released.
        """
        if self.failed:
            return
        self.failed = True  # until this window is through
        self._write(view, start, copied)
        self.failed = False

    def _write(self, view: memoryview, start: int, copied: bool) -> None:
        end, digest = start + len(view), xxhash.xxh3_64_hexdigest(view) if self.read_back else ""
        copied = copied or (self.journal is None and self.part.has(view, start))
        if not copied:
            self.part.write(view, start)
        if not copied and self.read_back:
            back = self.part.from_disk(start, len(view), flush=self.journal is not None)
            if xxhash.xxh3_64_hexdigest(back) != digest:
                what = f"bytes {start:,} to {end:,} came back from the disk changed"
                raise IntegrityError(what, where=self.part.path, hint=FAILING)
        if self.journal is None:
            return
        earlier = copied and end <= self.released
        if not copied:
            self.journal.add({"end": end, "xxh3": digest}, durable=True)
        for copy, low, high in self.plan.within(self.plan.copies, start, len(view)):
            if low < high:
                gap = copy.padding if high == copy.nbytes else 0
                first, last = copy.source_offset + low, copy.source_offset + high
                self.sources[copy.source].release(first, last, gap, earlier)
        if not earlier:
            self.journal.add({"released": end})

    def check_sources(self) -> None:
        """Check that no source was changed, or replaced, while it was read.

        Raises:
            IntegrityError: which one.
        """
        for source in self.sources:
            source.check()
            if not (source.path.exists() and os.path.samestat(source.path.stat(), os.fstat(source.handle))):
                raise changed(source.path)


class Source:
    """A source file, open, that nobody else may change.

    Its status-change time (ctime) is compared too. Nothing can set it back, so it shows a change whose
    modification time was reset, as our own release of bytes resets it.
    """

    def __init__(self, path: Path, file: IO[bytes], identity: Identity) -> None:
        self.path, self.file, self.handle, self.identity = path, file, file.fileno(), identity
        self.ctime_ns = os.fstat(self.handle).st_ctime_ns
        self.low = self.high = self.gap = 0  # the run of copied bytes whose last block is not given back yet

    @property
    def mtime_ns(self) -> int:
        """When it was changed last."""
        return int(self.identity["mtime_ns"])

    def set_time(self, mtime_ns: int) -> None:
        """Set the modification time, as it was before bytes were given back."""
        os.utime(self.handle, ns=(os.fstat(self.handle).st_atime_ns, mtime_ns))
        self.identity = {**self.identity, "mtime_ns": mtime_ns}
        self.ctime_ns = os.fstat(self.handle).st_ctime_ns

    def check(self) -> None:
        """Check that the file is as it was.

        Raises:
            IntegrityError: it changed.
        """
        now = os.fstat(self.handle)
        was = (self.identity["nbytes"], self.mtime_ns, self.ctime_ns)
        if was != (now.st_size, now.st_mtime_ns, now.st_ctime_ns):
            raise changed(self.path)

    def read(self, view: memoryview, offset: int, name: str) -> None:
        """Fill ``view`` from ``offset``.

        Raises:
            IntegrityError: the file ends before, or cannot be read there.
        """
        got = 0
        while got < len(view):
            try:
                n = os.preadv(self.handle, [view[got:]], offset + got)
            except OSError as error:
                what = f"tensor {name!r} cannot be read ({error.strerror})"
                hint = "the disk may be failing: copy or download the file again"
                raise IntegrityError(what, where=self.path, hint=hint) from error
            if n == 0:
                raise IntegrityError(f"ended inside tensor {name!r}", where=self.path, hint=GET_AGAIN)
            got += n

    def has_hole(self, start: int, end: int) -> bool:
        """Whether a byte between two offsets is not stored."""
        hole = disk.next_hole(self.handle, start)
        return hole is not None and hole < end

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
        self.low = disk.punch(self.handle, self.low, end)
        self.set_time(self.mtime_ns)


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
        direct = getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(self.handle, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.handle, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
        except OSError:
            return False
        return bool(direct) and wanted

    def _each(self, call: Callable[[memoryview, int], int], view: memoryview, offset: int) -> int:
        """Call until the view is done; return the bytes done.

        Direct calls need whole blocks, else they fail (EINVAL).
        """
        done = 0
        while done < len(view):
            try:
                n = call(view[done:], offset + done)
            except OSError as error:
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
        self._each(lambda rest, at: os.pwrite(self.handle, rest, at), view, offset)

    def _read(self, rest: memoryview, at: int) -> int:
        return os.preadv(self.handle, [rest], at)

    def read(self, view: memoryview, offset: int) -> None:
        """Fill ``view``.

        Raises:
            IntegrityError: the file is shorter.
        """
        if self._each(self._read, view, offset) < len(view):
            what = f"is {offset + len(view) - self.size:,} bytes shorter than its journal says"
            hint = "it was cut or removed meanwhile: put it back, if you can, and go on"
            raise IntegrityError(what, where=self.path, hint=hint)

    def from_disk(self, offset: int, nbytes: int, *, flush: bool) -> memoryview:
        """What the disk gives back. ``flush``: wait first until it would survive a loss of power."""
        if flush or not self.direct:
            getattr(os, "fdatasync", os.fsync)(self.handle)  # macOS has no fdatasync
            if not self.direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.handle, offset, nbytes, os.POSIX_FADV_DONTNEED)
        if len(self.spare) < nbytes:
            self.spare = memoryview(mmap.mmap(-1, nbytes))
        done = self._each(self._read, self.spare[:nbytes], offset)
        return self.spare[:done]

    def has(self, view: memoryview, offset: int) -> bool:
        """Whether an earlier run wrote these bytes. Every one is compared: a hash can be made to fit."""
        if offset + len(view) > self.size:
            return False
        there = self.from_disk(offset, len(view), flush=False)
        step = 1 << 20
        return len(there) == len(view) and all(
            bytes(there[i : i + step]) == bytes(view[i : i + step]) for i in range(0, len(view), step)
        )

    def finish(self, nbytes: int) -> None:
        """Cut off what an earlier run wrote behind the end, and flush."""
        os.ftruncate(self.handle, nbytes)
        os.fsync(self.handle)
        self.mtime_ns = os.fstat(self.handle).st_mtime_ns

    def check(self, nbytes: int) -> None:
        """Check that the file of this name is still the one that was written, and unchanged since.

        Raises:
            IntegrityError: somebody changed or replaced it.
        """
        now, there = os.fstat(self.handle), self.path.lstat()
        same = os.path.samestat(now, there) and (now.st_size, now.st_mtime_ns) == (nbytes, self.mtime_ns)
        if not same:
            raise IntegrityError("changed while it was checked", where=self.path, hint="see who writes to it")
