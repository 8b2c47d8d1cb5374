"""Copy bytes from source files into one new file: streamed, hashed, read back from the disk, and resumable.

A plan says which bytes go where. They pass in windows of 12 MiB: a window is read from the sources, written,
read back from the disk and compared, while other threads compute the SHA-256 and read the next one. The bytes
grow in ``.X.part`` beside the output ``X``, which gets its name at the very end.

A copy that only reads its sources trusts nothing that it finds on the disk: when it resumes after a kill, it
compares what is there with the sources. A copy that consumes its sources gives the bytes of a window back to
the file system (it punches a hole) after the window came back right from the disk and ``.X.journal`` has its
hash. When it resumes, a window counts as copied only if the journal has its hash, the part has these bytes,
*and* the sources have holes there. So bytes that still exist are copied again, whatever a journal has.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

import xxhash

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import IntegrityError, OutputError
from dfqs_nb.core.files import fsync_dir, parse_json
from dfqs_nb.gguf.header import MAGIC, padded
from dfqs_nb.gguf.shards import ShardSet
from dfqs_nb.merge import disk
from dfqs_nb.merge.disk import Identity, Part, SourceFile

GGUF_VERSION = 3
U16 = 2  # the format's code of the value type
MAX_WINDOW_BYTES = 256 << 20
TORN_SECONDS = 60  # how long after the last line a punched hole may still have changed a file's time
WINDOW_BYTES = 12 << 20  # in a consuming copy at most two windows are on the disk twice
N_BUFFERS = 4  # one is filled, one hashed, two written
Event = dict[str, Any]  # a line of the journal


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes of one tensor: where they are, and where they go.

    ``source`` is the index of the source file; both offsets are from the start of a file. ``padding`` zero
    bytes follow in the target; in the source at most as many lie between two copies.
    """

    name: str
    source: int
    source_offset: int
    target_offset: int
    nbytes: int
    padding: int = 0


