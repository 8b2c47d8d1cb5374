"""A budget takes questions from every family evenly, then whole sets; it cuts an answer at its end, and says so."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.llama.generate import Completion
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.llama.timing import Pace
from dfqs_nb.scores import (
    Answerer,
    ItemSet,
    Options,
    figures,
    find_sandbox,
    plan_questions,
)
from dfqs_nb.scores import run as runs
from dfqs_nb.scores.grading import Results

SETS = ItemSet.of_tier("standard")
NANO, NANO_CHOICES = ItemSet.load("nano-reasoning"), ItemSet.load("nano-reasoning-choices")
PACE = Pace(prefill=0.001, decode=0.01)


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(runs, "probe", lambda model: PACE)
    monkeypatch.setattr(runs, "least_context", lambda *arguments: 0)
    model = SimpleNamespace(has_template=True, settings=OpenSettings())
    return lambda seconds, sets=SETS: plan_questions(model, sets, Options(), seconds)


@pytest.fixture(scope="module")
def model(merged_reference):
    with open_model(merged_reference, OpenSettings(n_ctx=512, n_threads=1)) as opened:
        yield opened


def test_a_set_that_does_not_fit_the_context_is_left_out_before_the_first_question(model, tmp_path):
    long = replace(NANO, name="long", max_tokens=5000)
    plan = plan_questions(model, [long, NANO_CHOICES], Options(limit=2, progress=False), math.inf)
    results, missing = plan.ask(tmp_path)
    assert [run.name for run in results.runs] == [NANO_CHOICES.name]
    assert len(missing) == 1 and str(missing[0]).startswith("the set long: it needs n_ctx=5")
    with pytest.raises(DfqsError, match="no set fits n_ctx=512: the set long: it needs n_ctx=5"):
        plan_questions(model, [long], Options(limit=2), math.inf)


def test_a_part_asks_as_much_of_every_family_and_larger_parts_hold_it():
    whole, before = SETS[0], set()
    for n in (1, 3, 10, 25, 120, 500):
        part = whole.part(n)
        assert len(part.items) == min(n, len(whole.items)) and part.name == whole.name
        sizes = Counter(item.family for item in part.items)
        assert max(sizes.values()) - min(sizes.values()) <= 1 and len(sizes) == min(
            n, len({item.family for item in whole.items})
        )
        assert before <= {item.id for item in part.items}
        before = {item.id for item in part.items}
    assert part == whole == whole.part(0)


def test_sets_are_planned_while_the_time_holds_a_dozen_answers_of_each(planned):
    whole = planned(math.inf)
    assert whole.n_sets == len(SETS) and whole.sentence.startswith("384 of 384 questions, at most ")
    dozen = planned(120)
    assert dozen.n_sets == 2, "the first two are asked in any case"
    assert dozen.sentence.startswith("at most 2 min: as many of 384 questions as that holds (all could take ")
    assert planned(3 * 12 * 0.01 * 1100).n_sets == 3


def test_multiple_choice_comes_first_and_costs_no_written_answer(planned):
    sets = ItemSet.of_tier("standard", choices=True)
    assert [each.kind for each in sets] == ["choice", "reasoning", "code", "reasoning"]
    choices = planned(math.inf, sets[:1]).sentence
    written = planned(math.inf, sets[1:2]).sentence
    assert choices == "120 of 120 questions, at most 51 s"
    assert written == "120 of 120 questions, at most 21 min"


def slow(answers: list, seconds: float):
    """A model that needs these seconds for each of 20 tokens, and stops when it is told to."""

    def answer(request) -> Completion:
        for n in range(1, 21):
            time.sleep(seconds)
            if time.monotonic() > request.options.until:
                answers.append(n)
                return Completion("Let me", (1,) * n, "time", 3)
        answers.append(20)
        return Completion("12", (1,) * 20, "eos", 3)

    return Answerer(answer, "chat", {}, "m")


def test_a_limited_set_is_scored_as_the_part_that_it_is(tmp_path):
    answers = iter(["eos", "eos", "time"])
    answerer = Answerer(lambda request: Completion("12", (1,), next(answers), 3), "chat", {}, "m")
    run = answerer.score(NANO, tmp_path, Options(progress=False, limit=3))
    assert len(run.answered) == 2 and run.score.value is not None and run.score.n == 2
    assert run.conditions["part"] == "2 of 192 questions"


def test_an_answer_is_cut_at_its_time_and_is_neither_right_nor_wrong(tmp_path):
    answers: list[int] = []
    options = Options(progress=False, until=time.monotonic() + 0.1)
    run = slow(answers, 0.03).score(NANO, tmp_path, options)
    assert len(answers) == 1 and answers[0] < 20, "it stopped after the token at which its time ended"
    assert run.items["grade"].tolist() == ["cut"]
    assert run.items["reason"].tolist() == [f"cut by the budget after {answers[0]} tokens"]
    assert run.score.value is None and (run.score.n, run.score.n_missing) == (192, 192)
    assert "withheld" in run.score.sentence and run.conditions["part"] == "0 of 192 questions"
    kept = json.loads((next(tmp_path.glob("answers-*.jsonl"))).read_text())
    assert kept["finish_reason"] == "time" and kept["completion"] == "Let me"
    results = Results([run])
    assert results.table()["n_missing"].tolist() == [192] and results.families().empty
    assert figures.score_families(results.families()).startswith("No figure")
    assert results.failures(4)["reason"].str.contains("budget").all()


def test_what_was_answered_before_the_time_ended_is_scored_and_the_cut_answer_is_asked_for_again(tmp_path):
    answers: list[int] = []
    run = slow(answers, 0.004).score(NANO, tmp_path, Options(progress=False, until=time.monotonic() + 0.5))
    n = run.score.n
    assert 1 <= n < len(NANO.items) and run.score.value is not None and run.score.n_missing == 0
    assert run.answered["id"].tolist() == [item.id for item in NANO.by_turns()[:n]], (
        "spread over the families"
    )
    assert run.conditions["part"] == f"{n} of 192 questions"
    again = slow(answers, 0).score(NANO, tmp_path, Options(progress=False))
    assert again.n_resumed == n and again.score.n == len(NANO.items) and "part" not in again.conditions


@pytest.mark.skipif(not find_sandbox().safe, reason=find_sandbox().note)
def test_code_that_the_budget_cut_is_not_run(tmp_path):
    codes = ItemSet.load("nano-code")
    run = slow([], 0.03).score(codes, tmp_path, Options(progress=False, until=time.monotonic() + 0.1))
    assert run.items["grade"].tolist() == ["cut"] and run.score.value is None


def test_after_the_end_no_question_is_asked(model, tmp_path):
    """Not even the first of a set: a server's answer would be waited for."""
    over = Options(progress=False, until=time.monotonic())
    run = runs.score_set(model, NANO, tmp_path, over)
    assert run.items.empty and run.score.value is None and run.conditions["part"] == "0 of 192 questions"
    asked: list[str] = []

    def answer(request) -> Completion:
        asked.append(request.text)
        time.sleep(0.5)
        return Completion("12", (1,), "eos", 3)

    answerer = Answerer(answer, "chat", {}, "m")
    for each, options in Options(progress=False).shares([NANO, SETS[0], SETS[2]], 0.4):
        answerer.score(each, tmp_path / "slow", options)
    assert len(asked) == 1, "the answer to the first set took the time of all"


