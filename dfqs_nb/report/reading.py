"""Read a report that anybody may have written: its schema, hashes and contradictions, and its answers.

A report's hashes catch accidents. Its numbers are believed because they follow from the answers beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb import context
from dfqs_nb.context import Counts
from dfqs_nb.core.display import cell, one_line
from dfqs_nb.core.files import canonical_sha256, is_file, read_json, sha256_of_file
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.core.stage import NOTEBOOKS
from dfqs_nb.report.metrics import BOUNDARY, CURVE, SCORES, sealed
from dfqs_nb.report.stages import ReportError
from dfqs_nb.scores import SetRun

FILE = "report.json"
AGAIN = "write the report again: `dfqs-nb report RUN`"
RETRIEVAL = "retrieval accuracy"  # over all planned lengths, in comparisons
LONGEST_NAME = 80  # characters, in tables and figures
JOURNAL, SCORE_ITEMS = "long_context_items.jsonl", "score_items.csv"
RIGHT = ("correct", "passed")  # grades of questions, outcomes of code
COLUMNS = ("set", "id", "sample", "family", "guess", "grade", "correct")


def read_report(path: str | Path) -> dict[str, Any]:
    """A report, from its file or its folder, checked: schema, hashes, contradictions; else a ReportError."""
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        report: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        hint = f"run {NOTEBOOKS['dfqs_report']}, or `dfqs-nb report RUN`"
        raise ReportError("there is no report", where=tilde(path), hint=hint) from None
    except (OSError, ValueError) as error:
        raise ReportError(f"is not JSON ({error})", where=tilde(path), hint=AGAIN) from error
    check_report(report, path)
    return report


def check_report(report: Any, path: str | Path) -> None:
    """Check a report against the schema, its own hashes and itself; a ReportError names the first fault."""
    import jsonschema

    fault = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(report))
    if fault is not None:
        wrong = f"does not follow the schema at {fault.json_path}: {fault.message[:200]}"
    elif sealed(report)["integrity"] != report["integrity"]:
        wrong = "was edited after it was written"
    elif canonical_sha256(report["conditions"]) != report["conditions_sha256"]:
        wrong = "its conditions do not have the hash that it states"
    elif clashes := contradictions(report):
        wrong = f"contradicts itself: {'; '.join(clashes)}"
    else:
        return
    raise ReportError(wrong, where=tilde(path), hint=AGAIN)


def schema() -> Any:
    """The published JSON Schema (draft 2020-12) of ``report.json``."""
    return read_json(data_dir() / "spec" / "report.schema.json")


def contradictions(report: Mapping[str, Any]) -> list[str]:
    """What two places of a report say differently, each in a clause; a schema cannot see it."""
    details, wrong = report["details"], list[str]()
    for name, value in report["metrics"].items():
        own, is_number = details[name], isinstance(value, int | float)
        low, high = (value if own[end] is None else own[end] for end in ("low", "high"))
        if value != own["value"]:
            wrong.append(f"{name} is {value} and {own['value']}")
        elif is_number and own.get("status") != "floor" and not low - 1e-9 <= value <= high + 1e-9:
            wrong.append(f"{name} {value} lies outside its interval, {low} to {high}")
    if wrong:
        return wrong  # the schema types the metrics: their details are of the same types only where equal
    curve, boundary = details[CURVE], details[BOUNDARY]
    if curve["value"] is not None and len(curve["value"]) != len(curve["lengths"]):
        wrong.append("the curve has another number of points than of lengths")
    if boundary["value"] is not None and boundary["tokens"] != boundary["value"]:
        wrong.append(f"the boundary is {boundary['value']} and {boundary['tokens']} tokens")
    for name in SCORES:
        total = sum(details[name].get("counts", {}).values())
        if details[name]["value"] is not None and 0 < total < details[name]["n"]:
            wrong.append(f"{name} counts {total} answers of {details[name]['n']}")
    return wrong


# ---- the answers that its numbers follow from ----


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

    def stated(self, metric: str) -> dict[str, float]:
        """Count, value and interval as the report states them; NaN where it states none."""
        given = {name: self.report["details"][metric][name] for name in ("n", "value", "low", "high")}
        return {name: nan if value is None else float(value) for name, value in given.items()}


def read_answers(path: str | Path) -> RunItems:
    """A report, from its file or its run's folder, with its answers.

    A ReportError where answers are missing, were edited, or do not give the report's numbers.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    report, folder = read_report(path), path.parent
    files = {item["file"]: item["sha256"] for group in report["items"].values() for item in group}
    files |= {name: sha for name, sha in report["sources"].items() if name in (SCORE_ITEMS, JOURNAL)}
    for name, digest in files.items():
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
    items, scores = _score_items(path) if stated else pd.DataFrame(), {}
    for name, detail in stated.items():
        own, kind = detail["set"], name.removesuffix("_score")
        run = SetRun.of(kind, own, items[items["set"] == own], n_items=detail["n"])
        for key in ("value", "low", "high", "guess_rate"):
            made, then = getattr(run.score, key), detail[key]
            if made is None or not np.isclose(made, then, atol=1e-9):
                what = f"its items give {name} {key} {cell(made)}, and the report states {cell(then)}"
                raise _refused(path, what)
        scores[name] = run
    return scores


def _score_items(path: Path) -> pd.DataFrame:
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
