"""Shards of one model: find them all from any one, and check that they belong together.

llama.cpp names them ``PREFIX-00001-of-00002.gguf`` and writes three fields into each header:
``split.no`` (from 0), ``split.count`` and ``split.tensors.count`` (of the whole model). A model in
a single file is a set of one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dfqs_nb.core.errors import DfqsError, ShardError
from dfqs_nb.gguf.header import GGUFHeader, Tensor, check_layout, padded, read_header

if TYPE_CHECKING:
    import pandas as pd

SHARD_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_SHARDS = 65_535  # split.count is a u16
FEW_EXPERTS = 4  # expert tensors on each side before their types are compared


@dataclass(frozen=True)
class ShardSet:
    """The shards of one model, checked and in order.

    Attributes:
        headers: one a shard, shard 1 first; shard 1 holds the model's metadata.
    """

    headers: tuple[GGUFHeader, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(header.path for header in self.headers)

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(header.file_size for header in self.headers)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor tables one after another; offsets stay those of each shard."""
        return tuple(tensor for header in self.headers for tensor in header.tensors)

    @property
    def as_one(self) -> GGUFHeader:
        """Shard 1's header with the tensors of all: what the model is, for facts (offsets mean nothing)."""
        return replace(self.headers[0], tensors=self.tensors, file_size=self.nbytes)

    @property
    def name(self) -> str:
        """The file name's prefix: ``model`` for ``model-00001-of-00002.gguf`` and ``model.gguf``."""
        match = SHARD_NAME.fullmatch(self.paths[0].name)
        return match["prefix"] if match else self.paths[0].stem


def shard_path(prefix: str | Path, number: int, count: int) -> Path:
    """The path llama.cpp gives shard ``number`` (from 1) of ``count``.

    >>> shard_path("models/nano", 2, 3).name
    'nano-00002-of-00003.gguf'
    """
    return Path(f"{prefix}-{number:05d}-of-{count:05d}.gguf")


def split_count(header: GGUFHeader) -> int:
    """How many shards the header says its model has; 1 for a model in a single file."""
    return max(int(header.get("split.count", 0)), 1)


def find_shards(path: str | Path) -> tuple[Path, ...]:
    """All shards of the model that ``path`` is one of, in order, by llama.cpp's naming.

    Raises:
        HeaderError: the file is not a GGUF.
        ShardError: a shard is missing, or the file's name is not the one its header calls for.
    """
    path = Path(path)
    header = read_header(path)
    count = split_count(header)
    if count == 1:
        return (path,)
    if count > MAX_SHARDS:
        raise ShardError(f"claims {count:,} shards", where=path, hint="get it from its source again")
    match = SHARD_NAME.fullmatch(path.name)
    number = int(header.get("split.no", 0)) + 1
    if match is None or (int(match["number"]), int(match["count"])) != (number, count):
        expected = shard_path(match["prefix"] if match else path.stem, number, count).name
        raise ShardError(
            f"is shard {number} of {count} by its header, but is not named so",
            where=path,
            hint=f"rename it to {expected!r}, or name all {count} shards",
        )
    siblings = tuple(shard_path(path.parent / match["prefix"], i, count) for i in range(1, count + 1))
    _check_present(siblings)
    return siblings


