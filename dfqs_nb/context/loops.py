"""Long answers: how many fall into a repeat, where, and for how long.

DeepSeek-V4-Flash is reported to do so in long agent chats (ggml-org/llama.cpp#26694).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dfqs_nb.context.plan import Meter, PrefillSpeed, crew, side_by_side
from dfqs_nb.core.journal import Journal
from dfqs_nb.core.prompts import PromptSet, load_prompts
from dfqs_nb.llama.generate import Sampling, chat
from dfqs_nb.llama.model import Model
from dfqs_nb.stats import wilson

NAME, JOURNAL = "long-generation", "long_generation.jsonl"
TEMPERATURES = 0.0, 1.0
LEAST_TIMES, LEAST_TOKENS = 4, 64  # of a block that follows itself, and of all its copies together


class Requests(PromptSet):
    """The frozen requests for long answers."""

    prompts: tuple[str, ...]


class Loop(NamedTuple):
    """A block of ``period`` tokens that follows itself, from ``start`` on, for ``length`` tokens in all."""

    start: int
    period: int
    length: int


def first_loop(tokens: Sequence[int]) -> Loop | None:
    """The earliest run in which a block comes at least 4 times in a row and fills at least 64 tokens.

    Copies are equal token by token, so a list with growing numbers is not a loop.

    >>> first_loop([7, 8, 9] + [1, 2] * 40 + [5])
    Loop(start=3, period=2, length=80)
    """
    ids, loops = np.asarray(tokens), []
    for period in range(1, len(ids) // LEAST_TIMES + 1):
        same = np.concatenate([[False], ids[period:] == ids[:-period], [False]])
        edges = np.flatnonzero(np.diff(same.astype(np.int8)))
        starts, lengths = edges[::2], edges[1::2] - edges[::2] + period
        long = np.flatnonzero(lengths >= max(LEAST_TIMES * period, LEAST_TOKENS))
        loops += [Loop(int(starts[k]), period, int(lengths[k])) for k in long[:1]]
    return min(loops, default=None)


def measure_loops(
    model: Model,
    folder: str | Path,
    speed: PrefillSpeed,
    *,
    n_answers: int = 12,
    n_tokens: int = 512,
    budget_seconds: float = inf,
    model_id: str = "",
    fresh: bool = False,
) -> tuple[pd.DataFrame, list[str]]:
    """Ask for long answers at each temperature: the table of `rates`, and what was left out.

    Resumes after a kill: ``long_generation.jsonl`` in ``folder`` keeps the answers. An answer's number is its
    request and its seed, so temperatures differ in nothing else. No answer is begun that is not expected to
    end in the budget, at this speed. ``n_tokens``: of an answer, fewer where the context is shorter.
    """
    requests, n_tokens = load_prompts(NAME, Requests), min(n_tokens, model.settings.n_ctx // 2)
    made = {**model.conditions(), **requests.identity(), "n_tokens": n_tokens, "model": model_id}
    made["sampling"], fields = asdict(Sampling()), {"tokens": list, "ended": bool}
    journal = Journal(Path(folder) / JOURNAL, made, fresh=fresh, fields=fields)
    meter, cost = Meter(budget_seconds), n_tokens * speed.decode
    turns = [*product(range(min(n_answers, len(requests.prompts))), TEMPERATURES)]

    def ask(copy: Model, turn: tuple[int, float]) -> None:
        number, temperature = turn
        if str(turn) in journal or not meter.holds(cost):
            return
        with meter.spend(cost):
            answer = chat(copy, requests.prompts[number], n_tokens, Sampling(temperature, seed=number))
        journal.add(str(turn), tokens=answer.token_ids, ended=answer.finish_reason != "length")

    with crew(model) as models:
        side_by_side(models, ask, turns)
    rows = [(turn[1], journal[str(turn)]) for turn in turns if str(turn) in journal]
    missing = [f"{len(turns) - len(rows)} of {len(turns)} long answers"] if len(rows) < len(turns) else []
    missing = missing if rows else ["the table of long answers: not measured"]
    items = [(temperature, not it["ended"], first_loop(it["tokens"]) is not None) for temperature, it in rows]
    return rates(pd.DataFrame(items, columns=["temperature", "long", "looped"])), missing


def rates(items: pd.DataFrame) -> pd.DataFrame:
    """By temperature: the share of long answers that fall into a repeat.

    ``long``: answers that reach the token limit; ``looped``: those of them with a loop; ``rate`` (NaN without
    a long answer) with its interval.
    """
    items = items.assign(looped=items["long"] & items["looped"]).astype({"long": bool, "looped": bool})
    groups = items.groupby("temperature", sort=False)
    table = groups.agg(asked=("long", "size"), long=("long", "sum"), looped=("looped", "sum"))
    low, high = wilson(table["looped"], table["long"])
    return table.assign(rate=table["looped"] / table["long"], low=low, high=high).reset_index()
