"""Move bytes from source files into one new file: streamed, hashed, read back, and resumable.

The engine under merge and repair. A plan says which bytes go where. They are moved in windows; a window
counts as done when it was flushed to the disk and, read again from there, has the hash of what was read
from the sources. A journal beside the output records each done window, so a killed transfer goes on where
it was. In consume mode the source bytes of a done window, and only of a done window, are given back to
the file system (a hole is punched), so that the disk never holds the model twice.

Files while it runs, beside the output ``X``: ``.X.part`` (locked) and ``.X.journal``.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import xxhash
from tqdm.auto import tqdm

from dfqs_nb import holes
from dfqs_nb.errors import DfqsError, IntegrityError, OutputError, SpaceError
from dfqs_nb.paths import fsync_dir

CHUNK_BYTES = 4 << 20
N_BUFFERS = 4
WINDOW_BYTES = 64 << 20
CONSUME_WINDOW_BYTES = 12 << 20  # at most 4 windows are on the disk twice: 48 MiB and their chunks' ends
WINDOWS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Copy:
    """One run of bytes, usually a tensor's: where it is, and where it goes.

    Attributes:
        name: the tensor's (or the part's) name.
        source: index of the source file.
        source_offset, target_offset: bytes from the start of each file.
        nbytes: bytes to copy.
        padding: zero bytes that follow in the target (and, in the source, belong to it).
    """

    name: str
    source: int
    source_offset: int
    target_offset: int
    nbytes: int
    padding: int = 0


@dataclass(frozen=True)
class Plan:
    """What a transfer writes: ``header``, then each copy in order, ``nbytes`` in all."""

    sources: tuple[Path, ...]
    header: bytes = field(repr=False)
    copies: tuple[Copy, ...] = field(repr=False)
    nbytes: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the result but the data itself."""
        layout = [(c.name, c.source, c.source_offset, c.target_offset, c.nbytes, c.padding)
                  for c in self.copies]
        return hashlib.sha256(self.header + repr((self.nbytes, layout)).encode()).hexdigest()


@dataclass(frozen=True)
class Transferred:
    """A finished transfer: SHA-256 of the target, XXH64 by copy, and the bytes an earlier run had done."""

    sha256: str
    hashes: dict[str, str]
    resumed_bytes: int


def part_path(output: Path) -> Path:
    """Where the bytes of ``output`` grow until they are proven."""
    return output.with_name(f".{output.name}.part")


def journal_path(output: Path) -> Path:
    """Where the progress of a transfer into ``output`` is recorded."""
    return output.with_name(f".{output.name}.journal")


def identities(paths: Sequence[Path]) -> list[dict[str, int | str]]:
    """Name, size in bytes and modification time (ns) of each file."""
    stats = [(path, path.stat()) for path in paths]
    return [{"name": path.name, "nbytes": s.st_size, "mtime_ns": s.st_mtime_ns} for path, s in stats]


def transfer(plan: Plan, output: Path, *, validate: Callable[[Path], None], consume: bool = False,
             read_back: bool = True, progress: bool = True) -> Transferred:
    """Carry out ``plan`` into the part file of ``output``, or go on with a run that was killed.

    The part file is complete, flushed and accepted by ``validate`` when this returns, and the journal says
    so; ``settle`` then gives it its name.

    Raises:
        OutputError: another process is writing this output, or the file cannot be written.
        SpaceError: the disk filled up.
        IntegrityError: a source changed (now, or since an earlier run), or the disk gave back other bytes.

    In all these cases a consuming transfer keeps its part file, which by then holds bytes that the sources no
    longer have; any other transfer leaves nothing behind.
    """
    with _part_file(output, keep=consume) as part, _translated_errors(output, plan.nbytes, consume):
        journal = Journal.open(output, plan, consume)
        try:
            result = _move(plan, part, journal, read_back or consume, progress)
            validate(part_path(output))
            journal.check_sources(plan)
            journal.append(valid={"sha256": result.sha256, "hashes": result.hashes}, durable=True)
            return result
        except IntegrityError as error:
            if consume:
                raise _kept(error, output) from error
            raise
        finally:
            journal.close()


