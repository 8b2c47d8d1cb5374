"""Plan a long-context measurement: what it costs in time and memory is known before it starts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

from dfqs_nb.context.boundary import octaves
from dfqs_nb.context.haystacks import Haystacks, Probe, probe_of
from dfqs_nb.core.display import duration, quoted
from dfqs_nb.core.errors import DfqsError, StageError
from dfqs_nb.core.machine import available_memory, gpu_memories, usable_cores
from dfqs_nb.core.stage import Stage, fit, read_stage
from dfqs_nb.gguf.shards import Files, ShardSet, open_shards
from dfqs_nb.llama.check import needs_of, plan_memory
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings, own_context, threads_for
from dfqs_nb.llama.timing import probe, random_tokens, seconds_of

CURVE_SHARE = 0.8  # of the budget; the rest is for the other parts of notebook 05
CHECK_TOKENS = 160  # of a text, for the check of reuse: more than a window or a compressed block of 128
# how texts are made: answers under another protocol are not comparable
PROTOCOL = "fixed keys and nothing else, fresh texts for each length"
PROBE_SHARE, MOST_SECONDS = 1 / 15, 30.0  # that a chunk of the probe takes: of the budget, and in all
CHUNKS = (256, 32)  # tokens
SPARE_TOKENS = 64  # of context, for the answer
LEAST_CONTEXT = 1024  # tokens that a context has, however little the budget holds
NO_LIMIT = 8192  # tokens, where a header states no limit


# ---- time ----


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


def measure_prefill(model: Model, deepest: int, budget_seconds: float = inf) -> PrefillSpeed:
    """Time chunks of tokens, one after another, up to ``deepest`` or for 10 s, and draw a line through them.

    The line is Theil and Sen's, which is robust. A large model is timed by smaller chunks, or by its first
    tokens alone; with fewer than three chunks the cost is taken not to grow with depth.
    """
    from scipy.stats import theilslopes

    pace, limit = probe(model), min(MOST_SECONDS, PROBE_SHARE * budget_seconds)
    size = next((n for n in CHUNKS if n * pace.prefill <= limit), 0)
    if not size:
        return PrefillSpeed(pace.prefill, 0.0, pace.decode)
    tokens, depths, seconds = random_tokens(model, min(deepest, model.settings.n_ctx)), [], []
    begun = time.perf_counter()
    for start in range(0, len(tokens), size):
        chunk = tokens[start : start + size]
        seconds.append(seconds_of(model, [chunk]) / len(chunk))
        depths.append(start + len(chunk) / 2)
        if time.perf_counter() - begun > limit / 3:
            break
    model.clear()
    if len(depths) < 3:
        return PrefillSpeed(min(seconds), 0.0, pace.decode)
    slope, base, *_ = theilslopes(seconds, depths)
    return PrefillSpeed(max(float(base), min(seconds) / 2), max(float(slope), 0.0), pace.decode)


class Meter:
    """A time limit, and how much slower than planned the work was so far. ``end``: by `time.monotonic`."""

    def __init__(self, seconds: float) -> None:
        self.end, self._planned, self._taken = time.monotonic() + seconds, 0.0, 0.0

    def holds(self, cost: float) -> bool:
        """Whether work of so many planned seconds ends in time."""
        slower = max(1.0, self._taken / self._planned) if self._planned else 1.0
        return time.monotonic() + slower * cost <= self.end

    @contextmanager
    def spend(self, cost: float) -> Iterator[None]:
        """Do work of so many planned seconds."""
        begun = time.monotonic()
        yield
        self._taken += time.monotonic() - begun
        self._planned += cost


@contextmanager
def crew(model: Model) -> Iterator[list[Model]]:
    """An open model, and a copy for each core that a small one leaves idle."""
    small = threads_for(model.header) == 1
    n = usable_cores() // (model.settings.n_threads or 1) if small else 1
    with ExitStack() as stack:
        copies = (open_model(model.shards, model.settings, trial=False) for _ in range(n - 1))
        yield [model, *(stack.enter_context(copy) for copy in copies)]


def side_by_side(workers: Sequence[Any], work: Callable[[Any, Any], Any], items: Sequence[Any]) -> list[Any]:
    """The results of ``work(worker, item)``; after an error or Ctrl-C no other item is begun."""
    if (n := len(workers)) == 1:  # in this thread, where Ctrl-C ends an item, too
        return [work(workers[0], item) for item in items]
    stopped = threading.Event()

    def part(k: int) -> list[Any]:
        return [work(workers[k], item) for item in items[k::n] if not stopped.is_set()]

    with ThreadPoolExecutor(n) as pool:
        parts = [pool.submit(part, k) for k in range(n)]
        try:
            done = [part.result() for part in parts]
        except BaseException:
            stopped.set()
            raise
    return [done[at % n][at // n] for at in range(len(items))]


@dataclass(frozen=True)
class Plan:
    """What will be measured."""

    probe: Probe  # the prompt set; it fixes the number of keys
    grid: tuple[int, ...]  # lengths in tokens of context, ascending; the answer begins at about that depth
    n_haystacks: int  # texts for each length; 0: the budget does not hold the least plan
    question_tokens: int  # evaluated for a question
    reuse: bool  # ask every question of a text from its saved state
    speed: PrefillSpeed  # which costs are made of
    rounds: int = 1  # see `search_lengths`
    budget_seconds: float = inf  # what is not expected to end in it is not begun: censored, not failed
    left_out: tuple[str, ...] = ()  # what the budget took away

    def n_texts(self, length: int) -> int:
        """Texts asked about at a length: of several, twice as many at the shortest, which a_0 comes from."""
        return self.n_haystacks * (2 if length == self.grid[0] and self.n_haystacks > 1 else 1)

    def text_seconds(self, length: int) -> float:
        """Seconds that a text of this length takes with its questions."""
        n, text = self.probe.needles, self.speed.seconds(length)
        more = (n - 1) * self.question_tokens * (self.speed.base + self.speed.by_depth * length)
        return text + more if self.reuse else n * text

    @property
    def seconds(self) -> float:
        """Seconds that the planned lengths take, with the check of reuse."""
        check = 0.0
        if self.reuse and self.n_haystacks:
            check = self.speed.seconds(CHECK_TOKENS) + 2 * self.question_tokens * self.speed.base
        return check + sum(self.n_texts(n) * self.text_seconds(n) for n in self.grid)

    def kept(self, stage: Stage, model_sha256: str, *, fresh: bool = False) -> Plan:
        """The plan cut until its share of the budget holds it, or as an earlier run of the stage cut it.

        First 6 and 4 texts a length, and lengths down to four; then 2 texts, the other lengths, one text; at
        last nothing is asked, and the command is named that measures something.
        """
        n, budget = len(self.grid), CURVE_SHARE * self.budget_seconds
        cuts = [{"texts": 6}, {"texts": 4}, *({"lengths": k} for k in range(n - 1, 3, -1)), {"texts": 2}]
        cuts += [*({"lengths": k} for k in range(min(n, 4), 0, -1)), {"texts": 1}, {"texts": 0}]

        def made(cut: dict[str, int]) -> Plan:
            return replace(self, n_haystacks=cut["texts"], grid=self.grid[: cut["lengths"]])

        def make() -> dict[str, Any]:
            whole, names = {"texts": self.n_haystacks, "lengths": n}, {"texts": "texts a length"}
            fitted = fit(whole, cuts, lambda cut: made(cut).seconds, budget, names)
            return {"cut": fitted.values, "left_out": fitted.left_out}

        conditions = {**self.conditions(), "model": model_sha256}
        note = stage.plan(conditions, make, fresh=fresh)
        note = note if note["cut"]["texts"] else stage.plan(conditions, make, fresh=True)
        plan, left_out = made(note["cut"]), note["left_out"]
        if not plan.n_haystacks:
            least, spent = replace(plan, n_haystacks=1).seconds, stage.budget_seconds - stage.seconds_left
            minutes = ceil((least / CURVE_SHARE + spent) * 1.2 / 60)
            command = f"dfqs-nb run 05 07 --run {quoted(stage.folder.name)} -p budget_minutes={minutes}"
            what = f"not measured (the least takes {duration(least)}; `{command}`)"
            left_out = [f"the curve and the boundary: {what}"]
        stage.leave_out(left_out)
        return replace(plan, left_out=tuple(left_out), budget_seconds=budget)

    @property
    def cost_sentence(self) -> str:
        """What the plan costs, and what the budget took away."""
        if not self.n_haystacks:
            return "; ".join(self.left_out)
        cut = f". Cut to keep to the budget: {'; '.join(self.left_out)}" if self.left_out else ""
        return f"the curve to {self.grid[-1]:,} tokens will take about {duration(self.seconds)}{cut}"

    def conditions(self) -> dict[str, Any]:
        """What the answers depend on, beside the model."""
        texts = {"grid": list(self.grid), "n_haystacks": self.n_haystacks, "reuse": self.reuse}
        return {**self.probe.identity(), "protocol": PROTOCOL, "keys": self.probe.needles, **texts}


def make_plan(
    model: Model,
    prompt_set: str,
    longest: int,
    *,
    shortest: int | None = None,
    n_haystacks: int = 12,
    rounds: int = 1,
    budget_seconds: float = inf,
) -> Plan:
    """Plan lengths ``shortest * 2^k`` to ``longest`` (0: what the context holds), and time a model's prefill.

    ``prompt_set``: a probe's name, or a tier. ``shortest``: by default 256 tokens, or 64 for a single key,
    doubled until it holds the keys. A `DfqsError`: there is no such probe, or ``shortest`` cannot hold its
    keys; a `DfqsError`: ``longest`` is below it.
    """
    probe, began = probe_of(prompt_set), time.monotonic()
    haystacks = Haystacks(model, probe, shortest)
    if not shortest:
        shortest = 256 if probe.needles > 1 else 64
        while shortest < haystacks.least_tokens:
            shortest *= 2
    longest = longest or model.settings.n_ctx - SPARE_TOKENS
    grid = tuple(octaves(shortest, longest))
    if not grid:
        raise DfqsError(f"no length up to {longest:,} tokens", hint=f"the shortest is {shortest}")
    speed = measure_prefill(model, longest, budget_seconds)
    budget_seconds -= time.monotonic() - began
    reuse, n = probe.needles > 1, haystacks.question_tokens
    return Plan(probe, grid, n_haystacks, n, reuse, speed, rounds, budget_seconds)


# ---- memory ----


@dataclass(frozen=True)
class RuntimeFailure:
    """The first length that could not be run, or that memory will not hold, and why."""

    length: int
    cause: str
    message: str


def predict_failure(
    shards: ShardSet, lengths: Sequence[int], settings: OpenSettings, available_bytes: int | None = None
) -> RuntimeFailure | None:
    """The first length whose memory (KV cache, its saved copy, compute buffer) or cards do not hold it.

    llama.cpp plans the buffer in a child process and allocates nothing: the file has not been tried yet.
    """
    available = available_memory().available_bytes if available_bytes is None else available_bytes
    cards = sum(gpu_memories()) if settings.n_gpu_layers else 0
    by_length = [replace(settings, n_ctx=n_ctx) for n_ctx in lengths]
    plans = plan_memory(shards.paths[0], by_length)
    for n_ctx, each, plan in zip(lengths, by_length, plans, strict=True):
        needs = needs_of(shards.as_one, each, plan)
        here = needs.must_fit_bytes + plan["kv_bytes"], available, "beside the weights"
        for required, free, where in (here, (needs.card_bytes, cards or inf, "on graphics cards")):
            if required > free:
                needed = f"{n_ctx:,} tokens need {required:,} bytes {where}"
                return RuntimeFailure(n_ctx, "oom", f"{needed}, and {free:,} are free")
    return None


def settings_for(
    model: Files, longest: int, settings: OpenSettings, stage: Stage, prompt_set: str, *, fresh: bool = False
) -> tuple[OpenSettings, RuntimeFailure | None]:
    """Settings with room for the longest length that fits in memory, and the first that does not.

    ``longest``: tokens, at most the model's own limit; 0: that limit (or `NO_LIMIT`), and what the budget
    holds at the prefill speed of notebook 03. That is kept as `Stage.plan` keeps a plan: in a context of
    another size no earlier answer would count. A `DfqsError`: there is no such prompt set.
    """
    probe_of(prompt_set)
    shards = open_shards(model)
    limit = own_context(shards.as_one) or max(longest, NO_LIMIT)

    def affordable() -> dict[str, int]:
        speeds = list[float]()
        with suppress(StageError):  # this notebook may run alone
            rows = read_stage(stage.folder, "generate").get("speed") or []
            speeds = [row["median"] for row in rows if row.get("phase") == "prefill"]
        return {"tokens": int(min(limit, max(LEAST_CONTEXT, stage.seconds_left * max(speeds, default=inf))))}

    if not longest:
        beside = Stage(stage.folder, f"{stage.name}.context", stage.budget_seconds / 60)  # the curve's plan
        about = {**settings.as_dict(), "files": shards.stamps()}
        longest = beside.plan(about, affordable, fresh=fresh)["tokens"]
    longest = min(longest, limit)
    failure = predict_failure(shards, octaves(256, longest) or [longest], settings)
    reach = longest if failure is None else failure.length // 2
    return replace(settings, n_ctx=reach + SPARE_TOKENS), failure
