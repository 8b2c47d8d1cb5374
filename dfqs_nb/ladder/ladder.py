"""Climb the quantization ladder: one model at ever fewer bits, each rung measured the same way.

Every rung is quantized from the same source and measured in a child process of its own: predictions against
the source's (`divergence`), the experts its routers chose (`routing`), scores, the stability curve and the
failure boundary, and speed. What is finished is kept and not done again. Rungs are compared in pairs, on the
same chunks, items and haystacks.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb import routing
from dfqs_nb.context import curve as long_context
from dfqs_nb.context.boundary import Counts, boot_boundaries, crossing
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import whole_file, write_json
from dfqs_nb.core.journal import conditions_hash
from dfqs_nb.core.machine import watched_load
from dfqs_nb.core.paths import data_dir
from dfqs_nb.core.stage import write_stage
from dfqs_nb.gguf.facts import bits_per_weight, class_of, class_sizes, types_by_bytes
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.ladder import divergence, imatrix, quantize
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama import timing as llama_timing
from dfqs_nb.llama.settings import OpenSettings, llama_version
from dfqs_nb.scores import Answerer, ItemSet, Options, SetRun, compare_runs, find_sandbox, score_set
from dfqs_nb.stats import LEAST_VALUES, LEVEL, bootstrap_weights, expanded_tail, mean_interval

if TYPE_CHECKING:
    import pandas as pd

RUNGS = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "IQ2_XXS", "IQ1_M", "IQ1_S-XL")
FLAT = "/flat"  # behind a recipe's name: with an importance matrix that says nothing
# The hierarchy that DFQS 1.0 states. GGUF has no 8-bit floats; Q8_0 is the nearest.
LEVELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("FP16/FP8", ("F32", "BF16", "F16", "Q8_0")),
    ("Q4-Q6", ("Q6_K", "Q5_K_M", "Q4_K_M")),
    ("IQ2", ("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS")),
    ("IQ1_S-XL", ("IQ1_S-XL",)),
)
FIDELITY, SAME = "KL divergence", "no evidence of a difference"
N_BOOT = 20_000
FORMAT = 1  # of what is kept: raised when an older one must not be used


class LadderError(DfqsError):
    """The ladder cannot be climbed."""


@dataclass(frozen=True)
class Settings:
    """What every rung is measured with.

    Args:
        text: a prompt set with ``calibration`` and ``held_out``, or a text file to measure on.
        chunk_tokens, n_chunks: of the held-out text; half of each chunk is scored.
        calibration: a text file to collect the importance matrix on; empty: the prompt set's part.
        calibration_tokens, calibration_chunks: tokens of a chunk, and the most chunks.
        tier, max_items: the sets of questions, and how many of each, spread evenly over its families; 0: all.
        prompt_set, longest, n_haystacks: of the stability curve; ``budget_seconds``: 0: no limit.
        speed_depth, speed_tokens, speed_repetitions: of the decode speed.
        n_ctx, n_threads: context of the questions, and threads; 0 threads: as suits the source's size.
        allow_unsandboxed: score code even without a sandbox.
    """

    text: str = "calibration-nano"
    chunk_tokens: int = 256
    n_chunks: int = 16
    calibration: str = ""
    calibration_tokens: int = imatrix.CHUNK_TOKENS
    calibration_chunks: int = 24
    tier: str = "nano"
    max_items: int = 64
    prompt_set: str = "long-context-nano"
    longest: int = 512
    n_haystacks: int = 6
    budget_seconds: float = 0.0
    speed_depth: int = 256
    speed_tokens: int = 64
    speed_repetitions: int = 3
    n_ctx: int = 1024
    n_threads: int = 0
    allow_unsandboxed: bool = False


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
        curve, boundary: see ``long_context``.
        speed: decode tokens a second: ``median``, ``min``, ``max``, ``repetitions``, ``contended``.
    """

    name: str
    path: Path
    header: GGUFHeader = field(repr=False)
    made_seconds: float
    tokens: divergence.Tokens = field(repr=False)
    trace: routing.Trace = field(repr=False)
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
        return bits_per_weight([one for one in self.header.tensors if class_of(one.name) == "routed experts"])

    @property
    def divergence(self) -> divergence.Divergence:
        """Perplexity, KL divergence and top-token agreement with their intervals."""
        return divergence.summarize(self.tokens)

    def counts(self) -> Counts:
        """Right answers by haystack and length."""
        return Counts.of(self.items)


