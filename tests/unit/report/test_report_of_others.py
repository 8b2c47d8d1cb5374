"""Reports of models that are not ours: dense, without a chat template, with sliding windows, from a part of a run."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf_fixtures import Spec, field, gguf_bytes
from sealed_run import make_run, recorded

from dfqs_nb import report
from dfqs_nb.core.files import write_text
from dfqs_nb.core.stage import Stage
from dfqs_nb.report import text
from dfqs_nb.report.reading import COMMAND
from dfqs_nb.report.template import spec_table
from dfqs_nb.workbook import cli

SHA256 = "a" * 64
OURS = re.compile(r"DeepSeek|IQ1_S|V4|25468|unsloth|VRAM|GPU log|experts stay")
KEYS = {"block_count": 2, "embedding_length": 64, "context_length": 32768, "attention.head_count": 2}
KEYS |= {"attention.head_count_kv": 1, "attention.sliding_window": 512}
DENSE = recorded("routing")["verdict"] | {"routed": False, "n_choices": 0, "n_layers": 0}
DENSE |= {"load_passed": None, "load_sentence": ""}


def gemma(folder: Path) -> Path:
    """A small dense file with sliding windows, a licence, and no chat template."""
    fields = [
        field("general.architecture", "STRING", "gemma3"),
        field("general.name", "STRING", "Gemma 3 270M"),
    ]
    fields += [field("general.license", "STRING", "gemma")]
    fields += [field(f"gemma3.{name}", "UINT32", value) for name, value in KEYS.items()]
    names = ("token_embd", "blk.0.attn_q", "blk.1.ffn_up")
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    path.write_bytes(gguf_bytes(fields, [Spec(f"{name}.weight", "F32", (64, 64)) for name in names]))
    return path


def run_of_gemma(folder: Path, *, without: tuple[str, ...] = (), **changed: dict[str, Any]) -> Path:
    """What notebooks 01 to 04 leave of that model under a small budget, and of 05 and 06 what is asked for."""
    model = gemma(folder)
    file = {"name": model.stem, "sha256": SHA256, "nbytes": model.stat().st_size, "path": str(model)}
    stages: dict[str, Any] = {
        name: {"conditions": {**recorded(name)["conditions"], "model": SHA256}}
        for name in ("header", "generate", "routing", "scores")
    }
    stages |= {"merge": {"model": file}, "long_context": {"model": file, "tier": "standard"}}
    stages["scores"]["tier"] = "standard"
    stages["routing"] |= {"verdict": DENSE, "claims": []}
    frame = {"chat_frame": "Question: {prompt}\nAnswer:"}
    answers = [{"prompt": "p", "answer": "Paris", "tokens": 2, "finish_reason": "length"}] * 3
    stages["generate"] |= {"answers": answers, "left_out": ["2 tokens of an answer in place of 96"]}
    stages["generate"]["conditions"] |= frame
    stages = {name: {**stages[name], **changed.get(name, {})} for name in stages}
    return make_run(folder / "gemma", model, without=without, **stages)


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """The newcomer's run: notebooks 01 to 04."""
    return run_of_gemma(tmp_path_factory.mktemp("partial"), without=("scores", "long_context"))


def test_each_budget_is_shown_with_what_it_left_out_and_the_command_that_measures_more(tmp_path):
    """The options and the budget of the run, as it was started; a budget that is larger."""
    stage = {
        "left_out": ["2 tokens of an answer in place of 96"],
        "budget": {"seconds": 66, "used_seconds": 95.2},
    }
    folder = run_of_gemma(tmp_path, without=("scores", "long_context"), generate=stage)
    model = json.loads((folder / "merge.json").read_text())["conditions"]["model"]
    given = {"options": ["-p", "n_ctx=512"], "tier": "standard", "budget_minutes": 150}
    for command, words in (
        ("", "--budget-minutes 120"),
        ("[1]", "--budget-minutes 120"),
        ('{"options": 5, "budget_minutes": "x"}', "--budget-minutes 120"),
        (json.dumps(given), "--tier standard -p n_ctx=512 --budget-minutes 300"),
    ):
        (folder / COMMAND).write_text(command)
        made = report.build_report(folder, ask_llama_cpp=False)
        content = text.texts(made, folder)["report.md"]
        assert "03_load_and_generate: 95 s of 66 s; cut: 2 tokens of an answer in place of 96" in content
        assert f"`dfqs-nb run --run gemma --model {model} {words}`" in content
        assert f"`dfqs-nb run 05 06 07 --run gemma {words}`" not in content
    command = "`dfqs-nb run 05 06 07 --run gemma --tier standard -p n_ctx=512 --budget-minutes 150`"
    assert command in content


