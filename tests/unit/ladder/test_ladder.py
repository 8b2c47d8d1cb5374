"""The ladder on the shipped F16 model, climbed by two rungs, and its arithmetic on made-up rungs."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from dfqs_nb import ladder
from dfqs_nb.core import Stage, child
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.core.stage import read_stage
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.ladder import divergence, figures, run, tables
from dfqs_nb.ladder.run import Ladder, Rung, Settings
from dfqs_nb.ladder.tables import SAME
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing import differences, load_trace, open_recorded
from dfqs_nb.routing.recorder import record
from dfqs_nb.stats import holm

matplotlib.use("Agg")
F16 = data_dir() / "reference" / "DFQS-Nano-F16.gguf"
SMALL = Settings(chunk_tokens=64, n_chunks=3, max_items=16, n_threads=1)


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
    return ladder.climb(F16, folder, ["Q8_0", broken, "Q4_K_M"], settings=SMALL)


def test_the_source_is_the_first_rung_and_evaluated_again_has_no_divergence_from_itself(climbed, folder):
    """Against the predictions that the climb kept: in its own row the source is held against itself."""
    assert [rung.name for rung in climbed.rungs] == ["F16", "Q8_0", "Q4_K_M"]
    assert climbed.rungs[0].header.path == F16
    with open_recorded(F16, OpenSettings(n_ctx=64, n_threads=1)) as recorded:
        pieces = divergence.load_text(SMALL.text).chunks(recorded.model, 64, 3)
        again = divergence.beside_source(recorded, pieces, folder / run.PREDICTIONS, is_source=False)
    assert again["kld"].max() < 1e-6 and again["same_top"].all()
    assert again["nll"].to_numpy() == pytest.approx(climbed.rungs[0].tokens["nll"].to_numpy(), abs=1e-3)


def test_a_rung_that_cannot_be_made_is_named_and_does_not_end_the_climb(climbed):
    (note,) = climbed.notes
    assert note.startswith("broken failed: ") and "no tensor matches 'no_such_tensor'" in note


def test_every_rung_has_every_measurement(climbed):
    table = tables.table(climbed).set_index("rung")
    assert table["n_tokens"].eq(3 * 31).all()
    assert 0 < table.loc["Q8_0", "kld"] < table.loc["Q4_K_M", "kld"]
    assert table.loc["F16", "perplexity_ratio"] == 1 != table.loc["Q4_K_M", "perplexity_ratio"]
    assert table[["kld_low", "kld_high"]].isna().all().all()  # of 3 chunks
    assert table["bits_per_weight"].is_monotonic_decreasing
    assert table.loc["Q8_0", "expert_bits"] == 8.5
    assert table[["nano_reasoning_hard", "nano_reasoning_hard_low"]].notna().all().all()
    assert table["nano_reasoning_hard_n"].eq(16).all()
    assert set(tables.class_table(climbed).columns) == {"F16", "Q8_0", "Q4_K_M"}


def test_routing_agreement_is_that_of_the_routing_module(climbed, folder):
    rows = tables.routing_table(climbed)
    source, settings = load_trace(folder / "reference.npz"), OpenSettings(n_ctx=64, n_threads=1)
    for rung in climbed.rungs[1:]:
        mine = rows[rows["rung"] == rung.name]
        with open_recorded(folder / rung.name / "model.gguf", settings) as recorded:
            trace = record(recorded, source.tokens[:64].tolist(), None)
        first = rung.routing[rung.routing["chunk"] == 0]
        same = 1 - differences(source.rows(slice(0, 64)), trace).mean(axis=0)
        assert np.allclose(first["identical"], same, atol=0.05)  # evaluated in one piece
        assert mine.loc[mine["hashed"], "identical"].eq(1).all() and mine["n"].eq(3 * 64).all()


def test_a_program_that_the_source_wrote_too_is_not_run_again(climbed, folder):
    for path in (folder / "F16" / "scores").glob("verdicts-*.jsonl"):
        assert (folder / "Q8_0" / "scores" / path.name).read_text().startswith(path.read_text())


def test_what_is_done_is_not_done_again(climbed, folder, monkeypatch):
    def never(*_arguments, **_options):
        raise AssertionError("a child was started")

    monkeypatch.setattr(child.Worker, "run", never)
    again = ladder.climb(F16, folder, ["Q8_0", "Q4_K_M"], settings=SMALL)
    assert not again.notes
    pd.testing.assert_frame_equal(tables.table(again), tables.table(climbed))


def test_other_settings_measure_anew_but_quantize_nothing(folder, climbed, tmp_path, monkeypatch):
    """In a copy: a step that begins forgets what it measured before, and one or two may begin."""
    for kept in ("F16", "Q8_0"):
        shutil.copytree(folder / kept, tmp_path / kept)
    jobs = []

    def refuse(worker, job, where):
        jobs.append(job["work"])
        raise ModelError("not now")

    monkeypatch.setattr(child.Worker, "run", refuse)
    with pytest.raises(DfqsError, match="not now"):
        ladder.climb(F16, tmp_path, ["Q8_0"], settings=dataclasses.replace(SMALL, n_chunks=2))
    assert "predict" in jobs and set(jobs) <= {"predict", "ask"}


@pytest.mark.parametrize(
    "cores, threads, memory, workers", [(2, 1, 8e9, 3), (8, 4, 8e9, 2), (2, 2, 8e9, 1), (64, 1, 2e9, 3)]
)
def test_as_many_rungs_run_at_once_as_cores_and_memory_hold(monkeypatch, cores, threads, memory, workers):
    monkeypatch.setattr(run, "usable_cores", lambda: cores)
    monkeypatch.setattr(run, "available_memory", lambda: SimpleNamespace(available_bytes=int(memory)))
    assert run.n_workers(open_shards(F16), threads) == workers


@pytest.mark.parametrize("gone", ["reference.npy", "reference.npz"])
def test_predictions_that_are_gone_are_made_again_and_nothing_else(folder, climbed, tmp_path, gone):
    """The source's note still says that it is measured; another rung has nothing to be held against."""
    for kept in ("F16", "Q8_0"):
        shutil.copytree(folder / kept, tmp_path / kept)
    for kept in {"reference.npy", "reference.npz"} - {gone}:
        shutil.copyfile(folder / kept, tmp_path / kept)
    before = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if "F16/predict" not in str(path)
    }
    again = ladder.climb(F16, tmp_path, ["Q8_0"], settings=SMALL)
    assert [rung.name for rung in again.rungs] == ["F16", "Q8_0"]
    changed = {path.name for path, then in before.items() if path.stat().st_mtime_ns != then}
    assert changed <= {"reference.npy", "reference.npz"} and (tmp_path / gone).exists()
    pd.testing.assert_frame_equal(again.rungs[0].tokens, climbed.rungs[0].tokens)


