"""How a rung is measured: the settings, the importance matrix, and the work of the child processes."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from dfqs_nb import context
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import sha256_of_files
from dfqs_nb.core.journal import conditions_hash, remembered
from dfqs_nb.core.machine import watched_load
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.ladder import divergence, imatrix
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings, llama_version
from dfqs_nb.llama.timing import measure_speed
from dfqs_nb.routing import open_recorded
from dfqs_nb.scores import ItemSet, Options, find_sandbox, score_set

LONG = "reference-long.npy"  # the source's predictions in longer texts
LONG_TEXTS, LONG_WINDOW = 6, 32  # longer texts, and the positions scored in each of their bands
LONG_STEP = 128  # tokens whose logits are held at once
TOP_K = 20  # likeliest tokens of the source that a reference record would hold


class LadderError(DfqsError):
    """The ladder cannot be climbed."""


@dataclass(frozen=True)
class Settings:
    """What every rung is measured with."""

    text: str = "calibration-nano"  # a prompt set with ``calibration`` and ``held_out``, or a text file
    chunk_tokens: int = 256  # of the held-out text; half of each chunk is scored
    n_chunks: int = 0  # 0: all
    calibration: str = ""  # a text for the importance matrix; empty: the prompt set's part
    calibration_tokens: int = imatrix.CHUNK_TOKENS
    calibration_chunks: int = 24
    tier: str = "nano"  # of the questions
    max_items: int = 64  # of each set, evenly over its families; 0: all
    prompt_set: str = "long-context-nano"  # of the stability curve
    longest: int = 512  # tokens of that curve, and of the pieces for the divergence by position
    n_haystacks: int = 6
    speed_depth: int = 256
    speed_tokens: int = 64
    speed_repetitions: int = 3
    n_ctx: int = 1024  # of the questions
    n_threads: int = 0  # 0: as suits the source's size
    allow_unsandboxed: bool = False


def question_sets(settings: Settings) -> list[ItemSet]:
    """The tier's sets, each cut to its share of questions; code only where it can be run."""
    runs_code = find_sandbox().safe or settings.allow_unsandboxed
    sets = [chosen for chosen in ItemSet.of_tier(settings.tier) if chosen.kind != "code" or runs_code]
    return [part_of(chosen, settings.max_items) for chosen in sets]


