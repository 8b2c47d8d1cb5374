"""What runs inside the sandbox: a judge with the tests, and the candidate in a process of its own.

`sandbox` starts this text as a program, so it imports nothing of the package. The judge starts the same text
again as the candidate, and asks it for one call after another. Only plain data crosses between the two, so no
object of the candidate (such as one that claims to equal everything) reaches the tests, and the candidate's
process never sees a test. The judge reports on a descriptor that the candidate does not have.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import types
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from contextlib import suppress
from functools import partial
from typing import IO, Any, NoReturn

MOST_BYTES = 64 << 20  # of one message
BASES = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset)
PLAIN = {"builtins": [*(base.__name__ for base in BASES), "bytearray", "range", "slice", "iter"]}
PLAIN |= {"collections": ["OrderedDict", "Counter", "deque"], "fractions": ["Fraction"]}
PLAIN |= {"decimal": ["Decimal"], "datetime": ["date", "datetime", "time", "timedelta", "timezone"]}
LOAD = ""  # in place of a function's name: load the candidate


class Gone(Exception):
    """The candidate ended, or sent what it may not."""


class _Pickler(pickle.Pickler):
    """Writes plain data, a subclass of a plain type as that type, an iterator run to its end."""

    def reducer_override(self, value: Any) -> Any:
        kind = value if isinstance(value, type) or value is iter else type(value)
        if kind.__name__ in PLAIN.get(kind.__module__, ()):
            return NotImplemented
        base: Any
        for base in BASES:  # a subclass is read by the base class's own methods
            if isinstance(value, base) and base in (tuple, list, set, frozenset, dict):
                return base, (list(dict.items(value) if base is dict else base.__iter__(value)),)
            if isinstance(value, base):
                return base, (str.__str__(value) if base is str else base(value),)
        if isinstance(value, (Iterator, KeysView, ValuesView, ItemsView)):
            return iter, (list(value),)  # not a list: ``map(...) == [1]`` is false
        raise TypeError(f"a {kind.__name__} cannot cross between the tests and the code")


class _Unpickler(pickle._Unpickler):  # the one in Python: C's has no table
    """Reads plain types only, and changes no object that exists, so a pickle can run no code."""

    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch.pop(pickle.BUILD[0])

    def find_class(self, module: str, name: str) -> Any:
        if name not in PLAIN.get(module, ()):
            raise Gone(f"its answer holds {module}.{name}")
        return getattr(importlib.import_module(module), name)


def _send(pipe: IO[bytes], message: Any) -> None:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(message)
    pipe.write(buffer.tell().to_bytes(8, "little") + buffer.getbuffer())
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    head = pipe.read(8)
    n_bytes = int.from_bytes(head, "little")
    if n_bytes > MOST_BYTES:
        raise Gone(f"an answer of {n_bytes:,} bytes")
    raw = pipe.read(n_bytes)
    if len(head) < 8 or len(raw) < n_bytes:
        raise Gone
    return _Unpickler(io.BytesIO(raw)).load()


# ---- the judge ----


def judge() -> NoReturn:
    """Take the job from standard input, run its tests on the candidate, and write the outcome."""
    job = json.loads(sys.stdin.buffer.read())
    with suppress(OSError):  # standard input is no file
        os.ftruncate(0, 0)  # nobody reads the nonce again
    # older kernels count all processes of the user, so only the candidate gets that limit, when it runs
    tasks = job["limits"].pop("RLIMIT_NPROC", 0)
    _limit(job["limits"])
    if user := job["user"]:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    out = os.dup(1)
    os.set_inheritable(out, False)
    _silence()
    os.write(out, b"ready\n")
    pipe, command = subprocess.PIPE, [*sys.orig_argv, "candidate", str(tasks)]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    answer: dict[str, Any]
    try:
        _check(process, job)
        answer = {"outcome": "passed", "detail": "", "nonce": job["nonce"]}
    except (Gone, BrokenPipeError) as error:
        answer = {"detail": str(error)}
        try:
            answer["status"] = process.wait(0 if answer["detail"] else 2.0)
        except subprocess.TimeoutExpired:
            answer = {"outcome": "exited", "detail": answer["detail"] or "it closed its pipe"}
    except BaseException as error:
        kinds = {AssertionError: "wrong", MemoryError: "memory", SystemExit: "exited"}
        outcome = next((word for kind, word in kinds.items() if isinstance(error, kind)), "error")
        answer = {"outcome": outcome, "detail": getattr(error, "shown", _shown(error))}
    os.write(out, json.dumps(answer).encode())
    process.kill()
    os._exit(0)


def _check(process: subprocess.Popen[bytes], job: dict[str, Any]) -> None:
    """Load the candidate, and run the tests on its function here, beside the task's own code."""
    entry, namespace = job["entry_point"], dict[str, Any]()
    code = compile(f"{job['tests']}\ncheck({entry})", "<tests>", "exec", dont_inherit=True)
    _ask(process, LOAD, (job["sources"], entry), {})
    with suppress(SyntaxError):  # a task may break off anywhere: its tests then need nothing of it
        exec(compile(job["helpers"], "<task>", "exec", dont_inherit=True), namespace)
    namespace |= {entry: _function(process, entry), "__name__": "tests"}
    if job["tests"]:
        exec(code, namespace)


