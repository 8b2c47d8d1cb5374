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

from dfqs_nb import context
from dfqs_nb.core import child
from dfqs_nb.core.budget import Fitted, fit
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import canonical_sha256, sha256_of_file, sha256_of_files, write_table
from dfqs_nb.core.journal import remembered
from dfqs_nb.core.machine import available_memory, usable_cores
from dfqs_nb.gguf.facts import bits_per_weight, types_by_bytes
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.ladder import divergence, imatrix, quantizer
from dfqs_nb.ladder.recipes import Recipe, load_recipe
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings, llama_version, threads_for
from dfqs_nb.llama.timing import probe
from dfqs_nb.routing import Trace, differences, load_trace, open_recorded, overlaps
from dfqs_nb.scores import ItemSet, Options, SetRun, find_sandbox, score_set

RUNGS = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "IQ2_XXS", "IQ1_M", "IQ1_S-XL")
FORMAT = 6  # of what is kept: raised when an older one must not be used
PREDICTIONS = "reference.npy"  # of the source, with which all others are compared
HELD_BYTES = 512 << 20  # of a child beside its model: context, Python and its libraries
# What a climb that exceeds its budget gives up, in this order; the first and the last rung stay.
CUTS: tuple[dict[str, int], ...] = (
    {"max_items": 32, "n_haystacks": 2, "longest": 512},
    {"n_chunks": 16, "max_items": 16},
    {"rungs": 6, "n_chunks": 8, "max_items": 8},
    {"rungs": 4, "longest": 256, "n_haystacks": 1, "max_items": 4},
    {"rungs": 3, "n_chunks": 4, "max_items": 1},
)
NAMES = {
    "max_items": "questions of a set at each rung",
    "longest": "tokens of the longest context",
    "n_haystacks": "texts a length",
    "n_chunks": "chunks of held-out text",
    "rungs": "rungs",
}
LOGIT_SECONDS = 1e-7  # that a logit takes to be compared with the source's
QUANTIZED_BYTES = 20e6  # of the source that are quantized, hashed and read in a second
Tasks = dict[str, tuple[Future[Any], ...]]


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
    header: GGUFHeader = field(repr=False)  # of the model, all shards as one
    tokens: pd.DataFrame = field(repr=False)  # see `divergence.beside_source`
    routing: pd.DataFrame = field(repr=False)  # see `agreement`
    runs: tuple[SetRun, ...] = field(repr=False)  # a set of questions each
    items: pd.DataFrame = field(repr=False)  # of the stability curve, one row a question
    boundary: dict[str, Any] = field(repr=False)

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
    failed: dict[str, str] = field(default_factory=dict)  # why a rung is missing, by name

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
    return imatrix.collect(source, settings.calibration or settings.text, path, **how)


def within_budget(
    settings: Settings, source: str | Path, rungs: Sequence[str], seconds: float
) -> tuple[Settings, list[str], Fitted]:
    """Settings and rungs, cut in the order of `CUTS` until a climb takes no longer than this.

    The speed of the source, timed here on a few tokens, stands for that of every rung. Of the default rungs,
    those for routed experts are left out of a dense model's ladder.
    """
    shards = open_shards(source)
    dense = [name for name in RUNGS if tuple(rungs) == RUNGS and load_recipe(name).idle_rules(shards.as_one)]
    rungs = [name for name in rungs if name not in dense]
    with open_model(source, OpenSettings.of(source, n_ctx=512, n_threads=settings.n_threads)) as model:
        pace, load, n_vocab = probe(model), model.load_seconds, model.n_vocab
        n_chunks = len(divergence.load_text(settings.text).tokens(model)) // settings.chunk_tokens
    sets = question_sets(settings)

    def cost(plan: dict[str, int]) -> float:
        predicted, items = plan["n_chunks"] * settings.chunk_tokens, plan["max_items"]
        asked = sum(pace.seconds(64, each.max_tokens) * min(items, len(each.items)) for each in sets)
        curve = pace.seconds(2 * plan["longest"] * plan["n_haystacks"], 8 * plan["n_haystacks"])
        rung = predicted * (pace.prefill + n_vocab * LOGIT_SECONDS) + asked + curve
        return plan["rungs"] * (rung + 3 * load + 3 * shards.nbytes / QUANTIZED_BYTES)

    items = max((len(each.items) for each in sets), default=0)  # `max_items` has cut them already
    n_chunks = min(n_chunks, settings.n_chunks or n_chunks)
    whole = {"max_items": items, "longest": settings.longest, "n_haystacks": settings.n_haystacks}
    fitted = fit(whole | {"n_chunks": n_chunks, "rungs": len(rungs)}, CUTS, cost, seconds, NAMES)
    cut: dict[str, Any] = dict(fitted.values)
    kept = np.linspace(0, len(rungs) - 1, cut.pop("rungs")).round().astype(int)
    left_out = [f"the rung {name}: its rules match no tensor of this model" for name in dense]
    fitted = replace(fitted, left_out=(*left_out, *fitted.left_out))
    return replace(settings, **cut), [rungs[at] for at in kept], fitted


