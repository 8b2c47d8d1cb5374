"""Comparison, verdict and experiment: counted by hand, held to published bounds, and shown a planted fault."""

from __future__ import annotations

import dataclasses
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from test_memory import smollm2

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.header import read_header
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing import experiment as routing_experiment
from dfqs_nb.routing.experiment import Condition, run_experiment
from dfqs_nb.routing.recorder import calls, open_recorded, record
from dfqs_nb.routing.trace import COMPARED, Trace, compare, differences
from dfqs_nb.routing.verdict import advice, claims, judge, sensitivities
from dfqs_nb.stats import at_most

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
REPEATS = (
    "prefill, same process again",
    "prefill, fresh process",
    "decode, same process again",
    "decode, fresh process",
)


def trace(experts, hashed=(False, False), tokens=None, margin=None, drift=0.0, output=(1, 2)) -> Trace:
    """A made-up run of 2 layers and 4 experts."""
    experts = np.array(experts, np.uint8)
    n = len(experts)
    values = np.zeros((n, 3), np.float32) + drift
    return Trace(
        np.arange(n) if tokens is None else np.array(tokens),
        np.array([3, 4], np.int16),
        np.array(hashed),
        experts,
        np.full(experts.shape[:2], 0.5, np.float32) if margin is None else np.float32(margin),
        4,
        {},
        digest=values[:, 0].view(np.uint32).astype(np.uint64),
        logit_ids=np.arange(3),
        logits=values,
        output=np.array(output),
    )


A = trace(
    [[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]]], margin=[[0.5, 0.4], [0.3, 0.01], [0.2, 0.02]]
)


def test_order_of_experts_does_not_matter_and_sets_do():
    b = trace([[[1, 0], [2, 3]], [[0, 1], [2, 1]], [[0, 1], [0, 1]]], drift=0.25, output=(1, 3))
    change = compare(A, b)
    assert tuple(change) == COMPARED
    assert (change["n_choices"], change["n_differ"]) == (6, 2)
    assert change["margin_differ"] == pytest.approx(0.02) and change["same_output"] is False
    assert change["logits_equal"] == 0.0 and change["logit_drift"] == 0.25
    assert np.argwhere(differences(A, b)).tolist() == [[1, 1], [2, 1]]
    assert differences(A, b).sum(axis=0).tolist() == [0, 2]


def test_the_drift_of_tokens_with_equal_experts_leaves_out_flips():
    b = trace([[[0, 1], [2, 3]], [[0, 1], [2, 1]], [[0, 1], [2, 3]]])
    b.logits[:] = A.logits + np.array([[0.0], [8.0], [0.125]])
    change = compare(A, b)
    assert (change["logit_drift"], change["drift_of_equal_experts"]) == (8.0, 0.125)
    everywhere = trace([[[0, 2], [2, 3]]] * 3)
    assert np.isnan(compare(A, everywhere)["drift_of_equal_experts"]), "no token has equal experts"


def test_an_answer_that_ends_at_once_differs_from_one_that_goes_on():
    empty, other = (dataclasses.replace(A, output=np.array(output, np.int32)) for output in ([], [1]))
    assert compare(empty, other)["same_output"] is False and compare(empty, empty)["same_output"] is None
    (line,) = advice(
        sensitivities(table_of(("x", "n_ctx", "y", empty, dataclasses.replace(empty, **DRIFTED))))
    )
    assert line.endswith("logits by up to 0.5.") and "answer" not in line


def test_hash_layers_are_not_counted():
    b = trace([[[2, 3], [2, 3]]] * 3, hashed=(True, False))
    change = compare(dataclasses.replace(A, hashed=np.array([True, False])), b)
    assert (change["n_choices"], change["n_differ"]) == (3, 0)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (trace([[[0, 1], [2, 3]]] * 3, tokens=[0, 1, 9]), "different prompts"),
        (trace([[[0, 1], [2, 3]]] * 2), "different prompts"),
        (trace([[[0], [2]]] * 3), "different routers"),
        (dataclasses.replace(A, layers=np.array([0, 1])), "different routers"),
    ],
)
def test_traces_that_answer_different_questions_are_refused(other, says):
    with pytest.raises(DfqsError, match=says):
        compare(A, other)


@pytest.mark.parametrize("n", [1, 59, 1000, 10**7])
def test_no_event_has_a_closed_form(n):
    assert at_most(0, n) == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-6)


def test_the_bound_is_where_the_tail_is_five_per_cent():
    p = at_most(3, 40)
    assert sum(math.comb(40, i) * p**i * (1 - p) ** (40 - i) for i in range(4)) == pytest.approx(0.05)


