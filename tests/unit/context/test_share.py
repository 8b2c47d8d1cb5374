"""Notebook 05 on models too slow for its budget: it ends within its share, and says what is not measured.

The model is the reference model, on a clock that every token and every load moves on.
"""

from __future__ import annotations

import json
import time

import nbformat
import pytest
from test_memory import NANO

from dfqs_nb.context import plan as plans
from dfqs_nb.context.plan import Plan
from dfqs_nb.core.paths import REPOSITORY
from dfqs_nb.core.stage import Stage
from dfqs_nb.llama import model as models
from dfqs_nb.report import metrics

NOTEBOOK = REPOSITORY / "notebooks" / "05_measure_long_context.ipynb"
LOAD_SECONDS = 20.0


class Clock:
    """Seconds since the test began; `time` shows them."""

    def __init__(self, monkeypatch, seconds_per_token: float) -> None:
        self.now, self.per_token = 0.0, seconds_per_token
        batches, build = models.Model._batches, models.build_llama

        def slow_batches(model, tokens, **options):
            for n in batches(model, tokens, **options):
                self.now += self.per_token * n
                yield n

        def slow_build(*given):
            self.now += LOAD_SECONDS
            return build(*given)

        monkeypatch.setattr(plans, "usable_cores", lambda: 1)
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: self.now)
        monkeypatch.setattr(models.Model, "_batches", slow_batches)
        monkeypatch.setattr(models, "build_llama", slow_build)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The outputs of notebooks 01 and 03."""
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    merged = Stage("slow", "merge")
    merged.finish(conditions={}, summary=[], model={"path": str(NANO), "sha256": "a", "name": "nano"})
    return merged.folder


def run_notebook(folder, clock, minutes: float, **parameters) -> dict:
    """Execute the code cells of the notebook; what it hands on. ``clock.now`` is then the time it took."""
    speed = [{"phase": "prefill", "median": 1 / clock.per_token}]
    Stage("slow", "generate").finish(conditions={}, summary=[], speed=speed)
    clock.now, names = 0.0, {"display": lambda shown: None}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and "setup" not in tags:
            exec(compile(cell.source, "cell", "exec"), names)
        if "parameters" in tags:
            names |= {
                "run_name": "slow",
                "budget_minutes": minutes,
                "n_threads": 1,
                "longest": 0,
                **parameters,
            }
    return json.loads((folder / "long_context.json").read_text())


@pytest.mark.parametrize("minutes, per_token", [(11, 5.0), pytest.param(0.75, 0.74, marks=pytest.mark.slow)])
def test_what_no_budget_holds_is_not_measured_and_the_share_is_kept(folder, monkeypatch, minutes, per_token):
    clock = Clock(monkeypatch, per_token)
    made = run_notebook(folder, clock, minutes)
    assert clock.now <= 1.2 * 60 * minutes
    assert made["boundary"] is None and made["curve"] == made["context_stability_curve"] == []
    assert all("not measured" in row["what"] for row in made["left_out"])
    assert "`dfqs-nb run 05 07 --run slow -p budget_minutes=" in made["not_measured"]
    detail = metrics.METRICS["failure_boundary_tokens"][3](made, "failure_boundary_tokens")
    assert detail["withheld"] == made["not_measured"]


def test_the_least_plan_takes_the_time_of_the_other_parts(folder, monkeypatch):
    clock = Clock(monkeypatch, 0.74)
    made = run_notebook(folder, clock, 11)
    assert 0.5 * 60 * 11 < clock.now <= 1.2 * 60 * 11
    assert [row["length"] for row in made["curve"]] == [256] and made["boundary"]["provisional"]
    assert "the table of tasks: not measured" in [row["what"] for row in made["left_out"]]


def test_a_smaller_budget_keeps_the_curve_that_a_larger_one_measured(folder, monkeypatch):
    clock = Clock(monkeypatch, 0.3)
    first = run_notebook(folder, clock, 11)
    again = run_notebook(folder, clock, 4)
    assert clock.now <= 1.2 * 60 * 4
    for name in ("curve", "refined", "boundary", "conditions"):
        assert again[name] == first[name], name
    assert first["curve"] and first["boundary"]["n_items"] > 0


@pytest.mark.slow
def test_with_more_time_every_part_has_its_share(folder, monkeypatch):
    clock = Clock(monkeypatch, 0.1)
    made = run_notebook(folder, clock, 11)
    assert clock.now <= 1.2 * 60 * 11
    assert len(made["curve"]) >= 2
    assert "not measured" not in " ".join(row["what"] for row in made["left_out"])


@pytest.mark.slow
def test_a_model_that_slows_down_after_the_probe_keeps_to_the_share(folder, monkeypatch):
    clock = Clock(monkeypatch, 0.5)
    kept = Plan.kept

    def slowed(*given, **options):
        clock.per_token *= 2
        return kept(*given, **options)

    monkeypatch.setattr(Plan, "kept", slowed)
    run_notebook(folder, clock, 11)
    assert clock.now <= 1.2 * 60 * 11
