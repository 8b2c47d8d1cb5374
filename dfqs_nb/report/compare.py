"""Two or more DFQS reports side by side, tested item by item; refused unless their conditions are equal.

Conditions are what ``report.json`` hashes, ``system_info`` among them: kernels, and so answers, may differ by
it. The rest of the machine decides only whether speeds may be compared. One difference can be accepted, by
its name: a chat template belongs to a model's file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from dfqs_nb.context import paired
from dfqs_nb.core.display import one_line
from dfqs_nb.core.errors import ComparisonError
from dfqs_nb.core.files import write_text
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.core.paths import tilde
from dfqs_nb.report.metrics import BOUNDARY, CURVE, SCORES, SPEED
from dfqs_nb.report.reading import RETRIEVAL, RunItems, read_answers
from dfqs_nb.report.template import render, sentence
from dfqs_nb.scores import compare_runs
from dfqs_nb.stats import LEVEL, holm, sign_flip

ACCEPTABLE = "chat_template_sha256"  # the one condition that is a property of a model's own file
SPEED_FACTS = ("system", "processor", "usable cores")  # of the machine: equal, or speeds are not compared
N_FLIPS, SEED = 20_000, 0  # of signs, where there are too many texts for all
SAME_QUESTION = ["haystack", "length", "question", "expected"]  # its key, and the answer to it
MEASURED = "metric model n value low high kind difference difference_low difference_high p p_holm reading"
COLUMNS = MEASURED.split()
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
    """

    runs: tuple[RunItems, ...]
    accepted: dict[str, list[Any]]
    table: pd.DataFrame

    def __str__(self) -> str:
        """The comparison as Markdown to paste: what was compared, one table, methods."""
        details = {run.label: run.report["details"] for run in self.runs}
        groups = [group.to_dict("records") for _, group in self.table.groupby("metric", sort=False)]
        pairs = [(own, row) for own, *others in groups for row in others]
        return render("comparison.md", **vars(self), pairs=pairs, details=details)

    def write(self, folder: str | Path) -> Path:
        """Write ``comparison.md`` into a folder, whole, and return its path."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        return write_text(Path(folder) / "comparison.md", str(self))


def compare_reports(paths: Sequence[str | Path], *, accept: Sequence[str] = ()) -> ReportComparison:
    """Compare runs, by their folders or reports, with the first of them, item by item.

    ``accept=["chat_template_sha256"]`` compares models that have templates of their own. A ReportError or
    ComparisonError says where reports, conditions or items do not fit (`check_reports`).
    """
    runs = _labelled([read_answers(path) for path in paths])
    accepted, first, table = check_reports(runs, accept), runs[0], list[Row]()
    rows = [_row(metric, first, run) for metric in ROWS for run in runs[1:]]
    tested = [row for row in rows if "p" in row]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):  # over the whole table
        higher = "higher" if row["difference"] > 0 else "lower"
        word = higher if p < 1 - LEVEL else "no evidence of a difference"
        row |= {"p_holm": p, "reading": f"{word}; {row['reading']}"}
    for metric in ROWS:
        own = _alone(first.context) if metric == RETRIEVAL else first.stated(metric)
        table.append({"metric": metric, "model": first.label, "kind": "", "reading": "baseline", **own})
        table += [row for row in rows if row["metric"] == metric]
    return ReportComparison(tuple(runs), accepted, pd.DataFrame(table, columns=COLUMNS))


def _labelled(runs: Sequence[RunItems]) -> list[RunItems]:
    """Names that tell the reports apart: the model's, then with the run's, then with the folder's."""
    for add in (lambda run: run.report["run"], lambda run: tilde(run.path.parent)):
        names = [run.label for run in runs]
        runs = [
            replace(run, label=f"{run.label} ({one_line(add(run))})") if names.count(run.label) > 1 else run
            for run in runs
        ]
    return list(runs)