def test_bounds_of_long_runs_stay_finite():
    assert 0.5 < at_most(500_000, 1_000_000) < 0.501 and at_most(2, 10**7) < 1e-6
    assert at_most(7, 7) == at_most(0, 0) == 1.0


# ---- the verdict ----


def table_of(*rows) -> pd.DataFrame:
    """The experiment's rows for pairs (condition, kind, against, a, b)."""
    return pd.DataFrame(
        [
            {"condition": name, "kind": kind, "against": against, "status": "done", "text": ""}
            | {"process": "fresh" if name == "fresh" else "main"}
            | compare(a, b)
            for name, kind, against, a, b in rows
        ]
    )


DRIFTED = {"digest": np.array([7, 8, 9], np.uint64), "logits": A.logits + 0.5}
FLIPPED = trace([[[0, 1], [2, 3]], [[0, 1], [2, 1]], [[0, 1], [2, 3]]], drift=0.5)


def test_the_verdict_passes_on_equal_runs():
    verdict = judge(table_of(("again", "identical", "x", A, A), ("batch 7", "batch", "x", A, FLIPPED)))
    assert verdict.passed and (verdict.facts["n_choices"], verdict.facts["n_differ"]) == (6, 0)
    assert (
        verdict.text.startswith("PASS: 0 of 6") and "in 0 of 1 repeated runs in 1 process (" in verdict.text
    )


def test_repeated_runs_are_counted_with_their_processes_and_without_a_bound():
    """Runs of one process are not independent, so their number bounds nothing."""
    verdict = judge(table_of(("again", "identical", "x", A, A), ("fresh", "identical", "x", A, A)))
    assert (verdict.facts["n_choices"], verdict.facts["n_processes"]) == (12, 2)
    assert (
        "in 0 of 2 repeated runs in 2 processes (texts of 3 tokens in all, each repeated 2 times"
        in verdict.text
    )
    assert "bound" not in verdict.text and not any("bound" in name for name in verdict.facts)


def test_the_verdict_fails_on_one_flip_under_identical_conditions():
    verdict = judge(table_of(("again", "identical", "x", A, A), ("fresh", "identical", "x", A, FLIPPED)))
    it = verdict.facts
    assert not verdict.passed and (it["n_differ"], it["n_choices"]) == (1, 12)
    assert verdict.text.startswith("FAIL: 1 of 12") and it["n_runs_differ"] == 1


def test_the_verdict_fails_when_a_repetition_did_not_run():
    table = table_of(("again", "identical", "x", A, A), ("fresh", "identical", "x", A, A))
    table.loc[1, "status"] = "failed: llama.cpp died"
    assert not judge(table).passed and "1 of the repetitions did not run" in judge(table).text
    assert claims(judge(table), sensitivities(table)).loc[1, "status"] == "not testable here"
    assert not judge(table[table["kind"] == "none"]).passed
    table.loc[1, "status"] = "left out: it does not fit into budget_minutes"
    assert judge(table).passed


def test_sensitivities_are_ranked_and_become_advice():
    moved = dataclasses.replace(A, logits=FLIPPED.logits, digest=FLIPPED.digest)
    table = table_of(
        ("1 thread", "n_threads", "x", A, A),
        ("n_batch 7", "n_batch and n_ubatch", "x", A, FLIPPED),
        ("all by decode", "prefill length", "x", A, moved),
    )
    assert sensitivities(table)["condition"].tolist() == ["n_batch 7", "all by decode", "1 thread"]
    lines = advice(sensitivities(table))
    assert lines[0].startswith('Pin: n_batch and n_ubatch (compared with "x"). "n_batch 7" changed 1 of 6')
    assert lines[1].startswith(
        'Pin for equal logits: prefill length (compared with "x"). "all by decode" changed'
    )
    assert "logits by up to 0.5" in lines[1] and "0 of 1 greedy answer changed" in lines[1]
    assert lines[2] == 'Free: n_threads (compared with "x"). Every logit was equal bit for bit.'


def test_advice_names_the_runs_from_which_a_setting_matters():
    """Threads that change a choice with flash attention alone are free elsewhere; amounts are of the named run."""
    further = dataclasses.replace(A, logits=A.logits + 8, digest=FLIPPED.digest)
    table = table_of(
        ("2 threads", "n_threads", "prefill", A, A),
        ("2 threads, flash", "n_threads", "flash", A, FLIPPED),
        ("4 threads, flash", "n_threads", "flash", A, further),
    )
    flash, plain = advice(sensitivities(table))
    assert flash.startswith(
        'Pin: n_threads (compared with "flash"). "2 threads, flash" changed 1 of 6 choices'
    )
    assert "logits by up to 0.5; 0 of 2 greedy answers changed." in flash
    assert plain == 'Free: n_threads (compared with "prefill"). Every logit was equal bit for bit.'


