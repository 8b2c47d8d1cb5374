"""How a model is built or only planned through llama-cpp-python, and what llama.cpp logs of it."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.machine import read_bytes
from dfqs_nb.gguf.shards import Files, ShardSet, open_shards
from dfqs_nb.llama.check import REFUSES, reason_of
from dfqs_nb.llama.graph import Paging, ggml_function
from dfqs_nb.llama.log import ERROR, LOG
from dfqs_nb.llama.settings import GGML_TYPES, OpenSettings

BUFFER = re.compile(r"(\S+) +(?:DSV4 \w+ )?(model|KV|RS|state|compute) buffer size = +([\d.]+) MiB")
KINDS = {"model": "weights", "KV": "KV cache", "compute": "compute buffers"}
HERE, HERE_NAMES = "in memory", re.compile(r"^(?:CPU|AMX|MTL)|_Host$")  # a Mac's GPU (MTL) has no other
TELLING_BYTES = 1 << 30  # read by a load whose speed is the disk's, and not the tokenizer's
INTEGRATED = 2  # ggml_backend_dev_type of a GPU that uses this memory, as in laptops
_NO_DEVICES = (ctypes.c_void_p * 1)()  # a list of devices that ends at once
_building = threading.RLock()  # a context's parameters are set around its model's


def loaded_facts(log: Sequence[str]) -> dict[str, Any]:
    """Layers that ran on a GPU, and if weights were ``repacked`` for this processor. None: not logged."""
    text = "\n".join(log)
    layers = re.search(r"offloaded (\d+)/\d+ layers to GPU", text)
    names = re.findall(r"(\S+) +model buffer size =", text)
    return {
        "offloaded_layers": int(layers[1]) if layers else 0 if names else None,
        "repacked": bool(re.search("REPACK|AMX|KLEIDIAI", " ".join(names))) if names else None,
    }


def buffers(log: Sequence[str]) -> dict[str, dict[str, int]]:
    """Bytes of weights, KV cache and compute buffers that llama.cpp logged, in memory and on each card."""
    device_of = ggml_function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)
    type_of = ggml_function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    places = {HERE: dict.fromkeys(KINDS.values(), 0.0)}
    for name, kind, mib in BUFFER.findall("\n".join(log)):
        device = device_of(name.encode())
        here = HERE_NAMES.search(name) or (device and type_of(device) == INTEGRATED)
        sizes = places.setdefault(HERE if here else f"on {name}", dict.fromkeys(KINDS.values(), 0.0))
        sizes[KINDS.get(kind, "KV cache")] += float(mib)
    return {place: {kind: round(n * 2**20) for kind, n in sizes.items()} for place, sizes in places.items()}


def planned_bytes(log: Sequence[str]) -> dict[str, int]:
    """What a `dry_run` logs: the whole KV cache and its state, compute buffers here and on cards, layers."""
    found, text, layers = buffers(log), "\n".join(log), loaded_facts(log)["offloaded_layers"]
    kv = re.findall(r": size = +([\d.]+) MiB \(| state buffer size = +([\d.]+) MiB", text)
    return {
        "kv_bytes": round(sum(float(cache or state) for cache, state in kv) * 2**20),
        "compute_bytes": found[HERE]["compute buffers"],
        "card_compute_bytes": sum(it["compute buffers"] for place, it in found.items() if place != HERE),
        "card_layers": layers if len(found) > 1 else 0,
    }


REFUSAL_HINTS = {  # by a word of llama.cpp's reason; the first that fits
    "unknown model architecture": "update llama-cpp-python, or convert the model again",
    "wrong number of tensors": "it has tensors that llama.cpp does not use, or lacks some: convert it again",
    "key not found": "the file is in another dialect of its architecture: get a newer conversion",
    "quantized V cache": "pass flash_attn=True, or type_v='f16'",
    "different K": "pass the same type_k and type_v",
    "allocat": "lower n_ctx, n_ubatch or n_gpu_layers, set flash_attn=True, or close programs",
    "": "inspect its header (02_inspect_header), or update llama-cpp-python",
}


def refusal(path: str | Path) -> ModelError:
    """The error for a file that llama.cpp has just declined in an orderly way, from what it logged."""
    reason = reason_of(LOG.tail(40, ERROR)) or "no reason given"
    hint = next(hint for word, hint in REFUSAL_HINTS.items() if word in reason)
    cards = re.findall(r"using device (.* MiB free)", "\n".join(LOG.tail()))
    free = f" (before the load: {', '.join(cards)})" if cards and "allocat" in reason else ""
    return ModelError(f"{REFUSES}{reason}{free}", where=path, hint=hint)


def filled(params: Any, fields: Mapping[str, Any]) -> Any:
    """The same structure of llama.cpp, with these fields."""
    for name, value in fields.items():
        setattr(params, name, value)
    return params


def _replace(until: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    until.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


@contextlib.contextmanager
def default_params(model: Mapping[str, Any] | None = None, **context: Any) -> Iterator[None]:
    """Change llama.cpp's default parameters while a model is built: ``llama_cpp.Llama`` lacks some."""
    import llama_cpp.llama_cpp as api

    with _building, contextlib.ExitStack() as until:
        for kind, fields in (("model", model or {}), ("context", context)):
            original = getattr(api, name := f"llama_{kind}_default_params")
            _replace(until, api, name, lambda old=original, fields=fields: filled(old(), fields))
        yield


