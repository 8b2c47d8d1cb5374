"""Two or more DFQS reports side by side, tested item by item; refused unless their conditions are equal.

Conditions are what ``report.json`` hashes: prompts, template, sampling, runtime, settings, threads, the
sandbox, and ``system_info`` (which instructions llama.cpp computes with: kernels, and so answers, may differ
by it). The rest of the machine changes no answer; it decides only whether speeds may be compared.

One difference can be accepted, by its name: a chat template belongs to a model's file, so two models that
have templates of their own can never have equal conditions. The comparison then says so at its top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.context import Counts, paired
from dfqs_nb.core.errors import ComparisonError
from dfqs_nb.core.files import write_json, write_table, write_text
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.core.paths import tilde
from dfqs_nb.report.board import is_contended, run_beside
from dfqs_nb.report.compare_text import BOUNDARY, RETRIEVAL, SPEED, by_length, shown
from dfqs_nb.report.items import SCORES, Items, read_items
from dfqs_nb.report.metrics import FILE, boundary_flags, read_report
from dfqs_nb.report.text import render
from dfqs_nb.scores import compare_runs
from dfqs_nb.stats import BOOTSTRAP_LEVEL, LEVEL, N_BOOT, expanded_tail, holm

if TYPE_CHECKING:
    import pandas as pd

ACCEPTABLE = "chat_template_sha256"  # the one condition that is a property of a model's own file
SPEED_FACTS = ("system", "processor", "usable cores")  # of the machine: equal, or speeds are not compared
N_FLIPS = 20_000  # of signs, where there are too many texts for all
COLUMNS = (
    ("metric", "model", "n", "value", "low", "high", "kind")
    + ("difference", "difference_low", "difference_high", "p", "p_holm", "reading")
)  # fmt: skip


@dataclass(frozen=True)
class RunItems:
    """A report with the answers it was made from; ``label`` is how tables call the model."""

    label: str
    path: Path
    report: Mapping[str, Any]
    items: Items

    @property
    def counts(self) -> Counts | None:
        """Counts by text and length; None where the curve is withheld."""
        return self.items.counts

    @property
    def context(self) -> pd.DataFrame:
        """Long-context answers, of the task that the curve is made of."""
        return self.items.context

    def value(self, metric: str) -> Any:
        """A metric, None where it is withheld."""
        return self.report["metrics"][metric]

    def detail(self, metric: str) -> Mapping[str, Any]:
        """What stands beside a metric."""
        found: Mapping[str, Any] = self.report["details"].get(metric) or {}
        return found

    def stated(self, metric: str) -> dict[str, float]:
        """Count, value and interval as the report states them; NaN where it states none."""
        detail = self.detail(metric)
        values = {
            "n": detail.get("n"),
            "value": self.value(metric),
            "low": detail.get("low"),
            "high": detail.get("high"),
        }
        return {name: nan if value is None else float(value) for name, value in values.items()}


def read_answers(path: str | Path) -> RunItems:
    """A report, from its file or its run's folder, with its answers; both are checked.

    Raises:
        ReportError: the report is incomplete or was edited, or its answers are missing or do not give it.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    report = read_report(path)
    return RunItems(str(report["model"]["name"]), path, report, read_items(report, path.parent))


# ---- what may be compared ----


