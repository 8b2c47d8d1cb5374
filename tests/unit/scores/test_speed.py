"""Roofs and bounds, held to closed forms."""

from __future__ import annotations

import pandas as pd
import pytest

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.memory import FLASH, ActiveBytes, active_bytes
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama import settings as llama_settings
from dfqs_nb.llama.timing import measure_speed
from dfqs_nb.scores import figures, speed
from dfqs_nb.scores.speed import speed_bound


@pytest.fixture(scope="module")
def model(merged_reference):
    with llama_model.open_model(
        merged_reference, llama_settings.OpenSettings(n_ctx=512, n_threads=1)
    ) as opened:
        yield opened


def test_a_model_that_fits_is_bound_by_memory_alone():
    bound, shares = speed_bound(FLASH, [("memory", 1e12, 70e9)])
    assert bound == pytest.approx(70e9 / FLASH.total) and shares == {"memory": 1.0}


def test_what_does_not_fit_comes_from_the_disk():
    weights = ActiveBytes(dense=10, routed=6, routed_total=90, weights=100)
    bound, shares = speed_bound(weights, [("memory", 55, 1e9), ("disk", 1e9, 2.0)])
    assert shares["disk"] == pytest.approx(6 * 45 / 90 / 16)
    assert bound == pytest.approx(2 / 3, rel=1e-6)
    none, _ = speed_bound(weights, [("memory", 4, 1e9), ("disk", 1e9, 2.0)])
    assert none == pytest.approx(2 / 12, rel=1e-6)
    with pytest.raises(DfqsError, match="no place holds"):
        speed_bound(FLASH, [("memory", 20e9, 1e9)])


def test_more_memory_is_never_slower():
    bounds = [
        speed_bound(FLASH, [("memory", gb * 1e9, 50e9), ("disk", 1e15, 3e9)])[0] for gb in range(2, 80, 3)
    ]
    assert bounds == sorted(bounds)


def test_no_claim_of_the_card_exceeds_its_bound_and_paging_comes_near_the_card():
    table = speed.card_table().set_index("machine")
    claimed = table.dropna(subset="claimed_high")
    assert list(claimed.index) == ["CPU, 128 GB of DDR5-5600", "RTX 3090", "2 x RTX 3090", "H100"]
    assert (claimed["claimed_high"] < claimed["bound"]).all() and (claimed["from_disk"] == 0).all()
    slow = table.loc["not in the card: 32 GB, SATA", "bound"]
    assert claimed["claimed_low"].iloc[0] < slow < 3 * claimed["claimed_high"].iloc[0]


def test_decode_has_a_roof_at_each_depth(model):
    speeds = measure_speed(model, [64, 256], n_tokens=16, repetitions=2)
    table = speed.with_roof(speeds, model, bandwidth=1e12)
    assert list(table["phase"]) == ["prefill", "decode"] * 2 and list(table["depth"]) == [64, 64, 256, 256]
    decode = table[table["phase"] == "decode"]
    assert decode["roof"].iloc[0] == pytest.approx(1e12 / active_bytes(model.header).total)
    assert (decode["utilisation"] < 1).all() and table["contended"].dtype == bool
    assert table.loc[table["phase"] == "prefill", ["roof", "utilisation"]].isna().all(axis=None)


def test_the_metric_and_the_figure_have_the_same_depth():
    rows = [
        ("decode", depth, 100.0, 1000.0, 0.1 * i, False, (99.0, 101.0))
        for i, depth in enumerate((128, 512, 896))
    ]
    columns = ["phase", "depth", "median", "roof", "utilisation", "contended", "values"]
    table = pd.DataFrame(rows, columns=columns)
    assert speed.metric_row(table)["utilisation"] == 0.1
    assert (
        figures.decode_roofline(table).get_title(loc="left")
        == "Decode at depth 512 reaches 10.0% of the roof"
    )
    assert speed.metric_row(table.iloc[:1])["depth"] == 128
    alone = figures.decode_roofline(table.iloc[1:2])
    assert alone.startswith("No figure of decode by depth: only depth 512 was timed; ") and "10.0%" in alone


def test_the_legend_lies_on_nothing_and_the_speeds_have_ticks():
    """A small model near its roof: one line over the other, and less than a power of ten between them."""
    rows = [("decode", n, rate, 88.0, rate / 88, False, (rate,)) for n, rate in ((128, 70.0), (512, 67.0))]
    columns = ["phase", "depth", "median", "roof", "utilisation", "contended", "values"]
    families = [
        {"set": "s", "family": f"f{i}", "length": "short", "n": 5, "correct": 2, "accuracy": 0.4}
        | {"low": 0.1, "high": 0.8, "guess_rate": 0.25}
        for i in range(3)
    ]
    speeds = figures.decode_roofline(pd.DataFrame(rows, columns=columns))
    for ax in (speeds, figures.score_families(pd.DataFrame(families))):
        ax.figure.draw_without_rendering()
        legend, label = ax.get_legend().get_window_extent(), ax.xaxis.label.get_window_extent()
        assert legend.y0 >= 0 and legend.y1 <= label.y0 and legend.x1 <= ax.figure.bbox.x1
    low, high = speeds.get_ylim()
    assert sum(low <= tick <= high for tick in speeds.get_yticks()) >= 2
