"""The stages of one run that a report draws on: read once, checked against their seals, typed.

A field of another type is an error, so that a fault of the workbook never passes for "not tested".
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dfqs_nb.core.errors import DfqsError, StageError
from dfqs_nb.core.files import write_json
from dfqs_nb.core.paths import tilde
from dfqs_nb.core.stage import NOTEBOOKS, read_stage
from dfqs_nb.gguf.models import registered
from dfqs_nb.routing import Determinism

DRAWN_ON = ("merge", "header", "generate", "routing", "long_context", "scores")
BESIDE = ("ladder", "serving")  # shown in the texts, and no part of the five metrics


class ReportError(DfqsError):
    """A run, or a report, that cannot be trusted as it lies there."""


class Record(BaseModel):
    """A part of a stage: the fields that a report needs, typed; others are kept and not looked at."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class ModelFile(Record):
    """The file that notebook 01 handed on."""

    name: str
    sha256: str
    nbytes: int = 0
    path: str = ""


class Settings(Record):
    """Conditions under which a stage ran; None where it does not state one."""

    model: str | None = None
    runtime: str | None = None
    system_info: str | None = None
    n_ctx: int | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int | None = None
    seed: int | None = None
    flash_attn: bool | None = None
    type_k: str | None = None
    type_v: str | None = None
    use_mmap: bool | None = None
    use_extra_bufts: bool | None = None
    swa_full: bool | None = None


class SetConditions(Record):
    """Which frozen set was asked, and how."""

    prompt_set: str = ""
    prompt_set_sha256: str = ""
    sampling: dict[str, float] = {}


class Stage(Record):
    """What every stage file has."""

    conditions: dict[str, Any] = {}
    summary: list[str] = []
    files: dict[str, str] = {}
    model: ModelFile | None = None
    tier: str | None = None

    @property
    def settings(self) -> Settings:
        """The conditions, typed."""
        return Settings.model_validate(self.conditions)

    @property
    def sets(self) -> list[SetConditions]:
        """The frozen sets that the stage asked."""
        return []

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the model that the stage is about."""
        return self.model.sha256 if self.model else self.settings.model


class Answer(Record):
    """An answer of notebook 03: how many tokens it took."""

    tokens: int


class Generate(Stage):
    """Notebook 03; ``paging`` has what a token was predicted to read from the disk beside what it took."""

    answers: list[Answer] = []
    paging: dict[str, str] = {}

    @property
    def answered(self) -> str:
        """How many prompts got tokens, or nothing."""
        some = sum(answer.tokens > 0 for answer in self.answers)
        return f"{some} of {len(self.answers)} prompts" if some else ""


class RoutingClaim(Record):
    """Notebook 04's judgement of a statement about routing."""

    claim: str
    status: str
    evidence: str


class Routing(Stage):
    """Notebook 04; its verdict is on repetitions under identical conditions."""

    verdict: Determinism | None = None
    claims: list[RoutingClaim] = []


class CurvePoint(Record):
    """Retrieval at one length."""

    length: int
    n: int
    accuracy: float
    low: float
    high: float


class Boundary(Record):
    """The failure boundary with what must stand beside it."""

    tokens: int
    right_censored: bool = False
    status: str
    cause: str | None = None
    guess_rate: float
    n_haystacks: int
    n_items: int
    provisional: bool = False


class LongContext(Stage):
    """Notebook 05; ``refined`` are lengths that were added where the accuracy crosses."""

    context_stability_curve: list[float | None] = []
    failure_boundary_tokens: int | None = None
    curve: list[CurvePoint] = []
    refined: list[CurvePoint] = []
    guess: dict[str, Any] = {}
    tasks: list[dict[str, Any]] = []
    boundary: Boundary | None = None
    runtime_failure: Any = None
    largest_fall: dict[str, Any] | None = None
    not_measured: str = ""

    @property
    def sets(self) -> list[SetConditions]:
        """The one set."""
        return [SetConditions.model_validate(self.conditions)]


class SetScore(Record):
    """The score of one set; ``value`` is None while an item lacks its result."""

    name: str
    set: str
    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    n_missing: int = 0
    guess_rate: float = 0.0
    counts: dict[str, int] = {}
    truncated: int | None = None


class Speed(Record):
    """Prefill or decode at one depth, in tokens a second."""

    phase: str
    depth: int
    n_threads: int
    repetitions: int
    median: float
    min: float
    max: float
    contended: bool = False