def check_reports(runs: Sequence[RunItems], accept: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Refuse reports that cannot stand side by side; return the accepted differences with all values.

    Raises:
        ComparisonError: fewer than two reports, one of them twice, tiers that differ, or conditions that do;
            every field that differs is named.
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
            raise ComparisonError(
                f"the same report as {tilde(other)}", where=tilde(run.path), hint="give it once"
            )
    if len({run.report["tier"] for run in runs}) > 1:
        each = ", ".join(f"{tilde(run.path)} is {run.report['tier']}" for run in runs)
        raise ComparisonError(f"tiers never mix: {each}", hint="run both on one tier")
    return _check_conditions(runs, accept)


def _check_conditions(runs: Sequence[RunItems], accept: Sequence[str]) -> dict[str, list[Any]]:
    first = runs[0]
    refused: list[str] = []
    names: set[str] = set()
    accepted: set[str] = set()
    for run in runs[1:]:
        differ = differing_fields(first.report["conditions"], run.report["conditions"])
        allowed = {name for name in differ if any(name == one or name.endswith(f".{one}") for one in accept)}
        accepted |= allowed
        names |= {*differ} - allowed
        named = [f"{name} ({a} and {b})" for name, (a, b) in differ.items() if name not in allowed]
        if named:
            refused.append(f"{tilde(run.path)}: {', '.join(named)}")
    if refused:
        only_templates = all(name.split(".")[-1] == ACCEPTABLE for name in names)
        way = f"; --accept {ACCEPTABLE} compares models across their own templates" if only_templates else ""
        raise ComparisonError(
            f"the conditions differ from those of {tilde(first.path)} in " + " | ".join(refused),
            hint=f"run all again under the same conditions{way}",
        )
    return {name: [_at(run.report["conditions"], name) for run in runs] for name in sorted(accepted)}


def _at(conditions: Mapping[str, Any], name: str) -> Any:
    value: Any = conditions
    for part in name.split("."):
        value = value.get(part, "absent") if isinstance(value, Mapping) else "absent"
    return value


# ---- the comparison ----


@dataclass(frozen=True)
class ReportComparison:
    """Reports under equal conditions, the first one the baseline.

    Attributes:
        runs: the reports with their items.
        accepted: conditions that differ and were accepted, with each report's value.
        table: one row a metric and model, columns `COLUMNS`. ``kind``: ``difference`` (model minus baseline)
            or ``ratio`` (model / baseline); its interval is of 95 %, for speeds the range that repetitions
            allow. ``p``: exact McNemar test of scores, sign-flip test over texts of retrieval; ``p_holm``:
            after Holm's correction over all tests of the table. Baseline rows have no difference.
        lengths: retrieval by length: ``model`` and the columns of ``paired``.
    """

    runs: tuple[RunItems, ...]
    accepted: dict[str, list[Any]]
    table: pd.DataFrame
    lengths: pd.DataFrame

    @property
    def tier(self) -> str:
        """The tier of all reports."""
        return str(self.runs[0].report["tier"])

    def __str__(self) -> str:
        """The comparison as Markdown to paste: what was compared, one table, retrieval by length, methods."""
        return render("comparison.md", found=self, shown=shown(self), by_length=by_length(self))

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``comparison.json``, ``.md``, ``.csv`` and ``.png`` into a folder, each whole."""
        from dfqs_nb.core import figures as drawing
        from dfqs_nb.report import figures

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "comparison.json", self.as_dict())
        numbers = self.table.select_dtypes("number").map(lambda value: float(f"{value:.6g}"))
        write_table(folder / "comparison.csv", self.table.assign(**numbers), index=False)
        write_text(folder / "comparison.md", str(self))
        drawing.save(figures.comparison(self).axes[0], folder / "comparison.png")
        return [folder / f"comparison{suffix}" for suffix in (".json", ".md", ".csv", ".png")]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with what identifies each report; NaN as null."""
        keys = ("run", "conditions_sha256", "created")
        return {
            "schema": "dfqs-comparison/1.0",
            "tier": self.tier,
            "accepted": self.accepted,
            "reports": [
                {
                    "label": run.label,
                    "model_sha256": run.report["model"]["sha256"],
                    "report_sha256": run.report["integrity"]["sha256"],
                    **{key: run.report[key] for key in keys},
                }
                for run in self.runs
            ],
            "conditions": self.runs[0].report["conditions"],
            "level": LEVEL,
            "table": _plain(self.table),
            "by_length": _plain(self.lengths),
        }


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = table.astype(object).to_dict("records")
    return [{str(key): _json(value) for key, value in row.items()} for row in rows]


def _json(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and (value != value or value in (inf, -inf)) else value


def compare_reports(
    paths: Sequence[str | Path], *, accept: Sequence[str] = (), n_boot: int = N_BOOT, seed: int = 0
) -> ReportComparison:
    """Compare reports with the first of them, item by item.

    Args:
        paths: runs' folders, or the ``report.json`` in them.
        accept: ``["chat_template_sha256"]`` compares models that have templates of their own.
        n_boot, seed: of the bootstrap.

    Raises:
        ReportError: see `read_answers`.
        ComparisonError: see `check_reports`, or the two were asked other items.
    """
    import pandas as pd

    places = [(Path(path) / FILE if Path(path).is_dir() else Path(path)).resolve() for path in paths]
    if twice := sorted({str(tilde(place)) for place in places if places.count(place) > 1}):
        raise ComparisonError(f"given twice: {', '.join(twice)}", hint="give each report once")
    runs = _labelled([read_answers(path) for path in paths])
    accepted = check_reports(runs, accept)
    rows, lengths, first = [], [], runs[0]
    for run in runs[1:]:
        for metric in (*SCORES, RETRIEVAL, BOUNDARY, SPEED):
            missing = _withheld(first, run, metric)
            rows.append(missing or _ROWS[metric](first, run, metric, n_boot, seed))
        lengths.append(_by_length(first, run, n_boot, seed))
    table = _with_baseline(_corrected(rows), first, n_boot, seed)
    return ReportComparison(tuple(runs), accepted, table, pd.concat(lengths, ignore_index=True))


def _labelled(runs: Sequence[RunItems]) -> list[RunItems]:
    """Names that tell the reports apart: the model's, then with the run's, then with the folder's."""
    names = [run.label for run in runs]
    for add in (lambda run: run.report["run"], lambda run: tilde(run.path.parent)):
        names = [
            name if names.count(name) == 1 else f"{name} ({add(run)})"
            for name, run in zip(names, runs, strict=True)
        ]
    return [replace(run, label=name) for name, run in zip(names, runs, strict=True)]


def _row(run: RunItems, metric: str, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(COLUMNS, nan)
    return {**empty, "metric": metric, "model": run.label, "kind": "", "reading": "", **values}


def _withheld(first: RunItems, run: RunItems, metric: str) -> dict[str, Any] | None:
    """A row that says why a metric is not compared: one of the two withholds it."""
    name = "context_stability_curve" if metric == RETRIEVAL else metric
    own = {} if metric == RETRIEVAL else run.stated(metric)
    for one in (first, run):
        if one.value(name) is None:
            why = one.detail(name).get("withheld") or "no value"
            return _row(run, metric, **own, reading=f"not compared: {one.label} withholds it ({why})")
    return None


def _reading(only_first: int, only_this: int) -> str:
    return f"{only_first} right in the baseline alone, {only_this} here alone"


def _score_row(first: RunItems, run: RunItems, metric: str, n_boot: int, seed: int) -> dict[str, Any]:
    a, b = (one.items.scores[metric] for one in (first, run))
    found, own = compare_runs([a], [b], n_boot, seed)[0], b.score
    return _row(
        run,
        metric,
        n=found.n,
        value=found.b,
        low=own.low,
        high=own.high,
        kind="difference",
        difference=found.difference,
        difference_low=found.low,
        difference_high=found.high,
        p=found.p,
        reading=_reading(found.only_a, found.only_b),
    )


def _shared(first: RunItems, run: RunItems) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The long-context answers of both to questions with equal keys and equal answers."""
    keys = ["haystack", "length", "question", "expected"]
    if not len(first.context) or not len(run.context):
        return first.context[:0], run.context[:0]
    both = first.context[keys].merge(run.context[keys], on=keys)
    return first.context.merge(both, on=keys), run.context.merge(both, on=keys)


def _retrieval_row(first: RunItems, run: RunItems, metric: str, n_boot: int, seed: int) -> dict[str, Any]:
    """Accuracy over all planned lengths that both measured, on the questions that both were asked."""
    a, b = (one[one["planned"]] for one in _shared(first, run))
    if not len(a):
        return _row(run, metric, reading="not compared: the two were asked no question in common")
    whole = paired(_as_one(b), _as_one(a), n_boot=n_boot, seed=seed).iloc[0]
    low, high = _alone(b, n_boot, seed)
    planned = int(first.context["planned"].sum())
    left = "" if len(a) == planned else f"; of {planned} questions {len(a)} were asked of both"
    return _row(
        run,
        metric,
        n=int(whole["n"]),
        value=whole["accuracy"],
        low=low,
        high=high,
        kind="difference",
        difference=whole["difference"],
        difference_low=whole["low"],
        difference_high=whole["high"],
        p=flip_test(a, b, seed),
        reading=_reading(int(whole["only_baseline"]), int(whole["only_this"])) + left,
    )


def _as_one(items: pd.DataFrame) -> pd.DataFrame:
    """All lengths as one, so that ``paired`` gives the difference over all of them."""
    return items.assign(question=items["length"].astype(str) + "/" + items["question"], length=0)


def _alone(items: pd.DataFrame, n_boot: int, seed: int) -> tuple[float, float]:
    """The interval of one model's accuracy: its difference to a model that knows nothing."""
    nothing = _as_one(items).assign(correct=False)
    found = paired(_as_one(items), nothing, n_boot=n_boot, seed=seed).iloc[0]
    return max(0.0, float(found["low"])), min(1.0, float(found["high"]))


def flip_test(a: pd.DataFrame, b: pd.DataFrame, seed: int) -> float:
    """Two-sided sign-flip test of the paired difference with texts as units (Fisher's randomisation).

    Were the two models equally able, each text's difference could as well have had the other sign.
    """
    change = (b.groupby("haystack")["correct"].sum() - a.groupby("haystack")["correct"].sum()).to_numpy(float)
    n = len(change)
    if n <= 14:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ change) >= abs(change.sum()) - 1e-9).mean())
    signs = np.random.default_rng(seed).choice([-1, 1], (N_FLIPS, n))
    return float((1 + (np.abs(signs @ change) >= abs(change.sum()) - 1e-9).sum()) / (N_FLIPS + 1))


