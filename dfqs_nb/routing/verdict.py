"""Compare traces, and say what that means: a verdict, sensitivities, advice, the card's statements.

Two choices agree when the *sets* of experts are equal; their order does not matter to the model. Layers that
route by hash are counted apart: their experts follow from the token alone and cannot vary.

DFQS 1.0: "routing remains deterministic under standard inference loads". Two things are judged: the same run
again, in the same process and in a fresh one (`Determinism`), and the same text beside others in one batch
(`UnderLoad`). What differs when a setting differs is sensitivity, not failure. Bounds are on runs, batches
and texts, because the choices of one text are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.routing.plan import IDENTICAL, Condition, Text
from dfqs_nb.routing.recorder import RoutingError
from dfqs_nb.routing.trace import Trace
from dfqs_nb.stats import N_BOOT, at_most, bootstrap_weights

if TYPE_CHECKING:
    import pandas as pd

FIELDS = (
    *("n_tokens", "n_layers", "n_choices", "n_differ", "first_token", "first_layer", "margin_differ"),
    *("n_hash_differ", "logits_equal", "logit_drift", "same_output"),
)
ABOUT = ("condition", "kind", "against", "status", "load", "n_others", "text", "domain")
BLOCK_TOKENS = 16  # neighbours that a bootstrap draws together
STABLE_SHARE = 0.99  # identical sets under every setting of the runtime, for "routing stable"
FIXES = {
    "threads": "n_threads and n_threads_batch",
    "batch": "n_batch and n_ubatch",
    "phase": "which tokens are prefilled and which are decoded",
    "state": "whether a saved state is restored",
    "attention": "flash_attn",
    "cache": "type_k and type_v",
    "context": "n_ctx",
    "buffers": "use_extra_bufts",
}


# ---- two traces ----


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


# ---- all of an experiment ----


@dataclass(frozen=True)
class Determinism:
    """Whether routing was deterministic under identical conditions, as the report reads it."""

    passed: bool  # no expert set differed (dense: no logit), and every repetition ran
    routed: bool  # the model has routers that score; else only logits are judged
    n_tokens: int  # positions, of the text and of the short texts
    n_layers: int  # that score
    n_runs: int  # repetitions of the text, and of each short text
    n_choices: int  # tokens x layers, over all repetitions
    n_differ: int
    n_runs_differ: int
    upper_bound: float  # 95 %, on choices, as if those of one text were independent: quote that on runs
    runs_upper_bound: float  # 95 %, on repeated runs that differ
    logits_equal: float  # share of tokens, bit for bit
    same_output: bool  # every greedy continuation was equal
    failed_runs: tuple[str, ...]
    load_passed: bool | None = None  # the same beside others, as DFQS's SHALL asks; None: not judged
    load_sentence: str = ""

    @property
    def text(self) -> str:
        """The verdict in a sentence or two."""
        word = "PASS" if self.passed else "FAIL"
        if self.failed_runs:
            return f"{word}: {len(self.failed_runs)} of the repetitions did not run ({self.failed_runs[0]})."
        if not self.n_runs:
            return "Not judged: no repetition fits into the budget."
        bound = f"95 % upper bound: {self.runs_upper_bound:.1%} of repeated runs"
        if not self.routed:
            return (
                f"{word}: dense model, nothing to route; the logits of {self.logits_equal:.2%} of "
                f"{self.n_tokens:,} tokens were equal bit for bit over {self.n_runs} repeated runs. {bound}."
            )
        return (
            f"{word}: {self.n_differ:,} of {self.n_choices:,} choices differed under identical conditions, "
            f"in {self.n_runs_differ} of {self.n_runs} repeated runs (texts of "
            f"{self.n_tokens:,} tokens in all, {self.n_layers} layers). {bound}."
        )


def compared(
    planned: Sequence[Condition],
    traces: Mapping[str, Trace],
    status: Mapping[str, str],
    texts: Sequence[Text],
) -> pd.DataFrame:
    """One row a text of a run that has a reference: `ABOUT`, and `FIELDS`, missing where it failed.

    Each short text is compared with the same text in the reference, where it is alone.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for each in (each for each in planned if each.against):
        about: dict[str, Any] = {"condition": each.name, "kind": each.kind, "against": each.against}
        about |= {"status": status[each.name], "load": each.load, "n_others": max(0, len(each.arrivals) - 1)}
        run, base = traces.get(each.name), traces.get(each.against)
        if run is None or base is None:
            # a run is no failure where the budget has left out what it is compared with
            how = "left out" if status[each.against].startswith("left out") else "not comparable"
            missing = f"{how}: {each.against!r} did not run"
            rows.append(about | ({} if run is None else {"status": missing}))
            continue
        pairs = [("", "", base, run)]
        if each.texts:
            given = [(place, number, texts[number]) for place, number in enumerate(each.texts)]
            pairs = [(t.name, t.domain, base.part(number), run.part(place)) for place, number, t in given]
        for name, domain, a, b in pairs:
            try:
                change = compare(a, b)
            except RoutingError as error:  # another model than the reference, not another quantization of it
                change = {"status": f"not comparable: {error.what}"}
            rows.append(about | {"text": name, "domain": domain} | change)
    table = pd.DataFrame(rows, columns=[*ABOUT, *FIELDS])
    counts = [name for name in table if str(name).startswith(("n_", "first_"))]
    return table.astype(dict.fromkeys(counts, "Int64"))


