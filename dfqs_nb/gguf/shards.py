"""Shards of one model: find them all from any, and check that they belong together.

Their headers have ``split.no`` (from 0), ``split.count`` and ``split.tensors.count`` (of the whole model).
Like llama.cpp, we need the count in shard 1 only. A single file is a set of one, whatever its name is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import ShardError
from dfqs_nb.core.files import CHUNK_BYTES, sha256_of
from dfqs_nb.gguf.header import GET_AGAIN, GGUFHeader, Tensor, check_layout, read_header

# a file's name, or an address, which may go on with a revision or a query
SHARD_NAME = re.compile(r"(?P<prefix>.+)-(\d{5})-of-(?P<count>\d{5})(\.gguf(?:[@?#].*)?)", re.DOTALL | re.I)
MAX_SHARDS = 65_535  # split.count is a u16


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
        return sum({header.path: header.file_size for header in self.headers}.values())  # one, if glued

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all shards; each offset is that in its shard."""
        return tuple(tensor for header in self.headers for tensor in header.tensors)

    @cached_property
    def as_one(self) -> GGUFHeader:
        """Shard 1's header with the tensors of all shards: the model for facts (offsets mean nothing)."""
        return replace(self.headers[0], tensors=self.tensors, file_size=self.nbytes)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all files, one after another, read once, under a progress bar."""
        return sha256_of(*self.paths)

    @property
    def name(self) -> str:
        """``model`` for ``model-00001-of-00002.gguf``, ``model.gguf`` and ``model.gguf.part00``."""
        match = SHARD_NAME.fullmatch(self.paths[0].name)
        return match["prefix"] if match else self.paths[0].stem.removesuffix(".gguf")

    def stamps(self) -> list[list[Any]]:
        """Name, bytes and time (ns) of each file now: what kept work on these files has in common."""
        return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in self.paths]

    def open(self, path: Path) -> Any:
        """A shard's bytes, for reading in a ``with`` block."""
        return path.open("rb")

    def tensor_hashes(self, names: Container[str] | None = None) -> dict[str, str]:
        """XXH64 of every tensor, or of these, by name, as ``llama-gguf-hash --xxh64`` has it."""
        from xxhash import xxh64

        digests = {tensor.name: xxh64() for tensor in self.tensors if names is None or tensor.name in names}
        total = sum(tensor.nbytes for tensor in self.tensors if tensor.name in digests)
        with tqdm(total=total, unit="B", unit_scale=True, desc="hash") as bar:
            for header in self.headers:
                check_layout(header)
                with self.open(header.path) as file:
                    for tensor in (t for t in header.tensors if t.name in digests):
                        file.seek(header.data_offset + tensor.offset)
                        for left in range(tensor.nbytes, 0, -CHUNK_BYTES):
                            piece = file.read(min(left, CHUNK_BYTES))
                            if len(piece) < min(left, CHUNK_BYTES):
                                raise _refused(f"ended inside tensor {tensor.name!r}", header.path, GET_AGAIN)
                            digests[tensor.name].update(piece)
                            bar.update(len(piece))
        return {name: digest.hexdigest() for name, digest in digests.items()}


Files = str | Path | ShardSet  # a model: the file or any of its shards, or its shards as they were opened


def shard_path(prefix: str | Path, number: int, count: int) -> Path:
    """The path llama.cpp gives shard ``number`` (from 1) of ``count``."""
    return Path(f"{prefix}-{number:05d}-of-{count:05d}.gguf")


def _refused(what: str, where: Path, hint: str = "take all shards from one model") -> ShardError:
    return ShardError(what, where=where, hint=hint)


def open_shards(model: Files | GGUFHeader | Sequence[str | Path]) -> ShardSet:
    """Find (from any) or take (from several paths, in any order) the shards of a model, and check them.

    `HeaderError`: llama.cpp could not read a header. `ShardError`: the shards are no whole model, or changed.
    """
    if isinstance(model, ShardSet):
        for it in model.headers:
            if not it.path.is_file() or it.path.stat().st_size != it.file_size:
                raise _refused("is gone, or has changed since it was opened", it.path, "open the model again")
        return model
    if isinstance(model, (str, Path)):
        model = read_header(model)
    if isinstance(model, GGUFHeader):
        return check_set([model if path == model.path else read_header(path) for path in find_shards(model)])
    return check_set([read_header(path) for path in model])


