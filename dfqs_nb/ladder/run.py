"""Climb the ladder: quantize one model at ever fewer bits, and measure every rung in the same way.

Each rung is made from the same source and measured in a child process: predictions beside the source's
(`divergence`), the experts that its routers choose, scores, and retrieval at growing lengths. A small model
uses one thread, so as many rungs are under way at once as there are cores. Speed is measured last, one rung
at a time, while nothing else runs. What an earlier run finished is read, not repeated.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.core import child
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import sha256_of_file, sha256_of_files
from dfqs_nb.core.journal import conditions_hash, remembered
from dfqs_nb.core.machine import available_memory, usable_cores
from dfqs_nb.gguf.facts import bits_per_weight, class_of, types_by_bytes
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.ladder import divergence, imatrix, quantizer
from dfqs_nb.ladder.measure import LadderError, Settings, collected, question_sets
from dfqs_nb.ladder.recipes import Recipe, load_recipe
from dfqs_nb.llama.settings import llama_version, threads_for
from dfqs_nb.routing import Trace, load_trace
from dfqs_nb.scores import Answerer, Options, SetRun

if TYPE_CHECKING:
    import pandas as pd

RUNGS = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "IQ2_XXS", "IQ1_M", "IQ1_S-XL")
FLAT = "/flat"  # behind a recipe's name: with an importance matrix in which every column weighs the same
FORMAT = 2  # of what is kept: raised when an older one must not be used
HELD_BYTES = 512 << 20  # of a child beside its model: context, Python and its libraries
CHILD = "dfqs_nb.ladder"


class ReferenceGone(LadderError):
    """The source is measured, but its predictions, which rungs are compared with, are not there."""


@dataclass(frozen=True)
class Rung:
    """One rung, measured.

    Attributes:
        header: of the rung's model, all shards as one.
        made_seconds: what its quantization took; 0 for the source.
        tokens: predictions beside the source's, of every scored token.
        trace: the experts chosen on the held-out text.
        runs: a set of questions each.
        items: of the stability curve, one row a question.
        curve, boundary: see ``context``.
        speed: decode tokens a second: ``median``, ``min``, ``max``, ``repetitions``, ``contended``.
    """

    name: str
    path: Path
    header: GGUFHeader = field(repr=False)
    made_seconds: float
    tokens: divergence.Tokens = field(repr=False)
    trace: Trace = field(repr=False)
    runs: tuple[SetRun, ...] = field(repr=False)
    items: pd.DataFrame = field(repr=False)
    curve: pd.DataFrame = field(repr=False)
    boundary: dict[str, Any] = field(repr=False)
    speed: dict[str, Any] = field(repr=False)

    @property
    def bits_per_weight(self) -> float:
        """Over all weights."""
        return bits_per_weight(self.header.tensors)

    @property
    def expert_bits(self) -> float:
        """Over the routed experts' weights; NaN for a dense model."""
        return bits_per_weight([t for t in self.header.tensors if class_of(t.name) == "routed experts"])


@dataclass(frozen=True)
class Ladder:
    """The rungs, the source first.

    Attributes:
        failed: why a rung is missing, by name.
        n_made: rungs that this call quantized.
    """

    rungs: tuple[Rung, ...]
    settings: Settings
    conditions: dict[str, Any] = field(repr=False)
    failed: dict[str, str] = field(default_factory=dict)
    n_made: int = 0

    @property
    def source(self) -> Rung:
        """The rung that all others are made from and compared with."""
        return self.rungs[0]

    def __getitem__(self, name: str) -> Rung:
        return next(rung for rung in self.rungs if rung.name == name)


# ---- climbing ----


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
        rungs: names (or files) of recipes; ``/flat`` behind one replaces the importance matrix by one in
            which every column weighs the same. The source's own type among them is passed over.
        matrix: an importance matrix; collected by default.
        fresh: do everything again.

    Raises:
        LadderError: the source itself cannot be measured, or its predictions are gone from ``folder``.
        QuantizeError: no such recipe.
        PromptError, TextError: a text or a set is missing or too short.
    """
    settings, folder = settings or Settings(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = open_shards(source)
    threads = settings.n_threads or threads_for(shards.paths[0])
    settings = replace(settings, n_threads=threads)
    top = next(iter(types_by_bytes(shards.as_one.tensors)))  # F16, BF16 or F32, checked at the first rung
    climber = _Climber(shards, folder, settings, matrix, fresh)
    recipes = _recipes([name for name in rungs if name != top])
    with tqdm(total=1 + len(recipes), desc="rungs", disable=not progress) as bar:
        measured = climber.climb(top, recipes, bar.update)
    return Ladder(tuple(measured), settings, climber.conditions, climber.failed, len(climber.made))


def _recipes(names: Sequence[str]) -> dict[str, Recipe]:
    """The recipes by the names of their rungs: the recipe's own name, and ``/flat`` where it was asked."""
    recipes = {}
    for name in names:
        recipe = load_recipe(name.removesuffix(FLAT))
        recipes[recipe.name + (FLAT if name.endswith(FLAT) else "")] = recipe
    return recipes


