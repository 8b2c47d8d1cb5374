"""Climb the ladder: quantize one model at ever fewer bits, and measure every rung in the same way.

Each rung is made from the same source and measured in a child process. A small model uses one thread, so as
many rungs are under way at once as there are cores. What an earlier run finished is read, not repeated.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb import context
from dfqs_nb.core import child
from dfqs_nb.core.budget import Fitted, fit
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import canonical_sha256, sha256_of_file, sha256_of_files
from dfqs_nb.core.journal import conditions_hash, remembered
from dfqs_nb.core.machine import available_memory, usable_cores
from dfqs_nb.gguf.facts import bits_per_weight, class_of, types_by_bytes
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.ladder import divergence, imatrix, quantizer
from dfqs_nb.ladder.recipes import Recipe, load_recipe
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings, llama_version, threads_for
from dfqs_nb.llama.timing import probe
from dfqs_nb.routing import Trace, load_trace, open_recorded
from dfqs_nb.scores import ItemSet, Options, SetRun, find_sandbox, score_set

RUNGS = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "IQ2_XXS", "IQ1_M", "IQ1_S-XL")
FORMAT = 5  # of what is kept: raised when an older one must not be used
HELD_BYTES = 512 << 20  # of a child beside its model: context, Python and its libraries
# What a climb that exceeds its budget gives up, in this order; the first and the last rung stay.
CUTS: tuple[dict[str, int], ...] = (
    {"items": 32, "texts": 2, "longest": 512},
    {"chunks": 16, "items": 16},
    {"rungs": 6, "chunks": 8, "items": 8},
    {"rungs": 4, "longest": 256, "texts": 1, "items": 4},
    {"rungs": 3, "chunks": 4, "items": 1},
)
NAMES = {
    "items": "questions of a set at each rung",
    "longest": "tokens of the longest context",
    "texts": "texts a length",
    "chunks": "chunks of held-out text",
    "rungs": "rungs",
}
LOGIT_SECONDS = 1e-7  # that a logit takes to be compared with the source's
QUANTIZED_BYTES = 20e6  # of the source that are quantized, hashed and read in a second


class LadderError(DfqsError):
    """The ladder cannot be climbed."""


@dataclass(frozen=True)
class Settings:
    """What every rung is measured with."""

    text: str = "calibration-nano"  # a prompt set with ``calibration`` and ``held_out``, or a text file
    chunk_tokens: int = 512  # of the held-out text; see `divergence.stratified`
    n_chunks: int = 0  # 0: all
    calibration: str = ""  # a text for the importance matrix; empty: the prompt set's part
    calibration_tokens: int = imatrix.CHUNK_TOKENS
    calibration_chunks: int = 24
    tier: str = "nano"  # of the questions
    max_items: int = 64  # of each set, evenly over its families; 0: all
    prompt_set: str = "long-context-nano"  # of the stability curve
    longest: int = 512  # tokens of that curve
    n_haystacks: int = 6
    n_ctx: int = 1024  # of the questions
    n_threads: int = 0  # 0: as suits the source's size
    allow_unsandboxed: bool = False


@dataclass(frozen=True)
class Rung:
    """One rung, measured."""

    name: str
    path: Path
    sha256: str
    header: GGUFHeader = field(repr=False)  # of the model, all shards as one
    tokens: divergence.Tokens = field(repr=False)  # predictions of every scored token, beside the source's
    trace: Trace = field(repr=False)  # the experts chosen there
    runs: tuple[SetRun, ...] = field(repr=False)  # a set of questions each
    items: pd.DataFrame = field(repr=False)  # of the stability curve, one row a question
    boundary: dict[str, Any] = field(repr=False)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of the whole file."""
        return bits_per_weight(self.header.tensors)

    @property
    def expert_bits(self) -> float:
        """Bits a weight of the routed experts; NaN for a dense model."""
        return bits_per_weight([t for t in self.header.tensors if class_of(t.name) == "routed experts"])


@dataclass(frozen=True)
class Ladder:
    """The rungs, the source first."""

    rungs: tuple[Rung, ...]
    settings: Settings
    conditions: dict[str, Any] = field(repr=False)
    failed: dict[str, str] = field(default_factory=dict)  # why a rung is missing, by name

    @property
    def source(self) -> Rung:
        """The rung that all others are made from and compared with."""
        return self.rungs[0]

    def __getitem__(self, name: str) -> Rung:
        return next(rung for rung in self.rungs if rung.name == name)


def question_sets(settings: Settings) -> list[ItemSet]:
    """The tier's sets, each cut to its share of questions; code only where it can be run."""
    runs_code = find_sandbox().safe or settings.allow_unsandboxed
    sets = [chosen for chosen in ItemSet.of_tier(settings.tier) if chosen.kind != "code" or runs_code]
    return [chosen.part(settings.max_items or len(chosen.items)) for chosen in sets]


