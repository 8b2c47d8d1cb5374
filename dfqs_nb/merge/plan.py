"""Plans: which bytes of which files make the result. Nothing here reads a tensor or writes a file."""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path

from dfqs_nb.gguf.header import MAGIC, padded
from dfqs_nb.gguf.shards import ShardSet
from dfqs_nb.merge.disk import Identity

GGUF_VERSION = 3
U16 = 2  # the format's code of the value type


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

    def within(self, start: int, nbytes: int) -> Iterator[tuple[Copy, int, int]]:
        """Those of the copies that reach into a window, and which of their bytes lie in it.

        Of a copy that has only padding there the range is empty.
        """
        first = bisect_right(self.copies, start, key=attrgetter("target_offset")) - 1
        for run in self.copies[max(first, 0) :]:
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