@dataclass(frozen=True)
class Ladder:
    """The rungs, the source first. ``failed``: why a rung is missing, by name."""

    rungs: tuple[Rung, ...]
    settings: Settings
    conditions: dict[str, Any] = field(repr=False)
    failed: dict[str, str] = field(default_factory=dict)
    n_made: int = 0

    @property
    def source(self) -> Rung:
        """The rung that all others are made from and measured against."""
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
        rungs: names (or files) of recipes; ``/flat`` behind one replaces the importance matrix by one that
            says nothing. The source's own type among them is passed over.
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
    settings = replace(settings, n_threads=settings.n_threads or llama_model.threads_for(shards.paths[0]))
    top = _own_type(shards.as_one)
    recipes = _recipes([name for name in rungs if name != top])
    sha256 = quantize.source_sha256(shards.paths)
    base = _measured(top, shards.paths[0], sha256, folder, settings, "", fresh)
    if isinstance(base, str):
        raise LadderError(
            f"the source cannot be measured: {base}", where=source, hint="open it in notebook 03"
        )
    found, failed, n_made = [base], {}, 0
    for name, recipe in tqdm(recipes.items(), desc="rungs", disable=not progress):
        place = folder / _file_name(name)
        place.mkdir(parents=True, exist_ok=True)
        try:
            given = _matrix_for(name, recipe, shards, folder, settings, matrix, sha256, fresh)
            path, made = _made(recipe, shards, place, given, sha256, fresh)
        except DfqsError as error:
            failed[name] = str(error)
            continue
        n_made += not made["reused"]
        one = _measured(name, path, made["sha256"], folder, settings, sha256, fresh, made["seconds"])
        failed |= {name: one} if isinstance(one, str) else {}
        found += [] if isinstance(one, str) else [one]
    return Ladder(tuple(found), settings, _conditions(settings, sha256), failed, n_made)


def _own_type(header: GGUFHeader) -> str:
    """The type of most bytes: F16, BF16 or F32; checked, like the rest, when the first rung is made."""
    return next(iter(types_by_bytes(header.tensors)))


def _recipes(names: Sequence[str]) -> dict[str, quantize.Recipe]:
    """The recipes by what their rungs are called: the recipe's own name, and ``/flat`` where it was asked."""
    found = {}
    for name in names:
        recipe = quantize.load_recipe(name.removesuffix(FLAT))
        found[recipe.name + (FLAT if name.endswith(FLAT) else "")] = recipe
    return found


def _file_name(name: str) -> str:
    """A rung's folder.

    >>> _file_name("IQ1_S-XL/flat")
    'IQ1_S-XL-flat'
    """
    return "".join(c if c.isalnum() or c in "_.-" else "-" for c in name)


def _conditions(settings: Settings, source_sha256: str) -> dict[str, Any]:
    chosen = _sets(settings)
    return {
        **asdict(settings),
        "source_sha256": source_sha256,
        "runtime": f"llama-cpp-python {llama_version()}",
        "sets": [one.identity() | {"items": len(one.items)} for one in chosen],
        "held_out": divergence.load_text(settings.text).name,
        "format": FORMAT,
    }


def _matrix_for(
    name: str,
    recipe: quantize.Recipe,
    shards: Any,
    folder: Path,
    settings: Settings,
    given: str | Path | None,
    source_sha256: str,
    fresh: bool,
) -> imatrix.ImportanceMatrix | None:
    """The importance matrix of a rung: none, flat, given, or collected once for all rungs."""
    if not recipe.weights:
        return None
    if name.endswith(FLAT):
        return imatrix.flat(shards.as_one)
    if given:
        return imatrix.read_imatrix(given)
    return collected(shards.paths[0], folder, settings, source_sha256, fresh=fresh)


