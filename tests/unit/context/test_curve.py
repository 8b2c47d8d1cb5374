"""The long-context measurement: its plan, its accounting, its resumption, and its failures."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from math import inf
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_memory import NANO, smollm2

from dfqs_nb.context import curve as curves
from dfqs_nb.context.boundary import Counts, paired
from dfqs_nb.context.curve import depth_table, measure
from dfqs_nb.context.haystacks import Haystacks, probe_of
from dfqs_nb.context.plan import Plan, PrefillSpeed, RuntimeFailure, make_plan
from dfqs_nb.core.journal import Journal
from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.core.stage import Stage, read_stage
from dfqs_nb.llama.model import DecodeError, NanLogitsError, check_reuse, open_model
from dfqs_nb.llama.settings import OpenSettings

NANO_Q8 = data_dir() / "reference" / "DFQS-Nano-Q8_0-00001-of-00002.gguf"
SETTINGS = OpenSettings(n_ctx=640, n_threads=1)


@pytest.fixture(scope="module")
def nano():
    with open_model(NANO, SETTINGS, trial=False) as model:
        yield model


@pytest.fixture(scope="module")
def smol():
    with open_model(smollm2(), SETTINGS, trial=False) as model:
        yield model


def one_key(model, longest: int = 512, n: int = 4, **options) -> Plan:
    return make_plan(model, "long-context-nano", longest, n_haystacks=n, rounds=0, **options)


def cut(plan: Plan, folder: Path) -> Plan:
    """The plan cut to its own budget."""
    return plan.kept(Stage(folder, "long_context", budget_minutes=1), "", fresh=True)


# ---- reuse ----


def test_asking_a_dense_model_from_a_saved_state_changes_no_bit(smol):
    draw = np.random.default_rng(0)
    text, question = (draw.integers(10, smol.n_vocab - 10, n).tolist() for n in (250, 20))
    check = check_reuse(smol, text, question)
    assert check.allowed and check.n_close == 20 and check.largest_difference == 0, check.sentence
    assert check.n_evaluated == 250 + 2 * 20


@pytest.mark.parametrize("flash", [False, True])
def test_a_saved_state_gives_what_the_same_calls_give_and_a_wrong_one_does_not(flash, monkeypatch):
    draw = np.random.default_rng(0)
    with open_model(NANO, dataclasses.replace(SETTINGS, flash_attn=flash), trial=False) as model:
        for n in (300, 301, 333):  # in one call with the text, some of these questions get other logits
            text, question = (draw.integers(10, 700, n).tolist() for n in (n, 20))
            check = check_reuse(model, text, question)
            assert check.allowed, check.sentence
        model.clear()
        model.decode(text[::-1])
        wrong, restore = model.save(), type(model).restore
        monkeypatch.setattr(type(model), "restore", lambda self, state: restore(self, wrong))
        check = check_reuse(model, text, question)
    assert not check.allowed and check.n_close == 0 and "afresh" in check.sentence


def test_a_state_of_a_text_that_lacks_its_first_token_is_noticed(nano, monkeypatch):
    """So small a fault leaves the best token as it is, and so does rounding that flips a near-tie."""
    case = Haystacks(nano, probe_of("nano"), 256).case(0, 256)
    nano.clear()
    nano.decode(case.body[1:])
    torn, restore = nano.save(), type(nano).restore
    assert check_reuse(nano, case.body, case.questions[0].prompt).allowed
    monkeypatch.setattr(type(nano), "restore", lambda self, state: restore(self, torn))
    check = check_reuse(nano, case.body, case.questions[0].prompt)
    assert not check.allowed, check.sentence


def test_a_model_that_does_not_restore_exactly_is_asked_afresh(nano, tmp_path, monkeypatch):
    plan = make_plan(nano, "nano", 256, n_haystacks=1)
    monkeypatch.setattr("dfqs_nb.llama.model.TOLERANCE", -1.0)
    run = measure(nano, plan, tmp_path)
    assert plan.reuse and not run.reuse.allowed
    assert (run.items["n_evaluated"] > 200).all(), "each question with its text"


def test_a_text_whose_state_is_not_reused_costs_as_much_as_all_its_questions(nano, tmp_path, monkeypatch):
    """About 420 s from a saved state, and 1,900 s afresh: that is not begun in 1,000 s."""
    plan = dataclasses.replace(make_plan(nano, "nano", 256, n_haystacks=1), speed=PrefillSpeed(1.0, 0))
    assert plan.seconds < 1000
    monkeypatch.setattr("dfqs_nb.llama.model.TOLERANCE", -1.0)
    run = measure(nano, dataclasses.replace(plan, budget_seconds=1000), tmp_path)
    assert run.budget_hit and run.items.empty and run.boundary().cause == "budget"


# ---- plan and cost ----


def test_long_plans_cost_twice_the_longest_length_and_their_questions(nano):
    """Octaves add up to twice the longest, the second set of shortest texts included."""
    for longest, most in ((2048, 2.5), (16384, 2.1), (2**20, 2.01)):
        plan = dataclasses.replace(make_plan(nano, "nano", longest), speed=PrefillSpeed(1.0, 0.0))
        assert plan.grid[0] == 256 and plan.grid[-1] == longest
        tokens = sum(plan.n_texts(length) * plan.text_seconds(length) for length in plan.grid)
        assert 2 < tokens / (longest * plan.n_haystacks) <= most, longest
    assert plan.n_texts(256) == 24 and plan.n_texts(512) == 12


def test_cost_of_a_million_tokens_is_known_before_it_starts(nano):
    plan = make_plan(nano, "nano", 2**20, n_haystacks=4)
    plan = dataclasses.replace(plan, speed=PrefillSpeed(0.02, 1e-8))
    by_hand = sum(4 * (0.02 * n + 1e-8 * n**2 / 2) for n in (256, *plan.grid))
    assert by_hand < plan.seconds < 1.1 * by_hand
    assert "1,048,576 tokens will take about 55 h" in plan.cost_sentence


def test_a_budget_cuts_the_plan_and_never_fails_the_model(nano, tmp_path):
    plan = one_key(nano)
    plan = dataclasses.replace(plan, speed=PrefillSpeed(0.001, 0), budget_seconds=3)
    short = cut(plan, tmp_path)
    assert (short.grid, short.n_haystacks) == ((64, 128, 256, 512), 2)
    assert short.left_out == ("2 texts a length in place of 4",)
    run = measure(nano, dataclasses.replace(short, grid=(64, 128), budget_seconds=inf), tmp_path)
    assert run.boundary().right_censored and run.boundary().cause is None
    least = cut(dataclasses.replace(plan, budget_seconds=0.1), tmp_path)
    assert (least.grid, least.n_haystacks) == ((64,), 1)
    assert cut(dataclasses.replace(plan, budget_seconds=0.01), tmp_path).n_haystacks == 0, "nothing fits"


def test_texts_are_cut_before_lengths_and_four_lengths_are_kept(nano, tmp_path):
    plan = dataclasses.replace(make_plan(nano, "nano", 8192), speed=PrefillSpeed(0.001, 0))
    cuts = [
        cut(dataclasses.replace(plan, budget_seconds=plan.seconds * share / 0.8), tmp_path)
        for share in (1.001, 0.6, 0.35, 0.2, 0.1, 0.02)
    ]
    sizes = [(plan.n_haystacks, len(plan.grid)) for plan in cuts]
    assert sizes == [(12, 6), (6, 6), (4, 6), (4, 5), (4, 4), (2, 2)]
    assert cuts[0].left_out == () and "4 texts a length in place of 12" in cuts[3].cost_sentence


def test_a_plan_without_a_length_goes_to_what_the_context_holds(nano):
    assert make_plan(nano, "nano", 0).grid[-1] == 512  # 640, less the answer


def test_a_budget_that_ends_during_the_run_censors(nano, tmp_path):
    plan = dataclasses.replace(
        one_key(nano, n=3), grid=(64, 512), budget_seconds=100, speed=PrefillSpeed(1.0, 0)
    )
    run = measure(nano, plan, tmp_path)
    assert run.budget_hit and run.failure is None
    assert run.items["length"].unique().tolist() == [64]
    assert run.boundary().right_censored
    stage = Stage(tmp_path, "long_context", 1)
    vars(stage)["model"] = {}
    run.hand_on(stage, {})
    (row,) = read_stage(tmp_path, "long_context")["left_out"]
    assert row["what"] == "lengths: 512 tokens"


# ---- the run ----


def count_evaluated(model, monkeypatch) -> list[int]:
    sizes: list[int] = []
    check = type(model).check_room
    monkeypatch.setattr(
        type(model), "check_room", lambda self, tokens: sizes.append(len(tokens)) or check(self, tokens)
    )
    return sizes


def test_every_evaluated_token_is_accounted_for(nano, tmp_path, monkeypatch):
    plan = make_plan(nano, "nano", 512, n_haystacks=2, rounds=0)
    sizes = count_evaluated(nano, monkeypatch)
    run = measure(nano, plan, tmp_path)
    assert run.evaluated_tokens == sum(sizes)
    asked = run.items.groupby("length")["haystack"].nunique()
    assert asked.to_dict() == {256: 4, 512: 2}, "twice as many texts where a_0 comes from"
    assert run.evaluated_tokens > run.reuse.n_evaluated > 0
    if run.reuse.allowed:
        held = sum(row["n_evaluated"] for row in run.journal.rows() if row["id"].endswith("/held"))
        assert held <= 4 * 256 + 2 * 512, "a text is evaluated once"
    assert len(run.items) == 36 and (run.items["n_needles"] == 6).all()


def test_reused_and_fresh_give_the_same_answers(nano, tmp_path):
    plan = make_plan(nano, "nano", 256, n_haystacks=1, rounds=0)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    reused = measure(nano, plan, tmp_path / "a")
    fresh = measure(nano, dataclasses.replace(plan, reuse=False), tmp_path / "b")
    if reused.reuse.largest_difference:
        pytest.skip("this processor computes a batch of another size otherwise: answers may differ")
    columns = ["haystack", "length", "question", "answer", "correct", "another_key"]
    assert reused.items[columns].equals(fresh.items[columns])


CHILD = """
import contextlib, sys
from dfqs_nb import context
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
with open_model(sys.argv[1], OpenSettings(n_ctx=640, n_threads=1), trial=False) as model:
    plan = context.make_plan(model, sys.argv[3], 512 if "nano" in sys.argv[3] else 256, n_haystacks=2)
    with contextlib.redirect_stdout(sys.stderr):  # a resumed run says that it goes on
        run = context.measure(model, plan, sys.argv[2])
    print(run.items.to_csv(index=False))
    print(run.counts().curve().to_csv(index=False), run.boundary(), run.evaluated_tokens)
