"""The ladder on the shipped F16 model, climbed by two rungs, and its arithmetic on made-up rungs."""

from __future__ import annotations

import dataclasses
import math
import shutil
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from dfqs_nb import ladder
from dfqs_nb.core import Stage, child
from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.ladder import divergence, figures, run, tables
from dfqs_nb.ladder.run import Ladder, LadderError, Rung, Settings
from dfqs_nb.ladder.tables import SAME
from dfqs_nb.routing import differences, load_trace, overlaps
from dfqs_nb.stats import holm

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
    assert climbed.rungs[0].header.path == F16 and climbed.rungs[0].tokens["kld"].max() == 0
    assert climbed.rungs[0].tokens["same_top"].all()


def test_a_rung_that_cannot_be_made_is_named_and_does_not_end_the_climb(climbed):
    assert list(climbed.failed) == ["broken"]
    assert "no tensor matches 'no_such_tensor'" in climbed.failed["broken"]


def test_every_rung_has_every_measurement(climbed):
    table = tables.table(climbed).set_index("rung")
    assert table["n_tokens"].eq(3 * 31).all()
    assert table.loc["Q8_0", "kld"] < table.loc["Q4_K_M", "kld"]
    assert table[["kld_low", "kld_high"]].isna().all().all()  # of 3 chunks
    assert table["bits_per_weight"].is_monotonic_decreasing
    assert table.loc["Q8_0", "expert_bits"] == 8.5
    assert table[["reasoning_score", "boundary"]].notna().all().all()
    assert set(tables.class_table(climbed).columns) == {"F16", "Q8_0", "Q4_K_M"}


def test_routing_agreement_is_that_of_the_routing_module(climbed, folder):
    rows = tables.routing_table(climbed)
    for rung in climbed.rungs[1:]:
        mine = rows[rows["rung"] == rung.name]
        traces = [load_trace(folder / name / "trace.npz") for name in ("F16", rung.name)]
        assert np.allclose(mine["identical"], 1 - differences(*traces).mean(axis=0))
        assert np.allclose(mine["overlap"], overlaps(*traces).mean(axis=0))
        assert mine.loc[mine["hashed"], "identical"].eq(1).all()


def test_a_program_that_the_source_wrote_too_is_not_run_again(climbed, folder):
    for path in (folder / "F16" / "scores").glob("verdicts-*.jsonl"):
        assert (folder / "Q8_0" / "scores" / path.name).read_text().startswith(path.read_text())


def test_what_is_done_is_not_done_again(climbed, folder, monkeypatch):
    def never(*_arguments, **_options):
        raise AssertionError("a child was started")

    monkeypatch.setattr(child.Worker, "run", never)
    again = ladder.climb(F16, folder, ["Q8_0", "Q4_K_M"], settings=SMALL, progress=False)
    assert not again.failed
    pd.testing.assert_frame_equal(tables.table(again), tables.table(climbed))


def test_other_settings_measure_anew_but_quantize_nothing(folder, climbed, monkeypatch):
    jobs = []

    def refuse(worker, job, where):
        jobs.append(job["path"])
        raise ModelError("not now")

    monkeypatch.setattr(child.Worker, "run", refuse)
    with pytest.raises(LadderError, match="the source cannot be measured: .*not now"):
        ladder.climb(F16, folder, ["Q8_0"], settings=dataclasses.replace(SMALL, n_chunks=2), progress=False)
    assert set(jobs) == {str(F16.resolve())}


@pytest.mark.parametrize(
    "cores, threads, memory, workers", [(2, 1, 8e9, 3), (8, 4, 8e9, 2), (2, 2, 8e9, 1), (64, 1, 2e9, 3)]
)
def test_as_many_rungs_run_at_once_as_cores_and_memory_hold(monkeypatch, cores, threads, memory, workers):
    monkeypatch.setattr(run, "usable_cores", lambda: cores)
    monkeypatch.setattr(run, "available_memory", lambda: SimpleNamespace(available_bytes=int(memory)))
    assert run.n_workers(open_shards(F16), threads) == workers


def test_predictions_that_are_gone_are_made_again_and_nothing_else(folder, climbed, tmp_path):
    """The source's note still says that it is measured; another rung has nothing to be held against."""
    shutil.copytree(folder / "F16", tmp_path / "F16")
    answers = next((tmp_path / "F16" / "scores").glob("answers-*.jsonl"))
    before = answers.read_bytes()
    (tmp_path / "again.toml").write_text('name = "again"\nmix = "Q8_0"\n')
    again = ladder.climb(F16, tmp_path, [str(tmp_path / "again.toml")], settings=SMALL, progress=False)
    assert [rung.name for rung in again.rungs] == ["F16", "again"]
    assert answers.read_bytes() == before
    pd.testing.assert_frame_equal(again.rungs[0].tokens, climbed.rungs[0].tokens)