def collected(
    source: str | Path,
    folder: str | Path,
    settings: Settings,
    source_sha256: str = "",
    *,
    fresh: bool = False,
) -> imatrix.ImportanceMatrix:
    """The importance matrix over the calibration text, from ``folder/imatrix.gguf`` where it is there.

    Raises:
        LadderError: there is no text but the one to measure on.
    """
    path, source = Path(folder) / "imatrix.gguf", Path(source)
    if not settings.calibration and Path(settings.text).suffix:
        raise LadderError(
            "the held-out text would also be the calibration text",
            where=settings.text,
            hint="give calibration a text of its own, or an importance matrix",
        )
    text = divergence.load_text(settings.calibration or settings.text, "calibration")
    source_sha256 = source_sha256 or quantize.source_sha256(open_shards(source).paths)
    key = conditions_hash(
        {
            "source": source_sha256,
            "text": text.name,
            "tokens": settings.calibration_tokens,
            "chunks": settings.calibration_chunks,
            "runtime": llama_version(),
            "words": hashlib.sha256(repr(text.documents).encode()).hexdigest(),
        }
    )
    dataset = f"{text.name} {key}"
    if path.exists() and not fresh:
        found = imatrix.read_imatrix(path)
        if found.datasets == (dataset,):
            return found
    matrix = calibrated(source, text, settings, dataset)
    return imatrix.write_imatrix(path, matrix)


def calibrated(
    source: str | Path, text: divergence.Text, settings: Settings, dataset: str = "", *, progress: bool = True
) -> imatrix.ImportanceMatrix:
    """An importance matrix over this text: at most ``calibration_chunks`` chunks of ``calibration_tokens``.

    Args:
        dataset: what the text is called in the matrix; its name where not given.

    Raises:
        ImatrixError, ModelError, DecodeError: as ``imatrix.collect``.
    """
    threads = settings.n_threads or llama_model.threads_for(source)
    opened = OpenSettings(n_ctx=settings.calibration_tokens, n_threads=threads)
    with llama_model.open_model(source, replace(opened, n_ctx=256)) as model:
        tokens = text.tokens(model)
    tokens = tokens[: settings.calibration_tokens * settings.calibration_chunks]
    return imatrix.collect(
        source,
        tokens,
        dataset=dataset or text.name,
        chunk_tokens=settings.calibration_tokens,
        settings=opened,
        progress=progress,
    )


def _made(
    recipe: quantize.Recipe,
    shards: Any,
    place: Path,
    matrix: imatrix.ImportanceMatrix | None,
    source_sha256: str,
    fresh: bool,
) -> tuple[Path, dict[str, Any]]:
    """The rung's model file, made now or before, and what is known of it."""
    path, note = place / "model.gguf", place / "made.json"
    used = "" if matrix is None else _matrix_hash(matrix)
    key = conditions_hash(
        {
            "source": source_sha256,
            "recipe": asdict(recipe),
            "matrix": used,
            "runtime": llama_version(),
            "format": FORMAT,
        }
    )
    if not fresh and path.exists() and note.exists():
        known = json.loads(note.read_text(encoding="utf-8"))
        if known.get("key") == key and known.get("nbytes") == path.stat().st_size:
            return path, known | {"reused": True}
    for torn in place.glob(f".{path.name}.*.part"):  # left by a kill
        torn.unlink()
    done = quantize.quantize(shards.paths[0], recipe, path, imatrix=matrix, overwrite=True, progress=False)
    facts = {
        "key": key,
        "nbytes": done.nbytes,
        "seconds": round(done.seconds, 2),
        "sha256": quantize.source_sha256([path]),
        "fallbacks": done.plan.fallbacks,
    }
    write_json(note, facts)
    return path, facts | {"reused": False}


def _matrix_hash(matrix: imatrix.ImportanceMatrix) -> str:
    digest = hashlib.sha256()
    for name, entry in sorted(matrix.entries.items()):
        digest.update(name.encode() + entry.sums.tobytes() + entry.counts.tobytes())
    return digest.hexdigest()


def _measured(
    name: str,
    path: Path,
    sha256: str,
    folder: Path,
    settings: Settings,
    base_sha256: str,
    fresh: bool,
    made_seconds: float = 0.0,
) -> Rung | str:
    """The rung, measured now or before; or why it could not be."""
    place = folder / _file_name(name)
    place.mkdir(exist_ok=True)
    key = conditions_hash({**_conditions(settings, base_sha256), "model": sha256})
    done = place / "rung.json"
    known = json.loads(done.read_text(encoding="utf-8")) if done.exists() and not fresh else {}
    if known.get("key") != key:
        base = "" if not base_sha256 else str((folder / "reference.npy").resolve())
        job = {
            "key": key,
            "path": str(path.resolve()),
            "place": str(place.resolve()),
            "base": base,
            "sha256": sha256,
            "settings": asdict(settings),
            "fresh": fresh,
            "reference": str((folder / "reference.npy").resolve()),
        }
        if base and not Path(base).exists():
            raise LadderError(
                "the source's predictions are gone",
                where=base,
                hint="climb again with fresh=True: the source is then measured again",
            )
        try:
            quantize.run_child("dfqs_nb.ladder.ladder", job, path)
        except DfqsError as error:
            return str(error)
        known = json.loads(done.read_text(encoding="utf-8"))
    return _loaded(name, path, place, known, settings, made_seconds, sha256)


