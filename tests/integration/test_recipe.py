"""The reference model's recipe: what training may not ask, and a few steps of it carried through to llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from itertools import islice

import pytest

from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.gguf import memory
from dfqs_nb.gguf.header import read_header
from dfqs_nb.llama import check

RECIPE = data_dir() / "reference" / "recipe"


@pytest.fixture(scope="module")
def families():
    spec = importlib.util.spec_from_file_location("families", RECIPE / "families.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["families"]


def items(name: str) -> list[dict]:
    return [
        json.loads(line) for line in (data_dir() / "prompts" / f"{name}.jsonl").read_text().splitlines()[1:]
    ]


@pytest.mark.parametrize("name", ["nano_reasoning", "nano_reasoning_hard", "nano_code"])
def test_every_scored_item_is_held_out_of_training(families, name):
    """But for capitals asked plainly, which are facts to be learnt by heart."""
    for item in items(name):
        combination = families.combination_of(item["family"], item["prompt"], item.get("answer", ""))
        assert families.is_held_out(combination) or not combination, item["id"]


def test_the_later_set_was_held_out_before_it_was_frozen(families, monkeypatch):
    """The shipped model was trained before it was written: the rule by hash kept its questions from training."""
    monkeypatch.setattr(families, "frozen_combinations", frozenset)
    asked = items("nano_reasoning_hard")
    assert len(asked) == 192
    for item in asked:
        combination = families.combination_of(item["family"], item["prompt"], item["answer"])
        assert combination and families.is_held_out(combination), item["id"]


def test_training_never_asks_what_is_held_out(families):
    scored = families.frozen_combinations()
    for task in islice(families.tasks("a test", lambda: 20), 1500):
        assert len(task.turns) == len(task.combinations)
        assert not set(task.combinations) & scored
        assert not any(families.is_held_out(one) for one in task.combinations)


def test_held_out_tasks_ask_held_out_combinations_of_every_family(families):
    for family in families.FAMILIES:
        for task in islice(families.tasks("a test", lambda: 8, held_out=True, family=family), 12):
            assert len(task.turns) == 1
            assert families.is_held_out(task.combinations[0]) or not task.combinations[0], task


def test_the_two_sides_of_the_split_are_drawn_apart_and_alike_every_time(families):
    draws = [list(islice(families.tasks(7, lambda: 4, held_out=side), 30)) for side in (False, False, True)]
    assert draws[0] == draws[1]
    assert not {task.turns[0] for task in draws[0]} & {
        task.turns[0] for task in draws[2] if task.combinations[0]
    }


def test_the_wording_is_that_of_both_probes(families):
    """Both tiers use the reference model's own questions: one key in filler, and several keys in notes."""
    prompts = {
        name: json.loads((data_dir() / "prompts" / f"{name}.json").read_text())
        for name in ("long_context_nano", "long_context_standard")
    }
    one = next(families.tasks(1, lambda: 6, family="pass key")).turns[0][0]
    assert any(sentence in one for sentence in prompts["long_context_nano"]["sentences"])
    many = next(families.tasks(1, lambda: 20, family="keys")).turns[0][0]
    needle = prompts["long_context_standard"]["needle"].split("{")[0].strip()
    assert needle in many


@pytest.mark.slow
def test_a_few_steps_become_a_file_that_llama_cpp_computes_alike(tmp_path):
    """Needs torch and transformers: ``pip install --group peer``, in this environment or in $DFQS_PEER_PYTHON."""
    python = os.environ.get("DFQS_PEER_PYTHON", sys.executable)
    if subprocess.run(
        [python, "-c", "import torch, transformers, safetensors"], capture_output=True
    ).returncode:
        pytest.skip("no torch here: pip install --group peer")
    run, path = tmp_path / "run", tmp_path / "nano-F32.gguf"
    environment = {**os.environ, "DFQS_LLAMA_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def call(*words, accepted=(0,)) -> str:
        done = subprocess.run(
            [python, *map(str, words)], capture_output=True, text=True, env=environment, cwd=REPOSITORY
        )
        assert done.returncode in accepted, done.stderr[-2000:] + done.stdout[-2000:]
        return done.stdout

    call(RECIPE / "train.py", run, "--tokens", 3e4, "--threads", 1, "--evaluate", 0)
    assert (run / "log.jsonl").read_text().count("\n") >= 1
    call(RECIPE / "export.py", run, path, "--type", "F32")
    header = read_header(path)
    assert header.architecture == "deepseek4" and check.parse(path).accepted
    assert memory.estimate(header, 512, 512).kv.total > 0
    # 1: a model that has learnt next to nothing may part from llama.cpp where its indexer leaves an entry out
    report = json.loads(call(RECIPE / "prove_export.py", run, path, accepted=(0, 1)))
    assert report["largest_before_the_indexer_chooses"] < 1e-3
    assert report["same_likeliest"] >= 0.9
    assert report["same_tokens"] == report["texts"]
