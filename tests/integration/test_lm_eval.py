"""Log-likelihoods of SmolLM2, against lm-evaluation-harness itself on the same F32 weights.

Slow, and only where ``$DFQS_LM_EVAL_PYTHON`` names an interpreter that has lm-eval; it does not belong in the
project's own environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf_fixtures import Spec
from models_apart import Apart
from other_models import smollm2

from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.scores import ItemSet, Options, score_set

INSTALL = (
    "python3 -m venv /tmp/lm-eval && /tmp/lm-eval/bin/pip install 'lm-eval[hf]==0.4.13' gguf==0.19.0 && "
    "export DFQS_LM_EVAL_PYTHON=/tmp/lm-eval/bin/python"
)
TOLERANCE = 1e-3  # nats, of a choice's log-likelihood
N_QUESTIONS = 12  # the first two are the solved examples
TASK = """
task: {set}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: gold
target_delimiter: "{delimiter}"
num_fewshot: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def f32(tmp_path_factory):
    """SmolLM2's weights, dequantized: both programs read this file, so neither quantizes activations."""
    path = tmp_path_factory.mktemp("f32") / "smollm2.gguf"
    model = Apart.of(smollm2())
    specs = []
    for spec in model.specs:
        rows = np.frombuffer(spec.bytes(), np.uint8).reshape(prod(spec.shape[1:]), -1)
        values = dequantize(rows, GGMLQuantizationType(spec.code)).astype("<f4")
        specs.append(Spec(spec.name, "F32", spec.shape, data=values.tobytes()))
    path.write_bytes(replace(model, specs=tuple(specs)).with_field("general.file_type", "UINT32", 0).bytes())
    yield path
    path.unlink()  # half a gigabyte


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Questions of a shipped set as plain text, two solved in front of each: for acc, and for acc_norm."""
    folder = tmp_path_factory.mktemp("questions")
    made = ItemSet.load("standard-reasoning-choices")
    rows = [asdict(item) | {"prompt": f"{item.prompt}\nAnswer:"} for item in made.items]
    rows = sorted(rows, key=lambda row: len(row["prompt"]))[
        :N_QUESTIONS
    ]  # lm-eval evaluates each choice anew
    path, shots, sets = folder / "agreement.jsonl", "", []
    for shot in rows[:2]:
        shots += f"{shot['prompt']} {shot['choices'][shot['gold']]}\n\n"
    asked = [row | {"prompt": shots + row["prompt"]} for row in rows[2:]]
    for per_character in (False, True):
        head = {"set": "agreement", "kind": "choice", "per_character": per_character}
        path.write_text("\n".join(map(json.dumps, [head, *asked])), encoding="utf-8")
        sets.append(ItemSet.load(path))
    return sets


def by_lm_eval(python: str, model: Path, questions: ItemSet, folder: Path) -> list[dict]:
    """lm-eval's own samples, in the order of the questions."""
    rows = [asdict(item) for item in questions.items]
    items = folder / "items.jsonl"
    items.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = TASK.format(set=questions.name, items=items, delimiter=questions.delimiter)
    (folder / "agreement.yaml").write_text(task, encoding="utf-8")
    arguments = f"pretrained={model.parent},gguf_file={model.name},dtype=float32"
    command = [python, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    command += ["--tasks", questions.name, "--include_path", str(folder), "--batch_size", "1"]
    command += ["--log_samples", "--output_path", str(folder / "out")]
    offline = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
    }
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = next((folder / "out").rglob("samples_*.jsonl")).read_text(encoding="utf-8").splitlines()
    return sorted(map(json.loads, lines), key=lambda row: row["doc_id"])


@pytest.mark.slow
def test_log_likelihoods_equal_those_of_lm_eval(f32, questions, tmp_path):
    python = os.environ.get("DFQS_LM_EVAL_PYTHON")
    if not python:
        pytest.skip(f"needs lm-eval: {INSTALL}")
    theirs = by_lm_eval(python, f32, questions[0], tmp_path)
    settings = OpenSettings(n_ctx=2048, n_threads=1, type_k="f32", type_v="f32", flash_attn=False)
    with open_model(f32, settings) as model:
        acc, acc_norm = (
            score_set(model, each, tmp_path, Options(progress=False)).items.set_index("id")["correct"]
            for each in questions
        )
    path = next(tmp_path.glob(f"answers-*{questions[0].sha256[:8]}.jsonl"))
    ours = {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    assert len(ours) == len(theirs) == N_QUESTIONS - 2
    largest = 0.0
    for item, other in zip(questions[0].items, theirs, strict=True):
        mine = ours[item.id]
        assert item.gold == int(other["target"])
        values = [[float(value), str(greedy) == "True"] for [[value, greedy]] in other["resps"]]
        differences = [abs(a - b) for a, (b, _) in zip(mine["log_likelihoods"], values, strict=True)]
        largest = max(largest, *differences)
        assert mine["greedy"] == [greedy for _, greedy in values]
        assert (acc[item.id], acc_norm[item.id]) == (other["acc"], other["acc_norm"])
    print(f"largest difference {largest:.2e} nats over {len(ours)} questions")
    assert largest < TOLERANCE
