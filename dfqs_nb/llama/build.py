"""Build llama-cpp-python's ``Llama`` with the parameters of llama.cpp that it does not expose.

Two of them matter here: ``use_extra_bufts`` and ``cb_eval``. So `default_params` changes llama.cpp's defaults
while a model is built.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dfqs_nb.llama.log import LOG, refusal
from dfqs_nb.llama.paging import Paging
from dfqs_nb.llama.settings import COUNTS, GGML_TYPES, OpenSettings

_NO_DEVICES = (ctypes.c_void_p * 1)()  # a list of devices that ends at once
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


def _with(fields: Mapping[str, Any], params: Any) -> Any:
    for name, value in fields.items():
        setattr(params, name, value)
    return params


@contextlib.contextmanager
def default_params(model: Mapping[str, Any] | None = None, **context: Any) -> Iterator[None]:
    """Make llama.cpp's default parameters of a model and of a context carry these while one is built."""
    import llama_cpp.llama_cpp as api

    with (
        _replaced(api, "llama_model_default_params", partial(_with, model or {})),
        _replaced(api, "llama_context_default_params", partial(_with, context)),
    ):
        yield


def model_params(settings: OpenSettings) -> dict[str, Any]:
    """llama.cpp's parameters of a model that ``llama_cpp.Llama`` does not take.

    Without a layer on a GPU it gets no device: else it computes large batches on a GPU that it was built for.
    """
    devices = {} if settings.n_gpu_layers else {"devices": ctypes.addressof(_NO_DEVICES)}
    return {"use_extra_bufts": settings.use_extra_bufts, **devices}


def set_context(params: Any, settings: OpenSettings) -> None:
    """Set llama.cpp's parameters of a context as ``llama_cpp.Llama`` sets them."""
    for name in ("n_ctx", "n_threads", "n_threads_batch", "swa_full"):
        setattr(params, name, getattr(settings, name))
    params.n_batch = min(settings.n_ctx, settings.n_batch)
    params.n_ubatch = min(params.n_batch, settings.n_ubatch)
    params.type_k, params.type_v = GGML_TYPES[settings.type_k], GGML_TYPES[settings.type_v]
    params.flash_attn_type = int(settings.flash_attn)  # LLAMA_FLASH_ATTN_TYPE_DISABLED or ENABLED


def build_llama(path: str | Path, settings: OpenSettings) -> Any:
    """A ``llama_cpp.Llama`` of this file with exactly these settings, opened in this process.

    Its ``paging`` is the `Paging` help, or None.

    Raises:
        ModelError: llama.cpp refuses the file. A file that aborts it ends this process: see `check.trial`.
    """
    import llama_cpp
    import llama_cpp.llama_cpp as api
    from llama_cpp._internals import LlamaModel

    def without_templates(metadata: dict[str, str]) -> dict[str, str]:
        # `Llama` parses every chat template at once and fails on any; we render them ourselves
        return {name: text for name, text in metadata.items() if "tokenizer.chat_template" not in name}

    LOG.install()
    LOG.clear()
    names = (*COUNTS, "n_gpu_layers", "flash_attn", "use_mmap", "swa_full")
    fields: dict[str, Any] = {name: getattr(settings, name) for name in names}
    fields |= {name: GGML_TYPES[getattr(settings, name)] for name in ("type_k", "type_v")}
    paging = Paging.of(path, settings)
    listening = paging.callback(api.llama_context_default_params().cb_eval) if paging else {}
    try:
        with (
            default_params(model_params(settings), **listening),
            _replaced(LlamaModel, "metadata", without_templates),
            paging.loading() if paging else contextlib.nullcontext(),
        ):
            llama: Any = llama_cpp.Llama(str(path), verbose=False, **fields)
    except ValueError as error:
        raise refusal(path) from error
    llama.set_seed(settings.seed)
    llama.paging = paging
    if paging is not None:
        llama._stack.callback(paging.close)
        paging.start(LOG.tail())
    return llama
