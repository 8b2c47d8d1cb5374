"""What the comparisons mean: the SHALL judged, sensitivities ranked, advice, and the card's statements.

DFQS 1.0: "routing remains deterministic under standard inference loads". Two things are judged: the same run
again, in the same process and in a fresh one (`Determinism`), and the same text beside others in one batch
(`loads.UnderLoad`). What differs when a setting differs is sensitivity, not failure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfqs_nb.routing.compare import FIELDS, compare
from dfqs_nb.routing.plan import IDENTICAL, Condition
from dfqs_nb.routing.recorder import RoutingError
from dfqs_nb.routing.trace import Trace
from dfqs_nb.stats import at_most

if TYPE_CHECKING:
    import pandas as pd

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
    load_passed: bool | None = (
        None  # the same beside others, DFQS's "standard inference loads"; None: not judged
    )
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
            f"in {self.n_runs_differ} of {self.n_runs} repeated runs ({self.n_tokens:,} tokens x "
            f"{self.n_layers} layers). {bound}."
        )


def comparison_table(
    planned: Sequence[Condition], traces: Mapping[str, Trace], status: Mapping[str, str]
) -> pd.DataFrame:
    """One row a condition that has a reference; its numbers are missing where its run failed.

    Columns: ``condition``, ``kind``, ``against``, ``status``, ``n_runs`` and ``n_runs_differ`` (each short
    text is a run), and those of `compare.compare`.
    """
    import pandas as pd

    rows = []
    for condition in planned:
        name, against = condition.name, condition.against
        if against:
            row = {"condition": name, "kind": condition.kind, "against": against, "status": status[name]}
            if name in traces and against in traces:
                row |= _compared(traces[against], traces[name])
            elif name in traces:
                row["status"] = f"not comparable: {against!r} did not run"
            rows.append(row)
    about = ["condition", "kind", "against", "status", "n_runs", "n_runs_differ"]
    table = pd.DataFrame(rows, columns=[*about, *FIELDS])
    counts = [name for name in table if str(name).startswith(("n_", "first_"))]
    return table.astype(dict.fromkeys(counts, "Int64"))


def _compared(a: Trace, b: Trace) -> dict[str, Any]:
    try:
        whole = compare(a, b)
        several = range(len(a.output)) if a.output.ndim == 2 else ()
        each = [compare(a.part(i), b.part(i)) for i in several] or [whole]
    except RoutingError as error:  # another model than the reference, not another quantization of it
        return {"status": f"not comparable: {error.what}"}
    differ = [run["n_differ"] or (not run["n_choices"] and run["logits_equal"] < 1) for run in each]
    return whole | {"n_runs": len(each), "n_runs_differ": sum(map(bool, differ))}


def judge(table: pd.DataFrame) -> Determinism:
    """The verdict on an experiment's table; a dense model passes when its logits were equal bit for bit."""
    repeats = table[table["kind"] == IDENTICAL]
    done, broken = (repeats[(repeats["status"] == "done") == ran] for ran in (True, False))
    skipped = broken["status"].astype(str).str.startswith("left out")
    failed = tuple(f"{row.condition}: {row.status}" for row in broken[~skipped].itertuples())
    counted = ("n_choices", "n_differ", "n_runs", "n_runs_differ")
    sums: dict[str, Any] = {name: int(done[name].sum()) for name in counted}
    first = done.drop_duplicates("n_tokens")  # the text, and the short texts
    n_tokens, each = (int(first[name].sum()) for name in ("n_tokens", "n_choices"))
    return Determinism(
        passed=bool(len(done)) and not failed and not sums["n_runs_differ"],
        routed=sums["n_choices"] > 0,
        n_tokens=n_tokens,
        n_layers=int(done["n_layers"].max()) if len(done) else 0,
        upper_bound=at_most(min(sums["n_differ"], each), each),
        runs_upper_bound=at_most(sums["n_runs_differ"], sums["n_runs"]),
        logits_equal=float(done["logits_equal"].mean()) if len(done) else 0.0,
        same_output=not done["same_output"].eq(False).any(),
        failed_runs=failed,
        **sums,
    )


def sensitivities(table: pd.DataFrame) -> pd.DataFrame:
    """The conditions that change a setting, most different first, with their ``rate`` of different sets."""
    changed = table[(table["kind"] != IDENTICAL) & (table["status"] == "done")]
    rate = changed["n_differ"].astype(float) / changed["n_choices"].astype(float).replace(0, math.nan)
    order = ["rate", "logit_drift"]
    return changed.assign(rate=rate).sort_values(order, ascending=False, kind="stable", ignore_index=True)


def advice(table: pd.DataFrame) -> list[str]:
    """What to fix in order to reproduce a run, one sentence a kind of setting, most important first."""
    groups = sensitivities(table).groupby("kind", sort=False)
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


# ---- the card's statements: a status, and the evidence ----


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