@pytest.mark.parametrize(
    "damage", [lambda path: os.truncate(path, 4096), lambda path: path.write_bytes(b"x")]
)
def test_a_file_that_was_changed_by_hand_is_made_again(folder, climbed, tmp_path, damage):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "Q8_0" / "model.gguf"
    damage(path)
    again = ladder.climb(F16, tmp_path / "copy", ["Q8_0"], settings=SMALL)
    assert again.notes == ("Q8_0 was made again: model.gguf was changed after it was made",)
    assert path.read_bytes() == (folder / "Q8_0" / "model.gguf").read_bytes()
    pd.testing.assert_frame_equal(again.rungs[1].tokens, climbed.rungs[1].tokens)


@pytest.fixture(scope="module")
def tested(climbed):
    return tables.hierarchy(climbed)


def test_the_hierarchy_takes_the_rungs_that_there_are(climbed, tested):
    assert set(zip(tested["step"], tested["a"], tested["b"], strict=True)) == {
        ("FP16/FP8 -> Q4-Q6", "Q8_0", "Q4_K_M")
    }
    assert set(tested["metric"]) >= {*tables.METRICS.values(), "nano-reasoning-hard"}
    assert tested["verdict"].isin(["better", "worse", SAME]).all()
    first = tested.iloc[0]
    assert first["metric"] == "KL divergence" and first["difference"] > 0
    assert np.isnan(first["low"]) and first["n"] == 3 and first["verdict"] == SAME
    of = {rung.name: rung.bits_per_weight for rung in climbed.rungs}
    for (step, *ends), _ in tested.groupby(["step", "bits_a", "bits_b"]):
        upper, lower = ([of[it] for it in tables.LEVELS[level] if it in of] for level in step.split(" -> "))
        assert ends == [min(upper), max(lower)], "other rungs were compared"
    assert tested["p_holm"].tolist() == pytest.approx(holm(tested["p"].tolist()))


