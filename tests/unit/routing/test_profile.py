"""Usage, coverage, specialization and placement: counted by hand, and shown a planted specialist."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest

from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.routing import figures
from dfqs_nb.routing import profile as routing_profile
from dfqs_nb.routing.profile import Profile, arguments, expert_bytes, read_profile
from dfqs_nb.routing.recorder import RoutingError
from dfqs_nb.routing.trace import Trace, export
from dfqs_nb.routing.verdict import across, divergence

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
EXPERTS, N = 8, 60


def profile_of(trace: Trace, layer_bytes: np.ndarray | None = None) -> Profile:
    """The profile, where every layer has equally many bytes."""
    return routing_profile.profile_of(trace, np.array([80, 80]) if layer_bytes is None else layer_bytes)


def planted(seed: int = 0, n_texts: int = 12, special: bool = True) -> Trace:
    """12 texts of 3 domains and 2 layers; in layer 1 the texts of `law` always use expert 7."""
    rng = np.random.default_rng(seed)
    scores = rng.random((n_texts * N, 2, EXPERTS - 1)).astype(np.float32)
    experts = np.argsort(-scores, axis=2)[:, :, :2].astype(np.uint8)
    domains = [("law", "code", "prose")[text % 3] for text in range(n_texts)]
    if special:
        law = np.repeat(np.array(domains) == "law", N)
        experts[law, 1, 0] = EXPERTS - 1
    return Trace(
        np.arange(len(experts)),
        np.array([3, 4], np.int16),
        np.array([False, False]),
        experts,
        np.full(experts.shape, 0.5, np.float16),
        np.full(experts.shape[:2], 0.1, np.float32),
        EXPERTS,
        {"sequences": [f"t{i}" for i in range(n_texts)], "domains": domains, "lengths": [N] * n_texts},
    )


def test_counts_are_those_of_a_plain_loop():
    trace = planted()
    profile = profile_of(trace)
    counts = np.zeros_like(profile.counts)
    for row, chosen in enumerate(trace.experts):
        for layer in range(2):
            for expert in chosen[layer]:
                counts[row // N, layer, expert] += 1
    np.testing.assert_array_equal(profile.counts, counts)
    np.testing.assert_allclose(profile.mass, counts / 2)
    usage = profile.usage()
    assert usage.groupby("layer")["share"].sum().tolist() == pytest.approx([1, 1])
    special = usage.loc[usage["specialization"].idxmax()]
    assert (special["layer"], special["expert"], special["specialization"]) == (4, 7, pytest.approx(1))


def test_a_planted_specialist_is_found_and_chance_is_not():
    table = profile_of(planted()).specialization()
    first = table.iloc[0]
    assert (first["layer"], first["domain"], first["expert"]) == (4, "law", 7) and first["p_holm"] < 0.05
    assert (table[table["layer"] == 3]["p_holm"] > 0.05).all()
    assert (table["p_holm"] >= table["p"]).all()


@pytest.mark.filterwarnings("error")
def test_one_domain_has_nothing_to_be_special_against():
    trace = planted()
    only = dataclasses.replace(trace, conditions=trace.conditions | {"domains": ["law"] * 12})
    profile = profile_of(only)
    assert profile.specialization().empty and "p_holm" in profile.specialization()
    tables = (
        profile.usage(),
        profile.layers(),
        profile.coverage(),
        profile.cross_coverage(),
        profile.drift(),
    )
    assert not any(table.isna().any(axis=None) for table in tables)
    assert profile.placement().notna().all(axis=None)


def test_p_values_of_texts_alike_are_uniform(monkeypatch):
    monkeypatch.setattr(routing_profile, "N_PERMUTATIONS", 199)
    p = np.concatenate([profile_of(planted(seed, special=False)).specialization()["p"] for seed in range(12)])
    assert 0.35 < p.mean() < 0.65 and (p < 0.05).mean() < 0.15


def test_layers_overlap_and_pairs():
    trace = planted(special=False)
    layers = profile_of(trace).layers()
    assert (layers["unused"] == 1).all() and layers["share_of_even"].between(0.9, 1).all()
    assert layers["overlap"].to_numpy() == pytest.approx(layers["overlap_by_chance"].to_numpy(), abs=0.04)
    same = profile_of(_with(trace, np.tile(np.array([0, 1], np.uint8), (len(trace.tokens), 2, 1))))
    assert same.layers()["overlap"].tolist() == [1, 1]
    lifts = profile_of(trace).pairs()["lift"]
    assert lifts.between(0.5, 1.6).all()
    assert same.pairs()["lift"].max() > 1


def test_drift_sees_a_text_whose_second_half_is_another():
    trace = planted(special=False)
    steady = profile_of(trace).drift()
    assert (steady["distance"] < 1.5 * steady["by_chance"]).all()
    moved = trace.experts.copy()
    late = np.arange(len(moved)) % N >= N // 2
    moved[late] = (moved[late] + 3) % EXPERTS
    drift = profile_of(_with(trace, moved)).drift()
    assert (drift["distance"] > 1.2 * drift["by_chance"]).all()


def _with(trace: Trace, experts: np.ndarray) -> Trace:
    return Trace(**{**vars(trace), "experts": experts})


def test_coverage_counts_the_fewest_experts():
    profile = profile_of(planted())
    curve = profile.coverage()
    assert curve["all"].is_monotonic_increasing and curve["all"].iloc[-1] == pytest.approx(1)
    needed = profile.experts_needed()
    for domain in needed.index:
        assert needed.loc[domain, "80%"] <= needed.loc[domain, "90%"] <= needed.loc[domain, "95%"] <= EXPERTS
    table = profile.cross_coverage()
    assert (np.diag(table) >= 0.9).all()
    assert table.loc["code", "law"] < table.loc["law", "law"]  # code's experts leave out law's


def test_hit_rates_are_of_texts_that_did_not_choose():
    profile = profile_of(planted())
    hits = profile.hit_rates([0.0, 0.5, 1.0])
    assert hits.shape == (3, 12) and (hits[0] == 0).all() and hits[2] == pytest.approx(1)
    assert (hits[1] > 0.4).all() and (hits[1] < 0.9).all()


def test_placement_lines_are_llama_cpps(tmp_path):
    table = profile_of(planted(), np.array([100, 300])).placement()
    assert table["layers"].tolist() == [0, 1, 1, 1] and table.loc[1, "hit_rate"] == 0.25
    assert table.loc[1, "arguments"] == '-ngl 99 -ot "blk\\.(4)\\.ffn_.*_exps=CPU"'
    assert table["low"].le(table["experts_hit_rate"]).all()
    assert arguments(np.arange(4), np.array([1, 2, 3])) == "-ngl 99 --n-cpu-moe 1"
    assert arguments(np.arange(4), np.arange(4)) == "-ngl 99"
    line = arguments(np.arange(4), np.array([0, 3]))
    assert shlex.split(line)[3] == r"blk\.(1|2)\.ffn_.*_exps=CPU"
    profile = profile_of(planted(), np.array([80, 160]))
    plan = json.loads(profile.write(tmp_path / "p.json").read_text())
    assert plan["layers"][1]["expert_bytes"] == 20 and len(plan["layers"][0]["reads"]) == EXPERTS
    assert sum(plan["layers"][0]["reads"]) == pytest.approx(2, abs=1e-4)


def test_a_profile_is_read_back_for_its_model_only(tmp_path):
    headers = open_shards(NANO).headers
    path, own = tmp_path / "p.json", [{"layer": layer, "reads": [2 / 16] * 16} for layer in range(4)]
    stored = {"format": 1, "model": {"name": "DFQS-Nano"}, "texts": 16, "tokens": 1280, "layers": own}
    path.write_text(json.dumps(stored))
    reads, about = read_profile(path, headers)
    assert reads[3] == [2 / 16] * 16 and about == "1,280 tokens of 16 texts, recorded on DFQS-Nano"
    for changed, says in (
        ({"layers": [own[0] | {"layer": 9}]}, "a profile of another model .DFQS-Nano"),
        ({"format": 2}, "not a routing profile .* write it: dfqs-nb routing MODEL"),
        ({"layers": [own[0] | {"reads": [-1.0]}]}, "not a routing profile"),
        ({"layers": [own[0] | {"reads": [0.0, 1e308]}]}, "layers.0.reads.1: .* less than or equal to 1"),
        ({"layers": [own[0] | {"reads": ["inf"]}]}, "layers.0.reads.0: .* less than or equal to 1"),
    ):
        path.write_text(json.dumps(stored | changed))
        with pytest.raises(DfqsError, match=says):
            read_profile(path, headers)
    with pytest.raises(DfqsError, match="not a routing profile"):
        read_profile(tmp_path / "nothing.json", headers)


def test_bytes_of_experts_are_those_of_the_tensors(merged_reference):
    from gguf import GGUFReader

    tensors = GGUFReader(merged_reference).tensors
    total = sum(int(t.n_bytes) for t in tensors if "_exps" in t.name)
    assert int(expert_bytes(NANO, np.arange(4)).sum()) == total


def test_a_dense_model_has_no_profile_and_no_export(tmp_path):
    dense = _with(planted(), np.zeros((12 * N, 0, 0), np.uint8))
    dense = Trace(**{**vars(dense), "layers": np.zeros(0, np.int16)})
    with pytest.raises(ModelError, match="dense model"):
        profile_of(dense)
    with pytest.raises(ModelError, match="dense model"):
        export([dense], tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()


def test_an_export_is_read_back_by_pandas_with_the_columns_of_the_documentation(tmp_path):
    text = (data_dir().parent / "docs" / "routing.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \|", text.split("## Columns")[1].split("##")[0], re.M)
    trace = planted()
    for name in ("x.csv", "x.csv.gz"):
        table = pd.read_csv(export([trace, trace], tmp_path / name))
        assert list(table) == documented and len(table) == 2 * trace.experts.size
        part = table.iloc[: trace.experts.size]
        np.testing.assert_array_equal(part["expert"], trace.experts.ravel())
        assert part["position"].max() == N - 1 and set(part["domain"]) == {"law", "code", "prose"}
        assert (part["load"] == "alone").all() and part.loc[5, "layer"] == 3
    assert gzip.decompress((tmp_path / "x.csv.gz").read_bytes()).startswith(b"load,domain,sequence")
    with pytest.raises(RoutingError, match=r"exported as .csv or .csv.gz; --export \S+x.csv.gz"):
        export([trace], tmp_path / "x.parquet")
    with pytest.raises(RoutingError, match="no such folder"):
        export([trace], tmp_path / "nowhere" / "x.csv")


# ---- two files of one model ----


def scored(trace: Trace, seed: int, shift: np.ndarray | float = 0.0) -> Trace:
    rng = np.random.default_rng(seed)
    scores = rng.random((*trace.experts.shape[:2], EXPERTS)).astype(np.float32)
    values = rng.normal(0, 1, (trace.n_tokens, 12)).astype(np.float32) + np.asarray(shift, np.float32)
    kept = {"digest": np.zeros(trace.n_tokens, np.uint64), "logit_ids": np.arange(12), "logits": values}
    return Trace(**{**vars(trace), "scores": scores, **kept})


def test_agreement_with_another_file_by_layer():
    a = scored(planted(), 1)
    table = across(a, a)
    assert (table[["same_set", "top_1", "top_2", "mass"]] == 1).all(axis=None)
    assert table["rank_correlation"].tolist() == pytest.approx([1, 1])
    other = _with(scored(planted(), 2), a.experts[:, :, ::-1].copy())
    table = across(a, other)
    assert (table["same_set"] == 1).all() and (table["top_1"] == 0).all() and (table["mass"] == 1).all()
    assert table["rank_correlation"].abs().max() < 0.1
    from scipy.stats import spearmanr

    each = [spearmanr(x, y).statistic for x, y in zip(a.scores[:, 0], other.scores[:, 0], strict=True)]
    assert table["rank_correlation"][0] == pytest.approx(np.mean(each), abs=1e-6)


def test_divergence_is_regressed_on_changed_layers():
    a = scored(planted(special=False), 1)
    experts, changed = a.experts.copy(), np.arange(a.n_tokens) % 3 == 0
    experts[changed, 0, 0] = EXPERTS - 1
    noise = np.where(changed[:, None], np.random.default_rng(4).normal(0, 1, (a.n_tokens, 12)), 0.0)
    sentence = divergence(a, _with(scored(planted(special=False), 1, noise), experts))
    slope, low, high = map(
        float, re.search(r"; (\S+) for .* interval (\S+) to (\S+); n = 720", sentence).groups()
    )
    assert 0 < low < slope < high and "12 logits of each" in sentence
    assert divergence(a, a) == ""


def test_the_heat_map_sorts_by_a_domain_and_shows_one_layer():
    usage = profile_of(planted()).usage()
    ax = figures.usage_by_domain(usage, most=4, layer=4, domain="law")
    assert ax.get_title(loc="left") == "Expert 7 of layer 4 gets 100% of its use from law"
    assert ax.get_xlabel() == f"layer.expert: 4 of {EXPERTS}, the most used in law first"
    assert ax.get_xticklabels()[0].get_text() == "4.7"
