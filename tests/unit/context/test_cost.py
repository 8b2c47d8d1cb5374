"""What a context costs: predicted memory against llama.cpp's plan and a process's own."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import subprocess
import sys
import threading
import time

import gguf_fixtures
import numpy as np
import pandas as pd
import pytest
from test_memory import NANO, smollm2

from dfqs_nb.context import curve
from dfqs_nb.context import plan as plans
from dfqs_nb.context.plan import (
    LEAST_CONTEXT,
    Meter,
    PrefillSpeed,
    crew,
    predict_failure,
    settings_for,
    side_by_side,
)
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import REPOSITORY
from dfqs_nb.core.stage import Stage
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.memory import cache_table, kv_cache_bytes, published_shape
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.build import dry_run
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings

MIB, GIB = 2**20, 2**30


def test_prefill_time_is_the_integral_of_the_time_of_a_token():
    speed = PrefillSpeed(0.02, 1e-5)
    assert speed.seconds(1000) == pytest.approx(sum(0.02 + 1e-5 * depth for depth in range(1000)), rel=1e-3)


def test_lack_of_memory_is_predicted_before_it_happens():
    lengths, settings, nano = [1024, 4096, 16384], OpenSettings(n_threads=1), open_shards(NANO)
    assert predict_failure(nano, lengths, settings) is None
    planned = {n: dry_run(NANO, dataclasses.replace(settings, n_ctx=n)) for n in lengths}
    between = sum(planned[4096].values()) + planned[4096]["kv_bytes"] + MIB
    failure = predict_failure(nano, lengths, settings, available_bytes=between)
    assert (failure.length, failure.cause) == (16384, "oom")


def test_a_card_bounds_the_context_too(monkeypatch):
    """Of llama.cpp's plans on an H100, without flash attention; the weights of the reference model."""
    compute = {1024: 23_016_243, 16384: 100_000_000, 65536: 400_000_000}
    plan = {"kv_bytes": 10**6, "compute_bytes": 10**6, "card_layers": 5}
    planned = [plan | {"card_compute_bytes": n} for n in compute.values()]
    monkeypatch.setattr("dfqs_nb.context.plan.plan_memory", lambda *_: planned)
    monkeypatch.setattr("dfqs_nb.context.plan.gpu_memories", lambda: [10**8])
    nano, settings = open_shards(NANO), OpenSettings(n_threads=1, n_gpu_layers=-1)
    failure = predict_failure(nano, list(compute), settings)
    assert failure.length == 16384 and failure.message.endswith("on graphics cards, and 100,000,000 are free")
    monkeypatch.setattr("dfqs_nb.context.plan.gpu_memories", list)
    assert predict_failure(nano, list(compute), settings) is None, "nothing is known of the card"


def test_the_model_memory_and_budget_bound_the_context(tmp_path):
    own, stage = OpenSettings(n_threads=1), Stage(tmp_path, "long_context", budget_minutes=3)
    settings, failure = settings_for(NANO, 2048, own, stage, "nano")
    assert settings.n_ctx == 2048 + 64 and failure is None, "with room for the answer"
    assert settings_for(NANO, 10**6, own, stage, "nano")[0].n_ctx == 65_536 + 64, "the model's own limit"
    speed = [{"phase": "prefill", "median": 10.0}, {"phase": "decode", "median": 1.0}]
    Stage(tmp_path, "generate").finish(conditions={}, summary=[], speed=speed)
    left = stage.seconds_left
    bounded, _ = settings_for(NANO, 0, own, stage, "nano")
    assert 10 * stage.seconds_left - 1 <= bounded.n_ctx - 64 <= 10 * left, "what is left, at 10 tokens/s"
    assert settings_for(NANO, 2048, own, stage, "nano")[0].n_ctx == 2048 + 64, "the user's length stays"
    short = Stage(tmp_path, "long_context", budget_minutes=1)
    assert settings_for(NANO, 0, own, short, "nano")[0] == bounded, (
        "earlier answers count in their context only"
    )
    assert settings_for(NANO, 0, own, short, "nano", fresh=True)[0].n_ctx == LEAST_CONTEXT + 64
    other = dataclasses.replace(own, n_threads=2)
    assert settings_for(NANO, 0, other, stage, "nano")[0].n_ctx - 64 >= 10 * stage.seconds_left - 1
    with pytest.raises(DfqsError, match="no prompt set"):
        settings_for(NANO, 0, own, stage, "none")


