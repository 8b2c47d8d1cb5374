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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import xxhash

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import IntegrityError, OutputError
from dfqs_nb.core.files import fsync_dir, parse_json
from dfqs_nb.merge import disk
from dfqs_nb.merge.disk import Identity, Part, SourceFile
from dfqs_nb.merge.plan import Plan

MAX_WINDOW_BYTES = 256 << 20
TORN_SECONDS = 60  # how long after the last line a punched hole may still have changed a file's time
WINDOW_BYTES = 12 << 20  # in a consuming copy at most two windows are on the disk twice
N_BUFFERS = 3  # one is filled, one hashed, one written
FAILING = "power was lost, or the disk or the memory is failing"
Event = dict[str, Any]  # a line of the journal
Copied = tuple[str, dict[str, str], tuple[Identity, ...]]  # SHA-256, XXH64 by tensor, what the sources were


class _NameTaken(OutputError):
    """Another file took the output's name during the copy."""


def copy(
    plan: Plan,
    output: Path,
    accept: Callable[[Path], None],
    record: Callable[[Path, Copied], None],
    *,
    consume: bool = False,
    replace: bool = False,
    progress: bool = True,
) -> None:
    """Carry out ``plan`` into ``output``, or resume a run that was killed; errors as `merge_model`.

    Before the complete part file gets its name, ``accept`` checks it and ``record`` keeps its hashes. When
    the copy fails, a consuming one keeps its part file, which holds bytes that the sources no longer have.
    Any other removes it, unless a person stopped it, or it is complete and its name is taken. ``replace``:
    take the name from a file that has it.
    """
    part, journal = disk.part_path(output), disk.journal_path(output)
    ours: list[Path] = []  # what this call opened, and may remove when it fails
    left = "run the same command again to resume" if consume else "the partial output was removed"
    with disk.readable_errors(output, plan.nbytes, left), disk.only_writer(output):
        try:
            with ExitStack() as stack:
                run = _Run(plan, output, consume, stack, ours)
                copied = run.copy(progress)
                accept(part)
                run.check_sources()
                record(part, copied)
                run.part.check(plan.nbytes)
                _give_name(part, output, replace)
        except (KeyboardInterrupt, SystemExit, _NameTaken):
            raise
        except BaseException as error:
            if journal not in ours or not windows(read_journal(output)):
                for path in ours:
                    path.unlink(missing_ok=True)
            elif isinstance(error, IntegrityError):
                hint = f"nothing more was released; keep {part.name}: it has what the sources lack now"
                raise IntegrityError(error.what, where=error.where, hint=f"{hint}. {error.hint}") from error
            raise
        if consume:
            for path in plan.sources:
                if path != output:
                    path.unlink(missing_ok=True)
            journal.unlink()


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
    """One pass over all windows of a plan; ``stack`` closes its files, and ``ours`` gets their names."""

    read_back = True  # a benchmark measures what it costs

    def __init__(self, plan: Plan, output: Path, consume: bool, stack: ExitStack, ours: list[Path]) -> None:
        def opened(path: Path) -> IO[bytes]:
            file = stack.enter_context(disk.open_own(path))
            ours.append(path)
            return file

        journal = disk.journal_path(output)
        if not consume and (earlier := read_journal(output)):
            if windows(earlier):
                raise in_the_way(journal)
            journal.unlink()  # of a consuming copy that was killed before its first window
        self.plan, self.failed = plan, False
        self.journal = Journal(opened(journal), plan, WINDOW_BYTES) if consume else None
        self.part = Part(opened(disk.part_path(output)))
        self.sources = [
            SourceFile(path, stack.enter_context(disk.open_locked(path, alone=consume)), identity)
            for path, identity in zip(plan.sources, plan.identities, strict=True)
        ]
        self.window, self.done, self.released = WINDOW_BYTES, dict[int, str](), 0
        if self.journal is not None:
            self.journal.begin(self.sources)
            self.window, self.released = self.journal.window, self.journal.released
            self.done = self.journal.windows
        for source in self.sources:
            source.check()
        fsync_dir(output.parent)

    def copy(self, progress: bool) -> Copied:
        """Copy every window, in order; one is hashed and written while the next is read."""
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
                keep = writer.submit(self._keep, view, start, copied)
                jobs[turn] = [hasher.submit(sha256.update, view), keep]
                for tensor, low, high in self.plan.within(self.plan.tensors, start, len(view)):
                    at = tensor.target_offset - start
                    digests[tensor.name].update(view[at + low : at + high])
                bar.update(len(view))
            for job in (job for pair in jobs for job in pair):
                job.result()
        self.part.finish(total)
        hashes = {name: digest.hexdigest() for name, digest in digests.items()}
        return sha256.hexdigest(), hashes, tuple(source.identity for source in self.sources)

    def _load(self, view: memoryview, start: int) -> bool:
        """Fill a window; true: from the part file, because its sources were given back."""
        end, runs = start + len(view), list(self.plan.within(self.plan.copies, start, len(view)))
        if self.journal is not None and not all(
            self.sources[run.source].stores(run.source_offset + low, run.source_offset + high)
            for run, low, high in runs
        ):
            if end in self.done:
                if self.part.read(view, start) < len(view):
                    what = f"is {end - self.part.size:,} bytes shorter than its journal says"
                    hint = "it was cut or removed meanwhile: put it back, if you can, and run this again"
                    raise IntegrityError(what, where=self.part.path, hint=hint)
                if xxhash.xxh3_64_hexdigest(view) != self.done[end]:
                    what = f"bytes {start:,} to {end:,} changed since they were written"
                    raise IntegrityError(what, where=self.part.path, hint=FAILING)
                return True
            what = f"the sources have holes where bytes {start:,} to {end:,} come from"
            hint = "the journal that belongs to them was lost: download the sources again"
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

        Windows come in order. After a failure none is written any more, so nothing more is released.
        """
        if self.failed:
            return
        self.failed = True  # until this window is through
        end, consume = start + len(view), self.journal is not None
        copied = copied or (not consume and self.part.has(view, start))
        if not copied:
            digest = xxhash.xxh3_64_hexdigest(view)
            self.part.write(view, start)
            back = self.part.from_disk(start, len(view), flush=consume) if self.read_back else view
            if xxhash.xxh3_64_hexdigest(back) != digest:
                what = f"bytes {start:,} to {end:,} came back from the disk changed"
                raise IntegrityError(what, where=self.part.path, hint=FAILING)
            if self.journal is not None:
                self.journal.add({"end": end, "xxh3": digest}, durable=True)
        if self.journal is not None:
            self._release(self.journal, start, end, copied and end <= self.released)
        self.failed = False

    def _release(self, journal: Journal, start: int, end: int, earlier: bool) -> None:
        for run, low, high in self.plan.within(self.plan.copies, start, end - start):
            if low < high:
                gap = run.padding if high == run.nbytes else 0
                first, last = run.source_offset + low, run.source_offset + high
                self.sources[run.source].release(first, last, gap, earlier)
        if not earlier:
            journal.add({"released": end})

    def check_sources(self) -> None:
        """Raise `IntegrityError` if a source was changed, or replaced, while it was read."""
        for source in self.sources:
            source.check()
            if not (source.path.exists() and os.path.samestat(source.path.stat(), os.fstat(source.handle))):
                raise disk.changed(source.path)


# ---- the journal of a consuming copy ----


class Journal:
    """The journal of one plan, open: what is proven, and whose bytes were given back.

    One JSON line an event: the plan, its ``window`` in bytes and its sources; ``end`` and ``xxh3`` (XXH3-64)
    of each window that is on the disk and proven; ``released``, when its source bytes were given back. A torn
    last line counts as never written. `core.journal` is for rows in any order whose loss costs time. Here a
    line must be on the disk before bytes go. `IntegrityError`: another plan's journal, and unfinished.
    """

    def __init__(self, file: IO[bytes], plan: Plan, window: int) -> None:
        self.file, self.path, self.plan, self.window = file, Path(file.name), plan, window
        self.written_ns = os.fstat(file.fileno()).st_mtime_ns
        self.lines, self.nbytes = _events(file.read())
        self.windows = windows(self.lines)  # the hash of each that an earlier run did, by its end
        self.released = 0  # up to where in the target that run gave the source bytes back
        if not self.windows:
            self.lines, self.nbytes = [], 0
            return
        self.released = max((n for line in self.lines if type(n := line.get("released")) is int), default=0)
        earlier, same = self.lines[0].get("window"), self.lines[0].get("plan") == plan.fingerprint
        if not (same and type(earlier) is int and 0 < earlier <= MAX_WINDOW_BYTES) or earlier % mmap.PAGESIZE:
            raise in_the_way(self.path)
        self.window = earlier

    def begin(self, sources: Sequence[disk.SourceFile]) -> None:
        """Write the first line, or resume where an earlier run ended.

        Releasing bytes changes a file's time, which is set back at once. A kill between the two shows as a
        window without its ``released`` line: then a time soon after that line is the release's own. Any other
        change of a source is an `IntegrityError`.
        """
        recorded = self.lines[0].get("sources") if self.lines else [source.identity for source in sources]
        if not isinstance(recorded, list) or len(recorded) != len(sources):
            raise in_the_way(self.path)
        for source, then in zip(sources, recorded, strict=True):
            mtime, now = then.get("mtime_ns") if isinstance(then, dict) else None, source.identity["mtime_ns"]
            torn = self.lines and "end" in self.lines[-1]
            if torn and type(mtime) is int and mtime < int(now) <= self.written_ns + TORN_SECONDS * 10**9:
                source.set_time(mtime)
            if source.identity != then:
                raise disk.changed(source.path)
        self.file.truncate(self.nbytes)
        self.file.seek(self.nbytes)
        if not self.lines:
            head = {"plan": self.plan.fingerprint, "window": self.window, "sources": recorded}
            self.add(head, durable=True)

    def add(self, event: Event, *, durable: bool = False) -> None:
        """Append a line; ``durable``: and wait until it is on the disk."""
        rest = line_of(event)
        while rest:  # a disk that is almost full may take a part of a line
            rest = rest[self.file.write(rest) :]
        self.lines.append(event)
        if durable:
            os.fsync(self.file.fileno())


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
    events: list[Event] = []
    end = 0
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


def line_of(event: Event) -> bytes:
    """An event as it is written."""
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def in_the_way(journal: Path) -> IntegrityError:
    """The error for a copy that would overwrite an unfinished one that consumes its sources."""
    hint = "finish it with the same command first: its part file holds what the sources no longer have. "
    hint += "Remove both only if all sources are whole"
    return IntegrityError("an unfinished consuming merge is in the way", where=journal, hint=hint)