def _row(metric: str, first: RunItems, run: RunItems) -> Row:
    """The row of a metric: the run's own value, and its difference to the baseline or why it has none."""
    own: Row = {"metric": metric, "model": run.label, "kind": "", "reading": ""}
    own |= {} if metric == RETRIEVAL else run.stated(metric)
    for it in (first, run):
        detail = it.report["details"][CURVE if metric == RETRIEVAL else metric]
        if detail["value"] is None:
            return own | {"reading": f"not compared: {it.label} withholds it ({detail['withheld']})"}
    return own | ROWS[metric](metric, first, run)


def _differs(kind: str, value: float, low: float, high: float, reading: str) -> Row:
    return dict(kind=kind, difference=value, difference_low=low, difference_high=high, reading=reading)


def _score(metric: str, first: RunItems, run: RunItems) -> Row:
    it = compare_runs(first.scores[metric], run.scores[metric])
    reading = f"{it.only_a} right in the baseline alone, {it.only_b} here alone"
    change = _differs("difference", it.difference, it.low, it.high, reading)
    return {"n": it.n, "value": it.b, "p": it.p, **change}


def _retrieval(metric: str, first: RunItems, run: RunItems) -> Row:
    """Accuracy over all planned lengths that both measured, on the questions that both were asked."""
    common = first.context[SAME_QUESTION].merge(run.context[SAME_QUESTION])
    a, b = (items[items["planned"]].merge(common) for items in (first.context, run.context))
    if not len(a):
        return {"reading": "not compared: the two were asked no question in common"}
    it, planned = paired(b, a), int(first.context["planned"].sum())
    left = "" if len(a) == planned else f"; of {planned} questions {len(a)} were asked of both"
    reading = f"{it['only_baseline']:.0f} right in the baseline alone, {it['only_this']:.0f} here alone{left}"
    change = _differs("difference", it["difference"], it["low"], it["high"], reading)
    return {**_alone(b), "p": flip_test(a, b), **change}


def _alone(items: pd.DataFrame) -> Row:
    """A model's accuracy over planned lengths; its interval is that of its lead on one that knows nothing."""
    if not len(items):
        return {}
    items = items[items["planned"]]
    it = paired(items, items.assign(correct=False))
    low, high = max(0.0, it["low"]), min(1.0, it["high"])
    return {"n": len(items), "value": items["correct"].mean(), "low": low, "high": high}


def flip_test(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """P value of the sign-flip test of the paired difference, with texts as units: see `stats.sign_flip`."""
    change = (b.groupby("haystack")["correct"].sum() - a.groupby("haystack")["correct"].sum()).to_numpy(float)
    return sign_flip(change, N_FLIPS, SEED) if len(change) > 1 else 1.0


def _boundary(metric: str, first: RunItems, run: RunItems) -> Row:
    """No ratio of two boundaries: retrieval, whose texts are paired, tells better which carries further."""
    reading = "their intervals stand beside them"
    for it in (first, run):
        detail = it.report["details"][metric]
        reading += f"; {it.label} does no better than chance" * (detail["status"] == "floor")
        reading += f"; {it.label}'s was not reached" * bool(detail.get("right_censored"))
        reading += sentence("flags", detail).replace("; ", f"; {it.label} ")
    return {"reading": reading}


def _speed(metric: str, first: RunItems, run: RunItems) -> Row:
    """A ratio, where machine and load are alike; threads are a condition."""
    for fact in SPEED_FACTS:
        a, b = (it.report["machine"].get(fact) for it in (first, run))
        if None in (a, b) or a != b:
            return {"reading": f"not compared: measured on different machines ({fact}: {a} and {b})"}
    for it in (first, run):
        if it.report["details"][SPEED]["contended"]:
            return {"reading": f"not compared: the machine was busy when {it.label} was timed"}
    base, own = first.stated(metric), run.stated(metric)
    ends = own["low"] / base["high"], own["high"] / base["low"]
    return _differs("ratio", own["value"] / base["value"], *ends, "of medians, one session each")


ROWS: dict[str, Callable[[str, RunItems, RunItems], Row]] = {
    **dict.fromkeys(SCORES, _score),
    RETRIEVAL: _retrieval,
    BOUNDARY: _boundary,
    SPEED: _speed,
}