def _by_length(first: RunItems, run: RunItems, n_boot: int, seed: int) -> pd.DataFrame:
    import pandas as pd

    a, b = _shared(first, run)
    found = paired(b, a, n_boot=n_boot, seed=seed) if len(a) else pd.DataFrame()
    return found.assign(model=run.label)


def _boundary_row(first: RunItems, run: RunItems, metric: str, n_boot: int, seed: int) -> dict[str, Any]:
    values = run.stated(metric)
    states = [str(one.detail(metric).get("status")) for one in (first, run)]
    if "floor" in states or not len(first.context) or not len(run.context):
        who = [one.label for one, state in zip((first, run), states, strict=True) if state == "floor"]
        verb = "does" if len(who) == 1 else "do"
        why = f"{' and '.join(who)} {verb} no better than chance" if who else "there is no curve"
        return _row(run, metric, **values, reading=f"not compared: {why}")
    ratio, low, high = boundary_ratio(first, run, n_boot, seed)
    apart = "the interval excludes 1" if low > 1 or high < 1 else "the interval includes 1"
    reading = {
        (True, True): "neither boundary was reached",
        (True, False): f"at most: the baseline's was not reached; {apart}",
        (False, True): f"at least: it was not reached; {apart}",
    }.get((states[0] == "right_censored", states[1] == "right_censored"), apart)
    differ = {"kind": "ratio", "difference": ratio, "difference_low": low, "difference_high": high}
    flags = [f"{one.label} {flag}" for one in (first, run) for flag in boundary_flags(one.detail(metric))]
    return _row(run, metric, **values, **differ, reading="; ".join([reading, *flags]))


