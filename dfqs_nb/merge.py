"""Merge the shards of a model into one GGUF, streaming, verified, and whole or not at all.

The result is the file that llama.cpp's ``llama-gguf-split --merge`` writes, byte for byte: shard 1's
metadata with ``split.count`` set to 0 (which moves that field to the end), the tensor tables of all
shards one after another, then every tensor's bytes, each padded to the alignment. Where that tool holds a
whole tensor in memory, overwrites nothing but also checks nothing, this module streams through a few
buffers, computes the SHA-256 of the result on the way, and reads the result back from the disk.

One difference: for a model whose alignment is not 32 bytes the reference tool pads to 32 nevertheless, and
llama.cpp then refuses its output; this module pads to the model's own alignment.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import xxhash
from tqdm.auto import tqdm

from dfqs_nb import ggml
from dfqs_nb.errors import IntegrityError, OutputError, SpaceError
from dfqs_nb.gguf_header import MAGIC, GGUFHeader, Tensor, check_layout, padded, read_header
from dfqs_nb.paths import fsync_dir, write_json
from dfqs_nb.shards import ShardSet, open_shards

if TYPE_CHECKING:
    import pandas as pd

GGUF_VERSION = 3
CHUNK_BYTES = 4 << 20
N_BUFFERS = 4
FLUSH_BYTES = 128 << 20
_TYPE_U16 = 2


@dataclass(frozen=True, slots=True)
class Copy:
    """One tensor's way into the merged file; offsets are bytes from the start of each file."""

    name: str
    shard: int
    source_offset: int
    target_offset: int
    nbytes: int
    padding: int


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write: the header's bytes, then each copy, in order; ``nbytes`` in all."""

    shards: ShardSet
    header: bytes
    copies: tuple[Copy, ...]
    nbytes: int


@dataclass(frozen=True)
class MergeResult:
    """A merged model that passed every check.

    Attributes:
        path: the merged file.
        nbytes: its size in bytes.
        sha256: SHA-256 of the whole file, from the bytes as they were written.
        tensors: XXH64 of each tensor's bytes, as ``llama-gguf-hash`` prints it: the same in shard and file.
        sources: name, size in bytes and modification time (ns) of each shard.
        seconds: wall time of the merge.
        reused: an earlier merge of the same shards was found, and nothing was done.
    """

    path: Path
    nbytes: int
    sha256: str
    tensors: dict[str, str]
    sources: tuple[dict[str, int | str], ...]
    seconds: float
    reused: bool = False


def plan_merge(shards: ShardSet) -> MergePlan:
    """Lay out the merged file. Reads nothing and writes nothing."""
    first = shards.headers[0]
    copies, tables, offset = [], [], 0
    for number, header in enumerate(shards.headers):
        for tensor in header.tensors:
            step = padded(tensor.nbytes, first.alignment)
            tables.append(_tensor_record(tensor, offset))
            copies.append((tensor.name, number, header.data_offset + tensor.offset, offset, tensor.nbytes,
                           step - tensor.nbytes))
            offset += step
    head = _merged_fields(first, len(tables)) + b"".join(tables)
    head += bytes(padded(len(head), first.alignment) - len(head))
    moved = tuple(Copy(name, shard, source, len(head) + target, nbytes, padding)
                  for name, shard, source, target, nbytes, padding in copies)
    return MergePlan(shards, head, moved, len(head) + offset)


def _merged_fields(first: GGUFHeader, n_tensors: int) -> bytes:
    """Preamble and metadata: shard 1's fields as they are, but ``split.count`` = 0 at the end."""
    kept = [first.raw[slice(*field.record)] for name, field in first.fields.items() if name != "split.count"]
    key = b"split.count"
    kept.append(struct.pack("<Q", len(key)) + key + struct.pack("<IH", _TYPE_U16, 0))
    return MAGIC + struct.pack("<IQQ", GGUF_VERSION, n_tensors, len(kept)) + b"".join(kept)


