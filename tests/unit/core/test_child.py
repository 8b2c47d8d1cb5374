"""Child processes: answers, errors, deaths, time limits, and no orphans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dfqs_nb.core import child
from dfqs_nb.core.errors import ModelError, SpaceError

SUPPORT = Path(__file__).resolve().parents[2] / "support"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]))


def test_an_answer_comes_back_and_messages_before_it():
    messages = []
    answer = child.run("child_jobs", {"do": "add", "numbers": [1, 2]}, on_message=messages.append)
    assert answer == {"sum": 3} and [message["stage"] for message in messages] == ["while adding"]


def test_the_childs_error_keeps_its_class_place_and_hint():
    with pytest.raises(SpaceError, match="a.gguf: too large; make room") as caught:
        child.run("child_jobs", {"do": "refuse"})
    assert (caught.value.what, caught.value.where, caught.value.hint) == ("too large", "a.gguf", "make room")


def test_an_abort_is_an_error_that_names_the_signal_the_step_and_the_assertion():
    with pytest.raises(
        ModelError, match=r"m\.gguf: llama\.cpp died while adding \(SIGABRT\).*n > 0"
    ) as caught:
        child.run("child_jobs", {"do": "abort"}, where="m.gguf")
    assert caught.value.cause == "SIGABRT" and "dfqs-nb inspect" in caught.value.hint


def test_a_bug_in_the_child_is_not_an_answer():
    with pytest.raises(child.ChildDied, match="exit status 1") as caught:
        child.run("child_jobs", {"do": "bug"})
    assert any("ZeroDivisionError" in note for note in caught.value.__notes__)


def test_a_time_limit_kills_and_says_so():
    pids = []
    with pytest.raises(child.ChildDied, match="timeout"):
        child.run("child_jobs", {"do": "wait"}, timeout_seconds=3, on_message=lambda m: pids.append(m["pid"]))
    assert pids and not psutil.pid_exists(pids[0])


def test_a_child_ends_when_its_parent_is_killed():
    code = (
        "from dfqs_nb.core import child\n"
        "child.run('child_jobs', {'do': 'wait'}, on_message=lambda m: print(m['pid'], flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=child.environment())
    pid = int(json.loads(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


def test_a_worker_does_many_jobs_in_one_child_and_starts_another_after_a_death():
    pids = []
    with child.Worker("child_jobs") as worker:
        for do in ("add", "refuse", "add", "abort", "add"):
            try:
                worker.run({"do": do, "numbers": [1]}, on_message=lambda message: pids.append(message["pid"]))
            except ModelError as error:
                assert do == "abort" and "GGML_ASSERT" in str(error)
            except SpaceError as error:
                assert do == "refuse" and not any("GGML_ASSERT" in note for note in error.__notes__)
    assert len(set(pids[:4])) == 1 and pids[4] != pids[0]
    assert not psutil.pid_exists(pids[4])


def test_a_worker_without_room_for_its_log_is_one_error(monkeypatch):
    others = []

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(child.tempfile, "TemporaryFile", full)
    monkeypatch.setattr(sys, "unraisablehook", others.append)
    with pytest.raises(OSError, match="No space left"):
        child.Worker("child_jobs")
    assert not others, "nothing but that error"


def test_a_worker_that_nobody_has_any_more_ends_its_child():
    pids = []
    worker = child.Worker("child_jobs")
    worker.run({"do": "add", "numbers": [1]}, on_message=lambda message: pids.append(message["pid"]))
    del worker
    assert not psutil.pid_exists(pids[0])