def model_params(settings: OpenSettings) -> dict[str, Any]:
    """llama.cpp's parameters of a model that ``llama_cpp.Llama`` does not take."""
    # without a device: else llama.cpp computes large batches on a GPU even if no layer is there
    devices = {} if settings.n_gpu_layers else {"devices": ctypes.addressof(_NO_DEVICES)}
    return {"use_extra_bufts": settings.use_extra_bufts, **devices}


def context_fields(settings: OpenSettings) -> dict[str, Any]:
    """llama.cpp's parameters of a context, which ``llama_cpp.Llama`` takes under the same names."""
    fields = {name: getattr(settings, name) for name in ("n_ctx", "n_threads", "n_threads_batch", "swa_full")}
    fields |= {name: GGML_TYPES[getattr(settings, name)] for name in ("type_k", "type_v")}
    fields["n_batch"] = min(settings.n_ctx, settings.n_batch)
    return fields | {"n_ubatch": min(fields["n_batch"], settings.n_ubatch)}


def set_context(params: Any, settings: OpenSettings) -> Any:
    """The same parameters, set in llama.cpp's structure."""
    return filled(params, {**context_fields(settings), "flash_attn_type": int(settings.flash_attn)})


class Built(NamedTuple):
    """A ``llama_cpp.Llama``, the help for a large file, if any, and how the load went."""

    llama: Any
    paging: Paging | None
    seconds: float
    speed: float  # bytes a second that it read from the disk; NaN for less than 1 GiB


def build_llama(model: Files, settings: OpenSettings, *, verbose: bool = False) -> Built:
    """A model with exactly these settings. `ModelError`: a refusal. ``verbose``: stderr has why it aborts."""
    import llama_cpp

    LOG.install()
    began, before = time.perf_counter(), read_bytes()
    fields = {name: getattr(settings, name) for name in ("n_gpu_layers", "flash_attn", "use_mmap")}
    path = model.paths[0] if isinstance(model, ShardSet) else model
    paging = None if Paging.unhelped(model, settings) else Paging(open_shards(model))
    listening = paging.callback(llama_cpp.llama_cpp.llama_context_default_params().cb_eval) if paging else {}
    try:
        with default_params(model_params(settings), **listening), contextlib.ExitStack() as until:
            # it would parse every chat template, and fail on any; we render them ourselves
            _replace(until, llama_cpp._internals.LlamaModel, "metadata", lambda _model: {})
            until.enter_context(paging.loading() if paging else contextlib.nullcontext())
            llama: Any = llama_cpp.Llama(str(path), verbose=verbose, **fields, **context_fields(settings))
    except ValueError as error:
        raise refusal(path) from error
    llama.set_seed(settings.seed)
    if paging is not None:
        llama._stack.callback(paging.close)
        sizes = buffers(LOG.tail())[HERE]
        paging.start(sizes["KV cache"] + sizes["compute buffers"])
    seconds, read = time.perf_counter() - began, read_bytes() - before
    return Built(llama, paging, seconds, read / seconds if read >= TELLING_BYTES else math.nan)


def dry_run(path: str | Path, settings: OpenSettings) -> dict[str, int]:
    """What llama.cpp plans (see `planned_bytes`), without loading. Raises `ModelError` for a refusal."""
    import llama_cpp.llama_cpp as api

    LOG.install()
    n_gpu_layers = 0x7FFFFFFF if settings.n_gpu_layers == -1 else settings.n_gpu_layers
    # llama.cpp reads the header, builds the graph, and adds up
    fields = {"load_mode": api.LLAMA_LOAD_MODE_NONE, "n_gpu_layers": n_gpu_layers, "no_alloc": True}
    params = filled(api.llama_model_default_params(), fields | model_params(settings))
    size = set_context(api.llama_context_default_params(), settings)
    model = api.llama_model_load_from_file(os.fsencode(path), params)
    context = model and api.llama_init_from_model(model, size)
    api.llama_free(context)
    api.llama_model_free(model)
    if not context:
        raise refusal(path)
    return planned_bytes(LOG.tail())
