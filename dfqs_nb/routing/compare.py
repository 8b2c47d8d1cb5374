"""Compare routing traces: which expert sets differ, where, and at what margin.

Two choices agree when the *sets* of experts are equal; their order does not matter to the model. Layers that
route by hash are counted apart: their experts follow from the token alone and cannot vary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.routing.recorder import RoutingError
from dfqs_nb.routing.trace import Trace
from dfqs_nb.stats import bootstrap_weights

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class TraceDifference:
    """Two runs over the same tokens, the first one being the reference.

    Attributes:
        n_tokens, n_layers: what was compared; hash layers are not in ``n_layers``.
        n_choices, n_differ: tokens x layers, and of these, those whose expert sets differ.
        share_identical: of expert sets; NaN where there are none.
        overlap: mean share of the k experts that both runs chose.
        first_token, first_layer: where the first different set is; None without one.
        margin_differ: the largest router margin (of the first run) at which a set differs; NaN without one.
        margin_same: the median margin where sets agree.
        n_hash_differ: the same count in hash layers.
        logits_equal, logit_drift: share of tokens whose logits are equal bit for bit, and the largest
            difference of a kept logit; NaN when not kept.
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


def differences(a: Trace, b: Trace) -> np.ndarray:
    """Whether the expert sets differ, bool ``(tokens, layers)``.

    Raises:
        RoutingError: other tokens, other layers, or another number of experts.
    """
    if not np.array_equal(a.tokens, b.tokens):
        pairs = enumerate(zip(a.tokens, b.tokens, strict=False))
        at = next((i for i, (x, y) in pairs if x != y), None)
        detail = f"{a.n_tokens:,} and {b.n_tokens:,} tokens" if at is None else f"they differ at token {at:,}"
        raise RoutingError(f"the traces are of different prompts ({detail})", hint="use the same tokens")
    routers = [(t.layers.tolist(), t.hashed.tolist(), t.experts.shape, t.n_experts) for t in (a, b)]
    if routers[0] != routers[1]:
        raise RoutingError("the traces are of models with different routers", hint="compare like with like")
    return np.asarray((np.sort(a.experts, axis=2) != np.sort(b.experts, axis=2)).any(axis=2))


def overlaps(a: Trace, b: Trace) -> np.ndarray:
    """Share of the k chosen experts that both runs chose, float ``(tokens, layers)``."""
    shared = (a.experts[:, :, :, None] == b.experts[:, :, None, :]).any(axis=3)
    return np.asarray(shared.sum(axis=2) / max(1, a.experts.shape[2]))


def drifts(a: Trace, b: Trace) -> np.ndarray:
    """The largest absolute difference among each token's kept logits, float ``(tokens,)``, or NaN."""
    if a.logits is None or b.logits is None or not np.array_equal(a.logits.ids, b.logits.ids):
        return np.full(a.n_tokens, np.nan)
    return np.asarray(np.abs(a.logits.values - b.logits.values).max(axis=1))


def compare(a: Trace, b: Trace) -> TraceDifference:
    """Compare two runs, the first one being the reference; errors as `differences`."""
    differ, scored = differences(a, b), ~a.hashed
    routed, margins = differ[:, scored], a.margin[:, scored]
    first = np.argwhere(routed)
    kept = (a.logits, b.logits) if a.logits is not None and b.logits is not None else None
    return TraceDifference(
        n_tokens=a.n_tokens,
        n_layers=int(scored.sum()),
        n_choices=routed.size,
        n_differ=int(routed.sum()),
        share_identical=float(1 - routed.mean()) if routed.size else math.nan,
        overlap=_or_nan(np.mean, overlaps(a, b)[:, scored]),
        first_token=int(first[0][0]) if len(first) else None,
        first_layer=int(a.layers[scored][first[0][1]]) if len(first) else None,
        margin_differ=_or_nan(np.max, margins[routed]),
        margin_same=_or_nan(np.median, margins[~routed]),
        n_hash_differ=int(differ[:, a.hashed].sum()),
        logits_equal=float((kept[0].digest == kept[1].digest).mean()) if kept else math.nan,
        logit_drift=float(drifts(a, b).max(initial=0.0)),
        same_best=float((kept[0].best == kept[1].best).mean()) if kept else math.nan,
        same_output=bool(np.array_equal(a.output, b.output)) if len(a.output) and len(b.output) else None,
    )


def _or_nan(statistic: Callable[..., Any], values: np.ndarray) -> float:
    return float(statistic(values)) if values.size else math.nan


# ---- two files of one model ----


