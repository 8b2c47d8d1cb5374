"""How a model is opened: settings, llama.cpp's parameters made from them, and llama.cpp's log.

llama-cpp-python does not expose every parameter of llama.cpp. Two that it hides matter here:
``use_extra_bufts`` and ``cb_eval``. So `default_model_params` and `default_context_params` change the
defaults while a model is built.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqs_nb.core.child import SOURCE_FOLDER
from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.gguf.memory import CACHE_TYPES
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.gguf.types import TENSOR_TYPES

# ggml_type of the KV cache types, from ggml.h
GGML_TYPES = {name.lower(): code for code, (name, *_) in TENSOR_TYPES.items() if name.lower() in CACHE_TYPES}
MAX_LINE = 2000  # characters kept of a line of the log: a model's name can have 100,000
MAX_CTX = 2**31 - 256
SMALL_MODEL_BYTES = 64 << 20
PAGING = ("auto", "on", "off")
COUNTS = ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch")
DEBUG, INFO, WARNING, ERROR, CONTINUES = 1, 2, 3, 4, 5  # ggml_log_level of ggml.h


@dataclass(frozen=True)
class OpenSettings:
    """How a model is opened: every field is a condition of what is measured with it.

    Args:
        n_ctx: tokens of context.
        n_batch, n_ubatch: tokens handed over, and computed, at once in prefill.
        n_threads, n_threads_batch: threads in decode and in prefill; None: the usable physical cores.
        n_gpu_layers: layers put on the GPU; -1: all.
        seed: of the sampler; greedy decoding does not use it.
        flash_attn: flash attention; a quantized V cache needs it.
        type_k, type_v: element types of the KV cache.
        use_mmap: map the weights, so that they need not fit in memory.
        use_extra_bufts: repack weights for this CPU. False by default: it crashes on CPUs with AMX
            (ggml-org/llama.cpp#20824) and keeps a second copy of the weights in memory.
        swa_full: keep all tokens in sliding-window layers; llama.cpp's default True multiplies the cache.
        paging: help for a file larger than memory (`llama.paging`): ``auto`` (where it is larger), ``on`` or
            ``off``. It changes no number that is computed, only the time.

    Raises:
        ModelError: a count below its minimum, an unknown cache type, or another word for ``paging``.
    """

    n_ctx: int = 4096
    n_batch: int = 512
    n_ubatch: int = 512
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int = 0
    seed: int = 42
    flash_attn: bool = False
    type_k: str = "f16"
    type_v: str = "f16"
    use_mmap: bool = True
    use_extra_bufts: bool = False
    swa_full: bool = False
    paging: str = "auto"

    def __post_init__(self) -> None:
        threads = self.n_threads or usable_cores()
        object.__setattr__(self, "n_threads", threads)
        object.__setattr__(self, "n_threads_batch", self.n_threads_batch or threads)
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}", hint="use 1 or more")
        if self.n_ctx > MAX_CTX:
            raise ModelError(f"n_ctx is {self.n_ctx:,}", hint=f"use at most {MAX_CTX:,}")
        for name in ("type_k", "type_v"):
            if getattr(self, name) not in GGML_TYPES:
                hint = f"use one of {', '.join(GGML_TYPES)}"
                raise ModelError(f"{name} is {getattr(self, name)!r}", hint=hint)
        if self.paging not in PAGING:
            raise ModelError(f"paging is {self.paging!r}", hint=f"use one of {', '.join(PAGING)}")

    @classmethod
    def of(
        cls, path: str | Path, *, n_ctx: int = 0, n_threads: int = 0, n_gpu_layers: int = -1, **fields: Any
    ) -> OpenSettings:
        """Settings that suit a model on this machine.

        Args:
            n_ctx: tokens of context, at most the model's own limit; 0: that limit.
            n_threads: 0: one for a tiny model, else all usable cores.
            n_gpu_layers: none where this llama.cpp has no GPU support; -1: all.
        """
        limit = own_context(path)
        n_ctx = min(n_ctx or limit, limit) if limit else n_ctx or cls.n_ctx
        layers, threads = n_gpu_layers if has_gpu_support() else 0, n_threads or threads_for(path)
        return cls(n_ctx=n_ctx, n_threads=threads, n_gpu_layers=layers, **fields)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a report's conditions."""
        return dataclasses.asdict(self)


def threads_for(path: str | Path) -> int:
    """Threads that suit the model: one where handing work around costs more than it saves, else all cores.

    A model of under 64 MB computes a token in a millisecond; a second thread then mostly waits for the first.
    """
    return 1 if open_shards(path).nbytes < SMALL_MODEL_BYTES else usable_cores()


def own_context(path: str | Path) -> int:
    """The model's own limit of context in tokens; 0 where its header does not state one."""
    limit = open_shards(path).headers[0].arch("context_length")
    return limit if isinstance(limit, int) and 0 < limit <= MAX_CTX else 0


def has_gpu_support() -> bool:
    """Whether this build of llama.cpp, on this machine, can put layers on a GPU."""
    import llama_cpp

    return bool(llama_cpp.llama_supports_gpu_offload())


def llama_version() -> str:
    """The version of llama-cpp-python, which pins the llama.cpp inside."""
    import llama_cpp

    return str(llama_cpp.__version__)


# ---- llama.cpp's log ----


class LlamaLog:
    """The last lines that llama.cpp logged in this process; nothing of it is printed."""

    def __init__(self, n_lines: int = 500) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=n_lines)
        self._open_line = ""
        self._level = 0
        self._callback: Any = None
        self.echo: int | None = None  # the least level of what is also written to standard error

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

    def tail(self, n_lines: int = 12, level: int = 0) -> list[str]:
        """The last lines of at least this level (`WARNING`, `ERROR`), oldest first."""
        return [line for line_level, line in self._lines if line_level >= level][-n_lines:]


