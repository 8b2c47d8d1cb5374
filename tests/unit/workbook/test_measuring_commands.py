"""The commands that measure a model beyond the notebooks, each on the reference model, as a user types them."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pandas as pd
import pytest

from dfqs_nb import llama, scores
from dfqs_nb.core.paths import data_dir
from dfqs_nb.merge import merge_model
from dfqs_nb.workbook import cli
from dfqs_nb.workbook.cli import identity, main

MODEL = str(data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf")
ORIGINAL = str(data_dir() / "reference" / "DFQS-Nano-F16.gguf")


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))


def test_a_record_of_the_original_judges_a_quantization(tmp_path, capsys):
    record, table = tmp_path / "a record.jsonl", tmp_path / "new" / "tokens.csv"
    asked = ["--prompts", "nano-reasoning", "--limit", "3", "--tokens", "4", "--n-ctx", "256"]
    assert main(["record", ORIGINAL, "-o", str(record), *asked]) == 0
    assert f"dfqs-nb fidelity MODEL '{record}'" in capsys.readouterr().out
    assert main(["record", ORIGINAL, "-o", str(record), *asked]) == 1
    assert "exists already; choose another name, or pass --overwrite" in capsys.readouterr().err
    assert main(["fidelity", "dfqs-nano-iq1_s-xl", str(record), "-o", str(table), "--n-ctx", "256"]) == 0
    assert "same likeliest token" in capsys.readouterr().out
    assert {"kl_low", "kl_high"} <= set(pd.read_csv(table))
    whole = record.read_bytes()
    assert main(["fidelity", "dfqs-nano-iq1_s-xl", str(record), "-o", str(record), "--n-ctx", "256"]) == 1
    assert "is one of the files that it would be made" in capsys.readouterr().err
    assert main(["fidelity", "dfqs-nano-iq1_s-xl", str(record), "-o", str(table), "--n-ctx", "256"]) == 1
    assert "exists already" in capsys.readouterr().err and record.read_bytes() == whole


def test_a_file_made_here_is_not_hashed_again_until_it_changes(tmp_path):
    merged = merge_model(MODEL, tmp_path / "m.gguf")
    model = SimpleNamespace(path=merged.path, shards=SimpleNamespace(sha256="read anew"))
    assert identity(model) == merged.sha256
    os.utime(merged.path, (1, 1))
    assert identity(model) == "read anew"


def test_a_notebook_takes_over_what_the_command_asked(tmp_path, capsys):
    """Both ask the same questions under the same conditions, multiple choice included."""
    asked = ["score", MODEL, "--tier", "nano", "--n-ctx", "1024", "--limit", "3", "--run", "x"]
    assert main([*asked, "--allow-unsandboxed"]) == 0
    assert "choice_score " in capsys.readouterr().out
    results = json.loads((tmp_path / "x" / "scores" / "results.json").read_text())
    sets = scores.ItemSet.of_tier("nano", choices=True)
    assert [result["set"] for result in results] == [each.name for each in sets]
    settings = llama.OpenSettings.of(MODEL, n_ctx=1024, seed=42)
    with llama.open_model(MODEL, settings) as model:
        options = scores.Options(limit=3, allow_unsandboxed=True)
        plan = scores.plan_questions(model, sets, options, 60.0)
        runs = plan.ask(tmp_path / "x" / "scores", model_id=identity(model))[0].runs
    assert [run.n_resumed for run in runs] == [3, 3, 3]
    assert [run.score.value for run in runs] == [result["value"] for result in results]


def test_the_command_shows_an_answer_that_is_not_right(tmp_path, capsys):
    """A chat model answers in a sentence, so a set without an instruction scores 0, and a reader wonders why."""
    rows = [{"set": "mine", "kind": "reasoning"}]
    rows += [{"id": "a", "prompt": "What is the capital of France?", "answer": "Paris"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert main(["score", MODEL, "--set", str(tmp_path / "mine.jsonl"), "--n-ctx", "512", "--run", "x"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not right, for example a: answered 'The capital of France is Paris.'; expected 'Paris'" in said


def test_a_budget_ends_the_asking_and_each_set_has_its_share(tmp_path, capsys):
    asked = ["score", MODEL, "--tier", "nano", "--n-ctx", "1024", "--run", "x", "--allow-unsandboxed"]
    assert main([*asked, "--budget-minutes", "0.05"]) == 0
    results = json.loads((tmp_path / "x" / "scores" / "results.json").read_text())
    parts = [int(it["conditions"]["part"].split()[0]) for it in results if "part" in it["conditions"]]
    assert len(results) == 3 and parts and sum(parts) < 480


def test_a_model_that_is_not_there_leaves_no_folder(tmp_path, capsys):
    assert main(["score", "nosuch.gguf", "--set", "nano-reasoning"]) == 1
    assert "nosuch.gguf" in capsys.readouterr().err and not any(tmp_path.iterdir())
    out = str(tmp_path / "new" / "record.jsonl")
    assert main(["record", "nosuch.gguf", "-o", out, "--prompts", "nano-reasoning"]) == 1
    assert not any(tmp_path.iterdir())


def test_a_score_that_is_refused_leaves_no_folder(tmp_path, capsys):
    """Asked before any question: the context is too short for the set."""
    asked = ["score", MODEL, "--set", "nano-reasoning", "--n-ctx", "16", "--run", "refused"]
    assert main(asked) == 1
    assert "tokens of context" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_a_table_that_cannot_be_written_is_refused_before_the_model_is_opened(tmp_path, monkeypatch, capsys):
    record = tmp_path / "record.jsonl"
    asked = ["--prompts", "nano-reasoning", "--limit", "1", "--tokens", "1", "--n-ctx", "256"]
    assert main(["record", MODEL, "-o", str(record), *asked]) == 0
    monkeypatch.setattr(cli.os, "access", lambda _, mode: mode != os.W_OK)  # root may write everywhere
    monkeypatch.setattr(cli, "open_model", lambda *_: pytest.fail("the model was opened"))
    assert main(["fidelity", MODEL, str(record), "-o", str(tmp_path / "read-only" / "table.csv")]) == 1
    assert "table.csv: cannot be written; take a folder that you may write" in capsys.readouterr().err
    assert not (tmp_path / "read-only").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fidelity", MODEL, MODEL], "line 1"),
        (["fidelity", MODEL, "missing.jsonl"], "dfqs-nb record MODEL -o record.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_one_line(capsys, arguments, message):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0
