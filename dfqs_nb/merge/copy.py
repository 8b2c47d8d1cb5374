"""Move bytes from source files into one new file: streamed, hashed, read back, and resumable.

The engine under merge and repair. A plan says which bytes go where. They are moved in windows; a window
counts as done when it was written past the system's cache (or flushed) and, read again from the disk, has
the hash of what was read from the sources. A journal beside the output records each done window, so a
killed transfer goes on where it was. In consume mode a window is flushed before it is read again, and the
source bytes of a done window, and only of a done window, are given back to the file system (a hole is
punched), so that the disk never holds the model twice.

Files while it runs, beside the output ``X``: ``.X.part`` and ``.X.journal`` (the lock: first made, last
removed). Sources are locked too, so that no other process of this package consumes or reads them then.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import xxhash

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, SpaceError
from dfqs_nb.core.files import (
    CHUNK_BYTES,  # MOVED
    fsync_dir,
)
from dfqs_nb.merge import holes

N_BUFFERS = 4
BLOCK_BYTES = 4096  # what direct writes and reads are aligned to
WINDOW_BYTES = 64 << 20  # windows are whole chunks, so that they begin and end on pages of the cache
CONSUME_WINDOW_BYTES = 16 << 20  # at most 3 windows are on the disk twice: 48 MiB
WINDOWS_IN_FLIGHT = 2
TORN_SECONDS = 60  # how long after the journal's last line a release may still have touched a source


@dataclass(frozen=True, slots=True)
class Copy:
    """One run of bytes, usually a tensor's: where it is, and where it goes.

    Attributes:
        name: the tensor's (or the part's) name.
        source: index of the source file.
        source_offset, target_offset: bytes from the start of each file.
        nbytes: bytes to copy.
        padding: zero bytes that follow in the target; in the source at most as many lie between two copies.
    """

    name: str
    source: int
    source_offset: int
    target_offset: int
    nbytes: int
    padding: int = 0


@dataclass(frozen=True)
class Plan:
    """What a transfer writes: ``header``, then each copy in order, ``nbytes`` in all.

    ``of_tensors`` says that the copies are tensors, and those of the header.
    """

    sources: tuple[Path, ...]
    header: bytes = field(repr=False)
    copies: tuple[Copy, ...] = field(repr=False)
    nbytes: int
    of_tensors: bool = True

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the result but the data itself."""
        layout = [
            (c.name, c.source, c.source_offset, c.target_offset, c.nbytes, c.padding) for c in self.copies
        ]
        shape = repr((self.nbytes, len(self.sources), layout))
        return hashlib.sha256(self.header + shape.encode()).hexdigest()


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


def transfer(
    plan: Plan,
    output: Path,
    *,
    validate: Callable[[Path], None],
    keep_hashes: Callable[[dict[str, Any]], None],
    consume: bool = False,
    read_back: bool = True,
    progress: bool = True,
) -> Transferred:
    """Carry out ``plan`` into ``output``, or go on with a run that was killed.

    The bytes grow in the part file. When it is complete, flushed and accepted by ``validate`` the journal
    says so, and it is settled (see ``settle``).

    Raises:
        OutputError: another process is writing this output or consuming a source, or the file cannot be
            written.
        SpaceError: the disk filled up.
        IntegrityError: a source changed (now, or since an earlier run), or the disk gave back other bytes.

    In all these cases a consuming transfer keeps its part file, which by then holds bytes that the sources no
    longer have; any other transfer leaves nothing behind.
    """
    with _translated_errors(output, plan.nbytes, consume), _locked(output) as file:
        journal = Journal(journal_path(output), file)
        journal.check_plan(plan, consume)
        with _tidied(output, journal):
            journal.begin(plan, consume)
            result = _move(plan, output, journal, read_back or consume, progress)
            validate(part_path(output))
            journal.check_sources(plan)
            journal.append(
                valid={"sha256": result.sha256, "hashes": result.hashes, **_identity(part_path(output))},
                durable=True,
            )
        with _translated_errors(output, 0, True):
            _settle(output, journal, keep_hashes)
        return result