def collected(
    source: str | Path,
    folder: str | Path,
    settings: Settings,
    *,
    given: str | Path | None = None,
    fresh: bool = False,
) -> imatrix.ImportanceMatrix:
    """The importance matrix over the calibration text, from ``folder/imatrix.gguf`` where it is there.

    ``given``: the file of another one, which is read instead. A `LadderError`: there is no text for it.
    """
    if given:
        return imatrix.read_imatrix(given)
    if not settings.calibration and (Path(settings.text).suffix or Path(settings.text).is_file()):
        hint = "give calibration a text of its own, or an importance matrix"
        raise LadderError("would also be the calibration text", where=settings.text, hint=hint)
    path = Path(folder) / "imatrix.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"n_threads": settings.n_threads, "fresh": fresh, "progress": False}
    how |= {"chunk_tokens": settings.calibration_tokens, "n_chunks": settings.calibration_chunks}
    return imatrix.collect(source, settings.calibration or settings.text, path=path, **how)


def within_budget(
    settings: Settings, source: str | Path, rungs: Sequence[str], seconds: float
) -> tuple[Settings, list[str], Fitted]:
    """Settings and rungs, cut in the order of `CUTS` until a climb takes no longer than this.

    The speed of the source, timed here on a few tokens, stands for that of every rung. Of the default rungs,
    those for routed experts are left out of a dense model's ladder.
    """
    header = open_shards(source).as_one
    rules = {name: load_recipe(name).rules for name in rungs if tuple(rungs) == RUNGS}
    tensors = [tensor.name for tensor in header.tensors]
    unfit = [
        name
        for name in rules
        for rule in rules[name]
        if not (rule.optional or any(rule.matches(tensor, header.n_layers) for tensor in tensors))
    ]
    rungs = [name for name in rungs if name not in unfit]
    opened = OpenSettings.of(source, n_ctx=512, n_threads=settings.n_threads)
    with open_model(source, opened) as model:
        pace, load, n_vocab = probe(model), model.load_seconds, model.n_vocab
        n_chunks = len(divergence.load_text(settings.text).tokens(model)) // settings.chunk_tokens
    sets, nbytes = question_sets(settings), open_shards(source).nbytes

    def cost(plan: dict[str, int]) -> float:
        predicted = plan["chunks"] * settings.chunk_tokens
        asked = sum(pace.seconds(64, each.max_tokens) * min(plan["items"], len(each.items)) for each in sets)
        curve = pace.seconds(2 * plan["longest"] * plan["texts"], 8 * plan["texts"])
        rung = predicted * (pace.prefill + n_vocab * LOGIT_SECONDS) + asked + curve
        return plan["rungs"] * (rung + 3 * load + 3 * nbytes / QUANTIZED_BYTES)

    items = max((len(each.items) for each in sets), default=0)  # `max_items` has cut them already
    whole = {"items": items, "longest": settings.longest, "texts": settings.n_haystacks}
    whole |= {"chunks": min(n_chunks, settings.n_chunks or n_chunks), "rungs": len(rungs)}
    fitted = fit(whole, CUTS, cost, seconds, NAMES)
    cut = fitted.values
    kept = np.linspace(0, len(rungs) - 1, cut["rungs"]).round().astype(int)
    cut_settings = replace(
        settings,
        max_items=settings.max_items if cut["items"] == items else cut["items"],
        longest=cut["longest"],
        n_haystacks=cut["texts"],
        n_chunks=settings.n_chunks if cut["chunks"] == whole["chunks"] else cut["chunks"],
    )
    dense = (f"the rung {name}: its rules match no tensor of this model" for name in unfit)
    left_out = (*dense, *fitted.left_out)
    return cut_settings, [rungs[at] for at in kept], replace(fitted, left_out=left_out)


