"""Shards of one model: find them all from any one, and check that they belong together.

llama.cpp names them ``PREFIX-00001-of-00002.gguf`` and writes three fields into each header:
``split.no`` (from 0), ``split.count`` and ``split.tensors.count`` (of the whole model). Like llama.cpp, we
need ``split.count`` only in shard 1. A model in a single file is a set of one, whatever its name and
``split.no`` are.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import DfqsError, ShardError
from dfqs_nb.gguf.header import GET_AGAIN, GGUFHeader, Tensor, check_layout, ends, padded, read_header

if TYPE_CHECKING:
    import pandas as pd

SHARD_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?i:gguf)", re.DOTALL)
MAX_SHARDS = 65_535  # split.count is a u16
FEW_EXPERTS = 4  # expert tensors on each side before their types are compared
SAME_SHAPE = ("ffn_norm.weight", "attn_norm.weight", "ffn_gate_inp.weight")


@dataclass(frozen=True)
class ShardSet:
    """The shards of one model, checked and in order.

    Attributes:
        headers: one a shard, shard 1 first; shard 1 holds the model's metadata.
    """

    headers: tuple[GGUFHeader, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, shard 1 first."""
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
        """``model`` for ``model-00001-of-00002.gguf``, ``model.gguf`` and ``model.gguf.part00``."""
        match = SHARD_NAME.fullmatch(self.paths[0].name)
        return match["prefix"] if match else self.paths[0].stem.removesuffix(".gguf")


def shard_path(prefix: str | Path, number: int, count: int) -> Path:
    """The path llama.cpp gives shard ``number`` (from 1) of ``count``.

    >>> shard_path("models/nano", 2, 3).name
    'nano-00002-of-00003.gguf'
    """
    return Path(f"{prefix}-{number:05d}-of-{count:05d}.gguf")


def _place(header: GGUFHeader) -> tuple[int, int]:
    """Number (from 1) and count of the shard; a shard without a count has the one of its name."""
    count, match = header.count("split.count"), SHARD_NAME.fullmatch(header.path.name)
    if "split.count" not in header and "split.no" in header and match:
        count = int(match["count"])
    return (header.count("split.no") + 1, count) if count > 1 else (1, 1)


def find_shards(path: str | Path) -> tuple[Path, ...]:
    """All shards of the model that ``path`` is one of, in order, by llama.cpp's naming.

    Raises:
        HeaderError: the file is not a GGUF.
        ShardError: a shard is missing, or the file's name is not the one its header calls for.
    """
    path = Path(path)
    number, count = _place(read_header(path))
    if count == 1:
        return (path,)
    if count > MAX_SHARDS:
        raise _refused(f"claims {count:,} shards", path, GET_AGAIN)
    match = SHARD_NAME.fullmatch(path.name)
    prefix = match["prefix"] if match else path.stem
    expected = shard_path(prefix, number, count).name
    if path.name != expected:  # llama.cpp wants exactly this, also in lower case
        hint = f"rename it to {expected!r}, or name all {count} shards"
        if path.with_name(expected).exists():
            hint = f"another file has its name, {expected!r}: move that one away first, then rename this one"
        raise _refused(f"is shard {number} of {count} by its header, but is not named so", path, hint)
    siblings = tuple(shard_path(path.parent / prefix, i, count) for i in range(1, count + 1))
    missing = [sibling for sibling in siblings if not sibling.is_file()]
    if missing:
        what = f"{len(missing)} of {count} shards missing: {', '.join(sibling.name for sibling in missing)}"
        hint = _renamed(missing[0], siblings) or "download what is missing into that folder"
        raise _refused(what, path.parent, hint)
    return siblings


def _refused(what: str, where: Path, hint: str = "take all shards from one model") -> ShardError:
    return ShardError(what, where=where, hint=hint)


def _renamed(missing: Path, siblings: Sequence[Path]) -> str:
    """A hint when another file of the folder says, in its header, that it is the missing shard."""
    wanted = (siblings.index(missing) + 1, len(siblings))
    others = (path for path in missing.parent.iterdir() if path.suffix.lower() == ".gguf")
    for other in sorted(set(others) - set(siblings)):
        try:
            place = _place(read_header(other))
        except DfqsError:
            continue
        if place == wanted:
            return f"{other.name!r} says that it is that shard: rename it to {missing.name!r}"
    return ""