def judge(rows: pd.DataFrame) -> Determinism:
    """The verdict on the rows of `compared`; a dense model passes when its logits were equal bit for bit."""
    repeats = rows[rows["kind"] == IDENTICAL]
    done, broken = (repeats[(repeats["status"] == "done") == ran] for ran in (True, False))
    broken = broken[~broken["status"].astype(str).str.startswith("left out")].drop_duplicates("condition")
    failed = tuple(f"{row.condition}: {row.status}" for row in broken.itertuples())
    dense = done["n_choices"] == 0
    n_runs_differ = int(((done["n_differ"] > 0) | dense & (done["logits_equal"] < 1)).sum())
    n_choices, n_differ = (int(done[name].sum()) for name in ("n_choices", "n_differ"))
    first = done.drop_duplicates("text")  # the text, and each short text
    n_tokens, each = (int(first[name].sum()) for name in ("n_tokens", "n_choices"))
    return Determinism(
        passed=bool(len(done)) and not failed and not n_runs_differ,
        routed=n_choices > 0,
        n_tokens=n_tokens,
        n_layers=int(done["n_layers"].max()) if len(done) else 0,
        n_runs=len(done),
        n_choices=n_choices,
        n_differ=n_differ,
        n_runs_differ=n_runs_differ,
        upper_bound=at_most(min(n_differ, each), each),
        runs_upper_bound=at_most(n_runs_differ, len(done)),
        logits_equal=float(done["logits_equal"].mean()) if len(done) else 0.0,
        same_output=not done["same_output"].eq(False).any(),
        failed_runs=failed,
    )


def sensitivities(rows: pd.DataFrame) -> pd.DataFrame:
    """The conditions that change a setting, most different first, with their ``rate`` of different sets."""
    changed = rows[~rows["kind"].isin([IDENTICAL, "load"]) & (rows["status"] == "done")]
    rate = changed["n_differ"].astype(float) / changed["n_choices"].astype(float).replace(0, math.nan)
    order = ["rate", "logit_drift"]
    return changed.assign(rate=rate).sort_values(order, ascending=False, kind="stable", ignore_index=True)


def advice(ranked: pd.DataFrame) -> list[str]:
    """What to fix in order to reproduce a run, one sentence a kind of `sensitivities`, in their order."""
    groups = ranked.groupby("kind", sort=False)
    return [_advice_on(str(kind), rows) for kind, rows in groups]


def _advice_on(kind: str, rows: pd.DataFrame) -> str:
    worst, what = rows.iloc[0], FIXES.get(kind, kind)
    differ, n, name = int(worst["n_differ"]), int(worst["n_choices"]), worst["condition"]
    output = f"the greedy answer {'changed too' if rows['same_output'].eq(False).any() else 'stayed'}"
    if kind == "weights":
        seen = f"chose other experts in {differ:,} of {n:,} choices ({differ / n:.1%})" if n else output
        return f"Compare runs of one quantization only: {name.removeprefix('weights: ')} {seen}."
    if differ:
        return (
            f'Fix {what}: "{name}" changed {differ:,} of {n:,} choices ({differ / n:.2%}), '
            f"at margins up to {worst['margin_differ']:.2g}; {output}."
        )
    if (rows["logits_equal"] < 1).any():
        still, drift = "no choice changed, but logits" if n else "logits", rows["logit_drift"].max()
        return f"Fix {what} for equal logits: {still} moved by up to {drift:.2g}; {output}."
    times = f"{len(rows)} comparison{'s' if len(rows) > 1 else ''}"
    return f"Free: {what}. Logits were equal bit for bit in {times}."


