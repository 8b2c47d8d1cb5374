"""Signs of life while something large is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from dfqs_nb.core import display
from dfqs_nb.core.paths import REPOSITORY

BAR = """
import sys, time
from dfqs_nb.core import display
display.BEAT_SECONDS = 0.05
with display.heartbeat("loading small.gguf", 1000):
    time.sleep(0.2)
with display.heartbeat("loading large.gguf", display.LARGE_BYTES):
    time.sleep(0.5)
"""


def test_a_large_file_gets_a_bar_that_moves_and_a_small_one_none():
    """In a process of its own: tqdm reads once whether bars are off."""
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, "-c", BAR], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert "loading large.gguf" in done.stderr and "cores" in done.stderr
    assert "small.gguf" not in done.stderr


def test_activity_counts_this_process_where_it_is_asked_to():
    own = display.Activity(own=True)
    assert "cores" not in own.text(), "nothing was measured yet"
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    assert "cores" in (text := own.text()) and "in memory" in text
    assert not text.startswith("0 B in memory")


READ = """
import os, sys
with open(sys.argv[1], "rb") as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file.read()
print("read", flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux adds a child's reads to its parent's")
def test_what_a_child_has_read_counts_once_when_it_ends(tmp_path):
    """The kernel adds a child's bytes to its parent's at its end: a total that doubled, and 35 GB/s."""
    (large := tmp_path / "large").write_bytes(os.urandom(8 << 20))
    os.sync()
    activity = display.Activity(own=True)
    activity.text()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", READ, str(large)], **pipes, text=True) as child:
        activity.text()
        assert child.stdout.readline() == "read\n"
        activity.text()
        during = activity.total
        child.communicate("\n")
    activity.text()
    assert activity.total < during + (4 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what a process reads")
def test_a_child_that_ends_takes_nothing_from_what_another_reads(tmp_path):
    """Nobody here counts for this process, so what the kernel adds to it is not to be taken off."""
    files = [tmp_path / name for name in ("first", "second")]
    for file in files:
        file.write_bytes(os.urandom(8 << 20))
    os.sync()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    code = f"import sys\nsys.stdin.readline()\n{READ}"
    first, second = (
        subprocess.Popen([sys.executable, "-c", code, file], **pipes, text=True) for file in files
    )
    activity = display.Activity()
    with first, second:
        activity.text()
        for child in (first, second):
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "read\n"
            if child is first:
                activity.text()
        first.communicate("\n")
        activity.text()
        assert activity.total > 12 << 20, "all that both have read"
        second.communicate("\n")


def test_the_bar_that_moved_last_is_reported_and_none_after_its_end(tmp_path, monkeypatch):
    place, seen = tmp_path / ".progress", []
    monkeypatch.setenv("DFQS_PROGRESS", str(place))
    for _ in display.tqdm(range(2), "rungs", mininterval=0):
        for _ in display.tqdm(range(3), "texts", mininterval=0):
            seen.append(place.read_text())
    assert seen[1:3] == ["texts 1/3", "texts 2/3"] and place.read_text() == ""


def test_a_bar_that_cannot_be_reported_ends_no_work(tmp_path, monkeypatch):
    for place in ("/dev/full", str(tmp_path / "no folder/.progress")):
        monkeypatch.setenv("DFQS_PROGRESS", place)
        assert list(display.tqdm(range(3), "texts", mininterval=0)) == [0, 1, 2]


CELLS = """
from dfqs_nb.core.display import tqdm
def answer():
    for done in tqdm(range(9), "answer", mininterval=0):
        yield done
for token in answer():
    if token == 3: break
bar = list(tqdm(range(3), "whole", mininterval=0))
---
import os
os.environ["DFQS_OUTPUTS"] = {outputs!r}
from dfqs_nb import core
stage = core.Stage("stopped", "long_context")
stop = KeyboardInterrupt()
stop.add_note("3 of 9 answers are there")
raise stop
"""


def test_in_a_notebook_no_bar_stays_and_an_interrupt_is_one_line(tmp_path):
    """tqdm's widget stayed red after an answer that ended early, and a saved notebook opened with errors."""
    import nbclient
    import nbformat

    cells = CELLS.format(outputs=str(tmp_path)).split("---")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    client = nbclient.NotebookClient(book, kernel_name="python3", allow_errors=True)
    client.execute(cwd=tmp_path, env=environment | {"PYTHONPATH": str(REPOSITORY)})
    drawn, stopped = (cell["outputs"] for cell in book.cells)
    assert drawn and all(output["data"] == {"text/plain": "", "text/html": ""} for output in drawn)
    (line,) = stopped[-1]["traceback"]
    assert line.startswith("stopped; 3 of 9 answers are there; run all cells again to go on")
