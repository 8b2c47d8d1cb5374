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

import glob
import json
import os
import shutil
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.errors import IntegrityError, OutputError, SpaceError
from dfqs_nb.core.files import sha256_of
from dfqs_nb.gguf.header import MAGIC, GGUFHeader, Tensor, check_layout, padded, read_header
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.llama import check
from dfqs_nb.merge import copy as transfer
from dfqs_nb.merge import holes
from dfqs_nb.merge.copy import Copy, Plan
from dfqs_nb.merge.verify import manifest_path, save_manifest, tensor_hashes

if TYPE_CHECKING:
    import pandas as pd

GGUF_VERSION = 3
CONSUME_EXTRA_BYTES = 64 << 20  # what a consuming transfer may need beyond its sources, plus the header
_TYPE_U16 = 2


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


def plan_merge(shards: ShardSet) -> Plan:
    """Lay out the merged file. Reads nothing and writes nothing."""
    first = shards.headers[0]
    sources = tuple(dict.fromkeys(shards.paths))
    tables, runs, offset = [], [], 0
    for header in shards.headers:
        for tensor in header.tensors:
            step = padded(tensor.nbytes, first.alignment)
            tables.append(_tensor_record(tensor, offset))
            runs.append(
                (
                    tensor.name,
                    sources.index(header.path),
                    header.data_offset + tensor.offset,
                    offset,
                    tensor.nbytes,
                    step - tensor.nbytes,
                )
            )
            offset += step
    head = _merged_fields(first, len(tables)) + b"".join(tables)
    head += bytes(padded(len(head), first.alignment) - len(head))
    copies = tuple(
        Copy(name, source, start, len(head) + target, nbytes, padding)
        for name, source, start, target, nbytes, padding in runs
    )
    return Plan(sources, head, copies, len(head) + offset)


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
    return struct.pack(
        f"<Q{len(name)}sI{len(shape)}qIQ", len(name), name, len(shape), *shape, tensor.type_code, offset
    )


def merge(
    model: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    overwrite: bool = False,
    consume: bool = False,
    read_back: bool = True,
    progress: bool = True,
    allow_mixed: bool = False,
    allow_holes: bool = False,
) -> MergeResult:
    """Merge the shards of ``model`` into the single file ``output``.

    Memory stays under some 50 MB whatever the largest tensor. The output appears under its name only after
    its header was accepted by this package's reader and by llama.cpp's own parser, and its bytes, read
    back from the disk, have the hash that they have in the shards. A sidecar ``<output>.manifest.json``
    keeps the hashes. A killed merge goes on where it was when the same call is made again.

    Args:
        model: any one shard, or all of them in any order.
        overwrite: replace an existing output (which stays until the new one is proven).
        consume: give each shard's bytes back to the disk once their copy is proven, and remove the shards
            at the end: the merge then needs no second copy of the model. Without it shards are only read.
        read_back: read the result from the disk again and compare; without it only what was read and
            handed to the operating system is known. ``consume`` always reads back.
        allow_mixed: see ``open_shards``.
        allow_holes: accept shards with holes, whose missing bytes read as zeros.

    Raises:
        HeaderError, LayoutError, ShardError: the shards are not sound, or not one set.
        OutputError: the output exists, is one of the shards, or cannot be written there.
        SpaceError: the disk has too little room, found before or on the way.
        IntegrityError: a shard changed or ended while it was read, or the disk gave back other bytes.
    """
    output = Path(output)
    settled = finish_interrupted(output, [model] if isinstance(model, (str, Path)) else model)
    if settled:
        return settled
    plan = plan_merge(open_shards(model, allow_mixed=allow_mixed))
    check_output(output, plan, overwrite=overwrite, consume=consume, allow_holes=allow_holes)
    return carry_out(plan, output, consume=consume, read_back=read_back, progress=progress)


def carry_out(
    plan: Plan, output: Path, *, consume: bool = False, read_back: bool = True, progress: bool = True
) -> MergeResult:
    """Transfer, validate, name, and keep the hashes: what ``merge`` and ``repair`` have in common."""
    began = time.perf_counter()
    transfer.transfer(
        plan,
        output,
        validate=lambda part: validate(part, plan),
        consume=consume,
        read_back=read_back,
        keep_hashes=lambda record: _write_manifest(output, record, time.perf_counter() - began),
        progress=progress,
    )
    return earlier_result(output)


def finish_interrupted(output: Path, asked: Sequence[str | Path] = ()) -> MergeResult | None:
    """Settle a validated transfer into ``output`` that a killed run left, if there is one.

    Returns:
        Its result, when it was made from the files ``asked`` for, and they did not change since.
    """
    record = transfer.settle(output, lambda record: _write_manifest(output, record, 0.0))
    if record is None:
        return None
    made_from = dict(zip((Path(path).resolve() for path in record["paths"]), record["sources"], strict=True))
    asked_for = {Path(path).resolve() for path in asked}
    changed = [
        path
        for path, then in made_from.items()
        if not record["consume"] and path.exists() and transfer.identities([path]) != [then]
    ]
    return earlier_result(output) if asked_for <= set(made_from) and not changed else None


def use_where_it_lies(shards: ShardSet, *, progress: bool = True) -> MergeResult:
    """Check and hash a model that is in one file already; nothing is written.

    Raises:
        IntegrityError: llama.cpp's parser refuses it.
    """
    began, path = time.perf_counter(), shards.paths[0]
    validate(path, Plan(shards.paths, b"", (), path.stat().st_size, of_tensors=False))
    hashes = tensor_hashes(shards.headers, progress=progress)
    sha256 = sha256_of(path, progress=progress)
    sources = tuple(transfer.identities(shards.paths))
    return MergeResult(path, shards.nbytes, sha256, hashes, sources, time.perf_counter() - began, True)


