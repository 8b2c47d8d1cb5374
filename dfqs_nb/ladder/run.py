"""Climb the ladder: quantize one model at ever fewer bits, and measure every rung in the same way.

Each rung is made from the same source and measured in a child process. A small model uses one thread, so as
many rungs are under way at once as there are cores. Speed is measured last, one rung at a time. What an
earlier run finished is read, not repeated.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import LifoQueue
from typing import TYPE_CHECKING, Any

from dfqs_nb.core import child
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import canonical_sha256, sha256_of_file, sha256_of_files
from dfqs_nb.core.journal import conditions_hash, remembered
from dfqs_nb.core.machine import available_memory, usable_cores
from dfqs_nb.gguf.facts import bits_per_weight, class_of, types_by_bytes
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.ladder import divergence, imatrix, quantizer
from dfqs_nb.ladder.measure import LONG, LadderError, Settings, collected, question_sets
from dfqs_nb.ladder.recipes import Recipe, load_recipe
from dfqs_nb.llama.settings import llama_version, threads_for
from dfqs_nb.routing import Trace, load_trace
from dfqs_nb.scores import SetRun

if TYPE_CHECKING:
    import pandas as pd

RUNGS = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "IQ2_XXS", "IQ1_M", "IQ1_S-XL")
FLAT = "/flat"  # behind a recipe's name: with an importance matrix in which every column weighs the same
FORMAT = 4  # of what is kept: raised when an older one must not be used
HELD_BYTES = 512 << 20  # of a child beside its model: context, Python and its libraries


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
    curve: pd.DataFrame = field(repr=False)
    boundary: dict[str, Any] = field(repr=False)
    speed: dict[str, Any] = field(repr=False, default_factory=dict)  # of decode, tokens a second
    long: divergence.Tokens | None = field(repr=False, default=None)  # in windows of longer texts

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

    A rung that llama.cpp refuses or dies of is named in ``failed`` and does not end the climb.

    Args:
        source: a GGUF with F16, BF16 or F32 weights, or a shard of it: the first rung, as it is.
        rungs: names (or files) of recipes; ``/flat`` behind one: with an importance matrix in which every
            column weighs the same. The source's own type among them is passed over.
        matrix: an importance matrix; collected by default.

    Raises:
        LadderError: the source itself cannot be measured.
        QuantizeError, PromptError, TextError: no such recipe, set or text, or it is too short.
    """
    settings, folder, shards = settings or Settings(), Path(folder), open_shards(source)
    folder.mkdir(parents=True, exist_ok=True)
    settings = replace(settings, n_threads=settings.n_threads or threads_for(shards.paths[0]))
    top = next(iter(types_by_bytes(shards.as_one.tensors)))  # F16, BF16 or F32, checked at the first rung
    recipes = {}
    for name in (name for name in rungs if name != top):
        recipe = load_recipe(name.removesuffix(FLAT))
        recipes[recipe.name + (FLAT if name.endswith(FLAT) else "")] = recipe
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
        self.n_workers = n_workers(shards, settings.n_threads)
        self.workers: LifoQueue[child.Worker] = LifoQueue()
        for _ in range(self.n_workers):
            self.workers.put(self.enter_context(child.Worker(quantizer.CHILD)))
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
        """Make and measure all rungs, as many at once as this machine holds; then time them one by one.

        Every task waits only for tasks that were submitted before it, so one worker is enough.
        """
        pool, rungs = ThreadPoolExecutor(self.n_workers), dict[str, Rung]()
        try:
            source = pool.submit(self._measured, top, self.source, self.sha256, None)
            matrix = pool.submit(self._matrix, recipes)
            others = {name: pool.submit(self._rung, name, recipes[name], matrix, source) for name in recipes}
            for name, future in {top: source, **others}.items():
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
        speeds = self._speeds(rungs)
        if top not in speeds:
            what = f"the source cannot be timed: {self.failed[top]}"
            raise LadderError(what, where=self.source, hint="close other programs, and run it again")
        return tuple(replace(rung, speed=speeds[name]) for name, rung in rungs.items() if name in speeds)

    @contextmanager
    def _worker(self) -> Iterator[child.Worker]:
        worker = self.workers.get()
        try:
            yield worker
        finally:
            self.workers.put(worker)

    def _place(self, name: str) -> Path:
        place = self.folder / re.sub(r"[^\w.-]", "-", name)
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _matrix(self, recipes: Mapping[str, Recipe]) -> imatrix.ImportanceMatrix | None:
        """The importance matrix, where a rung needs one."""
        if not any(recipe.weights and not name.endswith(FLAT) for name, recipe in recipes.items()):
            return None
        known: dict[str, Any] = {"given": self.given, "source_sha256": self.sha256, "fresh": self.fresh}
        return collected(self.source, self.folder, self.settings, **known)

    def _made(
        self, name: str, recipe: Recipe, collected: Future[imatrix.ImportanceMatrix | None]
    ) -> tuple[Path, str]:
        """The rung's model file (made now, or by an earlier run) and its SHA-256."""
        matrix = None
        if recipe.weights:
            matrix = imatrix.uniform(self.shards.as_one) if name.endswith(FLAT) else collected.result()
        path = self._place(name) / "model.gguf"
        note = path.with_name("made.json")

        def make() -> dict[str, Any]:
            for torn in path.parent.glob(f".{path.name}.*.part"):  # left by a kill
                torn.unlink()
            how: dict[str, Any] = {"n_threads": self.settings.n_threads, "overwrite": True}
            with self._worker() as worker:
                how |= {"progress": False, "source_sha256": self.sha256, "worker": worker}
                done = quantizer.quantize(self.source, recipe, path, imatrix=matrix, **how)
            return {"nbytes": done.nbytes, "sha256": sha256_of_file(path), "notes": done.notes}

        conditions = {"source": self.sha256, "recipe": asdict(recipe), "runtime": llama_version()}
        conditions |= {"matrix": "" if matrix is None else matrix.sha256}
        facts = remembered(note, conditions, make, fresh=self.fresh or not path.exists())
        if facts.get("nbytes") != path.stat().st_size:  # the file is no longer what was made
            facts = remembered(note, conditions, make, fresh=True)
        return path, facts["sha256"]

    def _rung(
        self,
        name: str,
        recipe: Recipe,
        collected: Future[imatrix.ImportanceMatrix | None],
        source: Future[Rung],
    ) -> Rung:
        path, sha256 = self._made(name, recipe, collected)
        base = source.result()  # its predictions are compared with the source's
        scored = self._place(name) / "scores"
        scored.mkdir(exist_ok=True)
        for verdicts in self._place(base.name).glob("scores/verdicts-*.jsonl"):
            # a program that the source wrote too has its verdict already
            if not (scored / verdicts.name).exists():
                shutil.copyfile(verdicts, scored / verdicts.name)
        return self._measured(name, path, sha256, base)

    def _measured(self, name: str, path: Path, sha256: str, base: Rung | None) -> Rung:
        """Measure a rung in a child, or load an earlier measurement; the speed comes later."""
        import pandas as pd

        place, reference = self._place(name), self.folder / "reference.npy"
        conditions = {**self.conditions, "model": sha256, "base": base.sha256 if base else ""}
        # the source's predictions, with which all others are compared, may have been deleted
        kept = {reference: "tokens.npz", reference.with_name(LONG): "long.npz"}
        lost = [mine for array, mine in kept.items() if (place / mine).exists() and not array.exists()]
        gone = base is None and bool(lost)
        for note in place.glob("predicted*.json") if gone else ():
            note.unlink()

        def measured() -> dict[str, Any]:
            files = {"path": path, "place": place, "reference": reference}
            job: dict[str, Any] = {name: str(file.resolve()) for name, file in files.items()}
            job |= {"work": "measure", "key": conditions_hash(conditions), "is_source": base is None}
            job |= {"sha256": sha256, "settings": asdict(self.settings), "fresh": self.fresh}
            with self._worker() as worker:
                return worker.run(job, where=path)

        facts = remembered(place / "rung.json", conditions, measured, fresh=self.fresh or gone)
        predicted = divergence.Tokens.load(place / "tokens.npz"), load_trace(place / "trace.npz")
        runs = tuple(SetRun.of(**answered) for answered in facts["sets"])
        curve = pd.DataFrame(facts["items"]), pd.DataFrame(facts["curve"]), facts["boundary"]
        long = divergence.Tokens.load(place / "long.npz") if facts["n_long"] else None
        return Rung(name, path, sha256, open_shards(path).as_one, *predicted, runs, *curve, long=long)

    def _speeds(self, rungs: Mapping[str, Rung]) -> dict[str, dict[str, Any]]:
        """The decode speed of each rung, one after another in one child, while nothing else of ours runs."""
        names = ("n_threads", "speed_depth", "speed_tokens", "speed_repetitions")
        conditions = {name: getattr(self.settings, name) for name in names}
        conditions |= {"runtime": llama_version(), "models": {name: r.sha256 for name, r in rungs.items()}}

        def timed() -> dict[str, Any]:
            speeds, failed = {}, {}
            with self._worker() as worker:
                for name, rung in rungs.items():
                    job = {"path": str(rung.path.resolve()), "settings": asdict(self.settings)}
                    try:
                        speeds[name] = worker.run({"work": "time", **job}, where=rung.path)
                    except DfqsError as error:
                        failed[name] = str(error)
            return {"speeds": speeds, "failed": failed}

        facts = remembered(self.folder / "speeds.json", conditions, timed, fresh=self.fresh)
        if facts["failed"]:  # next time may go well
            (self.folder / "speeds.json").unlink()
        self.failed |= facts["failed"]
        speeds: dict[str, dict[str, Any]] = facts["speeds"]
        return speeds
