"""Roofs of decode, held to closed forms."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from dfqs_nb.gguf.facts import parameters
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama import settings as llama_settings
from dfqs_nb.llama.timing import measure_speed, sentence
from dfqs_nb.scores import figures, speed


@pytest.fixture(scope="module")
def model(merged_reference):
    with llama_model.open_model(
        merged_reference, llama_settings.OpenSettings(n_ctx=512, n_threads=1)
    ) as opened:
        yield opened


def test_decode_has_a_roof_at_each_depth_where_the_weights_exceed_the_cache(model, monkeypatch):
    speeds = measure_speed(model, [64, 256], n_tokens=16, repetitions=2)
    assert speed.with_roof(speeds, model, bandwidth=1e12)[["roof", "utilisation"]].isna().all(axis=None)
    monkeypatch.setattr(speed, "CACHE_BYTES", parameters(model.header, in_bytes=True).total)
    table = speed.with_roof(speeds, model, bandwidth=1e12)
    assert list(table["phase"]) == ["prefill", "decode"] * 2 and list(table["depth"]) == [64, 64, 256, 256]
    decode = table[table["phase"] == "decode"]
    assert decode["roof"].iloc[0] == pytest.approx(1e12 / parameters(model.header, in_bytes=True).active)
    assert (decode["utilisation"] < 1).all() and table["contended"].dtype == bool
    assert table.loc[table["phase"] == "prefill", ["roof", "utilisation"]].isna().all(axis=None)
    monkeypatch.setitem(model.loaded, "offloaded_layers", 5)
    table = speed.with_roof(speeds, model, bandwidth=1e12)
    assert table["roof"].isna().all(), "a card reads its own memory"


def test_the_metric_is_at_depth_512_or_the_deepest():
    table = pd.DataFrame({"phase": "decode", "depth": [128, 512, 896], "utilisation": [0.0, 0.1, 0.2]})
    assert speed.metric_row(table)["utilisation"] == 0.1
    assert speed.metric_row(table.iloc[:1])["depth"] == 128


def test_both_speeds_stand_together_and_the_clearly_slower_one_is_contended(tmp_path):
    """A host that slows its virtual machine shows no work of others: 153 tokens/s stood as clean beside 267.

    The ranges may overlap: one slow repetition in notebook 03 hid a median of 235 beside 156.
    """

    def row_of(*values, depth=512, **other):
        row = {"phase": "decode", "depth": depth, "tokens": 128, "repetitions": len(values), "values": values}
        row |= {"median": sorted(values)[len(values) // 2], "min": min(values), "max": max(values)}
        return row | {"contended": False, "other_cores": 0.01} | other

    rows = [row_of(150.0, 152.0, 153.0, 156.0, 159.0, depth=depth) for depth in (128, 512, 896)]
    speeds, made = pd.DataFrame([*rows, rows[1] | {"phase": "prefill"}]), {"n_ctx": 1024, "n_threads": 1}
    alone = speed.beside_notebook_03(speeds, tmp_path, made)
    assert not alone["contended"].any(), "notebook 06 runs without 03, too"

    def beside(*values, n_threads=1, speeds=speeds, **other):
        row = row_of(*(values or (263.0, 265.0, 267.0, 269.0, 271.0)), **other)
        stage = {"stage": "generate", "conditions": made | {"n_threads": n_threads}, "speed": [row]}
        (tmp_path / "generate.json").write_text(json.dumps(stage), encoding="utf-8")
        return speed.beside_notebook_03(speeds, tmp_path, made | {"n_ctx": 4096})

    slowed = beside()
    assert slowed["contended"].all() and slowed["notebook_03"].notna().sum() == 1
    both = "decode 153.0 tokens/s at depth 512 (150.0 to 159.0, n = 5); notebook 03 of this run: 267.0"
    said = sentence(speed.metric_row(slowed), "06", "nano")
    assert said.startswith(f"{both} (263.0 to 271.0, n = 5); contended: notebook 03 was clearly faster")
    assert said.endswith("`dfqs-nb run 03 06 --run nano`")
    busy = sentence(speed.metric_row(beside(speeds=speeds.assign(other_cores=0.5))), "06", "nano")
    assert "contended: other programs" in busy and busy.endswith("`dfqs-nb run 06 --run nano`")
    assert beside(151.0, 265.0, 267.0, 269.0, 271.0)["contended"].all(), "one slow repetition decides nothing"
    assert beside(160.0, 265.0, 267.0)["contended"].all() and not beside(267.0)["contended"].any()
    for values in ((160.0, 161.0, 162.0, 163.0, 164.0), (150.0, 151.0, 170.0, 170.0, 170.0)):
        near = beside(*values)
        assert not near["contended"].any() and near["notebook_03"].notna().sum() == 1, values
        assert "; notebook 03 of this run: " in sentence(speed.metric_row(near), "06", "nano")
    for other in ({"n_threads": 2}, {"depth": 256}, {"phase": "prefill"}, {"tokens": 32}):
        assert "notebook_03" not in beside(**other), other


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
