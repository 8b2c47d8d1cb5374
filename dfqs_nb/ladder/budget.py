"""Cut a climb to a time: fewer questions, texts and rungs, in a stated order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dfqs_nb.core.budget import Fitted, fit
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.ladder import divergence
from dfqs_nb.ladder.measure import LONG_TEXTS, Settings, question_sets
from dfqs_nb.ladder.recipes import load_recipe
from dfqs_nb.ladder.run import RUNGS
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.llama.timing import probe

# What a climb that exceeds its budget gives up, in this order; of rungs those at the end of RANK first.
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
RANK = ("F16", "IQ1_S-XL", "Q4_K_M", "Q8_0", "IQ2_XXS", "Q6_K", "IQ1_M", "Q3_K_M")
LOGIT_SECONDS = 1e-7  # that a logit takes to be compared with the source's
QUANTIZED_BYTES = 20e6  # of the source that are quantized, hashed and read in a second


def within_budget(
    settings: Settings, source: str | Path, rungs: Sequence[str], seconds: float
) -> tuple[Settings, list[str], Fitted]:
    """Settings and rungs, cut in the order of `CUTS` until a climb takes no longer than this.

    The speed of the source, timed here on a few tokens, stands for that of every rung. Of the default rungs,
    those for routed experts are left out of a dense model's ladder.
    """
    header = open_shards(source).as_one
    unfit = [name for name in rungs if tuple(rungs) == RUNGS and not _fits(name, header)]
    rungs = [name for name in rungs if name not in unfit]
    opened = OpenSettings.of(source, n_ctx=512, n_threads=settings.n_threads)
    with open_model(source, opened) as model:
        pace, load, n_vocab = probe(model), model.load_seconds, model.n_vocab
        n_chunks = len(divergence.load_text(settings.text).tokens(model)) // settings.chunk_tokens
    sets, nbytes = question_sets(settings), open_shards(source).nbytes

    def cost(plan: dict[str, int]) -> float:
        predicted = plan["chunks"] * settings.chunk_tokens + LONG_TEXTS * plan["longest"]
        asked = sum(pace.seconds(64, each.max_tokens) * min(plan["items"], len(each.items)) for each in sets)
        curve = pace.seconds(2 * plan["longest"] * plan["texts"], 8 * plan["texts"])
        timed = settings.speed_repetitions * pace.seconds(settings.speed_depth, settings.speed_tokens)
        rung = predicted * (pace.prefill + n_vocab * LOGIT_SECONDS) + asked + curve + timed
        return plan["rungs"] * (rung + 3 * load + 3 * nbytes / QUANTIZED_BYTES)

    items = max((len(each.items) for each in sets), default=0)  # `max_items` has cut them already
    whole = {"items": items, "longest": settings.longest, "texts": settings.n_haystacks}
    whole |= {"chunks": min(n_chunks, settings.n_chunks or n_chunks), "rungs": len(rungs)}
    fitted = fit(whole, CUTS, cost, seconds, NAMES)
    cut = fitted.values
    chosen = sorted(rungs, key=lambda name: RANK.index(name) if name in RANK else -1)[: cut["rungs"]]
    cut_settings = replace(
        settings,
        max_items=settings.max_items if cut["items"] == items else cut["items"],
        longest=cut["longest"],
        n_haystacks=cut["texts"],
        n_chunks=settings.n_chunks if cut["chunks"] == whole["chunks"] else cut["chunks"],
    )
    dense = (f"the rung {name}: its rules match no tensor of this model" for name in unfit)
    left_out = (*dense, *fitted.left_out)
    return cut_settings, [name for name in rungs if name in chosen], replace(fitted, left_out=left_out)


def _fits(rung: str, header: GGUFHeader) -> bool:
    """Whether every rule of a rung's recipe that must match a tensor does."""
    return all(
        rule.optional or any(rule.matches(tensor.name, header.n_layers) for tensor in header.tensors)
        for rule in load_recipe(rung).rules
    )