def test_a_ladder_of_one_level_tests_nothing(climbed):
    few = dataclasses.replace(climbed, rungs=climbed.rungs[:2])
    assert tables.hierarchy(few).empty


def test_the_stage_hands_on_its_summary(climbed, tested, tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    stage = Stage("r", "ladder")
    lines = tables.hand_on(stage, climbed, tested)
    content = read_stage(stage.folder, "ladder")
    assert content["summary"] == lines
    assert any("FP16/FP8 -> Q4-Q6 (Q8_0 at" in line and "KL divergence (n = 3)" in line for line in lines)
    assert any("interval unknown" in line and "n = 93 tokens in 3 chunks" in line for line in lines)
    assert any(line.startswith("broken failed") for line in lines)
    assert [row["rung"] for row in content["rungs"]] == ["F16", "Q8_0", "Q4_K_M"]


def test_the_figure_is_drawn_for_dense_models_and_single_rungs_too(climbed):
    table = tables.table(climbed)
    for drawn in (table, table.iloc[:2], table.assign(expert_bits=float("nan"))):
        ax = figures.divergence_by_bits(drawn)
        assert ax.get_title("left") and "interval unknown" in ax.get_ylabel()
        known = drawn.assign(kld_low=drawn["kld"], kld_high=drawn["kld"])
        assert "95 % interval" in figures.divergence_by_bits(known).get_ylabel()


def test_no_name_in_the_figure_touches_a_mark_or_another_name(climbed):
    first = tables.table(climbed).iloc[[0]]
    names, bits = [f"IQ{n}_XXS-own" for n in range(6)], np.array([4.3, 2.7, 2.66, 2.4, 2.4, 2.3])
    rungs = pd.DataFrame({"rung": names, "bits_per_weight": bits, "expert_bits": bits - 0.5, "n_chunks": 3})
    shares = {"kld_low": 0.05 / bits * (bits < 4), "kld": 0.1 / bits, "kld_high": 0.2 / bits}
    rungs = rungs.assign(n_tokens=93, kld_tail=1.0, **shares)
    for drawn in (rungs, rungs.assign(kld_low=math.nan, kld_high=math.nan, expert_bits=math.nan)):
        ax = figures.divergence_by_bits(pd.concat([first, drawn]))
        ax.figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in ax.texts]
        marks = [line.get_window_extent() for line in ax.lines]
        assert [text.get_text() for text in ax.texts] == names
        assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in [*boxes[n + 1 :], *marks])


def test_a_note_does_not_outlive_what_it_vouches_for(climbed, folder, tmp_path, monkeypatch):
    """A climb that is killed under other settings must not leave their predictions under the old key."""
    notes = [tmp_path / "F16" / name for name in ("predict.json", "ask.json")]
    for note in notes:
        note.parent.mkdir(exist_ok=True)
        note.write_text('{"key": "old"}')
    monkeypatch.setattr(
        child.Worker, "run", lambda worker, job, where: run.predict({**job, "path": "gone.gguf"})
    )
    with pytest.raises(DfqsError, match="gone.gguf"):
        ladder.climb(F16, tmp_path, [], settings=SMALL)
    assert not any(note.exists() for note in notes)


