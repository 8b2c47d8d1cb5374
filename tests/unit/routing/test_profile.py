"""Usage, coverage, specialization and placement: counted by hand, and shown a planted specialist."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.routing import figures
from dfqs_nb.routing.profile import profile_of, read_profile
from dfqs_nb.routing.trace import Trace, across

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
EXPERTS, N = 8, 60


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
        {
            "model": "made up",
            "sequences": [f"t{i}" for i in range(n_texts)],
            "domains": domains,
            "lengths": [N] * n_texts,
        },
    )


def test_counts_are_those_of_a_plain_loop():
    trace = planted()
    profile = profile_of(trace)
    counts = np.zeros_like(profile.reads)
    for row, chosen in enumerate(trace.experts):
        for layer in range(2):
            for expert in chosen[layer]:
                counts[row // N, layer, expert] += 1
    np.testing.assert_allclose(profile.reads, counts / (2 * N))
    np.testing.assert_allclose(profile.mass, counts / (2 * N))  # all weights are equal
    usage = profile.usage()
    assert usage.groupby("layer")["share"].sum().tolist() == pytest.approx([1, 1])
    special = usage.loc[usage["specialization"].idxmax()]
    assert (special["layer"], special["expert"], special["specialization"]) == (4, 7, pytest.approx(1))


def test_a_planted_specialist_is_found_and_chance_is_not():
    table = profile_of(planted()).specialization()
    assert table["domain"][0] == "law" and table["p_holm"][0] < 0.05
    assert (profile_of(planted(special=False)).specialization()["p_holm"] > 0.05).all()
    assert (table["p_holm"] >= table["p"]).all()


@pytest.mark.filterwarnings("error")
def test_one_domain_has_nothing_to_be_special_against():
    trace = planted()
    only = dataclasses.replace(trace, conditions=trace.conditions | {"domains": ["law"] * 12})
    profile = profile_of(only)
    assert profile.specialization().empty and "p_holm" in profile.specialization()
    assert not any(table.isna().any(axis=None) for table in (profile.usage(), profile.coverage()))


def test_p_values_of_texts_alike_are_uniform():
    p = np.concatenate([profile_of(planted(seed, special=False)).specialization()["p"] for seed in range(12)])
    assert 0.35 < p.mean() < 0.65 and (p < 0.05).mean() < 0.15


def _with(trace: Trace, experts: np.ndarray) -> Trace:
    return Trace(**{**vars(trace), "experts": experts})


def test_coverage_adds_up_the_heaviest_experts_of_each_layer():
    profile = profile_of(planted())
    curve = profile.coverage()
    assert curve["all"].is_monotonic_increasing and curve["all"].iloc[-1] == pytest.approx(1)
    heaviest = [np.sort(mass[texts].mean(axis=0))[::-1] for mass in np.moveaxis(profile.mass, 1, 0)
                for texts in [profile.by_domain["law"]]]  # fmt: skip
    np.testing.assert_allclose(curve["law"], np.mean([each.cumsum() for each in heaviest], axis=0))
    assert curve["law"][0] > curve["code"][0]  # law has an expert of its own


def test_a_written_profile_says_how_often_a_token_reads_each_expert(tmp_path):
    stored = json.loads(profile_of(planted()).write(tmp_path / "p.json").read_text())
    assert list(stored["reads"]) == ["3", "4"] and len(stored["reads"]["3"]) == EXPERTS
    assert sum(stored["reads"]["3"]) == pytest.approx(2, abs=1e-4) and stored["tokens"] == 12 * N


def test_a_profile_is_read_back_for_its_model_only(tmp_path):
    headers = open_shards(NANO).headers
    path, own = tmp_path / "p.json", {str(layer): [2 / 16] * 16 for layer in range(4)}
    stored = {"format": 2, "model": "DFQS-Nano", "texts": 16, "tokens": 1280, "reads": own}
    path.write_text(json.dumps(stored))
    reads, about = read_profile(path, headers)
    assert reads[3] == [2 / 16] * 16 and about == "1,280 tokens of 16 texts, recorded on DFQS-Nano"
    for changed, says in (
        ({"reads": {"9": own["0"]}}, "a profile of another model .DFQS-Nano"),
        ({"reads": {"0": [0.1]}}, "a profile of another model .DFQS-Nano"),
        ({"format": 1}, "not a routing profile .* write it: dfqs-nb routing MODEL"),
        ({"reads": {"0": [-1.0]}}, "not a routing profile"),
        ({"reads": {"0": [0.0, 1e308]}}, "reads.0.1: .* less than or equal to 1"),
        ({"reads": {"0": ["inf"]}}, "reads.0.0: .* less than or equal to 1"),
    ):
        path.write_text(json.dumps(stored | changed))
        with pytest.raises(DfqsError, match=says):
            read_profile(path, headers)
    with pytest.raises(DfqsError, match="not a routing profile"):
        read_profile(tmp_path / "nothing.json", headers)


def test_a_dense_model_has_no_frame():
    dense = _with(planted(), np.zeros((12 * N, 0, 0), np.uint8))
    with pytest.raises(ModelError, match="dense model"):
        dataclasses.replace(dense, layers=np.zeros(0, np.int16)).frame()


def test_a_frame_has_the_columns_of_the_documentation():
    text = (data_dir().parent / "docs" / "routing.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \|", text.split("## Columns")[1].split("##")[0], re.M)
    trace = planted()
    table = trace.frame()
    assert list(table) == documented and len(table) == trace.experts.size
    np.testing.assert_array_equal(table["expert"], trace.experts.ravel())
    assert table["position"].max() == N - 1 and set(table["domain"]) == {"law", "code", "prose"}
    assert (table["load"] == "alone").all() and table.loc[5, "layer"] == 3
    assert table.loc[4 * N, ["sequence", "position"]].tolist() == ["t1", 0]


# ---- two files of one model ----


def test_agreement_with_another_file_by_layer():
    a = planted()
    assert (across(a, a)[["same_set", "overlap", "mass"]] == 1).all(axis=None)
    reversed_order = across(a, _with(a, a.experts[:, :, ::-1].copy()))
    assert (reversed_order[["same_set", "overlap", "mass"]] == 1).all(axis=None)
    experts = a.experts.copy()
    experts[:, 0, 1] = (experts[:, 0, 0] + 1) % EXPERTS  # the second expert of layer 3 is another, mostly
    table = across(
        dataclasses.replace(a, weights=np.tile(np.float16([0.75, 0.25]), (12 * N, 2, 1))), _with(a, experts)
    )
    kept = (experts[:, 0, 1] == a.experts[:, 0, 1]).mean()
    assert table["layer"].tolist() == [3, 4] and table["same_set"].tolist() == [pytest.approx(kept), 1]
    assert table["overlap"][0] == pytest.approx(0.5 + kept / 2)
    assert table["mass"][0] == pytest.approx(0.75 + kept / 4)


def test_the_heat_map_begins_with_the_most_special_expert():
    ax = figures.usage_by_domain(profile_of(planted()).usage(), most=4)
    assert ax.get_title(loc="left") == "Expert 7 of layer 4 gets 100% of its use from law"
    assert ax.get_xlabel() == f"layer.expert: 4 of {2 * EXPERTS}, the most specialized first"
    assert ax.get_xticklabels()[0].get_text() == "4.7"
