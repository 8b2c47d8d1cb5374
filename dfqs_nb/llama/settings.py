"""How a model is opened: the settings, and what suits a model on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.gguf.header import TENSOR_TYPES, GGUFHeader
from dfqs_nb.gguf.memory import CACHE_TYPES
from dfqs_nb.gguf.shards import Files, open_shards
from dfqs_nb.llama.log import LOG

# ggml_type of the KV cache types, from ggml.h
GGML_TYPES = {name.lower(): code for code, (name, *_) in TENSOR_TYPES.items() if name.lower() in CACHE_TYPES}
MAX_CTX, SMALL_MODEL_BYTES = 2**31 - 256, 64 << 20
LIMITS = {"n_ctx": (1, MAX_CTX), "n_batch": (1, MAX_CTX), "n_ubatch": (1, MAX_CTX), "seed": (0, 2**32 - 1)}
LIMITS |= dict.fromkeys(("n_threads", "n_threads_batch"), (1, 4096))  # one that cannot start ends the process
CHOICES = {"type_k": tuple(GGML_TYPES), "type_v": tuple(GGML_TYPES), "paging": ("auto", "on", "off")}


@dataclass(frozen=True)
class OpenSettings:
    """How a model is opened: conditions of what is measured. `ModelError`: llama.cpp takes no such value."""

    n_ctx: int = 4096  # tokens of context
    n_batch: int = 512  # tokens handed over at once in prefill
    n_ubatch: int = 512  # of these, computed at once
    n_threads: int | None = None  # in decode; None: the usable physical cores
    n_threads_batch: int | None = None  # in prefill
    n_gpu_layers: int = 0  # layers put on the GPU; -1: all
    seed: int = 42  # of the sampler; greedy decoding does not use it
    flash_attn: bool = False  # a quantized V cache needs it
    type_k: str = "f16"  # element types of the KV cache
    type_v: str = "f16"
    use_mmap: bool = True  # map the weights, so that they need not fit in memory
    # repacked weights are a second copy in memory, and crash on CPUs with AMX (ggml-org/llama.cpp#20824)
    use_extra_bufts: bool = False
    swa_full: bool = False  # all tokens in sliding-window layers: the library's True multiplies the cache
    paging: str = "auto"  # the help for a file larger than memory: where it is larger (auto), on or off

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_threads", self.n_threads or usable_cores())
        object.__setattr__(self, "n_threads_batch", self.n_threads_batch or self.n_threads)
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise ModelError(f"{name} is {getattr(self, name):,}", hint=f"use {low} to {high:,}")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ModelError(f"{name} is {value!r}", hint=f"use one of {', '.join(choices)}")

    @classmethod
    def of(
        cls, model: Files, *, n_ctx: int = 0, n_threads: int = 0, n_gpu_layers: int = -1, **fields: Any
    ) -> OpenSettings:
        """Settings that suit a model on this machine. 0: its limit of context, the threads that suit it."""
        header, layers = open_shards(model).as_one, n_gpu_layers if has_gpu_support() else 0
        limit, n_threads = own_context(header), n_threads or threads_for(header)
        n_ctx = min(n_ctx or limit, limit) if limit else n_ctx or cls.n_ctx
        return cls(n_ctx=n_ctx, n_threads=n_threads, n_gpu_layers=layers, **fields)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a report's conditions."""
        return asdict(self)


def threads_for(header: GGUFHeader) -> int:
    """Threads that suit the model: one below 64 MB, where a second would mostly wait; else all cores."""
    return 1 if header.file_size < SMALL_MODEL_BYTES else usable_cores()


def own_context(header: GGUFHeader) -> int:
    """The model's own limit of context in tokens; 0 where its header does not state one."""
    limit = header.arch("context_length")
    return limit if isinstance(limit, int) and 0 < limit <= MAX_CTX else 0


def has_gpu_support() -> bool:
    """Whether llama.cpp finds a GPU here that it was built for."""
    import llama_cpp

    LOG.install()  # the first call starts the GPUs' libraries, which log what they find
    return bool(llama_cpp.llama_supports_gpu_offload())


def llama_version() -> str:
    """The version of llama-cpp-python, which pins the llama.cpp inside."""
    import llama_cpp

    return str(llama_cpp.__version__)
