"""Models that no one here made go through the whole workbook: every notebook runs, and what it says is true.

Each run has a small budget, so these are the least questions, texts and repetitions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import other_models
import pytest
from llama_cpp_tools import Unavailable

from dfqs_nb import report
from dfqs_nb.core.stage import NOTEBOOKS as STAGES
from dfqs_nb.workbook import run as workbook

BUDGET_MINUTES = 5.0
SMALL = {"n_threads": 1, "n_tokens": 64, "n_output": 4, "serve_items": 1, "serve_tokens": 4}
SMALL |= {"rungs": "Q8_0 Q4_K_M", "ladder_items": 2}
QUANTIZED = {"gemma", "smollm2"}  # no ladder starts from them
DENSE = QUANTIZED | {"llama", "qwen2vl"}
PLAIN = {"gemma", "qwen2vl"}  # without a chat template
# What no reader can take for a finding.
SENSELESS = re.compile(r"\bnan\b|\bNaN\b|\bNone\b|\b(?:0|1) of 0\b|\d\.\d{9,}")
OURS = ("DeepSeek-V4-Flash", "DFQS-Nano")  # of which a report on another model has nothing to say


def model_of(name: str, folder: Path) -> Path | str:
    try:
        if name == "gemma":
            return other_models.gemma()
        if name == "smollm2":
            return other_models.smollm2()
        if name == "reference":
            return "dfqs-nano-q8_0"
        kind = {"llama": "llama-dense", "qwen2vl": "qwen2vl-dense", "qwen3moe": "qwen3moe-moe"}[name]
        return other_models.random_model(kind, folder, template=name not in PLAIN)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["reference", "llama", "qwen2vl", "qwen3moe", "smollm2", "gemma"])
def done(request, tmp_path_factory):
    """A model's name, and its run through all notebooks."""
    folder = tmp_path_factory.mktemp("dfqs-other-")
    model = model_of(request.param, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFQS_OUTPUTS", str(folder / "outputs"))
        given = {"model": str(model), **SMALL, "budget_minutes": BUDGET_MINUTES}
        made = workbook.run_workbook(request.param, given)
        yield request.param, made


def stage(made, name):
    return json.loads((made.folder / f"{name}.json").read_text())


@pytest.mark.slow
def test_every_notebook_runs_or_says_why_not(done):
    name, made = done
    assert [one.path.stem for one in made.notebooks if one.left_out] == (
        ["08_climb_the_quantization_ladder"] if name in QUANTIZED else []
    )
    assert len(made.verdict.splitlines()) >= 7 and set(made.summary) == set(STAGES)


@pytest.mark.slow
def test_no_sentence_is_senseless(done):
    _, made = done
    texts = {key: "\n".join(lines) for key, lines in made.summary.items()} | {"verdict": made.verdict}
    for file in ("report.md", "summary.md"):
        texts[file] = (made.folder / file).read_text()
    for one in made.notebooks:
        if not one.left_out:
            cells = nbformat.read(one.path, as_version=4).cells
            outputs = [
                out for cell in cells for out in cell.get("outputs", []) if out.output_type == "stream"
            ]
            texts[one.path.stem] = "\n".join(out.text for out in outputs if out.name == "stdout")
    found = {name: match[0] for name, text in texts.items() if (match := SENSELESS.search(text))}
    assert not found


@pytest.mark.slow
def test_a_dense_model_has_nothing_to_route_and_nobody_says_otherwise(done):
    name, made = done
    verdict, text = stage(made, "routing")["verdict"], " ".join(made.summary["routing"]).lower()
    assert verdict["routed"] == (name not in DENSE)
    if name in DENSE:
        assert "dense" in text and "close call" not in text and "expert set" not in text
        assert "0 of 0 experts" not in " ".join(made.summary["header"])


@pytest.mark.slow
def test_what_the_budget_left_out_stands_in_stage_and_report(done):
    _, made = done
    written = (made.folder / "report.md").read_text() + (made.folder / "summary.md").read_text()
    for name in ("generate", "long_context", "scores", "serving"):
        content = stage(made, name)
        assert content["budget"]["seconds"] <= 60 * BUDGET_MINUTES
        for row in content["left_out"]:
            assert row["what"].split(",")[0] in written


@pytest.mark.slow
def test_conditions_are_what_ran(done):
    name, made = done
    for conditions in (stage(made, "generate")["conditions"], stage(made, "scores")["conditions"]):
        assert conditions["offloaded_layers"] is not None and conditions["n_gpu_layers"] in (0, -1)
        assert ("chat_frame" in conditions) == (name in PLAIN)


@pytest.mark.slow
def test_the_report_is_about_this_model_only(done):
    name, made = done
    own = report.read_report(made.folder)
    assert own["tier"] == ("nano" if name == "reference" else "standard")
    if name != "reference":
        written = (made.folder / "report.md").read_text()
        text = re.sub(r"\]\([^)]*\)", "]", written)  # without links: DFQS 1.0 lies at such an address
        assert not [word for word in OURS if word in text]
