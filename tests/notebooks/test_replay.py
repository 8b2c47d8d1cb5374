"""What `make run` executed stands for an execution by nbval only where it is the same thing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from nbval_replay import executed

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def code(source, text=None, tags=()):
    outputs = [new_output("stream", name="stdout", text=text)] if text else []
    return new_code_cell(source, outputs=outputs, execution_count=1, metadata={"tags": list(tags)})


@pytest.fixture
def checkout(tmp_path):
    """A small checkout, and the run folder of its two notebooks, executed after it was made."""
    for folder in ("notebooks", "dfqs_nb", "outputs/nano"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "dfqs_nb" / "code.py").write_text("")
    (tmp_path / "outputs" / "nano" / ".lock").touch()  # the run's first file is older than its first notebook
    begin = datetime.now(UTC).isoformat()
    for name in ("00_start.ipynb", "01_merge.ipynb"):
        stored = new_notebook(cells=[code("n = 1", tags=["parameters"]), code("print(n)", "1\n")])
        nbformat.write(stored, tmp_path / "notebooks" / name)
        record = {"start_time": begin, "end_time": begin, "parameters": {"run_name": "nano"}}
        cells = [stored.cells[0], code("run_name = 'nano'", tags=["injected-parameters"]), stored.cells[1]]
        run = new_notebook(cells=cells, metadata={"papermill": record})
        nbformat.write(run, tmp_path / "outputs" / "nano" / name)
    for path in (tmp_path / "dfqs_nb" / "code.py", *(tmp_path / "notebooks").iterdir()):
        os.utime(path, (time.time() - 120,) * 2)
    return tmp_path


def change_record(checkout, **changes):
    path = checkout / "outputs" / "nano" / "01_merge.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["papermill"].update(changes)
    nbformat.write(notebook, path)


def cells_of(checkout):
    return executed(checkout / "outputs" / "nano", checkout)


def test_a_run_of_these_sources_is_taken_without_the_injected_cells(checkout):
    cells = cells_of(checkout)
    assert list(cells) == ["00_start.ipynb", "01_merge.ipynb"]
    assert [cell.source for cell in cells["01_merge.ipynb"]] == ["n = 1", "print(n)"]


@pytest.mark.parametrize(
    "what",
    ["a source changed", "a notebook is missing", "another parameter", "failed", "cut", "a resumed run"],
)
def test_any_other_run_is_not_taken(checkout, what):
    run = checkout / "outputs" / "nano"
    if what == "a source changed":
        (checkout / "dfqs_nb" / "code.py").write_text("n = 2")
    elif what == "a notebook is missing":
        (run / "01_merge.ipynb").unlink()
    elif what == "another parameter":
        change_record(checkout, parameters={"run_name": "nano", "n_ctx": 512})
    elif what == "failed":
        change_record(checkout, exception=True)
    elif what == "cut":
        (run / "scores.json").write_text('{"stage": "scores", "left_out": ["4 texts, not 8"]}')
    else:  # its first notebook began after a file of the folder was made
        later = datetime.fromtimestamp(time.time() + 60, UTC).isoformat()
        path = run / "00_start.ipynb"
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata["papermill"]["start_time"] = later
        nbformat.write(notebook, path)
    assert cells_of(checkout) == {}


@pytest.mark.parametrize("stored", ["1\n", "2\n"])
def test_nbval_compares_what_was_executed(checkout, stored):
    path = checkout / "notebooks" / "01_merge.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs[0].text = stored
    nbformat.write(notebook, path)
    os.utime(path, (time.time() - 120,) * 2)
    (checkout / "conftest.py").write_text(
        textwrap.dedent(f"""\
            import sys; sys.path.insert(0, {str(SUPPORT)!r})
            from pathlib import Path
            import nbval_replay
            nbval_replay.ROOT = Path({str(checkout)!r})
            found = nbval_replay.executed(nbval_replay.ROOT / "outputs" / "nano", nbval_replay.ROOT)
            nbval_replay._executed_now = lambda: found
            nbval_replay.install()
        """)
    )
    words = [sys.executable, "-m", "pytest", "-q", "--nbval", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(words, cwd=checkout, capture_output=True, text=True, timeout=120)
    assert ("2 passed" in done.stdout) == (stored == "1\n"), done.stdout
    assert ("Cell outputs differ" in done.stdout) == (stored == "2\n")
