"""Compare routing traces: which expert sets differ, where, and at what margin.

Two choices agree when the *sets* of experts are equal; their order does not matter to the model. Layers that
route by hash are counted apart: their experts follow from the token alone and cannot vary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.routing.recorder import RoutingError
from dfqs_nb.routing.trace import Trace
from dfqs_nb.stats import N_BOOT, bootstrap_weights

if TYPE_CHECKING:
    import pandas as pd

BLOCK_TOKENS = 16  # neighbours that a bootstrap draws together
FIELDS = (
    *("n_tokens", "n_layers", "n_choices", "n_differ", "first_token", "first_layer", "margin_differ"),
    *("n_hash_differ", "logits_equal", "logit_drift", "same_output"),
)


def differences(a: Trace, b: Trace) -> np.ndarray:
    """Whether the expert sets differ, bool ``(tokens, layers)``; other tokens or routers are an error."""
    if not np.array_equal(a.tokens, b.tokens):
        at = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), None)
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
    if not _same_logits(a, b):
        return np.full(a.n_tokens, np.nan)
    return np.asarray(np.abs(a.logits - b.logits).max(axis=1))


def _same_logits(a: Trace, b: Trace) -> bool:
    """Whether logits of the same ids were kept."""
    return len(a.logit_ids) > 0 and np.array_equal(a.logit_ids, b.logit_ids)


def compare(a: Trace, b: Trace) -> dict[str, Any]:
    """Two runs over the same tokens, the first being the reference, as the values of `FIELDS`.

    ``n_layers`` and ``n_choices`` (tokens x layers) leave out hash layers; these count in ``n_hash_differ``.
    ``first_token`` and ``first_layer``: where the first different set is, or None. ``margin_differ``: the
    largest margin of the reference at which a set differs, or NaN. ``logits_equal``: share of tokens whose
    logits are equal bit for bit; ``logit_drift``: largest difference of a kept logit; both are NaN where none
    were kept. ``same_output``: equal greedy answers; None where a run has none. Errors: as `differences`.
    """
    differ, scored = differences(a, b), ~a.hashed
    routed = differ[:, scored]
    first = np.argwhere(routed)
    kept = (a.digest == b.digest).mean() if len(a.digest) and len(b.digest) else math.nan
    same = bool(np.array_equal(a.output, b.output)) if len(a.output) and len(b.output) else None
    return {
        "n_tokens": a.n_tokens,
        "n_layers": int(scored.sum()),
        "n_choices": routed.size,
        "n_differ": int(routed.sum()),
        "first_token": int(first[0][0]) if len(first) else None,
        "first_layer": int(a.layers[scored][first[0][1]]) if len(first) else None,
        "margin_differ": float(a.margin[:, scored][routed].max()) if len(first) else math.nan,
        "n_hash_differ": int(differ[:, a.hashed].sum()),
        "logits_equal": float(kept),
        "logit_drift": float(drifts(a, b).max(initial=0.0)),
        "same_output": same,
    }


def across(a: Trace, b: Trace) -> pd.DataFrame:
    """How another file of the model routes the same text: one row a layer that scores.

    ``same_set``: share of equal sets. ``top_n``: share of the first n experts ranked there by both.
    ``mass``: share of the reference's gates on experts that both chose. ``rank_correlation``: Spearman's, of
    all selection scores, mean over tokens.
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
    if len(a.scores) and len(b.scores):
        ranks = [rankdata(scores[:, scored], axis=2) for scores in (a.scores, b.scores)]
        centred = [rank - rank.mean(axis=2, keepdims=True) for rank in ranks]
        size = np.sqrt(np.prod([(rank**2).sum(axis=2) for rank in centred], axis=0))
        correlation = ((centred[0] * centred[1]).sum(axis=2) / np.maximum(size, 1e-12)).mean(axis=0)
    same = 1 - differences(a, b)[:, scored].mean(axis=0)
    columns = {"layer": a.layers[scored], "same_set": same, **tops, "mass": mass.mean(axis=0)}
    return pd.DataFrame({**columns, "rank_correlation": correlation})


def divergence(a: Trace, b: Trace) -> str:
    """A token's KL divergence regressed on how many layers changed their experts, in a sentence.

    The interval of the slope comes from drawing blocks of neighbouring tokens. Empty where logits were not
    kept or no set changed.
    """
    from scipy.special import log_softmax

    if not _same_logits(a, b):
        return ""
    p, q = (log_softmax(each.logits.astype(np.float64), axis=1) for each in (a, b))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    changed = differences(a, b)[:, ~a.hashed].sum(axis=1)
    n = len(kl) // BLOCK_TOKENS * BLOCK_TOKENS
    if n < 2 * BLOCK_TOKENS or not changed.var():
        return ""
    sums = np.stack([np.ones(n), changed[:n], kl[:n], changed[:n] * kl[:n], changed[:n] ** 2])
    blocks = sums.reshape(5, -1, BLOCK_TOKENS).sum(axis=2).T
    draws = bootstrap_weights(len(blocks), N_BOOT, seed=0) @ blocks
    tokens, x, y, xy, xx = np.vstack([blocks.sum(axis=0), draws]).T
    slopes = (tokens * xy - x * y) / np.maximum(tokens * xx - x * x, 1e-12)
    low, high = np.quantile(slopes[1:], [0.025, 0.975])
    return (
        f"KL divergence {kl.mean():.3g} nats a token; {slopes[0]:+.2g} for each layer whose experts "
        f"changed (95 % interval {low:.2g} to {high:.2g}; n = {len(kl):,} tokens, "
        f"{len(a.logit_ids):,} logits of each)"
    )


def expert_counts(experts: np.ndarray, n_experts: int) -> np.ndarray:
    """How often each expert was chosen: of ids ``(n, L, k)``, int ``(L, experts)``.

    >>> expert_counts(np.array([[[0, 2]], [[2, 1]]]), 4).tolist()
    [[1, 1, 2, 0]]
    """
    n_layers = experts.shape[1]
    places = experts.astype(np.int64) + n_experts * np.arange(n_layers)[:, None]
    return np.bincount(places.ravel(), minlength=n_layers * n_experts).reshape(n_layers, n_experts)
