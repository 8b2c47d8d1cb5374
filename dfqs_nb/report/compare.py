"""Reports side by side: two or more, tested item by item, and a folder of them, ranked.

Reports are compared only under equal conditions: what ``report.json`` hashes, ``system_info`` among them,
because kernels, and so answers, may differ by it. The rest of the machine decides only whether speeds may be
compared. Two may differ: a chat template, which belongs to a model's own file and is named, and how much the
budgets allowed: then the questions that both were asked are compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from dfqs_nb.context import paired
from dfqs_nb.core.display import cell, one_line, plain
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import write_table, write_text
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.core.paths import tilde
from dfqs_nb.report.metrics import METRICS
from dfqs_nb.report.reading import BOUNDARY, CURVE, FILE, SCORES, SPEED, RunItems, read_answers, rerun
from dfqs_nb.report.template import render
from dfqs_nb.scores import compare_runs
from dfqs_nb.stats import LEVEL, holm, sign_flip

RETRIEVAL = "retrieval accuracy"  # over all planned lengths, in comparisons
TEMPLATE = "chat_template_sha256"  # the one condition that is a property of a model's own file
AMOUNTS = {f"long_context.{name}" for name in ("grid", "n_haystacks", "n_ctx")}  # and the part of a set
SPEED_FACTS = ("system", "processor", "usable cores")  # of the machine: equal, or speeds are not compared
N_FLIPS, SEED = 20_000, 0  # of signs, where there are too many texts for all
SAME_QUESTION = ["haystack", "length", "question", "expected"]  # its key, and the answer to it
COLUMNS = "metric model n value low high kind difference difference_low difference_high p p_holm".split()
COLUMNS += ["reading"]
BOARD_COLUMNS = ["tier", "conditions", "place", "run", "model", "size_bytes"]
BOARD_COLUMNS += [*(name for name in METRICS if name != CURVE), "right_censored", "contended"]
BOARD_COLUMNS += ["report", "problem"]
Row = dict[str, Any]


# ---- two or more reports ----


@dataclass(frozen=True)
class ReportComparison:
    """Reports under equal conditions, the first one the baseline.

    ``templates`` are the conditions of chat templates that differ. ``table`` has a
    row a metric and model, columns `COLUMNS`: ``kind`` is ``difference`` (to the baseline) or ``ratio``, with
    its 95 % interval (of speeds, what repetitions allow); ``p`` is of McNemar's test of scores and of the
    sign-flip test of retrieval, and ``p_holm`` is corrected over the table.
    """

    runs: tuple[RunItems, ...]
    templates: list[str]
    table: pd.DataFrame

    def __str__(self) -> str:
        """The comparison as Markdown to paste: what was compared, one table, methods."""
        details = {run.label: run.report["details"] for run in self.runs}
        groups = [group.to_dict("records") for _, group in self.table.groupby("metric", sort=False)]
        pairs = [(own, row) for own, *others in groups for row in others]
        return render("comparison.md", **vars(self), pairs=pairs, details=details)


def compare_reports(paths: Sequence[str | Path]) -> ReportComparison:
    """Compare runs, by their folders or reports, with the first of them, item by item.

    A DfqsError says where reports, conditions or items do not fit.
    """
    runs, table = [read_answers(path) for path in paths], list[Row]()
    if len({run.label for run in runs}) < len(runs):
        runs = [replace(run, label=f"{run.label} ({one_line(tilde(run.path.parent))})") for run in runs]
    templates, (first, *others) = _differing_templates(runs), runs
    for metric in ROWS:
        own = _alone(first.context) if metric == RETRIEVAL else first.stated(metric)
        table.append({"metric": metric, "model": first.label, "kind": "", "reading": "baseline", **own})
        table += [_row(metric, first, run) for run in others]
    tested = [row for row in table if "p" in row]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):  # over the whole table
        higher = "higher" if row["difference"] > 0 else "lower"
        word = higher if p < 1 - LEVEL else "no evidence of a difference"
        row |= {"p_holm": p, "reading": f"{word}; {row['reading']}"}
    return ReportComparison(tuple(runs), templates, pd.DataFrame(table, columns=COLUMNS))


def _differing_templates(runs: Sequence[RunItems]) -> list[str]:
    """The conditions of chat templates that differ; a DfqsError where reports do not fit."""
    if len(runs) < 2:
        raise DfqsError(f"{len(runs)} report given", hint="give two or more")
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise DfqsError("the same report is given twice", hint="give reports of different runs")
    if len({run.report["tier"] for run in runs}) > 1:
        each = ", ".join(f"{tilde(run.path)} is {run.report['tier']}" for run in runs)
        raise DfqsError(f"tiers never mix: {each}", hint="run both on one tier")
    refused, templates = list[str](), dict[str, None]()
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.report["conditions"]))
    for run in runs:
        if lacking := [kind for kind in kinds if kind not in run.report["conditions"]]:
            what = f"has no {' and no '.join(lacking)}, and others do".replace("_", " ")
            raise DfqsError(what, where=tilde(run.path), hint=rerun(lacking, run.report["command"]))
    for run in runs:
        differ = differing_fields(runs[0].report["conditions"], run.report["conditions"])
        templates |= dict.fromkeys(name for name in differ if name.split(".")[-1] == TEMPLATE)
        wrong = [it for it in differ if not (it in templates or it in AMOUNTS or it.endswith(".part"))]
        if wrong:
            refused.append(f"{tilde(run.path)}: {_named({it: differ[it] for it in wrong}, '{} and {}')}")
    if refused:
        what = f"the conditions differ from those of {tilde(runs[0].path)} in {' | '.join(refused)}"
        raise DfqsError(what, hint="run all again under the same conditions")
    return list(templates)


def _named(differ: Mapping[str, tuple[Any, Any]], form: str) -> str:
    """Conditions that differ, each with its two values; what several places repeat (settings) stands once."""
    places = defaultdict[tuple[str, str], list[str]](list)
    for name, values in differ.items():
        shown = ("given" if isinstance(value, Mapping) else cell(value) for value in values)
        places[name.split(".")[-1], form.format(*shown)].append(name)
    names = ((own[0] if len(own) == 1 else last, values) for (last, values), own in places.items())
    return ", ".join(f"{name} ({values})" for name, values in names)


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
    """A score over the questions that both were asked, where a budget left some out."""
    (a, b), left = (it.scores[metric] for it in (first, run)), ""
    both = set(a.answered["id"]) & set(b.answered["id"])
    if both and any("part" in it.report["conditions"]["scores"].get(a.name, {}) for it in (first, run)):
        left = f"; asked of both: {len(both)} questions, of {len(a.answered)} and {len(b.answered)}"
        a, b = (it.only(both) for it in (a, b))
    it = compare_runs(a, b)
    reading = f"{it.only_a} right in the baseline alone, {it.only_b} here alone{left}"
    change = _differs("difference", it.difference, it.low, it.high, reading)
    return {"n": it.n, "value": it.b, "low": b.score.low, "high": b.score.high, "p": it.p, **change}


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
    # no ratio of two boundaries: retrieval, whose texts are paired, tells better which carries further
    BOUNDARY: lambda *_: {"reading": "not tested: each stands with its interval, and with what qualifies it"},
    SPEED: _speed,
}


# ---- a folder of reports ----


@dataclass(frozen=True)
class Leaderboard:
    """Reports of a folder, ranked: ``table`` has one row a report, columns `BOARD_COLUMNS`.

    Sections have equal ``tier`` and ``conditions`` (12 digits of their SHA-256). Within one by reasoning
    score, then code score; equal scores share a ``place``, a withheld one has none. ``right_censored``: the
    boundary lies beyond that length. ``contended``: the speed was taken on a busy machine. ``problem``: why a
    file does not count. ``reports``: those that do, by file.
    """

    folder: Path
    table: pd.DataFrame
    reports: Mapping[str, Mapping[str, Any]]

    def __str__(self) -> str:
        """The leaderboard as Markdown: a section for each tier and conditions, then what does not count."""
        sections, first = [], dict[str, Any]()  # conditions by tier
        for (tier, own), group in self.table.groupby(["tier", "conditions"], sort=False):
            conditions = self.reports[group["report"].iloc[0]]["conditions"]
            differ = differing_fields(first.setdefault(tier, conditions), conditions)
            sections.append((tier, own, _named(differ, "{} there, {} here"), group.to_dict("records")))
        bad = self.table[self.table["problem"] != ""][["report", "problem"]].to_numpy().tolist()
        facts = {"metrics": list(METRICS), "reports": self.reports}
        return render("leaderboard.md", sections=sections, bad=bad, **facts).rstrip()

    def write(self) -> list[Path]:
        """Write ``leaderboard.csv`` and ``leaderboard.md`` into the folder, each whole or not at all."""
        rounded = self.table.map(lambda cell: float(f"{cell:.6g}") if isinstance(cell, float) else cell)
        for name in ("size_bytes", BOUNDARY):  # a missing one makes floats of them
            rounded[name] = self.table[name].astype("Int64")
        table = write_table(self.folder / "leaderboard.csv", rounded, index=False)
        return [table, write_text(self.folder / "leaderboard.md", f"{self}\n")]


def leaderboard(folder: str | Path) -> Leaderboard:
    """Rank the reports under a folder; each is checked, and its scores are counted again from its answers.

    Reports are ranked within equal tier and conditions, never across. What cannot be read or counted again
    is listed with its reason, without a place. Hidden folders and linked ones are left out.
    """
    folder, rows, reports = Path(folder), list[Row](), dict[str, Mapping[str, Any]]()
    if not folder.is_dir():
        raise DfqsError("no such folder", where=tilde(folder), hint="give a folder that holds reports")
    for path in sorted(folder.rglob(FILE)):
        name = plain(path.relative_to(folder).as_posix())
        if "/." in f"/{name}":
            continue
        try:
            report = read_answers(path).report
            reports[name], row = report, _place(report)
        except DfqsError as error:
            row = {"problem": plain(f"{error.what}; {error.hint}" if error.hint else error.what)}
        rows.append({**row, "report": name})
    return Leaderboard(folder, _placed(pd.DataFrame(rows, columns=BOARD_COLUMNS)), reports)


def _place(report: Mapping[str, Any]) -> Row:
    return {
        "tier": report["tier"],
        "conditions": report["conditions_sha256"][:12],
        "run": plain(report["run"]),
        "model": plain(report["model"]["name"]),
        "size_bytes": report["model"]["size_bytes"],
        **{name: value for name, value in report["metrics"].items() if name != CURVE},
        "right_censored": bool(report["details"][BOUNDARY].get("right_censored")),
        "contended": bool(report["details"][SPEED].get("contended")),
        "problem": "",
    }


def _placed(table: pd.DataFrame) -> pd.DataFrame:
    """Standard before nano, rows by score, problems last."""
    section, scores = ["tier", "conditions"], list(SCORES)
    table = table.assign(**table[scores].astype(float))
    order = {"tier": False, "conditions": True, **dict.fromkeys(scores, False), "run": True, "report": True}
    table = table.sort_values(list(order), ascending=list(order.values()), na_position="last")
    row = table.groupby(section).cumcount() + 1.0
    place = row.groupby([table[name] for name in (*section, *scores)], dropna=False).transform("min")
    return table.assign(place=place.where(table["reasoning_score"].notna())).reset_index(drop=True)
