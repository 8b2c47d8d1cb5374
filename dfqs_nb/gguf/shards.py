"""Shards of one model: find them all from any, and check that they belong together.

llama.cpp names them ``PREFIX-00001-of-00002.gguf`` and writes three fields into each header: ``split.no``
(from 0), ``split.count`` and ``split.tensors.count`` (of the whole model). Like llama.cpp, we need
``split.count`` in shard 1 only. A single file is a set of one, whatever its name and ``split.no`` are.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import ShardError
from dfqs_nb.gguf.header import GET_AGAIN, GGUFHeader, Tensor, check_layout, ends, padded, read_header

if TYPE_CHECKING:
    import pandas as pd

SHARD_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?i:gguf)", re.DOTALL)
MAX_SHARDS = 65_535  # split.count is a u16
FEW_EXPERTS = 4  # a shard with fewer expert tensors may hold just the first layer, often quantized higher


@dataclass(frozen=True)
class ShardSet:
    """The shards of one model, checked and in order; shard 1 holds the model's metadata."""

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
        """The tensors of all shards; each offset is that in its shard."""
        return tuple(tensor for header in self.headers for tensor in header.tensors)

    @property
    def as_one(self) -> GGUFHeader:
        """Shard 1's header with the tensors of all shards: the model for facts (offsets mean nothing)."""
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
        ShardError: a shard is missing, or the file's name does not match its header.
    """
    path = Path(path)
    number, count = _place(read_header(path))
    if count == 1:
        return (path,)
    if not number <= count <= MAX_SHARDS:
        raise _refused(f"claims to be shard {number:,} of {count:,}", path, GET_AGAIN)
    match = SHARD_NAME.fullmatch(path.name)
    prefix = match["prefix"] if match else path.stem
    expected = shard_path(prefix, number, count).name
    if path.name != expected:  # llama.cpp wants exactly this, also in lower case
        hint = f"rename it to {expected!r}, or name all {count} shards"
        if path.with_name(expected).exists():
            hint = f"another file has its name, {expected!r}: move that one away first, then rename this one"
        raise _refused(f"is shard {number} of {count} by its header, but is not named so", path, hint)
    siblings = tuple(shard_path(path.parent / prefix, i, count) for i in range(1, count + 1))
    if missing := [sibling.name for sibling in siblings if not sibling.is_file()]:
        what = f"{len(missing)} of {count} shards missing: {', '.join(missing)}"
        raise _refused(what, path.parent, "download or rename what is missing in that folder")
    return siblings


def _refused(what: str, where: Path, hint: str = "take all shards from one model") -> ShardError:
    return ShardError(what, where=where, hint=hint)


def open_shards(model: str | Path | Sequence[str | Path]) -> ShardSet:
    """Find (from one path) or take (from several, in any order) the shards of a model, and check them.

    Checked: numbers, names and sizes against headers, tensors against the stated total, and the fields that
    two headers share. No tensor data is read.

    Raises:
        HeaderError, LayoutError: a file is not a sound GGUF.
        ShardError: what is wrong with the set, which shard, and the next step.

    Warns:
        RuntimeWarning: two shards may be of two quantizations.
    """
    paths = find_shards(model) if isinstance(model, (str, Path)) else tuple(map(Path, model))
    return check_set([read_header(path) for path in paths])


def check_set(headers: Sequence[GGUFHeader], *, glued: bool = False) -> ShardSet:
    """Check that headers, in any order, are one whole set of shards; errors and warnings as `open_shards`.

    ``glued``: the shards lie in one file; its name and its size prove nothing, and there are no warnings.
    """
    headers = _in_order(headers)
    if not glued:
        _check_names(headers)
        for number, header in enumerate(headers, 1):
            _check_size(header, f"shard {number} of {len(headers)}")
        _warn_of_mixed_types(headers)
    if len(headers) > 1:
        _check_tensors(headers)
    _check_same_model(headers)
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
                raise _refused(
                    what, header.path, "shards were swapped or renamed: give each its own name back"
                )
    if len(prefixes) > 1:
        raise _refused(f"shards of different models: {', '.join(sorted(prefixes))}", headers[0].path.parent)


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
                raise _refused(f"tensor {tensor.name!r} is in {twice}", header.path)
            owner[tensor.name] = number
    for number, header in enumerate(headers, 1):
        total = header.count("split.tensors.count", len(owner))
        if total != len(owner):
            says = f"shard {number} of {len(headers)} says the model has {total:,} tensors"
            raise _refused(f"{says}; the shards hold {len(owner):,}", header.path)


def _check_same_model(headers: Sequence[GGUFHeader]) -> None:
    """Fields must agree; alignment may not: llama.cpp reads each shard by its own."""
    first = headers[0]
    if not first.architecture and "general.type" not in first:
        raise _refused("names no architecture", first.path, GET_AGAIN)
    for number, header in enumerate(headers[1:], 2):
        for key in set(first) & set(header) - {"split.no", "split.count", "general.alignment"}:
            if header[key] != first[key]:
                says = f"shard {number} says {key} = {header[key]!r:.80}"
                raise _refused(f"{says}, shard 1 says {first[key]!r:.80}", header.path)


def _warn_of_mixed_types(headers: Sequence[GGUFHeader]) -> None:
    """Warn of routed experts that share no type with those of earlier shards."""
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
    """One row a shard, index ``shard`` (from 1)."""
    import pandas as pd

    columns = ["shard", "file", "tensors", "first_tensor", "header_bytes", "data_bytes", "file_bytes"]
    rows = [
        (number, it.path.name, len(it.tensors), it.tensors[0].name if it.tensors else "")
        + (it.data_offset, it.data_nbytes, it.file_size)
        for number, it in enumerate(shards.headers, 1)
    ]
    return pd.DataFrame(rows, columns=columns).set_index("shard")
