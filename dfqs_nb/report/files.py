"""The files of a report: written together, sealed together, and checked together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfqs_nb.core.display import counted, plain
from dfqs_nb.core.files import is_file, sha256_of_file, write_json, write_text
from dfqs_nb.core.paths import tilde
from dfqs_nb.core.stage import Stage, read_stage
from dfqs_nb.report import reading
from dfqs_nb.report.metrics import METRICS
from dfqs_nb.report.reading import CURVE, FILE, SCORES, ReportError
from dfqs_nb.report.template import FEW_QUESTIONS, sentence
from dfqs_nb.report.text import texts, verdict

SEALED = "dfqs_report"  # the stage of notebook 07


def write_report(stage: Stage | str | Path, report: Mapping[str, Any]) -> list[Path]:
    """Write every file of a report into its run's folder, and seal them; their paths.

    ``stage``: the stage ``dfqs_report``, or the run's folder.
    """
    stage = stage if isinstance(stage, Stage) else Stage(Path(stage), SEALED)
    reading.check_report(report, stage.folder / FILE)
    written = [write_json(stage.path("report.json"), report)]
    for name, text in {**texts(report, stage.folder), "model-index.yml": hub_form(report)}.items():
        if text:
            written.append(write_text(stage.path(name), text))
        else:  # one of an earlier report would state what this one withholds
            (stage.folder / name).unlink(missing_ok=True)
    lines = [sentence("nano_tier")] * (report["tier"] == "nano") + verdict(report).summary
    return [*written, stage.finish(conditions=report["conditions"], tier=report["tier"], summary=lines)]


def check_run(folder: str | Path) -> list[str]:
    """Check a report and everything that it stands on; a line for each file that was checked.

    Its schema, hashes and contradictions; every stage's seal; its texts, rendered again; its scores and
    curve, counted again from the answers. A DfqsError names the first fault.
    """
    folder, wrong = Path(folder), dict[str, str]()
    items = reading.read_answers(folder)
    stages = reading.stages_in(folder, sealed=True) | {SEALED: read_stage(folder, SEALED, sealed=True)}
    for name, then in items.report["sources"].items():
        if not is_file(folder / name) or sha256_of_file(folder / name) != then:
            wrong[name] = "is missing, or was changed since the report was written"
    for name, text in texts(items.report, folder).items():
        path = folder / name
        if not is_file(path) or path.read_text(errors="replace", encoding="utf-8") != text:
            why = "edited, or written by another version of the workbook"
            wrong[name] = f"is not what {FILE} gives: {why}"
    for name, what in wrong.items():
        raise ReportError(what, where=tilde(folder / name), hint=reading.AGAIN)
    n_files = {name: counted(len(it["files"]), "files") for name, it in stages.items()}
    again = [*items.scores, *([CURVE] if len(items.context) else [])]
    return [
        f"{FILE}: as it was written",
        *(f"{name}.json: as it was written, with {n}" for name, n in n_files.items()),
        f"counted again from the answers: {', '.join(again) or 'nothing, every metric is withheld'}",
    ]


def hub_form(report: Mapping[str, Any]) -> str:
    """``model-index.yml``, the block of that name for the front matter of a card; "" without metrics.

    It takes numbers alone, so a curve, a boundary that is censored or provisional, and a score of fewer than
    `FEW_QUESTIONS` have no entry.
    """
    import huggingface_hub as hub
    import yaml
    from huggingface_hub.repocard_data import eval_results_to_model_index

    index = []
    for name, (_, _, kind, _) in METRICS.items():
        detail = report["details"][name]
        is_few = name in SCORES and detail["n"] < FEW_QUESTIONS
        is_bound = detail.get("right_censored") or detail.get("provisional")
        if detail["withheld"] or not kind or is_few or is_bound:
            continue
        stated, asked = sentence("metric", name, detail), detail.get("set") or f"{report['tier']}-{name}"
        value = detail["value"] if isinstance(detail["value"], int) else float(f"{detail['value']:.6g}")
        facts = {"conditions_sha256": report["conditions_sha256"], "n": detail["n"], "stated": stated}
        facts |= {"contended": True} if detail.get("contended") else {}
        about: dict[str, Any] = {"dataset_type": f"dfqs-{asked}", "dataset_name": f"DFQS 1.0, {asked}"}
        about |= {"task_type": "text-generation", "task_name": "Text generation", "metric_type": kind}
        index.append(hub.EvalResult(metric_name=name, metric_value=value, dataset_args=facts, **about))
    if not index:
        return ""
    form = {"model-index": eval_results_to_model_index(plain(report["model"]["name"]), index)}
    first = f"# {sentence('nano_tier')}\n" if report["tier"] == "nano" else ""
    return first + str(yaml.safe_dump(form, sort_keys=False, allow_unicode=True))