def test_the_divergence_by_position_counts_each_window_once(climbed):
    positions = tables.position_table(climbed)
    assert positions["rung"].unique().tolist() == ["Q8_0", "Q4_K_M"]
    assert positions["start"].tolist() == [0, 4, 8, 16, 32] * 2 and positions["end"].iloc[4] == 63
    assert positions["chunks"].eq(3).all() and positions["n"].tolist() == [3 * 4] * 4 + [3 * 31] + [
        3 * 4
    ] * 4 + [3 * 31]
    table = tables.table(climbed).set_index("rung")
    last = positions[positions["start"] == 32].set_index("rung")["kld"]
    assert last.to_dict() == pytest.approx(table["kld"].drop("F16").to_dict()), (
        "the second half, as the table"
    )
    assert figures.divergence_by_position(positions).get_title("left")


def test_a_title_says_clearly_only_where_there_are_intervals():
    row = {"rung": "Q8_0", "chunks": 6, "n": 48}
    bands = [row | {"start": 0, "end": 8, "kld": 0.1}, row | {"start": 8, "end": 16, "kld": 0.3}]
    positions = pd.DataFrame(bands).assign(kld_low=[0.05, 0.2], kld_high=[0.15, 0.4])
    title = "1 of 1 rungs diverge {} in the last band than in the first"
    assert figures.divergence_by_position(positions).get_title("left") == title.format("clearly more")
    few = positions.assign(kld_low=np.nan, kld_high=np.nan)
    assert figures.divergence_by_position(few).get_title("left") == title.format("more, without intervals,")


def test_the_importance_matrix_is_collected_once(climbed, folder):
    assert (folder / "imatrix.gguf").exists()
    before = (folder / "imatrix.gguf").stat().st_mtime_ns
    matrix = ladder.collected(F16, folder, climbed.settings)
    assert (folder / "imatrix.gguf").stat().st_mtime_ns == before
    assert matrix.chunk_count == 2 and matrix.datasets[0].startswith("calibration-nano (calibration")


@pytest.fixture(scope="module")
def compared(climbed):
    return tables.steps(climbed)


def test_steps_compare_neighbours_on_the_same_items(compared):
    assert set(zip(compared["a"], compared["b"], strict=True)) == {("F16", "Q8_0"), ("Q8_0", "Q4_K_M")}
    assert {"KL divergence", "log-perplexity", "reasoning_score", "retrieval"} <= set(compared["metric"])
    assert compared["verdict"].isin(["better", "worse", SAME]).all()
    first = compared[(compared["a"] == "F16") & (compared["metric"] == "KL divergence")].iloc[0]
    assert first["difference"] > 0 and np.isnan(first["low"]) and first["verdict"] == SAME  # of 3 chunks
    assert compared["p_holm"].tolist() == pytest.approx(holm(compared["p"].tolist()))  # all pairs and metrics
    shown = tables.verdict_table(compared)
    assert list(shown.index) == ["F16 -> Q8_0", "Q8_0 -> Q4_K_M"] and shown.notna().all().all()


def test_the_hierarchy_takes_the_rungs_that_there_are(climbed, compared):
    tested = tables.hierarchy(climbed, compared)
    assert tested[["step", "a", "b"]].to_numpy().tolist() == [["FP16/FP8 -> Q4-Q6", "Q8_0", "Q4_K_M"]]
    assert tested["fidelity"].isin(["better", "worse", SAME]).all()


def test_perplexity_is_part_of_no_verdict(climbed, compared):
    """A model can be surprised less by a text and yet be less like the original and able to do less."""
    kinds = dict(zip(compared["metric"], compared["kind"], strict=True))
    assert kinds["log-perplexity"] == "perplexity"
    assert {metric for metric, kind in kinds.items() if kind == "fidelity"} == {
        "KL divergence",
        "same top token",
        "same experts",
    }
    better = compared.assign(verdict=np.where(compared["kind"] == "perplexity", "better", SAME))
    tested = tables.hierarchy(climbed, better).iloc[0]
    assert tested["log-perplexity"] == "better" and tested["fidelity"] == tested["ability"] == SAME


