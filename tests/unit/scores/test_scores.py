"""Runs that stop and continue, errors that are not scores, and the comparison of two runs."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest

from dfqs_nb.context.prompts import PromptError
from dfqs_nb.llama import generate as llama_generate
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama import settings as llama_settings
from dfqs_nb.llama.generate import Completion
from dfqs_nb.llama.model import DecodeError
from dfqs_nb.scores import compare as comparison
from dfqs_nb.scores import grading as scoring
from dfqs_nb.scores import item_sets, sandbox
from dfqs_nb.scores import run as scores
from dfqs_nb.scores.compare import ComparisonError, compare
from dfqs_nb.scores.item_sets import Item
from dfqs_nb.stats import holm, mcnemar

FOUND = sandbox.find_sandbox()
needs_sandbox = pytest.mark.skipif(not FOUND.safe, reason=f"no sandbox here: {FOUND.note}")
QUESTIONS = item_sets.load_item_set("nano-reasoning")
CODE = dataclasses.replace(
    item_sets.load_item_set("nano-code"), items=item_sets.load_item_set("nano-code").items[:6]
)
CONDITIONS = {"n_ctx": 1024, "mode": "chat"}


def said(text: str, finish: str = "eos") -> Completion:
    return Completion(text, (1, 2), finish, 3, 0.1, 0.1, 1)


class Oracle:
    """Answers right but for every third item; may be killed or fail on the way."""

    def __init__(self, killed_at: int | None = None, failing: int = 0, shift: int = 0) -> None:
        self.calls, self.killed_at, self.failing, self.shift = 0, killed_at, failing, shift

    def __call__(self, item: Item, sampling: llama_generate.Sampling) -> Completion:
        self.calls += 1
        if self.calls == self.killed_at:
            raise KeyboardInterrupt
        if self.failing:
            self.failing -= 1
            raise DecodeError("llama_decode failed")
        wrong = (sum(item.id.encode()) + self.shift) % 3 == 0
        return said("no" if wrong else item.answer or item.reference)


def collect(oracle, folder, item_set=QUESTIONS, conditions=CONDITIONS, **options):
    return scores.collect(oracle, item_set, folder, conditions, model_id="m", progress=False, **options)


def test_a_killed_run_continues_and_ends_with_the_same_score(tmp_path):
    whole = collect(Oracle(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        collect(Oracle(killed_at=50), tmp_path / "cut")
    path = tmp_path / "cut/answers-nano-reasoning.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # the kill tore the last line
    second = Oracle()
    run = collect(second, tmp_path / "cut")
    assert run.n_resumed == 48 and second.calls == 80
    assert run.score == whole.score and run.items.drop(columns="seconds").equals(
        whole.items.drop(columns="seconds")
    )


def test_a_finished_run_asks_nothing_and_other_conditions_ask_all(tmp_path):
    collect(Oracle(), tmp_path)
    for conditions, calls in ((CONDITIONS, 0), ({**CONDITIONS, "n_ctx": 512}, 128)):
        oracle = Oracle()
        collect(oracle, tmp_path, conditions=conditions)
        assert oracle.calls == calls
    other = Oracle()
    scores.collect(other, QUESTIONS, tmp_path, CONDITIONS, model_id="another", progress=False)
    assert other.calls == 128
    again = Oracle()
    collect(again, tmp_path, fresh=True)
    assert again.calls == 128


def test_an_error_of_the_runtime_is_tried_again_and_never_a_wrong_answer(tmp_path):
    assert collect(Oracle(failing=2), tmp_path / "a").score == collect(Oracle(), tmp_path / "b").score
    with pytest.raises(DecodeError):
        collect(Oracle(failing=3), tmp_path / "c")
    assert not (tmp_path / "c/answers-nano-reasoning.jsonl").exists()


def test_a_part_of_a_set_is_withheld(tmp_path):
    run = collect(Oracle(), tmp_path, limit=10)
    assert run.score.value is None and run.score.n_missing == 118 and len(run.items) == 10
    assert scores.score_table([run]).loc[0, "n_missing"] == 118


def test_grades_reasons_and_failures_to_read(tmp_path):
    def mixed(item, sampling):
        return {0: said(item.answer), 1: said("x", "length"), 2: said("")}.get(
            len(item.prompt) % 4, said("Tom.")
        )

    items = collect(mixed, tmp_path).items
    assert set(items["grade"]) == {"correct", "truncated", "no_answer", "wrong"}
    assert (items["reason"].str.len() > 0).equals(~items["correct"])
    read = scoring.failures(items, 5)
    assert len(read) == 5 == read["family"].nunique()
    table = scoring.family_table(items)
    assert table["n"].sum() == 128 and (table["low"] <= table["accuracy"]).all()


@needs_sandbox
def test_code_is_run_once_and_its_verdicts_are_kept(tmp_path, monkeypatch):
    run = collect(Oracle(), tmp_path, CODE, {**CONDITIONS, "mode": "complete"})
    assert run.score.n == 6 and run.conditions["sandbox"] == FOUND.level
    assert run.items["correct"].sum() == sum(sum(i.id.encode()) % 3 != 0 for i in CODE.items)
    monkeypatch.setattr(scores, "run_many", lambda *_: pytest.fail("judged again"))
    assert collect(Oracle(), tmp_path, CODE, {**CONDITIONS, "mode": "complete"}).score == run.score


@needs_sandbox
def test_the_code_of_a_chat_is_its_code_block(tmp_path):
    answers = {0: "Here:\n```python\n{}\n```\nIt works.", 1: "{}", 2: "```\nprint(1)\n```\n```py\n{}\n```"}

    def chatting(item, sampling):
        return said(answers[CODE.items.index(item) % 3].format(item.prompt + item.reference))

    run = collect(chatting, tmp_path, CODE)
    assert run.items["grade"].tolist() == ["passed", "no_answer", "passed"] * 2
    assert run.score.value == pytest.approx(4 / 6)


@needs_sandbox
def test_several_samples_give_pass_at_k(tmp_path):
    seeds = []

    def every_other(item, sampling):
        seeds.append(sampling.seed)
        return said(item.reference if sampling.seed % 2 else "    pass")

    run = collect(
        every_other,
        tmp_path,
        CODE,
        {**CONDITIONS, "mode": "complete"},
        n_samples=4,
        ks=(2, 4),
        sampling=llama_generate.Sampling(temperature=0.8, seed=0),
    )
    assert sorted(set(seeds)) == [0, 1, 2, 3] and len(run.items) == 24
    assert run.score.value == 0.5 and run.pass_at[4].value == 1.0
    assert run.pass_at[2].value == pytest.approx(1 - 1 / math.comb(4, 2))


def test_without_a_sandbox_code_is_not_even_asked(merged_reference, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "find_sandbox", lambda: sandbox.Sandbox("none", note="it is a test"))
    with llama_model.open_model(
        merged_reference, llama_settings.OpenSettings(n_ctx=512, n_threads=1)
    ) as model:
        with pytest.raises(sandbox.SandboxError, match="it is a test"):
            scores.score_set(model, CODE, tmp_path, progress=False)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(PromptError, match="needs .* tokens of context"):
            scores.score_set(model, dataclasses.replace(QUESTIONS, max_tokens=400), tmp_path, progress=False)


@needs_sandbox
def test_the_reference_model_scores_the_same_twice(merged_reference, tmp_path):
    small = dataclasses.replace(QUESTIONS, items=QUESTIONS.items[64:72])
    with llama_model.open_model(
        merged_reference, llama_settings.OpenSettings(n_ctx=512, n_threads=1)
    ) as model:
        runs = [
            scores.score_set(model, one, tmp_path / str(turn), progress=False)
            for turn in range(2)
            for one in (small, CODE)
        ]
    for first, second in ((runs[0], runs[2]), (runs[1], runs[3])):
        assert first.score == second.score and first.items["completion"].equals(second.items["completion"])
    assert runs[0].conditions["prompt_set_sha256"] == QUESTIONS.sha256 and len(runs[0].conditions) > 15


# ---- comparison ----


def test_mcnemar_is_the_binomial_test():
    for a in range(8):
        for b in range(8):
            n = a + b
            tail = [math.comb(n, k) / 2**n for k in range(n + 1)]
            exact = sum(p for p in tail if p <= tail[a] * (1 + 1e-9))
            assert mcnemar(a, b) == pytest.approx(exact)


def test_holm_rejects_in_steps():
    assert holm([]) == []
    assert holm([0.02]) == [0.02]
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])


def test_two_runs_are_compared_item_by_item(tmp_path):
    a, b = collect(Oracle(), tmp_path / "a"), collect(Oracle(shift=1), tmp_path / "b")
    one = compare([a], [b])[0]
    both = a.items.merge(b.items, on="id")
    assert one.only_a == (both["correct_x"] & ~both["correct_y"]).sum()
    assert one.difference == pytest.approx(b.score.value - a.score.value)
    assert one.low <= one.difference <= one.high and one.p == one.p_holm == mcnemar(one.only_a, one.only_b)
    same = compare([a], [a])[0]
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert list(comparison.comparison_table([one, same])["n"]) == [128, 128]


def test_other_conditions_are_refused_by_name(tmp_path):
    a = collect(Oracle(), tmp_path / "a")
    b = collect(Oracle(), tmp_path / "b", conditions={**CONDITIONS, "n_ctx": 2048, "n_batch": 64})
    with pytest.raises(
        ComparisonError, match=r"differ in n_batch \(absent and 64\), n_ctx \(1024 and 2048\)"
    ):
        compare([a], [b])
    with pytest.raises(ComparisonError, match="lack a result"):
        compare([a], [collect(Oracle(), tmp_path / "c", limit=5)])
    with pytest.raises(ComparisonError, match="only one of the two runs has nano-reasoning"):
        compare([a], [])


def test_the_bootstrap_covers_the_true_difference():
    draw, covered = np.random.default_rng(3), 0
    for turn in range(200):
        rows = [
            (family, draw.random() < low, draw.random() < low + 0.15)
            for family, low in (("a", 0.2), ("b", 0.7))
            for _ in range(60)
        ]
        tasks = pd.DataFrame(rows, columns=["family", "correct_a", "correct_b"])
        low, high = comparison.paired_bootstrap(tasks, True, 400, turn)
        covered += low <= 0.15 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_what_a_run_writes_is_plain_json(tmp_path):
    run = collect(Oracle(), tmp_path)
    assert json.loads(json.dumps(run.score.as_dict()))["n"] == 128