@dataclass(frozen=True)
class Plan:
    """What a copy writes: ``header``, then each copy in order, ``nbytes`` in all.

    ``identities`` are those of the sources when the plan was made.
    """

    sources: tuple[Path, ...]
    header: bytes = field(repr=False)
    copies: tuple[Copy, ...] = field(repr=False)
    nbytes: int
    identities: tuple[Identity, ...] = field(repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the result but the data itself."""
        shape = repr((self.nbytes, len(self.sources), [astuple(copy) for copy in self.copies]))
        return hashlib.sha256(self.header + shape.encode("utf-8", "surrogatepass")).hexdigest()


def overlaps(copies: Sequence[Copy], start: int, nbytes: int) -> Iterator[tuple[Copy, int, int]]:
    """Those of the copies, in the target's order, that reach into a window, and which of their bytes do.

    Of a copy that has only padding there the range is empty.
    """
    first = bisect_right(copies, start, key=attrgetter("target_offset")) - 1
    for run in copies[max(first, 0) :]:
        low, high = max(start - run.target_offset, 0), start + nbytes - run.target_offset
        if high <= 0:
            return
        if low < run.nbytes + run.padding:
            yield run, low, max(low, min(high, run.nbytes))


def identities(paths: Iterable[Path]) -> tuple[Identity, ...]:
    """Name, size in bytes and modification time (ns) of each file."""
    stats = [(path, path.stat()) for path in paths]
    return tuple({"name": path.name, "nbytes": s.st_size, "mtime_ns": s.st_mtime_ns} for path, s in stats)


def plan_merge(shards: ShardSet) -> Plan:
    """Lay out the merged file: shard 1's fields, but ``split.count`` = 0 at the end; then all tensors."""
    first, sources = shards.headers[0], tuple(dict.fromkeys(shards.paths))
    tables, copies, offset = [], [], 0
    for header in shards.headers:
        for tensor in header.tensors:
            step = padded(tensor.nbytes, first.alignment)
            start, number = header.data_offset + tensor.offset, sources.index(header.path)
            shape, name = list(tensor.shape), tensor.name.encode()
            while len(shape) > 1 and shape[-1] == 1:  # trailing dimensions of 1 are dropped, as ggml does
                shape.pop()
            row = (len(name), name, len(shape), *shape, tensor.type_code, offset)
            tables.append(struct.pack(f"<Q{len(name)}sI{len(shape)}qIQ", *row))
            copies.append(Copy(tensor.name, number, start, offset, tensor.nbytes, step - tensor.nbytes))
            offset += step
    kept = [first.raw[slice(*field.record)] for name, field in first.fields.items() if name != "split.count"]
    key = b"split.count"
    kept.append(struct.pack("<Q", len(key)) + key + struct.pack("<IH", U16, 0))
    head = MAGIC + struct.pack("<IQQ", GGUF_VERSION, len(tables), len(kept)) + b"".join(kept + tables)
    head += bytes(padded(len(head), first.alignment) - len(head))
    moved = tuple(replace(copy, target_offset=len(head) + copy.target_offset) for copy in copies)
    return Plan(sources, head, moved, len(head) + offset, identities(sources))


class NameTaken(OutputError):
    """Another file took the output's name during the copy."""


class Run:
    """One pass over all windows of a plan; ``own_files``: what may go if it fails without a proven window."""

    def __init__(self, plan: Plan, output: Path, consume: bool) -> None:
        self.plan, self.output, self.consume, self.own_files = plan, output, consume, set[Path]()
        self.journal: Journal | None = None
        self.blocked, self.window = False, WINDOW_BYTES

    def open(self, stack: ExitStack) -> None:
        """Open and lock all files until ``stack`` closes them."""
        plan, part, place = self.plan, disk.part_path(self.output), disk.journal_path(self.output)
        own = stack.enter_context(disk.open_own(part))
        disk.lock_part(own, self.output)
        self.part = Part(own)
        if not self.part.size:  # it is new; until the journal is read, any other may hold what sources lack
            self.own_files.add(part)
        if not self.consume and (earlier := read_journal(self.output)):
            if windows(earlier):
                raise in_the_way(place)
            place.unlink()  # of a consuming copy that was killed before its first window
        self.sources = [
            SourceFile(path, stack.enter_context(disk.open_locked(path, alone=self.consume)), identity)
            for path, identity in zip(plan.sources, plan.identities, strict=True)
        ]
        if self.consume:
            file = stack.enter_context(disk.open_own(place))
            self.own_files.add(place)
            self.journal = Journal(file, plan, self.sources)
            self.window = self.journal.window
        self.own_files.add(part)
        for source in self.sources:
            source.check()
        fsync_dir(self.output.parent)

    def copy(self) -> tuple[str, dict[str, str], tuple[Identity, ...]]:
        """Copy every window; some are hashed and written while the next is read.

        Returns SHA-256, XXH64 by tensor, and what the sources were.
        """
        plan, sha256 = self.plan, hashlib.sha256()
        digests = {copy.name: xxhash.xxh64() for copy in plan.copies}
        buffers = [disk.buffer(self.window) for _ in range(N_BUFFERS)]
        jobs: list[list[Future[None]]] = [[] for _ in buffers]  # that still need a buffer's bytes
        with (
            ThreadPoolExecutor(1) as hasher,
            ThreadPoolExecutor(1 if self.journal else 2) as writer,
            tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="merge") as bar,
        ):
            for number, start in enumerate(range(0, plan.nbytes, self.window)):
                turn = number % N_BUFFERS
                for job in jobs[turn]:
                    job.result()
                view = buffers[turn][: min(self.window, plan.nbytes - start)]
                copied = self._load(view, start)
                keep = writer.submit(self._keep, view, start, copied)
                jobs[turn] = [hasher.submit(sha256.update, view), keep]
                for run, low, high in overlaps(plan.copies, start, len(view)):
                    at = run.target_offset - start
                    digests[run.name].update(view[at + low : at + high])
                bar.update(len(view))
            for job in (job for pair in jobs for job in pair):
                job.result()
        self.part.finish(plan.nbytes)
        hashes = {name: digest.hexdigest() for name, digest in digests.items()}
        return sha256.hexdigest(), hashes, tuple(source.identity for source in self.sources)

    def _load(self, view: memoryview, start: int) -> bool:
        """Fill a window; true: from the part file, because its sources were given back."""
        end, runs = start + len(view), list(overlaps(self.plan.copies, start, len(view)))
        if self.journal is not None and not all(
            disk.stores(self.sources[run.source].handle, run.source_offset + low, run.source_offset + high)
            for run, low, high in runs
        ):
            whole = self.part.read(view, start) == len(view)
            if whole and xxhash.xxh3_64_hexdigest(view) == self.journal.windows.get(end):
                return True
            what = f"the sources have holes where bytes {start:,} to {end:,} come from, and their copy, or "
            what += "its journal, was changed or lost meanwhile"
            hint = "put both back, if you can, and run this again; or download the sources again"
            raise IntegrityError(what, where=self.part.path, hint=hint)
        view[: max(len(self.plan.header) - start, 0)] = self.plan.header[start:end]
        for run, low, high in runs:
            at = run.target_offset - start
            self.sources[run.source].read(view[at + low : at + high], run.source_offset + low, run.name)
            if high >= run.nbytes:
                padding = view[at + high : at + run.nbytes + run.padding]
                padding[:] = bytes(len(padding))
        return False

    def _keep(self, view: memoryview, start: int, copied: bool) -> None:
        """Write a window, prove it, record it, and only then release what it was made from.

        Windows that have a journal come in order. After a failure none is written any more, so nothing more
        is released.
        """
        journal, end = self.journal, start + len(view)
        if journal is None:
            if not self.part.has(view, start):
                self._write(view, start)
            return
        if self.blocked:
            return
        self.blocked = True  # an exception below leaves it set: no later window may release a byte
        if not copied:
            journal.add({"end": end, "xxh3": self._write(view, start)}, durable=True)
        earlier = copied and end <= journal.released
        for run, low, high in overlaps(self.plan.copies, start, len(view)):
            if low < high:
                gap = run.padding if high == run.nbytes else 0
                first, last = run.source_offset + low, run.source_offset + high
                self.sources[run.source].release(first, last, gap, earlier)
        if not earlier:
            journal.add({"released": end})
        self.blocked = False

    def _write(self, view: memoryview, start: int) -> str:
        """Write a window, compare it with what the disk gives back, and return its hash."""
        digest = xxhash.xxh3_64_hexdigest(view)
        self.part.write(view, start)
        back = self.part.from_disk(start, len(view), flush=self.journal is not None)
        if xxhash.xxh3_64_hexdigest(back) != digest:
            what = f"bytes {start:,} to {start + len(view):,} came back from the disk changed"
            raise IntegrityError(what, where=self.part.path, hint="the disk or the memory is failing")
        return digest

    def check_sources(self) -> None:
        """Raise `IntegrityError` if a source was changed, or replaced, while it was read."""
        for source in self.sources:
            source.check()
            if not disk.is_at(source.handle, source.path.resolve()):  # it may be a link
                raise disk.changed(source.path)

    def give_name(self, replace: bool) -> None:
        """Give the part file its name, if nobody changed it; ``replace``: from a file that has the name."""
        output = self.output
        self.part.check(self.plan.nbytes)
        try:
            if replace:
                self.part.path.replace(output)
            else:
                disk.rename_new(self.part.path, output)
        except FileExistsError:
            hint = f"the result is {self.part.path.name}: move the other file away and run the command again"
            raise NameTaken("another file took this name meanwhile", where=output, hint=hint) from None
        fsync_dir(output.parent)