def settle(output: Path, keep_hashes: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
    """Give a validated part file its name, keep its hashes, then remove what is left of consumed sources.

    Goes on where a killed run left off; every step may be repeated.

    Returns:
        The journal's record of the transfer (``sha256``, ``hashes``, ``sources``), or ``None`` when there is
        no validated transfer into ``output`` to settle.
    """
    lines = read_journal(output)
    if not lines or "valid" not in lines[-1]:
        return None
    if part_path(output).exists():
        os.replace(part_path(output), output)
        fsync_dir(output.parent)
    record = {**lines[-1]["valid"], "sources": lines[0]["sources"]}
    keep_hashes(record)
    for source in map(Path, lines[0]["paths"] if lines[0]["consume"] else ()):
        if source != output.absolute():
            source.unlink(missing_ok=True)
    fsync_dir(output.parent)
    journal_path(output).unlink(missing_ok=True)
    return record


@contextmanager
def _part_file(output: Path, keep: bool) -> Iterator[IO[bytes]]:
    """The locked part file. It goes when the block fails, unless bytes of it may be the only ones."""
    path = part_path(output)
    with _translated_errors(output, 0, keep):
        part = _open_locked(path, output)
    with part:
        try:
            yield part
        except (KeyboardInterrupt, SystemExit):
            raise  # a person stopped it: the next run goes on from here
        except BaseException:
            if not keep:
                path.unlink(missing_ok=True)
                journal_path(output).unlink(missing_ok=True)
            raise


def _open_locked(path: Path, output: Path) -> IO[bytes]:
    while True:
        part = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(part.fileno()), path.stat()):
                return part
            part.close()  # its owner finished and renamed or removed it in between
        except BlockingIOError:
            part.close()
            raise OutputError("another process is writing it", where=output,
                              hint="wait for it, or choose another name") from None


@contextmanager
def _translated_errors(output: Path, nbytes: int, consume: bool) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        left = "run the same command again to go on" if consume else "the partial output was removed"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SpaceError(f"the disk filled up while {nbytes:,} bytes were written ({error.strerror}); "
                             f"{left}", where=output, hint="free some, or write to another disk") from error
        raise OutputError(f"cannot be written ({error.strerror}); {left}", where=error.filename or output,
                          hint="choose a folder you may write") from error


def _kept(error: IntegrityError, output: Path) -> IntegrityError:
    return IntegrityError(error.what, where=error.where,
                          hint=f"nothing more was released; {part_path(output).name} holds what the sources "
                               f"no longer have: keep it. {error.hint}")


class Journal:
    """What a transfer has done, one JSON line an event; a torn last line counts as never written.

    Lines: the plan and its sources; ``end`` and ``xxh64`` of each window that is on the disk and proven;
    ``released``, when its source bytes were given back; ``valid``, when the whole part file was accepted.
    """

    def __init__(self, path: Path, file: IO[bytes], lines: list[dict[str, Any]]) -> None:
        self.path, self.file, self.lines = path, file, lines

    @classmethod
    def open(cls, output: Path, plan: Plan, consume: bool) -> Journal:
        """Open the journal of ``output``, new or of an earlier run of the same plan.

        Raises:
            IntegrityError: it belongs to another plan, or a source changed since.
        """
        path = journal_path(output)
        lines = read_journal(output)
        window = CONSUME_WINDOW_BYTES if consume else WINDOW_BYTES
        head = {"plan": plan.fingerprint, "consume": consume, "chunk": CHUNK_BYTES, "window": window}
        if lines and any(lines[0].get(key) != value for key, value in head.items()):
            raise IntegrityError("an unfinished transfer of other shards, or with other settings, is in the "
                                 "way", where=path, hint="finish it with the same call, or, if its sources "
                                 "are whole, remove this file")
        file = path.open("ab", buffering=0)
        file.truncate(sum(len(_line(line)) for line in lines))
        journal = cls(path, file, lines)
        if not lines:
            journal.append(**head, sources=identities(plan.sources), paths=[str(p.absolute())
                           for p in plan.sources], durable=True)
            fsync_dir(path.parent)
        else:
            journal.check_sources(plan)
        return journal

    @property
    def windows(self) -> list[tuple[int, str]]:
        """End in the target, and XXH64, of each window done so far."""
        return [(line["end"], line["xxh64"]) for line in self.lines if "end" in line]

    @property
    def window_bytes(self) -> int:
        return self.lines[0]["window"]

    @property
    def consume(self) -> bool:
        return self.lines[0]["consume"]

    def append(self, durable: bool = False, **event: Any) -> None:
        self.file.write(_line(event))
        self.lines.append(event)
        if durable:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()

    def check_sources(self, plan: Plan) -> None:
        """Check that no source changed since the transfer began.

        Releasing bytes changes a file's time, which is set back at once; a kill between the two is told by
        a window without its ``released`` line, and then only the size counts.

        Raises:
            IntegrityError: which source changed.
        """
        torn = self.consume and "end" in self.lines[-1]
        for path, then, now in zip(plan.sources, self.lines[0]["sources"], identities(plan.sources),
                                   strict=True):
            if now["nbytes"] != then["nbytes"] or (now["mtime_ns"] != then["mtime_ns"] and not torn):
                raise IntegrityError("changed since its merge began", where=path,
                                     hint="put the file back as it was and go on, or, if all sources are whole, "
                                          f"remove {self.path.name} and begin again")


