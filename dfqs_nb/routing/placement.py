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
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError

from dfqs_nb.core.display import one_line
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.files import read_json, write_json
from dfqs_nb.gguf.facts import experts
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.routing.profile import Profile, hit_rates
from dfqs_nb.stats import mean_interval

if TYPE_CHECKING:
    import pandas as pd

BUDGETS = (0.1, 0.25, 0.5, 0.75)  # of the bytes of all routed experts
EXPERT_TENSOR = re.compile(r"blk\.(\d+)\.ffn_\w+_exps\.(?:weight|bias)")


def _expert_tensors(headers: Sequence[GGUFHeader]) -> Iterator[tuple[int, int]]:
    """Layer and bytes of each tensor of routed experts."""
    for tensor in (tensor for header in headers for tensor in header.tensors):
        if match := EXPERT_TENSOR.fullmatch(tensor.name):
            yield int(match[1]), tensor.nbytes


def require_experts(path: str | Path) -> None:
    """Refuse a dense model (`ModelError`) by its header, before anything is loaded."""
    if not any(_expert_tensors(open_shards(path).headers)):
        hint = "only the determinism of its logits can be measured: leave --export out"
        raise ModelError("no routed experts here: a dense model", where=path, hint=hint)


def expert_bytes(path: str | Path, layers: np.ndarray) -> np.ndarray:
    """Bytes of all routed experts of each of these layers, from the header, int64 ``(L,)``."""
    sizes = Counter[int]()
    for layer, nbytes in _expert_tensors(open_shards(path).headers):
        sizes[layer] += nbytes
    return np.array([sizes[int(layer)] for layer in layers], np.int64)


def placement(profile: Profile, layer_bytes: np.ndarray, budgets: Sequence[float] = BUDGETS) -> pd.DataFrame:
    """One row a budget: what llama.cpp can keep fast, and what single experts would give.

    Columns ``budget`` (share of the routed experts' bytes), ``bytes``, ``layers`` (kept fast as a whole, the
    smallest first, of equals the last), ``hit_rate`` (share of the bytes read that they serve), ``arguments``
    (of llama.cpp), ``experts_hit_rate`` with ``low`` and ``high`` (single experts chosen by the profile, on
    texts that did not choose them; 95 % interval over texts, NaN for fewer than six texts).
    """
    import pandas as pd

    layers, total = profile.trace.layers, int(layer_bytes.sum())
    hits = hit_rates(profile, budgets, layer_bytes / profile.trace.n_experts)
    order = np.lexsort((-layers, layer_bytes))
    spent = layer_bytes[order].cumsum()
    rows = []
    for budget, hit in zip(budgets, hits, strict=True):
        fast = np.sort(order[spent <= budget * total * (1 + 1e-9)])
        low, high = mean_interval(hit)
        rows.append(
            {
                "budget": budget,
                "bytes": int(budget * total),
                "layers": len(fast),
                "hit_rate": float(layer_bytes[fast].sum() / total),
                "arguments": arguments(layers, layers[fast]),
                "experts_hit_rate": float(hit.mean()),
                "low": low,
                "high": high,
            }
        )
    return pd.DataFrame(rows)


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
    layers = [
        {
            "layer": int(trace.layers[column]),
            "hashed": bool(trace.hashed[column]),
            "expert_bytes": int(layer_bytes[column] // trace.n_experts),
            "reads": (shares[column] * profile.k).round(6).tolist(),
        }
        for column in range(len(layer_bytes))
    ]
    about = {"format": 1, "model": trace.conditions.get("model"), "experts_used": profile.k}
    sizes = {"texts": len(profile.names), "tokens": trace.n_tokens}
    return write_json(path, {**about, **sizes, "layers": layers})


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
        what = f"not a routing profile ({why})"
        raise DfqsError(what, where=path, hint="write it: dfqs-nb routing MODEL") from None
    name = one_line((stored.model or {}).get("name", "a model without a name"))
    layout, layers = experts(headers[0]), {layer.layer: layer.reads for layer in stored.layers}
    if not set(layers) <= dict(_expert_tensors(headers)).keys() or {
        len(reads) for reads in layers.values()
    } != {layout.total}:
        what = f"a profile of another model ({name})"
        raise DfqsError(what, where=path, hint="write one of this model: dfqs-nb routing MODEL")
    return layers, f"{stored.tokens:,} tokens of {stored.texts} texts, recorded on {name}"
