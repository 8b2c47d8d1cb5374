"""Two or more DFQS reports side by side, tested item by item; refused unless their conditions are equal.

Conditions are what ``report.json`` hashes: prompts, template, sampling, runtime, settings, threads, the
sandbox, and ``system_info`` (which instructions llama.cpp computes with: kernels, and so answers, may differ
by it). The rest of the machine (its name, its memory, its load) changes no answer and is no condition; it
decides only whether speeds may be compared.

One difference can be accepted, by its name: a chat template belongs to a model's file, so two models that
have templates of their own can never have equal conditions. The comparison then says so at its top.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.context.boundary import Counts, boot_boundaries, curve_table, paired
from dfqs_nb.context.curve import GUESS_RATE, JOURNAL, item_frame
from dfqs_nb.core.errors import ComparisonError
from dfqs_nb.core.files import sha256_of_file, whole_file, write_json, write_table
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.core.paths import tilde
from dfqs_nb.report.leaderboard import boundary_status, is_contended, markdown_table, run_beside
from dfqs_nb.scores import SetRun, compare_runs
from dfqs_nb.stats import BOOTSTRAP_LEVEL, LEVEL, N_BOOT, bootstrap_weights, expanded_tail, holm

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES = ("reasoning_score", "code_score")
SCORE_ITEMS = "score_items.csv"
RIGHT = ("correct", "passed")  # grades of questions, outcomes of code
ACCEPTABLE = "chat_template_sha256"  # the one condition that is a property of a model's own file
SPEED_FACTS = ("system", "processor", "usable cores")  # of the machine: equal, or speeds are not compared
N_FLIPS = 20_000  # of signs, where there are too many haystacks for all
RETRIEVAL = "retrieval accuracy"
COLUMNS = (
    "metric",
    "model",
    "n",
    "value",
    "low",
    "high",
    "kind",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "p_holm",
    "reading",
)


# ---- reading ----


@dataclass(frozen=True)
class RunItems:
    """A report with the answers it was made from.

    Attributes:
        label: how the model is called in tables: its name, with the run's where names repeat.
        report: the content of ``report.json``.
        sets: each question set as ``comparison.compare`` takes it (``item_set``, ``items``, ``score``,
            ``conditions``).
        context: long-context answers of the task that the curve is made of, see ``long_context.item_frame``;
            empty where the curve is withheld.
    """

    label: str
    path: Path
    report: Mapping[str, Any] = field(repr=False)
    sets: Sequence[Any] = field(repr=False)
    context: pd.DataFrame = field(repr=False)

    @property
    def counts(self) -> Counts | None:
        """Counts by haystack and length; None where the curve is withheld."""
        return Counts.of(self.context) if len(self.context) else None


def read_run(path: str | Path) -> RunItems:
    """A report and its items, both checked.

    Args:
        path: a run's folder, or the ``report.json`` in it; the run's items must lie beside it.

    Raises:
        DfqsError: the report is incomplete or was edited (see ``report.read_report``).
        ComparisonError: items are missing, were edited, or do not give the report's numbers.
    """
    from dfqs_nb.report import metrics as reports

    path = _file(path)
    report = reports.read_report(path)
    _check_files(report, path)
    return RunItems(
        report["model"]["name"], path, report, _sets(report, path.parent), _context(report, path.parent)
    )


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / "report.json" if path.is_dir() else path


def _check_files(report: Mapping[str, Any], path: Path) -> None:
    """Refuse items that are not those which the report names by their hash."""
    wanted = {one["file"]: one["sha256"] for group in report["items"].values() for one in group}
    wanted |= {name: digest for name, digest in report["sources"].items() if name in (SCORE_ITEMS, JOURNAL)}
    for name, digest in wanted.items():
        file = path.parent / name
        if not file.is_file():
            raise ComparisonError(
                f"the report's items are missing ({name})",
                where=tilde(path),
                hint="give the report in its run's folder: paired tests need every answer",
            )
        if sha256_of_file(file) != digest:
            raise ComparisonError(
                f"{name} is not the file that the report was made from",
                where=tilde(path),
                hint="write the report again (notebook 07)",
            )


def _sets(report: Mapping[str, Any], folder: Path) -> list[Any]:
    """The sets of the two scores with their items; a withheld score is left out, as are a user's own sets."""
    import pandas as pd

    path = folder / SCORE_ITEMS
    if not path.is_file():
        if any(report["metrics"][name] is not None for name in SCORES):
            raise ComparisonError(
                "there are no items of the scores", where=tilde(path), hint="run notebook 06"
            )
        return []
    items = pd.read_csv(path, keep_default_na=False, dtype={"id": str, "family": str, "grade": str})
    right = items["grade"].isin(RIGHT)
    if (right != items["correct"]).any():
        where = items["id"][right != items["correct"]].iloc[0]
        raise ComparisonError(
            f"the grade of {where} contradicts its column correct",
            where=tilde(path),
            hint="write it again (notebook 06)",
        )
    sets = []
    for metric in SCORES:
        stated = report["details"][metric]
        if stated["value"] is not None:
            own = items[items["set"] == stated["set"]]
            one = SetRun.of(metric.removesuffix("_score"), stated["set"], own)
            _check_equal(one.score.value, stated["value"], metric, path)
            sets.append(one)
    return sets


