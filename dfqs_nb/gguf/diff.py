"""How two models differ: metadata fields, tensors, types, shapes, and the bytes where asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqs_nb.core.display import quoted, tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.header import GGUFHeader, Tensor
from dfqs_nb.gguf.remote import Outline, shown

SHOWN = 60  # characters of a value
CHUNK = 8 << 20
SPLIT = ("split.no", "split.count", "split.tensors.count")  # they say how the model is cut, not what it is


@dataclass(frozen=True)
class Difference:
    """What differs, line by line; ``n_compared`` tensors had their bytes compared."""

    lines: dict[str, list[str]]
    n_fields: int
    n_tensors: int
    n_compared: int | None

    @property
    def equal(self) -> bool:
        """Whether nothing differs of what was compared."""
        return not any(self.lines.values())

    @property
    def sentence(self) -> str:
        """The result for people."""
        scope = f"{self.n_fields:,} metadata fields and {self.n_tensors:,} tensors"
        bytes_too = "bytes not compared (--data does)"
        if self.n_compared is not None:
            bytes_too = f"bytes of {self.n_compared:,} tensors compared"
        return f"{'equal' if self.equal else 'different'}: {scope}; {bytes_too}"


def compare(a: Outline, b: Outline, *, data: bool = False) -> Difference:
    """Compare two models, in one file or in shards, local or remote.

    Args:
        data: also hash every tensor that both have with equal type and shape. Of a remote model this reads
            the whole file, without storing it.
    """
    first, second = a.shards.as_one, b.shards.as_one
    fields = [name for name in {**first.fields, **second.fields} if name not in SPLIT]
    left, right = ({tensor.name: tensor for tensor in header.tensors} for header in (first, second))
    both = [name for name in left if name in right]
    lines = {
        "only in the first": [_row(left[name]) for name in left if name not in right],
        "only in the second": [_row(right[name]) for name in right if name not in left],
        "other type or shape": [
            f"{name}: {_kind(left[name])} | {_kind(right[name])}"
            for name in both
            if _kind(left[name]) != _kind(right[name])
        ],
        "metadata": [line for name in fields if (line := _field(name, first, second))],
    }
    n_compared = None
    if data:
        _refuse_glued(a, b)  # before hours of reading the other one
        alike = {name for name in both if _kind(left[name]) == _kind(right[name])}
        with ThreadPoolExecutor(2) as pool:
            hashes = list(pool.map(lambda side: _hashes(side, alike), (a, b)))
        lines["other bytes"] = sorted(name for name in alike if hashes[0][name] != hashes[1][name])
        n_compared = len(alike)
    return Difference({k: v for k, v in lines.items() if v}, len(fields), len({**left, **right}), n_compared)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.type} {' x '.join(map(str, tensor.shape))}"


def _row(tensor: Tensor) -> str:
    return f"{tensor.name}: {_kind(tensor)}"


def _field(name: str, a: GGUFHeader, b: GGUFHeader) -> str:
    """The line for one field, with what differs in it; empty where both have the same type and value."""
    if name not in a or name not in b:
        return f"{name}: {_shown(a, name)} | {_shown(b, name)}"
    first, second, x, y = a.fields[name], b.fields[name], a[name], b[name]
    if x == y and first.type == second.type:
        return ""
    if first.count is None or (first.count, first.type) != (second.count, second.type):
        return f"{name}: {' | '.join(_excerpts(_shown(a, name), _shown(b, name)))}"
    differ = [at for at, (mine, theirs) in enumerate(zip(x, y, strict=True)) if mine != theirs]
    values = " | ".join(_excerpts(repr(x[differ[0]]), repr(y[differ[0]])))
    return f"{name}: {len(differ):,} of {first.count:,} x {first.type}, first at {differ[0]:,}: {values}"


def _shown(header: GGUFHeader, name: str) -> str:
    if name not in header:
        return "missing"
    field = header.fields[name]
    return f"{field.type} {header[name]!r}" if field.count is None else f"{field.count:,} x {field.type}"


def _excerpts(*texts: str) -> list[str]:
    """Texts of at most `SHOWN` characters each, cut so that the first difference is in them."""
    start = max(0, len(os.path.commonprefix(texts)) - SHOWN // 2) if max(map(len, texts)) > SHOWN else 0
    return [
        "…" * (start > 0) + text[start : start + SHOWN] + "…" * (len(text) > start + SHOWN) for text in texts
    ]


def _refuse_glued(*both: Outline) -> None:
    for model in both:
        if model.glued:
            hint = f"first: `dfqs-nb repair {quoted(model.model)} --in-place`"
            if model.copy:
                hint = "download it first, and repair it with `dfqs-nb repair FILE --in-place`"
            raise DfqsError("the bytes of glued shards are not compared", where=shown(model.model), hint=hint)


def _hashes(model: Outline, names: set[str]) -> dict[str, str]:
    """XXH64 of tensors, shard by shard, each read in the order of its file."""
    import xxhash

    digests = {}
    with ExitStack() as stack:
        for header in model.shards.headers:
            file = stack.enter_context(model.open(header.path))
            for tensor in tqdm(header.tensors, desc=Path(header.path).name, leave=False):
                if tensor.name in names:
                    digest = xxhash.xxh64()
                    for chunk in _chunks(file, header.data_offset + tensor.offset, tensor.nbytes):
                        digest.update(chunk)
                    digests[tensor.name] = digest.hexdigest()
    return digests


def _chunks(file: Any, start: int, nbytes: int) -> Iterator[bytes]:
    file.seek(start)
    while nbytes and (chunk := file.read(min(CHUNK, nbytes))):
        nbytes -= len(chunk)
        yield chunk