class Journal:
    """The journal of one plan, open: what is proven, and whose bytes were given back.

    One JSON line an event: the plan, its ``window`` in bytes and its sources; ``end`` and ``xxh3`` (XXH3-64)
    of each window that is on the disk and proven; ``released``, when its source bytes were given back. A torn
    last line counts as never written. `core.journal` is for rows in any order whose loss costs time. Here a
    line must be on the disk before bytes go.

    Releasing bytes changes a file's time, which is set back at once. A kill between the two shows as a window
    without its ``released`` line: then a time soon after that line is the release's own. Any other change of
    a source is an `IntegrityError`, and so is another plan's journal that is not finished.
    """

    def __init__(self, file: IO[bytes], plan: Plan, sources: Sequence[SourceFile]) -> None:
        self.file, written_ns = file, os.fstat(file.fileno()).st_mtime_ns
        lines, nbytes = _events(file.read())
        self.windows = windows(lines)  # the hash of each that an earlier run did, by its end
        if not self.windows:
            lines, nbytes = [], 0
        identities = [source.identity for source in sources]
        new: Event = {"plan": plan.fingerprint, "window": WINDOW_BYTES, "sources": identities}
        head = lines[0] if lines else new
        self.window, recorded = _checked_head(head, plan, Path(file.name))
        # up to where in the target the earlier run gave the source bytes back
        self.released = max((n for line in lines if type(n := line.get("released")) is int), default=0)
        was_releasing = bool(lines) and "end" in lines[-1]
        for source, then in zip(sources, recorded, strict=True):
            if was_releasing:
                _restore_time(source, then, written_ns)
            if source.identity != then:
                raise disk.changed(source.path)
        file.truncate(nbytes)
        file.seek(nbytes)
        if not lines:
            self.add(new, durable=True)

    def add(self, event: Event, *, durable: bool = False) -> None:
        """Append a line; ``durable``: and wait until it is on the disk."""
        rest = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        while rest:  # a disk that is almost full may take a part of a line
            rest = rest[self.file.write(rest) :]
        if durable:
            os.fsync(self.file.fileno())