def _context(report: Mapping[str, Any], folder: Path) -> pd.DataFrame:
    """The answers that give the report's curve; a journal may hold other runs and tasks beside them."""
    import pandas as pd

    curve = report["metrics"]["context_stability_curve"]
    if curve is None:
        return pd.DataFrame()
    path = folder / JOURNAL
    if not path.is_file():
        raise ComparisonError("there are no items of the curve", where=tilde(path), hint="run notebook 05")
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        runs.setdefault(str(row.pop("conditions", "")), []).append(row)
    for rows in reversed(runs.values()):  # the newest first
        items = item_frame(rows)
        for task in items["task"].unique() if len(items) else ():
            found = items[items["task"] == task]
            made = curve_table(Counts.of(found), GUESS_RATE)["curve"].to_numpy()
            if len(made) == len(curve) and np.allclose(made, curve):
                return found.reset_index(drop=True)
    raise ComparisonError(
        "its items do not give the report's curve",
        where=tilde(path),
        hint="write the report again (notebook 07)",
    )


def _check_equal(found: float, stated: float, name: str, path: Path) -> None:
    if not np.isclose(found, stated):
        raise ComparisonError(
            f"its items give a {name} of {found:.4f}, and the report says {stated:.4f}",
            where=tilde(path),
            hint="write the report again (notebook 07)",
        )


# ---- what may be compared ----