def test_sets_share_the_time_and_what_is_missing_is_said(planned, monkeypatch, tmp_path):
    made, shares = planned(100), []

    def score_set(model, item_set, folder, options, model_id=""):
        shares.append(options.until - time.monotonic())
        rows = pd.DataFrame({"id": ["1", "2"], "grade": ["correct", "cut"]})[: 2 * (options.until > 0)]
        return SimpleNamespace(name=item_set.name, items=rows, answered=rows[:1])

    monkeypatch.setattr(runs, "score_set", score_set)
    for has_template, share in ((True, 50), (False, 100)):
        model, two = (
            SimpleNamespace(has_template=has_template),
            (ItemSet.load(f"{SETS[0].name}-choices"), SETS[0]),
        )
        replace(made, model=model, sets=two, n_sets=2).ask(tmp_path)
        assert shares[0] == pytest.approx(share, abs=1), "a base model's time goes to multiple choice first"
        shares.clear()
    _, missing = replace(made, n_sets=2).ask(tmp_path)
    assert shares[:2] == pytest.approx([50, 100], abs=1), "what the first does not use, the second gets"
    assert missing == [
        (f"the set {SETS[0].name}", "only 1 of 120 questions answered; 1 was cut off", ""),
        (f"the set {SETS[1].name}", "only 1 of 164 questions answered; 1 was cut off", ""),
        (f"the set {SETS[2].name}", "", ""),
    ]


def test_a_smaller_budget_takes_no_earlier_answer_away(model, tmp_path):
    sets, options = [NANO_CHOICES, NANO, ItemSet.load("nano-reasoning-hard")], Options(limit=12)
    whole = plan_questions(model, sets, options, math.inf)
    first, missing = whole.ask(tmp_path)
    assert not missing
    again, missing = replace(whole, n_sets=1, budget_seconds=0.0).ask(tmp_path)
    assert not missing and [run.n_resumed for run in again.runs] == [12, 12, 12]
    assert again.table().equals(first.table())
    nothing, missing = replace(whole, n_sets=1, budget_seconds=0.0).ask(tmp_path / "new")
    assert (
        nothing.items.empty
        and len(nothing.runs) == 1
        and missing[1:] == [(f"the set {each.name}", "", "") for each in sets[1:]]
    )


def test_choices_end_at_their_time_and_are_spread_over_the_families(model, tmp_path, monkeypatch):
    choices, planned = NANO_CHOICES, plan_questions(model, [NANO_CHOICES], Options(progress=False), 20.0)
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=itertools.count(0.0).__next__))
    results, missing = planned.ask(tmp_path)
    n = len(results.items)
    (row,) = missing
    assert 1 <= n < 12 and row.why == f"only {n} of {len(choices.items)} questions answered"
    monkeypatch.undo()
    results, missing = plan_questions(model, [choices], Options(limit=12), math.inf).ask(tmp_path)
    assert len(results.items) == 12 and not missing and results.runs[0].n_resumed == n
    assert results.items["family"].nunique() == min(12, choices.row()["families"])
