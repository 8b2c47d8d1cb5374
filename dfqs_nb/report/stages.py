"""What a report may draw on: the stages of one run, each with the seal under which it was written."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import canonical_sha256, sha256_of_file
from dfqs_nb.core.paths import tilde

STAGES = {
    "merge": "01_merge_shards.ipynb",
    "header": "02_inspect_header.ipynb",
    "generate": "03_load_and_generate.ipynb",
    "routing": "04_check_routing_determinism.ipynb",
    "long_context": "05_measure_long_context.ipynb",
    "scores": "06_score_reasoning_and_code.ipynb",
}
BESIDE = {  # stages that a report does not draw on
    "ladder": "08_climb_the_quantization_ladder.ipynb",
    "serving": "09_serve_and_deploy.ipynb",
}
WHICH_MODEL = "merge"  # the one stage without which nobody knows what the rest is about


class ReportError(DfqsError):
    """A run, or a report, that cannot be trusted as it lies there."""


def read_stages(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The stages that a run has, each checked: its own seal, the hashes of its files, its model and its tier.

    A stage that was never run is left out; what needs it is then withheld.

    Raises:
        ReportError: there is no run here, or a stage is incomplete, foreign, edited, of another model or
            of another tier than the rest; the message names the file and the notebook that writes it.
    """
    folder = Path(folder)
    stages = {
        name: read_sealed(folder, name, notebook)
        for name, notebook in STAGES.items()
        if (folder / f"{name}.json").exists()
    }
    if WHICH_MODEL not in stages:
        raise ReportError(
            "this folder has no run",
            where=tilde(folder),
            hint=f"run {STAGES[WHICH_MODEL]} first, with this folder's name as run_name",
        )
    _check_one_model(folder, stages)
    _check_one_tier(folder, stages)
    return stages


def check_beside(folder: str | Path) -> list[str]:
    """Check the seals of the stages that stand beside a report, and return the names of those that are there.

    Raises:
        ReportError: one is incomplete, or was edited; see `read_stages`.
    """
    folder = Path(folder)
    found = [name for name in BESIDE if (folder / f"{name}.json").exists()]
    for name in found:
        read_sealed(folder, name, BESIDE[name])
    return found


def read_sealed(folder: Path, stage: str, notebook: str) -> dict[str, Any]:
    """One stage's JSON, as it was written.

    Raises:
        ReportError: see `read_stages`.
    """
    path = folder / f"{stage}.json"
    again = f"run {notebook} again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot be read ({error})", where=tilde(path), hint=again) from error
    if not isinstance(content, dict) or content.get("stage") != stage:
        raise ReportError(f"is not the stage {stage!r} of a run", where=tilde(path), hint=again)
    if "seal" not in content or not isinstance(content.get("files"), dict):
        raise ReportError(
            "has no seal: an earlier version of the workbook wrote it", where=tilde(path), hint=again
        )
    if canonical_sha256({k: v for k, v in content.items() if k != "seal"}) != content["seal"]:
        raise ReportError("was edited after it was written", where=tilde(path), hint=again)
    for name, then in content["files"].items():
        file = folder / name
        if not file.is_file():
            raise ReportError(f"is missing; {path.name} stands on it", where=tilde(file), hint=again)
        if sha256_of_file(file) != then:
            raise ReportError(f"was changed after {path.name} was written", where=tilde(file), hint=again)
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def model_of(stage: Mapping[str, Any]) -> str | None:
    """SHA-256 of the model that a stage is about."""
    return (stage.get("model") or {}).get("sha256") or stage.get("conditions", {}).get("model")


def _check_one_model(folder: Path, stages: Mapping[str, Mapping[str, Any]]) -> None:
    wanted = model_of(stages[WHICH_MODEL])
    for name, stage in stages.items():
        if model_of(stage) != wanted:
            raise ReportError(
                f"is about another model ({_short(model_of(stage))}) than {WHICH_MODEL}.json "
                f"({_short(wanted)})",
                where=tilde(folder / f"{name}.json"),
                hint=f"run {STAGES[name]} again, or give each model a run_name of its own",
            )


def _check_one_tier(folder: Path, stages: Mapping[str, Mapping[str, Any]]) -> None:
    tiers = {name: stage["tier"] for name, stage in stages.items() if "tier" in stage}
    if len(set(tiers.values())) > 1:
        found = ", ".join(f"{name} is {tier}" for name, tier in tiers.items())
        raise ReportError(
            f"its stages are of different tiers ({found})",
            where=tilde(folder),
            hint="tiers never mix: run notebooks 05 and 06 with the same tier",
        )


def _short(sha256: str | None) -> str:
    return f"{sha256[:12]}..." if sha256 else "unknown"


def finite(value: Any) -> bool:
    """Whether a metric's value can be reported: a finite number, or a list of some.

    >>> finite(0.5), finite([1.0, float("nan")]), finite(None), finite([])
    (True, False, False, False)
    """
    if isinstance(value, list):
        return bool(value) and all(finite(one) for one in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def refusal_of_an_edit(folder: str | Path) -> str:
    """What `read_sealed` says of a copy of a run's last stage in which a number was put in by hand; "" if
    nothing.

    Only that stage and the files that it stands on are copied. The run itself is not touched.
    """
    folder = Path(folder)
    stage = [name for name in STAGES if (folder / f"{name}.json").exists()][-1]
    content = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as copy:
        for name in content["files"]:
            (Path(copy) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, Path(copy) / name)
        edited = Path(copy) / f"{stage}.json"
        edited.write_text(json.dumps({**content, "edited": 0.99}), encoding="utf-8")
        try:
            read_sealed(Path(copy), stage, STAGES[stage])
        except ReportError as error:
            return f"{edited.name} {error.what}"
    return ""