def settle(output: Path, keep_hashes: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
    """Finish a validated transfer that was killed before its end: name the part file, keep its hashes, then
    remove what is left of consumed sources. Every step may be repeated.

    Returns:
        The journal's record of the transfer (``sha256``, ``hashes``, ``sources``, ``paths``, ``consume``), or
        ``None`` when there is no validated transfer into ``output``.

    Raises:
        OutputError: another process is writing this output.
    """
    if not read_journal(output):
        return None
    with _translated_errors(output, 0, True), _locked(output, create=False) as file:
        return _settle(output, Journal(journal_path(output), file), keep_hashes) if file else None


def _settle(
    output: Path,
    journal: Journal,
    keep_hashes: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | None:
    if not journal.valid:
        return None
    head, valid = journal.lines[0], journal.lines[-1]["valid"]
    record = {**valid, **{key: head[key] for key in ("sources", "paths", "consume")}}
    if part_path(output).exists():
        os.replace(part_path(output), output)
        fsync_dir(output.parent)
    elif not (output.exists() and _unchanged(output, valid)):
        record = None  # it was named, and then removed or replaced by someone
    if record:
        keep_hashes(record)
        _remove_consumed(output, head)
    journal.path.unlink()
    return record


def _remove_consumed(output: Path, head: dict[str, Any]) -> None:
    """Remove the sources of a consuming transfer, unless another file has taken a source's place since."""
    for given, then in zip(head["paths"], head["sources"], strict=True) if head["consume"] else ():
        path = Path(given)
        if path.exists():
            if path.samefile(output) or not _unchanged(path, then):
                continue
            path.resolve().unlink()
        path.unlink(missing_ok=True)  # where the hub's cache keeps a link to the bytes


def _identity(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"nbytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _unchanged(path: Path, then: dict[str, Any]) -> bool:
    return all(then[key] == value for key, value in _identity(path).items())


@contextmanager
def _tidied(output: Path, journal: Journal) -> Iterator[None]:
    """When the block fails, remove part and journal, unless the part holds bytes that are nowhere else."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise  # a person stopped it: the next run goes on from here
    except BaseException as error:
        if journal.consume and journal.windows:
            if isinstance(error, IntegrityError):
                raise _kept(error, output) from error
        else:
            part_path(output).unlink(missing_ok=True)
            journal.path.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(output: Path, create: bool = True) -> Iterator[IO[bytes] | None]:
    """The journal of ``output``, open and locked; ``None`` when there is none and ``create`` is false."""
    path, flags = journal_path(output), os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    while True:
        try:
            file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        except FileNotFoundError:
            if create:
                raise
            yield None
            return
        with file:
            lock(
                file,
                fcntl.LOCK_EX,
                OutputError(
                    "another process is writing it", where=output, hint="wait for it, or choose another name"
                ),
            )
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


def lock(file: IO[bytes], kind: int, refusal: DfqsError) -> None:
    """Lock an open file until it is closed, or raise ``refusal`` when another process holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise refusal from None


@contextmanager
def _translated_errors(output: Path, nbytes: int, consume: bool) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        left = "run the same command again to go on" if consume else "the partial output was removed"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SpaceError(
                f"the disk filled up while {nbytes:,} bytes were written ({error.strerror}); {left}",
                where=output,
                hint="free some, or write to another disk",
            ) from error
        raise OutputError(
            f"cannot be written ({error.strerror}); {left}",
            where=error.filename or output,
            hint="choose a folder you may write",
        ) from error


def _kept(error: IntegrityError, output: Path) -> IntegrityError:
    return IntegrityError(
        error.what,
        where=error.where,
        hint=f"nothing more was released; {part_path(output).name} holds what the sources "
        f"no longer have: keep it. {error.hint}",
    )


class Journal:
    """What a transfer has done, one JSON line an event; a torn last line counts as never written.

    Lines: the plan and its sources; ``end`` and ``xxh3`` (XXH3-64) of each window that is on the disk and
    proven; ``released``, when its source bytes were given back; ``valid``, when the whole part was accepted.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.lines = _events(path.read_bytes())
        self.written_ns = os.fstat(file.fileno()).st_mtime_ns

    def check_plan(self, plan: Plan, consume: bool) -> None:
        """Check that an earlier run's journal is of this transfer. One that consumed nothing may be dropped.

        Raises:
            IntegrityError: a consuming transfer of another plan, or of other kind, is unfinished.
        """
        asked = (plan.fingerprint, consume)
        if self.lines and asked != (self.lines[0]["plan"], self.lines[0]["consume"]):
            if self.consume:
                raise IntegrityError(
                    "an unfinished transfer that consumes its sources is in the way",
                    where=self.path,
                    hint="finish it with the same call first: its part "
                    "file holds what those sources no longer have",
                )
            self.lines = []

    def begin(self, plan: Plan, consume: bool) -> None:
        """Write the first line, or go on where the journal of an earlier run ends.

        Raises:
            IntegrityError: a source changed since.
        """
        if self.lines:
            self.check_sources(plan)
        end = sum(len(_line(line)) for line in self.lines)
        if self.file.seek(0, os.SEEK_END) != end:
            self.file.truncate(end)
            self.file.seek(end)
        if not self.lines:
            window = CONSUME_WINDOW_BYTES if consume else WINDOW_BYTES
            self.append(
                plan=plan.fingerprint,
                consume=consume,
                chunk=CHUNK_BYTES,
                window=window,
                sources=identities(plan.sources),
                paths=[str(p.absolute()) for p in plan.sources],
                durable=True,
            )
        self.path.with_suffix(".part").touch()
        fsync_dir(self.path.parent)

    @property
    def windows(self) -> list[tuple[int, str]]:
        """End in the target, and hash, of each window done so far."""
        return [(line["end"], line["xxh3"]) for line in self.lines if "end" in line]

    @property
    def consume(self) -> bool:
        return bool(self.lines) and self.lines[0]["consume"]

    @property
    def valid(self) -> bool:
        return bool(self.lines) and "valid" in self.lines[-1]

    def append(self, durable: bool = False, **event: Any) -> None:
        rest = _line(event)
        while rest:  # a disk that is almost full may take a part of a line
            rest = rest[self.file.write(rest) :]
        self.lines.append(event)
        if durable:
            os.fsync(self.file.fileno())

    def check_sources(self, plan: Plan) -> None:
        """Check that no source changed since the transfer began.

        Releasing bytes changes a file's time, which is set back at once. A kill between the two is told by
        a window without its ``released`` line: then a time soon after that line is the release's own.

        Raises:
            IntegrityError: which source changed.
        """
        torn = self.consume and "end" in self.lines[-1]
        latest = self.written_ns + TORN_SECONDS * 10**9
        for path, then, now in zip(
            plan.sources, self.lines[0]["sources"], identities(plan.sources), strict=True
        ):
            own = torn and then["mtime_ns"] < now["mtime_ns"] <= latest
            changed = now["mtime_ns"] != then["mtime_ns"] and not own
            if changed or now["nbytes"] != then["nbytes"]:
                raise IntegrityError(
                    "changed since its merge began",
                    where=path,
                    hint="put the file back as it was and go on, or, if all sources are "
                    f"whole, remove {self.path.name} and begin again",
                )


def read_journal(output: Path) -> list[dict[str, Any]]:
    """The events recorded for ``output``; empty without a journal."""
    try:
        return _events(journal_path(output).read_bytes())
    except FileNotFoundError:
        return []


def _events(raw: bytes) -> list[dict[str, Any]]:
    events = []
    for line in raw.split(b"\n")[:-1]:
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def _move(plan: Plan, output: Path, journal: Journal, read_back: bool, progress: bool) -> Transferred:
    """Stream every byte; reading, hashing, writing and reading back overlap."""
    done = journal.windows[-1][0] if journal.windows else 0
    with ExitStack() as stack:
        part = stack.enter_context(_Part(part_path(output)))
        part.cut_to(done)
        sources = [stack.enter_context(_open_source(path, journal.consume)) for path in plan.sources]
        bar = stack.enter_context(
            tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="merge", disable=not progress)
        )
        stream = stack.enter_context(_Stream(part, sources, journal, bar, read_back))
        stream.literal(plan.header)
        for copy in plan.copies:
            stream.copy(copy)
        return Transferred(*stream.finish(), done)


def _open_source(path: Path, consume: bool) -> IO[bytes]:
    """A source, locked: alone when its bytes are to be released, together with other readers when not."""
    file = os.fdopen(os.open(path, os.O_RDWR if consume else os.O_RDONLY), "r+b" if consume else "rb", 0)
    try:
        lock(
            file,
            fcntl.LOCK_EX if consume else fcntl.LOCK_SH,
            OutputError("another process is merging this file", where=path, hint="wait for it to end"),
        )
    except BaseException:
        file.close()
        raise
    return file


class _Part:
    """The part file, written and read back past the system's cache where that can be done.

    This spares the CPU, which has hashes to compute, and what is read back comes from the disk for sure.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.direct = path, path.open("r+b", buffering=0), None
        try:
            self.direct = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        except (AttributeError, OSError):
            pass  # this system, or this file system, has no such thing: the cache it is
        self.past_cache = self.direct is not None

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.direct is not None:
            os.close(self.direct)

    def cut_to(self, done: int) -> None:
        """Drop what was written after the last window that is done."""
        size = os.fstat(self.file.fileno()).st_size
        if size < done:
            raise IntegrityError(
                f"is {done - size:,} bytes shorter than its journal says",
                where=self.path,
                hint="it was cut or removed meanwhile: put it back, if you can, and go on",
            )
        self.file.truncate(done)

    def write(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            rest, at = view[done:], offset + done
            done += self._either(
                lambda handle, rest=rest, at=at: os.pwrite(handle, rest, at),
                aligned=len(rest) % BLOCK_BYTES == 0,
            )

    def hash_from_disk(self, start: int, nbytes: int) -> str:
        """XXH3-64 of a flushed range as the disk gives it back."""
        drop_from_cache(self.file.fileno(), start, nbytes)
        return self._either(lambda handle: hash_range(handle, start, nbytes, xxhash.xxh3_64()), True)

    def _either(self, call: Callable[[int], Any], aligned: bool) -> Any:
        """Directly, or through the cache where the file system turns out to refuse that (EINVAL)."""
        if self.direct is not None and aligned:
            try:
                return call(self.direct)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.past_cache = False
        return call(self.file.fileno())


class _Stream:
    """Writes a stream of bytes to the part file while other threads hash it and prove it.

    One thread writes, one computes the SHA-256, and one follows behind: it flushes each window, reads it
    back from the disk, compares, records, and releases. Buffers are reused once written and hashed. Bytes
    that an earlier run has done are read from the part file instead, and its windows' hashes compared.
    """

    def __init__(
        self, part: _Part, sources: list[IO[bytes]], journal: Journal, bar: tqdm, read_back: bool
    ) -> None:
        self.part, self.sources, self.journal = part, sources, journal
        self.bar, self.read_back = bar, read_back
        self.chunk, self.window = journal.lines[0]["chunk"], journal.lines[0]["window"]
        self.earlier = dict(journal.windows)
        self.done = max(self.earlier, default=0)
        self.position = self.window_start = 0
        self.sha256, self.window_hash = hashlib.sha256(), xxhash.xxh3_64()
        self.hashes: dict[str, str] = {}
        self.buffers = [mmap.mmap(-1, self.chunk) for _ in range(N_BUFFERS)]  # they begin on a page
        self.busy: list[list[Future]] = [[] for _ in self.buffers]
        self.turn = self.level = 0
        self.writes: list[Future] = []
        self.taken: list[tuple[int, int, int, int]] = []
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
        start = 0
        while start < len(data):
            view = self._room(len(data) - start)
            if self.position < self.done:
                read_exactly(self.part.file, view, self.position, "the part file")
            else:
                view[:] = data[start : start + len(view)]
            start += len(view)
            self._filled(len(view))

    def copy(self, copy: Copy) -> None:
        """A run of bytes from a source, then its padding."""
        digest, taken = xxhash.xxh64(), 0
        while taken < copy.nbytes:
            view = self._room(copy.nbytes - taken)
            start = copy.source_offset + taken
            if self.position < self.done:
                read_exactly(self.part.file, view, self.position, copy.name)
            else:
                read_exactly(self.sources[copy.source], view, start, copy.name)
            digest.update(view)
            taken += len(view)
            self.taken.append((copy.source, start, start + len(view), copy.padding))
            self._filled(len(view))
        self.hashes[copy.name] = digest.hexdigest()
        self.literal(bytes(copy.padding))

    def _room(self, nbytes: int) -> memoryview:
        """Room for at most ``nbytes``, in a buffer whose earlier bytes are written and hashed."""
        if self.level == 0:
            self.turn = (self.turn + 1) % len(self.buffers)
            self._wait(self.turn)
        return memoryview(self.buffers[self.turn])[self.level : self.level + nbytes]

    def _wait(self, turn: int) -> None:
        for future in self.busy[turn]:
            future.result()
        self.busy[turn] = []

    def _filled(self, nbytes: int) -> None:
        self.position, self.level = self.position + nbytes, self.level + nbytes
        if self.level == self.chunk:
            self._send()
        if self.position - self.window_start == self.window:
            self._close_window()

    def _send(self) -> None:
        """Hand a buffer to the other threads. Windows are whole chunks, so it is done or not as a whole."""
        view, start = memoryview(self.buffers[self.turn])[: self.level], self.position - self.level
        self.window_hash.update(view)
        jobs = [self.hasher.submit(self.sha256.update, view)]
        if start >= self.done:
            self.writes.append(self.writer.submit(self._write, view, start))
            jobs.append(self.writes[-1])
        else:
            self.bar.update(len(view))
        self.busy[self.turn], self.level = jobs, 0

    def _write(self, view: memoryview, offset: int) -> None:
        self.part.write(view, offset)
        self.bar.update(len(view))

    def _close_window(self) -> None:
        start, end, digest = self.window_start, self.position, self.window_hash.hexdigest()
        taken, self.taken, writes, self.writes = self.taken, [], self.writes, []
        self.window_start, self.window_hash = self.position, xxhash.xxh3_64()
        if end > self.done:
            before = [*writes, *self.checks[-1:]]
            self.checks.append(self.checker.submit(self._prove, before, start, end, digest, taken))
        elif self.earlier.get(end) != digest:
            raise IntegrityError(
                f"bytes {start:,} to {end:,} changed since they were written",
                where=self.part.path,
                hint="power was lost, or the disk is failing",
            )
        elif end == self.done and "end" in self.journal.lines[-1]:
            self.checks.append(self.checker.submit(self._release, taken, end))
        while len(self.checks) > WINDOWS_IN_FLIGHT:  # at least one stays
            self.checks.pop(0).result()

    def _prove(
        self, before: list[Future], start: int, end: int, digest: str, taken: list[tuple[int, int, int, int]]
    ) -> None:
        """Read a window back from the disk, record it, and release what it was made from.

        Not without what comes before it, its own writes and the window in front: what is done has no gap.
        It is flushed before if bytes are to be released, or if only a flush lets the cache forget it.
        Otherwise one flush at the end will do: what a loss of power takes before that, its hash tells when
        the run goes on.
        """
        for job in before:
            job.result()
        if self.read_back:
            if self.journal.consume or not self.part.past_cache:
                flush(self.part.file.fileno())
            if self.part.hash_from_disk(start, end - start) != digest:
                raise IntegrityError(
                    f"bytes {start:,} to {end:,} came back from the disk changed",
                    where=self.part.path,
                    hint="the disk or the memory is failing: use another",
                )
        self.journal.append(end=end, xxh3=digest, durable=self.journal.consume)
        self._release(taken, end)

    def _release(self, taken: list[tuple[int, int, int, int]], end: int) -> None:
        if self.journal.consume:
            self.releaser.release(taken)
            self.journal.append(released=end)

    def finish(self) -> tuple[str, dict[str, str]]:
        """Wait until everything is on the disk; the stream's SHA-256, and XXH64 by copy."""
        if self.level:
            self._send()
        for turn in range(len(self.buffers)):
            self._wait(turn)
        if self.position > self.window_start:
            self._close_window()
        for check in self.checks:
            check.result()
        flush(self.part.file.fileno())
        return self.sha256.hexdigest(), self.hashes


class Releaser:
    """Gives source bytes back to the file system, whole blocks at a time, and keeps the file's time."""

    def __init__(self, sources: list[IO[bytes]], mtimes_ns: list[int]) -> None:
        self.sources, self.mtimes_ns = sources, mtimes_ns
        self.open_run: dict[int, tuple[int, int, int]] = {}

    def release(self, taken: list[tuple[int, int, int, int]]) -> None:
        """Punch out the ranges ``(source, start, end, padding)``; a block partly taken waits for its rest.

        The few bytes of padding between two ranges go with them; a header between them does not.
        """
        touched = set()
        for source, start, end, padding in taken:
            low, high, gap = self.open_run.get(source, (start, start, 0))
            if not high <= start <= high + gap:
                self._punch(source, low, high)
                low = start
            self.open_run[source] = (low, end, padding)
            touched.add(source)
        for source in touched:
            low, high, gap = self.open_run[source]
            self.open_run[source] = (self._punch(source, low, high), high, gap)
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
            raise IntegrityError(
                f"tensor {name!r} cannot be read ({error.strerror})",
                where=source.name,
                hint="the disk may be failing: copy or download the file again",
            ) from error
        if n == 0:
            raise IntegrityError(
                f"ended inside tensor {name!r}",
                where=source.name,
                hint="it was cut off or changed meanwhile: download it again",
            )
        got += n


def flush(handle: int) -> None:
    """Wait until the file's data is on the disk."""
    getattr(os, "fdatasync", os.fsync)(handle)  # macOS has no fdatasync


def drop_from_cache(handle: int, start: int = 0, nbytes: int = 0) -> None:
    """Ask the system to forget clean cached pages, so that the next read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, start, nbytes, os.POSIX_FADV_DONTNEED)


def hash_range(handle: int, offset: int, nbytes: int, digest: Any = None) -> str:
    """XXH64 (or another ``digest``) of ``nbytes`` bytes at ``offset``; a short file hashes what there is.

    Reads whole blocks into pages, as a handle opened for direct reading demands of an aligned ``offset``.
    """
    digest, done = digest or xxhash.xxh64(), 0
    buffer = memoryview(mmap.mmap(-1, min(CHUNK_BYTES, nbytes + -nbytes % BLOCK_BYTES) or BLOCK_BYTES))
    while done < nbytes:
        left = nbytes - done
        n = min(os.preadv(handle, [buffer[: left + -left % BLOCK_BYTES]], offset + done), left)
        if n == 0:
            break
        digest.update(buffer[:n])
        done += n
    return digest.hexdigest()
