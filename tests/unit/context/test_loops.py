"""Loops in long answers: found in periodic texts, not in near misses; and asked for under conditions."""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import pytest
from report_builder import append_damaged

from dfqs_nb.context import loops
from dfqs_nb.context.loops import LEAST_TIMES, LEAST_TOKENS, Loop, LoopRun, first_loop, measure_loops
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.paths import data_dir
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
    nan = float("nan")
    rows = [("f16", 0.0, False, 10.0)] * 3 + [("f16", 0.0, False, nan), ("f16", 0.0, True, 5.0)]
    rows += [("q8_0", 0.0, True, nan)]
    items = pd.DataFrame(rows, columns=["cache", "temperature", "ended", "start"]).assign(
        period=2.0, length=80.0
    )
    table = LoopRun(items).table().set_index("cache")
    assert table.loc["f16", ["asked", "long", "looped", "rate", "start"]].tolist() == [5, 4, 3, 0.75, 10]
    assert tuple(table.loc["f16", ["low", "high"]]) == tuple(float(edge) for edge in wilson(3, 4))
    assert np.isnan(table.loc["q8_0", "rate"]) and table.loc["q8_0", "long"] == 0


def test_a_second_run_asks_nothing_and_a_budget_leaves_out(tmp_path, monkeypatch):
    few = {"n_answers": 2, "n_tokens": 80, "cache_types": ("f16", "q8_0")}
    none = measure_loops(MODEL, tmp_path, OPEN, **few, budget_seconds=0)
    assert not len(none.items) and none.left_out[1] == "4 of 4 answers with a q8_0 cache"
    assert not len(none.table()) and "rate" in none.table()
    first = measure_loops(MODEL, tmp_path, OPEN, **few)
    assert first.table()["asked"].tolist() == [2, 2, 2, 2] and first.items["n_tokens"].max() <= 80
    append_damaged(tmp_path / "long_generation.jsonl")
    monkeypatch.setattr(loops, "chat", lambda *_: pytest.fail("asked again"))
    again = measure_loops(MODEL, tmp_path, OPEN, **few)
    pd.testing.assert_frame_equal(first.items, again.items)
    with pytest.raises(ModelError, match="type_k is 'x'"):
        measure_loops(tmp_path / "none.gguf", tmp_path, OPEN, cache_types=["f16", "x"])  # before it is opened
    twice = measure_loops(
        MODEL, tmp_path, OPEN, **few | {"cache_types": ["f16"] * 2}, temperatures=[0.0, 0.0]
    )
    assert twice.table()["asked"].tolist() == [2], "no answer counts twice"


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused_before_a_model_is_opened(tmp_path, temperature):
    with pytest.raises(DfqsError, match="the temperature"):
        measure_loops(tmp_path / "none.gguf", tmp_path, OPEN, temperatures=[0.0, temperature])