def find_shards(header: GGUFHeader) -> tuple[Path, ...]:
    """All shards of the model that this header's file is one of, in order, by llama.cpp's naming."""
    path = header.path  # browsers add " (1)" to the name of a second download
    match = SHARD_NAME.fullmatch(re.sub(r" \(\d+\)(?=\.gguf$)", "", path.name))
    number, count = header.count("split.no") + 1, header.count("split.count")
    if "split.count" not in header and "split.no" in header and match:
        count = int(match["count"])  # only shard 1 must have the field
    if count <= 1:
        return (path,)
    if not number <= count <= MAX_SHARDS:
        raise _refused(f"claims to be shard {number:,} of {count:,}", path, GET_AGAIN)
    prefix = path.parent / (match["prefix"] if match else path.stem)
    siblings = tuple(shard_path(prefix, i, count) for i in range(1, count + 1))
    if path.name != (name := siblings[number - 1].name):  # llama.cpp wants exactly this, also in lower case
        what = f"is shard {number} of {count} by its header, but is not named so"
        hint = f"name all {count}: `dfqs-nb merge SHARD... -o model.gguf`, or rename it to {name!r}"
        if (other := siblings[number - 1]).exists():
            same = other.stat().st_size == header.file_size
            copy = f"{name!r} is there: name that, and delete this one if it is a copy"
            hint = copy if same else f"{hint} (move that one away first)"
        raise _refused(what, path, hint)
    if missing := [sibling.name for sibling in siblings if not sibling.is_file()]:
        what = f"{len(missing)} of {count} shards missing: {', '.join(missing)}"
        raise _refused(what, path.parent, "download or rename what is missing in that folder")
    return siblings


def check_set(headers: Sequence[GGUFHeader], *, glued: bool = False) -> ShardSet:
    """Check that headers, in any order, are one set of shards; of ``glued`` ones, not the file's size."""
    headers = _in_order(headers)
    first, names = headers[0], Counter(tensor.name for header in headers for tensor in header.tensors)
    if not first.architecture and "general.type" not in first:
        raise _refused("names no architecture", first.path, GET_AGAIN)
    prefixes = {match["prefix"] for it in headers if (match := SHARD_NAME.fullmatch(it.path.name))}
    if len(prefixes) > 1:
        raise _refused(f"shards of different models: {', '.join(sorted(prefixes))}", first.path.parent)
    if twice := [name for name, n in names.items() if n > 1]:
        raise _refused(f"tensor {twice[0]!r} is in {names[twice[0]]} shards", first.path.parent)
    for number, header in enumerate(headers, 1):
        which = f"shard {number} of {len(headers)}"
        if not glued:
            check_layout(header)  # the last tensor may lack its padding
            if (more := header.file_size - header.end_offset) > 0:
                what = f"{which} has {more:,} bytes more than its header accounts for ({header.end_offset:,})"
                raise _refused(what, header.path, "is it glued together? `dfqs-nb inspect FILE` says more")
        if len(headers) > 1 and (total := header.count("split.tensors.count", len(names))) != len(names):
            what = f"{which} says the model has {total:,} tensors; the shards hold {len(names):,}"
            raise _refused(what, header.path)
        # Fields must agree; alignment may not: llama.cpp reads each shard by its own.
        for key in set(first) & set(header) - {"split.no", "split.count", "general.alignment"}:
            if header is not first and header[key] != first[key]:
                what = f"{which} says {key} = {header[key]!r:.80}, shard 1 says {first[key]!r:.80}"
                raise _refused(what, header.path)
    return ShardSet(tuple(headers))


def _in_order(headers: Sequence[GGUFHeader]) -> list[GGUFHeader]:
    if not headers:
        raise ShardError("no shard was named", hint="name one shard, or all of them")
    count = next((n for header in headers if (n := header.count("split.count")) > 1), 1)
    if count > MAX_SHARDS:  # a hostile number fills the memory
        raise _refused(f"claims to be of {count:,} shards", headers[0].path, GET_AGAIN)
    by_number = dict[int, GGUFHeader]()
    for header in headers:
        if (own := max(header.count("split.count", count), 1)) != count:
            raise _refused(f"belongs to a set of {own}, not of {count}", header.path)
        number = header.count("split.no") + 1 if count > 1 else 1
        if (other := by_number.setdefault(number, header)) is not header:
            what = f"shard {number} of {count} is there twice" if count > 1 else "a whole model, no shard"
            what += f" (the other is {other.path.name})" if other.path != header.path else ""
            raise _refused(what, header.path, "name each shard of one model once")
    if missing := ", ".join(str(number) for number in range(1, count + 1) if number not in by_number):
        raise _refused(f"shard {missing} of {count} is missing", headers[0].path.parent, "name all of them")
    return [by_number[number] for number in sorted(by_number)]
