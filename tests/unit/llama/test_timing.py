"""Timing: plans and their cuts, and the spread of a speed."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest

from dfqs_nb.core.machine import Load
from dfqs_nb.core.paths import data_dir
from dfqs_nb.llama import timing
from dfqs_nb.llama.model import ContextFullError, open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.llama.timing import Pace, plan_cost

MODEL = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
PACE = Pace(prefill=0.001, decode=0.01)


@pytest.fixture(scope="module")
def nano():
    with open_model(MODEL, OpenSettings(n_ctx=512, n_threads=1)) as model:
        yield model


# ---- speeds ----


def test_a_probe_times_a_few_tokens_and_clears_up(nano, monkeypatch):
    evaluated = []
    monkeypatch.setattr(timing, "seconds_of", lambda _, batches: evaluated.append(list(batches)) or 0.16)
    pace = timing.probe(nano)
    assert (pace.prefill, pace.decode) == (pytest.approx(0.01), pytest.approx(0.04)) and nano.n_past == 0
    assert [sum(map(len, batches)) for batches in evaluated] == [16, 4] * 3


def test_speed_has_its_spread_and_clears_up(nano):
    table = timing.measure_speed(nano, [64], n_tokens=8, repetitions=3)
    for row in table.itertuples():
        assert 0 < row.min <= row.median <= row.max and len(row.values) == row.repetitions == 3
    assert nano.n_past == 0
    assert table[["phase", "tokens"]].to_numpy().tolist() == [["prefill", 64], ["decode", 8]]
    with pytest.raises(ContextFullError):
        timing.measure_speed(nano, [512], n_tokens=8)


def test_repetitions_end_with_their_time_but_the_first_is_made(nano):
    assert set(timing.measure_speed(nano, [16, 32], 4, 5, seconds=0)["repetitions"]) == {1}
    clock = iter([0.0, 10.0, 20.0, 30.0])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            timing, "time", SimpleNamespace(perf_counter=time.perf_counter, monotonic=clock.__next__)
        )
        row = timing.measure_speed(nano, [16], 4, 5, seconds=25).iloc[0]
    assert row["repetitions"] == len(row["values"]) == 2, "a third one would end at 30 s"


def test_a_contended_speed_names_the_command_that_repeats_it(nano, monkeypatch):
    table = timing.measure_speed(nano, [16], 4, 2).assign(contended=[False, True])
    prefill, decode = (row for _, row in table.iterrows())
    assert "contended" not in timing.sentence(prefill, "03", "nano")
    text = timing.sentence(decode, "03", "my run")
    assert ", n = 2); contended: " in text and text.endswith("machine: `dfqs-nb run 03 --run 'my run'`")
    assert Load(0.5).contended and not Load(0.0).contended


# ---- plans ----


def test_a_plan_is_cut_in_the_stated_order_until_it_fits():
    """Every token takes 10 ms."""
    pace, wanted = Pace(0.01, 0.01), {"n_tokens": 128, "repetitions": 5, "n_answers": 9, "max_tokens": 96}
    whole = plan_cost(pace, [256], 3600, **wanted)
    assert (whole.max_tokens, whole.depths, whole.n_tokens, whole.repetitions) == (96, [256], 128, 5)
    timed = (5 * (256 + 128) + 16 + 4) * 0.01
    assert whole.seconds == whole.full_seconds == pytest.approx(9 * (32 + 96) * 0.01 + timed)
    assert whole.n_answers == 9 and whole.until == pytest.approx(time.monotonic() + 3600 - timed, abs=60)
    assert "cut" not in whole.sentence and "5 x 128 timed tokens at depth 256" in whole.sentence
    assert whole.sentence.endswith("; answering stops after 60 min, even in the middle of an answer")
    tight = plan_cost(pace, [256], 0.7 * whole.seconds, **wanted)
    assert tight.repetitions == 3 and tight.seconds < tight.full_seconds
    none = plan_cost(pace, [256], 0, **wanted)
    assert (none.max_tokens, none.n_tokens, none.repetitions) == (2, 8, 1)
    assert (
        none.n_answers == 1 and none.until <= time.monotonic() and "1 answer in place of 9" in none.left_out
    )
    assert "cut to fit the budget" in none.sentence and "1 x 8 timed tokens" in none.sentence
    assert none.sentence.endswith("; answering stops after 0 s, even in the middle of an answer")
    assert "answering stops" not in plan_cost(pace, [256], math.inf, **wanted).sentence


def test_the_depth_of_the_metric_is_the_last_to_go():
    whole = plan_cost(PACE, [128, 512, 896], math.inf)
    assert whole.depths == [128, 512, 896] and whole.left_out == ()
    cut = plan_cost(PACE, [128, 512, 896], 0)
    assert cut.depths == [512] and cut.repetitions == 1
    assert (
        "1 timed repetition in place of 5" in cut.left_out and "1 timed depth in place of 3" in cut.left_out
    )
