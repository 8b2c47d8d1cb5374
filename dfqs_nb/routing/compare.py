"""Compare routing traces: which expert sets differ, where, at what margin, and how sure a count makes us.

Two choices agree when the *sets* of experts are equal; their order does not matter to the model. Layers that
route by hash are counted apart: their experts follow from the token alone and cannot vary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.routing.trace import RoutingError, Trace

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same tokens.

    Attributes:
        n_tokens, n_layers: what was compared; hash layers are not in ``n_layers``.
        n_choices: tokens x layers.
        n_differ: choices whose expert sets differ.
        share_identical: of expert sets; NaN where there are none.
        overlap: mean share of the k experts that both runs chose.
        first_token, first_layer: where the first different set is; None without one.
        margin_differ: the largest router margin (of the first run) at which a set differs; NaN without one.
        margin_same: the median margin where sets agree.
        n_hash_differ: the same count in hash layers.
        logits_equal: tokens whose logits are equal bit for bit, as a share; NaN when not kept.
        logit_drift: the largest absolute difference of a kept logit; NaN when not kept.
        same_best: share of tokens whose most likely next token is the same.
        same_output: whether the greedy continuations are equal; None when a run has none.
    """

    n_tokens: int
    n_layers: int
    n_choices: int
    n_differ: int
    share_identical: float
    overlap: float
    first_token: int | None
    first_layer: int | None
    margin_differ: float
    margin_same: float
    n_hash_differ: int
    logits_equal: float
    logit_drift: float
    same_best: float
    same_output: bool | None


def require_comparable(a: Trace, b: Trace) -> None:
    """Refuse traces that answer different questions.

    Raises:
        RoutingError: other tokens, other layers, or another number of experts.
    """
    if a.n_tokens != b.n_tokens or not np.array_equal(a.tokens, b.tokens):
        at = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), None)
        detail = f"{a.n_tokens:,} and {b.n_tokens:,} tokens" if at is None else f"they differ at token {at:,}"
        raise RoutingError(f"the traces are of different prompts ({detail})", hint="use the same tokens")
    routers = [(t.layers.tolist(), t.hashed.tolist(), t.experts.shape, t.n_experts) for t in (a, b)]
    if routers[0] != routers[1]:
        raise RoutingError("the traces are of models with different routers", hint="compare like with like")


def differences(a: Trace, b: Trace) -> np.ndarray:
    """Whether the expert sets differ, bool ``(tokens, layers)``."""
    return (np.sort(a.experts, axis=2) != np.sort(b.experts, axis=2)).any(axis=2)


def overlaps(a: Trace, b: Trace) -> np.ndarray:
    """Share of the k chosen experts that both runs chose, float ``(tokens, layers)``."""
    shared = (a.experts[:, :, :, None] == b.experts[:, :, None, :]).any(axis=3)
    return shared.sum(axis=2) / max(1, a.experts.shape[2])


def drifts(a: Trace, b: Trace) -> np.ndarray:
    """The largest absolute difference among each token's kept logits, float ``(tokens,)``, or NaN."""
    if a.logits is None or b.logits is None or not np.array_equal(a.logits.ids, b.logits.ids):
        return np.full(a.n_tokens, np.nan)
    return np.abs(a.logits.values - b.logits.values).max(axis=1)


def compare(a: Trace, b: Trace) -> Comparison:
    """Compare two runs, the first one being the reference.

    Raises:
        RoutingError: they are not of the same tokens and the same routers.
    """
    require_comparable(a, b)
    differ, scored = differences(a, b), ~a.hashed
    routed = differ[:, scored]
    first = np.argwhere(routed)
    kept = a.logits is not None and b.logits is not None
    return Comparison(
        n_tokens=a.n_tokens,
        n_layers=int(scored.sum()),
        n_choices=routed.size,
        n_differ=int(routed.sum()),
        share_identical=float(1 - routed.mean()) if routed.size else math.nan,
        overlap=float(overlaps(a, b)[:, scored].mean()) if routed.size else math.nan,
        first_token=int(first[0][0]) if len(first) else None,
        first_layer=int(a.layers[scored][first[0][1]]) if len(first) else None,
        margin_differ=_or_nan(np.max, a.margin[:, scored][routed]),
        margin_same=_or_nan(np.median, a.margin[:, scored][~routed]),
        n_hash_differ=int(differ[:, a.hashed].sum()),
        logits_equal=float((a.logits.digest == b.logits.digest).mean()) if kept else math.nan,
        logit_drift=float(drifts(a, b).max(initial=0.0)),
        same_best=float((a.logits.best == b.logits.best).mean()) if kept else math.nan,
        same_output=bool(np.array_equal(a.output, b.output)) if len(a.output) and len(b.output) else None,
    )


def _or_nan(statistic: Any, values: np.ndarray) -> float:
    return float(statistic(values)) if values.size else math.nan


def compare_all(traces: Mapping[str, Trace]) -> pd.DataFrame:
    """Every pair of runs: columns ``a``, ``b`` and the fields of `Comparison`."""
    import pandas as pd

    rows = [{"a": a, "b": b, **asdict(compare(traces[a], traces[b]))} for a, b in combinations(traces, 2)]
    return pd.DataFrame(rows)


def by_layer(a: Trace, b: Trace) -> pd.DataFrame:
    """One row a layer: ``layer``, ``hashed``, ``n`` tokens, ``differ``, ``share_identical``, ``overlap``."""
    import pandas as pd

    require_comparable(a, b)
    differ = differences(a, b)
    return pd.DataFrame(
        {
            "layer": a.layers,
            "hashed": a.hashed,
            "n": a.n_tokens,
            "differ": differ.sum(axis=0),
            "share_identical": 1 - differ.mean(axis=0),
            "overlap": overlaps(a, b).mean(axis=0),
        }
    )


