"""The files of a report: written together, sealed together, and checked together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dfqs_nb.core.files import is_file, sha256_of_file, write_text
from dfqs_nb.core.paths import tilde
from dfqs_nb.core.stage import UNSEALED, Stage, read_stage
from dfqs_nb.report import claims, requirements
from dfqs_nb.report.metrics import CURVE
from dfqs_nb.report.reading import AGAIN, FILE, check_report, read_answers, read_report
from dfqs_nb.report.stages import ReportError, stages_in
from dfqs_nb.report.text import NANO, hub_forms, markdown, page
from dfqs_nb.report.verdicts import verdict

SEALED = "dfqs_report"  # the stage of notebook 07


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
        check_report(report, folder / FILE)
        written = [stage.json("report", report)]
        texts = {"report.md": markdown(report, folder), "report.html": page(report, folder)}
        for name, text in (texts | hub_forms(report)).items():
            if text:
                written.append(write_text(stage.path(name), text))
            else:  # one of an earlier report would state what this one withholds
                (folder / name).unlink(missing_ok=True)
        for name, columns in (("conformance", requirements.COLUMNS), ("claims", claims.COLUMNS)):
            written.append(stage.table(name, pd.DataFrame(report[name], columns=list(columns))))
    for path in [*written, *uncovered(folder, {path.relative_to(folder).as_posix() for path in written})]:
        stage.add(path)
    lines = [NANO] * (report["tier"] == "nano") + verdict(report).summary
    return [*written, stage.finish(conditions=report["conditions"], tier=report["tier"], summary=lines)]


def uncovered(folder: Path, known: set[str]) -> list[Path]:
    """Files of a run's folder that no stage's seal covers: models, notebooks and parts of files apart."""
    for name, stage in stages_in(folder).items():
        known |= {f"{name}.json", *stage.get("files", ())}
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
    if not is_file(folder / f"{SEALED}.json"):
        raise ReportError("is missing", where=tilde(folder / f"{SEALED}.json"), hint=AGAIN)
    stages = stages_in(folder, sealed=True) | {SEALED: read_stage(folder, SEALED, sealed=True)}
    files = {name: stage["files"] for name, stage in stages.items()}
    for name, then in report["sources"].items():
        if not is_file(folder / name) or sha256_of_file(folder / name) != then:
            what = "is missing, or was changed since the report was written"
            raise ReportError(what, where=tilde(folder / name), hint=AGAIN)
    for name, text in (("report.md", markdown(report, folder)), ("report.html", page(report, folder))):
        if (
            not is_file(folder / name)
            or (folder / name).read_text(errors="replace", encoding="utf-8") != text
        ):
            what = "is not what report.json gives: edited, or written by another version of the workbook"
            raise ReportError(what, where=tilde(folder / name), hint=AGAIN)
    items = read_answers(folder)
    again = [*items.scores, *([CURVE] if len(items.context) else [])]
    return [
        f"{FILE}: as it was written",
        *(f"{name}.json: as it was written, with {len(own)} files" for name, own in files.items()),
        f"counted again from the answers: {', '.join(again) or 'nothing, every metric is withheld'}",
    ]
