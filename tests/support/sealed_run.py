"""A run's folder as notebooks 01 to 06 leave it, from stages that a real run recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dfqs_nb.core import files as core_files
from dfqs_nb.core import stage as core_stage

RECORDED = Path(__file__).resolve().parents[1] / "data" / "run"
ORDER = ("merge", "header", "generate", "routing", "long_context", "scores")


def recorded(stage: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{stage}.json").read_text(encoding="utf-8"))


def make_run(folder: Path, model: Path, *, without: tuple[str, ...] = (), **changed: dict[str, Any]) -> Path:
    """Write the stages into ``folder``, each with a table of its own, through the package's own seal.

    ``changed`` has, by stage, facts that replace recorded ones before sealing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stage in ORDER:
        if stage in without:
            continue
        content = {**recorded(stage), **changed.get(stage, {})}
        if "model" in content:
            content["model"] = {**content["model"], "path": str(model)}
        with core_files.whole_file(folder / f"{stage}_table.csv") as file:
            file.write(f"stage\n{stage}\n")
        content.pop("stage")
        conditions, summary = content.pop("conditions"), content.pop("summary")
        core_stage.write_stage(folder, stage, conditions=conditions, summary=summary, **content)
    return folder