def read_journal(output: Path) -> list[dict[str, Any]]:
    """The events recorded for ``output``; empty without a journal."""
    try:
        raw = journal_path(output).read_bytes()
    except FileNotFoundError:
        return []
    events = []
    for line in raw.split(b"\n")[:-1]:
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def _move(plan: Plan, part: IO[bytes], journal: Journal, read_back: bool, progress: bool) -> Transferred:
    """Stream every byte; reading, hashing, writing and reading back overlap."""
    done = journal.windows[-1][0] if journal.windows else 0
    part.truncate(done)
    with ExitStack() as stack:
        flags = os.O_RDWR if journal.consume else os.O_RDONLY
        sources = [stack.enter_context(os.fdopen(os.open(path, flags), "r+b" if journal.consume else "rb",
                                                 buffering=0)) for path in plan.sources]
        bar = stack.enter_context(tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="merge",
                                       disable=not progress))
        stream = stack.enter_context(_Stream(part, sources, journal, bar, read_back))
        stream.literal(plan.header)
        for copy in plan.copies:
            stream.copy(copy)
        return Transferred(*stream.finish(), done)


class _Stream:
    """Writes a stream of bytes to the part file while other threads hash it and prove it.

    One thread writes, one computes the SHA-256, and one follows behind: it flushes each window, reads it
    back from the disk, compares, records, and releases. Buffers are reused once written and hashed. Bytes
    that an earlier run has done are read from the part file instead, and its windows' hashes compared.
    """

    def __init__(self, part: IO[bytes], sources: list[IO[bytes]], journal: Journal, bar: tqdm,
                 read_back: bool) -> None:
        self.part, self.sources, self.journal, self.bar, self.read_back = part, sources, journal, bar, read_back
        self.earlier = dict(journal.windows)
        self.done = max(self.earlier, default=0)
        self.position = self.window_start = 0
        self.sha256, self.window_hash = hashlib.sha256(), xxhash.xxh64()
        self.hashes: dict[str, str] = {}
        self.buffers = [bytearray(CHUNK_BYTES) for _ in range(N_BUFFERS)]
        self.busy: list[list[Future]] = [[] for _ in self.buffers]
        self.turn = 0
        self.taken: list[tuple[int, int, int]] = []
        self.checks: list[Future] = []
        self.releaser = Releaser(sources, [line["mtime_ns"] for line in journal.lines[0]["sources"]])

    def __enter__(self) -> _Stream:
        self.writer, self.hasher, self.checker = (ThreadPoolExecutor(1) for _ in range(3))
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self.writer, self.hasher, self.checker):
            pool.shutdown(cancel_futures=True)

    def literal(self, data: bytes) -> None:
        """Bytes of our own: the header, padding."""
        for start in range(0, len(data), CHUNK_BYTES):
            piece = data[start:start + CHUNK_BYTES]
            view = self._buffer(len(piece))
            if self.position < self.done:
                read_exactly(self.part, view, self.position, "the part file")
            else:
                view[:] = piece
            self._push(view)

    def copy(self, copy: Copy) -> None:
        """A run of bytes from a source, then its padding."""
        digest, taken = xxhash.xxh64(), 0
        while taken < copy.nbytes:
            view = self._buffer(min(CHUNK_BYTES, copy.nbytes - taken))
            if self.position < self.done:
                read_exactly(self.part, view, self.position, copy.name)
            else:
                read_exactly(self.sources[copy.source], view, copy.source_offset + taken, copy.name)
            digest.update(view)
            start, taken = copy.source_offset + taken, taken + len(view)
            last = copy.padding if taken == copy.nbytes else 0
            self.taken.append((copy.source, start, start + len(view) + last))
            self._push(view)
        self.hashes[copy.name] = digest.hexdigest()
        self.literal(bytes(copy.padding))

    def _buffer(self, nbytes: int) -> memoryview:
        """Room for ``nbytes``, once what the buffer held is written and hashed."""
        self.turn = (self.turn + 1) % len(self.buffers)
        self._wait(self.turn)
        return memoryview(self.buffers[self.turn])[:nbytes]

    def _wait(self, turn: int) -> None:
        for future in self.busy[turn]:
            future.result()
        self.busy[turn] = []

    def _push(self, view: memoryview) -> None:
        self.window_hash.update(view)
        jobs = [self.hasher.submit(self.sha256.update, view)]
        if self.position >= self.done:
            jobs.append(self.writer.submit(self._pwrite, view, self.position))
        else:
            self.bar.update(len(view))
        self.busy[self.turn] = jobs
        self.position += len(view)
        if self.position - self.window_start >= self.journal.window_bytes:
            self._close_window()

    def _pwrite(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self.part.fileno(), view[done:], offset + done)
        self.bar.update(len(view))

    def _close_window(self) -> None:
        start, end, digest = self.window_start, self.position, self.window_hash.hexdigest()
        taken, self.taken = self.taken, []
        self.window_start, self.window_hash = self.position, xxhash.xxh64()
        if end <= self.done:
            if self.earlier.get(end) != digest:
                raise IntegrityError(f"bytes {start:,} to {end:,} changed since they were written",
                                     where=self.part.name, hint="the disk may be failing")
            if end == self.done and "end" in self.journal.lines[-1]:
                self.checks.append(self.checker.submit(self._release, taken, end))
        else:
            written = self.writer.submit(lambda: None)
            self.checks.append(self.checker.submit(self._prove, written, start, end, digest, taken))
        while len(self.checks) > WINDOWS_IN_FLIGHT:
            self.checks.pop(0).result()

    def _prove(self, written: Future, start: int, end: int, digest: str,
               taken: list[tuple[int, int, int]]) -> None:
        """Flush a window, read it back from the disk, record it, and release what it was made from."""
        written.result()
        flush(self.part.fileno())
        if self.read_back:
            drop_from_cache(self.part.fileno(), start, end - start)
            if hash_range(self.part.fileno(), start, end - start) != digest:
                raise IntegrityError(f"bytes {start:,} to {end:,} came back from the disk changed",
                                     where=self.part.name,
                                     hint="the disk or the memory is failing: use another")
        self.journal.append(end=end, xxh64=digest, durable=True)
        self._release(taken, end)

    def _release(self, taken: list[tuple[int, int, int]], end: int) -> None:
        if self.journal.consume:
            self.releaser.release(taken)
            self.journal.append(released=end)

    def finish(self) -> tuple[str, dict[str, str]]:
        """Wait for everything; the stream's SHA-256, and XXH64 by copy."""
        for turn in range(len(self.buffers)):
            self._wait(turn)
        if self.position > self.window_start:
            self._close_window()
        for check in self.checks:
            check.result()
        return self.hasher.submit(self.sha256.hexdigest).result(), self.hashes


