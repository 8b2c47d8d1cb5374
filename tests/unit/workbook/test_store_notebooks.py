"""The maintainer's tool: the public address stamped into notebooks, and outputs stored without a machine's traces."""

from __future__ import annotations

import json

import nbformat
import pytest
import store_notebooks
from test_workbook import write_notebook

from dfqs_nb.core.errors import DfqsError


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[project.urls]\nRepository = "https://github.com/someone/thing"\n'
    )
    (root / "README.md").write_text(
        "# X\n<!-- clone -->\n<!-- /clone -->\n<!-- notebooks -->\n<!-- /notebooks -->\n"
    )
    write_notebook(root / "notebooks" / "01_try.ipynb", "1 + 1")
    return root


def test_stamp_writes_once_checks_and_follows_the_address(checkout):
    notebook, readme = checkout / "notebooks" / "01_try.ipynb", checkout / "README.md"
    assert store_notebooks.stamp(checkout, check=True) == [notebook, readme]
    assert "someone/thing" not in readme.read_text(), "--check changes nothing"
    assert store_notebooks.stamp(checkout) == [notebook, readme]
    assert store_notebooks.stamp(checkout) == [] == store_notebooks.stamp(checkout, check=True)
    cells = nbformat.read(notebook, as_version=4).cells
    assert cells[0].source.startswith("# Try a thing")
    assert (
        "colab.research.google.com/github/someone/thing/blob/main/notebooks/01_try.ipynb" in cells[0].source
    )
    assert "kaggle.com/kernels/welcome?src=https://github.com/someone/thing/blob" in cells[0].source
    assert "https://github.com/someone/thing" in cells[2].source
    assert "git clone https://github.com/someone/thing\ncd thing" in readme.read_text()
    assert "[01 Try a thing](notebooks/01_try.ipynb)" in readme.read_text()
    address = (checkout / "pyproject.toml").read_text().replace("someone/thing", "other/place")
    (checkout / "pyproject.toml").write_text(address)
    store_notebooks.stamp(checkout)
    stamped = notebook.read_text() + readme.read_text()
    assert "someone/thing" not in stamped and "other/place" in stamped


# --- stored outputs --------------------------------------------------------------------------------


def test_refresh_stores_outputs_without_traces_of_the_machine(tmp_path):
    path = write_notebook(
        tmp_path / "nb" / "01_show.ipynb",
        "print('a')\nimport sys\nsys.stdout.flush()\nprint('b')",
        "from dfqs_nb.core.display import tqdm\nfor _ in tqdm(range(3)): pass\n42",
        "import os\nfrom pathlib import Path\nPath(os.environ['DFQS_OUTPUTS']) / run_name",
    )
    store_notebooks.refresh_notebooks([path], tmp_path / "outputs")
    first = path.read_text()
    notebook = json.loads(first)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    outputs = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [output["text"] for output in outputs[-3]] == [["a\n", "b\n"]], "one stream, however it was cut"
    assert [output["output_type"] for output in outputs[-2]] == ["execute_result"], "no progress bar"
    assert outputs[-1][0]["data"]["text/plain"] == ["PosixPath('outputs/nano')"]
    assert not any(set(cell["metadata"]) - {"tags"} for cell in notebook["cells"])
    store_notebooks.refresh_notebooks([path], tmp_path / "outputs")
    assert path.read_text() == first


def test_refresh_leaves_a_notebook_that_fails_as_it_was(tmp_path):
    path = write_notebook(tmp_path / "nb" / "01_fail.ipynb", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(DfqsError, match="01_fail.ipynb: ZeroDivisionError: division by zero"):
        store_notebooks.refresh_notebooks([path], tmp_path / "outputs")
    assert path.read_bytes() == before
