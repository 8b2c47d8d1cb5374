"""The cost of checking servers, and what a budget takes away first."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.llama.timing import Pace
from dfqs_nb.scores import ItemSet
from dfqs_nb.serve import checks


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(checks, "probe", lambda model: Pace(0.001, 0.01))
    model = SimpleNamespace(load_seconds=1.0, settings=OpenSettings())
    sets = ItemSet.of_tier("nano")
    return lambda seconds: checks.plan_checks(
        model, sets, items=24, clients=[1, 2, 4], tokens=32, seconds=seconds
    )


def test_without_a_limit_nothing_is_cut(planned):
    _, made = planned(math.inf)
    assert [made.values[name] for name in ("items", "clients", "sets")] == [24, 3, 2]
    assert made.left_out == ()


def test_questions_go_first(planned):
    _, whole = planned(math.inf)
    _, made = planned(whole.seconds * 0.9)
    assert made.left_out == ("4 questions of a set asked both ways in place of 24",)
    (asked,), least = planned(0)
    assert [least.values[name] for name in ("items", "clients", "sets")] == [1, 1, 1]
    assert "1 question set in place of 2" in least.left_out and asked.max_tokens == 8
