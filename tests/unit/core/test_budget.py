"""Plans that keep to a time."""

from __future__ import annotations

import math

import pytest

from dfqs_nb.core.display import duration
from dfqs_nb.core.stage import LeftOut, Stage, fit, read_stage

CUTS = ({"repetitions": 3}, {"tokens": 32}, {"repetitions": 1})


def cost(plan):
    return float(plan["repetitions"] * plan["tokens"])


@pytest.mark.parametrize(
    "seconds, values, left_out",
    [
        (math.inf, {"repetitions": 5, "tokens": 128}, ()),
        (400, {"repetitions": 3, "tokens": 128}, ("3 repetitions in place of 5",)),
        (100, {"repetitions": 3, "tokens": 32}, ("3 repetitions in place of 5", "32 tokens in place of 128")),
        (1, {"repetitions": 1, "tokens": 32}, ("1 repetition in place of 5", "32 tokens in place of 128")),
    ],
)
def test_cuts_are_made_in_their_order_and_said(seconds, values, left_out):
    fitted = fit({"repetitions": 5, "tokens": 128}, CUTS, cost, seconds)
    assert (fitted.values, fitted.left_out) == (values, left_out)
    assert fitted.seconds == cost(values) and fitted.full_seconds == 640


def test_durations_are_rounded_for_people():
    assert [duration(s) for s in (0.4, 89, 91, 7200, math.inf)] == ["0 s", "89 s", "2 min", "2 h", "no limit"]


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    return tmp_path / "mine"


def test_what_a_budget_left_out_stands_in_the_stage_and_in_its_summary(outputs):
    stage = Stage("mine", "scores", budget_minutes=2)
    assert 0 < stage.seconds_left <= 120
    stage.leave_out(["4 questions in place of 8", "4 questions in place of 8"])
    stage.leave_out([LeftOut("the set a", needs="n_ctx=512"), LeftOut("the set b", "1 of 2 answered")])
    stage.finish(conditions={}, summary=["a"])
    content = read_stage(outputs, "scores", sealed=True)
    sets = "the set a: it needs n_ctx=512; the set b: 1 of 2 answered"
    assert content["summary"] == ["a", f"not measured in full: 4 questions in place of 8; {sets}"]
    rows = [("4 questions in place of 8", "", ""), ("the set a", "", "n_ctx=512")]
    rows += [("the set b", "1 of 2 answered", "")]
    assert content["left_out"] == [dict(zip(("what", "why", "needs"), row, strict=True)) for row in rows]
    assert content["budget"]["seconds"] == 120


def test_a_plan_is_kept_until_its_conditions_change_or_the_budget_doubles(outputs):
    made = []

    def plan(minutes, condition="a"):
        return Stage("mine", "scores", minutes).plan(
            {"c": condition}, lambda: made.append(minutes) or {"n": 1}
        )

    assert plan(10) == plan(19) == plan(5) == {"n": 1} and made == [10]
    plan(21)
    plan(21, "b")
    assert made == [10, 21, 21]
