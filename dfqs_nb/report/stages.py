"""The stages of one run that a report draws on: read once, checked against their seals and their schema.

A stage is a dict, as its file has it; ``data/spec/stages.schema.json`` has the fields that a report reads. A
field of another type is an error, so that a fault of the workbook never passes for "not tested".
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import DfqsError, StageError
from dfqs_nb.core.files import read_json, write_json
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.core.stage import NOTEBOOKS, read_stage
from dfqs_nb.gguf.models import registered

DRAWN_ON = ("merge", "header", "generate", "routing", "long_context", "scores")
BESIDE = ("ladder", "serving")  # shown in the texts, and no part of the five metrics
Run = dict[str, Any]  # stages by name, in the order of the notebooks; without those that did not run


class ReportError(DfqsError):
    """A run, or a report, that cannot be trusted as it lies there."""


def read_run(folder: str | Path) -> Run:
    """The stages of a run, each checked: its seal, the hashes of its files, its fields, its model, its tier.

    Raises:
        StageError, ReportError: a stage is damaged, edited, or of another model or tier; or there is no run.
    """
    folder = Path(folder)
    run = stages_in(folder, sealed=True)
    if "merge" not in run:
        hint = f"run {NOTEBOOKS['merge']} first, with this folder's name as run_name"
        raise ReportError("this folder has no run", where=tilde(folder), hint=hint)
    drawn = {name: stage for name, stage in run.items() if name in DRAWN_ON}
    models = {name: str(sha256_of(stage) or "unknown") for name, stage in drawn.items()}
    if other := next((name for name in models if models[name] != models["merge"]), ""):
        what = f"is about another model ({models[other]:.12}...) than merge.json ({models['merge']:.12}...)"
        hint = f"run {NOTEBOOKS[other]} again, or give each model a run_name of its own"
        raise ReportError(what, where=tilde(folder / f"{other}.json"), hint=hint)
    tiers = {name: stage["tier"] for name, stage in drawn.items() if stage.get("tier")}
    if len({*tiers.values()}) > 1:
        listed = ", ".join(f"{name} is {tier}" for name, tier in tiers.items())
        what = f"its stages are of different tiers ({listed})"
        raise ReportError(what, where=tilde(folder), hint="run notebooks 05 and 06 with the same tier")
    return run


def stages_in(folder: Path, *, sealed: bool = False) -> Run:
    """The stages that a folder has, each with the fields of its schema; ``sealed``: check the seals, too.

    A StageError or ReportError names one that is damaged.
    """
    there = [name for name in (*DRAWN_ON, *BESIDE) if (folder / f"{name}.json").exists()]
    return checked({name: read_stage(folder, name, sealed=sealed) for name in there}, folder)


def checked(run: Run, folder: Path = Path()) -> Run:
    """Stages as they were written; a ReportError names a field that is missing or of another type."""
    import jsonschema

    schema = read_json(data_dir() / "spec" / "stages.schema.json")
    for name, stage in run.items():
        validator = jsonschema.Draft202012Validator({**schema, "$ref": f"#/$defs/{name}"})
        if fault := jsonschema.exceptions.best_match(validator.iter_errors(stage)):
            what = f"{fault.json_path.removeprefix('$.')}: {fault.message[:200]}"
            raise ReportError(what, where=tilde(folder / f"{name}.json"), hint=f"run {NOTEBOOKS[name]} again")
    return run


def settings_of(stage: Mapping[str, Any]) -> Mapping[str, Any]:
    """The conditions under which a stage ran; None for one that it does not state."""
    return defaultdict(lambda: None, stage.get("conditions", {}))


def sha256_of(stage: Mapping[str, Any]) -> str | None:
    """SHA-256 of the model that a stage is about."""
    own = stage.get("model")
    sha256: str | None = own["sha256"] if own else settings_of(stage)["model"]
    return sha256


def sets_of(run: Run) -> list[Mapping[str, Any]]:
    """The frozen sets that were asked, and how: the curve's, and every set that was scored."""
    scored = run["scores"]["conditions"]
    own = (scored.get(score["set"]) for score in run["scores"]["scores"])
    return [run["long_context"]["conditions"], *(it if isinstance(it, dict) else {} for it in own)]


def tier_of(run: Run) -> str:
    """The tier of the stages that have one, which `read_run` holds equal; else the model's."""
    model = "nano" if is_file_of(run["merge"]["model"]["sha256"]) else "standard"
    return next((str(stage["tier"]) for stage in run.values() if stage.get("tier")), model)


def is_file_of(sha256: str | None, names: Sequence[str] = ()) -> bool:
    """Whether a file is of a registered model, by SHA-256: of those named, else of one the workbook ships."""
    known = registered().items()
    models = [it for name, it in known if (name in names if names else it.source.startswith("data/"))]
    hashes = {sha for it in models for sha in (it.merged_sha256, *(file.sha256 for file in it.files))}
    return bool(sha256) and sha256 in hashes


def not_run(missing: Sequence[str], run_name: str) -> str:
    """Which notebooks did not run, and the command that makes up for it.

    >>> not_run(["scores"], "nano")
    'notebook 06 did not run; `dfqs-nb run 06 07 --run nano` makes up for it'
    """
    numbers = [NOTEBOOKS[name][:2] for name in missing]
    command = " ".join(["dfqs-nb run", *numbers, "07 --run", quoted(run_name)])
    *first, last = numbers
    named = f"notebooks {', '.join(first)} and {last}" if first else f"notebook {last}"
    return f"{named} did not run; `{command}` makes up for it"


def refusal_of_an_edit(folder: str | Path) -> str:
    """What `read_run` answers when a number in a copy of the run's last stage was edited; "" if nothing."""
    stage = [name for name in DRAWN_ON if (Path(folder) / f"{name}.json").exists()][-1]
    with tempfile.TemporaryDirectory() as copy:
        edited = write_json(Path(copy, f"{stage}.json"), {**read_stage(Path(folder), stage), "edited": 0.99})
        try:
            read_stage(Path(copy), stage, sealed=True)
        except StageError as error:
            return f"{edited.name} {error.what}"
    return ""