def flips(a: Trace, b: Trace) -> pd.DataFrame:
    """One row a different choice: ``token``, ``layer``, ``margin`` of both runs, and both sets of experts."""
    import pandas as pd

    require_comparable(a, b)
    tokens, columns = np.nonzero(differences(a, b))
    return pd.DataFrame(
        {
            "token": tokens,
            "layer": a.layers[columns],
            "margin": a.margin[tokens, columns],
            "margin_other": b.margin[tokens, columns],
            "experts": [tuple(sorted(row.tolist())) for row in a.experts[tokens, columns]],
            "experts_other": [tuple(sorted(row.tolist())) for row in b.experts[tokens, columns]],
        }
    )


def by_position(a: Trace, b: Trace, edges: Sequence[int]) -> pd.DataFrame:
    """Stretches of the context between ``edges`` (token positions, ascending): ``start``, ``end``, ``n``
    choices, ``differ``, ``share_identical``, and percentiles 5, 50 and 95 of the router's margin."""
    import pandas as pd

    require_comparable(a, b)
    differ, margins = differences(a, b)[:, ~a.hashed], a.margin[:, ~a.hashed]
    rows = []
    for start, end in pairwise(edges):
        here = differ[start:end]
        low, middle, high = _quantiles(margins[start:end])
        rows.append(
            {
                "start": start,
                "end": end,
                "n": here.size,
                "differ": int(here.sum()),
                "share_identical": 1 - here.mean() if here.size else math.nan,
                "margin_p5": low,
                "margin_median": middle,
                "margin_p95": high,
            }
        )
    return pd.DataFrame(rows)


def _quantiles(values: np.ndarray) -> list[float]:
    return np.quantile(values, [0.05, 0.5, 0.95]).tolist() if values.size else [math.nan] * 3


def by_token(a: Trace, b: Trace) -> pd.DataFrame:
    """One row a token: ``token``, ``drift`` (largest logit difference), ``flips`` (layers that differ)."""
    import pandas as pd

    require_comparable(a, b)
    flipped = differences(a, b)[:, ~a.hashed].sum(axis=1)
    return pd.DataFrame({"token": np.arange(a.n_tokens), "drift": drifts(a, b), "flips": flipped})


# ---- one run by itself ----


def usage(trace: Trace) -> pd.DataFrame:
    """Each expert's choices: ``layer``, ``expert``, ``count`` and ``share`` of the layer's choices."""
    import pandas as pd

    tables = []
    for column, layer in enumerate(trace.layers):
        count = np.bincount(trace.experts[:, column].ravel(), minlength=trace.n_experts)
        tables.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "expert": np.arange(trace.n_experts),
                    "count": count,
                    "share": count / count.sum(),
                }
            )
        )
    columns = ["layer", "expert", "count", "share"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def load_entropy(trace: Trace) -> pd.DataFrame:
    """How evenly each layer loads its experts: ``layer``, ``hashed``, ``entropy`` (bits), ``share_of_even``
    (1: all experts alike; Shannon's entropy over the logarithm of the number of experts), ``unused``."""
    import pandas as pd

    rows = []
    for (layer, table), hashed in zip(usage(trace).groupby("layer"), trace.hashed, strict=True):
        p = table["share"].to_numpy()
        bits = float(-(p[p > 0] * np.log2(p[p > 0])).sum())
        rows.append(
            {
                "layer": layer,
                "hashed": bool(hashed),
                "entropy": bits,
                "share_of_even": bits / math.log2(trace.n_experts) if trace.n_experts > 1 else 1.0,
                "unused": int((p == 0).sum()),
            }
        )
    return pd.DataFrame(rows, columns=["layer", "hashed", "entropy", "share_of_even", "unused"])


# ---- how sure ----


def upper_bound(n_events: int, n: int, confidence: float = 0.95) -> float:
    """Clopper and Pearson's exact upper bound on a rate, one-sided.

    The largest rate at which so few events still have probability ``1 - confidence``. For none it is
    ``1 - (1 - confidence) ** (1 / n)``, about 3 / n at 95 %. C. J. Clopper and E. S. Pearson, Biometrika 26
    (1934), 404-413. It takes the trials for independent, which neighbouring tokens are not quite.

    >>> round(upper_bound(0, 10, 0.975), 4), round(upper_bound(1, 10, 0.975), 4), upper_bound(7, 7)
    (0.3085, 0.445, 1.0)
    """
    if not 0 <= n_events <= n:
        raise ValueError(f"{n_events} events in {n} trials")
    if n_events == n:
        return 1.0
    if n_events == 0:
        return -math.expm1(math.log1p(-confidence) / n)
    terms = np.array([_log_choose(n, i) for i in range(n_events + 1)])
    counts, low, high = np.arange(n_events + 1), n_events / n, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        logs = terms + counts * math.log(rate) + (n - counts) * math.log1p(-rate)
        tail = np.exp(logs - logs.max()).sum() * math.exp(min(logs.max(), 0.0))
        low, high = (rate, high) if tail > 1 - confidence else (low, rate)
    return high


def lower_bound(n_events: int, n: int, confidence: float = 0.95) -> float:
    """The matching lower bound: the upper one of the other outcome, turned round.

    >>> round(lower_bound(5, 10, 0.975), 4)
    0.1871
    """
    return 1 - upper_bound(n - n_events, n, confidence)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