"""


def child(path: Path, folder: Path, prompt_set: str, kill_after: int | None = None) -> str:
    """Measure in a process of its own; killed without warning when its journal has so many lines."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(folder), prompt_set],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(REPOSITORY)},
    )
    journal = folder / curves.JOURNAL
    while kill_after is not None and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= kill_after:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return ""
        time.sleep(0.005)
    return process.communicate()[0].decode()


@pytest.mark.parametrize(
    "which, prompt_set",
    [("nano", "nano"), pytest.param("smol", "long-context-standard", marks=pytest.mark.slow)],
)
def test_killed_and_resumed_run_gives_the_same_numbers(which, prompt_set, tmp_path):
    path = NANO if which == "nano" else smollm2()
    whole = child(path, tmp_path / "whole", prompt_set)
    assert "Boundary(" in whole
    for n in (4, 12):
        child(path, tmp_path / "killed", prompt_set, kill_after=n)
    journal = tmp_path / "killed" / curves.JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"conditions": "torn')
    found = journal.read_bytes().count(b"\n")
    assert 12 <= found < (tmp_path / "whole" / curves.JOURNAL).read_bytes().count(b"\n")
    assert child(path, tmp_path / "killed", prompt_set) == whole


def test_journal_keeps_conditions_apart_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "items.jsonl"
    Journal(path, {"n": 1}).add("a", correct=True)
    Journal(path, {"n": 2}).add("a", correct=False)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"conditions": "x", "id"')
    assert Journal(path, {"n": 1})["a"] == {"correct": True}
    assert path.read_bytes() == whole
    assert "b" not in Journal(path, {"n": 2}) and not Journal(path, {"n": 3}).rows()


