"""The answers that a report was made from: read, checked, and counted again.

A report's hashes catch accidents. Its numbers are believed because they follow from the answers beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.context import Counts, read_answers
from dfqs_nb.core.display import cell
from dfqs_nb.core.files import sha256_of_file
from dfqs_nb.core.paths import tilde
from dfqs_nb.report.stages import ReportError
from dfqs_nb.scores import SetRun

if TYPE_CHECKING:
    import pandas as pd

JOURNAL = "long_context_items.jsonl"
SCORES = ("reasoning_score", "code_score")
SCORE_ITEMS = "score_items.csv"
RIGHT = ("correct", "passed")  # grades of questions, outcomes of code
COLUMNS = ("set", "id", "sample", "family", "guess", "grade", "correct")
AGAIN = "run notebooks 05 to 07 again"


@dataclass(frozen=True)
class Items:
    """The answers behind a report's metrics; what the report withholds has none.

    Attributes:
        scores: by metric the tier's set with its answers and the score that they give.
        context: long-context answers of the task that the curve is made of.
    """

    scores: Mapping[str, SetRun]
    context: pd.DataFrame = field(repr=False)

    @property
    def counts(self) -> Counts | None:
        """Counts by haystack and length; None where the curve is withheld."""
        return Counts.of(self.context) if len(self.context) else None


def missing_items(report: Mapping[str, Any], folder: Path) -> list[str]:
    """The files of answers that a report names and that do not lie beside it."""
    return [name for name in _files(report) if not (folder / name).is_file()]


def _files(report: Mapping[str, Any]) -> dict[str, str]:
    """The files of answers with their SHA-256."""
    named = {one["file"]: one["sha256"] for group in report["items"].values() for one in group}
    own = {name: digest for name, digest in report["sources"].items() if name in (SCORE_ITEMS, JOURNAL)}
    return named | own


def read_items(report: Mapping[str, Any], folder: Path) -> Items:
    """The answers of a report, from the folder that it lies in.

    Raises:
        ReportError: they are missing, were edited, or do not give the report's scores and curve.
    """
    for name, digest in _files(report).items():
        file = folder / name
        if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
            raise ReportError(f"the report's items are missing ({name})", where=tilde(folder), hint=AGAIN)
        if sha256_of_file(file) != digest:
            raise ReportError(
                f"{name} is not the file that the report was made from", where=tilde(folder), hint=AGAIN
            )
    return Items(_scores(report, folder), _context(report, folder))


def _scores(report: Mapping[str, Any], folder: Path) -> dict[str, SetRun]:
    stated = {name: report["details"][name] for name in SCORES if report["metrics"][name] is not None}
    if not stated:
        return {}
    items, path = _score_items(folder / SCORE_ITEMS), folder / SCORE_ITEMS
    scores = {}
    for name, detail in stated.items():
        own = items[items["set"] == str(detail.get("set"))]
        run = SetRun.of(name.removesuffix("_score"), str(detail.get("set")), own, n_items=detail["n"])
        for key in ("value", "low", "high", "guess_rate"):
            made = getattr(run.score, key)
            if made is None or detail[key] is None or not np.isclose(made, detail[key], atol=1e-9):
                raise ReportError(
                    f"its items give {name} {key} {cell(made)}, and the report states {cell(detail[key])}",
                    where=tilde(path),
                    hint=AGAIN,
                )
        scores[name] = run
    return scores


def _score_items(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        text = {"set": str, "id": str, "family": str, "grade": str}
        items = pd.read_csv(
            path, keep_default_na=False, dtype={**text, "correct": bool, "sample": int, "guess": float}
        )
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot be read ({str(error)[:200]})", where=tilde(path), hint=AGAIN) from error
    absent = [name for name in COLUMNS if name not in items]
    if absent:
        raise ReportError(f"has no column {', '.join(absent)}", where=tilde(path), hint=AGAIN)
    wrong = items["grade"].isin(RIGHT) != items["correct"]
    if wrong.any():
        where = items["id"][wrong].iloc[0]
        raise ReportError(
            f"the grade of {where} contradicts its column correct", where=tilde(path), hint=AGAIN
        )
    return items


def _context(report: Mapping[str, Any], folder: Path) -> pd.DataFrame:
    """The answers that give the report's curve; a journal may hold other runs and tasks beside them."""
    import pandas as pd

    curve = report["metrics"]["context_stability_curve"]
    if curve is None:
        return pd.DataFrame()
    path = folder / JOURNAL
    try:
        frames = read_answers(folder)
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot be read ({error})", where=tilde(path), hint=AGAIN) from error
    for items in frames:
        for task in items["task"].unique():
            own = items[items["task"] == task]
            rows = Counts.of(own).curve()
            made = rows.loc[rows["planned"], "curve"].to_numpy()
            if len(made) == len(curve) and np.allclose(made, curve):
                return own.reset_index(drop=True)
    raise ReportError("its items do not give the report's curve", where=tilde(path), hint=AGAIN)
