"""What others do on this machine while something is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple

import psutil

from dfqs_nb.core.machine import Load, describe, machine_line, watched_load


def test_work_of_others_is_seen():
    code = "import time\nend = time.time() + 1\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as busy, watched_load() as load:
        busy.wait()
    assert load.contended and load.other_cores > 0.3
    assert not Load(0.05).contended and not Load(None).contended


def test_ones_own_work_is_not_that_of_others(monkeypatch):
    """On a machine where nobody else works."""
    times = namedtuple("times", "user system idle")
    monkeypatch.setattr(psutil, "cpu_times", lambda: times(os.times().user, os.times().system, 7.0))
    with watched_load() as load:
        sum(i * i for i in range(10_000_000))
    assert load.other_cores < 0.05


def test_one_line_has_what_decides_results():
    known, line = describe(), machine_line("llama.cpp (commit x)")
    assert f"llama-cpp-python {known['llama-cpp-python']}; {known['processor']}: " in line
    assert line.endswith("; llama.cpp (commit x)") and " GiB of memory (" in line
