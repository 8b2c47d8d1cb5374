"""Tiers: the reference model means nano, any other model means standard; and a run's one budget."""

from __future__ import annotations

import json

import pytest
from gguf_fixtures import Spec, field, gguf_bytes

from dfqs_nb import ladder
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.core.stage import Stage
from dfqs_nb.gguf.facts import types_by_bytes
from dfqs_nb.gguf.header import read_header
from dfqs_nb.workbook import run as workbook


@pytest.mark.parametrize(
    "model, tier",
    [
        (None, "nano"),
        ("dfqs-nano-q8_0", "nano"),
        (str(data_dir() / "reference" / "DFQS-Nano-F16.gguf"), "nano"),
        ("deepseek-v4-flash-iq1_s-xl", "standard"),
        ("hf://owner/repo/file.gguf", "standard"),
        ("/models/other.gguf", "standard"),
    ],
)
def test_the_reference_model_means_nano_and_any_other_standard(model, tier):
    assert workbook.tier_of(model) == tier


def test_a_run_that_goes_on_keeps_its_models_tier(tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    assert workbook.tier_of(None, "mine") == "nano"
    (tmp_path / "mine").mkdir()
    stage = {"stage": "merge", "conditions": {"model": "/models/other.gguf"}}
    (tmp_path / "mine" / "merge.json").write_text(json.dumps(stage))
    assert workbook.tier_of(None, "mine") == "standard"


def test_every_setting_of_a_tier_is_a_parameter_of_its_type():
    declared = {}
    for path in workbook.find_notebooks():
        declared |= workbook.declared_parameters(path)
    for name, value in workbook.settings_of("standard").items():
        assert name in declared, f"data/tiers.toml sets {name}, which no notebook declares"
        assert type(value).__name__ == declared[name]["inferred_type_name"], name


def _run_of(model, folder):
    stage = Stage(folder, "merge")
    stage.path("merged").write_text("")
    stage.finish(conditions={}, summary=[], model={"path": str(model)})


def test_a_ladder_is_of_the_runs_own_model_or_of_the_reference_in_a_run_of_it(tmp_path):
    """In JupyterLab, every model got the reference model's ladder in its report."""
    reference = data_dir() / "reference"
    assert ladder.source_of(tmp_path / "no run") == "dfqs-nano-f16"
    _run_of(reference / "DFQS-Nano-Q8_0-00001-of-00002.gguf", tmp_path / "nano")
    assert ladder.source_of(tmp_path / "nano") == "dfqs-nano-f16"
    own = tmp_path / "own.gguf"
    own.write_bytes(
        gguf_bytes(
            [field("general.architecture", "STRING", "llama")], [Spec("output.weight", "F16", (256, 64))]
        )
    )
    _run_of(own, tmp_path / "own")
    assert ladder.source_of(tmp_path / "own") == str(own)


def test_a_quantized_model_is_named_by_the_type_of_its_layers(tmp_path):
    """The embedding of this one holds over three times the bytes of its layer."""
    tensors = [Spec("token_embd.weight", "Q8_0", (256, 64)), Spec("blk.0.ffn_up.weight", "Q4_K", (256, 32))]
    path = tmp_path / "small.gguf"
    path.write_bytes(gguf_bytes([field("general.architecture", "STRING", "llama")], tensors))
    _run_of(path, tmp_path / "my run")
    with pytest.raises(DfqsError, match=r"small.gguf is quantized already \(mostly Q4_K\)") as caught:
        ladder.source_of(tmp_path / "my run")
    assert "`dfqs-nb run 08 --run 'my run' -p ladder_source=FILE`" in str(caught.value)
    assert next(iter(types_by_bytes(read_header(path).tensors))) == "Q8_0"


def test_the_budget_is_divided_among_what_still_comes():
    names = [path.stem for path in workbook.find_notebooks()]
    obey = [
        path.stem
        for path in workbook.find_notebooks()
        if "budget_minutes" in workbook.declared_parameters(path)
    ]
    assert obey == [name for name in names if workbook.share_of(name)], "who has a share obeys it"
    left, spent = 60.0, 0.0
    for number, name in enumerate(names):
        share = workbook.budget_of(name, left - spent, names[number:])
        spent += share if name[:2] not in ("01", "02", "07") else 0
    assert 59 <= spent <= 61, "all of the budget is given out, and no more"


def test_kernels_and_figures_of_the_notebooks_to_come_count_too(tmp_path, monkeypatch):
    given = {}

    def executed(path, target, parameters, live):
        given[path.stem] = parameters.get("budget_minutes")
        return workbook.NotebookRun(target, 30.0)

    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(workbook, "_executed", executed)
    workbook.run_workbook("mine")
    names = [path.stem for path in workbook.find_notebooks()]
    beside = 0.5 * len(names[3:])  # minutes: each notebook so far took 30 s
    assert given[names[3]] == pytest.approx(workbook.budget_of(names[3], 60 - beside, names[3:]), abs=0.11)


def test_an_unknown_tier_is_refused():
    with pytest.raises(DfqsError, match="no tier 'small'; use --tier nano or --tier standard"):
        workbook.settings_of("small")
