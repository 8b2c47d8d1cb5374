"""Long answers: how many fall into a repeat, where, and for how long.

DeepSeek-V4-Flash is reported to do so in long agent chats (ggml-org/llama.cpp#26694).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from math import inf, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dfqs_nb.context.plan import Meter
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.journal import Journal, holds
from dfqs_nb.core.prompts import PromptSet, load_prompts
from dfqs_nb.llama.generate import Sampling, chat
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.llama.timing import probe
from dfqs_nb.stats import wilson

NAME, JOURNAL = "long-generation", "long_generation.jsonl"
LEAST_TIMES, LEAST_TOKENS = 4, 64  # of a block that follows itself, and of all its copies together


class Requests(PromptSet):
    """The frozen requests for long answers."""

    prompts: tuple[str, ...]


class Loop(NamedTuple):
    """A block of ``period`` tokens that follows itself, from ``start`` on, for ``length`` tokens in all."""

    start: float = nan
    period: float = nan
    length: float = nan


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


@dataclass(frozen=True)
class LoopRun:
    """Long answers: ``items`` has a row an answer.

    ``cache``, ``temperature``, ``number``, ``n_tokens``, ``ended`` (before the token limit), and its first
    loop's ``start``, ``period`` and ``length``, NaN without a loop.
    """

    items: pd.DataFrame = field(repr=False)
    left_out: tuple[str, ...] = ()

    def table(self) -> pd.DataFrame:
        """By cache type and temperature: the share of long answers that fall into a repeat.

        ``long``: answers that reach the token limit; ``looped``: those of them with a loop; ``rate`` (NaN
        without a long answer) with its interval; medians of the first loop's numbers.
        """
        by, loop = ["cache", "temperature"], list(Loop._fields)
        items = self.items.reindex(columns=[*by, "ended", *loop])  # also where there are no answers
        items["long"] = ~items["ended"].astype(bool)
        items["looped"] = items["long"] & items["start"].notna()
        table = items.groupby(by, sort=False)[["long", "looped"]].sum().astype(int)
        table.insert(0, "asked", items.groupby(by).size())
        low, high = wilson(table["looped"], table["long"])
        table = table.assign(rate=table["looped"] / table["long"], low=low, high=high)
        return table.join(items[items["looped"]].groupby(by)[loop].median()).reset_index()


def measure_loops(
    path: str | Path,
    folder: str | Path,
    settings: OpenSettings,
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    cache_types: Sequence[str] = ("f16", "q8_0"),
    n_answers: int = 12,
    n_tokens: int = 512,
    budget_seconds: float = inf,
    fresh: bool = False,
) -> LoopRun:
    """Ask for long answers under every cache type and temperature; resumes after a kill.

    Flash attention is on throughout, because a quantized cache needs it. An answer's number is its request
    and its seed, so conditions differ in nothing else. ``long_generation.jsonl`` in ``folder`` keeps them.
    The cache types share the budget; no answer is begun that is not expected to end in it.

    Raises `DfqsError` for a temperature below 0, and `ModelError` for a cache type that llama.cpp lacks.
    """
    requests, end, identity = load_prompts(NAME, Requests), time.perf_counter() + budget_seconds, ""
    # each cache type is checked before the first is asked; a condition given twice counts once
    opened = {cache: replace(settings, type_k=cache, type_v=cache, flash_attn=True) for cache in cache_types}
    if odd := [it for it in temperatures if not 0 <= it < inf]:
        raise DfqsError(f"the temperature {odd[0]:g}", hint="give 0 or more: --temperature 0,1")
    turns = [*product(range(min(n_answers, len(requests.prompts))), dict.fromkeys(temperatures))]
    rows, left_out = list[dict[str, Any]](), list[str]()
    for at, cache in enumerate(opened):
        with open_model(path, opened[cache]) as model:
            identity = identity or model.sha256()  # read once: a large file takes minutes
            made = {**model.conditions(), **requests.identity(), "n_tokens": n_tokens}
            made |= {"model": identity, "sampling": asdict(Sampling())}
            again, whole = fresh and at == 0, partial(holds, fields={"tokens": list, "ended": bool})
            journal = Journal(Path(folder) / JOURNAL, made, fresh=again, whole=whole)
            meter = Meter((end - time.perf_counter()) / (len(opened) - at))
            cost, missing = probe(model).seconds(0, n_tokens), 0
            for number, temperature in tqdm(turns, leave=False):
                key = f"{temperature}/{number}"
                if key not in journal:
                    if not meter.holds(cost):
                        missing += 1
                        continue
                    how = n_tokens, Sampling(temperature, seed=number)
                    with meter.spend(cost):
                        answer = chat(model, requests.prompts[number], *how)
                    journal.add(key, tokens=answer.token_ids, ended=answer.finish_reason != "length")
                tokens, ended = journal[key]["tokens"], journal[key]["ended"]
                row = {"cache": cache, "temperature": temperature, "number": number, "ended": ended}
                rows.append({**row, "n_tokens": len(tokens), **(first_loop(tokens) or Loop())._asdict()})
        if missing:
            left_out.append(f"{missing} of {len(turns)} answers with a {cache} cache")
    return LoopRun(pd.DataFrame(rows), tuple(left_out))