def folder_name(rung: str) -> str:
    """A rung's folder.

    >>> folder_name("IQ1_S-XL/flat")
    'IQ1_S-XL-flat'
    """
    return re.sub(r"[^\w.-]", "-", rung)


def _n_workers(shards: ShardSet, n_threads: int) -> int:
    """Rungs under way at once: as the cores allow, and as memory holds their models beside each other."""
    held = available_memory().available_bytes // (2 * shards.nbytes + HELD_BYTES)
    return max(1, min(usable_cores() // n_threads, held))


def _matrix_sha256(matrix: imatrix.ImportanceMatrix) -> str:
    digest = hashlib.sha256()
    for name, entry in sorted(matrix.entries.items()):
        digest.update(name.encode() + entry.sums.tobytes() + entry.counts.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Measured:
    """A rung's folder, its model file, and the facts that its child left."""

    place: Path
    path: Path
    sha256: str
    made_seconds: float
    facts: dict[str, Any]


class _Climber:
    """One climb: what its steps share, and which rungs failed."""

    def __init__(
        self,
        shards: ShardSet,
        folder: Path,
        settings: Settings,
        matrix: str | Path | None,
        fresh: bool,
    ) -> None:
        self.shards, self.folder, self.settings = shards, folder, settings
        self.given, self.fresh = matrix, fresh
        self.source, self.sha256 = shards.paths[0], sha256_of_files(shards.paths)
        self.sets = question_sets(settings)
        self.conditions = {
            **asdict(settings),
            "source_sha256": self.sha256,
            "runtime": f"llama-cpp-python {llama_version()}",
            "sets": [chosen.identity() | {"items": len(chosen.items)} for chosen in self.sets],
            "held_out": divergence.load_text(settings.text).name,
            "format": FORMAT,
        }
        self.failed: dict[str, str] = {}
        self.made: list[str] = []

    def climb(self, top: str, recipes: Mapping[str, Recipe], on_rung: Callable[[], object]) -> list[Rung]:
        """Make and measure all rungs, as many at once as this machine holds; then time one after another.

        The rungs are made while the source is measured; each is measured once it and the source are ready.
        Every task waits only for tasks that were submitted before it, so one worker is enough.
        """
        matrix = self._matrix(recipes)
        pool = ThreadPoolExecutor(_n_workers(self.shards, self.settings.n_threads))
        measured: dict[str, _Measured] = {}
        try:
            source = pool.submit(self._measured, top, self.source, self.sha256, "")
            making = {name: pool.submit(self._made, name, recipes[name], matrix) for name in recipes}
            rungs = {name: pool.submit(self._rung, name, making[name], source) for name in recipes}
            for name, future in {top: source, **rungs}.items():
                try:
                    measured[name] = future.result()
                except ReferenceGone:
                    raise
                except DfqsError as error:
                    if name == top:
                        what = f"the source cannot be measured: {error}"
                        raise LadderError(what, where=self.source, hint="open it in notebook 03") from error
                    self.failed[name] = str(error)
                on_rung()
        except BaseException:
            child.end_all()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        speeds = self._speeds({name: (rung.path, rung.sha256) for name, rung in measured.items()})
        return [self._loaded(name, rung, speeds[name]) for name, rung in measured.items() if name in speeds]

    def _place(self, name: str) -> Path:
        place = self.folder / folder_name(name)
        place.mkdir(parents=True, exist_ok=True)
        return place

    # -- making --

    def _matrix(self, recipes: Mapping[str, Recipe]) -> Future[imatrix.ImportanceMatrix]:
        """The importance matrix, where a rung needs one, or the error that each of these rungs ends with."""
        matrix: Future[imatrix.ImportanceMatrix] = Future()
        if any(recipe.weights and not name.endswith(FLAT) for name, recipe in recipes.items()):
            try:
                matrix.set_result(
                    collected(
                        self.source,
                        self.folder,
                        self.settings,
                        given=self.given,
                        source_sha256=self.sha256,
                        fresh=self.fresh,
                        progress=False,
                    )
                )
            except DfqsError as error:
                matrix.set_exception(error)
        return matrix

    def _made(
        self, name: str, recipe: Recipe, collecting: Future[imatrix.ImportanceMatrix]
    ) -> tuple[Path, dict[str, Any]]:
        """The rung's model file, made now or before, and what is known of it."""
        matrix = None
        if recipe.weights:
            matrix = imatrix.uniform(self.shards.as_one) if name.endswith(FLAT) else collecting.result()
        path = self._place(name) / "model.gguf"
        note = path.with_name("made.json")

        def make() -> dict[str, Any]:
            self.made.append(name)
            for torn in path.parent.glob(f".{path.name}.*.part"):  # left by a kill
                torn.unlink()
            done = quantizer.quantize(
                self.source,
                recipe,
                path,
                imatrix=matrix,
                n_threads=self.settings.n_threads,
                overwrite=True,
                progress=False,
            )
            facts = {"nbytes": done.nbytes, "seconds": round(done.seconds, 2), "sha256": sha256_of_file(path)}
            return facts | {"notes": done.plan.notes}

        conditions = {
            "source": self.sha256,
            "recipe": asdict(recipe),
            "matrix": "" if matrix is None else _matrix_sha256(matrix),
            "runtime": llama_version(),
        }
        facts = remembered(note, conditions, make, fresh=self.fresh or not path.exists())
        if facts.get("nbytes") != path.stat().st_size:  # the file is no longer what was made
            facts = remembered(note, conditions, make, fresh=True)
        return path, facts

    # -- measuring --

    def _rung(
        self, name: str, making: Future[tuple[Path, dict[str, Any]]], source: Future[_Measured]
    ) -> _Measured:
        path, made = making.result()
        base = source.result()  # this rung's predictions are compared with the source's
        scored = self._place(name) / "scores"
        scored.mkdir(exist_ok=True)
        for verdicts in base.place.glob("scores/verdicts-*.jsonl"):
            # a program that the source wrote too has its verdict already
            if not (scored / verdicts.name).exists():
                shutil.copyfile(verdicts, scored / verdicts.name)
        rung = self._measured(name, path, made["sha256"], self.sha256)
        return replace(rung, made_seconds=made["seconds"])

    def _measured(self, name: str, path: Path, sha256: str, base_sha256: str) -> _Measured:
        """A rung with what a child measured of it, now or before."""
        place, reference = self._place(name), self.folder / "reference.npy"
        conditions = {**self.conditions, "model": sha256, "base": base_sha256}

        def measure() -> dict[str, Any]:
            if base_sha256 and not reference.exists():
                raise ReferenceGone(
                    "the source's predictions are gone",
                    where=reference,
                    hint="set fresh = True in notebook 08: the source is then measured again",
                )
            (place / "rung.json").unlink(missing_ok=True)  # it would vouch for what is replaced from here on
            job = {
                "work": "measure",
                "key": conditions_hash(conditions),
                "path": str(path.resolve()),
                "place": str(place.resolve()),
                "reference": str(reference.resolve()),
                "is_source": not base_sha256,
                "sha256": sha256,
                "settings": asdict(self.settings),
                "fresh": self.fresh,
            }
            return child.run(CHILD, job, where=path)

        facts = remembered(place / "rung.json", conditions, measure, fresh=self.fresh)
        return _Measured(place, path, sha256, 0.0, facts)

    def _speeds(self, models: Mapping[str, tuple[Path, str]]) -> dict[str, dict[str, Any]]:
        """The decode speed of each rung, one after another in one child, while nothing else of ours runs."""
        names = ("n_threads", "speed_depth", "speed_tokens", "speed_repetitions")
        conditions = {name: getattr(self.settings, name) for name in names}
        conditions |= {"runtime": llama_version(), "models": {name: models[name][1] for name in models}}

        def measure() -> dict[str, Any]:
            todo = {name: str(path.resolve()) for name, (path, _) in models.items()}
            failed: dict[str, str] = {}
            while True:
                try:
                    job = {"work": "time", "paths": todo, "settings": asdict(self.settings)}
                    return {**child.run(CHILD, job), "failed": failed}
                except child.ChildDied as error:  # the others are timed again, without this one
                    if not error.messages:
                        raise
                    name = error.messages[-1]["timing"]
                    failed[name] = str(error)
                    del todo[name]

        facts = remembered(self.folder / "speeds.json", conditions, measure, fresh=self.fresh)
        self.failed |= facts["failed"]
        speeds: dict[str, dict[str, Any]] = facts["speeds"]
        return speeds

    def _loaded(self, name: str, rung: _Measured, speed: dict[str, Any]) -> Rung:
        """A rung from what its child wrote."""
        import pandas as pd

        place, facts, asked = rung.place, rung.facts, rung.facts["scores"]
        runs = tuple(
            Answerer(_no_answer, asked[chosen.name]["mode"], asked[chosen.name], rung.sha256).score(
                chosen, place / "scores", Options(progress=False)
            )
            for chosen in self.sets
            if chosen.name in asked
        )
        return Rung(
            name,
            rung.path,
            open_shards(rung.path).as_one,
            rung.made_seconds,
            divergence.Tokens.load(place / "tokens.npz"),
            load_trace(place / "trace.npz"),
            runs,
            pd.DataFrame(facts["items"]),
            pd.DataFrame(facts["curve"]),
            facts["boundary"],
            speed,
        )


def _no_answer(*_arguments: Any) -> Any:
    raise LadderError("an answer is missing from the rung's journal", hint="set fresh = True in notebook 08")