def stable(ranked: pd.DataFrame) -> tuple[str, str]:
    """Whether "routing stable" holds, over settings of the runtime: another quantization is another model."""
    runtime = ranked[(ranked["kind"] != "weights") & (ranked["n_choices"] > 0)]
    if not len(runtime):
        return "not testable here", "no routed experts, or no change of settings was tried"
    worst = runtime.iloc[0]
    share = 1 - float(worst["rate"])
    return ("confirmed" if share >= STABLE_SHARE else "contradicted"), (
        f"at least {share:.2%} of expert sets stay the same under each of {len(runtime)} changes "
        f"of settings (least: {worst['condition']}; asked for {STABLE_SHARE:.0%})"
    )


def deterministic(verdict: Determinism) -> tuple[str, str]:
    """Whether "deterministic execution" holds: equal choices, logits and answers."""
    if not verdict.n_runs:
        return "not testable here", "no repetition ran"
    if verdict.failed_runs and not verdict.n_runs_differ:
        return "not testable here", f"{len(verdict.failed_runs)} of the repetitions did not run"
    answers = "equal" if verdict.same_output else "differ"
    exact = verdict.passed and verdict.logits_equal == 1.0 and verdict.same_output
    choices = f"{verdict.n_differ:,} of {verdict.n_choices:,} choices differ; " if verdict.routed else ""
    return ("confirmed" if exact else "contradicted"), (
        f"under identical conditions {choices}logits of {verdict.logits_equal:.2%} of tokens are equal bit "
        f"for bit; answers {answers}"
    )


def load_table(rows: pd.DataFrame, by: str = "load") -> pd.DataFrame:
    """One row a load, in the order run, from the rows of `compared`.

    ``n_runs``, ``n_texts`` and ``n_choices`` are counts, beside those that differ. ``runs_bound`` and
    ``texts_bound`` are one-sided 95 % bounds on their rates. ``rate``, of choices, has a 95 % interval from
    drawing whole texts anew, NaN without a difference. ``margin_differ`` and ``logit_drift`` are maxima;
    ``logits_equal`` and ``texts_equal`` are shares of tokens and of greedy answers.
    """
    rows = rows[(rows["kind"] == "load") & (rows["status"] == "done")]
    differs = rows["n_differ"] > 0
    marked = rows.assign(
        run_differs=rows["condition"].where(differs),
        text_differs=rows["text"].where(differs),
        answers=rows["same_output"].astype(float),
    )
    table = marked.groupby(by, sort=False).agg(
        n_others=("n_others", "first"),
        n_runs=("condition", "nunique"),
        n_runs_differ=("run_differs", "nunique"),
        n_texts=("text", "nunique"),
        n_texts_differ=("text_differs", "nunique"),
        n_choices=("n_choices", "sum"),
        n_differ=("n_differ", "sum"),
        margin_differ=("margin_differ", "max"),
        logits_equal=("logits_equal", "mean"),
        logit_drift=("logit_drift", "max"),
        texts_equal=("answers", "mean"),
    )
    for what in ("runs", "texts"):
        counts = zip(table[f"n_{what}_differ"], table[f"n_{what}"], strict=True)
        table[f"{what}_bound"] = [at_most(n_differ, n) for n_differ, n in counts]
    events = [
        group.groupby("text")[["n_differ", "n_choices"]].sum() for _, group in rows.groupby(by, sort=False)
    ]
    intervals = [cluster_interval(*each.to_numpy(int).T) for each in events]
    table["rate"] = table["n_differ"].astype(float) / table["n_choices"].astype(float).replace(0, math.nan)
    table[["rate_low", "rate_high"]] = np.array(intervals).reshape(-1, 2)
    return table.rename_axis("load").reset_index()