LOG = LlamaLog()


# ---- parameters that llama-cpp-python does not expose ----

_building = threading.RLock()  # a context's parameters are set around its model's


@contextlib.contextmanager
def _replaced(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Pass what the function ``owner.name`` returns through ``change``. It is put back, also on errors."""
    with _building:
        original = getattr(owner, name)
        setattr(owner, name, lambda *arguments: change(original(*arguments)))
        try:
            yield
        finally:
            setattr(owner, name, original)


def _default_params(maker: str, fields: dict[str, object]) -> contextlib.AbstractContextManager[None]:
    import llama_cpp.llama_cpp as api

    def change(params: Any) -> Any:
        for name, value in fields.items():
            setattr(params, name, value)
        return params

    return _replaced(api, maker, change)


def default_model_params(**fields: object) -> contextlib.AbstractContextManager[None]:
    """Make llama.cpp's default model parameters carry ``fields`` while a model is built."""
    return _default_params("llama_model_default_params", fields)


def default_context_params(**fields: object) -> contextlib.AbstractContextManager[None]:
    """The same for the parameters of its context."""
    return _default_params("llama_context_default_params", fields)


def build_llama(path: str | Path, settings: OpenSettings) -> Any:
    """A ``llama_cpp.Llama`` of this file with exactly these settings, opened in this process.

    Raises:
        ModelError: llama.cpp refuses the file. A file that aborts it ends this process: see `check.trial`.
    """
    import llama_cpp
    import llama_cpp.llama_cpp as api
    from llama_cpp._internals import LlamaModel

    from dfqs_nb.llama.paging import Paging

    def without_templates(metadata: dict[str, str]) -> dict[str, str]:
        # `Llama` parses every chat template at once and fails on any; we render them ourselves
        return {name: text for name, text in metadata.items() if "tokenizer.chat_template" not in name}

    LOG.install()
    LOG.clear()
    names = (*COUNTS, "n_gpu_layers", "flash_attn", "use_mmap", "swa_full")
    paging = Paging.of(path, settings)
    listening = paging.callback(api.llama_context_default_params().cb_eval) if paging else {}
    try:
        with (
            default_model_params(use_extra_bufts=settings.use_extra_bufts),
            default_context_params(**listening),
            _replaced(LlamaModel, "metadata", without_templates),
            paging.loading() if paging else contextlib.nullcontext(),
        ):
            llama: Any = llama_cpp.Llama(
                model_path=str(path),
                verbose=False,
                type_k=GGML_TYPES[settings.type_k],
                type_v=GGML_TYPES[settings.type_v],
                **{name: getattr(settings, name) for name in names},
            )
    except ValueError as error:
        raise refusal(path) from error
    llama.set_seed(settings.seed)
    llama.paging = paging
    if paging is not None:
        llama._stack.callback(paging.close)
        paging.start(LOG.tail(500))
    return llama


# ---- refusals ----

REFUSAL_HINTS = (
    ("unknown model architecture", "update llama-cpp-python, or convert the model again"),
    (
        "wrong number of tensors",
        "it holds tensors that this llama.cpp does not use (a vision part, for example) or lacks some: get a "
        "conversion made for llama.cpp",
    ),
    ("key not found", "the file is in another dialect of its architecture: get a newer conversion"),
    ("split", "keep all shards under their own names in one folder, or merge them (01_merge_shards)"),
    ("not within the file bounds", "the file is cut off: resume or repeat the download"),
    ("quantized V cache", "pass flash_attn=True, or type_v='f16'"),
    ("tensor", "the file does not hold the tensors its header promises: get it again, or merge its shards"),
    ("", "inspect its header (02_inspect_header), or update llama-cpp-python"),
)
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
    hint = next(hint for word, hint in REFUSAL_HINTS if word in reason)
    if unknown := re.search(r"unknown model architecture: '([^']*)'", reason):
        runtime = f"this llama.cpp (llama-cpp-python {llama_version()})"
        what = f"{runtime} does not know the architecture {unknown[1]!r}"
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
