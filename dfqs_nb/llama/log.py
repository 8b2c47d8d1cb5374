"""llama.cpp's log, kept line by line, and what it tells of a load, a plan or a refusal."""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfqs_nb.core.child import SOURCE_FOLDER
from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama.settings import llama_version

DEBUG, INFO, WARNING, ERROR, CONTINUES = 1, 2, 3, 4, 5  # ggml_log_level of ggml.h
MAX_LINES, MAX_LINE = 500, 2000  # that are kept, and their characters: a model's name can have 100,000


class LlamaLog:
    """The last lines that llama.cpp logged; ``echo``: the least level that standard error gets, too."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=MAX_LINES)
        self._open_line, self._level = "", 0
        self._callback: Any = None
        self.echo: int | None = None

    def install(self) -> None:
        """Take llama.cpp's log over (importing llama_cpp sets a callback that prints)."""
        import llama_cpp

        self._callback = self._callback or llama_cpp.llama_log_callback(self._receive)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        self._level = self._level if level == CONTINUES else level
        if self._level == DEBUG:
            return
        if self.echo is not None and self._level >= self.echo:
            os.write(2, text)
        *lines, self._open_line = (self._open_line + text.decode("utf-8", "replace")).split("\n")
        self._open_line = self._open_line[:MAX_LINE]
        self._lines.extend((self._level, line[:MAX_LINE]) for line in lines)

    def clear(self) -> None:
        """Forget the lines so far."""
        self._lines.clear()

    def tail(self, n_lines: int = MAX_LINES, level: int = 0) -> list[str]:
        """The last lines of at least this level (`WARNING`, `ERROR`), oldest first."""
        return [line for line_level, line in self._lines if line_level >= level][-n_lines:]


LOG = LlamaLog()


def loaded_facts(log: Sequence[str]) -> dict[str, Any]:
    """How a model was loaded: what ran, not what was asked for.

    ``layers_offloaded`` to a GPU, like ``0/9``; ``offloaded_layers``, this as a number (None: not logged);
    ``buffers`` of the weights; ``repacked``: weights were copied into another layout for this processor.

    >>> loaded_facts(["load_tensors:   CPU_Mapped model buffer size =     5.44 MiB"])["layers_offloaded"]
    'no GPU support'
    >>> loaded_facts(["load_tensors: offloaded 5/9 layers to GPU"])["offloaded_layers"]
    5
    """
    text = "\n".join(log)
    layers = re.search(r"offloaded ((\d+)/\d+) layers to GPU", text)
    buffers = re.findall(r"(\S+) +model buffer size = +([\d.]+) MiB", text)
    return {
        "layers_offloaded": layers[1] if layers else "no GPU support" if buffers else "not logged",
        "offloaded_layers": int(layers[2]) if layers else 0 if buffers else None,
        "buffers": ", ".join(f"{name} {size} MiB" for name, size in buffers),
        "repacked": any(re.search("REPACK|AMX|KLEIDIAI", name) for name, _ in buffers) if buffers else None,
    }


def planned_bytes(log: Sequence[str]) -> dict[str, int]:
    """Add up llama.cpp's logged buffers: KV cache with its state, and compute buffers in this memory."""
    text = "\n".join(log)
    kv = re.findall(r": size = +([\d.]+) MiB \(| state buffer size = +([\d.]+) MiB", text)
    compute = re.findall(r"(\S+) compute buffer size = +([\d.]+) MiB", text)
    here = [size for name, size in compute if name.startswith("CPU") or re.search("_Host$|MTL", name)]
    mebibytes = {"kv_bytes": [a or b for a, b in kv], "compute_bytes": here}
    return {name: round(sum(map(float, sizes)) * 2**20) for name, sizes in mebibytes.items()}


# ---- refusals ----

REFUSAL_HINTS = {  # by a word of llama.cpp's reason; the first that fits
    "unknown model architecture": "update llama-cpp-python, or convert the model again",
    "wrong number of tensors": "it holds tensors that this llama.cpp does not use (a vision part, for "
    "example) or lacks some: get a conversion made for llama.cpp",
    "key not found": "the file is in another dialect of its architecture: get a newer conversion",
    "split": "keep all shards under their own names in one folder, or merge them (01_merge_shards)",
    "not within the file bounds": "the file is cut off: resume or repeat the download",
    "quantized V cache": "pass flash_attn=True, or type_v='f16'",
    "tensor": "the file does not hold the tensors its header promises: get it again, or merge its shards",
    "": "inspect its header (02_inspect_header), or update llama-cpp-python",
}
# Names of functions, and words that only pass an error on.
_PREFIXES = re.compile(
    r"^(?:(?:\w+|error loading model(?: hyperparameters| vocabulary)?|failed to initialize the context): )+"
)
_PASSED_ON = re.compile(
    r"(?:llama_model_loader: )?failed to (?:load model(?: from .*)?|load GGUF split .*|read tensor data)"
)


def refusal(path: str | Path) -> ModelError:
    """The error for a file that llama.cpp has just declined in an orderly way, from what it logged."""
    reason = reason_of(LOG.tail(40, ERROR)) or "no reason given"
    what = f"llama.cpp refuses it: {reason}"
    if unknown := re.search(r"unknown model architecture: '([^']*)'", reason):
        runtime = f"this llama.cpp (llama-cpp-python {llama_version()})"
        what = f"{runtime} does not know the architecture {unknown[1]!r}"
    hint = next(hint for word, hint in REFUSAL_HINTS.items() if word in reason)
    error = ModelError(what, where=path, hint=hint)
    lines = [line for line in LOG.tail(40) if line.strip(" .")][-12:]
    error.add_note("llama.cpp's last lines:\n  " + "\n  ".join(lines or ["(none)"]))
    return error


def reason_of(log: Sequence[str]) -> str:
    """The line that says why: an assertion, else the first error that does not just pass a failure on.

    >>> reason_of(["gguf_init_from_file_ptr: failed to read magic", "x: error loading model: y"])
    'failed to read magic'
    """
    lines = [_PREFIXES.sub("", SOURCE_FOLDER.sub("", line).strip()) for line in log]
    asserted = [line for line in lines if "GGML_ASSERT" in line or "fatal error" in line]
    telling = [line for line in lines if line and not _PASSED_ON.fullmatch(line)]
    return (asserted or telling or lines or [""])[0]