def _loaded(
    name: str,
    path: Path,
    place: Path,
    known: dict[str, Any],
    settings: Settings,
    made_seconds: float,
    sha256: str,
) -> Rung:
    """A rung from what its child wrote."""
    import pandas as pd

    runs = tuple(
        Answerer(_no_answer, known["scores"][one.name]["mode"], known["scores"][one.name], sha256).score(
            one, place / "scores", Options(progress=False)
        )
        for one in _sets(settings)
        if one.name in known["scores"]
    )
    return Rung(
        name,
        path,
        open_shards(path).as_one,
        made_seconds,
        divergence.Tokens.load(place / "tokens.npz"),
        routing.load_trace(place / "trace.npz"),
        runs,
        pd.DataFrame(known["items"]),
        pd.DataFrame(known["curve"]),
        known["boundary"],
        known["speed"],
    )


def _no_answer(*_arguments: Any) -> Any:
    raise LadderError("an answer is missing from the rung's journal", hint="climb again with fresh=True")


def _sets(settings: Settings) -> list[ItemSet]:
    """The tier's sets, each cut to its share of questions; code only where it can be run."""
    chosen = ItemSet.of_tier(settings.tier)
    runs_code = find_sandbox().safe or settings.allow_unsandboxed
    return [_part_of(one, settings.max_items) for one in chosen if one.kind != "code" or runs_code]


def _part_of(item_set: ItemSet, max_items: int) -> ItemSet:
    """The first questions of each family, as many of each, under a name of its own."""
    if not max_items or max_items >= len(item_set.items):
        return item_set
    each, taken = max(1, max_items // len(item_set.families())), {}
    items = []
    for item in item_set.items:
        taken[item.family] = taken.get(item.family, 0) + 1
        items += [item] if taken[item.family] <= each else []
    return replace(item_set, name=f"{item_set.name}-{len(items)}", items=tuple(items))


# ---- the child process ----


def main() -> int:
    """Read a job from standard input, measure one model, and write ``rung.json`` last."""
    job = quantize.read_job()
    settings, place = Settings(**job["settings"]), Path(job["place"])
    (place / "rung.json").unlink(missing_ok=True)  # it would vouch for what is replaced from here on
    try:
        _predict(job, settings, place)
        facts = _ask(job, settings, place)
        write_json(place / "rung.json", {"key": job["key"], **facts})
        answer: dict[str, Any] = {"done": True}
    except DfqsError as error:
        answer = {"failed": error.what, "hint": error.hint}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def _predict(job: dict[str, Any], settings: Settings, place: Path) -> None:
    """Predictions and routing on the held-out text; the source's predictions are kept for the others."""
    note = place / "predicted.json"
    if note.exists() and not job["fresh"] and json.loads(note.read_text())["key"] == job["key"]:
        return
    note.unlink(missing_ok=True)
    opened = OpenSettings(n_ctx=settings.chunk_tokens, n_threads=settings.n_threads)
    base = np.load(job["base"], mmap_mode="r") if job["base"] else None
    found: list[tuple[np.ndarray, ...]] = []

    with (
        whole_file(job["reference"], "wb") if base is None else nullcontext() as kept,
        routing.open_recorded(job["path"], opened, trial=False) as recorded,
    ):
        tokens = divergence.load_text(settings.text).tokens(recorded.model)
        n_chunks = len(imatrix.chunks(tokens, settings.chunk_tokens, settings.n_chunks))

        def use(number: int, said: np.ndarray, targets: np.ndarray) -> None:
            _keep(kept, said, number, n_chunks) if base is None else None
            found.append(divergence.compare_chunk(said if base is None else base[number], said, targets))

        n = divergence.predict(recorded, tokens, settings.chunk_tokens, settings.n_chunks, use)
        scored = tokens[: n * settings.chunk_tokens]
        trace = recorded.trace(scored, chunk_tokens=settings.chunk_tokens)
    divergence.Tokens(*map(np.stack, zip(*found, strict=True))).save(place / "tokens.npz")
    trace.save(place / "trace.npz")
    write_json(note, {"key": job["key"]})


def _keep(file: Any, said: np.ndarray, number: int, n_chunks: int) -> None:
    """Append one chunk's predictions to what becomes the ``.npy`` of all, which need not fit in memory."""
    said = np.ascontiguousarray(said, "<f4")
    if number == 0:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (n_chunks, *said.shape)}
        )
    file.write(said.data)