def test_a_flip_follows_only_what_its_router_could_see():
    """A later layer of any token and an earlier layer of a later token come after it."""
    same = np.full((4, 3, 2), [0, 1])
    other = same.copy()
    for place in ((1, 1), (1, 2), (2, 0), (2, 1), (3, 1), (0, 2)):
        other[place] = [0, 2]
    a, b = (
        Trace(np.arange(4), np.arange(3, dtype=np.int16), np.zeros(3, bool), experts, np.zeros((4, 3)), 4, {})
        for experts in (same, other)
    )
    ranked = sensitivities(table_of(("changed", "n_threads", "prefill", a, b)))
    traces = {"prefill": a, "changed": b}
    rows = ranked.drop(columns="rate").assign(load="", n_others=0)
    flips = routing_experiment.Experiment(OpenSettings(n_threads=1), traces, rows, [], 0).flips()
    assert flips.set_index(["token", "layer"])["first"].to_dict() == {
        **{(0, 2): True, (1, 1): True, (1, 2): False},
        **{(2, 0): True, (2, 1): False, (3, 1): False},
    }


def test_a_statement_without_a_measure_is_counted_and_not_judged():
    again = judge(table_of(("again", "identical", "x", A, A)))
    ranked = sensitivities(table_of(("n_batch 7", "n_batch and n_ubatch", "x", A, FLIPPED)))
    table = claims(again, ranked).set_index("claim")
    assert table["status"].tolist() == ["not testable here", "confirmed"]
    assert (
        '1 of 1 changes of settings changed a choice; "n_batch 7" changed most: 1 of 6'
        in (table["evidence"].iloc[0])
    )
    nothing = claims(
        judge(table_of(("again", "identical", "x", A, A)).assign(status="left out")), ranked
    ).loc[1]
    assert nothing["status"] == "not testable here"
    assert nothing["evidence"] == "Not judged: no repetition fits into the budget."


# ---- the experiment ----


