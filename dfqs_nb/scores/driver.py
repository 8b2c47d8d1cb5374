"""What runs inside the sandbox: a judge with the tests, and the candidate in a process of its own.

`sandbox` starts this file's text as a program, so it imports nothing of the package. The judge starts the
same text again as the candidate. The two exchange pickles that may hold plain data only, so an object that
says it equals everything arrives as a handle and equals nothing; and the candidate's process never sees a
test. The judge reports on a descriptor that the candidate does not have.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import types
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import IO, Any, NoReturn

MOST_BYTES = 64 << 20  # of one message
BASES = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset)
PLAIN = {
    "builtins": (*(base.__name__ for base in BASES), "bytearray", "range", "slice"),
    "collections": ("OrderedDict", "Counter", "deque"),
    "fractions": ("Fraction",),
    "decimal": ("Decimal",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
}
# not `__contains__`: an object that says it holds everything is searched item by item instead
FORWARDED = tuple(f"__{name}__" for name in "len iter next getitem setitem hash enter exit str repr".split())
# what these lead to: the tests, and every built-in function of their process
INNER = (types.ModuleType, types.FrameType, types.CodeType, types.TracebackType)


class Gone(Exception):
    """The other process ended."""


class _Handle:
    """An object of the other process: it can be called and asked, but equals only what is its equal there."""

    def __init__(self, peer: _Peer, number: int) -> None:
        self.__dict__.update(_peer=peer, _number=number)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("get", self._number, name)

    def __call__(self, *args: Any, **named: Any) -> Any:
        value, changed = self._peer.ask("call", self._number, args, named)
        _change(args, changed)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("put", self._number, name, value)

    def __bool__(self) -> bool:
        return bool(self._peer.ask("true", self._number))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handle) and bool(self._peer.ask("same", self._number, other))


def _forward(name: str) -> Callable[..., Any]:
    def method(self: _Handle, *args: Any) -> Any:
        try:
            return self.__getattr__(name)(*args)
        except AttributeError as error:  # what Python raises for an object without that method
            raise TypeError(str(error)) from None

    return method


for _name in FORWARDED:
    setattr(_Handle, _name, _forward(_name))


def _change(mine: Iterable[Any], theirs: Iterable[Any]) -> None:
    """Change arguments as the call changed its copies of them."""
    for old, new in zip(mine, theirs, strict=False):
        if type(old) is not type(new) or not isinstance(old, (list, dict, set, bytearray)) or old == new:
            continue
        if isinstance(old, (list, bytearray)):
            old[:] = new
        else:
            old.clear()
            old.update(new)


class _Peer:
    """One end of the pipe: it asks, and while it waits for the answer it answers what the other end asks."""

    def __init__(self, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        objects = self.objects = dict[int, Any]()  # what the other end has handles of
        self.operations: dict[str, Callable[..., Any]] = {
            "get": lambda number, name: getattr(objects[number], _open(name)),
            "put": lambda number, name, value: setattr(objects[number], _open(name), value),
            "call": lambda number, args, named: (objects[number](*args, **named), args),
            "true": lambda number: bool(objects[number]),
            "same": lambda number, other: bool(objects[number] == other),
        }

    def ask(self, operation: str, *args: Any) -> Any:
        self.send(("ask", operation, args))
        while True:
            kind, *rest = self.receive()
            if kind == "ask":
                self.answer(*rest)
            elif kind == "value":
                return rest[0]
            else:
                raise _rebuilt(*rest)

    def answer(self, operation: str, args: tuple[Any, ...]) -> None:
        try:
            if operation not in self.operations:
                raise Gone(f"it asks for {operation}")
            self.send(("value", self.operations[operation](*args)))
        except Gone:
            raise
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            self.send(("error", type(error).__name__, kinds, _text(error)))

    def send(self, message: tuple[Any, ...]) -> None:
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, protocol=5)
        pickler.peer = self
        pickler.dump(message)
        self.outgoing.write(struct.pack("<Q", buffer.tell()) + buffer.getbuffer())
        self.outgoing.flush()

    def receive(self) -> tuple[Any, ...]:
        size = self.incoming.read(8)
        if len(size) < 8:
            raise Gone
        n_bytes = struct.unpack("<Q", size)[0]
        if n_bytes > MOST_BYTES:
            raise Gone(f"an answer of {n_bytes:,} bytes")
        raw = self.incoming.read(n_bytes)
        if len(raw) < n_bytes:
            raise Gone
        unpickler = _Unpickler(io.BytesIO(raw))
        unpickler.peer = self
        message: tuple[Any, ...] = unpickler.load()
        return message


def _open(name: str) -> str:
    """The name of an attribute that the other process may ask for: ``__globals__`` would show the tests."""
    if name.startswith("_") and name not in FORWARDED:
        raise AttributeError(name)
    return name


class _Pickler(pickle.Pickler):
    """Plain data as it is, a subclass of a plain type as that type, anything else as a handle."""

    peer: _Peer

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        named = value if isinstance(value, type) else kind
        if value is _marked or named.__name__ in PLAIN.get(named.__module__, ()):
            return NotImplemented
        if kind is _Handle and value._peer is self.peer:
            return _marked, ("yours", value._number)
        if kind.__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            return _marked, ("plain", value.item())
        for base in BASES:
            if isinstance(value, base):
                return base, (_stripped(base, value),)
        if isinstance(value, INNER):
            raise TypeError(f"a {kind.__name__} stays in its process")
        self.peer.objects[id(value)] = value
        return _marked, ("mine", id(value))


class _Unpickler(pickle._Unpickler):  # the one in Python: C's has no table
    """Takes plain types and handles only, and changes no object that exists: a pickle can run no code."""

    peer: _Peer
    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch.pop(pickle.BUILD[0])

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (__name__, "_marked"):
            return self.meaning
        if name in PLAIN.get(module, ()):
            return getattr(__import__(module), name)
        raise Gone(f"its answer holds {module}.{name}")

    def meaning(self, mark: str, value: Any) -> Any:
        if mark == "yours":
            return self.peer.objects[value]
        return _Handle(self.peer, value) if mark == "mine" else value


def _marked(mark: str, value: Any) -> Any:
    """A name in a pickle, into which the other end reads its own `_Unpickler.meaning`."""


def _stripped(base: type, value: Any) -> Any:
    """The value of a subclass, read by the base class's own methods."""
    if base is dict:
        return list(dict.items(value))
    if base in (tuple, list, set, frozenset):
        return list(base.__iter__(value))
    return str.__str__(value) if base is str else base(value)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except Exception:
        return ""


