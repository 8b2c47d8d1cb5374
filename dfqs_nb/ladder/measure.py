"""How a rung is measured: the settings, the importance matrix, and the child process that does the work."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dfqs_nb import context
from dfqs_nb.core import child
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import sha256_of_files, whole_file
from dfqs_nb.core.journal import conditions_hash, remembered
from dfqs_nb.core.machine import usable_cores, watched_load
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.ladder import divergence, imatrix
from dfqs_nb.ladder.divergence import Array
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings, llama_version
from dfqs_nb.llama.timing import measure_speed
from dfqs_nb.routing import open_recorded
from dfqs_nb.scores import ItemSet, Options, find_sandbox, score_set


class LadderError(DfqsError):
    """The ladder cannot be climbed."""


@dataclass(frozen=True)
class Settings:
    """What every rung is measured with.

    Args:
        text: a prompt set with ``calibration`` and ``held_out``, or a text file to measure on.
        chunk_tokens, n_chunks: of the held-out text (0: all chunks); half of each chunk is scored.
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
    n_chunks: int = 0
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


def question_sets(settings: Settings) -> list[ItemSet]:
    """The tier's sets, each cut to its share of questions; code only where it can be run."""
    runs_code = find_sandbox().safe or settings.allow_unsandboxed
    return [
        part_of(chosen, settings.max_items)
        for chosen in ItemSet.of_tier(settings.tier)
        if chosen.kind != "code" or runs_code
    ]