def boundary_ratio(
    first: RunItems, run: RunItems, n_boot: int = N_BOOT, seed: int = 0
) -> tuple[float, float, float]:
    """The ratio of two failure boundaries and its 95 % interval, the same texts drawn for both.

    A drawn boundary beyond the longest length bounds the ratio from one side only; the interval takes the
    worse side, so it is open (0 or inf) where that happens often. A runtime failure caps the boundary in
    every draw.
    """
    shared = sorted({*first.context["haystack"]} & {*run.context["haystack"]})
    drawn = []
    for one in (first, run):
        counts = Counts.of(one.context[one.context["haystack"].isin(shared)])
        boundaries = counts.drawn(n_boot, seed).tokens
        if one.detail(BOUNDARY).get("cause") not in (None, "quality"):
            boundaries = np.minimum(boundaries, one.value(BOUNDARY))
        drawn.append((boundaries, float(counts.lengths[-1])))
    (a, longest_a), (b, longest_b) = drawn
    with np.errstate(invalid="ignore"):
        least = np.where(a == inf, 0.0, np.minimum(b, longest_b) / np.where(a == inf, 1.0, a))
        most = np.where(b == inf, inf, b / np.minimum(a, longest_a))
    tail = expanded_tail(len(shared), BOOTSTRAP_LEVEL) if len(shared) > 1 else 0.0
    open_both = all(one.detail(BOUNDARY).get("right_censored") for one in (first, run))
    return (
        nan if open_both else run.value(BOUNDARY) / first.value(BOUNDARY),
        float(np.quantile(least, tail, method="lower")),
        float(np.quantile(most, 1 - tail, method="higher")),
    )