def part_of(item_set: ItemSet, max_items: int) -> ItemSet:
    """The first questions of each family, as many of each, under a name of its own."""
    if not max_items or max_items >= len(item_set.items):
        return item_set
    each, taken, items = max(1, max_items // len(item_set.families())), Counter[str](), []
    for item in item_set.items:
        taken[item.family] += 1
        items += [item] if taken[item.family] <= each else []
    items = items[:max_items]  # where there are more families than that
    return replace(item_set, set=f"{item_set.name}-{len(items)}", items=tuple(items))


def collected(
    source: str | Path,
    folder: str | Path,
    settings: Settings,
    *,
    given: str | Path | None = None,
    source_sha256: str = "",
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
    text = divergence.load_text(settings.calibration or settings.text, "calibration")
    conditions = {
        "source": source_sha256 or sha256_of_files(open_shards(source).paths),
        "text": text.name,
        "tokens": settings.calibration_tokens,
        "chunks": settings.calibration_chunks,
        "runtime": llama_version(),
        "words": hashlib.sha256(repr(text.documents).encode()).hexdigest(),
    }
    path, dataset = Path(folder) / "imatrix.gguf", f"{text.name} {conditions_hash(conditions)}"
    if path.exists() and not fresh:
        matrix = imatrix.read_imatrix(path)
        if matrix.datasets == (dataset,):
            return matrix
    path.parent.mkdir(parents=True, exist_ok=True)
    size = {"chunk_tokens": settings.calibration_tokens, "n_chunks": settings.calibration_chunks}
    made = imatrix.collect(
        source, text, **size, n_threads=settings.n_threads, dataset=dataset, progress=False
    )
    return made.save(path)


# ---- the child process ----


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one model: predictions and routing first, then scores and the stability curve."""
    settings, place, fresh = Settings(**job["settings"]), Path(job["place"]), job["fresh"]
    note, key = place / "predicted.json", {"key": job["key"]}
    remembered(note, key, lambda: _predict(job, settings, place), fresh=fresh)
    n_ctx = max(settings.n_ctx, settings.longest + 64)  # room for the answers
    opened = OpenSettings(n_ctx=n_ctx, n_threads=settings.n_threads)
    options = Options(fresh=fresh, allow_unsandboxed=settings.allow_unsandboxed, progress=False)
    with open_model(job["path"], opened, trial=False) as model:
        note = place / "predicted_long.json"
        long = remembered(note, key, lambda: _predict_long(model, job, settings, place), fresh=fresh)
        runs = [
            score_set(model, chosen, place / "scores", options, model_id=job["sha256"])
            for chosen in question_sets(settings)
        ]
        # rounds=0: every rung is asked at the same lengths
        how: dict[str, Any] = {"rounds": 0, "n_haystacks": settings.n_haystacks, "budget_seconds": inf}
        plan = context.make_plan(model, settings.prompt_set, settings.longest, **how).within_budget()
        curve = context.measure(model, plan, place, model_sha256=job["sha256"], fresh=fresh)
    sets = [
        {"kind": run.kind, "name": run.name, "n_items": run.score.n, "conditions": run.conditions}
        | {"items": run.items.to_dict("records"), "model": run.model}
        for run in runs
    ]
    return {
        "n_long": long["n_texts"],
        "sets": sets,
        "items": curve.retrieval.to_dict("records"),
        "curve": curve.curve().to_dict("records"),
        "boundary": curve.boundary().as_dict(),
    }


def _predict(job: dict[str, Any], settings: Settings, place: Path) -> dict[str, Any]:
    """Predictions and routing on the held-out text; the source's predictions are kept for the others."""
    opened = OpenSettings(n_ctx=settings.chunk_tokens, n_threads=settings.n_threads)
    with open_recorded(job["path"], opened, trial=False) as recorded:
        tokens = divergence.load_text(settings.text).tokens(recorded.model)
        pieces = divergence.chunks(tokens, settings.chunk_tokens, settings.n_chunks, least=2)
        windows = [divergence.second_half(settings.chunk_tokens)] * len(pieces)
        reference, is_source = Path(job["reference"]), job["is_source"]
        scored = divergence.beside_source(recorded, pieces, windows, reference, is_source=is_source)
        scored.save(place / "tokens.npz")
        trace = recorded.trace(np.concatenate(pieces).tolist(), chunk_tokens=settings.chunk_tokens)
        trace.save(place / "trace.npz")
    return {"n_chunks": len(pieces)}


def _predict_long(model: Model, job: dict[str, Any], settings: Settings, place: Path) -> dict[str, Any]:
    """Predictions in windows of longer texts; none where the held-out text is too short for one."""
    tokens, n = divergence.load_text(settings.text).tokens(model), settings.longest
    pieces = divergence.chunks(tokens, n, LONG_TEXTS, least=0) if n >> 4 else []
    (place / "long.npz").unlink(missing_ok=True)
    if pieces:
        windows = [divergence.stratified(n, LONG_WINDOW, seed) for seed in range(len(pieces))]
        how = {"is_source": job["is_source"], "step": LONG_STEP, "top_k": TOP_K}
        reference = Path(job["reference"]).with_name(LONG)
        divergence.beside_source(model, pieces, windows, reference, **how).save(place / "long.npz")
    return {"n_texts": len(pieces)}


def time_decode(job: dict[str, Any]) -> dict[str, Any]:
    """The decode speed of one model."""
    settings = Settings(**job["settings"])
    opened = OpenSettings(n_ctx=settings.speed_depth + settings.speed_tokens, n_threads=settings.n_threads)
    with open_model(job["path"], opened, trial=False) as model, watched_load() as load:
        speeds = measure_speed(model, settings.speed_depth, settings.speed_tokens, settings.speed_repetitions)
    facts = {name: speeds[1][name] for name in ("median", "min", "max", "repetitions", "depth")}
    return facts | {"contended": load.contended, "other_cores": load.other_cores}