def part_of(item_set: ItemSet, max_items: int) -> ItemSet:
    """The first questions of each family, as many of each, under a name of its own."""
    if not max_items or max_items >= len(item_set.items):
        return item_set
    each, taken = max(1, max_items // len(item_set.families())), Counter[str]()
    items = []
    for item in item_set.items:
        taken[item.family] += 1
        items += [item] if taken[item.family] <= each else []
    return replace(item_set, set=f"{item_set.name}-{len(items)}", items=tuple(items))


# ---- the importance matrix of a source ----


def collected(
    source: str | Path,
    folder: str | Path,
    settings: Settings,
    *,
    given: str | Path | None = None,
    source_sha256: str = "",
    fresh: bool = False,
    progress: bool = True,
) -> imatrix.ImportanceMatrix:
    """The importance matrix over the calibration text, from ``folder/imatrix.gguf`` where it is there.

    Args:
        given: the file of another one, which is read instead.

    Raises:
        ImatrixError: the one that is given cannot be read.
        LadderError: there is no text but the one to measure on.
    """
    if given:
        return imatrix.read_imatrix(given)
    path = Path(folder) / "imatrix.gguf"
    if not settings.calibration and Path(settings.text).suffix:
        raise LadderError(
            "the held-out text would also be the calibration text",
            where=settings.text,
            hint="give calibration a text of its own, or an importance matrix",
        )
    text = divergence.load_text(settings.calibration or settings.text, "calibration")
    conditions = {
        "source": source_sha256 or sha256_of_files(open_shards(source).paths),
        "text": text.name,
        "tokens": settings.calibration_tokens,
        "chunks": settings.calibration_chunks,
        "runtime": llama_version(),
        "words": hashlib.sha256(repr(text.documents).encode()).hexdigest(),
    }
    dataset = f"{text.name} {conditions_hash(conditions)}"
    if path.exists() and not fresh:
        matrix = imatrix.read_imatrix(path)
        if matrix.datasets == (dataset,):
            return matrix
    path.parent.mkdir(parents=True, exist_ok=True)
    return calibrated(source, text, settings, dataset, progress=progress).save(path)


def calibrated(
    source: str | Path,
    text: str | divergence.Text,
    settings: Settings | None = None,
    dataset: str = "",
    *,
    progress: bool = True,
) -> imatrix.ImportanceMatrix:
    """An importance matrix over a text: at most ``calibration_chunks`` chunks of ``calibration_tokens``.

    Args:
        text: a text, or the name of a prompt set or a text file.
        dataset: what the text is called in the matrix; its name where not given.

    Raises:
        TextError, PromptError: there is no such text.
        ImatrixError, ModelError, DecodeError: see `imatrix.collect`.
    """
    settings = settings or Settings()
    text = divergence.load_text(text, "calibration") if isinstance(text, str) else text
    opened = OpenSettings(n_ctx=256, n_threads=settings.n_threads or usable_cores())
    with open_model(source, opened) as model:
        tokens = text.tokens(model)
    return imatrix.collect(
        source,
        tokens[: settings.calibration_tokens * settings.calibration_chunks],
        dataset=dataset or text.name,
        chunk_tokens=settings.calibration_tokens,
        settings=opened,
        progress=progress,
    )


# ---- the child process ----


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one model: predictions and routing first, then scores and the stability curve."""
    settings, place = Settings(**job["settings"]), Path(job["place"])
    remembered(
        place / "predicted.json",
        {"key": job["key"]},
        lambda: _predict(job, settings, place),
        fresh=job["fresh"],
    )
    return _ask(job, settings, place)


def time_all(job: dict[str, Any]) -> dict[str, Any]:
    """The decode speed of several models, one after another."""
    settings = Settings(**job["settings"])
    return {"speeds": {name: _timed(name, path, settings) for name, path in job["paths"].items()}}


def _timed(name: str, path: str, settings: Settings) -> dict[str, Any]:
    child.tell(timing=name)
    opened = OpenSettings(n_ctx=settings.speed_depth + settings.speed_tokens, n_threads=settings.n_threads)
    with open_model(path, opened, trial=False) as model, watched_load() as load:
        speed = measure_speed(model, settings.speed_depth, settings.speed_tokens, settings.speed_repetitions)
    decode = speed.decode_tokens_per_sec
    return {
        "median": decode.median,
        "min": decode.min,
        "max": decode.max,
        "repetitions": speed.repetitions,
        "depth": speed.depth,
        "contended": load.contended,
        "other_cores": load.other_cores,
    }


def _predict(job: dict[str, Any], settings: Settings, place: Path) -> dict[str, Any]:
    """Predictions and routing on the held-out text; the source's predictions are kept for the others."""
    (place / "predicted.json").unlink(missing_ok=True)
    opened = OpenSettings(n_ctx=settings.chunk_tokens, n_threads=settings.n_threads)
    is_source, reference = job["is_source"], Path(job["reference"])
    base = None if is_source else np.load(reference, mmap_mode="r")
    rows: list[tuple[Array, ...]] = []
    with (
        whole_file(reference, "wb") if is_source else nullcontext() as kept,
        open_recorded(job["path"], opened, trial=False) as recorded,
    ):
        tokens = divergence.load_text(settings.text).tokens(recorded.model)
        n_chunks = len(divergence.chunks(tokens, settings.chunk_tokens, settings.n_chunks))

        def use(number: int, predicted: Array, targets: Array) -> None:
            if base is None:
                keep(kept, predicted, number, n_chunks)
            rows.append(
                divergence.compare_chunk(predicted if base is None else base[number], predicted, targets)
            )

        divergence.predict(recorded, tokens, settings.chunk_tokens, settings.n_chunks, use)
        kept_tokens = tokens[: n_chunks * settings.chunk_tokens]
        trace = recorded.trace(kept_tokens, chunk_tokens=settings.chunk_tokens)
    divergence.Tokens(*map(np.stack, zip(*rows, strict=True))).save(place / "tokens.npz")
    trace.save(place / "trace.npz")
    return {"n_chunks": n_chunks}


def keep(file: Any, rows: Array, number: int, n_chunks: int) -> None:
    """Append one chunk's predictions to what becomes the ``.npy`` of all, which need not fit in memory."""
    rows = np.ascontiguousarray(rows, "<f4")
    if number == 0:
        header = {"descr": "<f4", "fortran_order": False, "shape": (n_chunks, *rows.shape)}
        np.lib.format.write_array_header_1_0(file, header)
    file.write(rows.data)


def _ask(job: dict[str, Any], settings: Settings, place: Path) -> dict[str, Any]:
    """Scores and the stability curve."""
    n_ctx = max(settings.n_ctx, settings.longest + 64)  # room for the answers
    opened = OpenSettings(n_ctx=n_ctx, n_threads=settings.n_threads)
    options = Options(fresh=job["fresh"], allow_unsandboxed=settings.allow_unsandboxed, progress=False)
    with open_model(job["path"], opened, trial=False) as model:
        runs = [
            score_set(model, chosen, place / "scores", options, model_id=job["sha256"])
            for chosen in question_sets(settings)
        ]
        run = _measure_context(model, job, settings, place)
    return {
        "scores": {
            run.name: {key: value for key, value in run.conditions.items() if key != "sandbox"}
            for run in runs
        },
        "items": run.retrieval.to_dict("records"),
        "curve": run.curve().to_dict("records"),
        "boundary": run.boundary().as_dict(),
    }


def _measure_context(model: Model, job: dict[str, Any], settings: Settings, place: Path) -> context.Run:
    plan = context.make_plan(
        model,
        settings.prompt_set,
        settings.longest,
        rounds=0,  # every rung is asked at the same lengths
        n_haystacks=settings.n_haystacks,
        budget_seconds=settings.budget_seconds or float("inf"),
    )
    return context.measure(model, plan.within_budget(), place, model_sha256=job["sha256"], fresh=job["fresh"])
