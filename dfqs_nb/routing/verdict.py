"""What the comparisons mean: the SHALL judged, sensitivities ranked, advice, and the card's statements.

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

from dfqs_nb.routing.compare import FIELDS, compare
from dfqs_nb.routing.plan import IDENTICAL, Condition, Text
from dfqs_nb.routing.recorder import RoutingError
from dfqs_nb.routing.trace import Trace
from dfqs_nb.stats import N_BOOT, at_most, bootstrap_weights

if TYPE_CHECKING:
    import pandas as pd

ABOUT = ("condition", "kind", "against", "status", "load", "n_others", "text", "domain")
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
    """One row a text of a run that has a reference: `ABOUT`, and `compare.FIELDS`, missing where it failed.

    Each short text is compared with the same text in the reference, where it is alone.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for each in (each for each in planned if each.against):
        about: dict[str, Any] = {"condition": each.name, "kind": each.kind, "against": each.against}
        about |= {"status": status[each.name], "load": each.load, "n_others": max(0, len(each.arrivals) - 1)}
        run, base = traces.get(each.name), traces.get(each.against)
        if run is None or base is None:
            missing = f"not comparable: {each.against!r} did not run"
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


def judge_loads(rows: pd.DataFrame, alone_passed: bool) -> UnderLoad:
    """The verdict on the rows of `compared` beside others; ``alone_passed``: the same run repeats itself."""
    rows = rows[rows["kind"] == "load"]
    broken = rows[rows["status"].astype(str).str.startswith("failed")].drop_duplicates("condition")
    failed = tuple(f"{row.condition}: {row.status}" for row in broken.itertuples())
    beside = rows[(rows["status"] == "done") & (rows["n_others"] > 0)]
    if not beside["n_choices"].sum():
        why = failed[0] if failed else "no routed experts" if len(beside) else "no load ran"
        return UnderLoad(failed=failed, sentence=f"Routing under load was not judged: {why}.")
    (counts,) = load_table(beside.assign(all="all"), "all").to_dict("records")
    counts["n_domains"] = int(beside["domain"].nunique())
    smallest = beside[beside["n_differ"] > 0].sort_values("n_others", kind="stable")
    changed = tuple(smallest["load"].unique())
    level = "not" if not alone_passed else "alone" if changed else "under load"
    verdict = UnderLoad(level == "under load" and not failed, level, changed, failed, counts)
    return replace(verdict, sentence=_sentence(verdict, beside))


def _sentence(verdict: UnderLoad, beside: pd.DataFrame) -> str:
    of, sizes = SimpleNamespace(**verdict.counts), [str(n) for n in sorted(beside["n_others"].unique())]
    company = " or ".join(filter(None, (", ".join(sizes[:-1]), sizes[-1])))
    shown = "Not shown for all loads" if verdict.failed else "Deterministic under load"
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
