"""A run's folder as notebooks 01 to 06 leave it, from stages that a real run recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dfqs_nb.context.boundary import Boundary
from dfqs_nb.core.files import read_json
from dfqs_nb.core.stage import Stage
from dfqs_nb.report.reading import DRAWN_ON, Run, checked

RECORDED = Path(__file__).resolve().parents[1] / "data" / "run"


def recorded(stage: str) -> dict[str, Any]:
    """A stage as it was recorded."""
    return json.loads((RECORDED / f"{stage}.json").read_text(encoding="utf-8"))


def run_of(*, without: tuple[str, ...] = (), **changed: Mapping[str, Any]) -> Run:
    """The recorded stages, checked; ``changed`` has, by stage, facts that replace recorded ones."""
    stages = {name: {**recorded(name), **changed.get(name, {})} for name in DRAWN_ON if name not in without}
    return checked(stages)


def make_run(folder: Path, model: Path, *, without: tuple[str, ...] = (), **changed: dict[str, Any]) -> Path:
    """Write the stages into ``folder``, each with a table of its own, through the package's own seal.

    ``changed`` has, by stage, facts that replace recorded ones before sealing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in DRAWN_ON:
        if name in without:
            continue
        content = {**recorded(name), **changed.get(name, {})}
        if "model" in content:
            content["model"] = {**content["model"], "path": str(model)}
        stage = Stage(folder, name)
        stage.table(f"{name}_table", pd.DataFrame({"stage": [name]}))
        facts = {
            key: value for key, value in content.items() if key not in ("stage", "conditions", "summary")
        }
        stage.finish(conditions=content["conditions"], summary=content["summary"], **facts)
    return folder


def with_answers(folder: Path, model: Path) -> Path:
    """A run whose scores and curve follow from answers beside it, as notebooks 05 and 06 write them."""
    import report_builder

    made = report_builder.make_run(folder, "DFQS-Nano-IQ1_S-XL")
    details = read_json(made / "report.json")["details"]
    (made / "report.json").unlink()
    scores, context = recorded("scores"), recorded("long_context")
    for score in scores["scores"]:
        own = details[score["name"]]
        score |= {key: own[key] for key in ("value", "low", "high", "n", "guess_rate")}
        score["counts"] = {}
    curve, boundary = details["context_stability_curve"], details["failure_boundary_tokens"]
    context["boundary"] = {key: boundary[key] for key in (*Boundary.__dataclass_fields__, "sentence")}
    context["failure_boundary_tokens"] = boundary["value"]
    context["context_stability_curve"] = curve["value"]
    context |= {"curve": curve["points"], "refined": []}
    items = {"scores": "score_items.csv", "long_context": "long_context_items.csv"}
    for name, content in {
        **{kind: recorded(kind) for kind in DRAWN_ON},
        "scores": scores,
        "long_context": context,
    }.items():
        if "model" in content:
            content["model"] = {**content["model"], "path": str(model)}
        stage = Stage(folder, name)
        if name in items:
            stage.add(folder / items[name])
        facts = {
            key: value for key, value in content.items() if key not in ("stage", "conditions", "summary")
        }
        stage.finish(conditions=content["conditions"], summary=content["summary"], **facts)
    return folder