def _rebuilt(name: str, kinds: list[str], text: str) -> BaseException:
    """The nearest built-in exception; `shown` says what it was in the other process."""
    for kind in kinds:
        try:
            error: BaseException = getattr(builtins, kind)(text)
        except TypeError:
            continue  # UnicodeDecodeError and a few others take more than a text
        error.__dict__["shown"] = f"{name}: {text}"
        return error
    return Exception(text)


# ---- the two processes ----


def judge() -> NoReturn:
    """Take the job from standard input, run its tests on the candidate, and write the outcome."""
    job = json.loads(sys.stdin.buffer.read())
    # older kernels count all processes of the user, so only the candidate gets that limit, when it runs
    tasks = job["limits"].pop("RLIMIT_NPROC", 0)
    _limit(job["limits"])
    if job["user"]:
        os.setgroups([])
        os.setgid(job["user"])
        os.setuid(job["user"])
    out = os.dup(1)
    os.set_inheritable(out, False)
    _silence()
    os.write(out, b"ready\n")
    process = subprocess.Popen(
        [*sys.orig_argv, "candidate", str(tasks)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None and process.stdout is not None
    answer: dict[str, Any]
    try:
        _check(_Peer(process.stdout, process.stdin), job)
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
        shown = getattr(error, "shown", f"{type(error).__name__}: {_text(error)}")
        answer = {"outcome": outcome, "detail": shown[:300]}
    os.write(out, json.dumps(answer).encode())
    process.kill()
    os._exit(0)


def _check(candidate: _Peer, job: dict[str, Any]) -> None:
    """Load the candidate, and run the tests on it here."""
    if not job["tests"]:
        candidate.ask("load", job["sources"], [])
        return
    entry = job["entry_point"]
    code = compile(f"{job['tests']}\ncheck({entry})", "<tests>", "exec", dont_inherit=True)
    # its own `all` or `math` would judge its answers
    names = [name for name in _names(code) if not hasattr(builtins, name)]
    namespace, modules = candidate.ask("load", job["sources"], [entry, *names])
    function = namespace[entry]
    modules |= {name: name for name in namespace if name in sys.stdlib_module_names}
    for name, module in modules.items():
        if module.partition(".")[0] in (*sys.stdlib_module_names, "numpy"):
            namespace[name] = importlib.import_module(module)
    with suppress(SyntaxError):  # a task may break off anywhere: its tests then need nothing of it
        exec(compile(job["helpers"], "<task>", "exec", dont_inherit=True), namespace)
    namespace |= {entry: function, "__name__": "tests"}
    exec(code, namespace)


def _names(code: types.CodeType) -> list[str]:
    inner = (name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part))
    return [*code.co_names, *inner]


def _load(sources: list[str], names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Run the candidate's texts as one module, and give what the tests name of it; modules by their names."""
    module = types.ModuleType("candidate")
    module.__file__ = "/tmp/candidate.py"
    sys.modules["candidate"] = module
    for source in sources:
        exec(compile(source.lstrip("\ufeff"), "<candidate>", "exec", dont_inherit=True), module.__dict__)
    if names and names[0] not in module.__dict__:
        raise NameError(f"name {names[0]!r} is not defined")
    given = {name: module.__dict__[name] for name in names if name in module.__dict__}
    modules = {name: value.__name__ for name, value in given.items() if isinstance(value, types.ModuleType)}
    return {name: value for name, value in given.items() if name not in modules}, modules


def candidate(tasks: int) -> NoReturn:
    """Answer what the judge asks, until it ends."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _silence()
    if tasks:
        _limit({"RLIMIT_NPROC": tasks})
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # `site` defines them, which is left out
    peer = _Peer(incoming, outgoing)
    peer.operations["load"] = _load
    try:
        while True:
            _, operation, args = peer.receive()
            peer.answer(operation, args)
    finally:
        os._exit(0)  # no thread, hook or buffer of the candidate delays the end


def _limit(limits: dict[str, int]) -> None:
    try:
        import resource
    except ImportError:  # no limits on Windows
        return
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
