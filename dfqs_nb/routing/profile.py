"""What the routers prefer: how often each expert is read, and how many of them carry most of the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError

from dfqs_nb.core.display import one_line
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import read_json, write_json
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.placement import Layout
from dfqs_nb.routing.trace import Trace

SHARES = (0.5, 0.8, 0.9, 0.95)  # of choices, of which experts are counted


def reads_by_domain(trace: Trace) -> dict[str, np.ndarray]:
    """A layer's choices as shares ``(L, experts)``, by domain: means over its texts.

    Of a trace of several texts, whose domains and lengths are in its conditions.
    """
    lengths, (_, n_layers, k) = trace.conditions["lengths"], trace.experts.shape
    shape = len(lengths), n_layers, trace.n_experts
    row = np.repeat(np.arange(len(lengths)), lengths)[:, None] * n_layers + np.arange(n_layers)
    places = (row[:, :, None] * trace.n_experts + trace.experts).ravel()
    counts = np.bincount(places, minlength=math.prod(shape)).reshape(shape)
    shares = counts / (k * np.maximum(lengths, 1)[:, None, None])
    domains = np.array(trace.conditions["domains"])
    return {name: shares[domains == name].mean(axis=0) for name in dict.fromkeys(domains.tolist())}


def experts_needed(trace: Trace) -> pd.DataFrame:
    """How many of a layer's experts, the busiest first, get a share of its choices (mean over layers).

    A row a domain, and one of ``all`` domains alike; a column a share.
    """
    reads = reads_by_domain(trace)
    rows = {"all": np.mean(list(reads.values()), axis=0), **reads}
    curves = {name: np.sort(reads)[:, ::-1].cumsum(axis=1).mean(axis=0) for name, reads in rows.items()}
    needed = {f"{p:.0%}": {name: int((it < p).sum()) + 1 for name, it in curves.items()} for p in SHARES}
    return pd.DataFrame(needed).rename_axis("domain")


def write_profile(path: str | Path, trace: Trace) -> Path:
    """The profile as JSON, for planning: how often a token reads each expert of a layer.

    Keys ``format`` (2), ``model`` (its name), ``texts``, ``tokens``; ``reads`` by layer, domains alike.
    """
    reads = np.mean(list(reads_by_domain(trace).values()), axis=0) * trace.experts.shape[2]
    about = {"model": trace.conditions["model"], "texts": len(trace.conditions["lengths"])}
    by_layer = dict(zip(trace.layers.tolist(), reads.round(6).tolist(), strict=True))
    return write_json(path, {"format": 2, **about, "tokens": trace.n_tokens, "reads": by_layer})


class _ProfileFile(BaseModel):
    format: Literal[2]
    model: str
    texts: int
    tokens: int
    reads: dict[int, list[Annotated[float, Ge(0), Le(1)]]]  # a token reads an expert once at most


def read_profile(path: str | Path, headers: Sequence[GGUFHeader]) -> tuple[dict[int, list[float]], str]:
    """How often a token reads each expert of a layer, as `write_profile` wrote it, and what was recorded.

    A `DfqsError` if the file is not a profile, or is of another model.
    """
    try:
        stored = _ProfileFile.model_validate(read_json(path))
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        what, hint = f"not a routing profile ({why})", "write it: dfqs-nb routing MODEL"
        raise DfqsError(what, where=path, hint=hint) from None
    name, placed = one_line(stored.model), Layout.of(headers).experts
    if stored.reads.keys() - placed or any(len(it) != placed[n][0].n for n, it in stored.reads.items()):
        hint = "write one of this model: dfqs-nb routing MODEL"
        raise DfqsError(f"a profile of another model ({name})", where=path, hint=hint)
    return stored.reads, f"{stored.tokens:,} tokens of {stored.texts} texts, recorded on {name}"