def climb(
    source: str | Path,
    folder: str | Path,
    rungs: Sequence[str] = RUNGS,
    *,
    settings: Settings | None = None,
    matrix: str | Path | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> Ladder:
    """Quantize and measure every rung, or take what an earlier run left in ``folder``.

    ``source``: a GGUF with F16, BF16 or F32 weights, or a shard of it: the first rung, as it is. ``rungs``:
    names (or files) of recipes; the source's own type is passed over. ``matrix``: collected by default.

    A rung that llama.cpp refuses or dies of is named in ``failed`` and does not end the climb. A
    `LadderError`: the source itself cannot be measured. A `QuantizeError`, `PromptError` or `TextError`:
    there is no such recipe, set or text, or it is too short.
    """
    settings, folder, shards = settings or Settings(), Path(folder), open_shards(source)
    folder.mkdir(parents=True, exist_ok=True)
    settings = replace(settings, n_threads=settings.n_threads or threads_for(shards.paths[0]))
    top = next(iter(types_by_bytes(shards.as_one.tensors)))  # F16, BF16 or F32, checked at the first rung
    recipes = {recipe.name: recipe for recipe in map(load_recipe, rungs) if recipe.name != top}
    with (
        tqdm(total=1 + len(recipes), desc="rungs", disable=not progress) as bar,
        _Climber(shards, folder, settings, matrix, fresh) as climber,
    ):
        measured = climber.climb(top, recipes, bar.update)
        return Ladder(measured, settings, climber.conditions, climber.failed)


def n_workers(shards: ShardSet, n_threads: int) -> int:
    """Rungs under way at once: as the cores allow, and as memory holds their models beside each other."""
    held = available_memory().available_bytes // (2 * shards.nbytes + HELD_BYTES)
    return max(1, min(usable_cores() // n_threads, held))


class _Climber(ExitStack):
    """One climb: what its steps share, its child processes, and which rungs failed."""

    def __init__(
        self, shards: ShardSet, folder: Path, settings: Settings, matrix: str | Path | None, fresh: bool
    ) -> None:
        super().__init__()
        self.shards, self.folder, self.settings = shards, folder, settings
        self.given, self.fresh, self.failed = matrix, fresh, dict[str, str]()
        self.source, self.sha256 = shards.paths[0], sha256_of_files(shards.paths)
        self._own = threading.local()
        held_out = divergence.load_text(settings.text)
        self.conditions = {
            **asdict(settings),
            "source_sha256": self.sha256,
            "runtime": f"llama-cpp-python {llama_version()}",
            "sets": [chosen.identity() | {"items": len(chosen.items)} for chosen in question_sets(settings)],
            "held_out": held_out.name,
            "words": canonical_sha256(held_out.documents),
            "format": FORMAT,
        }

    def climb(
        self, top: str, recipes: Mapping[str, Recipe], on_rung: Callable[[], object]
    ) -> tuple[Rung, ...]:
        """Make and measure all rungs, as many at once as this machine holds.

        Every task waits only for tasks that were submitted before it, so one worker is enough.
        """
        pool = ThreadPoolExecutor(n_workers(self.shards, self.settings.n_threads))
        rungs, matrix = dict[str, Rung](), None
        try:
            futures = {top: pool.submit(self._measured, top, self.source, self.sha256, None)}
            if any(recipe.weights for recipe in recipes.values()):
                how: dict[str, Any] = {"given": self.given, "fresh": self.fresh}
                matrix = pool.submit(collected, self.source, self.folder, self.settings, **how)
            # all are made before the first is measured, which waits for the source's predictions
            made = {
                name: pool.submit(self._made, recipe, matrix if recipe.weights else None)
                for name, recipe in recipes.items()
            }
            futures |= {name: pool.submit(self._rung, name, made[name], futures[top]) for name in recipes}
            for name, future in futures.items():
                try:
                    rungs[name] = future.result()
                except DfqsError as error:
                    if name == top:
                        what = f"the source cannot be measured: {error}"
                        raise LadderError(what, where=self.source, hint="open it in notebook 03") from error
                    self.failed[name] = str(error)
                on_rung()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            child.end_all()
            raise
        finally:
            pool.shutdown()
        return tuple(rungs.values())

    @property
    def _worker(self) -> child.Worker:
        """The child of this thread."""
        if not hasattr(self._own, "worker"):
            self._own.worker = self.enter_context(child.Worker(quantizer.CHILD))
        worker: child.Worker = self._own.worker
        return worker

    def _place(self, name: str) -> Path:
        place = self.folder / re.sub(r"[^\w.-]", "-", name)
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _made(self, recipe: Recipe, collected: Future[imatrix.ImportanceMatrix] | None) -> tuple[Path, str]:
        """A rung's file, made now or by an earlier run, and its SHA-256."""
        place, matrix = self._place(recipe.name), collected.result() if collected else None
        path, note = place / "model.gguf", place / "made.json"

        def make() -> dict[str, Any]:
            for torn in place.glob(f".{path.name}.*.part"):  # left by a kill
                torn.unlink()
            how: dict[str, Any] = {"n_threads": self.settings.n_threads, "overwrite": True}
            how |= {"progress": False, "source_sha256": self.sha256, "worker": self._worker}
            done = quantizer.quantize(self.source, recipe, path, imatrix=matrix, **how)
            return {"nbytes": done.nbytes, "sha256": sha256_of_file(path), "notes": done.notes}

        conditions = {"source": self.sha256, "recipe": asdict(recipe), "runtime": llama_version()}
        conditions |= {"matrix": "" if matrix is None else matrix.sha256}
        facts = remembered(note, conditions, make, fresh=self.fresh or not path.exists())
        if facts.get("nbytes") != path.stat().st_size:  # the file is no longer what was made
            facts = remembered(note, conditions, make, fresh=True)
        return path, facts["sha256"]

    def _rung(self, name: str, made: Future[tuple[Path, str]], source: Future[Rung]) -> Rung:
        """Measure a rung beside the source."""
        (path, sha256), base, place = made.result(), source.result(), self._place(name)
        (place / "scores").mkdir(exist_ok=True)
        for verdicts in self._place(base.name).glob("scores/verdicts-*.jsonl"):
            # a program that the source wrote too has its verdict already
            if not (place / "scores" / verdicts.name).exists():
                shutil.copyfile(verdicts, place / "scores" / verdicts.name)
        return self._measured(name, path, sha256, base)

    def _measured(self, name: str, path: Path, sha256: str, base: Rung | None) -> Rung:
        """Measure a rung in a child, or load an earlier measurement."""
        place, reference = self._place(name), self.folder / "reference.npy"
        conditions = {**self.conditions, "model": sha256, "base": base.sha256 if base else ""}
        # the source's predictions, with which all others are compared, may have been deleted
        gone = base is None and not reference.exists()

        def measured() -> dict[str, Any]:
            files = {"path": path, "place": place, "reference": reference}
            job: dict[str, Any] = {name: str(file.resolve()) for name, file in files.items()}
            job |= {"work": "measure", "key": conditions_hash(conditions), "is_source": base is None}
            job |= {"sha256": sha256, "settings": asdict(self.settings), "fresh": self.fresh}
            return self._worker.run(job, where=path)

        facts = remembered(place / "rung.json", conditions, measured, fresh=self.fresh or gone)
        predicted = divergence.Tokens.load(place / "tokens.npz"), load_trace(place / "trace.npz")
        runs = tuple(SetRun.of(**answered) for answered in facts["sets"])
        asked = pd.DataFrame(facts["items"]), facts["boundary"]
        return Rung(name, path, sha256, open_shards(path).as_one, *predicted, runs, *asked)


# ---- the child process ----


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one model: predictions and routing first, then scores and the stability curve."""
    settings, place, fresh = Settings(**job["settings"]), Path(job["place"]), job["fresh"]
    lost = job["is_source"] and not Path(job["reference"]).exists()
    predict, key = lambda: _predict(job, settings, place), {"key": job["key"]}
    remembered(place / "predicted.json", key, predict, fresh=fresh or lost)
    n_ctx = max(settings.n_ctx, settings.longest + 64)  # room for the answers
    opened = OpenSettings(n_ctx=n_ctx, n_threads=settings.n_threads)
    options = Options(fresh=fresh, allow_unsandboxed=settings.allow_unsandboxed, progress=False)
    with open_model(job["path"], opened, trial=False) as model:
        runs = [
            score_set(model, chosen, place / "scores", options, model_id=job["sha256"])
            for chosen in question_sets(settings)
        ]
        # rounds=0: every rung is asked at the same lengths
        how = {"rounds": 0, "n_haystacks": settings.n_haystacks}
        plan = context.make_plan(model, settings.prompt_set, settings.longest, **how)
        about: dict[str, Any] = {"model_sha256": job["sha256"], "alone": True, "fresh": fresh}
        curve = context.measure(model, plan, place, **about)
    sets = [
        {"kind": run.kind, "name": run.name, "n_items": run.score.n, "conditions": run.conditions}
        | {"items": run.items.to_dict("records"), "model": run.model}
        for run in runs
    ]
    items, boundary = curve.retrieval.to_dict("records"), curve.boundary().as_dict()
    return {"sets": sets, "items": items, "boundary": boundary}


def _predict(job: dict[str, Any], settings: Settings, place: Path) -> dict[str, Any]:
    """Predictions and routing on the held-out text; the source's predictions are kept for the others."""
    opened = OpenSettings(n_ctx=settings.chunk_tokens, n_threads=settings.n_threads)
    with open_recorded(job["path"], opened, trial=False) as recorded:
        tokens = divergence.load_text(settings.text).tokens(recorded.model)
        pieces = divergence.chunks(tokens, settings.chunk_tokens, settings.n_chunks, least=2)
        reference = Path(job["reference"])
        scored = divergence.beside_source(recorded, pieces, reference, is_source=job["is_source"])
        scored.save(place / "tokens.npz")
        trace = recorded.trace(np.concatenate(pieces).tolist(), chunk_tokens=settings.chunk_tokens)
        trace.save(place / "trace.npz")
    return {"n_chunks": len(pieces)}
