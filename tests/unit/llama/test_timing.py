"""Timing: plans and their cuts, the spread of a speed, and the sweep against llama-bench's own columns."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import time

import llama_cpp_tools
import pandas as pd
import pytest

from dfqs_nb.core.errors import HeaderError, ModelError
from dfqs_nb.core.machine import Load
from dfqs_nb.core.paths import data_dir
from dfqs_nb.llama import timing
from dfqs_nb.llama.model import ContextFullError, open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.llama.timing import Pace, advice, bench, plan_cost

MODEL = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
ONE = {"n_threads": [1]}
PACE = Pace(prefill=0.001, decode=0.01)


@pytest.fixture(scope="module")
def nano():
    with open_model(MODEL, OpenSettings(n_ctx=512, n_threads=1)) as model:
        yield model


# ---- speeds ----


def test_a_probe_times_a_few_tokens_and_clears_up(nano, monkeypatch):
    monkeypatch.setattr(timing, "time_once", lambda *_: (0.16, 0.04))
    assert timing.probe(nano) == Pace(0.01, 0.01) and nano.n_past == 0


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
    clock, steps = iter([0.0, 10.0, 20.0, 30.0]), list[int]()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: next(clock))
        steps += timing.rounds(5, seconds=25)
    assert steps == [0, 1], "a third round would end at 30 s"


def test_a_contended_speed_names_the_command_that_repeats_it(nano, monkeypatch):
    table = timing.measure_speed(nano, [16], 4, 2).assign(contended=[False, True])
    prefill, decode = (row for _, row in table.iterrows())
    assert "contended" not in timing.sentence(prefill, "03", "nano")
    text = timing.sentence(decode, "03", "my run")
    assert ", n = 2), contended: " in text and text.endswith("machine: `dfqs-nb run 03 --run 'my run'`")
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
    assert whole.sentence.endswith("; answering stops after 60 min, also inside a question")
    tight = plan_cost(pace, [256], 0.7 * whole.seconds, **wanted)
    assert tight.repetitions == 3 and tight.seconds < tight.full_seconds
    none = plan_cost(pace, [256], 0, **wanted)
    assert (none.max_tokens, none.n_tokens, none.repetitions) == (2, 8, 1)
    assert none.n_answers == 1 and none.until <= time.monotonic() and "1 answer, not 9" in none.left_out
    assert "cut to fit the budget" in none.sentence and "1 x 8 timed tokens" in none.sentence
    assert none.sentence.endswith("; answering stops after 0 s, also inside a question")
    assert "answering stops" not in plan_cost(pace, [256], math.inf, **wanted).sentence


def test_the_depth_of_the_metric_is_the_last_to_go():
    whole = plan_cost(PACE, [128, 512, 896], math.inf)
    assert whole.depths == [128, 512, 896] and whole.left_out == ()
    cut = plan_cost(PACE, [128, 512, 896], 0)
    assert cut.depths == [512] and cut.repetitions == 1
    assert "1 timed repetition, not 5" in cut.left_out and "1 timed depth, not 3" in cut.left_out


# ---- many settings ----


def test_every_setting_is_timed_in_every_round_and_a_refused_one_is_left_out():
    # f16 keys beside q8_0 values need flash attention, so llama.cpp refuses the second setting
    axes = {**ONE, "type_k": ["f16", "q4_0"]}
    timed, refused = bench(MODEL, axes, 16, 4, [0, 32], n_rounds=2)
    table = timing.bench_table(timed)
    assert list(table["test"]) == ["pp16", "tg4", "pp16 @ d32", "tg4 @ d32"]
    assert len(refused) == 1 and "flash_attn" in refused[0]
    assert (table["type_k"] == "f16").all() and len(timed) == 8
    seconds = timed.groupby("test", sort=False)["seconds"].apply(list)
    assert table["avg_ts"].to_numpy() == pytest.approx(
        [sum(n / s for s in seconds.iloc[at]) / 2 for at, n in enumerate([16, 4, 16, 4])]
    )


def of(*seconds: list[float]) -> list[str]:
    """The advice after these seconds of settings with 1, 2, ... threads, a number a round."""
    parameters = dict.fromkeys(timing.PARAMETERS, 1)
    rows = [
        parameters | {"setting": at, "test": "tg8", "round": turn, "seconds": taken, "n_threads": at + 1}
        for at, each in enumerate(seconds)
        for turn, taken in enumerate(each)
    ]
    return advice(pd.DataFrame(rows))


def test_advice_names_the_fastest_only_where_every_round_agrees():
    assert of([2.0, 2.2], [1.0, 1.0]) == [
        "tg8: n_threads=2 is 2.10 x as fast as the first (2.00 to 2.20 in 2 rounds)"
    ]
    assert of([1.0, 2.0], [1.1, 0.5]) == ["tg8: no setting is faster than the first in every round"]
    assert of([1.0, 1.0], [2.0, 2.0]) == ["tg8: no setting is faster than the first in every round"]
    (line,) = of([10.0, 10.0, 10.0], [8.0, 8.0, 8.0], [7.0, 7.0, 11.0])
    assert line.startswith("tg8: n_threads=2 is 1.25 x"), "sought among those that won every round"


def test_energy_is_read_where_the_system_shows_it_and_a_counter_may_begin_anew(tmp_path, monkeypatch):
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("9999999\n")
    counter = package / "energy_uj"
    monkeypatch.setattr(timing, "RAPL", tmp_path)
    kept = []
    for before, after in ((1_000_000, 3_000_000), (9_000_000, 1_000_000)):
        counter.write_text(f"{before}\n")
        counters = timing.energy()
        counter.write_text(f"{after}\n")
        kept.append(timing.joules_between(counters, timing.energy()))
    assert kept == [2.0, 2.0]
    monkeypatch.setattr(timing, "RAPL", tmp_path / "none")
    assert math.isnan(timing.joules_between(timing.energy(), timing.energy()))


def test_a_file_that_nothing_opens_is_its_own_error(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF no")
    with pytest.raises(HeaderError):
        bench(tmp_path / "model.gguf", ONE, 4, 0, n_rounds=1)


@pytest.mark.slow
def test_columns_are_those_of_llama_bench():
    words = "-p 8 -n 0 -r 1 -t 1 --repack 0 -o csv".split()
    command = [str(llama_cpp_tools.tool("llama-bench")), "-m", str(MODEL), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = next(csv.DictReader(io.StringIO(done.stdout[done.stdout.index("build_commit") :])))
    row = timing.bench_table(bench(MODEL, ONE, 8, 0, n_rounds=1)[0]).iloc[0]
    assert set(row.index) - set(theirs) == {"joules_per_token", "test"}, "llama-bench's table has a `test`"
    assert int(theirs["model_n_params"]) == row["model_n_params"]
    assert (theirs["n_prompt"], theirs["n_batch"] != "") == (str(row["n_prompt"]), True)


@pytest.mark.parametrize(("n_prompt", "n_gen", "depths"), [(64, 0, [-60, 0]), (0, 0, [0])])
def test_nothing_to_time_is_refused(n_prompt, n_gen, depths):
    with pytest.raises(ModelError, match="nothing to time"):
        bench(MODEL, ONE, n_prompt, n_gen, depths)