def test_flash_cache_is_the_published_table():
    """llama.cpp#25468 logged 904 MiB at 131,072; the others follow from src/llama-kv-cache-dsv4.cpp."""
    table = cache_table(published_shape(), [8192, 32768, 131072, 1048576]) * MIB
    expected = pd.DataFrame(
        {
            "swa_full=False": [101 * MIB, 259 * MIB, 904 * MIB, 6.76 * GIB],
            "swa_full=True": [413 * MIB, 1.57 * GIB, 6.2 * GIB, 49.7 * GIB],
        },
        index=table.index,
    )
    assert np.allclose(table, expected, rtol=0.005)


def test_published_shape_agrees_with_a_header_of_the_real_size(tmp_path):
    header = read_header(gguf_fixtures.real_size_header(tmp_path / "flash.gguf"))
    for n_ctx, full in itertools.product((8192, 1048576), (False, True)):
        ours = kv_cache_bytes(published_shape(), n_ctx, swa_full=full)
        assert ours == kv_cache_bytes(header, n_ctx, swa_full=full)


def test_a_meter_counts_with_the_pace_that_was_seen(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter(10)
    assert meter.holds(10) and not meter.holds(11)
    with meter.spend(2):
        now[0] = 4  # twice as slow as planned
    assert meter.holds(3) and not meter.holds(4)


def next_token(model: Model, token: int) -> int:
    model.clear()
    return int(model.evaluate([token]).argmax())


def test_a_small_model_works_on_every_core_and_results_keep_their_order(monkeypatch):
    monkeypatch.setattr(plans, "usable_cores", lambda: 3)
    with open_model(NANO, OpenSettings(n_ctx=64, n_threads=1), trial=False) as model:
        with crew(model) as models:
            assert len(models) == 3 and models[0] is model
            best = side_by_side(models, next_token, range(9))
        assert best == [next_token(model, n) for n in range(9)]


@pytest.mark.parametrize("n_workers", [1, 2])
def test_no_text_is_begun_after_an_interrupt(n_workers):
    begun: list[int] = []

    def work(worker: int, item: int) -> None:
        begun.append(item)
        if item == 4:  # as Ctrl-C does, from whichever thread works
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        side_by_side(range(n_workers), work, range(100))
    assert len(begun) < 50


def test_a_stopped_curve_says_what_is_there_and_so_does_the_next_run(tmp_path, monkeypatch, capsys):
    """The next run gave the time of all answers, as if none were there."""
    ask, left = curve.Run.ask, iter(range(3))

    def stopped(*arguments) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        ask(*arguments)

    with open_model(NANO, OpenSettings(n_ctx=600, n_threads=1), trial=False) as model:
        plan = plans.make_plan(model, "long-context-nano-keys", longest=512, n_haystacks=2)
        monkeypatch.setattr(curve.Run, "ask", stopped)
        with pytest.raises(KeyboardInterrupt) as caught:
            curve.measure(model, plan, tmp_path)
        assert caught.value.__notes__ == ["18 of 36 answers are there"]
        monkeypatch.setattr(curve.Run, "ask", ask)
        for said in ("18 of 36 answers are there; the rest will take about ", ""):
            assert len(curve.measure(model, plan, tmp_path).items) == 36
            out = capsys.readouterr().out
            assert said in out and bool(said) == bool(out)


FILL = """
import sys, psutil
from dfqs_nb.llama.build import build_llama
from dfqs_nb.llama.settings import OpenSettings
def own():
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared
before, settings = own(), OpenSettings(n_ctx=int(sys.argv[2]), n_threads=1)
built = build_llama(sys.argv[1], settings)  # it clears the cache, so all its pages are there
print(own() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_measured_growth_of_a_dense_cache_is_the_predicted():
    """SmolLM2's cache is large, so each doubling must show in a process's own memory.

    Nothing is evaluated: the compute buffer grows with the context, too, by as much again.
    """
    lengths = [1024, 2048, 4096]
    predicted = [kv_cache_bytes(read_header(smollm2()), n).total for n in lengths]
    taken = []
    for n in lengths:
        command = [sys.executable, "-c", FILL, str(smollm2()), str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
        taken.append(int(done.stdout.split()[-1]))
    assert np.allclose(np.diff(taken), np.diff(predicted), rtol=0.1), (taken, predicted)