def earlier_result(output: Path) -> MergeResult | None:
    """What the manifest says of ``output``, if it is there and of the size and time that it says."""
    try:
        kept = json.loads(manifest_path(output).read_text(encoding="utf-8"))
        stat = output.stat()
    except (OSError, ValueError):
        return None
    if (kept.get("nbytes"), kept.get("mtime_ns")) != (stat.st_size, stat.st_mtime_ns):
        return None
    return MergeResult(
        output, kept["nbytes"], kept["sha256"], kept["tensors"], tuple(kept["sources"]), kept["seconds"]
    )


def _write_manifest(output: Path, record: dict[str, Any], seconds: float) -> None:
    place = manifest_path(output)
    for stale in place.parent.glob(f".{glob.escape(place.name)}.*.part"):
        stale.unlink()  # of a run that was killed here
    save_manifest(output, record["sha256"], record["hashes"], record["sources"], seconds)


def segments(shards: ShardSet, output_name: str) -> pd.DataFrame:
    """Where the bytes of shards and result lie, for a figure.

    One row a piece: ``file`` (``shard N`` or ``output_name``), ``part`` (``header`` or ``data of shard N``),
    ``start`` and ``nbytes``.
    """
    import pandas as pd

    rows, merged, position = [], [], len(plan_merge(shards).header)
    merged.append((output_name, "header", 0, position))
    for number, header in enumerate(shards.headers, 1):
        part = f"data of shard {number}"
        size = header.data_offset - header.start
        rows.append((f"shard {number}", "header", 0, size))
        rows.append((f"shard {number}", part, size, header.data_nbytes))
        merged.append((output_name, part, position, header.data_nbytes))
        position += header.data_nbytes
    return pd.DataFrame(rows + merged, columns=["file", "part", "start", "nbytes"])


def check_output(
    output: Path,
    plan: Plan,
    *,
    overwrite: bool = False,
    consume: bool = False,
    in_place: bool = False,
    allow_holes: bool = False,
) -> None:
    """Check, before the first byte, that ``output`` may be written and that the disk holds it.

    Raises:
        OutputError, SpaceError, IntegrityError: see ``merge``.
    """
    if output.exists() and not in_place:
        if any(output.samefile(path) for path in plan.sources):
            raise OutputError(
                "is one of the files that it would be made from",
                where=output,
                hint="choose another name for the output",
            )
        if not overwrite:
            raise OutputError(
                "exists already", where=output, hint="choose another name, or pass overwrite=True"
            )
    if not output.parent.is_dir():
        raise OutputError("the folder does not exist", where=output.parent, hint="make it first")
    journal = transfer.read_journal(output)
    if not (allow_holes or (journal and journal[0]["consume"])):
        _check_stored(plan.sources)
    if consume:
        _check_punch(plan.sources)
    _check_space(output, plan, consume)


def _check_stored(paths: Sequence[Path]) -> None:
    for path in paths:
        hole = holes.first_hole(path)
        if hole is not None:
            raise IntegrityError(
                f"has a hole at byte {hole:,}, which reads as zeros",
                where=path,
                hint="a download or a consuming merge was interrupted: finish it, or download the file "
                "again; pass allow_holes=True if it is sparse on purpose",
            )


def _check_punch(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.stat().st_nlink > 1:
            raise OutputError(
                "has a second name (a hard link), and would be emptied under both",
                where=path,
                hint="remove the other name, or merge without consume",
            )
    for folder in {path.resolve().parent for path in paths}:
        if not os.access(folder, os.W_OK):
            raise OutputError(
                "cannot be written, so nothing in it can be given back",
                where=folder,
                hint="merge without consume, into another folder",
            )
        if not holes.can_punch(folder):
            raise OutputError(
                "this file system cannot give back parts of a file (punch holes)",
                where=folder,
                hint="merge without consume; it needs room for a second copy",
            )


def _check_space(output: Path, plan: Plan, consume: bool) -> None:
    part = transfer.part_path(output)
    needed = plan.nbytes - _stored_bytes(part) if part.exists() else plan.nbytes
    if consume:
        device = output.parent.stat().st_dev
        needed -= sum(_stored_bytes(path) for path in plan.sources if path.stat().st_dev == device)
        needed = max(needed, 0) + CONSUME_EXTRA_BYTES + len(plan.header)
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        also = "" if consume else ", or merge with consume=True, which needs no second copy"
        raise SpaceError(
            f"needs {needed:,} bytes and {free:,} are free",
            where=output.parent,
            hint=f"free {needed - free:,} bytes{also}",
        )


def _stored_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def validate(path: Path, plan: Plan) -> None:
    """Check a written file's header: by this package's reader, by llama.cpp's parser, against the plan.

    Raises:
        IntegrityError: what differs.
    """
    header = read_header(path)
    check_layout(header)
    verdict = check.parse(path)
    if not verdict.accepted:
        raise IntegrityError(
            f"llama.cpp refuses the result: {verdict.message}",
            where=path,
            hint="check the sources: `dfqs-nb inspect` says what they are",
        )
    expected = [(copy.name, copy.target_offset, copy.nbytes) for copy in plan.copies]
    found = [(t.name, header.data_offset + t.offset, t.nbytes) for t in header.tensors]
    if header.file_size != plan.nbytes or (plan.of_tensors and found != expected):
        raise IntegrityError(
            "the written header is not the planned one",
            where=path,
            hint="the disk may be failing: use another",
        )