def _tensor_record(tensor: Tensor, offset: int) -> bytes:
    """A row of the tensor table; trailing dimensions of 1 are dropped, as ggml does."""
    shape = list(tensor.shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    name = tensor.name.encode()
    return struct.pack(f"<Q{len(name)}sI{len(shape)}qIQ", len(name), name, len(shape), *shape,
                       tensor.type_code, offset)


def merge(model: str | Path | Sequence[str | Path], output: str | Path, *, overwrite: bool = False,
          read_back: bool = True, progress: bool = True, allow_mixed: bool = False) -> MergeResult:
    """Merge the shards of ``model`` into the single file ``output``.

    Memory stays under some 30 MB whatever the largest tensor. The output appears under its name only after
    its header was accepted by this package's reader and by llama.cpp's own parser, and each tensor, read
    back from the disk, has the hash that it has in its shard. A sidecar ``<output>.manifest.json`` keeps
    the hashes. The shards are only read.

    Args:
        model: any one shard, or all of them in any order.
        overwrite: replace an existing output (which stays until the new one is proven).
        read_back: read the result from the disk again and compare; without it only what was read and
            handed to the operating system is known.
        allow_mixed: see ``open_shards``.

    Raises:
        HeaderError, LayoutError, ShardError: the shards are not sound, or not one set.
        OutputError: the output exists, is one of the shards, or cannot be written there.
        SpaceError: the disk has too little room, found before or on the way.
        IntegrityError: a shard changed or ended while it was read, or the disk gave back other bytes.
    """
    began = time.perf_counter()
    output = Path(output)
    plan = plan_merge(open_shards(model, allow_mixed=allow_mixed))
    check_output(output, plan, overwrite)
    before = _identities(plan.shards.paths)
    with _part_file(output, plan.nbytes) as part:
        sha256, tensors = _copy(plan, part, read_back, progress)
        validate(Path(part.name), plan)
        if _identities(plan.shards.paths) != before:
            raise IntegrityError("a shard changed while it was merged", where=plan.shards.paths[0].parent,
                                 hint="merge again when the files are at rest")
        os.replace(part.name, output)
    fsync_dir(output.parent)
    result = MergeResult(output, plan.nbytes, sha256, tensors, before, time.perf_counter() - began)
    write_json(manifest_path(output), manifest(result))
    return result


def ensure_merged(model: str | Path | Sequence[str | Path], output: str | Path, *, fresh: bool = False,
                  **options: bool) -> MergeResult:
    """``merge``, unless ``output`` is already the merge of these shards as they are now.

    It is when its manifest names the same shards (name, size, modification time) and the output has the
    size and the time that the manifest says. A model in a single file needs no merge, and gets one only
    in the sense that the result is a checked copy.

    Raises:
        As ``merge``.
    """
    output = Path(output)
    shards = open_shards(model, allow_mixed=options.get("allow_mixed", False))
    found = None if fresh else _earlier(output, shards)
    return found or merge(model, output, overwrite=True, **options)


def _earlier(output: Path, shards: ShardSet) -> MergeResult | None:
    try:
        kept = json.loads(manifest_path(output).read_text(encoding="utf-8"))
        stat = output.stat()
    except (OSError, ValueError):
        return None
    same = (kept.get("sources") == list(_identities(shards.paths))
            and (kept.get("nbytes"), kept.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns))
    if not same:
        return None
    return MergeResult(output, kept["nbytes"], kept["sha256"], kept["tensors"], tuple(kept["sources"]),
                       kept["seconds"], reused=True)


def manifest_path(output: Path) -> Path:
    """Where the hashes of ``output`` are kept: beside it."""
    return output.with_name(output.name + ".manifest.json")


def manifest(result: MergeResult) -> dict[str, Any]:
    """The result as plain values, without the folder it lies in."""
    kept = {name: value for name, value in asdict(result).items() if name not in ("path", "reused")}
    return {"file": result.path.name, "mtime_ns": result.path.stat().st_mtime_ns, **kept}


def segments(plan: MergePlan, output_name: str) -> pd.DataFrame:
    """Where the bytes of shards and result lie, for a figure.

    One row a piece: ``file``, ``part`` (``header`` or ``data of shard N``), ``start`` and ``nbytes``.
    """
    import pandas as pd

    rows, position = [], len(plan.header)
    for number, header in enumerate(plan.shards.headers, 1):
        name, data = header.path.name, header.data_nbytes
        rows.append((name, "header", 0, header.data_offset))
        rows.append((name, f"data of shard {number}", header.data_offset, data))
    rows.append((output_name, "header", 0, len(plan.header)))
    for number, header in enumerate(plan.shards.headers, 1):
        rows.append((output_name, f"data of shard {number}", position, header.data_nbytes))
        position += header.data_nbytes
    return pd.DataFrame(rows, columns=["file", "part", "start", "nbytes"])


def check_output(output: Path, plan: MergePlan, overwrite: bool = False) -> None:
    """Check, before the first byte, that ``output`` may be written and that the disk holds it.

    Raises:
        OutputError, SpaceError: see ``merge``.
    """
    if output.exists():
        if any(output.samefile(path) for path in plan.shards.paths):
            raise OutputError("is one of the shards that would be merged into it", where=output,
                              hint="choose another name for the output")
        if not overwrite:
            raise OutputError("exists already", where=output,
                              hint="choose another name, or pass overwrite=True")
    if not output.parent.is_dir():
        raise OutputError("the folder does not exist", where=output.parent, hint="make it first")
    free = shutil.disk_usage(output.parent).free
    if free < plan.nbytes:
        raise SpaceError(f"needs {plan.nbytes:,} bytes and {free:,} are free", where=output.parent,
                         hint=f"free {plan.nbytes - free:,} bytes, or write to another disk")


@contextmanager
def _part_file(output: Path, nbytes: int) -> Iterator[IO[bytes]]:
    """The file that becomes ``output``: locked while it is written, gone if that fails."""
    path = output.with_name(f".{output.name}.part")
    try:
        with path.open("w+b" if not path.exists() else "r+b", buffering=0) as part:
            _lock(part, output)
            try:
                part.truncate(0)
                yield part
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _translated(error, output, nbytes) from error


def _lock(part: IO[bytes], output: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks
        return
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError("another process is writing it", where=output,
                          hint="wait for it, or choose another name") from None


def _translated(error: OSError, output: Path, nbytes: int) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SpaceError(f"the disk filled up while {nbytes:,} bytes were written ({error.strerror}); "
                          "the partial output was removed", where=output,
                          hint="free that much, or write to another disk")
    return OutputError(f"cannot be written ({error.strerror})", where=output,
                       hint="choose a folder you may write")


def _identities(paths: Sequence[Path]) -> tuple[dict[str, int | str], ...]:
    stats = [(path, path.stat()) for path in paths]
    return tuple({"name": path.name, "nbytes": s.st_size, "mtime_ns": s.st_mtime_ns} for path, s in stats)


def _copy(plan: MergePlan, part: IO[bytes], read_back: bool, progress: bool) -> tuple[str, dict[str, str]]:
    """Stream every byte into ``part``; reading, hashing, writing and reading back overlap."""
    with ExitStack() as stack:
        sources = [stack.enter_context(path.open("rb", buffering=0)) for path in plan.shards.paths]
        bar = stack.enter_context(tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="merge",
                                       disable=not progress))
        writer = stack.enter_context(_Writer(part, bar, read_back))
        writer.write(plan.header)
        for copy in plan.copies:
            _copy_tensor(copy, sources[copy.shard], writer)
        return writer.finish()


def _copy_tensor(copy: Copy, source: IO[bytes], writer: _Writer) -> None:
    digest, done = xxhash.xxh64(), 0
    while done < copy.nbytes:
        buffer = writer.buffer()
        want = min(CHUNK_BYTES, copy.nbytes - done)
        view = memoryview(buffer)[:want]
        _read_into(source, view, copy.source_offset + done, copy.name)
        digest.update(view)
        writer.submit(view)
        done += want
    if copy.padding:
        writer.write(bytes(copy.padding))
    writer.tensor_done(copy, digest.hexdigest())


def _read_into(source: IO[bytes], view: memoryview, offset: int, name: str) -> None:
    got = 0
    while got < len(view):
        try:
            n = os.preadv(source.fileno(), [view[got:]], offset + got)
        except OSError as error:
            raise IntegrityError(f"tensor {name!r} cannot be read ({error.strerror})", where=source.name,
                                 hint="the disk may be failing: copy or download the shard again") from error
        if n == 0:
            raise IntegrityError(f"ended inside tensor {name!r}", where=source.name,
                                 hint="it was cut off or changed while it was merged: download it again")
        got += n


class _Writer:
    """Writes a stream to a file while other threads hash it and read it back.

    One thread writes, one computes the SHA-256 of the stream, and one follows behind: whenever
    ``FLUSH_BYTES`` have been written it flushes them to the disk, drops them from the page cache, reads
    the finished tensors again and compares their hashes. Buffers are reused once written and hashed.
    """

    def __init__(self, part: IO[bytes], bar: tqdm, read_back: bool) -> None:
        self.part, self.bar, self.read_back = part, bar, read_back
        self.position = self.flushed = 0
        self.sha256 = hashlib.sha256()
        self.tensors: dict[str, str] = {}
        self.unchecked: list[Copy] = []
        self.buffers = [bytearray(CHUNK_BYTES) for _ in range(N_BUFFERS)]
        self.busy: list[list[Future]] = [[] for _ in self.buffers]
        self.turn = -1
        self.checks: list[Future] = []

    def __enter__(self) -> _Writer:
        self.write_pool, self.hash_pool, self.check_pool = (ThreadPoolExecutor(1) for _ in range(3))
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self.write_pool, self.hash_pool, self.check_pool):
            pool.shutdown(cancel_futures=True)

    def buffer(self) -> bytearray:
        """The next buffer, once what it held is written and hashed."""
        self.turn = (self.turn + 1) % len(self.buffers)
        self._settle(self.turn)
        return self.buffers[self.turn]

    def _settle(self, turn: int) -> None:
        for future in self.busy[turn]:
            future.result()
        self.busy[turn] = []

    def submit(self, view: memoryview) -> None:
        """Queue the current buffer's bytes, which stay untouched until ``buffer`` gives it out again."""
        self.busy[self.turn] = [self.hash_pool.submit(self.sha256.update, view),
                                self.write_pool.submit(self._pwrite, view, self.position)]
        self.position += len(view)

    def write(self, data: bytes) -> None:
        """Queue a few bytes of our own (header, padding)."""
        self.hash_pool.submit(self.sha256.update, data)
        self.turn = (self.turn + 1) % len(self.buffers)
        self._settle(self.turn)
        self.busy[self.turn] = [self.write_pool.submit(self._pwrite, memoryview(data), self.position)]
        self.position += len(data)

    def _pwrite(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self.part.fileno(), view[done:], offset + done)
        self.bar.update(len(view))

    def tensor_done(self, copy: Copy, digest: str) -> None:
        self.tensors[copy.name] = digest
        self.unchecked.append(copy)
        if self.position - self.flushed >= FLUSH_BYTES:
            self._check()

    def _check(self) -> None:
        """Have the tensors so far flushed and, when asked, compared with what was read."""
        for future in self.checks:
            if future.done():
                future.result()
        batch, self.unchecked, self.flushed = self.unchecked, [], self.position
        written = self.write_pool.submit(lambda: None)
        self.checks.append(self.check_pool.submit(self._flush_and_compare, written, batch))

    def _flush_and_compare(self, written: Future, batch: list[Copy]) -> None:
        written.result()
        flush(self.part.fileno())
        if not self.read_back:
            return
        drop_from_cache(self.part.fileno())
        for copy in batch:
            found = hash_range(self.part.fileno(), copy.target_offset, copy.nbytes)
            if found != self.tensors[copy.name]:
                raise IntegrityError(f"tensor {copy.name!r} came back from the disk changed",
                                     where=self.part.name, hint="the disk or its memory is failing: use another")

    def finish(self) -> tuple[str, dict[str, str]]:
        """Wait for everything; the stream's SHA-256, and XXH64 by tensor."""
        for turn in range(len(self.buffers)):
            self._settle(turn)
        self._check()
        for future in self.checks:
            future.result()
        return self.hash_pool.submit(self.sha256.hexdigest).result(), self.tensors


def flush(handle: int) -> None:
    """Wait until the file's data is on the disk."""
    getattr(os, "fdatasync", os.fsync)(handle)  # macOS has no fdatasync


def drop_from_cache(handle: int) -> None:
    """Ask the system to forget clean cached pages, so that the next read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


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


def validate(path: Path, plan: MergePlan) -> None:
    """Check a merged file's header: by this package's reader, by llama.cpp's parser, against the plan.

    Raises:
        IntegrityError: what differs.
    """
    header = read_header(path)
    check_layout(header)
    expected = [(copy.name, copy.target_offset, copy.nbytes) for copy in plan.copies]
    found = [(t.name, header.data_offset + t.offset, t.nbytes) for t in header.tensors]
    verdict = ggml.parse(path)
    if header.file_size != plan.nbytes or found != expected or not verdict.accepted:
        raise IntegrityError(f"the merged header is not the planned one ({verdict.message or 'tensor table'})",
                             where=path, hint="the disk may be failing; merge again")
