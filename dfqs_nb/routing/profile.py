"""What the routers prefer: how often each expert is read, and how many of them carry most of the work."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

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
    shares = {"all": np.mean(list(reads.values()), axis=0), **reads}
    curves = {name: np.sort(it)[:, ::-1].cumsum(axis=1).mean(axis=0) for name, it in shares.items()}
    needed = {f"{p:.0%}": {name: int((it < p).sum()) + 1 for name, it in curves.items()} for p in SHARES}
    return pd.DataFrame(needed).rename_axis("domain")