def climb(
    source: str | Path,
    folder: str | Path,
    rungs: Sequence[str] = RUNGS,
    *,
    settings: Settings | None = None,
    matrix: imatrix.ImportanceMatrix | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> Ladder:
    """Quantize and measure every rung, or take what an earlier run left in ``folder``.

    ``source``: a GGUF with F16, BF16 or F32 weights, or a shard of it: the first rung, as it is. ``rungs``:
    names (or files) of recipes; the source's own type is passed over. ``matrix``: collected by default.

    A rung that llama.cpp refuses or dies of is named in ``failed`` and does not end the climb. A
    `LadderError`: the source itself cannot be measured.
    """
    settings, shards = settings or Settings(), open_shards(source)
    settings = replace(settings, n_threads=settings.n_threads or threads_for(shards.paths[0]))
    top = next(iter(types_by_bytes(shards.as_one.tensors)))  # F16, BF16 or F32, checked at the first rung
    recipes = {recipe.name: recipe for recipe in map(load_recipe, rungs) if recipe.name != top}
    if matrix is None and any(recipe.weights for recipe in recipes.values()):
        matrix = collected(source, folder, settings, fresh=fresh)
    pool, measured, failed = ThreadPoolExecutor(n_workers(shards, settings.n_threads)), list[Rung](), {}
    with (
        tqdm(total=1 + len(recipes), desc="rungs", disable=not progress) as bar,
        _Climber(shards, top, Path(folder), settings, fresh) as climber,
    ):
        try:
            for name, steps in climber.tasks(pool, recipes, matrix).items():
                try:
                    (path, _), _, asked = (step.result() for step in steps)
                    measured.append(climber.rung(name, path, asked))
                except DfqsError as error:
                    if name == top:
                        what = f"the source cannot be measured: {error}"
                        raise LadderError(what, where=source, hint="open it in notebook 03") from error
                    failed[name] = str(error)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            child.end_all()
            raise
        finally:
            pool.shutdown()
    return Ladder(tuple(measured), settings, climber.conditions, failed)


def n_workers(shards: ShardSet, n_threads: int) -> int:
    """Children at work at once: as the cores allow, and as memory holds their models beside each other.

    Of small models one more, because each waits now and then for the disk or the sandbox.
    """
    held = available_memory().available_bytes // (2 * shards.nbytes + HELD_BYTES)
    return max(1, min(usable_cores() // n_threads + (n_threads == 1), held))


class _Climber(ExitStack):
    """What the steps of a climb share, and their child processes."""

    def __init__(self, shards: ShardSet, top: str, folder: Path, settings: Settings, fresh: bool) -> None:
        super().__init__()
        self.source, self.sha256 = shards.paths[0], sha256_of_files(shards.paths)
        self.top, self.folder, self.settings, self.fresh = top, folder, settings, fresh
        self.base, self._own = self._place(top), threading.local()
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

    def tasks(
        self,
        pool: ThreadPoolExecutor,
        recipes: Mapping[str, Recipe],
        matrix: imatrix.ImportanceMatrix | None,
    ) -> Tasks:
        """Three steps of each rung, by its name: make it, predict the text, ask the questions.

        Each waits only for steps that were submitted before it, so one worker is enough.
        """
        made = pool.submit(lambda: (self.source, self.sha256))
        source = pool.submit(self._predicted, self.top, made)
        tasks: Tasks = {self.top: (made, source, pool.submit(self._asked, self.top, made))}
        files = [pool.submit(self._made, each, matrix if each.weights else None) for each in recipes.values()]
        for name, made in zip(recipes, files, strict=True):
            predicted = pool.submit(self._predicted, name, made, source)
            tasks[name] = made, predicted, pool.submit(self._asked, name, made)
        return tasks

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

    def _made(self, recipe: Recipe, matrix: imatrix.ImportanceMatrix | None) -> tuple[Path, str]:
        """A rung's file, made now or by an earlier run, and its SHA-256."""
        place = self._place(recipe.name)
        path = place / "model.gguf"

        def make() -> dict[str, Any]:
            for torn in place.glob(f".{path.name}.*.part"):  # left by a kill
                torn.unlink()
            how: dict[str, Any] = {"n_threads": self.settings.n_threads, "overwrite": True}
            how |= {"progress": False, "source_sha256": self.sha256, "worker": self._worker}
            quantizer.quantize(self.source, recipe, path, imatrix=matrix, **how)
            return {"sha256": sha256_of_file(path)}

        conditions = {"source": self.sha256, "recipe": asdict(recipe), "runtime": llama_version()}
        conditions |= {"matrix": sha256_of_file(matrix.path) if matrix else ""}
        facts = remembered(place / "made.json", conditions, make, fresh=self.fresh or not path.exists())
        return path, facts["sha256"]

    def _predicted(
        self, name: str, made: Future[tuple[Path, str]], source: Future[Any] | None = None
    ) -> dict[str, Any]:
        """Predict the held-out text, beside the source's predictions, which come first."""
        if source is not None:
            source.result()
        gone = source is None and not (self.folder / PREDICTIONS).exists()
        return self._measured("predict", name, made.result(), self.fresh or gone)

    def _asked(self, name: str, made: Future[tuple[Path, str]]) -> dict[str, Any]:
        """Ask the questions; a program that the source wrote too has its verdict already."""
        scores = self._place(name) / "scores"
        scores.mkdir(exist_ok=True)
        for verdicts in self.base.glob("scores/verdicts-*.jsonl"):
            if not (scores / verdicts.name).exists():
                shutil.copyfile(verdicts, scores / verdicts.name)
        return self._measured("ask", name, made.result(), self.fresh)

    def _measured(self, step: str, name: str, made: tuple[Path, str], fresh: bool) -> dict[str, Any]:
        """A step, done now in this thread's child or by an earlier run."""
        place, (path, sha256) = self._place(name), made
        job: dict[str, Any] = {
            "work": step,
            "sha256": sha256,
            "settings": asdict(self.settings),
            "fresh": fresh,
        }
        folders = {"path": path, "place": place, "base": self.base}
        job |= {folder: str(where.resolve()) for folder, where in folders.items()}
        note, conditions = place / f"{step}.json", {**self.conditions, "model": sha256}
        return remembered(note, conditions, lambda: self._worker.run(job, where=path), fresh=fresh)

    def rung(self, name: str, path: Path, asked: dict[str, Any]) -> Rung:
        """A rung from what its steps left."""
        place = self._place(name)
        tokens = pd.read_csv(place / "tokens.csv")
        routing = agreement(load_trace(self.base / "trace.npz"), load_trace(place / "trace.npz"))
        runs = tuple(SetRun.of(**answered) for answered in asked["sets"])
        curve = pd.DataFrame(asked["items"]), asked["boundary"]
        return Rung(name, open_shards(path).as_one, tokens, routing, runs, *curve)


def agreement(source: Trace, trace: Trace) -> pd.DataFrame:
    """How a rung routes the source's tokens: a row a chunk and layer.

    ``identical``: share of the ``n`` tokens with the same set of experts. ``overlap``: mean share of the k
    experts that both chose. ``hashed``: the layer chooses by token id.
    """
    size, layers = source.conditions["chunk_tokens"], source.layers
    n_chunks = source.n_tokens // size

    def by_chunk(values: Any) -> Any:  # (tokens, layers)
        return values.reshape(n_chunks, size, len(layers)).mean(axis=1).ravel()

    columns = {"chunk": np.repeat(np.arange(n_chunks), len(layers)), "layer": np.tile(layers, n_chunks)}
    columns |= {
        "hashed": np.tile(source.hashed, n_chunks),
        "identical": by_chunk(~differences(source, trace)),
    }
    return pd.DataFrame(columns | {"overlap": by_chunk(overlaps(source, trace))}).assign(n=size)


# ---- the child process ----


def predict(job: dict[str, Any]) -> dict[str, Any]:
    """Predictions and routing on the held-out text; the source's predictions are kept for the others."""
    settings, place, base = Settings(**job["settings"]), Path(job["place"]), Path(job["base"])
    opened = OpenSettings(n_ctx=settings.chunk_tokens, n_threads=settings.n_threads)
    with open_recorded(job["path"], opened, trial=False) as recorded:
        if place == base:
            tokens = divergence.load_text(settings.text).tokens(recorded.model)
            pieces = divergence.chunks(tokens, settings.chunk_tokens, settings.n_chunks, least=2)
        else:  # every rung has the source's tokenizer
            pieces = load_trace(base / "trace.npz").tokens.reshape(-1, settings.chunk_tokens).tolist()
        kept = base.parent / PREDICTIONS
        scored = divergence.beside_source(recorded, pieces, kept, is_source=place == base)
        write_table(place / "tokens.csv", scored, index=False)
        trace = recorded.trace(np.concatenate(pieces).tolist(), chunk_tokens=settings.chunk_tokens)
        trace.save(place / "trace.npz")
    return {"n_chunks": len(pieces)}


def ask(job: dict[str, Any]) -> dict[str, Any]:
    """Scores and the stability curve."""
    settings, place, fresh = Settings(**job["settings"]), Path(job["place"]), job["fresh"]
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