@pytest.fixture(scope="module")
def made(partial):
    return report.build_report(partial, ask_llama_cpp=False)


def lines_of(made: dict) -> dict[str, Any]:
    return {line.question: line for line in report.verdict(made).lines}


def test_routing_of_a_dense_model_is_neither_met_nor_ticked(made):
    line = lines_of(made)["Is routing deterministic?"]
    assert (line.mark, line.symbol) == ("not applicable", "–") and "dense" in line.answer and not line.caveat
    row = next(row for row in made["conformance"] if row["id"] == "routing-deterministic")
    assert row["verdict"] == "not applicable"
    demands = lines_of(made)["Which demands of DFQS are met?"]
    assert "SHALL: 2 of 4 met, 1 not met, 1 not applicable" in demands.answer and demands.mark == "in part"


def test_the_speed_of_notebook_03_stands_where_06_did_not_run(made, partial):
    line = lines_of(made)["Does it run here, and how fast?"]
    assert line.answer.startswith("92.1 tokens/s on the CPU at depth 512 (median; lowest to highest of 5")
    assert "notebook 06 is withheld: notebook 06 did not run" in line.caveat
    assert made["metrics"]["cpu_tokens_per_sec"] is None
    assert "notebook 03 timed 92.1 tokens/s" in text.texts(made, partial)["report.md"]
    busy = copy.deepcopy(made)
    busy["details"]["cpu_tokens_per_sec"]["notebook_03"]["contended"] = True
    assert (line.mark, lines_of(busy)["Does it run here, and how fast?"].mark) == ("yes", "in part")


def test_without_notebook_03_too_no_speed_is_shown(tmp_path):
    folder = run_of_gemma(tmp_path, without=("scores", "long_context", "generate"))
    line = lines_of(report.build_report(folder, ask_llama_cpp=False))["Does it run here, and how fast?"]
    assert line.mark == "unknown" and "`dfqs-nb run 03 05 06 07 --run gemma`" in line.answer
    assert "tokens/s" not in line.answer + line.caveat


def test_a_base_model_and_cut_answers_are_said_in_the_verdict(made):
    caveat = lines_of(made)["Does it run here, and how fast?"].caveat
    assert "no chat template, like a base model" in caveat
    assert "3 of 3 prompts got text (2, 2, 2 tokens; 3 were cut off at 2 tokens, because the budget" in caveat


def test_nothing_of_the_artifact_stands_in_the_report(made, partial):
    address = spec_table("claims")["documents"]["DFQS 1.0"]["address"]
    for written in text.texts(made, partial).values():
        written = written.split("Glossary</h2>")[0].split("## Glossary")[0]
        assert not OURS.findall(written.replace(address, "where the specification is"))


def test_the_cache_of_sliding_windows_is_at_most_what_is_shown(made, partial):
    content = text.texts(made, partial)["report.md"]
    assert "the upper bound size" in content and "as if they kept the whole context" in content


def test_the_model_has_its_own_name_and_licence(made, partial):
    content = text.texts(made, partial)["report.md"]
    assert "| name in header | Gemma 3 270M |" in content and "| licence | gemma |" in content
    assert "relation to" not in content and "| another |" not in content


@pytest.mark.parametrize("without", [("scores", "long_context"), ("scores",), ("routing", "generate")])
def test_the_raw_text_has_no_escapes_that_markdown_does_not_need(tmp_path, without):
    folder = run_of_gemma(tmp_path, without=without)
    content = text.texts(report.build_report(folder, ask_llama_cpp=False), folder)["report.md"]
    assert "\\`" not in content and "\\~" not in content
    assert "`dfqs-nb run" in content