def _function(process: subprocess.Popen[bytes], name: str) -> Callable[..., Any]:
    """A function of the candidate. It changes its arguments as the call changed its copies of them."""

    def function(*args: Any, **named: Any) -> Any:
        value, changed = _ask(process, name, args, named)
        for old, new in zip(args, changed, strict=True):
            if type(old) is type(new) and isinstance(old, (list, dict, set, bytearray)) and old != new:
                old.clear()
                (old.extend if isinstance(old, (list, bytearray)) else old.update)(new)
        return value

    return function


def _ask(process: subprocess.Popen[bytes], name: str, args: Any, named: Any) -> Any:
    """What a function of the candidate returns, and its arguments after the call. Raises what it raises."""
    assert process.stdin is not None and process.stdout is not None
    _send(process.stdin, (name, args, named))
    what, *answer = _receive(process.stdout)
    if what == "value":
        return answer
    shown, base, text = answer
    error: BaseException = ValueError(text)
    kind = getattr(builtins, base)
    if isinstance(kind, type) and issubclass(kind, BaseException):  # `exec` is none
        with suppress(TypeError):  # UnicodeDecodeError and a few others take more than a text
            error = kind(text)
    error.__dict__["shown"] = shown  # what it was in the other process
    raise error


# ---- the candidate ----


def candidate(tasks: int) -> NoReturn:
    """Answer what the judge asks, until it ends."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _silence()
    if tasks:
        _limit({"RLIMIT_NPROC": tasks})
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # `site` is left out
    module = types.ModuleType("candidate")
    module.__file__ = "/tmp/candidate.py"
    sys.modules["candidate"] = module
    try:
        while True:
            name, args, named = _receive(incoming)
            try:
                call = partial(_load, module) if name == LOAD else getattr(module, name)
                _send(outgoing, ("value", call(*args, **named), args))
            except BaseException as error:
                kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
                _send(outgoing, ("error", _shown(error), kind, _shown(error).partition(": ")[2]))
    finally:
        os._exit(0)  # no thread, hook or buffer of the candidate delays the end


def _load(module: types.ModuleType, sources: list[str], entry: str) -> None:
    """Run the texts as one module."""
    for source in sources:
        exec(compile(source.lstrip("\ufeff"), "<candidate>", "exec", dont_inherit=True), module.__dict__)
    if entry and entry not in module.__dict__:
        raise NameError(f"name {entry!r} is not defined")


def _shown(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except Exception:
        return type(error).__name__


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = value + (name == "RLIMIT_CPU")  # SIGXCPU says why, SIGKILL a second later does not
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (min(value, most), most))


def _silence() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


if __name__ == "__main__":
    candidate(int(sys.argv[2])) if sys.argv[1:2] == ["candidate"] else judge()
