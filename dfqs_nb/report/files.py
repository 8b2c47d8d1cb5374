"""The files of a report: written together, sealed together, and checked against the answers beside them.

A report's hashes catch accidents. Its numbers are believed because they follow from the answers.
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
from dfqs_nb.core.files import is_file, read_json, sha256_of_file, write_text
from dfqs_nb.core.paths import tilde
from dfqs_nb.core.stage import UNSEALED, Stage, read_stage
from dfqs_nb.report import claims, metrics, requirements
from dfqs_nb.report.metrics import AGAIN, CURVE, FILE, SCORES, read_report, report_file
from dfqs_nb.report.stages import BESIDE, DRAWN_ON, ReportError
from dfqs_nb.report.text import METRIC_TYPES, NANO, eval_results, markdown, model_index, page
from dfqs_nb.report.verdicts import verdict
from dfqs_nb.scores import SetRun

if TYPE_CHECKING:
    import pandas as pd

SEALED = "dfqs_report"  # the stage of notebook 07
HUB = {"model-index.yml": model_index, ".eval_results/dfqs.yaml": eval_results}
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
    """A report, from its file or its run's folder, with its answers; both are checked, else a ReportError."""
    return read_items(read_report(path), report_file(path))


def missing_items(report: Mapping[str, Any], folder: Path) -> list[str]:
    """The files of answers that a report names and that do not lie beside it."""
    return [name for name in _files(report) if not is_file(folder / name)]


def _files(report: Mapping[str, Any]) -> dict[str, str]:
    """The files of answers with their SHA-256."""
    named = {item["file"]: item["sha256"] for group in report["items"].values() for item in group}
    return named | {name: sha for name, sha in report["sources"].items() if name in (SCORE_ITEMS, JOURNAL)}


def read_items(report: Mapping[str, Any], path: Path) -> RunItems:
    """The answers of the report at ``path``; a ReportError where they are missing, edited, or do not fit."""
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


def write_report(stage: Stage | str | Path, report: Mapping[str, Any] | None = None) -> list[Path]:
    """Write every file of a report into its run's folder, and seal them; their paths.

    The seal covers every file of the folder that no other stage covers, such as traces and ``summary.md``.

    Args:
        stage: the stage ``dfqs_report``, or the run's folder.
        report: None seals again the files that are there.
    """
    stage = stage if isinstance(stage, Stage) else Stage(Path(stage), SEALED)
    folder = stage.folder
    if report is None:
        report = read_report(folder)
        there = read_stage(folder, SEALED).get("files", {})
        written = [folder / name for name in there if (folder / name).is_file()]
    else:
        report, written = _write(stage, report)
    for path in [*written, *uncovered(folder, {path.relative_to(folder).as_posix() for path in written})]:
        stage.add(path)
    lines = [NANO] * (report["tier"] == "nano") + verdict(report).summary
    return [*written, stage.finish(conditions=report["conditions"], tier=report["tier"], summary=lines)]


def _write(stage: Stage, report: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Path]]:
    """Write the files; the report with its figure among its sources, and the paths."""
    import matplotlib.pyplot as plt
    import pandas as pd

    from dfqs_nb.core import figures as drawing
    from dfqs_nb.report import figures

    folder = stage.folder
    ax, drawn = figures.report_shares(figures.shares(report)), ["report_shares.png", "report_shares.svg"]
    for name in drawn:
        drawing.save(ax, folder / name)
    plt.close("all")
    report = metrics.with_files(report, folder, drawn)
    metrics.check_report(report, folder / FILE)
    written = [stage.json("report", report), *(folder / name for name in drawn)]
    texts = {"report.md": markdown(report, folder), "report.html": page(report, folder)}
    for name, make in HUB.items():
        if any(report["metrics"][metric] is not None for metric in METRIC_TYPES):
            texts[name] = make(report)
        else:  # one of an earlier report would state what this one withholds
            (folder / name).unlink(missing_ok=True)
    written += [write_text(stage.path(name), text) for name, text in texts.items()]
    for name, rows, columns in (
        ("conformance", report["conformance"], requirements.COLUMNS),
        ("claims", report["claims"], claims.COLUMNS),
    ):
        written.append(stage.table(name, pd.DataFrame(rows, columns=list(columns))))
    return report, written


def uncovered(folder: Path, known: set[str]) -> list[Path]:
    """Files of a run's folder that no stage's seal covers: models, notebooks and parts of files apart."""
    for name in (*DRAWN_ON, *BESIDE):
        content = read_json(folder / f"{name}.json") if (folder / f"{name}.json").is_file() else None
        known |= {f"{name}.json", *(content.get("files", {}) if isinstance(content, dict) else ())}
    skipped, known = (*UNSEALED, ".part", ".lock", ".files"), known | {f"{SEALED}.json"}
    return [
        path
        for path in sorted(folder.rglob("*"))
        if (name := path.relative_to(folder).as_posix()) not in known and not name.startswith(".")
        if not name.endswith(skipped) and path.is_file() and not path.is_symlink()
    ]


def check_run(folder: str | Path) -> list[str]:
    """Check a report and everything that it stands on; a line for each file that was checked.

    Its schema, hashes and contradictions; every stage's seal; its texts, rendered again; its scores and
    curve, counted again from the answers. A DfqsError names the first fault.
    """
    folder = Path(folder)
    report = read_report(folder)
    stages = [name for name in (*DRAWN_ON, *BESIDE, SEALED) if (folder / f"{name}.json").exists()]
    if SEALED not in stages:
        raise ReportError("is missing", where=tilde(folder / f"{SEALED}.json"), hint=AGAIN)
    sealed = {name: read_stage(folder, name, sealed=True)["files"] for name in stages}
    for name, then in report["sources"].items():
        if not is_file(folder / name) or sha256_of_file(folder / name) != then:
            what = "is missing, or was changed since the report was written"
            raise ReportError(what, where=tilde(folder / name), hint=AGAIN)
    for name, text in (("report.md", markdown(report, folder)), ("report.html", page(report, folder))):
        if (folder / name).read_text(encoding="utf-8") != text:
            what = "is not what report.json gives: edited, or written by another version of the workbook"
            raise ReportError(what, where=tilde(folder / name), hint=AGAIN)
    items = read_items(report, folder / FILE)
    again = [*items.scores, *(["context_stability_curve"] if len(items.context) else [])]
    return [
        f"{FILE}: as it was written",
        *(f"{name}.json: as it was written, with {len(files)} files" for name, files in sealed.items()),
        f"counted again from the answers: {', '.join(again) or 'nothing, every metric is withheld'}",
    ]
