"""Roofs of decode, held to closed forms."""

from __future__ import annotations

import pandas as pd
import pytest

from dfqs_nb.gguf.facts import parameters
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama import settings as llama_settings
from dfqs_nb.llama.timing import measure_speed
from dfqs_nb.scores import figures, speed


@pytest.fixture(scope="module")
def model(merged_reference):
    with llama_model.open_model(
        merged_reference, llama_settings.OpenSettings(n_ctx=512, n_threads=1)
    ) as opened:
        yield opened


def test_decode_has_a_roof_at_each_depth(model):
    speeds = measure_speed(model, [64, 256], n_tokens=16, repetitions=2)
    table = speed.with_roof(speeds, model, bandwidth=1e12)
    assert list(table["phase"]) == ["prefill", "decode"] * 2 and list(table["depth"]) == [64, 64, 256, 256]
    decode = table[table["phase"] == "decode"]
    assert decode["roof"].iloc[0] == pytest.approx(1e12 / parameters(model.header, in_bytes=True).active)
    assert (decode["utilisation"] < 1).all() and table["contended"].dtype == bool
    assert table.loc[table["phase"] == "prefill", ["roof", "utilisation"]].isna().all(axis=None)


def test_the_metric_is_at_depth_512_or_the_deepest():
    table = pd.DataFrame({"phase": "decode", "depth": [128, 512, 896], "utilisation": [0.0, 0.1, 0.2]})
    assert speed.metric_row(table)["utilisation"] == 0.1
    assert speed.metric_row(table.iloc[:1])["depth"] == 128


def test_the_legend_lies_on_nothing():
    families = [
        {"set": "s", "family": f"f{i}", "length": "short", "n": 5, "correct": 2, "accuracy": 0.4}
        | {"low": 0.1, "high": 0.8, "guess_rate": 0.25}
        for i in range(3)
    ]
    ax = figures.score_families(pd.DataFrame(families))
    ax.figure.draw_without_rendering()
    legend, label = ax.get_legend().get_window_extent(), ax.xaxis.label.get_window_extent()
    assert legend.y0 >= 0 and legend.y1 <= label.y0 and legend.x1 <= ax.figure.bbox.x1
