"""Stages: what a seal covers, also when the kernel restarts half-way; and what the next notebook reads."""

from __future__ import annotations

import json
import math
import os

import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter

from dfqs_nb.core.errors import OutputError, StageError
from dfqs_nb.core.figures import new_axes, set_title
from dfqs_nb.core.files import canonical_sha256, sha256_of_file, write_json
from dfqs_nb.core.journal import Journal, differing_fields
from dfqs_nb.core.paths import run_dir
from dfqs_nb.core.stage import Stage, read_stage

TABLE = pd.DataFrame({"length": [256, 512], "accuracy": [1.0, 0.5]})


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    return tmp_path


def finished(stage: Stage, **facts) -> dict:
    return json.loads(stage.finish(conditions={"n_ctx": 512}, summary=["a line"], **facts).read_text())


def test_the_seal_covers_what_was_written_through_the_stage(outputs):
    stage = Stage("nano", "long_context")
    stage.table("curve", TABLE)
    write_json(stage.path("facts.json"), {"a": 1})
    Journal(stage.path("answers.jsonl"), {"n_ctx": 512}).add("first", right=True)
    (outputs / "nano" / "not_ours.csv").write_text("1")
    content = finished(stage, boundary=627)
    assert set(content["files"]) == {"curve.csv", "facts.json", "answers.jsonl"}
    assert all(sha256_of_file(outputs / "nano" / name) == sha for name, sha in content["files"].items())
    assert content.pop("seal") == canonical_sha256(content)
    assert content["stage"] == "long_context" and content["boundary"] == 627


def test_a_figure_is_read_aloud_by_its_title(outputs):
    ax = new_axes()
    set_title(ax, "All is well")
    _, metadata = DisplayFormatter().format(Stage("nano", "header").figure("sizes", ax))
    assert metadata["image/png"]["alt"] == "All is well"


def test_a_text_in_the_place_of_a_figure_writes_no_file_and_is_shown_literally(outputs):
    stage = Stage("nano", "long_context")
    shown = stage.figure("curve", "No figure of <b>: 1 length.")
    assert shown.data == "No figure of &lt;b>: 1 length." and not finished(stage)["files"]


def test_models_and_files_that_were_not_written_have_no_place_in_the_seal(outputs):
    stage = Stage("nano", "merge")
    stage.path("model.gguf").write_bytes(b"GGUF")
    stage.path("announced.csv")
    assert finished(stage)["files"] == {}


def test_a_kernel_that_restarts_half_way_does_not_shrink_the_seal(outputs):
    Stage("nano", "scores").table("before", TABLE)
    again = Stage("nano", "scores")
    again.table("after", TABLE)
    assert set(finished(again)["files"]) == {"before.csv", "after.csv"}
    assert finished(Stage("nano", "scores"))["files"] == {}, "a finished stage begins anew"


def test_a_last_cell_that_runs_again_seals_the_same_files(outputs):
    stage = Stage("nano", "scores")
    stage.table("answers", TABLE)
    first = finished(stage)
    assert finished(stage) == first and set(first["files"]) == {"answers.csv"}


def test_two_stages_at_work_in_one_process_keep_their_files_apart(outputs):
    first, second = Stage("nano", "routing"), Stage("nano", "scores")
    second.table("scores", TABLE)
    first.table("routing", TABLE)
    assert set(finished(first)["files"]) == {"routing.csv"}
    assert set(finished(second)["files"]) == {"scores.csv"}


def test_what_is_no_json_number_becomes_null(outputs):
    content = finished(Stage("nano", "generate"), speed=math.nan, nested=[{"limit": math.inf}])
    assert content["speed"] is None and content["nested"] == [{"limit": None}]


def test_the_model_is_what_notebook_01_handed_on(outputs):
    finished(Stage("nano", "merge"), model={"name": "m", "path": "/m.gguf"})
    assert Stage("nano", "header").model["name"] == "m"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"stage": "other"}', "[" * 5000, '{"stage": "merge", "x": NaN}']
)
def test_a_stage_that_cannot_be_read_names_the_notebook_to_run(outputs, text):
    (outputs / "merge.json").write_text(text)
    with pytest.raises(StageError, match="run 01_merge_shards.ipynb again"):
        read_stage(outputs, "merge")


def test_a_missing_stage_names_the_notebook_to_run(outputs):
    with pytest.raises(StageError, match="missing; run 01_merge_shards.ipynb first"):
        assert not Stage("nano", "header").model


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden"])
def test_a_run_name_is_one_plain_folder_name(outputs, name):
    with pytest.raises(OutputError, match="is not a run name"):
        Stage(name, "merge")


ODD = ["[" * 4_000, '{"id": 3}', '{"id": "b", "conditions": []}', "NaN", "9" * 5_000, '"\\ud83d"', "\\xff"]


def test_a_row_of_a_journal_that_is_not_as_it_was_written_is_passed_over(tmp_path):
    path, fields = tmp_path / "j.jsonl", {"tokens": int}
    journal = Journal(path, {"n": 1})
    journal.add("a", tokens=3)
    journal.add("b", tokens="3")
    journal.add("c")
    with path.open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in ODD)
    again = Journal(path, {"n": 1}, fields=fields)
    assert again.rows() == [{"id": "a", "tokens": 3}]
    again.add("b", tokens=4)
    assert Journal(path, {"n": 1}, fields=fields).rows()[1:] == [{"id": "b", "tokens": 4}]
    raw = path.read_bytes()
    for old, new in (
        (b'"tokens": 4', b'"tokens": 5'),
        (b'"id": "b", "tokens": 4', b'"id": "c", "tokens": 4'),
    ):
        path.write_bytes(raw.replace(old, new))
        assert Journal(path, {"n": 1}, fields=fields).rows() == [{"id": "a", "tokens": 3}]


def test_a_parameter_below_one_is_refused_by_its_name(tmp_path):
    stage = Stage(tmp_path, "generate")
    stage.positive(depth=1, n_texts=6)
    with pytest.raises(StageError, match="the parameter depth is 0; give depth=1 or more"):
        stage.positive(max_tokens=1, depth=0)


def test_free_memory_costs_no_finished_work(tmp_path):
    made = {"n_ctx": 512, "paging": "off"}
    Journal(tmp_path / "j.jsonl", made).add("a", answer=1)
    assert "a" in Journal(tmp_path / "j.jsonl", {**made, "paging": "on"})
    assert "a" not in Journal(tmp_path / "j.jsonl", {**made, "n_ctx": 256})
    assert differing_fields(made, {"n_ctx": 256, "paging": "on"}) == {"n_ctx": (512, 256)}


@pytest.mark.parametrize("is_there", [True, False])
def test_a_runs_folder_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path, monkeypatch, is_there
):
    outputs = tmp_path / "outputs"
    (outputs / "mine").mkdir(parents=True) if is_there else outputs.write_text("a file")
    monkeypatch.setenv("DFQS_OUTPUTS", str(outputs))
    monkeypatch.setattr(os, "access", lambda folder, mode: False)  # root may write everywhere
    with pytest.raises(OutputError, match="cannot write into this folder .*; set DFQS_OUTPUTS to a folder"):
        run_dir("mine")
