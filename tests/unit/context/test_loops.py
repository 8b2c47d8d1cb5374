"""Loops in long answers: found in periodic texts, not in near misses; and asked for under conditions."""

from __future__ import annotations

import json
import random

import numpy as np
import pandas as pd
import pytest
from report_builder import append_damaged

from dfqs_nb.context import tasks
from dfqs_nb.context.plan import PrefillSpeed
from dfqs_nb.context.tasks import LEAST_TIMES, LEAST_TOKENS, Loop, first_loop
from dfqs_nb.core.paths import data_dir
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.stats import wilson

MODEL = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
OPEN = OpenSettings(n_ctx=256, n_threads=1)


def prose(n: int, seed: int = 0) -> list[int]:
    """Tokens that never come back."""
    return random.Random(seed).sample(range(1000, 9000), n)


@pytest.mark.parametrize("period", [1, 2, 7, 16, 64, 128])
@pytest.mark.parametrize("before", [0, 5, 100])
def test_a_periodic_text_is_one_loop_from_its_first_copy_on(period, before):
    block, times = list(range(period)), max(LEAST_TIMES, -(-LEAST_TOKENS // period))
    tokens = prose(before) + block * times + prose(20, 1)
    assert first_loop(tokens) == Loop(before, period, period * times)
    assert first_loop(tokens + block * times * 2) == Loop(before, period, period * times), "the first counts"


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        prose(2000),
        [1] * (LEAST_TOKENS - 1),
        prose(30) + list(range(40)) * (LEAST_TIMES - 1) + prose(30, 1),
        # a list that counts on, and blocks of which one word differs
        [token for n in range(60) for token in (1, 2, 3, 100 + n)],
        [*range(30), 900, *range(30), 901, *range(30), 902, *range(30), 903],
    ],
)
def test_a_near_miss_is_no_loop(tokens):
    assert first_loop(tokens) is None


def test_a_loop_is_what_a_slow_search_finds():
    def slow(tokens):
        for start in range(len(tokens)):
            for period in range(1, len(tokens) // LEAST_TIMES + 1):
                end = start + period
                while end < len(tokens) and tokens[end] == tokens[end - period]:
                    end += 1
                if end - start >= max(LEAST_TIMES * period, LEAST_TOKENS):
                    return Loop(start, period, end - start)
        return None

    rng = np.random.default_rng(0)
    for _ in range(30):
        tokens = rng.integers(0, 2, 20).tolist() * rng.integers(1, 6) + rng.integers(0, 2, 120).tolist()
        assert first_loop(tokens) == slow(tokens)


def test_the_rate_counts_answers_that_reach_the_limit():
    rows = [(0.0, True, True)] * 3 + [(0.0, True, False), (0.0, False, True), (1.0, False, False)]
    table = tasks.loop_rates(pd.DataFrame(rows, columns=["temperature", "long", "looped"])).set_index(
        "temperature"
    )
    assert table.loc[0.0, ["asked", "long", "looped", "rate"]].tolist() == [5, 4, 3, 0.75]
    assert tuple(table.loc[0.0, ["low", "high"]]) == tuple(float(edge) for edge in wilson(3, 4))
    assert np.isnan(table.loc[1.0, "rate"]) and table.loc[1.0, "long"] == 0


def test_a_second_run_asks_nothing_and_a_budget_leaves_out(tmp_path, monkeypatch):
    few, speed = {"n_answers": 2, "n_tokens": 80}, PrefillSpeed(0.0, 0.0, 0.01)
    with open_model(MODEL, OPEN, trial=False) as model:
        none, missing = tasks.measure_loops(model, tmp_path, speed, **few, budget_seconds=0)
        assert not len(none) and missing == ["the table of long answers: not measured"] and "rate" in none
        late = PrefillSpeed(0.0, 0.0, 0.0)  # it takes longer than this says, and is cut
        none, missing = tasks.measure_loops(model, tmp_path, late, **few, budget_seconds=0.01)
        assert not len(none) and not (tmp_path / tasks.LONG_JOURNAL).exists() and missing
        first, missing = tasks.measure_loops(model, tmp_path, speed, **few)
        assert first["asked"].tolist() == [2, 2] and not missing
        lines = [json.loads(line) for line in (tmp_path / tasks.LONG_JOURNAL).read_text().splitlines()]
        assert max(len(line["tokens"]) for line in lines) <= 80
        append_damaged(tmp_path / tasks.LONG_JOURNAL)
        monkeypatch.setattr(tasks, "chat", lambda *_, **__: pytest.fail("asked again"))
        again, _ = tasks.measure_loops(model, tmp_path, speed, **few)
    pd.testing.assert_frame_equal(first, again)
