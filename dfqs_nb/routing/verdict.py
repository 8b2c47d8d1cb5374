"""Say what compared runs mean: verdicts, sensitivities, advice, the card's statements; count busy experts.

DFQS 1.0: "routing remains deterministic under standard inference loads". Two things are judged: the same run
again, in the same process and in a fresh one (`judge`), and the same text beside others in one batch
(`judge_loads`). What differs when a setting differs is sensitivity, not failure. A bound is on texts: choices
of one text are not independent, batches share texts, and repeated runs share a process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb.core.display import counted, per_cent
from dfqs_nb.routing.plan import IDENTICAL, Condition, Text
from dfqs_nb.routing.trace import COMPARED, Trace, compare
from dfqs_nb.stats import at_most, mean_interval

ABOUT = "condition kind against status process n_threads load n_others text domain".split()
SHARES = (0.5, 0.8, 0.9, 0.95)  # of choices, of which experts are counted
CONFIRMED, CONTRADICTED, NOT_TESTABLE = "confirmed", "contradicted", "not testable here"


@dataclass(frozen=True)
class Verdict:
    """What was judged: whether it holds (None: not judged), in words, and the counts behind it."""

    passed: bool | None
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def compared(
    planned: Sequence[Condition], traces: Mapping[str, Trace], status: Mapping[str, str], texts: list[Text]
) -> pd.DataFrame:
    """One row a text of a run that has a reference: `ABOUT`, and the values of `compare` if it ran.

    Each short text is compared with the same text in the reference, where it is alone.
    """
    rows: list[dict[str, Any]] = []
    for each in (each for each in planned if each.against):
        about: dict[str, Any] = {"condition": each.name, "kind": each.kind, "against": each.against}
        about |= {"status": status[each.name], "process": each.process, "n_threads": each.settings.n_threads}
        about |= {"load": each.name.split(", batch ")[0], "text": ""}
        about["n_others"] = max(0, len(each.arrivals) - 1)
        if each.name not in traces:
            rows.append(about)
            continue
        a, b = traces[each.against], traces[each.name]
        rows += [] if each.texts else [about | compare(a, b)]
        for place, number in enumerate(each.texts):
            named = {"text": texts[number].name, "domain": texts[number].domain}
            rows.append(about | named | compare(a.part(number), b.part(place)))
    table = pd.DataFrame(rows, columns=[*ABOUT, *COMPARED])
    return table.astype({name: "Int64" for name in table if str(name).startswith("n_")})


def failures(rows: pd.DataFrame) -> list[str]:
    """The runs of `compared` that did not end well, with the reason; the budget's choices are no failures."""
    fine = rows["status"].astype(str).str.startswith(("done", "left out"))
    broken = rows[~fine].drop_duplicates("condition")
    return [f"{row.condition}: {row.status}" for row in broken.itertuples()]


# ---- the same run again ----


def judge(rows: pd.DataFrame) -> Verdict:
    """The verdict on repetitions, of the rows of `compared`; its facts are those of the stage file.

    No expert set may differ (dense: no logit), and every repetition must run.
    """
    repeats = rows[rows["kind"] == IDENTICAL]
    done, failed = repeats[repeats["status"] == "done"], failures(repeats)
    changed = int(((done["n_differ"] > 0) | (done["n_choices"] == 0) & (done["logits_equal"] < 1)).sum())
    once = done.drop_duplicates("text")  # the text, and each short text
    facts: dict[str, Any] = {
        "passed": bool(len(done)) and not failed and not changed,
        "routed": bool(once["n_choices"].sum()),
        "n_tokens": int(once["n_tokens"].sum()),
        "n_layers": int(done["n_layers"].max()) if len(done) else 0,
        "n_runs": len(done),
        "n_processes": done["process"].nunique(),
        "n_choices": int(done["n_choices"].sum()),
        "n_differ": int(done["n_differ"].sum()),
        "n_runs_differ": changed,
        "logits_equal": float(done["logits_equal"].mean()) if len(done) else 0.0,
        "same_output": not done["same_output"].eq(False).any(),  # None does not count
        "failed_runs": failed,
    }
    if not len(done) and not failed:
        return Verdict(False, "Not judged: no repetition fits into the budget.", facts)
    n_processes = facts["n_processes"]
    runs = f"repeated runs in {n_processes} process{'es' * (n_processes > 1)}"
    if failed:
        text = f"{len(failed)} of the repetitions did not run ({failed[0]})."
    elif facts["routed"]:
        times = done["text"].value_counts().tolist()  # those of the long text, and of each short one
        often = " to ".join(map(str, sorted({min(times), max(times)}))) + " time" + "s" * (max(times) > 1)
        text = f"{facts['n_differ']:,} of {facts['n_choices']:,} choices differed under identical conditions"
        text += f", in {changed} of {len(done)} {runs} (texts of {facts['n_tokens']:,} tokens in all, "
        text += f"each repeated {often}, {facts['n_layers']} layers)."
    else:
        text = f"dense model, nothing to route; the logits of {per_cent(facts['logits_equal'], 2)} of "
        text += f"{facts['n_tokens']:,} tokens were equal bit for bit over {len(done)} {runs}."
    return Verdict(facts["passed"], f"{'PASS' if facts['passed'] else 'FAIL'}: {text}", facts)