def across(a: Trace, b: Trace) -> pd.DataFrame:
    """How another file of the model routes the same text: one row a layer that scores.

    Columns ``layer``, ``same_set`` (share of equal sets), ``top_1``, ``top_2``, ... (share of the first n
    experts that both rank among their first n), ``mass`` (of the reference's gates, on experts that both
    chose), ``rank_correlation`` (Spearman's, of all selection scores, mean over tokens; NaN without scores).
    """
    import pandas as pd
    from scipy.stats import rankdata

    scored = ~a.hashed
    x, y = a.experts[:, scored], b.experts[:, scored]
    shared = x[:, :, :, None] == y[:, :, None, :]
    weights = a.weights[:, scored].astype(float)
    mass = (weights * shared.any(axis=3)).sum(axis=2) / np.maximum(weights.sum(axis=2), 1e-12)
    tops = {f"top_{n}": shared[:, :, :n, :n].any(axis=3).mean(axis=(0, 2)) for n in range(1, x.shape[2] + 1)}
    correlation: Any = math.nan
    if a.scores is not None and b.scores is not None:
        ranks = [rankdata(scores[:, scored], axis=2) for scores in (a.scores, b.scores)]
        centred = [rank - rank.mean(axis=2, keepdims=True) for rank in ranks]
        size = np.sqrt(np.prod([(rank**2).sum(axis=2) for rank in centred], axis=0))
        correlation = ((centred[0] * centred[1]).sum(axis=2) / np.maximum(size, 1e-12)).mean(axis=0)
    same = 1 - differences(a, b)[:, scored].mean(axis=0)
    columns = {"layer": a.layers[scored], "same_set": same, **tops, "mass": mass.mean(axis=0)}
    return pd.DataFrame({**columns, "rank_correlation": correlation})


@dataclass(frozen=True)
class Divergence:
    """Whether changed experts predict a changed prediction: KL divergence regressed on them, by token.

    Attributes:
        n_tokens, n_logits: tokens, and logits of each (a sample of a large vocabulary).
        kl, kl_same, kl_changed: mean KL divergence from the reference in nats, of all tokens and of those
            without and with a changed expert set (NaN where there are none).
        slope, low, high: nats for each changed layer, with a 95 % interval from drawing blocks of tokens.
    """

    n_tokens: int
    n_logits: int
    kl: float
    kl_same: float
    kl_changed: float
    slope: float
    low: float
    high: float

    @property
    def sentence(self) -> str:
        """The divergence, and what a changed layer adds to it."""
        return (
            f"KL divergence {self.kl:.3g} nats a token; {self.slope:+.2g} for each layer whose experts "
            f"changed (95 % interval {self.low:.2g} to {self.high:.2g}; n = {self.n_tokens:,} tokens, "
            f"{self.n_logits:,} logits of each)"
        )


def divergence(a: Trace, b: Trace, block: int = 16, n_boot: int = 2000, seed: int = 0) -> Divergence | None:
    """The regression for two files of one model; None where logits were not kept or no set changed.

    ``block`` neighbouring tokens are drawn together.
    """
    from scipy.special import log_softmax

    if a.logits is None or b.logits is None or not np.array_equal(a.logits.ids, b.logits.ids):
        return None
    p, q = (log_softmax(each.values.astype(np.float64), axis=1) for each in (a.logits, b.logits))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    changed = differences(a, b)[:, ~a.hashed].sum(axis=1)
    n = len(kl) // block * block
    if n < 2 * block or not changed.var():
        return None
    sums = np.stack([np.ones(n), changed[:n], kl[:n], changed[:n] * kl[:n], changed[:n] ** 2])
    blocks = sums.reshape(5, -1, block).sum(axis=2).T
    draws = bootstrap_weights(len(blocks), n_boot, seed) @ blocks
    tokens, x, y, xy, xx = np.vstack([blocks.sum(axis=0), draws]).T
    slopes = (tokens * xy - x * y) / np.maximum(tokens * xx - x * x, 1e-12)
    low, high = np.quantile(slopes[1:], [0.025, 0.975])
    same, other = (_or_nan(np.mean, kl[rows]) for rows in (changed == 0, changed > 0))
    interval = float(slopes[0]), float(low), float(high)
    return Divergence(len(kl), len(a.logits.ids), float(kl.mean()), same, other, *interval)


# ---- one run by itself ----


def expert_counts(experts: np.ndarray, n_experts: int) -> np.ndarray:
    """How often each expert was chosen: of ids ``(n, L, k)``, int ``(L, experts)``.

    >>> expert_counts(np.array([[[0, 2]], [[2, 1]]]), 4).tolist()
    [[1, 1, 2, 0]]
    """
    n_layers = experts.shape[1]
    places = experts.astype(np.int64) + n_experts * np.arange(n_layers)[:, None]
    return np.bincount(places.ravel(), minlength=n_layers * n_experts).reshape(n_layers, n_experts)


def usage(trace: Trace) -> pd.DataFrame:
    """Each expert's choices: ``layer``, ``expert``, ``count`` and ``share`` of the layer's choices."""
    import pandas as pd

    counts = expert_counts(trace.experts, trace.n_experts)
    index = pd.MultiIndex.from_product([trace.layers, range(trace.n_experts)], names=["layer", "expert"])
    table = pd.DataFrame({"count": counts.ravel()}, index).reset_index()
    return table.assign(share=(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).ravel())