def _ask(job: dict[str, Any], settings: Settings, place: Path) -> dict[str, Any]:
    """Scores, stability curve and speed."""
    opened = OpenSettings(
        n_ctx=max(settings.n_ctx, settings.longest + long_context.SPARE_TOKENS), n_threads=settings.n_threads
    )
    with closing(llama_model.open_model(job["path"], opened, trial=False)) as model:
        runs = [
            score_set(
                model,
                one,
                place / "scores",
                Options(fresh=job["fresh"], allow_unsandboxed=settings.allow_unsandboxed, progress=False),
                model_id=job["sha256"],
            )
            for one in _sets(settings)
        ]
        run = _measure_context(model, job, settings, place)
        with watched_load() as load:
            speed = llama_timing.measure_speed(
                model, settings.speed_depth, settings.speed_tokens, settings.speed_repetitions
            )
    decode = speed.decode_tokens_per_sec
    asked = {
        one.name: {key: value for key, value in one.conditions.items() if key != "sandbox"} for one in runs
    }
    first = long_context.first_task(run.items, run.plan.prompts)
    return {
        "scores": asked,
        "items": first.to_dict("records"),
        "curve": run.curve().to_dict("records"),
        "boundary": run.boundary().as_dict(),
        "speed": {
            "median": decode.median,
            "min": decode.min,
            "max": decode.max,
            "repetitions": speed.repetitions,
            "depth": speed.depth,
            "contended": load.contended,
            "other_cores": load.other_cores,
        },
    }


def _measure_context(
    model: llama_model.Model, job: dict[str, Any], settings: Settings, place: Path
) -> long_context.Run:
    budget = settings.budget_seconds or float("inf")
    plan = long_context.make_plan(
        model,
        settings.prompt_set,
        settings.longest,
        rounds=1,
        n_haystacks=settings.n_haystacks,
        budget_seconds=budget,
    )
    speed = long_context.measure_prefill(model, settings.longest) if settings.budget_seconds else None
    plan = long_context.within_budget(plan, speed) if speed else plan
    return long_context.measure(
        model, plan, place, model_sha256=job["sha256"], speed=speed, fresh=job["fresh"]
    )


# ---- tables ----


