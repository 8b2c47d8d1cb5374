"""Work in a child process, so that an abort ends the child and not this process.

The parent calls `run` with a module and a job. The module's ``__main__`` calls `serve` with a function that
takes the job. Both write JSON, one object a line. A child ends when its parent does.
"""

from __future__ import annotations

import json
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil

from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.paths import REPOSITORY

_running: set[subprocess.Popen[bytes]] = set()
SOURCE_FOLDER = re.compile(r"\S*/(?=[\w.-]+\.(?:cpp|c|cu|h|m):\d+)")  # of the machine that compiled llama.cpp
REBUILD = "delete .venv and run `make run` again"
HINTS = {
    "SIGABRT": "run `dfqs-nb inspect FILE`, or update llama-cpp-python",
    "SIGILL": f"llama-cpp-python was built for another CPU: {REBUILD}",
    "SIGSEGV": f"the file is damaged (`dfqs-nb verify FILE`), or llama.cpp does not suit this CPU: {REBUILD}",
    "SIGBUS": "the file shrank or its disk failed during reading: `dfqs-nb verify FILE`",
    "SIGKILL": "the system killed it, most likely for memory: lower n_ctx or close other programs",
    "timeout": "the disk is very slow, or the file is on a network: copy it to a local disk",
}


class ChildDied(ModelError):
    """The child ended without an answer."""

    cause: str = ""  # the signal's name, ``exit status N`` or ``timeout``
    messages: tuple[dict[str, Any], ...] = ()
    log: tuple[str, ...] = ()  # lines of its standard error


def environment() -> dict[str, str]:
    """This environment for a child that runs llama.cpp: it finds the package, and starts no debugger."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        "PYTHONIOENCODING": "utf-8",
        "GGML_NO_BACKTRACE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin for each other crawl on a busy machine
    }


def start(module: str, job: Mapping[str, Any], *, log: Any, **options: Any) -> subprocess.Popen[bytes]:
    """Start ``python -m module`` and send it the job; its standard error goes to the open file ``log``."""
    command = [sys.executable, "-P", "-m", module]  # -P: a folder llama_cpp/ in the current one is not ours
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
    return _send(subprocess.Popen(command, **{"env": environment(), **pipes, **options}), job)


def _send(process: subprocess.Popen[bytes], job: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # the child is gone; its exit status says how
        process.stdin.write(json.dumps(dict(job)).encode() + b"\n")
        process.stdin.flush()  # and stays open: when it closes, the child ends
    return process


class Worker(AbstractContextManager["Worker"]):
    """A child ``python -m module`` that does one job after another; after a death, a new child.

    Close it, or use it in a ``with`` block. ``log``: an open file that keeps the child's standard error.
    """

    def __init__(self, module: str, *, log: IO[bytes] | None = None) -> None:
        self.module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._log = log or tempfile.TemporaryFile()  # noqa: SIM115 (it goes with this object)

    def close(self, *_exc: object) -> None:
        """Kill the child, if there is one."""
        if self._process is not None:
            end(self._process, grace_seconds=0)
            self._process = None

    __exit__ = __del__ = close

    def run(
        self,
        job: Mapping[str, Any],
        *,
        where: str | Path | None = None,
        on_message: Callable[[dict[str, Any]], object] = lambda message: None,
        timeout_seconds: float | None = None,
    ) -> dict[str, Any]:
        """Do a job and return its answer; ``on_message`` receives what the child sends with `tell`.

        A `DfqsError` that the child raises has the same class here. `ChildDied`: the child ended, or was
        killed after ``timeout_seconds``. The message names ``where``.
        """
        begin, process = os.fstat(self._log.fileno()).st_size, self._process
        if process is None or process.poll() is not None:
            self.close()
            self._process = process = start(self.module, job, log=self._log)
            _running.add(process)
        else:
            _send(process, job)
        try:
            with killed_after(timeout_seconds, process) as late:
                messages = _until_answer(process, on_message)
        except BaseException:
            self.close()
            raise
        # `pread` keeps the file's position, which the child shares
        raw = os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size - begin, begin)
        lines, last = raw.decode("utf-8", "replace").splitlines(), messages[-1] if messages else {}
        if "failed" in last:
            raise _error(last["failed"], lines)
        if "answer" in last:
            return dict(last["answer"])
        raise died("timeout" if late.is_set() else ending(process.returncode), where, messages, lines)


def _until_answer(
    process: subprocess.Popen[bytes], on_message: Callable[[dict[str, Any]], object]
) -> list[dict[str, Any]]:
    """What a child sends, up to its answer or failure; without one the child has ended."""
    messages = list[dict[str, Any]]()
    for message in filter(None, map(_parsed, process.stdout or ())):
        messages.append(message)
        if {"answer", "failed"} & message.keys():
            return messages
        on_message(message)
    process.wait()
    return messages


def run(
    module: str, job: Mapping[str, Any], *, log: IO[bytes] | None = None, **options: Any
) -> dict[str, Any]:
    """Run a job in a child of its own and return its answer; options as `Worker.run`."""
    with Worker(module, log=log) as worker:
        return worker.run(job, **options)


@contextmanager
def killed_after(seconds: float | None, process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Kill the process if the block takes longer; the event tells whether it did. None: no limit."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(threading.TIMEOUT_MAX if seconds is None else seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def end(process: subprocess.Popen[bytes], *, grace_seconds: float = 10) -> None:
    """Ask a child to end by closing its input; kill it if it does not."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):  # it is gone already
            process.stdin.close()
    try:
        process.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
    _running.discard(process)


