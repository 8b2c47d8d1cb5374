"""Two or more DFQS reports side by side, tested item by item; refused unless their conditions are equal.

Conditions are what ``report.json`` hashes, ``system_info`` among them: kernels, and so answers, may differ by
it. The rest of the machine decides only whether speeds may be compared. One difference can be accepted, by
its name: a chat template belongs to a model's file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb.context import Counts, paired
from dfqs_nb.core.display import one_line
from dfqs_nb.core.errors import ComparisonError
from dfqs_nb.core.files import write_json, write_table, write_text
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.core.paths import tilde
from dfqs_nb.report.board import boundary_status, is_contended, run_beside, with_interval
from dfqs_nb.report.metrics import BOUNDARY, CURVE, SCORES, SPEED, boundary_flags
from dfqs_nb.report.reading import RETRIEVAL, RunItems, read_answers, report_file
from dfqs_nb.report.template import render
from dfqs_nb.report.text import page_of
from dfqs_nb.scores import compare_runs
from dfqs_nb.stats import BOOTSTRAP_LEVEL, LEVEL, N_BOOT, expanded_tail, holm, sign_flip

ACCEPTABLE = "chat_template_sha256"  # the one condition that is a property of a model's own file
SPEED_FACTS = ("system", "processor", "usable cores")  # of the machine: equal, or speeds are not compared
N_FLIPS = 20_000  # of signs, where there are too many texts for all
MEASURED = "metric model n value low high kind difference difference_low difference_high p p_holm reading"
COLUMNS = MEASURED.split()
FORMS = {BOUNDARY: "{:,.0f}", SPEED: "{:,.1f}"}
Row = dict[str, Any]


def check_reports(runs: Sequence[RunItems], accept: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Refuse reports that cannot stand side by side; return the accepted differences with all values.

    Raises:
        ComparisonError: too few, one twice, other tiers, or other conditions: every field that differs.
    """
    if len(runs) < 2:
        raise ComparisonError(f"{len(runs)} report given", hint="give two or more")
    if odd := [name for name in accept if name.split(".")[-1] != ACCEPTABLE]:
        what = f"a difference in {', '.join(odd)} cannot be accepted"
        raise ComparisonError(what, hint=f"only in {ACCEPTABLE}, which belongs to a model's file")
    seen: dict[str, Path] = {}
    for run in runs:
        other = seen.setdefault(run.report["integrity"]["sha256"], run.path)
        if other is not run.path:
            what = f"the same report as {tilde(other)}"
            raise ComparisonError(what, where=tilde(run.path), hint="give it once")
    if len({run.report["tier"] for run in runs}) > 1:
        each = ", ".join(f"{tilde(run.path)} is {run.report['tier']}" for run in runs)
        raise ComparisonError(f"tiers never mix: {each}", hint="run both on one tier")
    conditions = [run.report["conditions"] for run in runs]
    differ = [differing_fields(conditions[0], other) for other in conditions]
    names = {name: pair[0] for fields in differ for name, pair in fields.items()}  # the baseline's values
    accepted = {name for name in names if any(f".{name}".endswith(f".{end}") for end in accept)}
    refused = [
        f"{tilde(run.path)}: "
        + ", ".join(f"{name} ({a} and {b})" for name, (a, b) in fields.items() if name not in accepted)
        for run, fields in zip(runs, differ, strict=True)
        if {*fields} - accepted
    ]
    if refused:
        only_templates = all(name.split(".")[-1] == ACCEPTABLE for name in {*names} - accepted)
        way = f"; --accept {ACCEPTABLE} compares models across their own templates" if only_templates else ""
        what = f"the conditions differ from those of {tilde(runs[0].path)} in " + " | ".join(refused)
        raise ComparisonError(what, hint=f"run all again under the same conditions{way}")
    own = {name: [fields.get(name, (0, names[name]))[1] for fields in differ] for name in accepted}
    return dict(sorted(own.items()))


