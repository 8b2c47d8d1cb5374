"""Time an open model: prefill and decode, with their spread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from dfqs_nb.core.budget import duration, fit
from dfqs_nb.core.display import tqdm
from dfqs_nb.llama.model import Model

PROBE_PROMPT, PROBE_ANSWER, PROBE_SECONDS = 16, 4, 5.0
PROMPT_TOKENS = 32  # of a short question in its template
NAMES = {
    "n_answers": "answers",
    "max_tokens": "tokens of an answer",
    "depth": "tokens of depth",
    "n_tokens": "timed tokens",
    "repetitions": "repetitions",
}
CUTS: tuple[dict[str, int], ...] = (  # what a plan that exceeds its budget gives up, in this order
    {"repetitions": 3},
    {"n_tokens": 32},
    {"max_tokens": 32},
    {"depth": 128},
    {"n_tokens": 8},
    {"max_tokens": 8},
    {"repetitions": 1},
    {"depth": 16, "n_tokens": 4},
    {"max_tokens": 2},
    {"n_answers": 3},
    {"n_answers": 1},
)


@dataclass(frozen=True)
class Pace:
    """Seconds that a token of prompt and a token of answer take at a short context."""

    prefill: float
    decode: float

    def seconds(self, n_prompt: float, n_answer: float) -> float:
        """Seconds of a prompt and an answer of so many tokens."""
        return n_prompt * self.prefill + n_answer * self.decode


def probe(model: Model) -> Pace:
    """Time a few tokens: three times, unless the first took long; the fastest counts.

    The first time reads weights from the disk, which later tokens find in memory.
    """
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, PROBE_PROMPT + PROBE_ANSWER).tolist()
    times: list[tuple[float, float]] = []
    while not times or len(times) < 3 and sum(map(sum, times)) < PROBE_SECONDS:
        times.append(time_once(model, tokens[:PROBE_PROMPT], tokens[PROBE_PROMPT:]))
    model.clear()
    prefill, decode = (min(seconds) for seconds in zip(*times, strict=True))
    return Pace(prefill / PROBE_PROMPT, decode / PROBE_ANSWER)


def plan_cost(
    model: Model,
    *,
    n_answers: int,
    max_tokens: int,
    depth: int,
    n_tokens: int,
    repetitions: int,
    budget_minutes: float,
) -> SimpleNamespace:
    """Time a short probe, and cut the plan (`CUTS`) until it fits the budget; the last cut may exceed it.

    Answers are planned at full length, depth and timed tokens at most at a half and a quarter of the context.

    Returns:
        The numbers given, as cut, the fields of `core.budget.Fitted`, ``answer_seconds`` (of the budget, that
        timing leaves for answers) and a ``sentence`` for people.
    """
    pace, n_ctx, budget = probe(model), model.settings.n_ctx, 60 * budget_minutes

    def timing(plan: dict[str, int]) -> float:
        repeated = plan["repetitions"] * pace.seconds(plan["depth"], plan["n_tokens"])
        return repeated + pace.seconds(PROBE_PROMPT, PROBE_ANSWER)  # a warm-up

    def seconds(plan: dict[str, int]) -> float:
        return plan["n_answers"] * pace.seconds(PROMPT_TOKENS, plan["max_tokens"]) + timing(plan)

    depth, n_tokens = min(depth, n_ctx // 2), min(n_tokens, n_ctx // 4)
    plan = {"n_answers": n_answers, "max_tokens": max_tokens, "depth": depth, "n_tokens": n_tokens}
    fitted = fit(plan | {"repetitions": repetitions}, CUTS, seconds, budget, NAMES)
    cost = SimpleNamespace(**vars(fitted), **fitted.values)
    cost.answer_seconds = max(0.0, budget - timing(fitted.values))
    cost.sentence = (
        f"about {duration(cost.seconds)}: answers of up to {cost.max_tokens} tokens, then "
        f"{cost.repetitions} x {cost.n_tokens} timed tokens at depth {cost.depth}"
    )
    if cost.left_out:
        cost.sentence += (
            f" (cut to fit the budget; {duration(cost.full_seconds)} in full); answering stops inside a "
            f"question after {duration(cost.answer_seconds)}"
        )
    return cost


def measure_speed(
    model: Model, depth: int = 512, n_tokens: int = 128, repetitions: int = 5, seed: int = 42
) -> list[dict[str, Any]]:
    """Time prefill of ``depth`` seeded random tokens at once, then decode of ``n_tokens`` one by one.

    No token is sampled, and each repetition starts from a cleared context, after a warm-up.

    Returns:
        A row for each ``phase`` (prefill, decode): ``depth``, ``n_threads``, ``repetitions``, ``tokens``, and
        tokens a second as ``median``, ``min``, ``max`` and ``values`` in order of measurement.
    """
    tokens = np.random.default_rng(seed).integers(0, model.n_vocab, depth + n_tokens).tolist()
    prompt, forced = tokens[:depth], tokens[depth:]
    model.clear()
    model.check_room(tokens)
    time_once(model, prompt[:PROBE_PROMPT], forced[:PROBE_ANSWER])
    seconds = [time_once(model, prompt, forced) for _ in tqdm(range(repetitions), desc="timing", leave=False)]
    model.clear()
    shared = {"depth": depth, "n_threads": model.settings.n_threads, "repetitions": repetitions}
    rows = []
    for phase, n, at in (("prefill", depth, 0), ("decode", n_tokens, 1)):
        speeds = tuple(n / times[at] for times in seconds)
        spread = {"median": median(speeds), "min": min(speeds), "max": max(speeds), "values": speeds}
        rows.append({"phase": phase, **shared, "tokens": n, **spread})
    return rows


def time_once(model: Model, prompt: Sequence[int], forced: Sequence[int]) -> tuple[float, float]:
    """Seconds of the prefill, and of the decode of all forced tokens, from a cleared context."""
    model.clear()
    started = time.perf_counter()
    model.decode(prompt)
    model.synchronize()
    filled = time.perf_counter()
    for token in forced:
        model.decode([token])
        model.synchronize()
    return filled - started, time.perf_counter() - filled