# ---- beside others ----


def load_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a load, the smallest first, from the rows of `compared`; columns as `_counts`, and ``load``."""
    done = rows[(rows["kind"] == "load") & (rows["status"] == "done")]
    groups = done.sort_values("n_others", kind="stable").groupby(["load", "n_others"], sort=False)
    return pd.DataFrame({"load": load, "n_others": n, **_counts(group)} for (load, n), group in groups)


def _counts(rows: pd.DataFrame) -> dict[str, Any]:
    """How many runs, texts and choices there are, and differ; shares of equal logits and greedy answers."""
    differ, counts = rows[rows["n_differ"] > 0], dict[str, Any]()
    for what, column in (("runs", "condition"), ("texts", "text")):
        counts |= {f"n_{what}": rows[column].nunique(), f"n_{what}_differ": differ[column].nunique()}
    return counts | {
        "n_choices": int(rows["n_choices"].sum()),
        "n_choices_differ": int(rows["n_differ"].sum()),
        "logits_equal": rows["logits_equal"].mean(),
        "logit_drift": rows["logit_drift"].max(),
        "texts_equal": rows["same_output"].astype(float).mean(),
    }


def judge_loads(rows: pd.DataFrame, again: Verdict) -> Verdict:
    """The verdict on the rows of `compared` beside others; ``again``: whether the same run repeats itself.

    Its fact is ``failed``, the loads that did not run.
    """
    rows = rows[rows["kind"] == "load"]
    failed, beside = failures(rows), rows[(rows["status"] == "done") & (rows["n_others"] > 0)]
    if not beside["n_choices"].sum():
        why = failed[0] if failed else "no routed experts" if len(beside) else "no load ran"
        text = f"Routing under load was not judged: {why}."
        if beside["logit_drift"].notna().any():
            text += f" {_moved(beside, 'Beside others in one batch, logits')}"
        return Verdict(None, text, {"failed": failed})
    smallest = beside[beside["n_differ"] > 0].sort_values("n_others", kind="stable")
    changed = smallest["load"].unique().tolist()
    passed = bool(again.passed) and not changed and not failed
    if again.facts["n_runs_differ"]:
        shown = "Not deterministic, not even alone"
    elif changed:
        shown = "Deterministic alone only"
    elif failed:
        shown = "Not shown for all loads"
    else:
        shown = "Deterministic under load" if passed else "Not shown, as repetitions alone did not run"
    lines = [f"{shown}: {_under_load(beside)}"]
    if changed:
        lines.append(f"The smallest load that changes a choice: {changed[0]}.")
    if n := len(failed):
        lines.append(f"{n} load{'s' if n > 1 else ''} did not run ({failed[0]}).")
    return Verdict(passed, " ".join(lines), {"failed": failed})


def _under_load(beside: pd.DataFrame) -> str:
    """What happened beside others, with a bound on texts."""
    it, rate = SimpleNamespace(**_counts(beside)), ""
    *smaller, largest = map(str, sorted(beside["n_others"].unique()))
    company = f"{', '.join(smaller)} or {largest} others" if smaller else counted(int(largest), "others")
    if it.n_choices_differ:
        of_texts = beside.groupby("text")[["n_differ", "n_choices"]].sum().to_numpy(float)
        low, high = mean_interval(of_texts[:, 0] / of_texts[:, 1])
        between = f", 95 % interval over texts {per_cent(low, 2)} to {per_cent(high, 2)}" * (low == low)
        rate = f" ({per_cent(it.n_choices_differ / it.n_choices, 2)}{between})"
    bound = per_cent(at_most(it.n_texts_differ, it.n_texts), 0)
    return (
        f"with {counted(it.n_texts, 'texts')} of {counted(beside['domain'].nunique(), 'domains')} beside "
        f"{company} in one batch (n_threads {beside['n_threads'].max()}), {it.n_choices_differ:,} of "
        f"{it.n_choices:,} choices differ from those alone{rate}, in {it.n_texts_differ} of {it.n_texts} "
        f"texts (95 % upper bound: {bound}) and {it.n_runs_differ} of {it.n_runs} batches. {_moved(beside)}"
    )


def _moved(beside: pd.DataFrame, logits: str = "Logits") -> str:
    """How far logits moved, and how many answers."""
    drift, n = beside["logit_drift"].max(), int(beside["same_output"].eq(False).sum())
    return f"{logits} move by up to {drift:.2g}, and {n} of {len(beside)} greedy answers change."


# ---- another setting ----


def sensitivities(rows: pd.DataFrame) -> pd.DataFrame:
    """The conditions that change a setting, most different first, with their ``rate`` of different sets."""
    changed = rows[~rows["kind"].isin([IDENTICAL, "load"]) & (rows["status"] == "done")]
    rate = changed["n_differ"].astype(float) / changed["n_choices"].astype(float).replace(0, math.nan)
    ranked = changed.assign(rate=rate).sort_values(["rate", "logit_drift"], ascending=False, kind="stable")
    return ranked.reset_index(drop=True)


def advice(ranked: pd.DataFrame) -> list[str]:
    """What to pin in order to reproduce a run, of `sensitivities`, in their order.

    One line a kind, or two where it moves nothing from some of the runs that it is compared with.
    """
    lines = []
    for (kind, free), rows in ranked.groupby(["kind", ranked["logits_equal"] == 1], sort=False):
        where = " or ".join(f'"{name}"' for name in rows["against"].unique())
        if free:
            lines.append(f"Free: {kind} (compared with {where}). Every logit was equal bit for bit.")
            continue
        worst = next(rows.itertuples())
        word = "Pin" if worst.n_differ else "Pin for equal logits"
        choices = f"{worst.n_differ:,} of {worst.n_choices:,} choices, and " if worst.n_choices else ""
        seen = f'"{worst.condition}" changed {choices}logits by up to {worst.logit_drift:.2g}'
        answers = rows["same_output"].dropna()  # without n_output there is none
        moved = f"; {answers.eq(False).sum()} of {counted(len(answers), 'greedy answers')} changed"
        lines.append(f"{word}: {kind} (compared with {where}). {seen}{moved * bool(len(answers))}.")
    return lines


# ---- the card's statements ----


def claims(again: Verdict, ranked: pd.DataFrame) -> pd.DataFrame:
    """The card's statements on routing: ``claim``, ``status`` and ``evidence``, in its order.

    ``again``: the verdict on repetitions. ``ranked``: see `sensitivities`.
    """
    it, runtime = again.facts, ranked[ranked["n_choices"] > 0]
    stable = "no routed experts, or no change of settings was tried"
    if len(runtime):
        worst, n = runtime.iloc[0], int((runtime["n_differ"] > 0).sum())
        stable = "the text names no measure of it. "
        stable += f"{n} of {len(runtime)} changes of settings changed a choice; "
        stable += f'"{worst["condition"]}" changed most: {worst["n_differ"]:,} of {worst["n_choices"]:,}'
    same = again.passed and it["logits_equal"] == 1.0 and it["same_output"]
    # one run that differs is enough to know; that all are equal is known only of all
    known, seen = it["n_runs_differ"] or (it["n_runs"] and not it["failed_runs"]), again.text
    if it["n_runs"]:
        equal, answers = per_cent(it["logits_equal"], 2), "equal" if it["same_output"] else "different"
        seen += f" {equal} of tokens have equal logits; greedy answers are {answers}."
    exact = (CONFIRMED if same else CONTRADICTED) if known else NOT_TESTABLE, seen
    rows = [("routing stable", NOT_TESTABLE, stable), ("deterministic execution", *exact)]
    return pd.DataFrame(rows, columns=["claim", "status", "evidence"])


# ---- what the routers prefer ----


def reads_by_domain(trace: Trace) -> dict[str, np.ndarray]:
    """A layer's choices as shares ``(L, experts)``, by domain: means over its texts.

    Of a trace of several texts, whose domains and lengths are in its conditions.
    """
    shares, ends = dict[str, list[np.ndarray]](), np.cumsum(trace.conditions["lengths"])
    for domain, text in zip(trace.conditions["domains"], np.split(trace.experts, ends[:-1]), strict=True):
        counts = [np.bincount(layer.ravel(), minlength=trace.n_experts) for layer in text.swapaxes(0, 1)]
        shares.setdefault(domain, []).append(np.array(counts) / text[:, 0].size)
    return {domain: np.mean(of_texts, axis=0) for domain, of_texts in shares.items()}


def experts_needed(trace: Trace) -> pd.DataFrame:
    """How many of a layer's experts, the busiest first, get a share of its choices (mean over layers).

    A row a domain, and one of ``all`` domains alike; a column a share. The last two columns are the share of
    its choices that half of a layer's experts get: its own busiest, which get most, and the busiest of the
    other domains (NaN without others).
    """
    reads, half = reads_by_domain(trace), trace.n_experts // 2
    total = np.sum(list(reads.values()), axis=0)
    shares = {"all": total / len(reads), **reads}

    def share_of_half(own: np.ndarray, chosen_by: np.ndarray) -> float:
        busiest = np.argsort(-chosen_by, axis=1, kind="stable")[:, :half]
        return float(np.take_along_axis(own, busiest, axis=1).sum(axis=1).mean())

    curves = {name: np.sort(it)[:, ::-1].cumsum(axis=1).mean(axis=0) for name, it in shares.items()}
    needed = {per_cent(p, 0): {name: int((it < p).sum()) + 1 for name, it in curves.items()} for p in SHARES}
    others = {name: share_of_half(it, total - it) for name, it in reads.items() if len(reads) > 1}
    table = pd.DataFrame(needed).rename_axis("domain")
    table["own_busiest_half"] = [share_of_half(it, it) for it in shares.values()]
    return table.assign(busiest_half_of_others=table.index.map(others))