@dataclass(frozen=True)
class ReportComparison:
    """Reports under equal conditions, the first one the baseline.

    Attributes:
        accepted: conditions that differ and were accepted, with each report's value.
        table: one row a metric and model, columns `COLUMNS`; ``kind`` is ``difference`` (to the baseline) or
            ``ratio``, with its 95 % interval (of speeds, what repetitions allow); ``p`` of McNemar's test of
            scores and of the sign-flip test of retrieval; ``p_holm`` corrected over the table.
        lengths: retrieval by length: ``model`` and the columns of ``paired``.
    """

    runs: tuple[RunItems, ...]
    accepted: dict[str, list[Any]]
    table: pd.DataFrame
    lengths: pd.DataFrame

    def __str__(self) -> str:
        """The comparison as Markdown to paste: what was compared, one table, retrieval by length, methods."""
        by_label, first = {run.label: run for run in self.runs}, self.runs[0]
        groups = [group.to_dict("records") for _, group in self.table.groupby("metric", sort=False)]

        def baseline(own: Row, row: Row) -> str:
            if row["metric"] == RETRIEVAL and row["kind"] and row["n"] != own["n"]:
                return f"{row['value'] - row['difference']:.3f} on these"
            return value_text(own, first)

        return render(
            "comparison.md",
            runs=self.runs,
            accepted=self.accepted,
            table=self.table,
            lengths=self.lengths,
            pairs=[(own, row) for own, *others in groups for row in others],
            baseline=baseline,
            value=lambda row: value_text(row, by_label[row["model"]]),
            difference=difference_text,
        )

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``comparison.json``, ``.md``, ``.csv``, ``.png`` and ``.html`` into a folder, each whole."""
        from dfqs_nb.core import figures as drawing
        from dfqs_nb.report import figures

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "comparison.json", self.as_dict())
        write_table(folder / "comparison.csv", _rounded(self.table), index=False)
        write_text(folder / "comparison.md", str(self))
        drawing.save(figures.comparison(self.runs, self.table).axes[0], folder / "comparison.png")
        reports = {run.label: run.report for run in self.runs}
        write_text(folder / "comparison.html", page_of(str(self), folder / "comparison.png", reports))
        return [folder / f"comparison{suffix}" for suffix in (".json", ".md", ".csv", ".png", ".html")]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with what identifies each report; NaN as null."""
        reports = [
            {
                "label": run.label,
                "model_sha256": run.report["model"]["sha256"],
                "report_sha256": run.report["integrity"]["sha256"],
                **{key: run.report[key] for key in ("run", "conditions_sha256", "created")},
            }
            for run in self.runs
        ]
        return {
            "schema": "dfqs-comparison/1.0",
            "tier": self.runs[0].report["tier"],
            "accepted": self.accepted,
            "reports": reports,
            "conditions": self.runs[0].report["conditions"],
            "level": LEVEL,
            "table": json.loads(_rounded(self.table).to_json(orient="records", double_precision=15)),
            "by_length": json.loads(_rounded(self.lengths).to_json(orient="records", double_precision=15)),
        }


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    """The table with six digits of every measured number."""
    return table.assign(**table.select_dtypes("float").map(lambda value: float(f"{value:.6g}")))


def value_text(row: Mapping[str, Any], run: RunItems) -> str:
    """A metric's value with its interval, and what qualifies it."""
    parts = {"value": row["value"], "value_low": row["low"], "value_high": row["high"]}
    text = with_interval(parts, "value", FORMS.get(row["metric"], "{:.3f}"))
    if text == "withheld":
        return text
    if row["metric"] == SPEED and run.detail(SPEED).get("contended"):
        return f"{text} (contended)"
    status = boundary_status(run.detail(BOUNDARY)) if row["metric"] == BOUNDARY else "quality"
    known = {"quality": text, "right censored": f"over {text}", "floor": "at chance"}
    return known.get(status, f"{text} ({status})")


def difference_text(row: Mapping[str, Any]) -> str:
    """A difference (signed) or a ratio (x) with its interval.

    >>> row = {"kind": "ratio", "difference": 1.5, "difference_low": 1.2, "difference_high": float("inf")}
    >>> difference_text(row)
    'x 1.50 [1.20, open]'
    """
    if not row["kind"]:
        return ""
    form, ends = ("x {:.2f}", (0.0, inf)) if row["kind"] == "ratio" else ("{:+.3f}", ())
    value = form.format(row["difference"]) if row["difference"] == row["difference"] else "unknown"
    both = (row["difference_low"], row["difference_high"])
    low, high = ("open" if end in ends else form.format(end).removeprefix("x ") for end in both)
    return f"{value} [{low}, {high}]"


def compare_reports(
    paths: Sequence[str | Path], *, accept: Sequence[str] = (), n_boot: int = N_BOOT, seed: int = 0
) -> ReportComparison:
    """Compare runs, by their folders or reports, with the first of them, item by item.

    ``accept=["chat_template_sha256"]`` compares models that have templates of their own. A ReportError or
    ComparisonError says where reports, conditions or items do not fit (`check_reports`).
    """
    places = [report_file(path).resolve() for path in paths]
    if twice := sorted({str(tilde(place)) for place in places if places.count(place) > 1}):
        raise ComparisonError(f"given twice: {', '.join(twice)}", hint="give each report once")
    runs = _labelled([read_answers(path) for path in paths])
    accepted = check_reports(runs, accept)
    pairs = [Pair(runs[0], run, n_boot, seed) for run in runs[1:]]
    rows = _corrected([pair.row(metric) for metric in ROWS for pair in pairs])
    table = []
    for metric in ROWS:
        own = _alone(runs[0].context, n_boot, seed) if metric == RETRIEVAL else runs[0].stated(metric)
        table.append({"metric": metric, "model": runs[0].label, "kind": "", "reading": "baseline", **own})
        table += [row for row in rows if row["metric"] == metric]
    parts = [pair.by_length() for pair in pairs]  # an empty one would make counts floats
    lengths = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    return ReportComparison(tuple(runs), accepted, pd.DataFrame(table, columns=COLUMNS), lengths)


