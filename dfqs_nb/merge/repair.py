"""Repair a raw concatenation: shards glued together byte for byte, which no runtime can load.

The published single file of DFQS 1.0 is one (its size is exactly the sum of the two shards). Everything is
in it, but the second shard's header stands in the middle of the data, so the file is shard 1 with trailing
bytes to whoever reads it. The repair is the merge that should have been made: the result is the file that
``llama-gguf-split --merge`` gives for the original shards, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dfqs_nb.core.errors import HeaderError, OutputError
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.shards import ShardSet, check_set, find_shards, open_shards, shard_path
from dfqs_nb.merge.copy import Copy, Plan, identities
from dfqs_nb.merge.kind import Kind, byte_parts, diagnose, raw_concatenation
from dfqs_nb.merge.merge import (
    CONSUME_EXTRA_BYTES,
    MergeResult,
    carry_out,
    check_output,
    earlier_result,
    finish_interrupted,
    plan_merge,
    use_where_it_lies,
)

if TYPE_CHECKING:
    import pandas as pd


def glued_shards(path: str | Path) -> ShardSet:
    """The shards inside a raw concatenation, checked as a set and in order, whatever order they lie in.

    Raises:
        DfqsError: the file is not a raw concatenation, or what is in it is not one whole set.
    """
    return check_set(raw_concatenation(path), glued=True)


def repair(
    path: str | Path,
    output: str | Path | None = None,
    *,
    in_place: bool = False,
    overwrite: bool = False,
    read_back: bool = True,
    progress: bool = True,
    allow_holes: bool = False,
) -> MergeResult:
    """Make the sound model that the raw concatenation ``path`` should have been.

    Args:
        output: the new file; ``path`` is then only read.
        in_place: instead, let the model take the place of ``path``. Needs at most 64 MiB and the header in
            extra disk: what is copied and proven is given back at once. Until it ends ``path`` is partly
            empty and ``.<name>.part`` grows beside it; a killed repair goes on with the same call.
        overwrite, read_back, allow_holes: see ``merge``.

    Raises:
        OutputError: neither, or both, of ``output`` and ``in_place``; or as ``merge``.
        DfqsError: ``path`` is not a raw concatenation; or as ``merge``.
    """
    path = Path(path)
    if in_place == (output is not None):
        raise OutputError(
            "say where the repaired model goes", where=path, hint="name an output, or ask for in_place=True"
        )
    if in_place and path.is_symlink():
        path = path.resolve()  # the bytes are given back, and taken over, where they lie
    target = path if in_place else Path(output)
    settled = finish_interrupted(target, [path])
    if settled:
        return settled
    plan = plan_merge(glued_shards(path))
    check_output(
        target, plan, overwrite=overwrite, consume=in_place, in_place=in_place, allow_holes=allow_holes
    )
    return carry_out(plan, target, consume=in_place, read_back=read_back, progress=progress)


def split(
    path: str | Path, folder: str | Path | None = None, *, overwrite: bool = False, progress: bool = True
) -> tuple[MergeResult, ...]:
    """Cut a raw concatenation back into the shards that it was made from, byte for byte.

    Args:
        folder: where the shards go; by default beside ``path``. They are named ``NAME-0000k-of-0000N.gguf``.

    Raises:
        DfqsError: ``path`` is not a raw concatenation.
        OutputError, SpaceError, IntegrityError: as ``merge``.
    """
    path = Path(path)
    headers = raw_concatenation(path)
    results = []
    for header, end in zip(headers, [h.start for h in headers[1:]] + [path.stat().st_size], strict=True):
        number = int(header.get("split.no", 0)) + 1
        target = shard_path(Path(folder or path.parent) / path.stem, number, len(headers))
        plan = _as_they_are([(path, header.start, end - header.start)])
        check_output(target, plan, overwrite=overwrite)
        results.append(finish_interrupted(target, [path]) or carry_out(plan, target, progress=progress))
    return tuple(results)


def plan_join(path: str | Path | Sequence[str | Path]) -> Plan:
    """Put the byte parts of one file together (``model.gguf.part1of2``, ``model.gguf-split-a``).

    Such parts are cuts of a file, not GGUF shards, and do belong end to end.

    Args:
        path: any one part, from which the others are found, or all of them in order.

    Raises:
        ShardError: a part is missing, or the sizes do not add up to what the first one's header needs.
    """
    parts = byte_parts(path) if isinstance(path, (str, Path)) else tuple(map(Path, path))
    return _header_apart(_as_they_are([(part, 0, part.stat().st_size) for part in parts]))


def _as_they_are(ranges: Sequence[tuple[Path, int, int]]) -> Plan:
    """A plan that writes these byte ranges ``(file, start, nbytes)`` one after another."""
    sources = tuple(dict.fromkeys(path for path, _, _ in ranges))
    copies, offset = [], 0
    for path, start, nbytes in ranges:
        copies.append(Copy(path.name, sources.index(path), start, offset, nbytes))
        offset += nbytes
    return Plan(sources, b"", tuple(copies), offset, of_tensors=False)


def _header_apart(plan: Plan) -> Plan:
    """The same plan, its header written from memory: a consuming join that was killed then still finds it in
    the first part, and with it the others."""
    first, *others = plan.copies
    try:
        head = _first_bytes(plan.sources[0], read_header(plan.sources[0]).data_offset)
    except HeaderError:
        return plan  # it goes on in the second part
    rest = replace(first, source_offset=len(head), target_offset=len(head), nbytes=first.nbytes - len(head))
    return replace(plan, header=head, copies=(rest, *others))


def _first_bytes(path: Path, nbytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(nbytes)


def source_files(model: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """All files that ``model`` consists of: itself, its sibling shards, or its sibling byte parts.

    Raises:
        DfqsError: a file is no model, or a sibling is missing.
    """
    paths = [Path(model)] if isinstance(model, (str, Path)) else [Path(path) for path in model]
    kind = diagnose(paths[0]).kind
    if kind is Kind.BYTE_PART:
        return byte_parts(paths[0])
    return find_shards(paths[0]) if kind is Kind.SHARD and len(paths) == 1 else tuple(paths)


def contents(files: Sequence[str | Path]) -> ShardSet:
    """The shards that lie in ``files``, checked as a set: in files of their own, glued, or cut in byte parts.

    Raises:
        DfqsError: they are not sound, or not one whole set.
    """
    kind = diagnose(files[0]).kind
    if kind is Kind.RAW_CONCATENATION:
        return glued_shards(files[0])
    return ShardSet((read_header(files[0]),)) if kind is Kind.BYTE_PART else open_shards(files)


def plan_any(model: str | Path | Sequence[str | Path]) -> Plan:
    """The plan for whatever ``model`` is, by what its bytes say: shards, byte parts, or glued shards.

    Raises:
        DfqsError: the files are not sound, or not one whole set.
    """
    first = Path(model if isinstance(model, (str, Path)) else model[0])
    kind = diagnose(first).kind
    if kind is Kind.BYTE_PART:
        return plan_join(model)
    return plan_merge(glued_shards(first) if kind is Kind.RAW_CONCATENATION else open_shards(model))


def merge_any(
    model: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    overwrite: bool = False,
    consume: bool = False,
    progress: bool = True,
) -> MergeResult:
    """One sound file from shards, byte parts, or glued shards: the command line's ``merge``.

    Raises:
        As ``merge``.
    """
    output = Path(output)
    settled = finish_interrupted(output, [model] if isinstance(model, (str, Path)) else model)
    if settled:
        return settled
    plan = plan_any(model)
    if consume and not plan.header:
        raise OutputError(
            "the header goes on in the second part, so a killed merge could not go on",
            where=output,
            hint="merge without consume",
        )
    check_output(output, plan, overwrite=overwrite, consume=consume)
    return carry_out(plan, output, consume=consume, progress=progress)


def make_sound(
    model: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    fresh: bool = False,
    consume: bool = False,
    progress: bool = True,
) -> MergeResult:
    """``merge_any``, unless it is done already: what was made before from the same files is used again.

    A sound single file is used where it lies. The same files have the same names, sizes and times.

    Raises:
        As ``merge``.
    """
    output, first = Path(output), Path(model if isinstance(model, (str, Path)) else model[0])
    settled = finish_interrupted(output, [model] if isinstance(model, (str, Path)) else model)
    if settled:
        return settled
    if diagnose(first).kind is Kind.SINGLE_FILE:
        return use_where_it_lies(open_shards(first), progress=progress)
    found = None if fresh else earlier_result(output)
    if found and list(found.sources) == identities(plan_any(model).sources):
        return replace(found, reused=True)
    return merge_any(model, output, overwrite=True, consume=consume, progress=progress)


def methods_table(nbytes: int, header_nbytes: int, reported: dict[str, str]) -> pd.DataFrame:
    """Ways to one file, side by side: extra disk in bytes, and what each one leaves to luck.

    Args:
        nbytes: size of the model in bytes.
        header_nbytes: size of its merged header in bytes.
        reported: seconds, or "not measured", by method.

    What the reference tool does and does not is read from its source (``tools/gguf-split`` of llama.cpp).
    """
    import pandas as pd

    proven = CONSUME_EXTRA_BYTES + header_nbytes
    rows = [
        ("raw concatenation (cat)", nbytes, "no", "no", "no", "stays half written"),
        ("llama-gguf-split --merge", nbytes, "yes", "no", "no", "stays half written"),
        ("merge, repair", nbytes, "yes", "yes", "yes", "goes on"),
        (
            "merge --consume, repair --in-place",
            min(proven, nbytes + header_nbytes),
            "yes",
            "yes",
            "yes",
            "goes on",
        ),
    ]
    columns = ["method", "extra disk (bytes)", "loads", "hashed", "read back", "after a kill"]
    table = pd.DataFrame(rows, columns=columns)
    table["seconds here"] = [reported.get(method, "not measured") for method in table["method"]]
    return table.set_index("method")
