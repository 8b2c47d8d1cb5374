"""Each notebook runs with other parameters than its own: what it says must follow from them.

The runs are slow tests: `make test` executes every notebook once, with nbval, and `make run` does it with papermill.
"""

from __future__ import annotations

import json

import nbformat
import pytest

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf import broken as specimens
from dfqs_nb.gguf import models as registry
from dfqs_nb.workbook import run as workbook

# Changed for all that declare them; each notebook must be touched by at least one.
CHANGED = {
    "model": "dfqs-nano-q8_0",  # 01; 02 and 03 read what it prepared
    "context": 8192,  # 02
    "n_ctx": 768,  # 03
    "max_tokens": 24,
    "depth": 128,
    "n_tokens": 160,  # 04
    "n_output": 8,
    "max_items": 24,  # 06
    "longest": 512,  # 05
    "n_haystacks": 5,
    "ask_llama_cpp": False,  # 07
    "rungs": "Q8_0 IQ1_S-XL",  # 08
    "ladder_items": 16,
    "serve_items": 8,  # 09
    "serve_clients": "1 2",
    "deploy_targets": "vllm",
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The whole workbook, run once with changed parameters in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFQS_OUTPUTS", str(tmp_path_factory.mktemp("dfqs-test-")))
        yield workbook.run_workbook("changed", CHANGED)


def names():
    return [path.stem for path in sorted(workbook.NOTEBOOKS.glob(workbook.PATTERN))]


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_changed_parameters_reach_the_notebook(result, name):
    done = next(item for item in result.notebooks if item.path.stem == name)
    declared = workbook.declared_parameters(workbook.NOTEBOOKS / f"{name}.ipynb")
    changed = {key: value for key, value in CHANGED.items() if key in declared}
    assert changed or name.startswith("00"), "no parameter of this notebook is changed: add one to CHANGED"
    assert all(repr(value) != declared[key]["default"].replace('"', "'") for key, value in changed.items())
    cells = nbformat.read(done.path, as_version=4).cells
    injected = [cell.source for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert len(injected) == 1
    for key, value in {**changed, "run_name": "changed"}.items():
        assert f"{key} = {value!r}".replace("'", '"') in injected[0]


@pytest.mark.slow
def test_every_notebook_leaves_its_stage_file_and_sentences(result):
    assert len(result.summary) >= len(result.notebooks) - 1  # 00 measures nothing
    for stage, sentences in result.summary.items():
        content = json.loads((result.folder / f"{stage}.json").read_text())
        assert sentences and content["conditions"], stage
    stages = " ".join((result.folder / f"{stage}.json").read_text() for stage in result.summary)
    assert CHANGED["model"].lower() in stages.lower(), "the stage files speak of the model that was asked for"


@pytest.mark.parametrize("name", names())
def test_a_misspelled_parameter_fails(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    with pytest.raises(DfqsError, match="no notebook has a parameter 'modle'; did you mean model"):
        workbook.run_workbook("typo", {"modle": "x"}, [workbook.NOTEBOOKS / f"{name}.ipynb"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_published_mistake_is_repaired_on_the_way(tmp_path, monkeypatch):
    """The user of the published single file gives it as it is, and goes on with a sound model."""
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path / "outputs"))
    glued = specimens.glue(tmp_path)
    first = [workbook.NOTEBOOKS / "01_merge_shards.ipynb"]
    done = workbook.run_workbook("glued", {"model": str(glued)}, first)
    handed = json.loads((done.folder / "merge.json").read_text())["model"]
    assert handed["sha256"] == registry.registered()["dfqs-nano-iq1_s-xl"].merged_sha256