class Scores(Stage):
    """Notebook 06."""

    scores: list[SetScore] = []
    cpu_tokens_per_sec: float | None = None
    speeds: list[Speed] = []
    machine: dict[str, Any] = {}
    sandbox: str | None = None

    @property
    def sets(self) -> list[SetConditions]:
        """Every set that was scored."""
        return [SetConditions.model_validate(self.conditions.get(score.set, {})) for score in self.scores]


class Run(Record):
    """The stages of one run; None for what was not run."""

    merge: Stage | None = None
    header: Stage | None = None
    generate: Generate | None = None
    routing: Routing | None = None
    long_context: LongContext | None = None
    scores: Scores | None = None
    ladder: Stage | None = None
    serving: Stage | None = None

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages that there are, by name, in the order of the notebooks."""
        there = {name: getattr(self, name) for name in (*DRAWN_ON, *BESIDE)}
        return {name: stage for name, stage in there.items() if stage is not None}

    @property
    def file(self) -> ModelFile | None:
        """The model that was run."""
        return self.merge.model if self.merge else None

    @property
    def tier(self) -> str:
        """Of the stages that have one, which `read_run` holds equal; else the model's."""
        model = "nano" if self.file and is_file_of(self.file.sha256) else "standard"
        return next((stage.tier for stage in self.stages.values() if stage.tier), model)


def is_file_of(sha256: str | None, names: Sequence[str] = ()) -> bool:
    """Whether a file is of a registered model, by SHA-256: of those named, else of one the workbook ships."""
    known = registered().items()
    models = [it for name, it in known if (name in names if names else it.source.startswith("data/"))]
    hashes = {sha for it in models for sha in (it.merged_sha256, *(file.sha256 for file in it.files))}
    return bool(sha256) and sha256 in hashes


def typed(stages: Mapping[str, Any], folder: Path = Path()) -> Run:
    """Stages as they were written, typed; a ReportError names a field that is missing or of another type."""
    within: tuple[str, ...] = ()
    try:
        run = Run.model_validate_json(json.dumps(stages))  # JSON has no tuples, and strict types know that
        for name, stage in run.stages.items():
            within = (name, "conditions")
            _ = stage.settings, stage.sets
        return run
    except ValidationError as error:
        first = error.errors()[0]
        at, *path = [*map(str, (*within, *first["loc"]))] or [""]  # no place: halves of characters in a text
        raise ReportError(
            f"{'.'.join(path) or 'a stage'}: {first['msg']}",
            where=tilde(folder / f"{at}.json" if at else folder),
            hint=f"run {NOTEBOOKS.get(at, 'its notebook')} again",
        ) from error


def read_run(folder: str | Path) -> Run:
    """The stages of a run, each checked: its seal, the hashes of its files, its fields, its model, its tier.

    Raises:
        StageError, ReportError: a stage is damaged, edited, or of another model or tier; or there is no run.
    """
    folder = Path(folder)
    there = [name for name in (*DRAWN_ON, *BESIDE) if (folder / f"{name}.json").exists()]
    if "merge" not in there:
        hint = f"run {NOTEBOOKS['merge']} first, with this folder's name as run_name"
        raise ReportError("this folder has no run", where=tilde(folder), hint=hint)
    run = typed({name: read_stage(folder, name, sealed=True) for name in there}, folder)
    drawn = {name: stage for name, stage in run.stages.items() if name in DRAWN_ON}
    models = {name: str(stage.sha256 or "unknown") for name, stage in drawn.items()}
    if other := next((name for name in models if models[name] != models["merge"]), ""):
        what = f"is about another model ({models[other]:.12}...) than merge.json ({models['merge']:.12}...)"
        hint = f"run {NOTEBOOKS[other]} again, or give each model a run_name of its own"
        raise ReportError(what, where=tilde(folder / f"{other}.json"), hint=hint)
    tiers = {name: stage.tier for name, stage in drawn.items() if stage.tier}
    if len({*tiers.values()}) > 1:
        listed = ", ".join(f"{name} is {tier}" for name, tier in tiers.items())
        what = f"its stages are of different tiers ({listed})"
        raise ReportError(what, where=tilde(folder), hint="run notebooks 05 and 06 with the same tier")
    return run


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
