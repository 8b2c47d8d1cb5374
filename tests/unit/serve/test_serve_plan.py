"""The cost of checking servers, and what a budget takes away first."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.llama.timing import Pace
from dfqs_nb.scores import ItemSet
from dfqs_nb.serve import checks


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(checks, "probe", lambda model: Pace(0.001, 0.01))
    monkeypatch.setattr(checks, "open_model", lambda *_: nullcontext(SimpleNamespace(load_seconds=1.0)))
    sets = ItemSet.of_tier("nano")
    return lambda seconds: checks.plan_checks(
        "m.gguf", OpenSettings(), sets, items=24, clients=[1, 2, 4], tokens=32, seconds=seconds
    )


def test_without_a_limit_nothing_is_cut(planned):
    made = planned(math.inf)
    assert [made.values[name] for name in ("items", "clients", "sets")] == [24, 3, 2]
    assert made.left_out == () and "Cut" not in checks.plan_sentence(made)


def test_questions_go_first(planned):
    assert planned(planned(math.inf).seconds * 0.9).left_out == (
        "4 questions of a set asked both ways, not 24",
    )
    least = planned(0)
    assert [least.values[name] for name in ("items", "clients", "sets")] == [1, 1, 1]
    assert "1 question set, not 2" in checks.plan_sentence(least)
    (asked,) = checks.planned_sets(ItemSet.of_tier("nano"), least)
    assert asked.max_tokens == 16
