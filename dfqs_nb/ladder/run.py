"""Climb the ladder: quantize one model at ever fewer bits, and measure every rung in the same way.

Each rung is made from the same source and measured in child processes. A small model uses one thread, so as
many children are at work as there are cores. What an earlier run finished is read, not repeated.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb.core import child, display, files, journal
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.machine import available_memory, usable_cores
from dfqs_nb.core.stage import Fitted, fit, read_stage
from dfqs_nb.gguf.facts import bits_per_weight, layer_of, types_by_bytes
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.models import resolve
from dfqs_nb.gguf.shards import Files, ShardSet, open_shards
from dfqs_nb.ladder import divergence, quantizer
from dfqs_nb.ladder.imatrix import ImportanceMatrix
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings, llama_version, threads_for
from dfqs_nb.llama.timing import probe
from dfqs_nb.routing import Trace, differences, load_trace, open_recorded
from dfqs_nb.scores import ItemSet, Options, SetRun, find_sandbox, score_set

REFERENCE, UNQUANTIZED = "dfqs-nano-f16", {"F16", "BF16", "F32", "I32"}
RUNGS = ("Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "IQ2_XXS", "IQ1_M", "IQ1_S-XL")
FORMAT = 7  # of what is kept: raised when an older one must not be used
STEPS = "predict", "ask"
PREDICTIONS, TRACE = "reference.npy", "reference.npz"  # of the source, with which all others are compared
HELD_BYTES = 512 << 20  # of a child beside its model: context, Python and its libraries
# What a climb that exceeds its budget gives up, in this order; the last rung stays.
QUESTIONS, CHUNKS, BELOW = "questions of a set at each rung", "chunks of held-out text", "quantized rungs"
CUTS: tuple[dict[str, int], ...] = (
    {QUESTIONS: 32},
    {QUESTIONS: 16, CHUNKS: 16},
    {QUESTIONS: 8, CHUNKS: 8, BELOW: 5},
    {QUESTIONS: 4, BELOW: 3},
    {QUESTIONS: 1, CHUNKS: 4, BELOW: 2},
)
LOGIT_SECONDS = 1e-7  # that a logit takes to be compared with the source's
QUANTIZED_BYTES = 20e6  # of the source that are quantized, hashed and read in a second


@dataclass(frozen=True)
class Settings:
    """What every rung is measured with."""

    text: str = "calibration-nano"  # held-out text: a prompt set, or a file
    chunk_tokens: int = 512
    n_chunks: int = 0  # 0: all
    tier: str = "nano"  # of the questions
    max_items: int = 64  # of each set, evenly over its families; 0: all
    n_ctx: int = 1024  # of the questions
    n_threads: int = 0  # 0: as suits the source's size
    allow_unsandboxed: bool = False


@dataclass(frozen=True)
class Rung:
    """One rung, measured."""

    name: str
    header: GGUFHeader = field(repr=False)  # of the model, all shards as one
    tokens: pd.DataFrame = field(repr=False)  # see `divergence.beside_source`
    routing: pd.DataFrame = field(repr=False)  # see `agreement`
    runs: tuple[SetRun, ...] = field(repr=False)  # a set of questions each

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of the whole file."""
        return bits_per_weight(self.header.tensors)


