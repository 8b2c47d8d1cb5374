"""Which experts to keep in fast memory for a budget, and how much of this llama.cpp can do.

llama.cpp places tensors, and all experts of a layer share one tensor each for gate, up and down. So whole
layers move. Every token reads k experts in each layer: no profile can prefer a layer to another, only its
size can. Single hot experts stay fast where the system's page cache keeps them (``mmap``); their expected hit
rate is cross-validated over texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError

from dfqs_nb.core.display import one_line
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import read_json, write_json
from dfqs_nb.gguf.facts import experts
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.routing.profile import Profile
from dfqs_nb.stats import mean_interval

BUDGETS = (0.1, 0.25, 0.5, 0.75)  # of the bytes of all routed experts
EXPERT_TENSOR = re.compile(r"blk\.(\d+)\.ffn_\w+_exps\.(?:weight|bias)")


def _expert_tensors(headers: Sequence[GGUFHeader]) -> Iterator[tuple[int, int]]:
    """Layer and bytes of each tensor of routed experts."""
    for tensor in (tensor for header in headers for tensor in header.tensors):
        if match := EXPERT_TENSOR.fullmatch(tensor.name):
            yield int(match[1]), tensor.nbytes


def expert_bytes(path: str | Path, layers: np.ndarray) -> np.ndarray:
    """Bytes of all routed experts of each of these layers, from the header, int64 ``(L,)``."""
    sizes = Counter[int]()
    for layer, nbytes in _expert_tensors(open_shards(path).headers):
        sizes[layer] += nbytes
    return np.array([sizes[int(layer)] for layer in layers], np.int64)


def placement(profile: Profile, layer_bytes: np.ndarray) -> pd.DataFrame:
    """One row a budget: what llama.cpp can keep fast, and what single experts would give.

    Columns ``budget`` (share of the routed experts' bytes), ``bytes``, ``layers`` (kept fast as a whole, the
    smallest first, of equals the last), ``hit_rate`` (share of the bytes read that they serve), ``arguments``
    (of llama.cpp), ``experts_hit_rate`` with ``low`` and ``high`` (single experts chosen by the profile, on
    texts that did not choose them; 95 % interval over texts, NaN for fewer than six texts).
    """
    layers, total = profile.trace.layers, int(layer_bytes.sum())
    hits = profile.hit_rates(BUDGETS, layer_bytes / profile.trace.n_experts)
    order = np.lexsort((-layers, layer_bytes))
    spent = layer_bytes[order].cumsum()
    fast = [np.sort(order[spent <= budget * total * (1 + 1e-9)]) for budget in BUDGETS]
    columns = {
        "budget": BUDGETS,
        "bytes": [int(budget * total) for budget in BUDGETS],
        "layers": list(map(len, fast)),
        "hit_rate": [float(layer_bytes[kept].sum() / total) for kept in fast],
        "arguments": [arguments(layers, layers[kept]) for kept in fast],
        "experts_hit_rate": hits.mean(axis=1),
    }
    return pd.DataFrame(columns).join(pd.DataFrame(map(mean_interval, hits), columns=["low", "high"]))


def arguments(layers: np.ndarray, fast: np.ndarray) -> str:
    """llama.cpp's arguments that keep the experts of the ``fast`` layers on the GPU, and the others in RAM.

    >>> arguments(np.arange(4), np.array([2, 3]))
    '-ngl 99 --n-cpu-moe 2'
    """
    slow = [int(layer) for layer in layers if layer not in fast]
    if not slow:
        return "-ngl 99"
    if max(slow) < min((int(layer) for layer in fast), default=max(slow) + 1):
        return f"-ngl 99 --n-cpu-moe {max(slow) + 1}"
    return f'-ngl 99 -ot "blk\\.({"|".join(map(str, slow))})\\.ffn_.*_exps=CPU"'


def write_profile(path: str | Path, profile: Profile, layer_bytes: np.ndarray) -> Path:
    """The profile as JSON, for planning: each layer's bytes an expert, and every expert's reads a token.

    Keys ``format`` (1), ``model`` (name, architecture, SHA-256 of its header), ``experts_used`` (k),
    ``texts``, ``tokens``, and ``layers``: ``layer``, ``hashed``, ``expert_bytes``, ``reads`` (domains alike).
    """
    trace, shares = profile.trace, profile.usage()["share"].to_numpy().reshape(len(layer_bytes), -1)
    names = ("layer", "hashed", "expert_bytes", "reads")
    reads, sizes = (shares * profile.k).round(6).tolist(), (layer_bytes // trace.n_experts).tolist()
    rows = zip(trace.layers.tolist(), trace.hashed.tolist(), sizes, reads, strict=True)
    stored = {
        "format": 1,
        "model": trace.conditions.get("model"),
        "experts_used": profile.k,
        "texts": len(profile.domains),
        "tokens": trace.n_tokens,
        "layers": [dict(zip(names, row, strict=True)) for row in rows],
    }
    return write_json(path, stored)


class _LayerReads(BaseModel):
    layer: int
    reads: list[Annotated[float, Ge(0), Le(1)]]  # a token reads an expert once at most


class _ProfileFile(BaseModel):
    format: Literal[1]
    model: dict[str, Any] | None
    texts: int
    tokens: int
    layers: list[_LayerReads]


def read_profile(path: str | Path, headers: Sequence[GGUFHeader]) -> tuple[dict[int, list[float]], str]:
    """How often a token reads each expert of a layer, as `write_profile` wrote it, and what was recorded.

    Raises:
        DfqsError: the file is not a profile, or is of another model.
    """
    try:
        stored = _ProfileFile.model_validate(read_json(path))
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        what, hint = f"not a routing profile ({why})", "write it: dfqs-nb routing MODEL"
        raise DfqsError(what, where=path, hint=hint) from None
    name = one_line((stored.model or {}).get("name", "a model without a name"))
    layers, n_experts = {layer.layer: layer.reads for layer in stored.layers}, experts(headers[0]).total
    if set(layers) - dict(_expert_tensors(headers)).keys() or {*map(len, layers.values())} != {n_experts}:
        hint = "write one of this model: dfqs-nb routing MODEL"
        raise DfqsError(f"a profile of another model ({name})", where=path, hint=hint)
    return layers, f"{stored.tokens:,} tokens of {stored.texts} texts, recorded on {name}"