def check_reports(runs: Sequence[RunItems], accept: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Refuse reports that cannot stand side by side; return the accepted differences with all values.

    Raises:
        ComparisonError: fewer than two reports, one of them twice, tiers that differ, or conditions that do;
            every field that differs is named.
    """
    if len(runs) < 2:
        raise ComparisonError(f"{len(runs)} report given", hint="give two or more")
    _check_accepted(accept)
    seen: dict[str, Path] = {}
    for run in runs:
        other = seen.setdefault(run.report["integrity"]["sha256"], run.path)
        if other is not run.path:
            raise ComparisonError(
                f"the same report as {tilde(other)}", where=tilde(run.path), hint="give it once"
            )
    tiers = {run.report["tier"] for run in runs}
    if len(tiers) > 1:
        each = ", ".join(f"{tilde(run.path)} is {run.report['tier']}" for run in runs)
        raise ComparisonError(f"tiers never mix: {each}", hint="run both on one tier")
    return _check_conditions(runs, accept)


def _check_accepted(accept: Sequence[str]) -> None:
    odd = [name for name in accept if name.split(".")[-1] != ACCEPTABLE]
    if odd:
        raise ComparisonError(
            f"a difference in {', '.join(odd)} cannot be accepted",
            hint=f"only in {ACCEPTABLE}, which belongs to a model's file",
        )


def _check_conditions(runs: Sequence[RunItems], accept: Sequence[str]) -> dict[str, list[Any]]:
    first, refused, names, accepted = runs[0], [], set(), set()
    for run in runs[1:]:
        differ = differing_fields(first.report["conditions"], run.report["conditions"])
        allowed = {name for name in differ if any(name == one or name.endswith(f".{one}") for one in accept)}
        accepted |= allowed
        named = [f"{name} ({a} and {b})" for name, (a, b) in differ.items() if name not in allowed]
        names |= {*differ} - allowed
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
        table: one row a metric and model, columns ``COLUMNS``. ``kind``: ``difference`` (model minus
            baseline) or ``ratio`` (model / baseline); its interval is of 95 %, for speeds the range that
            repetitions allow. ``p``: exact McNemar test of scores, sign-flip test over haystacks of
            retrieval; ``p_holm``: after Holm's correction over all tests of the table. Baseline rows have no
            difference.
        lengths: retrieval by length: ``model`` and the columns of ``degradation.paired``.
    """

    runs: tuple[RunItems, ...]
    accepted: dict[str, list[Any]]
    table: pd.DataFrame
    lengths: pd.DataFrame

    @property
    def tier(self) -> str:
        """The tier of all reports."""
        return self.runs[0].report["tier"]


def compare_reports(
    paths: Sequence[str | Path], *, accept: Sequence[str] = (), n_boot: int = N_BOOT, seed: int = 0
) -> ReportComparison:
    """Compare reports with the first of them, item by item.

    Args:
        paths: runs' folders, or the ``report.json`` in them.
        accept: ``["chat_template_sha256"]`` compares models that have templates of their own.
        n_boot, seed: of the bootstrap.

    Raises:
        DfqsError: see ``read_run``.
        ComparisonError: see ``check_reports``.
    """
    import pandas as pd

    places = [_file(path).resolve() for path in paths]
    twice = {str(tilde(place)) for place in places if places.count(place) > 1}
    if twice:
        raise ComparisonError(f"given twice: {', '.join(sorted(twice))}", hint="give each report once")
    runs = _labelled([read_run(path) for path in paths])
    accepted = check_reports(runs, accept)
    rows, lengths, first = [], [], runs[0]
    for run in runs[1:]:
        rows += _score_rows(first, run, n_boot, seed)
        rows.append(_retrieval_row(first, run, n_boot, seed))
        rows.append(_boundary_row(first, run, n_boot, seed))
        rows.append(_speed_row(first, run))
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
    return [
        RunItems(name, run.path, run.report, run.sets, run.context)
        for name, run in zip(names, runs, strict=True)
    ]


def _detail(run: RunItems, metric: str) -> Mapping[str, Any]:
    return run.report["details"].get(metric) or {}


def _row(run: RunItems, metric: str, **values: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(COLUMNS, nan),
        "metric": metric,
        "model": run.label,
        "kind": "",
        "reading": "",
        **values,
    }


def _stated(run: RunItems, metric: str) -> dict[str, float]:
    """A metric's count, value and interval as the report states them; NaN where it states none."""
    detail = _detail(run, metric)
    values = {"n": detail.get("n"), "value": run.report["metrics"][metric]}
    values |= {end: detail.get(end) for end in ("low", "high")}
    return {name: nan if value is None else float(value) for name, value in values.items()}


def _not_compared(first: RunItems, run: RunItems, metric: str) -> dict[str, Any] | None:
    """A row that says why a metric is not compared: one of the two withholds it."""
    own = {} if metric == "context_stability_curve" else _stated(run, metric)
    for one in (first, run):
        if one.report["metrics"][metric] is None:
            why = _detail(one, metric).get("withheld") or "no value"
            return _row(run, metric, **own, reading=f"not compared: {one.label} withholds it ({why})")
    return None


def _score_rows(first: RunItems, run: RunItems, n_boot: int, seed: int) -> list[dict[str, Any]]:
    rows, withheld = [], []
    for metric in SCORES:
        if (missing := _not_compared(first, run, metric)) is not None:
            rows.append(missing)
            withheld.append(metric)
    pairs = [[one for one in each.sets if one.score.name not in withheld] for each in (first, run)]
    found = compare_runs(*pairs, n_boot=n_boot, seed=seed) if pairs[0] else []
    for one, this in zip(found, pairs[1], strict=True):
        score, reading = this.score, _reading(one.only_a, one.only_b)
        rows.append(
            _row(
                run,
                score.name,
                n=one.n,
                value=one.b,
                low=score.low,
                high=score.high,
                kind="difference",
                difference=one.difference,
                difference_low=one.low,
                difference_high=one.high,
                p=one.p,
                reading=reading,
            )
        )
    return rows


def _reading(only_first: int, only_this: int) -> str:
    return f"{only_first} right in the baseline alone, {only_this} here alone"


def _shared(first: RunItems, run: RunItems) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The long-context answers of both to questions with equal keys and equal answers."""
    keys = ["haystack", "length", "question", "expected"]
    if not len(first.context) or not len(run.context):
        return first.context[:0], run.context[:0]
    both = first.context[keys].merge(run.context[keys], on=keys)
    return first.context.merge(both, on=keys), run.context.merge(both, on=keys)


def _retrieval_row(first: RunItems, run: RunItems, n_boot: int, seed: int) -> dict[str, Any]:
    """Accuracy over all planned lengths that both measured, on the questions that both were asked."""
    missing = _not_compared(first, run, "context_stability_curve")
    if missing is not None:
        return {**missing, "metric": RETRIEVAL}
    a, b = (one[one["planned"]] for one in _shared(first, run))
    if not len(a):
        return _row(run, RETRIEVAL, reading="not compared: the two were asked no question in common")
    whole = paired(_as_one(b), _as_one(a), n_boot=n_boot, seed=seed).iloc[0]
    own = _alone(b, n_boot, seed)
    left = (
        ""
        if len(a) == int(first.context["planned"].sum())
        else (f"; of {int(first.context['planned'].sum())} questions {len(a)} were asked of both")
    )
    reading = _reading(int(whole["only_baseline"]), int(whole["only_this"])) + left
    return _row(
        run,
        RETRIEVAL,
        n=int(whole["n"]),
        value=whole["accuracy"],
        low=own[0],
        high=own[1],
        kind="difference",
        difference=whole["difference"],
        difference_low=whole["low"],
        difference_high=whole["high"],
        p=_flip_test(a, b, seed),
        reading=reading,
    )


def _as_one(items: pd.DataFrame) -> pd.DataFrame:
    """All lengths as one, so that ``degradation.paired`` gives the difference over all of them."""
    return items.assign(question=items["length"].astype(str) + "/" + items["question"], length=0)


def _alone(items: pd.DataFrame, n_boot: int, seed: int) -> tuple[float, float]:
    """The interval of one model's accuracy: its difference to a model that knows nothing."""
    nothing = _as_one(items).assign(correct=False)
    found = paired(_as_one(items), nothing, n_boot=n_boot, seed=seed).iloc[0]
    return max(0.0, float(found["low"])), min(1.0, float(found["high"]))


def _flip_test(a: pd.DataFrame, b: pd.DataFrame, seed: int) -> float:
    """Two-sided sign-flip test of the paired difference with haystacks as units (Fisher's randomisation).

    Were the two models equally able, each haystack's difference could as well have had the other sign.
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


def _boundary_row(first: RunItems, run: RunItems, n_boot: int, seed: int) -> dict[str, Any]:
    metric = "failure_boundary_tokens"
    missing = _not_compared(first, run, metric)
    if missing is not None:
        return missing
    values = _stated(run, metric)
    states = [str(_detail(one, metric).get("status")) for one in (first, run)]
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
    return _row(
        run,
        metric,
        **values,
        kind="ratio",
        difference=ratio,
        difference_low=low,
        difference_high=high,
        reading=reading,
    )


def boundary_ratio(
    first: RunItems, run: RunItems, n_boot: int = N_BOOT, seed: int = 0
) -> tuple[float, float, float]:
    """The ratio of two failure boundaries and its 95 % interval, the same haystacks drawn for both.

    A drawn boundary beyond the longest length bounds the ratio from one side only; the interval takes the
    worse side, so it is open (0 or inf) where that happens often. A runtime failure caps the boundary in
    every draw.
    """
    shared = sorted({*first.context["haystack"]} & {*run.context["haystack"]})
    drawn = []
    for one in (first, run):
        counts = Counts.of(one.context[one.context["haystack"].isin(shared)])
        boundaries = boot_boundaries(counts, GUESS_RATE, bootstrap_weights(len(shared), n_boot, seed))
        drawn.append((_capped(boundaries, one), float(counts.lengths[-1])))
    (a, longest_a), (b, longest_b) = drawn
    with np.errstate(invalid="ignore"):
        least = np.where(a == inf, 0.0, np.minimum(b, longest_b) / np.where(a == inf, 1.0, a))
        most = np.where(b == inf, inf, b / np.minimum(a, longest_a))
    tail = expanded_tail(len(shared), BOOTSTRAP_LEVEL) if len(shared) > 1 else 0.0
    values = [one.report["metrics"]["failure_boundary_tokens"] for one in (first, run)]
    open_both = all(_detail(one, "failure_boundary_tokens").get("right_censored") for one in (first, run))
    return (
        nan if open_both else values[1] / values[0],
        float(np.quantile(least, tail, method="lower")),
        float(np.quantile(most, 1 - tail, method="higher")),
    )


def _capped(drawn: np.ndarray, run: RunItems) -> np.ndarray:
    detail = _detail(run, "failure_boundary_tokens")
    if detail.get("cause") in (None, "quality"):
        return drawn
    return np.minimum(drawn, run.report["metrics"]["failure_boundary_tokens"])


def _speed_row(first: RunItems, run: RunItems) -> dict[str, Any]:
    metric = "cpu_tokens_per_sec"
    missing = _not_compared(first, run, metric)
    if missing is not None:
        return missing
    base, values = _stated(first, metric), _stated(run, metric)
    why = why_speeds_differ(first, run)
    if why:
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


def why_speeds_differ(first: RunItems, run: RunItems) -> str:
    """Why two speeds are not of one kind; empty where they are. Threads are a condition."""
    machines = [one.report["machine"] for one in (first, run)]
    for fact in SPEED_FACTS:
        values = [machine.get(fact) for machine in machines]
        if None in values or values[0] != values[1]:
            return f"measured on different machines ({fact}: {values[0]} and {values[1]})"
    for one in (first, run):
        others = run_beside(one.path)
        if others:
            return f"{one.label} ran beside {', '.join(others)} in a sweep"
        if is_contended(one.report, one.path):
            return f"the machine was busy when {one.label} was timed"
    return ""


def _corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Holm's correction over all tests of the table, and what each says."""
    tested = [row for row in rows if row["p"] == row["p"]]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
        higher = "higher" if row["difference"] > 0 else "lower"
        verdict = higher if p < 1 - LEVEL else "no evidence of a difference"
        row["reading"] = f"{verdict}; {row['reading']}"
    return rows


def _with_baseline(rows: list[dict[str, Any]], first: RunItems, n_boot: int, seed: int) -> pd.DataFrame:
    """The table in the order of metrics, the baseline's own row before the others' rows."""
    import pandas as pd

    ordered = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        values = _own_retrieval(first, n_boot, seed) if metric == RETRIEVAL else _stated(first, metric)
        ordered += [
            _row(first, metric, **values, reading="baseline"),
            *(r for r in rows if r["metric"] == metric),
        ]
    return pd.DataFrame(ordered, columns=list(COLUMNS))


def _own_retrieval(first: RunItems, n_boot: int, seed: int) -> dict[str, Any]:
    if not len(first.context):
        return {}
    items = first.context[first.context["planned"]]
    low, high = _alone(items, n_boot, seed)
    return {"n": len(items), "value": items["correct"].mean(), "low": low, "high": high}


# ---- as text, tables and figures ----


def write_comparison(found: ReportComparison, folder: str | Path) -> list[Path]:
    """Write ``comparison.json``, ``.md``, ``.csv`` and ``.png`` into a folder, each whole or not at all."""
    from dfqs_nb.core import figures as plots

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", as_dict(found))
    write_table(folder / "comparison.csv", found.table, index=False)
    with whole_file(folder / "comparison.md") as file:
        file.write(markdown(found))
    plots.save(figure(found).axes[0], folder / "comparison.png")
    return [folder / f"comparison{suffix}" for suffix in (".json", ".md", ".csv", ".png")]


def as_dict(found: ReportComparison) -> dict[str, Any]:
    """Plain values, with what identifies each report; NaN as null."""
    reports = [
        {
            "label": run.label,
            "run": run.report["run"],
            "model_sha256": run.report["model"]["sha256"],
            "report_sha256": run.report["integrity"]["sha256"],
            "conditions_sha256": run.report["conditions_sha256"],
            "created": run.report["created"],
        }
        for run in found.runs
    ]
    return {
        "schema": "dfqs-comparison/1.0",
        "tier": found.tier,
        "accepted": found.accepted,
        "reports": reports,
        "conditions": found.runs[0].report["conditions"],
        "level": LEVEL,
        "table": _plain(found.table),
        "by_length": _plain(found.lengths),
    }


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = table.astype(object).to_dict("records")
    return [{key: _json(value) for key, value in row.items()} for row in rows]


def _json(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and (value != value or value in (inf, -inf)) else value


def markdown(found: ReportComparison) -> str:
    """The comparison as a text to paste: what was compared, one table, retrieval by length, methods."""
    names, first = [run.label for run in found.runs], found.runs[0]
    lines = [f"# {names[0]} against {', '.join(names[1:])}", ""]
    if found.tier == "nano":
        lines += ["Nano tier: it shows that the workbook works, and is no measure of a large model.", ""]
    lines += [_conditions_sentence(found), ""]
    for run in found.runs:
        model = run.report["model"]
        role = "baseline" if run is first else "compared with it"
        identity = f"{model['size_bytes']:,} bytes, SHA-256 `{model['sha256']}`, run {run.report['run']}"
        lines.append(f"- **{run.label}** ({role}): {identity}")
    lines += ["", *markdown_table(_shown(found)), "", *_length_lines(found), _methods(found), ""]
    return "\n".join(lines)


def _conditions_sentence(found: ReportComparison) -> str:
    if not found.accepted:
        return f"Equal conditions (SHA-256 `{found.runs[0].report['conditions_sha256']}`), {found.tier} tier."
    each = "; ".join(
        f"{name}: {', '.join(str(value)[:12] for value in values)}" for name, values in found.accepted.items()
    )
    return (
        f"Conditions are equal but for what was accepted, on the {found.tier} tier: {each}. Each model was "
        f"asked through its own chat template, so a difference may be the template's."
    )


def _shown(found: ReportComparison) -> pd.DataFrame:
    """One line a metric and model: both values with their intervals, the difference, p, and what it says."""
    import pandas as pd

    first, rows = found.runs[0].label, []
    for metric, group in found.table.groupby("metric", sort=False):
        own = group[group["model"] == first].iloc[0]
        for row in group[group["model"] != first].to_dict("records"):
            rows.append(
                {
                    "metric": metric,
                    "n": "" if row["n"] != row["n"] else f"{row['n']:,.0f}",
                    f"{first} (baseline)": _baseline_text(own, row, found.runs[0]),
                    "model": row["model"],
                    "value": value_text(row, next(run for run in found.runs if run.label == row["model"])),
                    "difference": difference_text(row),
                    "p (Holm)": "" if row["p_holm"] != row["p_holm"] else f"{row['p_holm']:.2g}",
                    "reading": row["reading"],
                }
            )
    return pd.DataFrame(rows)


def _baseline_text(own: Mapping[str, Any], row: Mapping[str, Any], first: RunItems) -> str:
    """The baseline's value; of retrieval, on the questions that both were asked, where those are fewer."""
    if row["metric"] == RETRIEVAL and row["kind"] and row["n"] != own["n"]:
        return f"{row['value'] - row['difference']:.3f} on these"
    return value_text(own, first)


FORMS = {"failure_boundary_tokens": "{:,.0f}", "cpu_tokens_per_sec": "{:,.1f}"}


def value_text(row: Mapping[str, Any], run: RunItems) -> str:
    """A metric's value with its interval."""
    if row["value"] != row["value"]:
        return "withheld"
    form = FORMS.get(row["metric"], "{:.3f}")
    low, high = ("open" if row[end] != row[end] else form.format(row[end]) for end in ("low", "high"))
    text = f"{form.format(row['value'])} [{low}, {high}]"
    if row["metric"] != "failure_boundary_tokens":
        return text
    status = boundary_status(_detail(run, row["metric"]))
    return {
        "quality": text,
        "right censored": f"over {form.format(row['value'])} [{low}, {high}]",
        "floor": "at chance",
    }.get(status, f"{text} ({status})")


def difference_text(row: Mapping[str, Any]) -> str:
    """A difference (signed) or a ratio (x) with its interval.

    >>> row = {"kind": "ratio", "difference": 1.5, "difference_low": 1.2, "difference_high": float("inf")}
    >>> difference_text(row)
    'x 1.50 [1.20, open]'
    """
    if not row["kind"]:
        return ""
    form, lead = ("{:.2f}", "x ") if row["kind"] == "ratio" else ("{:+.3f}", "")
    low, high = (
        "open" if row[end] in (0.0, inf) and row["kind"] == "ratio" else form.format(row[end])
        for end in ("difference_low", "difference_high")
    )
    value = "unknown" if row["difference"] != row["difference"] else lead + form.format(row["difference"])
    return f"{value} [{low}, {high}]"


def _length_lines(found: ReportComparison) -> list[str]:
    import pandas as pd

    if not len(found.lengths):
        return []
    rows = [
        {
            "context (tokens)": f"{one.length:,}",
            "n": f"{one.n}",
            "baseline": f"{one.baseline:.2f}",
            "model": one.model,
            "accuracy": f"{one.accuracy:.2f}",
            "difference": f"{one.difference:+.2f} [{one.low:+.2f}, {one.high:+.2f}]",
        }
        for one in found.lengths.itertuples()
    ]
    return [
        "Retrieval by length, on the questions that both were asked:",
        "",
        *markdown_table(pd.DataFrame(rows)),
        "",
    ]


def _methods(found: ReportComparison) -> str:
    n_tests = int(found.table["p_holm"].notna().sum())
    plural = "" if n_tests == 1 else "s"
    return (
        "Brackets are 95 % intervals (of speeds, the range of repetitions). Scores: exact McNemar test and a "
        "paired bootstrap over items, within families for reasoning. Retrieval: planned lengths that both "
        "measured, haystacks drawn for both alike, sign-flip test over haystacks. The boundary's ratio: the "
        f"same haystacks drawn for both. Holm's correction covers the {n_tests} test{plural} of the table; "
        "intervals are not corrected. An interval of +0.00 to +0.00 means that no question asked told the "
        "two apart, not that none could."
    )


def figure(found: ReportComparison) -> Figure:
    """Curves above, scores below."""
    import matplotlib.pyplot as plt

    n_scores = len(_score_table(found)["metric"].unique())
    below = 0.7 + 0.24 * n_scores * len(found.runs)
    drawn, axes = plt.subplots(
        2, 1, figsize=(7, 4.2 + below), height_ratios=[4.2, below], layout="constrained"
    )
    curves_overlaid(found, axes[0])
    scores_overlaid(found, axes[1])
    return drawn


def curves_overlaid(found: ReportComparison, ax: Axes | None = None) -> Axes:
    """Accuracy by length of every model with intervals and isotonic fits; boundaries, with intervals,
    below."""
    from matplotlib.ticker import PercentFormatter

    from dfqs_nb.core import figures as plots

    ax = plots.new_axes(ax, 4.2)
    curves = [(run, curve_table(run.counts, GUESS_RATE)) for run in found.runs if run.counts is not None]
    for place, (run, curve) in enumerate(curves):
        colour, shift = plots.PALETTE[place % 8], 2 ** (0.04 * (place - (len(curves) - 1) / 2))
        spread = [
            (curve["accuracy"] - curve["low"]).clip(lower=0),
            (curve["high"] - curve["accuracy"]).clip(lower=0),
        ]
        ax.errorbar(
            curve["length"] * shift,
            curve["accuracy"],
            yerr=spread,
            fmt="o",
            markersize=4,
            color=colour,
            capsize=2,
            linewidth=0.8,
            zorder=3,
            label=run.label,
        )
        ax.plot(curve["length"], curve["fit"], color=colour, linewidth=1.4, alpha=0.8)
        _mark_boundary(ax, run, colour, -0.07 - 0.07 * place)
    ax.axhline(0, color=plots.PAPER, linewidth=1)
    lengths = sorted(
        {int(n) for _, curve in curves for n in curve["length"] if float(np.log2(n)).is_integer()}
    )
    plots.token_axis(ax, lengths, "context (tokens); diamonds: failure boundary with its 95 % interval")
    ax.set_ylim(-0.1 - 0.07 * len(curves), 1.05)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    n = sorted({int(one) for _, curve in curves for one in curve["n"]})
    each = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}" if n else ""
    ax.set_ylabel(f"right answers ({each} a length, 95 % interval)")
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    plots.set_title(ax, _curve_title(found))
    return ax


def _mark_boundary(ax: Axes, run: RunItems, colour: str, y: float) -> None:
    detail, tokens = _detail(run, "failure_boundary_tokens"), run.report["metrics"]["failure_boundary_tokens"]
    if tokens is None or detail.get("status") == "floor":
        return
    counts = run.counts
    assert counts is not None
    ends = detail.get("low") or counts.lengths[0], detail.get("high") or counts.lengths[-1]
    ax.plot(ends, [y, y], color=colour, linewidth=2, solid_capstyle="butt", clip_on=False)
    censored = bool(detail.get("right_censored"))
    ax.plot([tokens], [y], ">" if censored else "D", color=colour, markersize=6, clip_on=False)
    if detail.get("high") is None:
        ax.plot([ends[1]], [y], ">", color=colour, markersize=6, clip_on=False)


def _curve_title(found: ReportComparison) -> str:
    rows = found.table[(found.table["metric"] == RETRIEVAL) & found.table["p_holm"].notna()]
    if len(found.runs) > 2:
        n_apart = int((rows["p_holm"] < 1 - LEVEL).sum())
        return f"Retrieval of {n_apart} of {len(rows)} models differs from {found.runs[0].label}'s"
    if not len(rows):
        return "Retrieval is not compared"
    row = rows.iloc[0]
    apart = "" if row["p_holm"] < 1 - LEVEL else ": no evidence of a difference"
    points = f"{100 * row['difference']:+.1f} percentage points"
    return f"Retrieval moves by {points} (p = {row['p_holm']:.2g}){apart}"


def _score_table(found: ReportComparison) -> pd.DataFrame:
    rows = found.table[found.table["metric"].str.startswith(("reasoning_score", "code_score"))]
    return rows[rows["value"].notna()]


def scores_overlaid(found: ReportComparison, ax: Axes | None = None) -> Axes:
    """Every model's scores with their intervals, metric by metric."""
    from matplotlib.ticker import PercentFormatter

    from dfqs_nb.core import figures as plots

    table, labels = _score_table(found), [run.label for run in found.runs]
    metrics = list(dict.fromkeys(table["metric"]))
    ax = plots.new_axes(ax, 0.7 + 0.24 * len(table))
    step = len(labels) + 0.6
    for row in table.to_dict("records"):
        place = labels.index(row["model"])
        at = metrics.index(row["metric"]) * step + place
        ax.errorbar(
            [row["value"]],
            [at],
            xerr=[[max(0, row["value"] - row["low"])], [max(0, row["high"] - row["value"])]],
            fmt="o",
            markersize=5,
            color=plots.PALETTE[place % 8],
            capsize=3,
        )
    ax.set_yticks(
        [number * step + (len(labels) - 1) / 2 for number in range(len(metrics))], metrics, fontsize=9
    )
    ax.set_ylim(max(1, len(metrics)) * step - 1, -1)
    ax.set_xlim(-0.02, 1.02)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("score (95 % interval); colours as above")
    tests = table["p_holm"].dropna()
    n_apart = int((tests < 1 - LEVEL).sum())
    plots.set_title(ax, f"{n_apart} of {len(tests)} scores differ (paired by item, Holm)")
    return ax
