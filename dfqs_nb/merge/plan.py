"""Plans: which bytes of which files make the result. Nothing here reads a tensor or writes a file."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dfqs_nb.core.errors import HeaderError
from dfqs_nb.gguf.header import MAGIC, GGUFHeader, Tensor, padded, read_header
from dfqs_nb.gguf.shards import ShardSet
from dfqs_nb.merge.copy import Copy, Plan, identities

GGUF_VERSION = 3
U16 = 2  # the format's code of the value type


def plan_merge(shards: ShardSet) -> Plan:
    """Lay out the merged file. Reads no tensor and writes nothing."""
    first, sources = shards.headers[0], tuple(dict.fromkeys(shards.paths))
    tables, copies, offset = [], [], 0
    for header in shards.headers:
        for tensor in header.tensors:
            step = padded(tensor.nbytes, first.alignment)
            start = header.data_offset + tensor.offset
            tables.append(_tensor_record(tensor, offset))
            number = sources.index(header.path)
            copies.append(Copy(tensor.name, number, start, offset, tensor.nbytes, step - tensor.nbytes))
            offset += step
    head = _merged_fields(first, len(tables)) + b"".join(tables)
    head += bytes(padded(len(head), first.alignment) - len(head))
    moved = tuple(replace(copy, target_offset=len(head) + copy.target_offset) for copy in copies)
    return Plan(sources, head, moved, len(head) + offset, identities(sources), moved)


def _merged_fields(first: GGUFHeader, n_tensors: int) -> bytes:
    """Preamble and metadata: shard 1's fields as they are, but ``split.count`` = 0 at the end."""
    kept = [first.raw[slice(*field.record)] for name, field in first.fields.items() if name != "split.count"]
    key = b"split.count"
    kept.append(struct.pack("<Q", len(key)) + key + struct.pack("<IH", U16, 0))
    return MAGIC + struct.pack("<IQQ", GGUF_VERSION, n_tensors, len(kept)) + b"".join(kept)


def _tensor_record(tensor: Tensor, offset: int) -> bytes:
    """A row of the tensor table; trailing dimensions of 1 are dropped, as ggml does."""
    shape = list(tensor.shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    name = tensor.name.encode()
    form = f"<Q{len(name)}sI{len(shape)}qIQ"
    return struct.pack(form, len(name), name, len(shape), *shape, tensor.type_code, offset)


def plan_join(parts: Sequence[Path]) -> Plan:
    """Put the byte parts of one file together, in order.

    The header is written from memory, so that the first part keeps its own: a consuming join that was killed
    finds the parts by it.
    """
    try:
        header = read_header(parts[0])
        tensors = _tensors_in(header)
        with parts[0].open("rb") as file:
            head = file.read(header.data_offset)
    except HeaderError:
        tensors, head = (), b""  # it goes on in the second part
    copies, offset = [], 0
    for number, part in enumerate(parts):
        start = 0 if number else len(head)
        nbytes = part.stat().st_size - start
        copies.append(Copy(part.name, number, start, offset + start, nbytes))
        offset += start + nbytes
    return Plan(tuple(parts), head, tuple(copies), offset, identities(parts), tensors, of_tensors=False)


def _tensors_in(header: GGUFHeader) -> tuple[Copy, ...]:
    """Where a header's tensors are in a file that begins with it."""
    data = header.data_offset - header.start
    return tuple(Copy(t.name, 0, 0, data + t.offset, t.nbytes) for t in header.tensors)


def plan_cut(path: Path, header: GGUFHeader, end: int) -> Plan:
    """Cut the file of one header out of a raw concatenation, as it is."""
    cut = (Copy(path.name, 0, header.start, 0, end - header.start),)
    return Plan((path,), b"", cut, cut[0].nbytes, identities([path]), _tensors_in(header), of_tensors=False)
