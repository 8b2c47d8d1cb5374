"""How two models differ: metadata fields, tensors, types, shapes, and on request the bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.remote import Outline, shown
from dfqs_nb.gguf.shards import tensor_hashes

SHOWN = 60  # characters of a value
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
        return not self.lines

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
    headers = a.shards.as_one, b.shards.as_one
    left, right = (
        {t.name: f"{t.type} {' x '.join(map(str, t.shape))}" for t in it.tensors} for it in headers
    )
    both = [name for name in left if name in right]
    alike = {name for name in both if left[name] == right[name]}
    fields = [name for name in {**headers[0].fields, **headers[1].fields} if name not in SPLIT]
    lines = {
        "only in the first": [f"{name}: {left[name]}" for name in left if name not in right],
        "only in the second": [f"{name}: {right[name]}" for name in right if name not in left],
        "other type or shape": [f"{it}: {left[it]} | {right[it]}" for it in both if it not in alike],
        "metadata": [line for name in fields if (line := _field(name, *headers))],
    }
    if data:
        for model in (a, b):  # before hours of reading the other model
            if model.glued:
                first = "download it, then" if model.copy else "first:"
                hint = f"{first} `dfqs-nb repair {'FILE' if model.copy else quoted(model.model)} --in-place`"
                what = "the bytes of glued shards are not compared"
                raise DfqsError(what, where=shown(model.model), hint=hint)
        hashes, others = (tensor_hashes(it.shards.headers, alike, opened=it.open) for it in (a, b))
        lines["other bytes"] = sorted(name for name in alike if hashes[name] != others[name])
    lines = {kind: rows for kind, rows in lines.items() if rows}
    return Difference(lines, len(fields), len(left | right), len(alike) if data else None)


def _field(name: str, a: GGUFHeader, b: GGUFHeader) -> str:
    """The line for a field that differs; else an empty text."""
    x: Any = a.get(name)
    y: Any = b.get(name)
    texts: list[str] = []
    kinds = [(it.fields[name].type, it.fields[name].count) if name in it else None for it in (a, b)]
    if kinds[0] == kinds[1] and x == y:
        return ""
    what = f"{name}: "
    if kinds[0] == kinds[1] and isinstance(x, list):
        differ = [at for at, (mine, theirs) in enumerate(zip(x, y, strict=True)) if mine != theirs]
        what += f"{len(differ):,} of {len(x):,} x {a.fields[name].type}, first at {differ[0]:,}: "
        texts = [repr(x[differ[0]]), repr(y[differ[0]])]
    for kind, value in zip(kinds, (x, y), strict=True) if not texts else ():
        known = kind and (f"{kind[0]} {value!r}" if kind[1] is None else f"{kind[1]:,} x {kind[0]}")
        texts.append(known or "missing")
    start = max(0, len(os.path.commonprefix(texts)) - SHOWN // 2) if max(map(len, texts)) > SHOWN else 0
    parts = [(text[start : start + SHOWN], len(text) > start + SHOWN) for text in texts]
    return what + " | ".join(f"{'…' * (start > 0)}{part}{'…' * more}" for part, more in parts)
