"""The ladder on the shipped F16 model, climbed by two rungs, and its arithmetic on made-up rungs."""

from __future__ import annotations

import dataclasses
import shutil

import matplotlib
import numpy as np
import pandas as pd
import pytest

from dfqs_nb.core.paths import data_dir
from dfqs_nb.core.stage import read_stage
from dfqs_nb.ladder import divergence, ladder, quantize
from dfqs_nb.ladder import figures as ladder_plots
from dfqs_nb.ladder.ladder import SAME, LadderError, Settings
from dfqs_nb.routing import by_layer
from dfqs_nb.scores import Answerer, ItemSet, Options

matplotlib.use("Agg")
F16 = data_dir() / "reference" / "DFQS-Nano-F16.gguf"
SMALL = Settings(
    chunk_tokens=64,
    n_chunks=3,
    calibration_tokens=64,
    calibration_chunks=2,
    max_items=16,
    longest=128,
    n_haystacks=2,
    speed_depth=32,
    speed_tokens=4,
    speed_repetitions=2,
    n_threads=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ladder")


@pytest.fixture(scope="module")
def broken(folder):
    """A recipe that llama.cpp cannot follow here: the file it writes is fine, the rows are not."""
    path = folder / "broken.toml"
    path.write_text('name = "broken"\nmix = "Q8_0"\n[[rules]]\npattern = "no_such_tensor"\ntype = "Q4_0"\n')
    return str(path)


@pytest.fixture(scope="module")
def climbed(folder, broken):
    return ladder.climb(F16, folder, ["F16", "Q8_0", broken, "Q4_K_M"], settings=SMALL, progress=False)


def test_the_source_is_the_first_rung_and_has_no_divergence_from_itself(climbed):
    assert [rung.name for rung in climbed.rungs] == ["F16", "Q8_0", "Q4_K_M"]
    assert climbed.source.path == F16 and climbed.source.divergence.kld.value == 0
    assert climbed.source.divergence.same_top.value == 1


def test_a_rung_that_cannot_be_made_is_named_and_does_not_end_the_climb(climbed):
    assert list(climbed.failed) == ["broken"]
    assert "no tensor matches 'no_such_tensor'" in climbed.failed["broken"]


def test_every_rung_has_every_measurement(climbed):
    table = ladder.table(climbed).set_index("rung")
    assert table["n_tokens"].eq(3 * 31).all()
    assert table.loc["Q8_0", "kld"] < table.loc["Q4_K_M", "kld"]
    assert table[["kld_low", "kld_high"]].isna().all().all()  # of 3 chunks
    assert table["bits_per_weight"].is_monotonic_decreasing
    assert table.loc["Q8_0", "expert_bits"] == 8.5
    assert table[["reasoning_score", "boundary", "decode"]].notna().all().all()
    assert set(ladder.class_table(climbed).columns) == {"F16", "Q8_0", "Q4_K_M"}


def test_routing_agreement_is_that_of_the_routing_module(climbed):
    rows = ladder.routing_table(climbed)
    for rung in climbed.rungs[1:]:
        mine = rows[rows["rung"] == rung.name]
        theirs = by_layer(climbed.source.trace, rung.trace)
        assert np.allclose(mine["identical"], theirs["share_identical"])
        assert np.allclose(mine["overlap"], theirs["overlap"])
        assert mine.loc[mine["hashed"], "identical"].eq(1).all()


def test_what_is_done_is_not_done_again(climbed, folder, monkeypatch):
    def never(*_arguments, **_options):
        raise AssertionError("a child was started")

    monkeypatch.setattr(quantize, "run_child", never)
    again = ladder.climb(F16, folder, ["Q8_0", "Q4_K_M"], settings=SMALL, progress=False)
    assert again.n_made == 0 and not again.failed
    pd.testing.assert_frame_equal(ladder.table(again), ladder.table(climbed))


def test_other_settings_measure_anew_but_quantize_nothing(folder, climbed, monkeypatch):
    jobs = []
    monkeypatch.setattr(
        quantize,
        "run_child",
        lambda module, job, where: (
            jobs.append((module, job["path"])) or ((_ for _ in ()).throw(quantize.QuantizeError("not now")))
        ),
    )
    with pytest.raises(LadderError, match="the source cannot be measured: .*not now"):
        ladder.climb(F16, folder, ["Q8_0"], settings=dataclasses.replace(SMALL, n_chunks=2), progress=False)
    assert jobs == [("dfqs_nb.ladder.ladder", str(F16.resolve()))]


def test_predictions_that_are_gone_are_said_to_be(folder, climbed, tmp_path):
    """The source's note still says that it is measured; another rung has nothing to be held against."""
    shutil.copytree(folder / "F16", tmp_path / "F16")
    (tmp_path / "again.toml").write_text('name = "again"\nmix = "Q8_0"\n')
    with pytest.raises(LadderError, match="predictions are gone.*fresh=True"):
        ladder.climb(F16, tmp_path, [str(tmp_path / "again.toml")], settings=SMALL, progress=False)


def test_the_importance_matrix_is_collected_once(climbed, folder):
    assert (folder / "imatrix.gguf").exists()
    before = (folder / "imatrix.gguf").stat().st_mtime_ns
    found = ladder.collected(F16, folder, climbed.settings)
    assert (folder / "imatrix.gguf").stat().st_mtime_ns == before
    assert found.chunk_count == 2 and found.datasets[0].startswith("calibration-nano (calibration")


def test_steps_compare_neighbours_on_the_same_items(climbed):
    found = ladder.step_table(ladder.steps(climbed))
    assert set(zip(found["a"], found["b"], strict=True)) == {("F16", "Q8_0"), ("Q8_0", "Q4_K_M")}
    assert {"KL divergence", "log-perplexity", "reasoning_score", "boundary"} <= set(found["metric"])
    assert found["verdict"].isin(["better", "worse", SAME, "not measured"]).all()
    first = found[(found["a"] == "F16") & (found["metric"] == "KL divergence")].iloc[0]
    assert first["difference"] > 0 and np.isnan(first["low"]) and first["verdict"] == SAME  # of 3 chunks


def test_the_hierarchy_takes_the_rungs_that_there_are(climbed):
    tested = ladder.hierarchy(climbed)
    assert tested[["step", "a", "b"]].to_numpy().tolist() == [["FP16/FP8 -> Q4-Q6", "Q8_0", "Q4_K_M"]]
    assert tested["fidelity"].isin(["better", "worse", SAME]).all()


def test_the_stage_hands_on_its_summary(climbed, tmp_path):
    lines = ladder.hand_on(tmp_path, climbed)
    stage = read_stage(tmp_path, "ladder", "notebook 08")
    assert stage["summary"] == lines and any("FP16/FP8 -> Q4-Q6" in line for line in lines)
    assert any("interval unknown, n = 93 tokens in 3 chunks" in line for line in lines)
    assert any(line.startswith("broken failed") for line in lines)
    assert [row["rung"] for row in stage["rungs"]] == ["F16", "Q8_0", "Q4_K_M"]


def test_figures_are_drawn_for_dense_models_and_single_rungs_too(climbed):
    table = ladder.table(climbed)
    for drawn in (table, table.iloc[:2], table.assign(expert_bits=float("nan"))):
        ax = ladder_plots.divergence_by_bits(drawn)
        assert ax.get_title("left") and "interval unknown" in ax.get_ylabel()
        known = drawn.assign(kld_low=drawn["kld"], kld_high=drawn["kld"])
        assert "95 % interval" in ladder_plots.divergence_by_bits(known).get_ylabel()
        assert ladder_plots.scores_by_bits(drawn).get_title("left")
    assert ladder_plots.routing_by_bits(ladder.routing_table(climbed)).get_title("left")
    assert ladder_plots.routing_by_bits(ladder.routing_table(climbed).iloc[:0]).get_title("left")
    assert ladder_plots.curves(ladder.curve_table(climbed)).get_title("left")


def test_a_note_does_not_outlive_what_it_vouches_for(tmp_path, monkeypatch):
    """A climb that is killed under other settings must not leave their predictions under the old key."""
    for name in ("rung.json", "predicted.json"):
        (tmp_path / name).write_text('{"key": "old"}')
    job = {
        "key": "new",
        "path": str(tmp_path / "gone.gguf"),
        "place": str(tmp_path),
        "base": "",
        "fresh": False,
        "sha256": "",
        "reference": str(tmp_path / "reference.npy"),
        "settings": dataclasses.asdict(SMALL),
    }
    monkeypatch.setattr(quantize, "read_job", lambda: job)
    ladder.main()
    assert not list(tmp_path.iterdir())


def test_predictions_are_kept_chunk_by_chunk_as_one_array(climbed, folder, tmp_path):
    chunks = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    with (tmp_path / "kept.npy").open("wb") as file:
        for number, chunk in enumerate(chunks):
            ladder._keep(file, chunk, number, len(chunks))
    assert np.array_equal(np.load(tmp_path / "kept.npy", mmap_mode="r"), chunks)
    kept = np.load(folder / "reference.npy", mmap_mode="r")
    assert kept.shape[:2] == (3, 31) and np.allclose(np.exp(kept).sum(axis=2), 1, atol=1e-4)


# ---- arithmetic ----


def rung(name: str, kld: float, right: list[list[bool]], noise: float = 0.0) -> ladder.Rung:
    """A rung with this divergence, and these answers (a row a haystack, a column a length)."""
    draw = np.random.default_rng(list(name.encode()))  # hash() would draw anew in every process
    values = np.abs(kld + noise * draw.standard_normal((16, 8)))
    tokens = divergence.Tokens(values + 1, np.ones((16, 8)), values, values < 1)
    items = pd.DataFrame(
        [
            {"haystack": h, "length": 64 * 2**k, "planned": True, "correct": one, "question": "q"}
            for h, row in enumerate(right)
            for k, one in enumerate(row)
        ]
    )
    return ladder.Rung(name, F16, None, 0.0, tokens, None, (), items, None, {"tokens": 1}, {})


def test_a_clear_loss_is_worse_a_clear_gain_better_and_noise_no_evidence():
    good, bad = [[True, True, True, True]] * 8, [[True, True, False, False]] * 8
    found = {}
    for pair in (("near", "far"), ("far", "near"), ("near", "twin")):
        made = {
            "near": rung("near", 0.1, good, 0.01),
            "far": rung("far", 0.5, bad, 0.01),
            "twin": rung("twin", 0.1, good, 0.01),
        }
        one = ladder.Ladder((made[pair[0]], made[pair[1]]), SMALL, {})
        found[pair] = {step.metric: step for step in ladder.steps(one)}
    assert [step.verdict for step in found["near", "far"].values()] == ["worse"] * 3
    assert [step.verdict for step in found["far", "near"].values()] == ["better"] * 3
    assert [step.verdict for step in found["near", "twin"].values()] == [SAME] * 3
    assert found["near", "far"]["boundary"].difference < 0


def test_intervals_allow_for_the_number_of_pairs():
    rungs = tuple(rung(f"r{i}", 0.1 + 0.01 * i, [[True, True]] * 4, 0.1) for i in range(9))
    wide = ladder.steps(ladder.Ladder(rungs, SMALL, {}))[0]
    narrow = ladder.steps(ladder.Ladder(rungs[:2], SMALL, {}))[0]
    assert wide.difference == narrow.difference
    assert wide.high - wide.low > narrow.high - narrow.low


@pytest.mark.parametrize(
    "n, n_pairs, verdict", [(5, 1, SAME), (6, 1, "worse"), (6, 2, SAME), (8, 7, SAME), (9, 7, "worse")]
)
def test_few_haystacks_that_agree_are_no_evidence_beyond_what_a_sign_test_finds(n, n_pairs, verdict):
    """Of 6 haystacks without any difference all agree in 1 of 32 draws; 7 pairs allow 1 in 140."""
    good, bad = ([[True, True, one, one]] * n for one in (True, False))
    pair = rung("a", 0.1, good), rung("b", 0.1, bad)
    step = ladder._boundary_step(*pair, 1 - 0.05 / n_pairs)
    assert step.high < 0 and step.verdict == verdict


def test_one_haystack_says_nothing_of_a_boundary():
    pair = tuple(rung(name, 0.1, [[True, False]]) for name in "ab")
    assert [step.verdict for step in ladder.steps(ladder.Ladder(pair, SMALL, {}))][-1] == "not measured"


def test_a_part_of_a_set_takes_from_each_family_alike_and_has_a_name_of_its_own():
    whole = ItemSet.load("nano-reasoning")
    part = ladder._part_of(whole, 16)
    assert part.name == "nano-reasoning-16" and len(part.items) == 16
    assert part.families() == whole.families() and len(part.families()) == 8
    assert ladder._part_of(whole, 0) is whole and ladder._part_of(whole, 1000) is whole


def test_no_answer_is_asked_for_when_a_finished_rung_is_read(tmp_path):
    item_set = ladder._part_of(ItemSet.load("nano-reasoning"), 8)
    with pytest.raises(LadderError, match="an answer is missing"):
        Answerer(ladder._no_answer, "chat", {}, "m").score(item_set, tmp_path, Options(progress=False))