@dataclass(frozen=True)
class Ladder:
    """The rungs, the source first."""

    rungs: tuple[Rung, ...]
    settings: Settings
    conditions: dict[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()  # which rungs are missing, or were made again, and why


def source_of(folder: str | Path) -> str:
    """What a ladder in a run's folder is made from: the reference model at F16, or the model of the run.

    `DfqsError`: the model of the run is quantized, and is not the reference.
    """
    path = Path(read_stage(folder, "merge")["model"]["path"]) if Path(folder, "merge.json").exists() else None
    if path is None or same_model(open_shards(path).as_one, open_shards(resolve(REFERENCE)[0]).as_one):
        return REFERENCE
    tensors = open_shards(path).tensors
    if {tensor.type for tensor in tensors} <= UNQUANTIZED:
        return str(path)
    # a small model's embedding can outweigh its layers
    layers = [tensor for tensor in tensors if layer_of(tensor.name) is not None]
    kind = next(iter(types_by_bytes(layers or tensors)))
    what = f"{path.name} is quantized already (mostly {kind}), and a ladder starts from F16 weights"
    command = f"dfqs-nb run 08 --run {display.quoted(Path(folder).name)} -p ladder_source=FILE"
    raise DfqsError(what, hint=f"to climb one, put the same model at F16 for FILE: `{command}`")


def same_model(a: GGUFHeader, b: GGUFHeader) -> bool:
    """Whether two models have one name, and the same tensors and shapes, as a model and its original have."""
    ours, theirs = ((it.text("general.name"), {t.name: t.shape for t in it.tensors}) for it in (a, b))
    return ours == theirs


def question_sets(settings: Settings) -> list[ItemSet]:
    """The tier's sets, each cut to its share of questions; code only where it can be run."""
    runs_code = find_sandbox().safe or settings.allow_unsandboxed
    sets = [chosen for chosen in ItemSet.of_tier(settings.tier) if chosen.kind != "code" or runs_code]
    return [chosen.part(settings.max_items or len(chosen.items)) for chosen in sets]


def within_budget(
    settings: Settings, source: Files, rungs: Sequence[str], seconds: float
) -> tuple[Settings, list[str], Fitted]:
    """Settings and rungs, cut in the order of `CUTS` until a climb takes no longer than this.

    The speed of the source, timed here on a few tokens, stands for that of every rung. Of the default rungs,
    those for routed experts are left out of a dense model's ladder.
    """
    shards = open_shards(source)
    recipes = {name: quantizer.load_recipe(name) for name in rungs}  # a wrong name ends it
    dense = [name for name in RUNGS if tuple(rungs) == RUNGS and recipes[name].idle_rules(shards.as_one)]
    rungs = [name for name in rungs if name not in dense]
    with open_model(shards, OpenSettings.of(shards, n_ctx=512, n_threads=settings.n_threads)) as model:
        pace, load, n_vocab = probe(model), model.load_seconds, model.n_vocab
        n_chunks = len(divergence.load_text(settings.text).tokens(model)) // settings.chunk_tokens
    sets = question_sets(settings)

    def cost(plan: dict[str, int]) -> float:
        predicted = plan[CHUNKS] * settings.chunk_tokens * (pace.prefill + n_vocab * LOGIT_SECONDS)
        asked = sum(pace.seconds(64, it.max_tokens) * min(plan[QUESTIONS], len(it.items)) for it in sets)
        return (1 + plan[BELOW]) * (predicted + asked + 3 * load + 3 * shards.nbytes / QUANTIZED_BYTES)

    whole = {QUESTIONS: max((len(each.items) for each in sets), default=0), BELOW: len(rungs)}
    fitted = fit(whole | {CHUNKS: min(n_chunks, settings.n_chunks or n_chunks)}, CUTS, cost, seconds)
    cut = fitted.values
    kept = np.linspace(0, len(rungs) - 1, cut[BELOW]).round().astype(int)
    left_out = [f"the rung {name}: its rules match no tensor of this model" for name in dense]
    settings = replace(settings, max_items=cut[QUESTIONS], n_chunks=cut[CHUNKS])
    return settings, [rungs[at] for at in kept], replace(fitted, left_out=(*left_out, *fitted.left_out))


def climb(
    source: Files,
    folder: str | Path,
    rungs: Sequence[str] = RUNGS,
    *,
    settings: Settings,
    matrix: ImportanceMatrix | None = None,
    fresh: bool = False,
) -> Ladder:
    """Quantize and measure every rung, or take what an earlier run left in ``folder``.

    ``source``: a GGUF with F16, BF16 or F32 weights, or a shard of it: the first rung, as it is. ``rungs``:
    names (or files) of recipes; the source's own type is passed over.

    A rung that llama.cpp refuses or dies of is named in ``notes`` and does not end the climb. A
    `DfqsError`: the source itself cannot be measured.
    """
    shards = open_shards(source)
    settings = replace(settings, n_threads=settings.n_threads or threads_for(shards.as_one))
    measured = list[Rung]()
    with _Climber(shards, Path(folder), settings, matrix, fresh) as climber:
        pool, top = ThreadPoolExecutor(n_workers(shards, settings.n_threads)), climber.top
        recipes = {recipe.name: recipe for recipe in map(quantizer.load_recipe, rungs) if recipe.name != top}
        try:
            # taken before all others: even a single worker never waits for work behind its own
            first = {step: pool.submit(climber.measured, step, top, *climber.source) for step in STEPS}
            order = (top, None), *reversed(recipes.items())  # the slowest come first
            steps = {name: pool.submit(climber.rung, name, recipe, first) for name, recipe in order}
            for name in display.tqdm([top, *recipes], desc="rungs", leave=False):
                try:
                    measured.append(steps[name].result())
                except DfqsError as error:
                    if name == top:
                        raise
                    climber.notes.append(f"{name} failed: {error}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            child.end_all()
            raise
        finally:
            pool.shutdown()
    return Ladder(tuple(measured), settings, climber.conditions, tuple(climber.notes))


def n_workers(shards: ShardSet, n_threads: int) -> int:
    """Children at work at once: as the cores allow, and as memory holds their models beside each other.

    Of small models one more, because each waits now and then for the disk or the sandbox.
    """
    held = available_memory().available_bytes // (2 * shards.nbytes + HELD_BYTES)
    return max(1, min(usable_cores() // n_threads + (n_threads == 1), held))


class _Climber(ExitStack):
    """What the steps of a climb share, and their child processes."""

    def __init__(
        self, shards: ShardSet, folder: Path, settings: Settings, matrix: ImportanceMatrix | None, fresh: bool
    ) -> None:
        super().__init__()
        self.shards, self.folder, self.settings, self.matrix = shards, folder, settings, matrix
        self.fresh, self.notes, self._own = fresh, list[str](), threading.local()
        self.source = shards.paths[0], shards.sha256
        self.top = next(iter(types_by_bytes(shards.as_one.tensors)))  # checked with the first rung
        held_out = divergence.load_text(settings.text)
        sets = [chosen.identity() | {"items": len(chosen.items)} for chosen in question_sets(settings)]
        known: dict[str, Any] = {**asdict(settings), "source_sha256": self.source[1]}
        known |= {"runtime": f"llama-cpp-python {llama_version()}", "sets": sets, "held_out": held_out.name}
        known |= {"words": files.canonical_sha256(held_out.documents)}
        self.conditions = known | {"importance_matrix": matrix.datasets if matrix else (), "format": FORMAT}

    @property
    def _worker(self) -> Any:
        """The `child.Worker` of this thread."""
        if not hasattr(self._own, "worker"):
            self._own.worker = self.enter_context(child.Worker(quantizer.CHILD))
        return self._own.worker

    def _place(self, name: str) -> Path:
        place = self.folder / re.sub(r"[^\w.-]", "-", name)
        place.mkdir(parents=True, exist_ok=True)
        return place

    def rung(self, name: str, recipe: quantizer.Recipe | None, first: Mapping[str, Future[Any]]) -> Rung:
        """Make and measure a rung (without a recipe the source), after the source's own steps, ``first``."""
        path, sha256 = self._made(recipe) if recipe else self.source
        done = ((step, future.result()) for step, future in first.items())  # waits for each when it is due
        predicted, asked = (self.measured(step, name, path, sha256) if recipe else own for step, own in done)
        tokens, routing = (pd.DataFrame(predicted[part]) for part in ("tokens", "routing"))
        runs = tuple(SetRun.of(**answered) for answered in asked["sets"])
        return Rung(name, open_shards(path).as_one, tokens, routing.astype({"hashed": bool}), runs)

    def _made(self, recipe: quantizer.Recipe) -> tuple[Path, str]:
        """A rung's file and its SHA-256, made now or by an earlier run; a changed file is made again."""
        path = self._place(recipe.name) / "model.gguf"
        note, matrix = path.with_name("made.json"), self.matrix if recipe.weights else None

        def stat() -> list[int]:
            return [path.stat().st_size, path.stat().st_mtime_ns]

        def make() -> dict[str, Any]:
            how: dict[str, Any] = {"n_threads": self.settings.n_threads, "overwrite": True, "progress": False}
            quantizer.quantize(self.shards, recipe, path, imatrix=matrix, run=self._worker.run, **how)
            return {"sha256": files.sha256_of_file(path), "stat": stat()}

        key: dict[str, Any] = {"source": self.source[1], "runtime": llama_version(), "format": FORMAT}
        key |= {"recipe": asdict(recipe), "matrix": files.sha256_of_file(matrix.path) if matrix else ""}
        kept = journal.remembered(note, key, make, fresh=self.fresh or not path.exists())
        if kept["stat"] != stat():
            self.notes.append(f"{recipe.name} was made again: {path.name} was changed after it was made")
            kept = journal.remembered(note, key, make, fresh=True)
        return path, kept["sha256"]

    def measured(self, step: str, name: str, path: Path, sha256: str) -> dict[str, Any]:
        """A step, done now in this thread's child or by an earlier run."""
        place, base = self._place(name).resolve(), self._place(self.top).resolve()
        lost = place == base and not all((self.folder / kept).exists() for kept in (PREDICTIONS, TRACE))
        fresh = self.fresh or (lost and step == "predict")
        job: dict[str, Any] = {"work": step, "path": str(path.absolute()), "sha256": sha256, "fresh": fresh}
        job |= {"place": str(place), "base": str(base), "settings": asdict(self.settings)}
        note, conditions = place / f"{step}.json", {**self.conditions, "model": sha256}
        return journal.remembered(note, conditions, lambda: self._worker.run(job, where=path), fresh=fresh)


def agreement(source: Trace, trace: Trace, chunk_tokens: int) -> pd.DataFrame:
    """How a rung routes the source's tokens: a row a chunk and layer.

    ``identical``: share of the ``n`` tokens with the same set of experts. ``hashed``: the layer chooses by
    token id.
    """
    layers = len(source.layers)
    same = (~differences(source, trace)).reshape(source.n_tokens // chunk_tokens, chunk_tokens, layers)
    chunk, column = np.indices((len(same), layers)).reshape(2, -1)
    columns = {"chunk": chunk, "layer": source.layers[column], "hashed": source.hashed[column]}
    return pd.DataFrame(columns | {"identical": same.mean(axis=1).ravel()}).assign(n=chunk_tokens)


# ---- the child process ----


def predict(job: dict[str, Any]) -> dict[str, Any]:
    """Predictions and routing on the held-out text; the source's predictions are kept for the others."""
    settings, folder = Settings(**job["settings"]), Path(job["base"]).parent
    size, is_source = settings.chunk_tokens, job["place"] == job["base"]
    opened = OpenSettings(n_ctx=size, n_threads=settings.n_threads)
    with open_recorded(job["path"], opened, trial=False) as recorded:
        pieces = divergence.load_text(settings.text).chunks(recorded.model, size, settings.n_chunks, least=2)
        tokens = divergence.beside_source(recorded, pieces, folder / PREDICTIONS, is_source=is_source)
        trace = recorded.trace(np.concatenate(pieces).tolist())
    if is_source:
        trace.save(folder / TRACE)
    routing = agreement(load_trace(folder / TRACE), trace, size)
    return {"tokens": tokens.to_dict("list"), "routing": routing.to_dict("list")}


def ask(job: dict[str, Any]) -> dict[str, Any]:
    """Answers to the questions; a program that the source wrote too has its verdict already."""
    settings, folder = Settings(**job["settings"]), Path(job["place"]) / "scores"
    answered = list[dict[str, Any]]()  # for `SetRun.of`
    folder.mkdir(exist_ok=True)
    for verdicts in (Path(job["base"]) / "scores").glob("verdicts-*.jsonl"):
        if not (folder / verdicts.name).exists():
            shutil.copyfile(verdicts, folder / verdicts.name)
    options = Options(fresh=job["fresh"], allow_unsandboxed=settings.allow_unsandboxed, progress=False)
    opened = OpenSettings(n_ctx=settings.n_ctx, n_threads=settings.n_threads)
    with open_model(job["path"], opened, trial=False) as model:
        for questions in question_sets(settings):
            run = score_set(model, questions, folder, options, model_id=job["sha256"])
            about = {"kind": run.kind, "name": run.name, "n_items": run.score.n, "conditions": run.conditions}
            answered.append(about | {"items": run.items.to_dict("records"), "model": run.model})
    return {"sets": answered}


if __name__ == "__main__":
    child.serve(lambda job: {"quantize": quantizer.work, "predict": predict, "ask": ask}[job["work"]](job))
