"""How two models differ: metadata fields, tensors, types, shapes, and on request the bytes."""

from __future__ import annotations

import os

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.models import shown
from dfqs_nb.gguf.remote import Outline
from dfqs_nb.gguf.shards import tensor_hashes

SHOWN = 60  # characters of a value
SPLIT = ("split.no", "split.count", "split.tensors.count")  # how a model is cut, not what it is


def compare(a: Outline, b: Outline, *, data: bool = False) -> tuple[dict[str, list[str]], str]:
    """What differs between two models, line by line by its kind, and a sentence on what was compared.

    ``data``: also hash every tensor that both have with equal type and shape. This reads a remote model as a
    whole, without storing it.
    """
    headers = a.as_one, b.as_one
    stated = [{t.name: f"{t.type} {' x '.join(map(str, t.shape))}" for t in it.tensors} for it in headers]
    left, right = stated
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
                hint = "repair it first: `dfqs-nb repair FILE --in-place`"
                hint = "download and repair it first" if model.places else hint
                what = "the bytes of glued shards are not compared"
                raise DfqsError(what, where=shown(model.model), hint=hint)
        hashes, others = (tensor_hashes(it.headers, alike, opened=it.open) for it in (a, b))
        lines["other bytes"] = sorted(name for name in alike if hashes[name] != others[name])
    lines = {kind: rows for kind, rows in lines.items() if rows}
    scope = f"{len(fields):,} metadata fields and {len(left | right):,} tensors"
    looked = f"bytes of {len(alike):,} tensors compared" if data else "bytes not compared (--data does)"
    return lines, f"{'different' if lines else 'equal'}: {scope}; {looked}"


def _field(name: str, *headers: GGUFHeader) -> str:
    """The line for a field that differs; else an empty text."""
    own = [(header, header.fields.get(name)) for header in headers]
    texts = [f"{field.type} {header[name]!r}" if field else "missing" for header, field in own]
    if texts[0] == texts[1]:
        return ""
    # of long texts and lists, the place where they begin to differ
    start = max(0, len(os.path.commonprefix(texts)) - SHOWN // 2) if max(map(len, texts)) > SHOWN else 0
    parts = [(text[start : start + SHOWN], len(text) > start + SHOWN) for text in texts]
    return f"{name}: " + " | ".join(f"{'…' * (start > 0)}{part}{'…' * more}" for part, more in parts)
