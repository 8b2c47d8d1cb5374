"""How often experts are read, and how many do the work: counted by a plain loop, and read back for one model only."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from dfqs_nb.core.paths import data_dir
from dfqs_nb.routing.trace import Trace
from dfqs_nb.routing.verdict import experts_needed, reads_by_domain

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
EXPERTS, N = 8, 60


def planted(n_texts: int = 12) -> Trace:
    """12 texts of 3 domains and 2 layers; in layer 1 the texts of `law` always use expert 7."""
    rng = np.random.default_rng(0)
    scores = rng.random((n_texts * N, 2, EXPERTS - 1)).astype(np.float32)
    experts = np.argsort(-scores, axis=2)[:, :, :2].astype(np.uint16)
    domains = [("law", "code", "prose")[text % 3] for text in range(n_texts)]
    experts[np.repeat(np.array(domains) == "law", N), 1, 0] = EXPERTS - 1
    return Trace(
        np.arange(len(experts)),
        np.array([3, 4], np.int16),
        np.array([False, False]),
        experts,
        np.full(experts.shape[:2], 0.1, np.float32),
        EXPERTS,
        {"model": "made up", "domains": domains, "lengths": [N] * n_texts},
    )


def test_counts_are_those_of_a_plain_loop():
    trace = planted()
    counts = np.zeros((12, 2, EXPERTS))
    for row, chosen in enumerate(trace.experts):
        for layer in range(2):
            for expert in chosen[layer]:
                counts[row // N, layer, expert] += 1 / (2 * N)
    reads = reads_by_domain(trace)
    assert list(reads) == ["law", "code", "prose"]
    for number, shares in enumerate(reads.values()):
        np.testing.assert_allclose(shares, counts[number::3].mean(axis=0))


def test_the_busiest_experts_are_counted_until_they_have_the_share():
    trace = planted()
    table, law = experts_needed(trace), reads_by_domain(trace)["law"]
    busiest = np.mean([np.sort(layer)[::-1].cumsum() for layer in law], axis=0)
    assert table.index.tolist() == ["all", "law", "code", "prose"]
    for share in (0.5, 0.8, 0.9, 0.95):
        n = table.loc["law", f"{share:.0%}".replace("%", " %")]
        assert busiest[n - 1] >= share and (n == 1 or busiest[n - 2] < share)
    assert table.loc["law", "50 %"] < table.loc["code", "50 %"], "law has an expert of its own"


def test_half_of_the_experts_is_chosen_on_the_own_domain_or_on_the_others():
    trace, half = planted(), EXPERTS // 2
    table, reads = experts_needed(trace), reads_by_domain(trace)
    for name, shares in reads.items():
        most = [
            max(sum(layer[list(kept)]) for kept in combinations(range(EXPERTS), half)) for layer in shares
        ]
        assert table.loc[name, "own_busiest_half"] == pytest.approx(np.mean(most)), "no other half gets more"
    others = np.mean([reads["code"], reads["prose"]], axis=0)
    kept = [np.argsort(-layer)[:half] for layer in others]
    expected = np.mean([layer[experts].sum() for layer, experts in zip(reads["law"], kept, strict=True)])
    assert table.loc["law", "busiest_half_of_others"] == pytest.approx(expected)
    lost = table["own_busiest_half"] - table["busiest_half_of_others"]
    assert lost["law"] > 0.2 > lost[["code", "prose"]].max(), "law has an expert of its own"
    assert np.isnan(table.loc["all", "busiest_half_of_others"])
    alone = replace(trace, conditions=trace.conditions | {"domains": ["law"] * 12})
    assert experts_needed(alone)["busiest_half_of_others"].isna().all(), "there are no others"


def test_a_trace_has_the_arrays_of_the_documentation(tmp_path):
    text = (data_dir().parent / "docs" / "routing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", text.split("## Arrays")[1].split("##")[0], re.M)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(np.load(planted().save(tmp_path / "t.npz"))) == documented
