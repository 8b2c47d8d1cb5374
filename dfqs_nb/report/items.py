"""The answers that a report was made from: read, checked, and counted again.

A report's hashes catch accidents. Its numbers are believed because they follow from the answers beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb import context
from dfqs_nb.context import Counts
from dfqs_nb.core.display import cell, one_line
from dfqs_nb.core.files import is_file, sha256_of_file
from dfqs_nb.core.paths import tilde
from dfqs_nb.report.metrics import CURVE, SCORES, read_report, report_file
from dfqs_nb.report.stages import ReportError
from dfqs_nb.scores import SetRun

if TYPE_CHECKING:
    import pandas as pd

RETRIEVAL = "retrieval accuracy"  # over all planned lengths, in comparisons
LONGEST_NAME = 80  # characters, in tables and figures
JOURNAL = "long_context_items.jsonl"
SCORE_ITEMS = "score_items.csv"
RIGHT = ("correct", "passed")  # grades of questions, outcomes of code
COLUMNS = ("set", "id", "sample", "family", "guess", "grade", "correct")


@dataclass(frozen=True)
class RunItems:
    """A report (at ``path``) with the answers that it was made from; what it withholds has none.

    ``label`` is how tables call the model; ``scores`` has by metric the tier's set with its answers and the
    score that they give; ``context`` the long-context answers of the task that the curve is made of.
    """

    label: str
    path: Path
    report: Mapping[str, Any]
    scores: Mapping[str, SetRun]
    context: pd.DataFrame = field(repr=False)

    @property
    def counts(self) -> Counts | None:
        """Counts by haystack and length; None where the curve is withheld."""
        return Counts.of(self.context) if len(self.context) else None

    def value(self, metric: str) -> Any:
        """A metric, None where it is withheld."""
        return self.report["metrics"][metric]

    def detail(self, metric: str) -> Mapping[str, Any]:
        """What stands beside a metric."""
        detail: Mapping[str, Any] = self.report["details"].get(metric) or {}
        return detail

    def stated(self, metric: str) -> dict[str, float]:
        """Count, value and interval as the report states them; NaN where it states none."""
        values = {**self.detail(metric), "value": self.value(metric)}
        given = {name: values.get(name) for name in ("n", "value", "low", "high")}
        return {name: nan if value is None else float(value) for name, value in given.items()}


def read_answers(path: str | Path) -> RunItems:
    """A report, from its file or its run's folder, with its answers; both are checked.

    Raises:
        ReportError: the report is incomplete or was edited, or its answers are missing or do not give it.
    """
    return read_items(read_report(path), report_file(path))


def missing_items(report: Mapping[str, Any], folder: Path) -> list[str]:
    """The files of answers that a report names and that do not lie beside it."""
    return [name for name in _files(report) if not is_file(folder / name)]


def _files(report: Mapping[str, Any]) -> dict[str, str]:
    """The files of answers with their SHA-256."""
    named = {item["file"]: item["sha256"] for group in report["items"].values() for item in group}
    return named | {name: sha for name, sha in report["sources"].items() if name in (SCORE_ITEMS, JOURNAL)}


def read_items(report: Mapping[str, Any], path: Path) -> RunItems:
    """The answers of the report at ``path``, from the folder that it lies in.

    Raises:
        ReportError: they are missing, were edited, or do not give the report's scores and curve.
    """
    folder = path.parent
    for name, digest in _files(report).items():
        file = folder / name
        if not is_file(file) or not file.resolve().is_relative_to(folder.resolve()):
            raise _refused(folder, f"the report's items are missing ({name})")
        if sha256_of_file(file) != digest:
            raise _refused(folder, f"{name} is not the file that the report was made from")
    name = one_line(report["model"]["name"])[:LONGEST_NAME]
    return RunItems(name, path, report, _scores(report, folder / SCORE_ITEMS), _context(report, folder))


def _refused(where: Path, what: str) -> ReportError:
    return ReportError(what, where=tilde(where), hint="run notebooks 05 to 07 again")


def _scores(report: Mapping[str, Any], path: Path) -> dict[str, SetRun]:
    stated = {name: report["details"][name] for name in SCORES if report["metrics"][name] is not None}
    items, scores = _score_items(path) if stated else None, {}
    for name, detail in stated.items():
        own, kind = str(detail.get("set")), name.removesuffix("_score")
        run = SetRun.of(kind, own, items[items["set"] == own], n_items=detail["n"])  # type: ignore[index]
        for key in ("value", "low", "high", "guess_rate"):
            made, then = getattr(run.score, key), detail[key]
            if made is None or then is None or not np.isclose(made, then, atol=1e-9):
                what = f"its items give {name} {key} {cell(made)}, and the report states {cell(then)}"
                raise _refused(path, what)
        scores[name] = run
    return scores


def _score_items(path: Path) -> pd.DataFrame:
    import pandas as pd

    types = {"correct": bool, "sample": int, "guess": float}
    types |= dict.fromkeys(("set", "id", "family", "grade"), str)
    try:
        items = pd.read_csv(path, keep_default_na=False, dtype=types)
    except (OSError, ValueError) as error:
        raise _refused(path, f"cannot be read ({str(error)[:200]})") from error
    if absent := [name for name in COLUMNS if name not in items]:
        raise _refused(path, f"has no column {', '.join(absent)}")
    wrong = items["grade"].isin(RIGHT) != items["correct"]
    if wrong.any():
        raise _refused(path, f"the grade of {items['id'][wrong].iloc[0]} contradicts its column correct")
    return items


def _context(report: Mapping[str, Any], folder: Path) -> pd.DataFrame:
    """The answers that give the report's curve; a journal may hold other runs and tasks beside them."""
    import pandas as pd

    curve = report["metrics"][CURVE]
    if curve is None:
        return pd.DataFrame()
    try:
        frames = context.read_answers(folder)
    except (OSError, ValueError) as error:
        raise _refused(folder / JOURNAL, f"cannot be read ({error})") from error
    for own in (group for items in frames for _, group in items.groupby("task", sort=False)):
        rows = Counts.of(own).curve()
        made = rows.loc[rows["planned"], "curve"].to_numpy()
        if len(made) == len(curve) and np.allclose(made, curve):
            return own.reset_index(drop=True)
    raise _refused(folder / JOURNAL, "its items do not give the report's curve")