def test_without_a_curve_neither_its_figure_nor_its_paragraphs_are_shown(tmp_path):
    """Where the budget allowed no length, notebook 05 draws a figure that says so."""
    nothing = {"curve": [], "refined": [], "boundary": None, "context_stability_curve": [], "tasks": []}
    nothing |= {"failure_boundary_tokens": None, "not_measured": "12 texts of 256 tokens: not measured"}
    folder = run_of_gemma(tmp_path, long_context=nothing | {"tier": "standard"}, without=("scores",))
    stage, own = Stage(folder, "long_context"), {**recorded("long_context"), **nothing}
    write_text(stage.path("context_curve.png"), "png")
    own |= {"tier": "standard", "model": {"name": "g", "sha256": SHA256}}
    facts = {name: own[name] for name in own if name not in ("stage", "conditions", "summary")}
    stage.finish(conditions=own["conditions"], summary=[], **facts)
    made = report.build_report(folder, ask_llama_cpp=False)
    content = text.texts(made, folder)["report.md"].split("## Glossary")[0]
    assert "context_curve.png" in made["sources"] and "context_curve.png" not in content
    assert (
        "isotonic" not in content
        and "NoLiMa" not in content
        and "<img" not in text.texts(made, folder)["report.html"]
    )
    assert "withheld: 12 texts of 256 tokens: not measured" in str(report.verdict(made)).lower()


def test_one_command_makes_up_for_all_that_did_not_run_and_the_program_takes_it(made):
    commands = set(re.findall(r"`dfqs-nb ([^`]+)`", str(report.verdict(made)) + str(made["conformance"])))
    assert {it for it in commands if it.startswith("run ")} == {"run 05 06 07 --run gemma"}
    for command in commands:
        name, *words = command.split()
        assert cli.program().commands[name].make_context(name, words)


def test_no_sentence_is_senseless(made, partial):
    content = text.texts(made, partial)["report.md"]
    assert not re.search(
        r"\bnan\b|\bNone\b|\bUndefined\b|\b0 of 0\b|\. \.|(?<!\.)\.\.(?!\.)|;\s*\.|\s\.\s", content
    )


@pytest.fixture(scope="module")
def hurried(tmp_path_factory):
    """What a base model leaves under a budget of five minutes: two cut answers and 25 of multiple choice."""
    few = {"set": "standard-reasoning", "n": 2, "value": 0.0, "low": 0.0, "high": 0.66, "guess_rate": 0.01}
    score = recorded("scores")["scores"][0] | few | {"truncated": 2}
    choices = score | {"name": "choice_score", "set": "standard-reasoning-choices", "n": 25, "value": 0.24}
    choices |= {"low": 0.11, "high": 0.43, "guess_rate": 0.25}
    scores = {"scores": [choices, score], "left_out": ["the set standard-code"]}
    conditions = recorded("scores")["conditions"] | {"model": SHA256}
    asked = dict.fromkeys((score["set"], choices["set"]), conditions["nano-reasoning"])
    scores["conditions"] = conditions | asked
    held = {"status": "right_censored", "right_censored": True, "tokens": 2048, "low": 2048, "high": None}
    context = {"boundary": recorded("long_context")["boundary"] | held | {"n_haystacks": 4}}
    changed = {"scores": scores, "long_context": context | {"failure_boundary_tokens": 2048}}
    return report.build_report(
        run_of_gemma(tmp_path_factory.mktemp("hurried"), **changed), ask_llama_cpp=False
    )


def test_scores_that_nobody_can_tell_from_guessing_are_unknown_and_name_the_next_command(hurried):
    line = lines_of(hurried)["What does it score?"]
    assert line.symbol == "?" and "the budget left it out" in line.answer
    assert "In standard-reasoning, 2 of 2 answers were truncated. " in line.caveat
    assert "Too few questions of standard-reasoning to tell (n = 2). " in line.caveat
    assert "`dfqs-nb run 06 07 --run gemma --budget-minutes 120`" in line.caveat


def test_a_budget_that_was_short_refutes_no_demand(hurried):
    line = lines_of(hurried)["Which demands of DFQS are met?"]
    assert line.symbol == "~" and "not met, because this run did not measure code_score" in line.caveat
    assert "not applicable" not in line.caveat
    (command,) = re.findall(r"`dfqs-nb ([^`]+)`", line.caveat)
    name, *words = command.split()
    assert words == ["06", "07", "--run", "gemma", "--budget-minutes", "120"]
    assert cli.program().commands[name].make_context(name, words)


def test_the_hub_gets_no_bound_and_no_score_of_a_few_questions(hurried):
    form = text.hub_form(hurried)
    assert (
        hurried["metrics"]["reasoning_score"] == 0.0 and hurried["metrics"]["failure_boundary_tokens"] == 2048
    )
    assert "tokens/s" in form
    assert "reasoning_score" not in form and "failure_boundary" not in form
