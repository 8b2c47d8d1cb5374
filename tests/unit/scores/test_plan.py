"""A budget takes questions from every family evenly, then whole sets; and says so."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest

from dfqs_nb.llama.timing import Pace
from dfqs_nb.scores import ItemSet, Options, figures, likelihood, plan

SETS = ItemSet.of_tier("standard")
PACE = Pace(prefill=0.001, decode=0.01)


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(plan, "probe", lambda model: PACE)
    return lambda seconds: plan.plan_questions(SimpleNamespace(), SETS, Options(), seconds)


def test_a_part_asks_as_much_of_every_family_and_larger_parts_hold_it():
    whole, before = SETS[0], set()
    for n in (1, 3, 10, 25, 120, 500):
        part = whole.part(n)
        assert len(part.items) == min(n, len(whole.items)) and part.name == whole.name
        sizes = Counter(item.family for item in part.items)
        assert max(sizes.values()) - min(sizes.values()) <= 1 and len(sizes) == min(n, len(whole.families()))
        assert ("part" in part.identity()) == (len(part.items) < len(whole.items))
        assert before <= {item.id for item in part.items}
        before = {item.id for item in part.items}
    assert part == whole


def test_parts_shrink_to_a_single_question_and_a_small_set_stays_whole():
    sizes = [sum(len(part.items) for part in parts) for parts in plan._candidates(tuple(SETS))]
    assert sizes == sorted(sizes, reverse=True) and sizes[-6:] == [36, 24, 12, 6, 3, 1]
    own = replace(SETS[0].part(4), set="own")
    for parts in plan._candidates((SETS[0], own)):
        assert own in parts or len(parts) == 1


def test_without_a_limit_all_is_asked(planned):
    made = planned(math.inf)
    assert made.parts == tuple(SETS) and plan.left_out(SETS, made.parts) == []


def test_a_budget_is_kept_and_the_last_sets_go_last(planned):
    full, n_sets = planned(math.inf).full_seconds, []
    for share in (0.5, 0.2, 0.08, 0.04):
        made = planned(full * share)
        n_sets.append(len(made.parts))
        assert made.seconds <= full * share and "more, if answers turn out shorter" in made.sentence
        assert min(len(part.items) for part in made.parts) >= plan.SIZES[-1]
    assert n_sets == [3, 3, 2, 1], "a dozen answers of a set, or none"
    least = planned(0)
    assert [one.name for one in least.parts] == [SETS[0].name]
    assert f"the set {SETS[-1].name}" in plan.left_out(SETS, least.parts)


def test_the_depth_of_the_metric_is_the_last_to_go():
    depths, fitted = plan.plan_speeds([128, 512, 896], PACE, math.inf)
    assert depths == [128, 512, 896] and fitted.left_out == ()
    depths, fitted = plan.plan_speeds([128, 512, 896], PACE, 0)
    assert depths == [512] and fitted.values["repetitions"] == 1
    assert "1 timed repetition, not 5" in fitted.left_out


@pytest.mark.parametrize("seconds_of_an_answer, all_of_them", [(0.001, True), (5.0, False)])
def test_parts_grow_from_the_least_as_long_as_the_budget_holds_the_next(
    planned, monkeypatch, tmp_path, seconds_of_an_answer, all_of_them
):
    made, asked = planned(planned(math.inf).full_seconds / 2), []

    def score_set(model, one, folder, options, model_id=""):
        asked.append(len(one.items))
        rows = pd.DataFrame({"seconds": [seconds_of_an_answer * one.max_tokens / 100] * len(one.items)})
        return SimpleNamespace(items=rows, score=SimpleNamespace(n_missing=0))

    def results(runs):
        return SimpleNamespace(items=pd.concat(run.items for run in runs), runs=runs)

    monkeypatch.setattr(plan, "score_set", score_set)
    monkeypatch.setattr(plan, "Results", results)
    _, missing = made.ask(tmp_path)
    assert asked[0] < len(SETS[0].items), "the least part comes first"
    assert (missing == []) == all_of_them


def test_choices_are_an_even_part_that_the_time_holds(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(
        likelihood, "answer", lambda _, part, *__, **___: likelihood.Answers(part, "", {}, pd.DataFrame())
    )
    made = planned(math.inf)
    whole = likelihood.choices_of(SETS[0])
    asked = [made.choose(tmp_path, seconds) for seconds in (math.inf, 0)]
    many, few = (answers.questions for answers in asked)
    assert not asked[0].left_out, "a cap is no cut"
    assert asked[1].left_out == (f"only 1 of {len(many.items)} questions of {many.name} asked",)
    assert set(many.items) <= set(whole.items) and 48 <= len(many.items) <= 96
    assert {item.family for item in many.items} == {item.family for item in whole.items}
    assert few.items == whole.items[:1]
    assert 1 < len(made.choose(tmp_path, 1).questions.items) < len(many.items)
    limited = replace(made, options=Options(limit=3)).choose(tmp_path, math.inf)
    assert len(limited.questions.items) == 3 and not limited.left_out


def test_a_figure_of_margins_says_in_how_many_families_the_right_choice_is_likeliest():
    table = pd.DataFrame({"family": ["a", "b"], "n": 8, "margin": [2.0, 0.5]})
    table = table.assign(margin_low=[1.0, -0.5], margin_high=[3.0, 1.5])
    assert "in 1 of 2 families" in figures.choice_margins(table).get_title(loc="left")
    title = figures.choice_margins(table.assign(margin_low=math.nan)).get_title(loc="left")
    assert "without intervals, in 2 of 2 families" in title