def test_the_stage_hands_on_its_summary(climbed, compared, tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    stage = Stage("r", "ladder")
    lines = tables.hand_on(stage, climbed, compared)
    content = stage.read("ladder")
    assert content["summary"] == lines and any("FP16/FP8 -> Q4-Q6" in line for line in lines)
    assert any("interval unknown" in line and "n = 93 tokens in 3 chunks" in line for line in lines)
    measured = [line for line in lines if "fidelity" in line or "KL divergence" in line]
    assert measured and all("n = " in line for line in measured)
    assert any(line.startswith("broken failed") for line in lines)
    assert [row["rung"] for row in content["rungs"]] == ["F16", "Q8_0", "Q4_K_M"]


def test_figures_are_drawn_for_dense_models_and_single_rungs_too(climbed):
    table = tables.table(climbed)
    for drawn in (table, table.iloc[:2], table.assign(expert_bits=float("nan"))):
        ax = figures.divergence_by_bits(drawn)
        assert ax.get_title("left") and "interval unknown" in ax.get_ylabel()
        known = drawn.assign(kld_low=drawn["kld"], kld_high=drawn["kld"])
        assert "95 % interval" in figures.divergence_by_bits(known).get_ylabel()
        assert figures.scores_by_bits(drawn).get_title("left")
    assert figures.routing_by_bits(tables.routing_table(climbed)).get_title("left")
    assert figures.routing_by_bits(tables.routing_table(climbed).iloc[:0]).get_title("left")


def test_a_note_does_not_outlive_what_it_vouches_for(climbed, folder, tmp_path, monkeypatch):
    """A climb that is killed under other settings must not leave their predictions under the old key."""
    notes = [tmp_path / "F16" / name for name in ("predict.json", "ask.json")]
    for note in notes:
        note.parent.mkdir(exist_ok=True)
        note.write_text('{"key": "old"}')
    monkeypatch.setattr(
        child.Worker, "run", lambda worker, job, where: run.predict({**job, "path": "gone.gguf"})
    )
    with pytest.raises(LadderError, match="gone.gguf"):
        ladder.climb(F16, tmp_path, [], settings=SMALL, progress=False)
    assert not any(note.exists() for note in notes)


def test_the_source_s_predictions_are_kept_as_one_array_of_log_probabilities(climbed, folder):
    kept = np.load(folder / "reference.npy", mmap_mode="r")
    assert kept.shape[:2] == (3, 4 * 4 + 31) and np.allclose(np.exp(kept).sum(axis=2), 1, atol=1e-4)


# ---- arithmetic ----


def rung(name: str, kld: float, right: list[list[bool]], noise: float = 0.0) -> Rung:
    """A rung with this divergence, and these answers (a row a haystack, a column a length)."""
    draw = np.random.default_rng(list(name.encode()))  # hash() would draw anew in every process
    values = np.abs(kld + noise * draw.standard_normal(16 * 8))
    columns = {"nll": values + 1, "kld": values, "same_top": values < 1, "band": divergence.LAST}
    tokens = pd.DataFrame({"chunk": np.repeat(np.arange(16), 8), **columns})
    items = pd.DataFrame(
        [
            {"haystack": h, "length": 64 * 2**k, "planned": True, "correct": correct, "question": "q"}
            for h, row in enumerate(right)
            for k, correct in enumerate(row)
        ]
    )
    routing = pd.DataFrame({"chunk": [], "hashed": np.zeros(0, bool), "identical": []})
    return Rung(name, None, tokens, routing, (), items, {"tokens": 1})


def compared_as(a: Rung, b: Rung) -> dict[str, pd.Series]:
    return {row["metric"]: row for _, row in tables.steps(Ladder((a, b), SMALL, {})).iterrows()}


def test_a_clear_loss_is_worse_a_clear_gain_better_and_noise_no_evidence():
    good, bad = [[True, True, True, True]] * 12, [[True, True, False, False]] * 12
    near, far, twin = (
        rung("near", 0.1, good, 0.01),
        rung("far", 0.5, bad, 0.01),
        rung("twin", 0.1, good, 0.01),
    )
    metrics = ("KL divergence", "log-perplexity", "retrieval")
    for a, b, verdict in ((near, far, "worse"), (far, near, "better"), (near, twin, SAME)):
        assert [compared_as(a, b)[metric]["verdict"] for metric in metrics] == [verdict] * 3
    assert compared_as(near, far)["retrieval"]["difference"] == -0.5


@pytest.mark.parametrize("n, verdict", [(2, SAME), (3, SAME), (6, "worse")])
def test_few_texts_that_agree_are_no_evidence_beyond_what_a_sign_test_finds(n, verdict):
    """If 6 texts differ by chance, all go one way in 1 of 32 draws; five tests together allow 1 in 100."""
    good, bad = ([[True, True, right, right]] * n for right in (True, False))
    step = compared_as(rung("a", 0.1, good), rung("b", 0.1, bad))["retrieval"]
    assert step["p"] == pytest.approx(2 * 0.5 ** (2 * n)) or n > 3
    assert step["verdict"] == verdict


def test_one_text_says_nothing_of_retrieval():
    assert (
        compared_as(*(rung(name, 0.1, [[True]]) for name in "ab"))["retrieval"]["verdict"] == "not measured"
    )


def test_a_dense_model_has_no_expert_agreement():
    metrics = compared_as(*(rung(name, 0.1, [[True]] * 6) for name in "ab"))
    assert "same experts" not in metrics and "KL divergence" in metrics


def test_a_climb_is_cut_in_the_stated_order():
    settings = Settings(n_threads=1)
    whole, rungs, fitted = ladder.within_budget(settings, F16, ladder.RUNGS, math.inf)
    assert (whole.max_items, whole.n_haystacks, whole.longest, whole.n_chunks) == (64, 6, 512, 17)
    assert rungs == list(ladder.RUNGS) and fitted.left_out == ()
    least, rungs, fitted = ladder.within_budget(settings, F16, ladder.RUNGS, 0)
    assert rungs == ["F16", "Q3_K_M", "IQ1_S-XL"], "the first, the last, and one between them"
    assert (least.max_items, least.n_haystacks, least.longest, least.n_chunks) == (1, 1, 256, 4)
    assert "3 rungs, not 8" in fitted.left_out