def _check_present(paths: Sequence[Path]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if not missing:
        return
    names = ", ".join(path.name for path in missing)
    raise ShardError(
        f"{len(missing)} of {len(paths)} shards missing: {names}",
        where=paths[0].parent,
        hint=_renamed(missing[0], paths) or "download what is missing into that folder",
    )


def _renamed(missing: Path, siblings: Sequence[Path]) -> str:
    """A hint when another file of the folder says, in its header, that it is the missing shard."""
    wanted = (siblings.index(missing), len(siblings))
    for other in sorted(set(missing.parent.glob("*.gguf")) - set(siblings)):
        try:
            header = read_header(other)
        except DfqsError:
            continue
        if (header.get("split.no"), split_count(header)) == wanted:
            return f"{other.name!r} says that it is that shard: rename it, or name all shards"
    return ""


def open_shards(model: str | Path | Sequence[str | Path], *, allow_mixed: bool = False) -> ShardSet:
    """Find (from one path) or take (from several) the shards of a model, and check them.

    Checked: count, numbering, duplicates, names against headers, sizes against headers, tensors
    against the declared total, and that all come from one model. Several paths may come in any
    order. No tensor data is read.

    Args:
        model: one path, from which the siblings are found, or the paths of all shards.
        allow_mixed: accept shards whose routed experts have no quantization type in common.

    Raises:
        HeaderError, LayoutError: a file is not a sound GGUF.
        ShardError: what is wrong with the set, which shard, and what to do.
    """
    paths = find_shards(model) if isinstance(model, (str, Path)) else tuple(map(Path, model))
    return check_set([read_header(path) for path in paths], allow_mixed=allow_mixed)


def check_set(headers: Sequence[GGUFHeader], *, glued: bool = False, allow_mixed: bool = False) -> ShardSet:
    """Check that headers are one whole set of shards, in any order.

    Args:
        glued: the shards lie in one file, so neither its name nor its end says anything of them.

    Raises:
        LayoutError, ShardError: see ``open_shards``.
    """
    count = split_count(headers[0]) if headers else 0
    _check_numbers(headers, count)
    headers = sorted(headers, key=lambda header: header.get("split.no", 0))
    if not glued:
        _check_names(headers, count)
        for number, header in enumerate(headers, 1):
            _check_size(header, number, count)
    _check_tensors(headers, count)
    _check_same_model(headers, allow_mixed)
    return ShardSet(tuple(headers))


def _check_numbers(headers: Sequence[GGUFHeader], count: int) -> None:
    if not headers:
        raise ShardError("no shard was named", hint="name one shard, or all of them")
    seen: dict[int, GGUFHeader] = {}
    for header in headers:
        if split_count(header) != count:
            raise ShardError(
                f"belongs to a set of {split_count(header)}, not of {count}",
                where=header.path,
                hint="take all shards from one model",
            )
        number = int(header.get("split.no", 0))
        if number in seen:
            raise ShardError(
                f"is shard {number + 1} of {count}, and so is {seen[number].path.name}",
                where=header.path,
                hint="name each shard once",
            )
        seen[number] = header
    missing = [str(i + 1) for i in range(count) if i not in seen]
    if missing:
        raise ShardError(
            f"shard {', '.join(missing)} of {count} is missing",
            where=headers[0].path.parent,
            hint=f"name all {count} shards",
        )
    if len(seen) > count:
        raise ShardError(
            f"{len(seen)} shards of a set of {count}",
            where=headers[0].path.parent,
            hint="take all shards from one model",
        )


def _check_names(headers: Sequence[GGUFHeader], count: int) -> None:
    prefixes = set()
    for number, header in enumerate(headers, 1):
        match = SHARD_NAME.fullmatch(header.path.name)
        if match is None:
            continue
        prefixes.add(match["prefix"])
        if (int(match["number"]), int(match["count"])) != (number, count):
            raise ShardError(
                f"is named shard {int(match['number'])} of {int(match['count'])}, but its "
                f"header says shard {number} of {count}",
                where=header.path,
                hint="two shards were swapped or renamed: give each its own name back",
            )
    if len(prefixes) > 1:
        raise ShardError(
            f"shards of different models: {', '.join(sorted(prefixes))}",
            where=headers[0].path.parent,
            hint="take all shards from one model",
        )


def _check_size(header: GGUFHeader, number: int, count: int) -> None:
    surplus = header.file_size - header.end_offset
    if not header.tensors and header.file_size == padded(header.end_offset, header.alignment):
        return  # `llama-gguf-split --no-tensor-first-split` pads even where no data follows
    unpadded = max(
        (header.data_offset + t.offset + t.nbytes for t in header.tensors), default=header.end_offset
    )
    if header.file_size < unpadded:
        raise ShardError(
            f"shard {number} of {count} is {-surplus:,} bytes short (expected {header.end_offset:,})",
            where=header.path,
            hint="download it again",
        )
    check_layout(header)
    if surplus > 0:
        raise ShardError(
            f"shard {number} of {count} has {surplus:,} bytes more than its header accounts "
            f"for (expected {header.end_offset:,})",
            where=header.path,
            hint="files may have been glued together: `dfqs-nb inspect` says more",
        )


def _check_tensors(headers: Sequence[GGUFHeader], count: int) -> None:
    owner: dict[str, int] = {}
    for number, header in enumerate(headers, 1):
        for tensor in header.tensors:
            if tensor.name in owner:
                raise ShardError(
                    f"tensor {tensor.name!r} is in shard {owner[tensor.name]} and in shard "
                    f"{number} of {count}",
                    where=header.path,
                    hint="these are shards of different models, or one shard twice",
                )
            owner[tensor.name] = number
    for number, header in enumerate(headers, 1):
        total = header.get("split.tensors.count", len(owner))
        if total != len(owner):
            raise ShardError(
                f"shard {number} of {count} says the model has {total:,} tensors; the shards "
                f"hold {len(owner):,}",
                where=header.path,
                hint="these are shards of different models: take all from one",
            )


def _check_same_model(headers: Sequence[GGUFHeader], allow_mixed: bool) -> None:
    first = headers[0]
    if not first.architecture:
        raise ShardError(
            "shard 1 names no architecture", where=first.path, hint="get it from its source again"
        )
    for number, header in enumerate(headers[1:], 2):
        if header.alignment != first.alignment:
            raise ShardError(
                f"shard {number} is aligned to {header.alignment} bytes, shard 1 to {first.alignment}",
                where=header.path,
                hint="take all shards from one model",
            )
        for key in set(first) & set(header) - {"split.no"}:
            if header[key] != first[key]:
                raise ShardError(
                    f"shard {number} says {key} = {header[key]!r}, shard 1 says {first[key]!r}",
                    where=header.path,
                    hint="take all shards from one model",
                )
        _check_same_shapes(first, header, number)
    if not allow_mixed:
        _check_same_quantization(headers)


def _by_role(header: GGUFHeader) -> dict[str, list[Tensor]]:
    """Tensors of blocks by their name without the block's number."""
    roles: dict[str, list[Tensor]] = {}
    for tensor in header.tensors:
        match = re.fullmatch(r"blk\.\d+\.(.+)", tensor.name)
        if match:
            roles.setdefault(match[1], []).append(tensor)
    return roles


def _check_same_shapes(first: GGUFHeader, other: GGUFHeader, number: int) -> None:
    ours, theirs = _by_role(first), _by_role(other)
    for role in ("ffn_norm.weight", "attn_norm.weight", "ffn_gate_inp.weight"):
        shapes = {tensor.shape for tensor in ours.get(role, []) + theirs.get(role, [])}
        if len(shapes) > 1:
            raise ShardError(
                f"shard {number} has {role} of another shape than shard 1: "
                f"{' and '.join(map(str, sorted(shapes)))}",
                where=other.path,
                hint="take all shards from one model",
            )


def _check_same_quantization(headers: Sequence[GGUFHeader]) -> None:
    """Refuse routed experts that share no type from one shard on: a shard of another quantization.

    Shards with fewer than ``FEW_EXPERTS`` expert tensors say nothing: in a set of many small shards one
    may hold just the first layer, which is often quantized higher.
    """
    before: set[str] = set()
    n_before = 0
    for number, header in enumerate(headers, 1):
        here = [tensor.type for tensor in header.tensors if "_exps." in tensor.name]
        if min(len(here), n_before) >= FEW_EXPERTS and before.isdisjoint(here):
            raise ShardError(
                f"the routed experts up to shard {number - 1} are {', '.join(sorted(before))}, "
                f"those of shard {number} {', '.join(sorted(set(here)))}: two quantizations of "
                "one model?",
                where=header.path,
                hint="take all shards from one, or pass allow_mixed=True if it was made so",
            )
        before |= set(here)
        n_before += len(here)


def shard_table(shards: ShardSet) -> pd.DataFrame:
    """One row a shard: ``shard``, ``file``, ``tensors``, ``first_tensor``, ``header_bytes``,
    ``data_bytes``, ``file_bytes`` (bytes)."""
    import pandas as pd

    rows = [
        {
            "shard": number,
            "file": header.path.name,
            "tensors": len(header.tensors),
            "first_tensor": header.tensors[0].name if header.tensors else "",
            "header_bytes": header.data_offset,
            "data_bytes": header.data_nbytes,
            "file_bytes": header.file_size,
        }
        for number, header in enumerate(shards.headers, 1)
    ]
    return pd.DataFrame(rows).set_index("shard")
