"""What a context costs: prefill time by depth, and memory by length, predicted and measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.context.haystacks import probe_of
from dfqs_nb.context.search import octaves
from dfqs_nb.core import child
from dfqs_nb.core.budget import fit
from dfqs_nb.core.errors import StageError
from dfqs_nb.core.machine import available_memory
from dfqs_nb.core.stage import Stage
from dfqs_nb.gguf.memory import estimate, kv_cache_bytes, weights_bytes
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.check import plan_memory
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.settings import OpenSettings, own_context

if TYPE_CHECKING:
    import pandas as pd

PROBE_SHARE, MOST_SECONDS = 1 / 15, 30.0  # that a chunk of the probe takes: of the budget, and in all
CHUNKS, WARM_UP = (256, 32), 8  # tokens
LEAST_CONTEXT = 1024  # tokens that a context has, however little the budget holds
SPARE_TOKENS = 64  # of context, for the answer
NO_LIMIT = 8192  # tokens, where a header states no limit
TIMEOUT_SECONDS = 600.0


# ---- time ----


@dataclass(frozen=True)
class PrefillSpeed:
    """Prefill time of a token: ``base`` seconds, and ``by_depth`` seconds for each token before it.

    ``decode``: seconds of a token that is evaluated alone, at the beginning of a context.
    """

    base: float
    by_depth: float
    decode: float = 0.0

    def seconds(self, length: float, start: float = 0) -> float:
        """Seconds to evaluate the tokens from ``start`` to ``length``."""
        return self.base * (length - start) + self.by_depth * (length**2 - start**2) / 2

    def tokens_per_sec(self, depth: float) -> float:
        """Prefill speed at a depth."""
        return 1 / (self.base + self.by_depth * depth)

    def table(self, depths: Sequence[int]) -> pd.DataFrame:
        """Prefill speed at these depths: columns ``depth`` and ``tokens_per_second``."""
        import pandas as pd

        speeds = [self.tokens_per_sec(depth) for depth in depths]
        return pd.DataFrame({"depth": list(depths), "tokens_per_second": speeds})


def measure_prefill(model: Model, deepest: int = 1024, budget_seconds: float = inf) -> PrefillSpeed:
    """Time chunks of 256 tokens, one after another, up to ``deepest`` or for 10 s.

    Chunks are smaller, and the time shorter, where a chunk would take more than a fifteenth of the budget.
    The slowest models are timed by the first tokens alone. A robust line through the chunks (Theil and
    Sen's) gives the cost of a token and how it grows with depth; with fewer than three chunks it is taken
    not to grow.
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


# ---- memory, before anything is opened ----


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
    """The first length whose memory (KV cache, its saved copy, compute buffer) exceeds what is free.

    The cache comes from the header's formula, the buffer from llama.cpp's own plan. That allocates nothing,
    and it is made in a child process, because the file has not been tried yet.
    """
    available = available_memory().available_bytes if available_bytes is None else available_bytes
    shards = open_shards(path)
    opened = [replace(settings, n_ctx=length) for length in sorted(lengths)]
    for at, plan in zip(opened, plan_memory(shards.paths[0], opened), strict=True):
        types: dict[str, Any] = {"type_k": at.type_k, "type_v": at.type_v, "swa_full": at.swa_full}
        n_ubatch = min(at.n_batch, at.n_ubatch)
        needs = estimate(shards.as_one, at.n_ctx, n_ubatch, **types, use_mmap=at.use_mmap)
        required = needs.with_compute(plan["compute_bytes"]).must_fit_bytes + needs.kv.total
        if required > available:
            needed = f"{at.n_ctx:,} tokens need {required:,} bytes beside the weights"
            return RuntimeFailure(at.n_ctx, "oom", f"{needed}, and {available:,} are free", predicted=True)
    return None


def settings_for(
    path: str | Path,
    longest: int,
    settings: OpenSettings,
    stage: Stage | None = None,
    prompt_set: str = "",
) -> tuple[OpenSettings, RuntimeFailure | None]:
    """Settings with room for the longest length that fits in memory, and the first that does not.

    Args:
        longest: tokens; 0: the model's own limit, which also bounds a longer one. A header that states no
            limit gets `NO_LIMIT`.
        stage: its budget bounds ``longest=0``, by the prefill speed of notebook 03: no cache is allocated for
            lengths of which it holds no text.
        prompt_set: refused here, before anything is loaded, if there is none of that name.

    Raises:
        PromptError: there is no such prompt set.
    """
    if prompt_set:
        probe_of(prompt_set)
    own = own_context(path)
    reach = affordable(stage) if stage and not longest else 0
    longest = min(longest or own or NO_LIMIT, own or longest or NO_LIMIT)
    longest = min(longest, max(LEAST_CONTEXT, reach)) if reach else longest
    failure = predict_failure(path, octaves(256, longest) or [longest], settings)
    reach = longest if failure is None else failure.length // 2
    return replace(settings, n_ctx=reach + SPARE_TOKENS), failure


def affordable(stage: Stage) -> int:
    """Tokens of prefill that the stage's budget holds, at the speed of notebook 03; 0: not known."""
    try:
        rows = stage.read("generate").get("speed") or []
    except StageError:
        return 0  # this notebook runs alone
    speeds = [row["median"] for row in rows if row.get("phase") == "prefill"]
    return max(1, int(stage.seconds_left * speeds[0])) if speeds and stage.seconds_left < inf else 0


# ---- memory, predicted beside measured ----


def memory_table(
    path: str | Path,
    lengths: Sequence[int],
    settings: OpenSettings,
    *,
    measured: int | None = None,
    fill_tokens: int = 4096,
) -> pd.DataFrame:
    """Predicted and measured bytes for a context of each length, filled with up to ``fill_tokens`` tokens.

    Columns ``n_ctx``; predicted: ``kv_bytes`` (the header's formula), ``kv_planned_bytes`` and
    ``compute_bytes`` (llama.cpp's plan, in which nothing is allocated), ``weights_bytes``,
    ``predicted_bytes`` (cache + buffer); measured in a fresh process for each of the longest ``measured``
    lengths (default: all): ``anonymous_bytes`` (what its own memory grew by when the model was opened and
    its context filled) and ``resident_bytes`` (everything, the mapped weights included); NaN where nothing
    is measured, or the system does not tell. llama.cpp reserves the compute buffer for a full context, and
    pages of it that were never used are not resident.
    """
    import pandas as pd

    shards = open_shards(path)
    opened, rows = [replace(settings, n_ctx=n_ctx) for n_ctx in lengths], []
    first = 0 if measured is None else len(opened) - measured
    for number, (at, plan) in enumerate(zip(opened, plan_memory(shards.paths[0], opened), strict=True)):
        types: dict[str, Any] = {"type_k": at.type_k, "type_v": at.type_v, "swa_full": at.swa_full}
        kv = kv_cache_bytes(shards.headers[0], at.n_ctx, min(at.n_batch, at.n_ubatch), **types).total
        plans = {"kv_bytes": kv, "kv_planned_bytes": plan["kv_bytes"], "compute_bytes": plan["compute_bytes"]}
        whole = {"weights_bytes": weights_bytes(shards.as_one), "predicted_bytes": kv + plan["compute_bytes"]}
        taken = {"anonymous_bytes": nan, "resident_bytes": nan}
        if number >= first:
            job = {"path": str(shards.paths[0]), "fill_tokens": fill_tokens, "settings": at.as_dict()}
            taken = child.run(
                "dfqs_nb.context.memory_child", job, where=path, timeout_seconds=TIMEOUT_SECONDS
            )
        rows.append({"n_ctx": at.n_ctx, **plans, **whole, **taken})
    return pd.DataFrame(rows)


def memory_within(model: Model, speed: PrefillSpeed, lengths: Sequence[int], stage: Stage) -> pd.DataFrame:
    """`memory_table` of an opened (or closed) model, measured as far as the stage's budget allows.

    Each length loads the model again. Cut in this order: 1,024 tokens that fill a context, the shortest
    lengths, 256 and 64 tokens; then memory is only predicted. The stage notes the cuts.
    """
    lengths = [n for n in lengths if n >= 256] or list(lengths)
    cuts = [{"fill": 1024}, *({"lengths": k} for k in range(len(lengths) - 1, 0, -1))]
    cuts += [{"fill": 256}, {"fill": 64}, {"lengths": 0}]

    def cost(plan: dict[str, int]) -> float:
        measured = lengths[len(lengths) - plan["lengths"] :]
        return sum(model.load_seconds + speed.seconds(min(n, plan["fill"])) for n in measured)

    whole = {"lengths": len(lengths), "fill": min(4096, lengths[-1])}
    plan = fit(whole, cuts, cost, 0.9 * stage.seconds_left)
    n = plan.values["lengths"]
    if n < len(lengths):
        stage.leave_out([f"memory of {n} of {len(lengths)} lengths" if n else "memory: not measured"])
    return memory_table(model.path, lengths, model.settings, measured=n, fill_tokens=plan.values["fill"])
