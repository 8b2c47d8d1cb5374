"""What a context costs: prefill time by depth, and memory by length, predicted and measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, nan
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dfqs_nb.context.boundary import octaves
from dfqs_nb.context.haystacks import probe_of
from dfqs_nb.core import child
from dfqs_nb.core.budget import fit
from dfqs_nb.core.errors import StageError
from dfqs_nb.core.machine import available_memory
from dfqs_nb.core.stage import Stage
from dfqs_nb.gguf.memory import MemoryEstimate, estimate
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.check import plan_memory
from dfqs_nb.llama.model import MEMORY_SETTINGS, Model
from dfqs_nb.llama.settings import OpenSettings, own_context

if TYPE_CHECKING:
    import pandas as pd

PROBE_SHARE, MOST_SECONDS = 1 / 15, 30.0  # that a chunk of the probe takes: of the budget, and in all
CHUNKS, WARM_UP = (256, 32), 8  # tokens
SPARE_TOKENS = 64  # of context, for the answer
LEAST_CONTEXT = 1024  # tokens that a context has, however little the budget holds
NO_LIMIT = 8192  # tokens, where a header states no limit
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class PrefillSpeed:
    """Prefill time of a token: ``base`` seconds, and ``by_depth`` seconds for each token before it.

    ``decode``: seconds of a token that is evaluated alone, at the beginning of a context.
    """

    base: float
    by_depth: float
    decode: float = 0.0

    def seconds(self, length: float) -> float:
        """Seconds to evaluate a text of this length."""
        return self.base * length + self.by_depth * length**2 / 2

    def tokens_per_sec(self, depth: float) -> float:
        """Prefill speed at a depth."""
        return 1 / (self.base + self.by_depth * depth)


def measure_prefill(model: Model, deepest: int, budget_seconds: float = inf) -> PrefillSpeed:
    """Time chunks of 256 tokens, one after another, up to ``deepest`` or for 10 s.

    Smaller chunks, for a shorter time, where one would take more than a fifteenth of the budget; the slowest
    models are timed by their first tokens alone. A robust line through the chunks (Theil and Sen's) gives the
    cost of a token and how it grows with depth; with fewer than three chunks it is taken not to grow.
    """
    from scipy.stats import theilslopes

    tokens = np.random.default_rng(0).integers(0, model.n_vocab, min(deepest, model.settings.n_ctx)).tolist()

    def timed(chunk: Sequence[int]) -> float:
        started = time.perf_counter()
        model.decode(chunk)
        model.synchronize()
        return (time.perf_counter() - started) / len(chunk)

    limit = min(MOST_SECONDS, PROBE_SHARE * budget_seconds)
    model.clear()
    first = timed(tokens[:WARM_UP])  # it may read weights from the disk, which the next tokens find in memory
    if WARM_UP * first <= limit:
        first = min(first, timed(tokens[:WARM_UP]))
    decode = min(timed(tokens[:1]) for _ in range(2))
    model.clear()
    size = next((n for n in CHUNKS if n * first <= limit), 0)
    begun, depths, seconds = time.perf_counter(), [], [] if size else [first]
    for start in range(0, len(tokens), size) if size else ():
        chunk = tokens[start : start + size]
        seconds.append(timed(chunk))
        depths.append(start + len(chunk) / 2)
        if time.perf_counter() - begun > limit / 3:
            break
    model.clear()
    if len(depths) < 3:
        return PrefillSpeed(min(seconds), 0.0, decode)
    slope, base, *_ = theilslopes(seconds, depths)
    return PrefillSpeed(max(float(base), min(seconds) / 2), max(float(slope), 0.0), decode)


@dataclass(frozen=True)
class RuntimeFailure:
    """The first length that could not be run, and why; ``predicted``: it was not even tried."""

    length: int
    cause: str
    message: str
    predicted: bool = False


def predict_failure(
    path: str | Path, lengths: Sequence[int], settings: OpenSettings, available_bytes: int | None = None
) -> RuntimeFailure | None:
    """The first length whose memory (KV cache, its saved copy, compute buffer) exceeds what is free."""
    available = available_memory().available_bytes if available_bytes is None else available_bytes
    for needs, _ in _planned(path, sorted(lengths), settings):
        required = needs.must_fit_bytes + needs.kv.total
        if required > available:
            needed = f"{needs.n_ctx:,} tokens need {required:,} bytes beside the weights"
            what = f"{needed}, and {available:,} are free"
            return RuntimeFailure(needs.n_ctx, "oom", what, predicted=True)
    return None


def _planned(
    path: str | Path, lengths: Sequence[int], settings: OpenSettings
) -> Iterator[tuple[MemoryEstimate, int]]:
    """For each length the cache by the header's formula, and llama.cpp's own plan of buffer and cache.

    The plan allocates nothing. It is made in a child process, because the file has not been tried yet.
    """
    shards, kept = open_shards(path), {name: getattr(settings, name) for name in MEMORY_SETTINGS}
    plans = plan_memory(shards.paths[0], [replace(settings, n_ctx=n_ctx) for n_ctx in lengths])
    for n_ctx, plan in zip(lengths, plans, strict=True):
        needs = estimate(shards.as_one, n_ctx, min(n_ctx, settings.n_batch, settings.n_ubatch), **kept)
        yield replace(needs, compute_bytes=plan["compute_bytes"]), plan["kv_bytes"]


def settings_for(
    path: str | Path, longest: int, settings: OpenSettings, stage: Stage, prompt_set: str
) -> tuple[OpenSettings, RuntimeFailure | None]:
    """Settings with room for the longest length that fits in memory, and the first that does not.

    Args:
        longest: tokens; 0: the model's own limit (`NO_LIMIT` where the header states none), which also bounds
            a longer one, and what the stage's budget holds at the prefill speed of notebook 03.
        prompt_set: a `PromptError` here, before anything is loaded, says that there is none of that name.
    """
    probe_of(prompt_set)
    own = own_context(path)
    most = longest or min(own or NO_LIMIT, affordable(stage))
    longest = int(min(most, own or most))
    failure = predict_failure(path, octaves(256, longest) or [longest], settings)
    reach = longest if failure is None else failure.length // 2
    return replace(settings, n_ctx=reach + SPARE_TOKENS), failure


def affordable(stage: Stage) -> float:
    """Tokens of prefill that the stage's budget holds at notebook 03's speed; inf where that is not known."""
    try:
        rows = stage.read("generate").get("speed") or []
    except StageError:
        return inf  # this notebook runs alone
    speeds = [row["median"] for row in rows if row.get("phase") == "prefill"]
    return max(LEAST_CONTEXT, stage.seconds_left * speeds[0]) if speeds else inf


def memory_table(
    path: str | Path,
    lengths: Sequence[int],
    settings: OpenSettings,
    stage: Stage,
    speed: PrefillSpeed,
    load_seconds: float = 0.0,
) -> pd.DataFrame:
    """Predicted and measured bytes for a context of each length, filled with up to 4,096 tokens.

    Columns ``n_ctx``; predicted: ``kv_bytes`` (the header's formula), ``kv_planned_bytes`` and
    ``compute_bytes`` (llama.cpp's plan), ``weights_bytes``, ``predicted_bytes`` (cache + buffer); measured in
    a fresh process for each length, which loads the model again: ``anonymous_bytes`` (what its own memory
    grew by) and ``resident_bytes`` (all, with the mapped weights); NaN where nothing is measured, or the
    system does not tell. Pages of the compute buffer that were never used are not resident. And
    ``tokens_per_second``: the prefill speed at that depth.

    What the stage's budget does not hold is cut, in this order: 1,024 tokens that fill a context, the
    shortest lengths, 256 and 64 tokens, all lengths. The stage notes it.
    """
    import pandas as pd

    lengths = [n for n in lengths if n >= 256] or list(lengths)
    cuts = [{"fill": 1024}, *({"lengths": k} for k in range(len(lengths) - 1, 0, -1))]
    cuts += [{"fill": 256}, {"fill": 64}, {"lengths": 0}]

    def cost(cut: dict[str, int]) -> float:
        measured = lengths[len(lengths) - cut["lengths"] :]
        return sum(load_seconds + speed.seconds(min(n, cut["fill"])) for n in measured)

    plan = fit({"lengths": len(lengths), "fill": 4096}, cuts, cost, 0.9 * stage.seconds_left).values
    n, rows = plan["lengths"], []
    if n < len(lengths):
        stage.leave_out([f"memory of {n} of {len(lengths)} lengths" if n else "memory: not measured"])
    for needs, kv_planned in _planned(path, lengths, settings):
        kv, compute, taken = needs.kv.total, needs.compute_bytes or 0, dict[str, float]()
        if n and needs.n_ctx >= lengths[-n]:
            opened = replace(settings, n_ctx=needs.n_ctx).as_dict()
            job = {"path": str(path), "fill_tokens": plan["fill"], "settings": opened}
            taken = child.run(
                "dfqs_nb.context.memory_child", job, where=path, timeout_seconds=TIMEOUT_SECONDS
            )
        planned = {"kv_bytes": kv, "kv_planned_bytes": kv_planned, "compute_bytes": compute}
        whole = {"weights_bytes": needs.weights_bytes, "predicted_bytes": kv + compute}
        unknown = {"anonymous_bytes": nan, "resident_bytes": nan}
        rate = {"tokens_per_second": speed.tokens_per_sec(needs.n_ctx)}
        rows.append({"n_ctx": needs.n_ctx, **planned, **whole, **unknown, **taken, **rate})
    return pd.DataFrame(rows)