def _labelled(runs: Sequence[RunItems]) -> list[RunItems]:
    """Names that tell the reports apart: the model's, then with the run's, then with the folder's."""
    for add in (lambda run: run.report["run"], lambda run: tilde(run.path.parent)):
        names = [run.label for run in runs]
        runs = [
            replace(run, label=f"{run.label} ({one_line(add(run))})") if names.count(run.label) > 1 else run
            for run in runs
        ]
    return list(runs)


def _corrected(rows: list[Row]) -> list[Row]:
    """Holm's correction over all tests of the table, and what each says."""
    tested = [row for row in rows if "p" in row]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        higher = "higher" if row["difference"] > 0 else "lower"
        word = higher if p < 1 - LEVEL else "no evidence of a difference"
        row |= {"p_holm": p, "reading": f"{word}; {row['reading']}"}
    return rows


@dataclass(frozen=True)
class Pair:
    """The baseline and another run; their long-context answers to questions with equal keys and answers."""

    first: RunItems
    run: RunItems
    n_boot: int = N_BOOT
    seed: int = 0

    @cached_property
    def shared(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The long-context answers of each to the questions that both were asked."""
        a, b, keys = self.first.context, self.run.context, ["haystack", "length", "question", "expected"]
        if not len(a) or not len(b):
            return a[:0], b[:0]
        common = a[keys].merge(b[keys], on=keys)
        return a.merge(common, on=keys), b.merge(common, on=keys)

    def row(self, metric: str) -> Row:
        """The row of a metric: the run's own value, and its difference to the baseline or why it has none."""
        own: Row = {"metric": metric, "model": self.run.label, "kind": "", "reading": ""}
        own |= {} if metric == RETRIEVAL else self.run.stated(metric)
        name = CURVE if metric == RETRIEVAL else metric
        for run in (self.first, self.run):
            if run.value(name) is None:
                why = run.detail(name).get("withheld") or "no value"
                return own | {"reading": f"not compared: {run.label} withholds it ({why})"}
        return own | ROWS[metric](self, metric)

    def by_length(self) -> pd.DataFrame:
        """The difference in retrieval by length."""
        a, b = self.shared
        table = paired(b, a, n_boot=self.n_boot, seed=self.seed) if len(a) else a.iloc[:0, :0]
        return table.assign(model=self.run.label)


def _differs(kind: str, value: float, low: float, high: float, reading: str) -> Row:
    return dict(kind=kind, difference=value, difference_low=low, difference_high=high, reading=reading)


def _score(pair: Pair, metric: str) -> Row:
    it = compare_runs([pair.first.scores[metric]], [pair.run.scores[metric]], pair.n_boot, pair.seed)[0]
    reading = f"{it.only_a} right in the baseline alone, {it.only_b} here alone"
    change = _differs("difference", it.difference, it.low, it.high, reading)
    return {"n": it.n, "value": it.b, "p": it.p, **change}


def _retrieval(pair: Pair, metric: str) -> Row:
    """Accuracy over all planned lengths that both measured, on the questions that both were asked."""
    a, b = (items[items["planned"]] for items in pair.shared)
    if not len(a):
        return {"reading": "not compared: the two were asked no question in common"}
    it = paired(_pooled(b), _pooled(a), n_boot=pair.n_boot, seed=pair.seed).iloc[0]
    planned = int(pair.first.context["planned"].sum())
    left = "" if len(a) == planned else f"; of {planned} questions {len(a)} were asked of both"
    reading = f"{it['only_baseline']:.0f} right in the baseline alone, {it['only_this']:.0f} here alone{left}"
    own, p = _alone(b, pair.n_boot, pair.seed), flip_test(a, b, pair.seed)
    return {**own, "p": p, **_differs("difference", it["difference"], it["low"], it["high"], reading)}


def _pooled(items: pd.DataFrame) -> pd.DataFrame:
    """All lengths as one, so that ``paired`` gives the difference over all of them."""
    return items.assign(question=items["length"].astype(str) + "/" + items["question"], length=0)


def _alone(items: pd.DataFrame, n_boot: int, seed: int) -> Row:
    """A model's accuracy over planned lengths; its interval is that of its lead on one that knows nothing."""
    if not len(items):
        return {}
    items = items[items["planned"]]
    it = paired(_pooled(items), _pooled(items).assign(correct=False), n_boot=n_boot, seed=seed).iloc[0]
    low, high = max(0.0, float(it["low"])), min(1.0, float(it["high"]))
    return {"n": len(items), "value": items["correct"].mean(), "low": low, "high": high}


def flip_test(a: pd.DataFrame, b: pd.DataFrame, seed: int) -> float:
    """P value of the sign-flip test of the paired difference, with texts as units: see `stats.sign_flip`."""
    change = (b.groupby("haystack")["correct"].sum() - a.groupby("haystack")["correct"].sum()).to_numpy(float)
    return sign_flip(change, N_FLIPS, seed) if len(change) > 1 else 1.0


def _boundary(pair: Pair, metric: str) -> Row:
    both = pair.first, pair.run
    states = [str(run.detail(metric).get("status")) for run in both]
    if "floor" in states:
        lost = [run.label for run, state in zip(both, states, strict=True) if state == "floor"]
        verb = "does" if len(lost) == 1 else "do"
        return {"reading": f"not compared: {' and '.join(lost)} {verb} no better than chance"}
    if not all(len(run.context) for run in both):
        return {"reading": "not compared: there is no curve"}
    ratio, low, high = boundary_ratio(*both, pair.n_boot, pair.seed)
    reading = f"the interval {'excludes' if low > 1 or high < 1 else 'includes'} 1"
    if states == ["right_censored"] * 2:
        reading = "neither boundary was reached"
    elif "right_censored" in states:
        which = "at most: the baseline's" if states[0] == "right_censored" else "at least: it"
        reading = f"{which} was not reached; {reading}"
    flags = [f"{run.label} {flag}" for run in both for flag in boundary_flags(run.detail(metric))]
    return _differs("ratio", ratio, low, high, "; ".join([reading, *flags]))


def boundary_ratio(
    first: RunItems, run: RunItems, n_boot: int = N_BOOT, seed: int = 0
) -> tuple[float, float, float]:
    """The ratio of two failure boundaries and its 95 % interval, the same texts drawn for both.

    A drawn boundary beyond the longest length bounds the ratio from one side, so the interval is open (0 or
    inf) where that happens often. A runtime failure caps the boundary in every draw.
    """
    shared = sorted({*first.context["haystack"]} & {*run.context["haystack"]})
    drawn = []
    for own in (first, run):
        counts = Counts.of(own.context[own.context["haystack"].isin(shared)])
        boundaries = counts.drawn(n_boot, seed).tokens
        if own.detail(BOUNDARY).get("cause") not in (None, "quality"):
            boundaries = np.minimum(boundaries, own.value(BOUNDARY))
        drawn.append((boundaries, float(counts.lengths[-1])))
    (a, longest_a), (b, longest_b) = drawn
    with np.errstate(invalid="ignore"):
        least = np.where(a == inf, 0.0, np.minimum(b, longest_b) / np.where(a == inf, 1.0, a))
        most = np.where(b == inf, inf, b / np.minimum(a, longest_a))
    tail = expanded_tail(len(shared), BOOTSTRAP_LEVEL) if len(shared) > 1 else 0.0
    open_both = all(own.detail(BOUNDARY).get("right_censored") for own in (first, run))
    return (
        nan if open_both else run.value(BOUNDARY) / first.value(BOUNDARY),
        float(np.quantile(least, tail, method="lower")),
        float(np.quantile(most, 1 - tail, method="higher")),
    )


def _speed(pair: Pair, metric: str) -> Row:
    if why := why_speeds_differ(pair.first, pair.run):
        return {"reading": f"not compared: {why}"}
    base, own = pair.first.stated(metric), pair.run.stated(metric)
    ends = own["low"] / base["high"], own["high"] / base["low"]
    return _differs("ratio", own["value"] / base["value"], *ends, "of medians, one session each")


def why_speeds_differ(first: RunItems, run: RunItems) -> str:
    """Why two speeds are not of one kind; empty where they are. Threads are a condition."""
    for fact in SPEED_FACTS:
        a, b = (own.report["machine"].get(fact) for own in (first, run))
        if None in (a, b) or a != b:
            return f"measured on different machines ({fact}: {a} and {b})"
    for own in (first, run):
        if others := run_beside(own.path):
            return f"{own.label} ran beside {', '.join(others)} in a sweep"
        if is_contended(own.report, own.path):
            return f"the machine was busy when {own.label} was timed"
    return ""


ROWS: dict[str, Callable[[Pair, str], Row]] = {
    **dict.fromkeys(SCORES, _score),
    RETRIEVAL: _retrieval,
    BOUNDARY: _boundary,
    SPEED: _speed,
}
