"""What a run shows while it works, and what Ctrl-C leaves."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from test_workbook import texts, write_notebook

from dfqs_nb.core.paths import REPOSITORY
from dfqs_nb.workbook import live
from dfqs_nb.workbook import run as workbook

RUN = """
import sys
from pathlib import Path
from dfqs_nb.workbook.run import run_workbook
run_workbook("mine", {}, [Path(sys.argv[1])], watch=sys.stderr)
"""
MARK = "import pathlib, time\npathlib.Path({!r}).touch()\ntime.sleep(600)"


def test_a_long_cell_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setattr(live, "HEARTBEAT_SECONDS", 0.2)
    slow = (
        "import time\nfrom dfqs_nb.core.display import tqdm\nfor _ in tqdm([1, 2], 'texts'): time.sleep(0.6)"
    )
    notebook = write_notebook(tmp_path / "01_sleep.ipynb", slow, "print('end')")
    shown = io.StringIO()
    workbook.run_workbook("mine", {}, [notebook], watch=shown)
    lines = shown.getvalue().splitlines()
    assert any("01_sleep [" in line and "Try a thing" in line and "cores" in line for line in lines), lines
    assert any("Try a thing | " in line and "| texts 1/2 |" in line for line in lines), "a loop is half done"


@pytest.mark.parametrize("width", [60, 79, 100, 160])
def test_the_time_left_stays_where_a_terminal_is_narrow(tmp_path, width, monkeypatch):
    watched = live.Live(tmp_path / "08_climb_the_quantization_ladder.ipynb", 4.0, None)
    watched.bars.write_text("rungs 2/8")
    monkeypatch.setattr(watched.activity, "text", lambda: "86.6 GB read from the disk, 400.3 MB/s, 1.9 cores")
    watched.titles, watched.index = ["One", "What a bit less costs at every rung of the ladder"], 1
    line = watched.line(width)
    assert "2/2" in line and "4 min of its budget left" in line and len(line) <= width
    assert line.startswith("08 [") and ("What a bit less" in line) == (width > 70)
    assert ("rungs" in line) == (width > 100), "what the processes do goes first, then the heading"


def test_a_terminal_gets_one_line_that_is_redrawn(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(live, "REDRAW_SECONDS", 0.05)
    monkeypatch.setenv("COLUMNS", "200")
    shown = Terminal()
    with live.Live(tmp_path / "03_x.ipynb", 4.0, shown) as watched:
        watched.titles, watched.index = ["One", "Two"], 1
        deadline = time.monotonic() + 20
        while shown.getvalue().count("\r") < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "\n" not in shown.getvalue() and "03_x [#####.....] 2/2 | " in shown.getvalue()
    assert "of its budget left" in shown.getvalue() and shown.getvalue().endswith(" \r")


def test_titles_are_the_headings_above():
    cells = [
        {"cell_type": "markdown", "source": "# A\ntext"},
        {"cell_type": "code", "source": "# no heading"},
    ]
    assert live.cell_titles(cells) == ["A", "A"]


def test_ctrl_c_leaves_the_executed_part_and_no_kernel(tmp_path):
    mark, outputs = tmp_path / "mark", tmp_path / "outputs"
    notebook = write_notebook(
        tmp_path / "01_stop.ipynb", "print('so far')", MARK.format(str(mark)), "print('never')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(notebook)],
        env={**os.environ, "DFQS_OUTPUTS": str(outputs), "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    left = outputs / "mine" / "01_stop.ipynb"
    assert "so far" in texts(left) and "stopped in 01_stop, cell 6/7 Try a thing" in errors, errors
    assert "the same command goes on with what is missing" in errors and "dfqs-nb report mine`" in errors, (
        errors
    )
    status = [cell.metadata.papermill["status"] for cell in nbformat.read(left, as_version=4).cells]
    assert status[-2:] == ["failed", "pending"], "what never ran is not marked as done"
    assert kernels and not psutil.wait_procs(kernels, timeout=30)[1], "the kernel ends with the run"
    assert json.loads(Path(left).read_text())["cells"]