def _checked_head(head: Event, plan: Plan, journal: Path) -> tuple[int, list[Any]]:
    """The window in bytes and the sources of a journal's first line, if it is of this plan."""
    window, sources = head.get("window"), head.get("sources")
    # not `isinstance`: JSON's `true` is an int in Python, and bytes are deleted on this file's word
    sized = type(window) is int and 0 < window <= MAX_WINDOW_BYTES and not window % mmap.PAGESIZE
    whole = isinstance(sources, list) and len(sources) == len(plan.sources)
    if not (sized and whole) or head.get("plan") != plan.fingerprint:
        raise in_the_way(journal)
    return head["window"], head["sources"]


def _restore_time(source: SourceFile, then: Any, written_ns: int) -> None:
    """Set the time back that a release changed, if the kill came between the two: see `Journal`."""
    before, now = then.get("mtime_ns") if isinstance(then, dict) else None, source.identity["mtime_ns"]
    if type(before) is int and before < int(now) <= written_ns + TORN_SECONDS * 10**9:
        source.set_time(before)


def read_journal(output: Path) -> list[Event]:
    """The events recorded for ``output``; empty without a journal."""
    try:
        with disk.open_own(disk.journal_path(output), create=False) as file:
            return _events(file.read())[0]
    except FileNotFoundError:
        return []


def windows(lines: Sequence[Event]) -> dict[int, str]:
    """The hash of each window that a journal's events record, by the window's end."""
    done = [line for line in lines[1:] if type(line.get("end")) is int and type(line.get("xxh3")) is str]
    return {line["end"]: line["xxh3"] for line in done}


def _events(raw: bytes) -> tuple[list[Event], int]:
    """The events up to the first line that is none, and where they end."""
    events, end = list[Event](), 0
    for line in raw.split(b"\n")[:-1]:
        try:
            event = parse_json(line)
        except ValueError:
            break
        if not isinstance(event, dict):
            break
        events.append(event)
        end += len(line) + 1
    return events, end


def in_the_way(journal: Path) -> IntegrityError:
    """The error for a copy that would overwrite an unfinished one that consumes its sources."""
    hint = "finish it first, by its own command with --consume (repair: --in-place): its part file holds "
    hint += "what the sources no longer have. Remove both only if all sources are whole"
    return IntegrityError("an unfinished consuming merge is in the way", where=journal, hint=hint)
