"""How two models differ: metadata fields, tensors, types, shapes, and on request the bytes."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dfqs_nb.core.display import quoted, tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.header import GGUFHeader, Tensor
from dfqs_nb.gguf.remote import Outline, shown

SHOWN = 60  # characters of a value
CHUNK = 8 << 20
SPLIT = ("split.no", "split.count", "split.tensors.count")  # how a model is cut, not what it is


@dataclass(frozen=True)
class Difference:
    """What differs, line by line; ``n_compared`` tensors had their bytes compared (None: not asked for)."""

    lines: dict[str, list[str]]
    n_fields: int
    n_tensors: int
    n_compared: int | None

    @property
    def equal(self) -> bool:
        """Whether nothing that was compared differs."""
        return not any(self.lines.values())

    @property
    def sentence(self) -> str:
        """The result for people."""
        scope = f"{self.n_fields:,} metadata fields and {self.n_tensors:,} tensors"
        data = "bytes not compared (--data does)"
        data = data if self.n_compared is None else f"bytes of {self.n_compared:,} tensors compared"
        return f"{'equal' if self.equal else 'different'}: {scope}; {data}"


def compare(a: Outline, b: Outline, *, data: bool = False) -> Difference:
    """Compare two models, in one file or in shards, local or remote.

    ``data``: also hash every tensor that both have with equal type and shape. This reads a remote model as a
    whole, without storing it.
    """
    first, second = a.shards.as_one, b.shards.as_one
    fields = [name for name in {**first.fields, **second.fields} if name not in SPLIT]
    left, right = ({tensor.name: _kind(tensor) for tensor in it.tensors} for it in (first, second))
    both = [name for name in left if name in right]
    alike = {name for name in both if left[name] == right[name]}
    lines = {
        "only in the first": [f"{name}: {left[name]}" for name in left if name not in right],
        "only in the second": [f"{name}: {right[name]}" for name in right if name not in left],
        "other type or shape": [f"{it}: {left[it]} | {right[it]}" for it in both if it not in alike],
        "metadata": [line for name in fields if (line := _field(name, first, second))],
    }
    if data:
        _refuse_glued(a, b)  # before hours of reading the other model
        hashes, others = _hashes(a, alike), _hashes(b, alike)
        lines["other bytes"] = sorted(name for name in alike if hashes[name] != others[name])
    lines = {kind: rows for kind, rows in lines.items() if rows}
    return Difference(lines, len(fields), len(left | right), len(alike) if data else None)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.type} {' x '.join(map(str, tensor.shape))}"


def _field(name: str, a: GGUFHeader, b: GGUFHeader) -> str:
    """The line for a field that differs; else an empty text."""
    if name in a and name in b and a.fields[name].type == b.fields[name].type:
        x, y = a[name], b[name]
        if x == y:
            return ""
        if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
            differ = [at for at, (mine, theirs) in enumerate(zip(x, y, strict=True)) if mine != theirs]
            values = " | ".join(_excerpts(repr(x[differ[0]]), repr(y[differ[0]])))
            return f"{name}: {len(differ):,} of {_shown(a, name)}, first at {differ[0]:,}: {values}"
    return f"{name}: {' | '.join(_excerpts(_shown(a, name), _shown(b, name)))}"


def _shown(header: GGUFHeader, name: str) -> str:
    if name not in header:
        return "missing"
    field = header.fields[name]
    return f"{field.type} {header[name]!r}" if field.count is None else f"{field.count:,} x {field.type}"


def _excerpts(*texts: str) -> list[str]:
    """Texts of at most `SHOWN` characters each, around the first difference."""
    start = max(0, len(os.path.commonprefix(texts)) - SHOWN // 2) if max(map(len, texts)) > SHOWN else 0
    return [
        "…" * (start > 0) + text[start : start + SHOWN] + "…" * (len(text) > start + SHOWN) for text in texts
    ]


def _refuse_glued(*both: Outline) -> None:
    for model in both:
        if model.glued:
            first = "download it, then" if model.copy else "first:"
            hint = f"{first} `dfqs-nb repair {'FILE' if model.copy else quoted(model.model)} --in-place`"
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
                    digest, left = xxhash.xxh64(), tensor.nbytes
                    file.seek(header.data_offset + tensor.offset)
                    while left and (chunk := file.read(min(CHUNK, left))):
                        digest.update(chunk)
                        left -= len(chunk)
                    digests[tensor.name] = digest.hexdigest()
    return digests
