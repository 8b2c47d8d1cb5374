"""The commands that measure a model beyond the notebooks, each on the reference model, as a user types them."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pandas as pd
import pytest

from dfqs_nb.core.paths import data_dir
from dfqs_nb.merge import merge_model
from dfqs_nb.workbook.cli import main
from dfqs_nb.workbook.model_commands import identity

MODEL = str(data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf")
ORIGINAL = str(data_dir() / "reference" / "DFQS-Nano-F16.gguf")


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))


def test_a_record_of_the_original_judges_a_quantization(tmp_path, capsys):
    record, table = tmp_path / "a record.jsonl", tmp_path / "tokens.csv"
    asked = ["--prompts", "nano-reasoning", "--limit", "3", "--tokens", "4", "--n-ctx", "256"]
    assert main(["record", ORIGINAL, "-o", str(record), *asked]) == 0
    assert f"dfqs-nb fidelity MODEL '{record}'" in capsys.readouterr().out
    assert main(["fidelity", MODEL, str(record), "-o", str(table), "--n-ctx", "256"]) == 0
    assert "same likeliest token" in capsys.readouterr().out
    assert {"kl_low", "kl_high"} <= set(pd.read_csv(table))


def test_a_file_made_here_is_not_hashed_again_until_it_changes(tmp_path):
    merged = merge_model(MODEL, tmp_path / "m.gguf")
    model = SimpleNamespace(path=merged.path, sha256=lambda: "read anew")
    assert identity(model) == merged.sha256
    os.utime(merged.path, (1, 1))
    assert identity(model) == "read anew"


def test_choices_are_written_as_lm_eval_writes_them(tmp_path, capsys):
    assert main(["choices", MODEL, "--set", "nano-reasoning", "--limit", "3", "--run", "x"]) == 0
    assert "guess rate 0.250" in capsys.readouterr().out
    result = json.loads((tmp_path / "x" / "scores" / "nano-reasoning-choices.lm_eval.json").read_text())
    assert len(result["samples"]["nano-reasoning-choices"]) == 3


def test_a_model_that_is_not_there_leaves_no_folder(tmp_path, capsys):
    assert main(["choices", "nosuch.gguf", "--set", "nano-reasoning"]) == 1
    assert "nosuch.gguf" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_tasks_name_what_the_budget_left_out(tmp_path, capsys):
    asked = ["tasks", MODEL, "--task", "single needle", "--lengths", "256,512", "--texts", "1", "--run", "x"]
    assert main(asked) == 0
    assert len(pd.read_csv(tmp_path / "x" / "long_context" / "tasks.csv")) == 2
    assert main([*asked, "--budget-minutes", "0", "--fresh"]) == 1
    assert (
        "nothing was asked: the table of tasks: not measured; raise --budget-minutes"
        in capsys.readouterr().err
    )


def test_loops_are_counted_by_temperature_and_cache_type(tmp_path, capsys):
    asked = [
        "loops",
        MODEL,
        "--answers",
        "1",
        "--tokens",
        "64",
        "--temperature",
        "0,0.5",
        "--cache-type",
        "f16",
    ]
    assert main([*asked, "--run", "x"]) == 0
    assert "looped" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "x" / "long_context" / "loops.csv")) == 2
    assert main([*asked, "--temperature", "warm"]) == 2
    assert "'--temperature': 'warm' is no list of numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fidelity", MODEL, MODEL], "line 1"),
        (["fidelity", MODEL, "missing.jsonl"], "dfqs-nb record MODEL -o record.jsonl"),
        (["choices", MODEL, "--set", "nano-code"], "has no 4 answers"),
        (["tasks", MODEL, "--task", "x", "--lengths", "256"], "there is no task 'x'"),
        (["record", MODEL, "-o", "r.jsonl", "--prompts", "missing.jsonl"], "cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_one_line(capsys, arguments, message):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0
