"""What a context costs: predicted memory against llama.cpp's plan and a process's own."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import gguf_fixtures
import numpy as np
import pandas as pd
import pytest
from test_memory import NANO, smollm2

from dfqs_nb.context.cost import PrefillSpeed, memory_table, predict_failure, settings_for
from dfqs_nb.core.errors import PromptError
from dfqs_nb.core.stage import Stage
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.memory import flash_cache_table, kv_cache_bytes, published_shape
from dfqs_nb.llama.check import dry_run
from dfqs_nb.llama.settings import OpenSettings

MIB, GIB = 2**20, 2**30
FREE = PrefillSpeed(1e-9, 0.0)


def test_prefill_time_is_the_integral_of_the_time_of_a_token():
    speed = PrefillSpeed(0.02, 1e-5)
    assert speed.seconds(1000) == pytest.approx(sum(0.02 + 1e-5 * depth for depth in range(1000)), rel=1e-3)
    assert [speed.tokens_per_sec(depth) for depth in (0, 2000)] == pytest.approx([50, 25])


def test_lack_of_memory_is_predicted_before_it_happens():
    lengths, settings = [1024, 4096, 16384], OpenSettings(n_threads=1)
    assert predict_failure(NANO, lengths, settings) is None
    planned = {n: dry_run(NANO, dataclasses.replace(settings, n_ctx=n)) for n in lengths}
    between = sum(planned[4096].values()) + planned[4096]["kv_bytes"] + MIB
    failure = predict_failure(NANO, lengths, settings, available_bytes=between)
    assert (failure.length, failure.cause, failure.predicted) == (16384, "oom", True)


def test_the_model_memory_and_budget_bound_the_context(tmp_path):
    own, stage = OpenSettings(n_threads=1), Stage(tmp_path, "long_context", budget_minutes=3)
    settings, failure = settings_for(NANO, 2048, own, stage, "nano")
    assert settings.n_ctx == 2048 + 64 and failure is None, "with room for the answer"
    assert settings_for(NANO, 10**6, own, stage, "nano")[0].n_ctx == 65_536 + 64, "the model's own limit"
    speed = [{"phase": "prefill", "median": 10.0}, {"phase": "decode", "median": 1.0}]
    Stage(tmp_path, "generate").finish(conditions={}, summary=[], speed=speed)
    bounded, _ = settings_for(NANO, 0, own, stage, "nano")
    assert 1_700 <= bounded.n_ctx - 64 <= 1_800, "180 s at 10 tokens/s"
    assert settings_for(NANO, 2048, own, stage, "nano")[0].n_ctx == 2048 + 64, "the user's length stays"
    with pytest.raises(PromptError, match="no prompt set"):
        settings_for(NANO, 0, own, stage, "none")


def test_flash_cache_is_the_published_table():
    """llama.cpp#25468 logged 904 MiB at 131,072; the others follow from src/llama-kv-cache-dsv4.cpp."""
    table = flash_cache_table([8192, 32768, 131072, 1048576]).set_index("n_ctx")
    expected = pd.DataFrame(
        {
            "swa_window": [101 * MIB, 259 * MIB, 904 * MIB, 6.76 * GIB],
            "swa_full": [413 * MIB, 1.57 * GIB, 6.2 * GIB, 49.7 * GIB],
        },
        index=table.index,
    )
    assert np.allclose(table[["swa_window", "swa_full"]], expected, rtol=0.005)
    assert table["card"].dropna().tolist() == [2.4e9, 12e9]


def test_published_shape_agrees_with_a_header_of_the_real_size(tmp_path):
    header = read_header(gguf_fixtures.real_size_header(tmp_path / "flash.gguf"))
    for n_ctx, full in itertools.product((8192, 1048576), (False, True)):
        ours = kv_cache_bytes(published_shape(), n_ctx, swa_full=full)
        assert ours.parts == kv_cache_bytes(header, n_ctx, swa_full=full).parts


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_measured_memory_lies_between_the_cache_and_the_prediction(tmp_path):
    """A fresh process also holds the vocabulary, the graph and Python: under 40 MiB here."""
    table = memory_table(NANO, [512, 1024], OpenSettings(n_threads=1), Stage(tmp_path, "long_context"), FREE)
    assert (table["anonymous_bytes"] > table["kv_bytes"]).all()
    assert (table["anonymous_bytes"] < table["predicted_bytes"] + 40 * MIB).all()
    assert np.allclose(table["kv_bytes"], table["kv_planned_bytes"], atol=0.02 * MIB)


@pytest.mark.slow
def test_measured_growth_of_a_dense_cache_is_the_predicted(tmp_path):
    """SmolLM2's cache is large against everything else: each doubling must show in resident memory."""
    table = memory_table(
        smollm2(), [2048, 4096, 8192], OpenSettings(n_threads=1), Stage(tmp_path, "long_context"), FREE
    )
    grown, predicted = table["anonymous_bytes"].diff()[1:], table["kv_bytes"].diff()[1:]
    assert np.allclose(grown, predicted, rtol=0.1), table