def end_all() -> None:
    """Kill every worker's child, in all threads, before this process stops."""
    for process in list(_running):
        end(process)


def ending(status: int) -> str:
    """What ended a process: the signal's name, ``exit status N``, or "" if it ended well."""
    if status >= 0:
        return f"exit status {status}" if status else ""
    return {number.value: number.name for number in signal.Signals}.get(-status, f"signal {-status}")


def died(
    cause: str, where: str | Path | None, messages: list[dict[str, Any]], log: list[str], doing: str = ""
) -> ChildDied:
    """The error for a child that ended without an answer; ``doing``: its last step."""
    stages = [message["stage"] for message in messages if "stage" in message]
    doing, reason = doing or (stages[-1] if stages else "at start"), telling_line(log)
    what = f"llama.cpp died {doing} ({cause or 'without an answer'}){f': {reason}' if reason else ''}"
    error = ChildDied(what, where=where, hint=HINTS.get(cause, "the last line of its log gives the cause"))
    error.cause, error.messages, error.log = cause, tuple(messages), tuple(log)
    _add_log(error, log)
    return error


def telling_line(log: list[str]) -> str:
    """The line of a log with the cause: a failed assertion, else the last line."""
    lines = [SOURCE_FOLDER.sub("", line).strip() for line in log if line.strip(" .")]
    asserted = [line for line in lines if "GGML_ASSERT" in line or "fatal error" in line]
    return (asserted or lines or [""])[-1][:300]


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}  # a library printed something
    return message if isinstance(message, dict) else {}


def _error(failed: dict[str, Any], log: list[str]) -> DfqsError:
    """The child's error: of the class with that name, else a DfqsError."""
    kinds: list[type[DfqsError]] = [DfqsError]
    for kind in kinds:  # it grows by those below each
        kinds += kind.__subclasses__()
    name = failed.pop("kind")
    _add_log(error := next((kind for kind in kinds if kind.__name__ == name), DfqsError)(**failed), log)
    return error


def _add_log(error: DfqsError, log: list[str]) -> None:
    if lines := [line for line in log if line.strip(" .")][-12:]:
        error.add_note("its last lines:\n  " + "\n  ".join(lines))


# ---- the child's side ----

_channel: IO[str] = sys.stdout


def serve(work: Callable[[dict[str, Any]], Mapping[str, Any] | None]) -> NoReturn:
    """Take jobs from standard input, do the work, and answer on standard output.

    Standard output carries messages only: what libraries print there goes to standard error. The process
    ends when its parent ends or closes the input, so no orphan writes beside a later run.
    """
    global _channel
    _channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(jobs,), daemon=True).start()
    while True:
        job = jobs.get()
        try:
            answer = {"answer": dict(work(job) or {})}
        except DfqsError as error:
            failed = {"what": error.what, "where": error.where, "hint": error.hint}
            answer = {"failed": failed | {"kind": type(error).__name__}}
        sys.stdout.flush()
        sys.stderr.flush()
        tell(**answer)


def tell(**facts: Any) -> None:
    """Send the parent an object: progress, or ``stage=...``, which the message of a failure will name."""
    _channel.write(json.dumps(facts, default=str) + "\n")
    _channel.flush()


def limit_memory(n_bytes: int) -> None:
    """Limit this process's address space, and write no core file, where the system has such limits."""
    with suppress(OSError, ValueError):  # macOS
        resource.setrlimit(resource.RLIMIT_AS, (n_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _receive(jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Hand on the parent's jobs; when it is gone, end this process and what it started."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)  # no teardown of a runtime that may crash in it