class Releaser:
    """Gives source bytes back to the file system, whole blocks at a time, and keeps the file's time."""

    def __init__(self, sources: list[IO[bytes]], mtimes_ns: list[int]) -> None:
        self.sources, self.mtimes_ns = sources, mtimes_ns
        self.open_run: dict[int, tuple[int, int]] = {}

    def release(self, taken: list[tuple[int, int, int]]) -> None:
        """Punch out the ranges ``(source, start, end)``; a block partly taken waits for its rest."""
        touched = set()
        for source, start, end in taken:
            low, high = self.open_run.get(source, (start, start))
            if high != start:
                self._punch(source, low, high)
                low = start
            self.open_run[source] = (low, end)
            touched.add(source)
        for source in touched:
            low, high = self.open_run[source]
            self.open_run[source] = (self._punch(source, low, high), high)
            handle = self.sources[source].fileno()
            stat = os.fstat(handle)
            os.utime(handle, ns=(stat.st_atime_ns, self.mtimes_ns[source]))

    def _punch(self, source: int, low: int, high: int) -> int:
        """Punch the whole blocks of ``low`` to ``high``; where the unreleased rest begins."""
        handle = self.sources[source].fileno()
        high = min(high, os.fstat(handle).st_size)
        return holes.punch(handle, low, high)


def read_exactly(source: IO[bytes], view: memoryview, offset: int, name: str) -> None:
    """Fill ``view`` from ``offset``.

    Raises:
        IntegrityError: the file ends before, or cannot be read there.
    """
    got = 0
    while got < len(view):
        try:
            n = os.preadv(source.fileno(), [view[got:]], offset + got)
        except OSError as error:
            raise IntegrityError(f"tensor {name!r} cannot be read ({error.strerror})", where=source.name,
                                 hint="the disk may be failing: copy or download the file again") from error
        if n == 0:
            raise IntegrityError(f"ended inside tensor {name!r}", where=source.name,
                                 hint="it was cut off or changed meanwhile: download it again")
        got += n


def flush(handle: int) -> None:
    """Wait until the file's data is on the disk."""
    getattr(os, "fdatasync", os.fsync)(handle)  # macOS has no fdatasync


def drop_from_cache(handle: int, start: int = 0, nbytes: int = 0) -> None:
    """Ask the system to forget clean cached pages, so that the next read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, start, nbytes, os.POSIX_FADV_DONTNEED)


def hash_range(handle: int, offset: int, nbytes: int) -> str:
    """XXH64 of ``nbytes`` bytes at ``offset``; a short file hashes what there is."""
    digest, buffer, done = xxhash.xxh64(), bytearray(min(CHUNK_BYTES, max(nbytes, 1))), 0
    while done < nbytes:
        n = os.preadv(handle, [memoryview(buffer)[: nbytes - done]], offset + done)
        if n == 0:
            break
        digest.update(memoryview(buffer)[:n])
        done += n
    return digest.hexdigest()