def test_the_source_s_predictions_are_kept_as_one_array_of_log_probabilities(climbed, folder):
    kept = np.load(folder / "reference.npy", mmap_mode="r")
    assert kept.shape[:2] == (3, 31) and np.allclose(np.exp(kept).sum(axis=2), 1, atol=1e-4)


# ---- arithmetic ----


def rung(name: str, kld: float, noise: float = 0.01, bits: int = 8) -> Rung:
    """A rung of a dense model with about this divergence in each of 16 chunks, and these bits a weight."""
    draw = np.random.default_rng(list(name.encode()))  # hash() would draw anew in every process
    values = np.abs(kld + noise * draw.standard_normal(16 * 8))
    columns = {"nll": values + 1, "kld": values, "same_top": values < 0.3}
    tokens = pd.DataFrame({"chunk": np.repeat(np.arange(16), 8), **columns})
    routing = pd.DataFrame({"chunk": [], "hashed": np.zeros(0, bool), "identical": []})
    weights = SimpleNamespace(name="output.weight", nbytes=bits, n_elements=8, type="F16")
    return Rung(name, SimpleNamespace(tensors=(weights,)), tokens, routing, ())


@pytest.mark.parametrize(
    ("upper", "lower", "verdict"), [(0.1, 0.5, "worse"), (0.5, 0.1, "better"), (0.1, 0.1, SAME)]
)
def test_a_clear_loss_is_worse_a_clear_gain_better_and_noise_no_evidence(upper, lower, verdict):
    climbed = Ladder((rung("Q8_0", upper), rung("Q6_K", lower)), SMALL, {})
    tested = tables.hierarchy(climbed).set_index("metric")
    assert tested["verdict"].to_dict() == {"KL divergence": verdict, "same top token": verdict}
    assert tested.loc["KL divergence", "difference"] == pytest.approx(lower - upper, abs=0.01)


@pytest.mark.parametrize("turned", [False, True])
def test_between_levels_the_smallest_rung_meets_the_largest_in_any_order(turned):
    names = {"F16": 16, "Q8_0": 9, "Q6_K": 7, "Q4_K_M": 5, "Q3_K_M": 4, "IQ2_XXS": 3, "IQ1_S-XL": 2}
    rungs = [rung(name, 0.1, bits=bits) for name, bits in names.items()]
    climbed = Ladder(tuple(rungs[:1] + rungs[:0:-1] if turned else rungs), SMALL, {})
    tested = tables.hierarchy(climbed)
    pairs = list(dict.fromkeys(zip(tested["a"], tested["b"], strict=True)))
    assert pairs == [("Q8_0", "Q6_K"), ("Q4_K_M", "IQ2_XXS"), ("IQ2_XXS", "IQ1_S-XL")]
    assert tables.without_level(climbed) == ["Q3_K_M"]


def test_a_climb_is_cut_in_the_stated_order():
    settings = Settings(n_threads=1)
    whole, rungs, fitted = ladder.within_budget(settings, F16, ladder.RUNGS, math.inf)
    assert (whole.max_items, whole.n_chunks) == (64, 17)
    assert rungs == list(ladder.RUNGS) and fitted.left_out == ()
    least, rungs, fitted = ladder.within_budget(settings, F16, ladder.RUNGS, 0)
    assert rungs == ["Q8_0", "IQ1_S-XL"], "the first and the last"
    assert (least.max_items, least.n_chunks) == (1, 4)
    assert "2 quantized rungs in place of 7" in fitted.left_out
    with pytest.raises(DfqsError, match="no recipe is called 'Q9'"):
        ladder.within_budget(settings, F16, ["Q8_0", "Q9"], math.inf)