def test_two_quantizations_are_compared_question_by_question(nano, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    plan = one_key(nano, 128, n=5)
    this = measure(nano, plan, tmp_path / "a").items
    with open_model(NANO_Q8, SETTINGS, trial=False) as model:
        baseline = measure(model, plan, tmp_path / "b").items
    row = paired(this, baseline)
    right = this["correct"].sum(), baseline["correct"].sum()
    assert row["difference"] == pytest.approx((right[0] - right[1]) / 15)
    assert -1 <= row["low"] <= row["difference"] <= row["high"] <= 1
    assert (this["expected"] == baseline["expected"]).all()


def test_the_stage_file_holds_planned_lengths_and_refinements_apart(tmp_path, nano, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    stage = Stage("run", "long_context")
    (stage.folder / "merge.json").write_text(json.dumps({"stage": "merge", "model": {"sha256": "a"}}))
    run = measure(nano, make_plan(nano, "nano", 512, n_haystacks=2), stage.folder)
    run.hand_on(stage, nano.conditions())
    content = json.loads((stage.folder / "long_context.json").read_text())
    assert [row["length"] for row in content["curve"]] == [256, 512]
    assert len(content["context_stability_curve"]) == 2
    assert all(row["length"] not in (256, 512) for row in content["refined"])
    assert content["boundary"]["provisional"] and "provisional" in content["summary"][0]
    assert content["guess"]["keys"] == 6 and set(content["files"]) == {"long_context_items.csv"}
    kept = pd.read_csv(stage.folder / "long_context_items.csv", dtype={"expected": str, "answer": str})
    assert len(kept) == len(run.items) and (kept["expected"] == run.items["expected"]).all()
    assert Counts.of(kept).boundary() == run.boundary()
    assert content["conditions"]["protocol"] and content["largest_fall"]["high"] <= 1.5


# ---- what cannot run ----


def test_a_context_too_small_ends_the_curve_with_its_cause(tmp_path):
    with open_model(NANO, OpenSettings(n_ctx=256, n_threads=1), trial=False) as model:
        run = measure(model, one_key(model), tmp_path)
    assert run.failure.cause == "n_ctx" and run.failure.length == 256
    assert run.boundary().cause in ("n_ctx", "quality") and run.boundary().tokens <= 256


@pytest.mark.parametrize(
    "error, cause",
    [(DecodeError("decode returned -3"), "decode_error"), (NanLogitsError("NaN"), "nan_logits")],
)
def test_a_decode_that_fails_is_the_boundary_with_its_cause(nano, tmp_path, monkeypatch, error, cause):
    evaluate = type(nano).evaluate

    def failing(self, tokens):
        if self.n_past + len(tokens) > 100:
            raise error
        return evaluate(self, tokens)

    monkeypatch.setattr(type(nano), "evaluate", failing)
    run = measure(nano, one_key(nano), tmp_path)
    assert (run.failure.cause, run.failure.length) == (cause, 128)
    boundary = run.boundary()
    assert (boundary.cause, boundary.tokens, boundary.right_censored) == (cause, 128, False)
    assert run.counts().curve()["length"].tolist() == [64], "a failure is not a wrong answer"


def test_a_predicted_shortage_is_the_cause_of_the_boundary(nano, tmp_path):
    shortage = RuntimeFailure(128, "oom", "too much")
    boundary = measure(nano, one_key(nano, 64), tmp_path, predicted=shortage).boundary()
    assert (boundary.cause, boundary.tokens, boundary.right_censored) == ("oom", 128, False)


# ---- tables ----


def test_right_answers_are_counted_by_depth_and_length():
    depth = np.repeat([0.0, 0.35, 0.5, 0.7, 0.99], [14, 14, 9, 14, 14])
    items = pd.DataFrame({"length": 256, "depth": depth, "correct": depth != 0.35})
    items = pd.concat([items, items[:1].assign(length=512)])
    table = depth_table(items)
    assert table.index.tolist() == [
        *("0 to 20 % deep", "20 to 40 % deep", "40 to 60 % deep", "60 to 80 % deep", "80 to 100 % deep")
    ]
    assert table[256].tolist() == ["14 of 14", "0 of 14", "9 of 9", "14 of 14", "14 of 14"]
    assert table[512].tolist() == ["1 of 1", "", "", "", ""]


def test_the_probe_of_a_single_key_has_no_guess_rate(nano, tmp_path):
    run = measure(nano, one_key(nano, 64, n=1), tmp_path)
    assert run.boundary().guess_rate == 0.0 and probe_of("long-context-nano").needles == 1