def _speed_row(first: RunItems, run: RunItems, metric: str, n_boot: int, seed: int) -> dict[str, Any]:
    base, values = first.stated(metric), run.stated(metric)
    if why := why_speeds_differ(first, run):
        return _row(run, metric, **values, reading=f"not compared: {why}")
    return _row(
        run,
        metric,
        **values,
        kind="ratio",
        difference=values["value"] / base["value"],
        difference_low=values["low"] / base["high"],
        difference_high=values["high"] / base["low"],
        reading="of medians, one session each",
    )


_ROWS = {
    **dict.fromkeys(SCORES, _score_row),
    RETRIEVAL: _retrieval_row,
    BOUNDARY: _boundary_row,
    SPEED: _speed_row,
}


def why_speeds_differ(first: RunItems, run: RunItems) -> str:
    """Why two speeds are not of one kind; empty where they are. Threads are a condition."""
    for fact in SPEED_FACTS:
        a, b = (one.report["machine"].get(fact) for one in (first, run))
        if None in (a, b) or a != b:
            return f"measured on different machines ({fact}: {a} and {b})"
    for one in (first, run):
        if others := run_beside(one.path):
            return f"{one.label} ran beside {', '.join(others)} in a sweep"
        if is_contended(one.report, one.path):
            return f"the machine was busy when {one.label} was timed"
    return ""


def _corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Holm's correction over all tests of the table, and what each says."""
    tested = [row for row in rows if row["p"] == row["p"]]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        higher = "higher" if row["difference"] > 0 else "lower"
        word = higher if p < 1 - LEVEL else "no evidence of a difference"
        row |= {"p_holm": p, "reading": f"{word}; {row['reading']}"}
    return rows


def _with_baseline(rows: list[dict[str, Any]], first: RunItems, n_boot: int, seed: int) -> pd.DataFrame:
    """The table in the order of metrics, the baseline's own row before the others' rows."""
    import pandas as pd

    ordered = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        values: dict[str, Any] = {} if metric == RETRIEVAL else first.stated(metric)
        if metric == RETRIEVAL and len(first.context):
            items = first.context[first.context["planned"]]
            low, high = _alone(items, n_boot, seed)
            values = {"n": len(items), "value": items["correct"].mean(), "low": low, "high": high}
        ordered += [_row(first, metric, **values, reading="baseline")]
        ordered += [row for row in rows if row["metric"] == metric]
    return pd.DataFrame(ordered, columns=list(COLUMNS))