def table(ladder: Ladder) -> pd.DataFrame:
    """One row a rung: sizes, bits, and every metric with its 95 % interval (``_low``, ``_high``)."""
    import pandas as pd

    rows = []
    for rung in ladder.rungs:
        found, same = rung.divergence, routing_share(ladder.source, rung)
        row = {
            "rung": rung.name,
            "bytes": rung.header.file_size,
            "bits_per_weight": rung.bits_per_weight,
            "expert_bits": rung.expert_bits,
            **found.row(),
            "routing": same.value,
            "routing_low": same.low,
            "routing_high": same.high,
        }
        for run in rung.runs:
            name = _metric(run, rung.runs)
            row |= {
                name: run.score.value,
                f"{name}_low": run.score.low,
                f"{name}_high": run.score.high,
                f"{name}_n": run.score.n,
            }
        row |= {
            "boundary": rung.boundary["tokens"],
            "boundary_low": rung.boundary["low"],
            "boundary_high": rung.boundary["high"],
            "boundary_status": rung.boundary["status"],
        }
        row |= {
            "decode": rung.speed["median"],
            "decode_low": rung.speed["min"],
            "decode_high": rung.speed["max"],
            "contended": rung.speed["contended"],
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _metric(run: SetRun, runs: Sequence[SetRun]) -> str:
    """The score's name, with its set's where several sets have that score."""
    alone = sum(one.score.name == run.score.name for one in runs) == 1
    return run.score.name if alone else f"{run.score.name} ({run.name})"


def class_table(ladder: Ladder) -> pd.DataFrame:
    """Bits a weight by tensor class (rows) and rung (columns)."""
    import pandas as pd

    columns = {
        rung.name: {row["class"]: row["bits_per_weight"] for row in class_sizes(rung.header)}
        for rung in ladder.rungs
    }
    return pd.DataFrame(columns).rename_axis("class")


def routing_share(source: Rung, rung: Rung) -> divergence.Estimate:
    """Share of the expert sets that are the source's, in layers that choose by score; NaN without such."""
    same = ~routing.differences(source.trace, rung.trace)[:, ~source.trace.hashed]
    return _share(same, source.trace)


def _share(same: np.ndarray, trace: routing.Trace) -> divergence.Estimate:
    """The mean over tokens and layers, its interval from a bootstrap over chunks."""
    if not same.size:
        return divergence.Estimate(*[float("nan")] * 4)
    by_chunk = same.reshape(-1, trace.conditions["chunk_tokens"], same.shape[1]).mean(axis=(1, 2))
    low, high = mean_interval(by_chunk)
    error = float(by_chunk.std(ddof=1)) / len(by_chunk) ** 0.5 if len(by_chunk) > 1 else float("nan")
    return divergence.Estimate(float(same.mean()), max(low, 0.0), min(high, 1.0), error)


def routing_table(ladder: Ladder) -> pd.DataFrame:
    """Agreement of expert choices with the source, one row a rung and layer: ``rung``, ``bits_per_weight``,
    ``layer``, ``hashed``, ``n`` choices, ``identical`` with ``low`` and ``high``, ``overlap`` (mean share of
    the k experts that both chose)."""
    import pandas as pd

    rows, source = [], ladder.source.trace
    for rung in ladder.rungs[1:]:
        same, overlap = ~routing.differences(source, rung.trace), routing.overlaps(source, rung.trace)
        for column, layer in enumerate(source.layers):
            share = _share(same[:, column : column + 1], source)
            rows.append(
                {
                    "rung": rung.name,
                    "bits_per_weight": rung.bits_per_weight,
                    "layer": int(layer),
                    "hashed": bool(source.hashed[column]),
                    "n": source.n_tokens,
                    "identical": share.value,
                    "low": share.low,
                    "high": share.high,
                    "overlap": float(overlap[:, column].mean()),
                }
            )
    columns = ["rung", "bits_per_weight", "layer", "hashed", "n", "identical", "low", "high", "overlap"]
    return pd.DataFrame(rows, columns=columns).astype({"hashed": bool})


def curve_table(ladder: Ladder) -> pd.DataFrame:
    """The stability curves under each other, with columns ``rung`` and ``bits_per_weight`` in front."""
    import pandas as pd

    tables = [
        rung.curve.assign(rung=rung.name, bits_per_weight=rung.bits_per_weight) for rung in ladder.rungs
    ]
    joined = pd.concat(tables, ignore_index=True)
    front = ["rung", "bits_per_weight"]
    return joined[front + [name for name in joined if name not in front]]


# ---- pairs ----


@dataclass(frozen=True)
class Step:
    """One metric of two rungs, from ``a`` (the rung above) to ``b``.

    Attributes:
        n: what the two share: chunks, items or haystacks.
        low, high: NaN for fewer than ``loss.LEAST_VALUES`` chunks: they are no evidence.
        difference: of b to a, with an interval that allows for the number of pairs (Bonferroni), but for
            scores, whose interval is of 95 % and whose test allows for it; for the boundary in octaves.
        verdict: of b: ``better``, ``worse``, ``no evidence of a difference`` or ``not measured``.
    """

    a: str
    b: str
    metric: str
    n: int
    value_a: float
    value_b: float
    difference: float
    low: float
    high: float
    verdict: str


def steps(ladder: Ladder, pairs: Sequence[tuple[str, str]] | None = None) -> list[Step]:
    """Compare rungs pair by pair (by default neighbours) on KL divergence, perplexity, scores and boundary.

    Differences come from the same chunks, the same questions and the same haystacks. The source's divergence
    from itself is 0, so the first step's says only whether anything changed.
    """
    names = [rung.name for rung in ladder.rungs]
    pairs = list(pairwise(names)) if pairs is None else list(pairs)
    level = 1 - (1 - LEVEL) / max(len(pairs), 1)
    found: list[Step] = []
    for a, b in pairs:
        one, other = ladder[a], ladder[b]
        found.append(_chunk_step(a, b, FIDELITY, one.tokens.kld, other.tokens.kld, level))
        found.append(_chunk_step(a, b, "log-perplexity", one.tokens.nll, other.tokens.nll, level))
        found += _score_steps(one, other, len(pairs))
        found.append(_boundary_step(one, other, level))
    return found


def _verdict(low: float, high: float, *, larger_is_better: bool) -> str:
    if low > 0 or high < 0:
        return "better" if (low > 0) == larger_is_better else "worse"
    return SAME


def _chunk_step(a: str, b: str, metric: str, first: np.ndarray, second: np.ndarray, level: float) -> Step:
    change = (second - first).mean(axis=1)
    n, values = len(change), (float(first.mean()), float(second.mean()))
    low, high = float("nan"), float("nan")
    if n >= LEAST_VALUES:
        low, high = _interval(bootstrap_weights(n, N_BOOT, 0) @ change / n, n, level)
    verdict = _verdict(low, high, larger_is_better=False)
    return Step(a, b, metric, n, *values, float(change.mean()), low, high, verdict)


def _interval(drawn: np.ndarray, n: int, level: float) -> tuple[float, float]:
    """The expanded percentile interval of bootstrap draws from ``n`` clusters."""
    tail = expanded_tail(n, level)
    return float(np.quantile(drawn, tail)), float(np.quantile(drawn, 1 - tail))


def _score_steps(one: Rung, other: Rung, n_pairs: int) -> list[Step]:
    """McNemar's exact test on the items, its p multiplied by the number of pairs; the interval is 95 %."""
    found = []
    for run, result in zip(one.runs, compare_runs(one.runs, other.runs), strict=True):
        sure = min(1.0, result.p * n_pairs) < 1 - LEVEL
        verdict = ("better" if result.difference > 0 else "worse") if sure else SAME
        found.append(
            Step(
                one.name,
                other.name,
                _metric(run, one.runs),
                result.n,
                result.a,
                result.b,
                result.difference,
                result.low,
                result.high,
                verdict,
            )
        )
    return found


def _boundary_step(one: Rung, other: Rung, level: float) -> Step:
    """The change of the boundary in octaves, by drawing the same haystacks for both.

    The percentile interval of few haystacks is too narrow: it leaves out 0 whenever all of them agree,
    however small the error that is allowed. So there is evidence only where a sign test of that many could
    find any.
    """
    counts = one.counts(), other.counts()
    n = min(each.n_haystacks for each in counts)
    values = float(one.boundary["tokens"]), float(other.boundary["tokens"])
    if n < 2 or counts[0].n_haystacks != counts[1].n_haystacks:
        nan = float("nan")
        return Step(one.name, other.name, "boundary", n, *values, nan, nan, nan, "not measured")
    weights = bootstrap_weights(n, N_BOOT, 0)
    drawn = [_octaves(boot_boundaries(each, long_context.GUESS_RATE, weights), each) for each in counts]
    point = [
        _octaves(crossing(each.lengths, each.fit(), each.threshold(long_context.GUESS_RATE)), each)
        for each in counts
    ]
    low, high = _interval(drawn[1] - drawn[0], n, level)
    verdict = _verdict(low, high, larger_is_better=True) if 2 * 0.5**n <= 1 - level else SAME
    return Step(one.name, other.name, "boundary", n, *values, float(point[1] - point[0]), low, high, verdict)


def _octaves(tokens: np.ndarray, counts: Counts) -> np.ndarray:
    """log2 of a boundary, held inside the lengths that were measured."""
    return np.log2(np.clip(tokens, counts.lengths[0], counts.lengths[-1]))


def step_table(found: Sequence[Step]) -> pd.DataFrame:
    """One row a pair and metric, with the fields of ``Step``."""
    import pandas as pd

    return pd.DataFrame([vars(one) for one in found])


def verdict_table(found: Sequence[Step]) -> pd.DataFrame:
    """The verdicts alone: a row a pair, a column a metric."""
    import pandas as pd

    rows: dict[str, dict[str, str]] = {}
    for one in found:
        rows.setdefault(f"{one.a} -> {one.b}", {})[one.metric] = one.verdict
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("step")


def hierarchy(ladder: Ladder) -> pd.DataFrame:
    """The hierarchy of DFQS 1.0, tested: of two levels, the lowest rung of one and the highest of the next.

    Columns ``step``, ``a``, ``b``, ``bits_a``, ``bits_b`` (a weight), one column a metric with its verdict,
    ``fidelity`` (the verdict on the KL divergence from the source) and ``ability`` (on all other metrics
    together: one that differs decides, ``mixed`` where two contradict each other).
    """
    import pandas as pd

    names = [rung.name for rung in ladder.rungs]
    levels = [(level, [name for name in names if name in members]) for level, members in LEVELS]
    levels = [(level, members) for level, members in levels if members]
    pairs = [((above, a[-1]), (below, b[0])) for (above, a), (below, b) in pairwise(levels)]
    found = steps(ladder, [(a, b) for (_, a), (_, b) in pairs])
    rows = []
    for (above, a), (below, b) in pairs:
        verdicts = {one.metric: one.verdict for one in found if (one.a, one.b) == (a, b)}
        rows.append(
            {
                "step": f"{above} -> {below}",
                "a": a,
                "b": b,
                "bits_a": ladder[a].bits_per_weight,
                "bits_b": ladder[b].bits_per_weight,
                **verdicts,
                "fidelity": verdicts[FIDELITY],
                "ability": _together(verdicts),
            }
        )
    return pd.DataFrame(rows)


def _together(verdicts: Mapping[str, str]) -> str:
    """What the verdicts on ability say together; the divergence from the source is not among them.

    >>> _together({"KL divergence": "worse", "boundary": "worse", "code": "no evidence of a difference"})
    'worse'
    """
    said = {verdict for metric, verdict in verdicts.items() if metric != FIDELITY} & {"better", "worse"}
    return "mixed" if len(said) == 2 else said.pop() if said else SAME


def _interval_text(row: Mapping[str, Any]) -> str:
    if row["kld_low"] != row["kld_low"]:
        return "95 % interval unknown"
    return f"95 % interval {row['kld_low']:.2g} to {row['kld_high']:.2g}"


def hand_on(folder: str | Path, ladder: Ladder) -> list[str]:
    """Write ``ladder.json`` (see ``paths.write_stage``), and return its summary lines."""
    rows, tested = table(ladder), hierarchy(ladder)
    top, low = rows.iloc[0], rows.iloc[-1]
    others = rows.iloc[[1, -1]] if len(rows) > 2 else rows.iloc[1:]
    lines = [
        f"{ladder.source.path.name}: {len(rows)} rungs from {top['rung']} ({top['bits_per_weight']:.2f} bits "
        f"a weight) to {low['rung']} ({low['bits_per_weight']:.2f}, routed experts {low['expert_bits']:.2f})",
        *(
            f"{row['rung']}: KL divergence {row['kld']:.2g} nats ({_interval_text(row)}, "
            f"n = {row['n_tokens']:,} tokens in {row['n_chunks']} chunks), same experts "
            f"in {row['routing']:.1%}"
            for row in others.to_dict("records")
        ),
        *(
            f"{row['step']} ({row['a']} at {row['bits_a']:.2f} bits to {row['b']} at {row['bits_b']:.2f}): "
            f"fidelity {row['fidelity']}; ability {row['ability']}"
            for row in tested.to_dict("records")
        ),
        *(f"{name} failed: {why}" for name, why in ladder.failed.items()),
    ]
    write_stage(
        folder,
        "ladder",
        conditions=ladder.conditions,
        summary=lines,
        tier=ladder.settings.tier,
        rungs=rows.to_dict("records"),
        hierarchy=tested.to_dict("records"),
        steps=[asdict(one) for one in steps(ladder)],
        failed=ladder.failed,
    )
    return lines


def default_source() -> Path:
    """The shipped F16 model beside the reference artifact.

    Raises:
        LadderError: it is not there.
    """
    found = sorted((data_dir() / "reference").glob("*-F16*.gguf"))
    if not found:
        raise LadderError(
            "no F16 model is shipped here",
            where=data_dir() / "reference",
            hint="pass source, the path of a GGUF with F16, BF16 or F32 weights",
        )
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