def only(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Let an experiment run these conditions, and those that they are compared with."""
    every = routing_experiment.conditions

    def some(*arguments):
        planned = {condition.name: condition for condition in every(*arguments)}
        kept = {"prefill", *names}
        for _ in names:
            kept |= {planned[name].against for name in kept if name in planned}
        return [condition for condition in planned.values() if condition.name in kept]

    patch.setattr(routing_experiment, "conditions", some)


def poisoned(folder):
    """The reference model with router rows that are nearly equal: every choice is a near-tie."""
    for path in NANO.parent.glob("DFQS-Nano-IQ1_S-XL-*.gguf"):
        shutil.copy(path, folder)
    rng = np.random.default_rng(6)
    for path in folder.glob("*.gguf"):
        header = read_header(path)
        for tensor in header.tensors:
            at = slice(header.data_offset + tensor.offset, header.data_offset + tensor.offset + tensor.nbytes)
            if "ffn_gate_inp" in tensor.name or "exp_probs_b" in tensor.name:
                data = bytearray(path.read_bytes())
                values = np.frombuffer(data[at], "<f4").reshape(tensor.shape[::-1])
                nearly = values[:1] * (1 + 1e-6 * rng.standard_normal(values.shape))
                data[at] = ("exp_probs_b" not in tensor.name) * nearly.astype("<f4").tobytes() or bytes(
                    tensor.nbytes
                )
                path.write_bytes(data)
    return folder / NANO.name


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        only(patch, *REPEATS, "n_batch 7", "all by decode")
        return run_experiment(poisoned(folder), folder / "traces", n_tokens=150, n_output=4)


def test_a_planted_fault_is_caught(planted):
    """Near-ties flip when the batch changes, and only there: the same run still repeats itself."""
    table = planted.rows.set_index("condition")
    assert (table.loc[["n_batch 7", "all by decode"], "n_differ"] > 20).all()
    assert (table.loc[["n_batch 7", "all by decode"], "margin_differ"] < 1e-4).all()
    assert judge(planted.rows).passed
    assert np.nanmedian(planted.traces["prefill"].margin) < 1e-5
    assert "2 of 2 changes of settings changed a choice" in planted.claims()["evidence"].iloc[0]
    assert any(line.startswith("Pin: n_batch and n_ubatch (compared with") for line in planted.advice)
    flips = planted.flips()
    assert len(flips) == table.loc[["n_batch 7", "all by decode"], "n_differ"].sum()
    assert flips["margin"].max() < 1e-4 and set(flips["layer"]) <= {1, 2, 3}


def test_the_sound_model_does_not_look_like_the_planted_one(tmp_path, planted, monkeypatch):
    """How many near-ties fall the other way depends on the processor: a tenth of the planted at most."""
    only(monkeypatch, "n_batch 7")
    experiment = run_experiment(NANO, tmp_path, n_tokens=150, n_output=4)
    differ = planted.rows.set_index("condition")["n_differ"]
    assert experiment.rows["n_differ"].sum() < differ["n_batch 7"] / 10
    assert np.nanmedian(experiment.traces["prefill"].margin) > 1e-2


def test_traces_are_reused_only_under_the_same_conditions(tmp_path, monkeypatch):
    only(monkeypatch, "n_batch 7")
    first = run_experiment(NANO, tmp_path, n_tokens=60, n_output=2)
    assert first.n_made == len(first.traces) == 2  # the condition, and its reference
    again = run_experiment(NANO, tmp_path, n_tokens=60, n_output=2)
    assert (again.n_made, len(again.traces)) == (0, 2)
    pd.testing.assert_frame_equal(first.rows, again.rows)
    (path,) = tmp_path.glob("prefill.*.npz")
    path.write_bytes(b"cut off")  # a killed run leaves no such file, but a disk may
    assert run_experiment(NANO, tmp_path, n_tokens=60, n_output=2).n_made == 1
    assert run_experiment(NANO, tmp_path, n_tokens=61, n_output=2).n_made == 2
    back = run_experiment(NANO, tmp_path, n_tokens=60, n_output=2)
    assert back.n_made == 0 and back.reference.n_tokens == 60
    assert run_experiment(NANO, tmp_path, n_tokens=60, n_output=2, fresh=True).n_made == 2


def test_a_condition_that_llama_cpp_refuses_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch):
    settings = OpenSettings(n_ctx=256, n_threads=1)
    refused = dataclasses.replace(settings, type_k="q8_0", type_v="q8_0")
    bad = Condition("KV cache q8_0 without flash attention", "type_k and type_v", "prefill", refused)
    planned = [
        Condition("prefill", "reference", "", settings),
        bad,
        Condition("2 threads, too", "n_threads", bad.name, refused),
        Condition("prefill, fresh process", "identical", "prefill", settings),
    ]
    monkeypatch.setattr(routing_experiment, "conditions", lambda *_args: planned)
    experiment = run_experiment(NANO, tmp_path, n_tokens=60, n_output=2)
    status = experiment.rows.set_index("condition")["status"]
    assert status["prefill, fresh process"] == "done"
    assert status[bad.name].startswith("failed: llama.cpp refuses it")
    assert status["2 threads, too"] == f"not comparable: {bad.name!r} did not run"
    assert judge(experiment.rows).passed and len(experiment.sensitivities) == 0


def test_a_dense_model_is_judged_by_its_logits(tmp_path, monkeypatch):
    only(monkeypatch, REPEATS[0], REPEATS[1], "all by decode")
    experiment = run_experiment(smollm2(), tmp_path, n_tokens=48, n_output=2, n_threads=2)
    verdict = judge(experiment.rows)
    assert verdict.passed and not verdict.facts["routed"] and "dense model, nothing to route" in verdict.text
    assert experiment.claims()["status"].tolist() == ["not testable here", "confirmed"]
    assert experiment.rows.set_index("condition").loc["all by decode", "logits_equal"] < 1
    assert "changed logits by up to" in experiment.advice[0] and experiment.profile is None
    written = experiment.write_tables(tmp_path)
    assert all(path.exists() for path in written)


@pytest.mark.parametrize("n_prefill", [None, 0, 5, 99])
def test_calls_cover_the_text_once(n_prefill):
    assert [i for call in calls(20, n_prefill, 4) for i in call] == list(range(20))


def test_a_state_that_is_saved_and_put_back_goes_on_with_the_same_experts(monkeypatch):
    tokens = list(range(5, 165))
    with open_recorded(NANO, OpenSettings(n_ctx=256, n_batch=64, n_ubatch=64), trial=False) as recorded:
        plain, put_back, restore = record(recorded, tokens), [], recorded.model.restore
        monkeypatch.setattr(recorded.model, "restore", lambda state: put_back.append(state) or restore(state))
        restored = record(recorded, tokens, restored=True)
    assert [state.n_tokens for state in put_back] == [64, 128]
    assert (restored.digest[:64] == plain.digest[:64]).all(), "nothing was restored yet"
    assert differences(plain, restored).mean() < 0.05, "llama.cpp puts keys into other cells: sums may round"


def test_a_restored_state_is_compared_with_the_same_calls(tmp_path, monkeypatch):
    only(monkeypatch, "saved state restored")
    experiment = run_experiment(NANO, tmp_path, n_tokens=160, n_output=2)
    row = experiment.sensitivities.set_index("condition").loc["saved state restored"]
    assert row["kind"] == "saved state" and row["against"] == "n_batch 64" and row["n_tokens"] == 160
    assert any("saved state" in line for line in experiment.advice)
