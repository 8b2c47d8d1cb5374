"""llama.cpp's own opinion of a GGUF header, asked in a child process.

The parser is ``gguf_init_from_file`` of libggml-base (``ggml/include/gguf.h``), which llama-cpp-python
installs. A hostile header can abort the process that parses it, or ask for all of its memory; so a bare
interpreter with a ceiling on its address space asks, and only its answer comes back.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dfqs_nb.core.errors import ModelError

ADDRESS_SPACE_BYTES = 4 << 30
TIMEOUT_SECONDS = 60.0
_BUILD_FOLDER = re.compile(r"\S*/vendor/llama\.cpp/")  # an assertion names the source as it was compiled

# The child: stdlib only (`python -I -S`), one JSON line a file on stdout; what libggml says, on stderr,
# is cut at the NUL that the child writes after each file.
_CHILD = r"""
import ctypes, json, os, sys
library, limit, with_tensors, *paths = sys.argv[1:]
try:
    import resource
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), hard))
except (ImportError, OSError, ValueError):
    pass  # a system without such limits (macOS, Windows)
ggml = ctypes.CDLL(library)

class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]

def declare(name, result, *arguments):
    function = getattr(ggml, name)
    function.restype, function.argtypes = result, arguments
    return function

void, text, i64, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t
init = declare("gguf_init_from_file", void, text, Params)
gguf_free, ggml_free = declare("gguf_free", None, void), declare("ggml_free", None, void)
of_context = {
    "version": declare("gguf_get_version", ctypes.c_uint32, void),
    "n_kv": declare("gguf_get_n_kv", i64, void),
    "n_tensors": declare("gguf_get_n_tensors", i64, void),
    "alignment": declare("gguf_get_alignment", size, void),
    "data_offset": declare("gguf_get_data_offset", size, void),
}
tensor_name = declare("gguf_get_tensor_name", text, void, i64)
tensor_type = declare("gguf_get_tensor_type", ctypes.c_int, void, i64)
tensor_offset = declare("gguf_get_tensor_offset", size, void, i64)
tensor_size = declare("gguf_get_tensor_size", size, void, i64)
type_name = declare("ggml_type_name", text, ctypes.c_int)

def tensor(gguf, i):
    name = tensor_name(gguf, i).decode("utf-8", "surrogateescape")
    kind = type_name(tensor_type(gguf, i)).decode().upper()
    return name, kind, tensor_offset(gguf, i), tensor_size(gguf, i)

def answer(path):
    tensors = void()  # llama.cpp always asks for the tensors' table too, without their data
    gguf = init(os.fsencode(path), Params(True, ctypes.pointer(tensors)))
    if not gguf:
        return {"accepted": False}
    facts = {name: function(gguf) for name, function in of_context.items()}
    if with_tensors == "1":
        facts["tensors"] = [tensor(gguf, i) for i in range(facts["n_tensors"])]
    gguf_free(gguf)
    ggml_free(tensors)
    return {"accepted": True, **facts}

for path in paths:
    print(json.dumps(answer(path)), flush=True)
    os.write(2, b"\0")
"""


@dataclass(frozen=True)
class GGMLTensor:
    """One row of libggml's tensor table; ``offset`` counts from the data section."""

    name: str
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGMLParse:
    """What libggml made of one file; the numbers are 0 when it refused it.

    ``message`` holds the lines that llama.cpp logged; ``death`` names the signal (or ``"timeout"``) when
    the parser did not survive the file.
    """

    accepted: bool
    message: str = ""
    death: str = ""
    version: int = 0
    n_kv: int = 0
    n_tensors: int = 0
    alignment: int = 0
    data_offset: int = 0
    tensors: tuple[GGMLTensor, ...] = ()


def library_path() -> Path:
    """The libggml-base that llama-cpp-python brought, found without importing (and initialising) it.

    Raises:
        ModelError: llama-cpp-python is not installed, or holds no such library.
    """
    spec = find_spec("llama_cpp")
    folders = [Path(place) / "lib" for place in (spec.submodule_search_locations or ())] if spec else []
    if os.environ.get("LLAMA_CPP_LIB_PATH"):  # llama-cpp-python's own override
        folders.insert(0, Path(os.environ["LLAMA_CPP_LIB_PATH"]))
    for folder in folders:
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll"):
            if (folder / name).exists():
                return folder / name
    raise ModelError("libggml-base is not installed", hint="install llama-cpp-python: make run does it")


def parse(path: str | Path, *, tensors: bool = False, timeout_seconds: float = TIMEOUT_SECONDS) -> GGMLParse:
    """Ask llama.cpp's parser about one file: the same call that opens a model, without its data.

    With ``tensors=True`` the answer carries libggml's tensor table.

    Raises:
        ModelError: libggml is not installed, or the child process cannot run it at all.
    """
    return parse_all([path], tensors=tensors, timeout_seconds=timeout_seconds)[0]


def parse_all(
    paths: Sequence[str | Path], *, tensors: bool = False, timeout_seconds: float = TIMEOUT_SECONDS
) -> list[GGMLParse]:
    """Ask about many files in as few processes as they leave alive (see `parse`)."""
    answers: list[GGMLParse] = []
    while len(answers) < len(paths):
        answers += _ask(paths[len(answers) :][:512], tensors, timeout_seconds)
    return answers


def _ask(paths: Sequence[str | Path], tensors: bool, timeout_seconds: float) -> Iterator[GGMLParse]:
    """The answers of one child: one for each file up to, and with, the one that killed it."""
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        _CHILD,
        str(library_path()),
        str(ADDRESS_SPACE_BYTES),
        str(int(tensors)),
        *(os.path.abspath(path) for path in paths),
    ]
    lines, stderr, death = _run(command, timeout_seconds)
    if not lines and not death.startswith(("SIG", "timeout")):
        raise ModelError(
            f"cannot run libggml ({stderr.strip() or death})",
            where=library_path(),
            hint="install llama-cpp-python again",
        )
    messages = [_BUILD_FOLDER.sub("", message).strip() for message in stderr.split("\0")]
    for line, message in zip(lines, messages, strict=False):
        facts = json.loads(line)
        table = tuple(GGMLTensor(*row) for row in facts.pop("tensors", ()))
        yield GGMLParse(message=message, tensors=table, **facts)
    if len(lines) < len(paths):
        yield GGMLParse(False, message=messages[-1] or f"llama.cpp's parser died ({death})", death=death)


def _run(command: list[str], timeout_seconds: float) -> tuple[list[str], str, str]:
    """Run the child; return its lines, its stderr, and how it ended when not well."""
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=timeout_seconds,
                env=environment,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            death = "timeout"
        else:
            death = _death(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return [line for line in texts[0].split("\n")[:-1] if line], texts[1], death


def _death(status: int) -> str:
    """The name of what ended a process with this exit status.

    >>> _death(-6), _death(1), _death(0)
    ('SIGABRT', 'exit status 1', '')
    """
    if status >= 0:
        return f"exit status {status}" if status else ""
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
