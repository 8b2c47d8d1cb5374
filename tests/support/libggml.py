"""What libggml's own parser reads of a file, in a child process that may crash: ``python -m libggml``."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqs_nb.core import child
from dfqs_nb.llama.__main__ import GgufParams
from dfqs_nb.llama.graph import ggml_function
from dfqs_nb.llama.log import LOG

SUPPORT = str(Path(__file__).parent)


@dataclass(frozen=True)
class Row:
    """One row of libggml's tensor table; ``offset`` counts from the data section."""

    name: str
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Table:
    """What libggml read from one file that it takes."""

    version: int
    n_kv: int
    n_tensors: int
    alignment: int
    data_offset: int
    tensors: tuple[Row, ...]


def tables(paths: Sequence[str | Path]) -> list[Table]:
    """The tables of these files, each of which libggml takes."""
    found, before = [], os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SUPPORT, before]))
    try:
        with child.Worker("libggml") as worker:
            for path in paths:
                facts = worker.run({"path": str(path)}, timeout_seconds=60)
                rows = tuple(Row(*row) for row in facts.pop("tensors"))
                found.append(Table(**facts, tensors=rows))
    finally:
        os.environ["PYTHONPATH"] = before
    return found


def table(path: str | Path) -> Table:
    """The table of one file."""
    return tables([path])[0]


def _read(job: dict[str, Any]) -> dict[str, Any]:
    LOG.install()
    void, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    u32, i64 = ctypes.c_uint32, ctypes.c_int64
    context = void()
    read = ggml_function("gguf_init_from_file", void, text, GgufParams)
    gguf = read(os.fsencode(job["path"]), GgufParams(True, ctypes.pointer(context)))
    assert gguf, LOG.tail()
    numbers = {"version": u32, "n_kv": i64, "n_tensors": i64, "alignment": size, "data_offset": size}
    facts = {name: ggml_function(f"gguf_get_{name}", kind, void)(gguf) for name, kind in numbers.items()}
    type_name = ggml_function("ggml_type_name", text, ctypes.c_int)
    columns = {"name": text, "type": ctypes.c_int, "offset": size, "size": size}
    get = [ggml_function(f"gguf_get_tensor_{name}", kind, void, i64) for name, kind in columns.items()]
    rows = [[function(gguf, i) for function in get] for i in range(facts["n_tensors"])]
    facts["tensors"] = [
        (name.decode("utf-8", "surrogateescape"), type_name(code).decode().upper(), offset, nbytes)
        for name, code, offset, nbytes in rows
    ]
    ggml_function("gguf_free", None, void)(gguf)
    ggml_function("ggml_free", None, void)(context)
    return facts


if __name__ == "__main__":
    child.serve(_read)