def open_shards(model: str | Path | Sequence[str | Path], *, allow_mixed: bool = False) -> ShardSet:
    """Find (from one path) or take (from several, in any order) the shards of a model, and check them.

    Checked: count, numbering, duplicates, names and sizes against headers, tensors against the declared
    total, and that all come from one model. No tensor data is read.

    Args:
        allow_mixed: do not warn of shards whose routed experts have no quantization type in common.

    Raises:
        HeaderError, LayoutError: a file is not a sound GGUF.
        ShardError: what is wrong with the set, which shard, and what to do.

    Warns:
        RuntimeWarning: two shards may be of two quantizations.
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
    headers = _in_order(headers)
    if not glued:
        _check_names(headers)
        for number, header in enumerate(headers, 1):
            _check_size(header, f"shard {number} of {len(headers)}")
    if len(headers) > 1:
        _check_tensors(headers)
    _check_same_model(headers)
    if not allow_mixed:
        _warn_of_mixed_types(headers)
    return ShardSet(tuple(headers))


def _in_order(headers: Sequence[GGUFHeader]) -> list[GGUFHeader]:
    if not headers:
        raise ShardError("no shard was named", hint="name one shard, or all of them")
    count = next((count for header in headers if (count := _place(header)[1]) > 1), 1)
    folder = headers[0].path.parent
    by_number: dict[int, GGUFHeader] = {}
    for header in headers:
        own = max(header.count("split.count", count), 1)
        if own != count:
            raise _refused(f"belongs to a set of {own}, not of {count}", header.path)
        number = header.count("split.no") + 1 if count > 1 else 1
        if number in by_number:
            what = f"is shard {number} of {count}, and so is {by_number[number].path.name}"
            raise _refused(what, header.path, "name each shard once")
        by_number[number] = header
    missing = ", ".join(str(i) for i in range(1, count + 1) if i not in by_number)
    if missing:
        raise _refused(f"shard {missing} of {count} is missing", folder, f"name all {count} shards")
    if len(by_number) > count:
        raise _refused(f"{len(by_number)} shards of a set of {count}", folder)
    return [by_number[number] for number in sorted(by_number)]


def _check_names(headers: Sequence[GGUFHeader]) -> None:
    """Names that follow the pattern must agree with the headers; a single file may have any name."""
    prefixes, count = set(), len(headers)
    for number, header in enumerate(headers, 1) if count > 1 else ():
        if match := SHARD_NAME.fullmatch(header.path.name):
            prefixes.add(match["prefix"])
            named = f"shard {int(match['number'])} of {int(match['count'])}"
            if named != f"shard {number} of {count}":
                what = f"is named {named}, but its header says shard {number} of {count}"
                hint = "two shards were swapped or renamed: give each its own name back"
                raise _refused(what, header.path, hint)
    if len(prefixes) > 1:
        what = f"shards of different models: {', '.join(sorted(prefixes))}"
        raise _refused(what, headers[0].path.parent)


def _check_size(header: GGUFHeader, which: str) -> None:
    surplus = header.file_size - header.end_offset
    if not header.tensors and header.file_size == padded(header.end_offset, header.alignment):
        return  # `llama-gguf-split --no-tensor-first-split` pads even where no data follows
    expected = f"(expected {header.end_offset:,})"
    if header.file_size < ends(header)[0]:  # the last tensor may lack its padding
        raise _refused(f"{which} is {-surplus:,} bytes short {expected}", header.path, "download it again")
    check_layout(header)
    if surplus > 0:
        what = f"{which} has {surplus:,} bytes more than its header accounts for {expected}"
        hint = f"files may have been glued together: `dfqs-nb inspect {quoted(header.path)}` says more"
        raise _refused(what, header.path, hint)


def _check_tensors(headers: Sequence[GGUFHeader]) -> None:
    owner: dict[str, int] = {}
    for number, header in enumerate(headers, 1):
        for tensor in header.tensors:
            if tensor.name in owner:
                twice = f"shard {owner[tensor.name]} and in shard {number} of {len(headers)}"
                hint = "these are shards of different models, or one shard twice"
                raise _refused(f"tensor {tensor.name!r} is in {twice}", header.path, hint)
            owner[tensor.name] = number
    for number, header in enumerate(headers, 1):
        total = header.count("split.tensors.count", len(owner))
        if total != len(owner):
            says = f"shard {number} of {len(headers)} says the model has {total:,} tensors"
            raise _refused(f"{says}; the shards hold {len(owner):,}", header.path)


def _check_same_model(headers: Sequence[GGUFHeader]) -> None:
    """Fields and shapes must agree; alignment may not: llama.cpp reads each shard by its own."""
    first, shapes = headers[0], _shapes(headers[0])
    if not first.architecture and "general.type" not in first:
        raise _refused("names no architecture", first.path, GET_AGAIN)
    for number, header in enumerate(headers[1:], 2):
        for key in set(first) & set(header) - {"split.no", "split.count", "general.alignment"}:
            if header[key] != first[key]:
                says = f"shard {number} says {key} = {header[key]!r:.80}"
                raise _refused(f"{says}, shard 1 says {first[key]!r:.80}", header.path)
        for role, theirs in _shapes(header).items():
            if len(both := sorted(shapes[role] | theirs)) > 1:
                shown = " and ".join(map(str, both))
                what = f"shard {number} has {role} of another shape than shard 1: {shown}"
                raise _refused(what, header.path)


def _shapes(header: GGUFHeader) -> dict[str, set[tuple[int, ...]]]:
    """Shapes of the tensors that are alike in every block, by their name without the block's number."""
    shapes: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for tensor in header.tensors:
        role = re.sub(r"^blk\.\d+\.", "", tensor.name)
        if role in SAME_SHAPE:
            shapes[role].add(tensor.shape)
    return shapes


def _warn_of_mixed_types(headers: Sequence[GGUFHeader]) -> None:
    """Warn of routed experts that share no type from one shard on: two quantizations, or a recipe by layer.

    Shards with fewer than ``FEW_EXPERTS`` expert tensors say nothing: in a set of many small shards one
    may hold just the first layer, which is often quantized higher.
    """
    before: list[str] = []
    for number, header in enumerate(headers, 1):
        here = [tensor.type for tensor in header.tensors if "_exps." in tensor.name]
        if min(len(here), len(before)) >= FEW_EXPERTS and set(before).isdisjoint(here):
            then, now = (", ".join(sorted(set(types))) for types in (before, here))
            message = (
                f"{header.path.name}: the routed experts up to shard {number - 1} are {then}, those of shard "
                f"{number} {now}. A recipe by layer gives this; so do shards of two quantizations"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        before += here


def shard_table(shards: ShardSet) -> pd.DataFrame:
    """One row a shard, index ``shard`` (from 1).

    Columns: ``file``, ``tensors``, ``first_tensor``, ``header_bytes``, ``data_bytes``, ``file_bytes``.
    """
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
