"""Time an open model: prefill and decode, with their spread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from dfqs_nb.llama.model import ContextFullError, Model


@dataclass(frozen=True)
class Spread:
    """Repeated measurements: their median, extremes, and the values in order of measurement."""

    median: float
    min: float
    max: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(median(values), min(values), max(values), tuple(values))


@dataclass(frozen=True)
class Speed:
    """Tokens a second: prefill of ``depth`` tokens at once, then decode of ``n_tokens`` one by one."""

    depth: int
    n_tokens: int
    repetitions: int
    n_threads: int
    prefill_tokens_per_sec: Spread
    decode_tokens_per_sec: Spread

    def rows(self) -> list[dict[str, Any]]:
        """One row for each of prefill and decode, ready for a DataFrame."""
        shared = {"depth": self.depth, "n_threads": self.n_threads, "repetitions": self.repetitions}
        return [
            {"phase": phase, **shared, "tokens": tokens, **asdict(spread)}
            for phase, tokens, spread in (
                ("prefill", self.depth, self.prefill_tokens_per_sec),
                ("decode", self.n_tokens, self.decode_tokens_per_sec),
            )
        ]


def measure_speed(
    model: Model, depth: int = 512, n_tokens: int = 128, repetitions: int = 5, seed: int = 42
) -> Speed:
    """Time prefill and teacher-forced decode on seeded random tokens, after a warm-up.

    The tokens are given, not chosen, so no sampling is timed; each repetition starts from a cleared context.

    Raises:
        ContextFullError: ``depth + n_tokens`` exceeds ``n_ctx``.
    """
    tokens = np.random.default_rng(seed).integers(0, model.n_vocab, depth + n_tokens).tolist()
    prompt, forced = tokens[:depth], tokens[depth:]
    if len(tokens) > model.settings.n_ctx:
        raise ContextFullError(
            f"{len(tokens):,} tokens exceed the context of {model.settings.n_ctx:,}",
            where=model.path,
            hint="lower the depth, or open the model with a larger n_ctx",
        )
    _time_once(model, prompt[:16], forced[:4])
    seconds = [_time_once(model, prompt, forced) for _ in range(repetitions)]
    model.clear()
    return Speed(
        depth,
        n_tokens,
        repetitions,
        model.settings.n_threads or 0,
        Spread.of([depth / prefill for prefill, _ in seconds]),
        Spread.of([n_tokens / decode for _, decode in seconds]),
    )


def _time_once(model: Model, prompt: Sequence[int], forced: Sequence[int]) -> tuple[float, float]:
    """Seconds of the prefill, and of the decode of all forced tokens."""
    model.clear()
    started = time.perf_counter()
    model.decode(prompt)
    model.synchronize()
    filled = time.perf_counter()
    for token in forced:
        model.decode([token])
        model.synchronize()
    return filled - started, time.perf_counter() - filled