def cluster_interval(events: np.ndarray, trials: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a rate, from drawing whole texts anew; NaN without an event.

    >>> low, high = cluster_interval(np.array([0, 1, 0, 3, 0, 2]), np.array([50] * 6))
    >>> 0 < low < 6 / 300 < high < 0.05
    True
    """
    if not events.sum():
        return math.nan, math.nan
    weights = bootstrap_weights(len(events), N_BOOT, seed)
    low, high = np.quantile((weights @ events) / (weights @ trials), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class UnderLoad:
    """Whether routing stays the same as alone when other sequences share the batch."""

    passed: bool = False  # no expert set differed in any load, and all of them ran
    level: str = "not judged"  # or: under load, alone (only there), not (not even alone)
    changed_at: tuple[str, ...] = ()  # loads that change a choice, by their number of sequences
    failed: tuple[str, ...] = ()  # loads that did not run, with the reason
    counts: Mapping[str, Any] = field(default_factory=dict)  # columns of `load_table`, over all loads
    sentence: str = ""  # the verdict in words


def judge_loads(rows: pd.DataFrame, alone_passed: bool | None) -> UnderLoad:
    """The verdict on the rows of `compared` beside others.

    ``alone_passed``: the same run repeats itself; None: no repetition differed, but one or all did not run.
    """
    rows = rows[rows["kind"] == "load"]
    fine = rows["status"].astype(str).str.startswith(("done", "left out"))
    broken = rows[~fine].drop_duplicates("condition")
    failed = tuple(f"{row.condition}: {row.status}" for row in broken.itertuples())
    beside = rows[(rows["status"] == "done") & (rows["n_others"] > 0)]
    if not beside["n_choices"].sum():
        why = failed[0] if failed else "no routed experts" if len(beside) else "no load ran"
        return UnderLoad(failed=failed, sentence=f"Routing under load was not judged: {why}.")
    (counts,) = load_table(beside.assign(all="all"), "all").to_dict("records")
    counts["n_domains"] = int(beside["domain"].nunique())
    smallest = beside[beside["n_differ"] > 0].sort_values("n_others", kind="stable")
    changed = tuple(smallest["load"].unique())
    level = "not" if alone_passed is False else "alone" if changed else "under load"
    passed = level == "under load" and bool(alone_passed) and not failed
    verdict = UnderLoad(passed, level, changed, failed, counts)
    return replace(verdict, sentence=_sentence(verdict, beside))


def _sentence(verdict: UnderLoad, beside: pd.DataFrame) -> str:
    of, sizes = SimpleNamespace(**verdict.counts), [str(n) for n in sorted(beside["n_others"].unique())]
    company = " or ".join(filter(None, (", ".join(sizes[:-1]), sizes[-1])))
    shown = "Deterministic under load" if verdict.passed else "Not shown, as repetitions alone did not run"
    shown = "Not shown for all loads" if verdict.failed else shown
    first = {"not": "Not deterministic, not even alone", "alone": "Deterministic alone only"}
    rate = f" ({of.rate:.2%}, 95 % interval over texts {of.rate_low:.2%} to {of.rate_high:.2%})"
    moved = int(beside["same_output"].eq(False).sum())  # None does not count
    lines = [
        f"{first.get(verdict.level, shown)}: with {of.n_texts} texts of {of.n_domains} domains beside "
        f"{company} others in one batch, {of.n_differ:,} of {of.n_choices:,} choices differ from those alone"
        f"{rate if of.n_differ else ''}. Logits move by up to {of.logit_drift:.2g}, and {moved} of "
        f"{len(beside)} greedy answers change. 95 % upper bounds: {of.runs_bound:.1%} of batches "
        f"({of.n_runs_differ} of {of.n_runs} differ), {of.texts_bound:.0%} of texts ({of.n_texts_differ} of "
        f"{of.n_texts})."
    ]
    if verdict.changed_at:
        lines.append(f"The smallest load that changes a choice: {verdict.changed_at[0]}.")
    if n := len(verdict.failed):
        lines.append(f"{n} load{'s' if n > 1 else ''} did not run ({verdict.failed[0]}).")
    return " ".join(lines)
