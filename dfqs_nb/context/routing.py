"""Routing against context: does the router use the same experts, by the same margin, deep in a context?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from dfqs_nb.routing import Trace, expert_counts

if TYPE_CHECKING:
    import pandas as pd


def usage_by_position(traces: Sequence[Trace], edges: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """How expert usage and router margins change along texts of one kind.

    The overlap of two usages is the sum over experts of the smaller share (1: the same, 0: disjoint),
    averaged over the layers that route by score. The band of one half of the texts is compared with the
    first band of the other half. Even a router blind to position does not reach 1, for the texts differ:
    ``chance`` is the overlap with the same band of the other half. Every band counts as many tokens as
    the first, spread evenly over it, because few choices overlap less than many.

    Columns ``start``, ``end``, ``choices``, ``overlap`` (mean over all ways to halve the texts), ``low``,
    ``high`` (the least and the greatest of them), ``chance``, ``margin_p5`` and ``margin_median``.
    """
    import pandas as pd

    names = "start end choices overlap low high chance margin_p5 margin_median"
    if not traces:
        return pd.DataFrame(columns=names.split())
    scored = ~traces[0].hashed
    usage = np.stack([_usage(trace, scored, edges) for trace in traces])
    halves = _halves(usage)
    rows = []
    for band, (start, end) in enumerate(edges):
        margins = np.concatenate([trace.margin[start:end, scored].ravel() for trace in traces])
        overlaps = [_overlap(a[band], b[0]) for a, b in halves]
        chance = [_overlap(a[band], b[band]) for a, b in halves]
        limits, tail = (min(overlaps), max(overlaps)), np.quantile(margins, (0.05, 0.5))
        rows.append((start, end, len(margins), np.mean(overlaps), *limits, np.mean(chance), *tail))
    return pd.DataFrame(rows, columns=names.split())


def _usage(trace: Trace, scored: np.ndarray, edges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Choices of each expert: ``(bands, layers, experts)``."""
    width = edges[0][1] - edges[0][0]
    picked = [np.linspace(start, end - 1, width).round().astype(int) for start, end in edges]
    return np.stack([expert_counts(trace.experts[tokens][:, scored], trace.n_experts) for tokens in picked])


def _halves(usage: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Usage summed over each half of the texts, for every way to halve them, both ways round."""
    texts = set(range(len(usage)))
    chosen = map(set, combinations(sorted(texts), len(texts) // 2))
    return [(usage[sorted(half)].sum(0), usage[sorted(texts - half)].sum(0)) for half in chosen]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over layers of the sum of smaller shares.

    >>> _overlap(np.array([[1.0, 1.0]]), np.array([[2.0, 0.0]]))
    0.5
    """
    share_a, share_b = (counts / counts.sum(axis=1, keepdims=True) for counts in (a, b))
    return float(np.minimum(share_a, share_b).sum(axis=1).mean())
