"""Memory of a run, from the header: weights, KV cache, and whether this machine holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dfqs_nb.core.errors import HeaderError, SpaceError
from dfqs_nb.core.machine import Memory, available_memory
from dfqs_nb.gguf.header import OTHER_TOOL, GGUFHeader, padded
from dfqs_nb.gguf.types import TENSOR_TYPES

if TYPE_CHECKING:
    import pandas as pd

# Bytes and elements of a block, for the types that llama.cpp takes for a KV cache.
CACHE_TYPES = {
    name.lower(): (n_bytes, elements)
    for name, elements, n_bytes in TENSOR_TYPES.values()
    if name in ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
}
CSA_RATIO, HCA_RATIO = 4, 128
CELL_PADDING = 256
ADVICE = (
    "lower n_ctx or n_ubatch, pass use_mmap=True, swa_full=False and flash_attn=True, or close other programs"
)
F32_BYTES = 4


@dataclass(frozen=True)
class KvCacheBytes:
    """Bytes of a context's cache, by layer and part, and how exact they are.

    Parts of ``deepseek4``: ``raw`` (sliding window), ``csa`` (ratio 4), ``hca`` (ratio 128), ``indexer``,
    ``compressor_state``; of other architectures: ``k`` and ``v``.
    """

    layers: list[dict[str, int]]
    exactness: Literal["exact", "upper bound", "rough"] = "exact"
    note: str = ""

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part in all layers."""
        parts: Counter[str] = Counter()
        for layer in self.layers:
            parts.update(layer)
        return dict(parts)

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def kv_cache_bytes(
    header: GGUFHeader,
    n_ctx: int,
    n_ubatch: int = 512,
    type_k: str = "f16",
    type_v: str = "f16",
    swa_full: bool = False,
) -> KvCacheBytes:
    """Bytes of the KV cache that llama.cpp allocates for ``n_ctx`` tokens, from the header alone.

    llama.cpp rounds ``n_ctx`` up to a multiple of 256. ``n_ubatch`` sizes the sliding window's cache.
    ``swa_full`` keeps every token in sliding-window layers, which is llama.cpp's own default, and costly.
    Source: ``src/llama-kv-cache*.cpp`` of the llama.cpp that llama-cpp-python 0.3.36 vendors.

    Raises:
        HeaderError: the header lacks a key that the formula needs.
        ValueError: an unknown element type, or a count below 1.
    """
    if min(n_ctx, n_ubatch) < 1:
        raise ValueError("n_ctx and n_ubatch must be at least 1")
    cells = _pad(n_ctx)
    if header.architecture == "deepseek4":
        return KvCacheBytes(_deepseek4(header, cells, min(n_ctx, n_ubatch), type_k, swa_full))
    layers = _attention(header, cells, type_k, type_v)
    if header.arch("ssm.state_size") or header.arch("wkv.head_size"):
        return KvCacheBytes(
            layers, "rough", "recurrent layers counted as attention; their state is not counted"
        )
    if header.arch("attention.sliding_window"):
        note = "sliding-window layers counted as if they kept the whole context"
        return KvCacheBytes(layers, "upper bound", note)
    return KvCacheBytes(layers)


def _deepseek4(
    header: GGUFHeader, cells: int, n_ubatch: int, type_k: str, swa_full: bool
) -> list[dict[str, int]]:
    """One K row a layer and cell, no V; compressed layers add a row for each 4 or 128 tokens."""
    head_dim, indexer_dim = _int(header, "attention.key_length"), _int(header, "attention.indexer.key_length")
    ratios = _ints(header, "attention.compress_ratios")[: header.n_layers]
    window = cells if swa_full else _pad(min(cells, _int(header, "attention.sliding_window") + n_ubatch))
    csa_rows, hca_rows = (_pad(-(-cells // ratio)) for ratio in (CSA_RATIO, HCA_RATIO))
    row_bytes, state_bytes = _row_bytes(head_dim, type_k), 2 * F32_BYTES
    states = 2 * CSA_RATIO * 2 * (head_dim + indexer_dim) * state_bytes
    csa = {"csa": csa_rows * row_bytes, "indexer": csa_rows * _row_bytes(indexer_dim, type_k)}
    hca = {"hca": hca_rows * row_bytes, "compressor_state": HCA_RATIO * head_dim * state_bytes}
    extra = {CSA_RATIO: csa | {"compressor_state": states}, HCA_RATIO: hca}
    raw = {"raw": window * row_bytes, **dict.fromkeys(("csa", "hca", "indexer", "compressor_state"), 0)}
    ratios += [0] * (_int(header, "block_count") - len(ratios))
    return [raw | extra.get(ratio, {}) for ratio in ratios]


def _attention(header: GGUFHeader, cells: int, type_k: str, type_v: str) -> list[dict[str, int]]:
    """Grouped-query attention: a K and a V row for each layer and cell; latent attention keeps K only."""
    heads = _ints(header, "attention.head_count_kv", "attention.head_count")
    if len(heads) == 1 and _int(header, "block_count"):
        heads = heads * header.n_layers
    default = _int(header, "embedding_length") // max(1, _int(header, "attention.head_count"))
    head_dim = _int(header, "attention.key_length", default)
    value_dim = _int(header, "attention.value_length", head_dim)
    latent = bool(header.arch("attention.key_length_mla"))  # 0: llama.cpp's own tools write every key
    keys = [_row_bytes(n * head_dim, type_k) * cells for n in heads]
    values = [0 if latent else _row_bytes(n * value_dim, type_v) * cells for n in heads]
    return [{"k": k, "v": v} for k, v in zip(keys, values, strict=True)]


def _ints(header: GGUFHeader, *names: str) -> list[int]:
    """The first of these keys that the header has: a count, or one for each layer."""
    for name in names:
        if values := header.counts(f"{header.architecture}.{name}"):
            return values
    what = f"the key {header.architecture}.{names[0]} is missing"
    raise HeaderError(what, where=header.path, hint=OTHER_TOOL)


def _int(header: GGUFHeader, name: str, default: int | None = None) -> int:
    if default is not None and header.arch(name) is None:
        return default
    return _ints(header, name)[0] or default or 0


def _row_bytes(n_elements: int, cache_type: str) -> int:
    if cache_type not in CACHE_TYPES:
        raise ValueError(f"unknown KV cache type {cache_type!r}: use one of {', '.join(CACHE_TYPES)}")
    block_bytes, block = CACHE_TYPES[cache_type]
    return -(-n_elements // block) * block_bytes


def _pad(cells: int) -> int:
    return padded(cells, CELL_PADDING)


def weights_bytes(header: GGUFHeader) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in header.tensors)


@dataclass(frozen=True)
class MemoryEstimate:
    """What an open model takes, in bytes.

    ``weights_resident_bytes`` must lie in memory; without them the kernel reads and drops weights as it
    needs. ``compute_bytes`` is None until llama.cpp is asked: it can exceed the cache.
    """

    weights_bytes: int
    weights_resident_bytes: int
    kv: KvCacheBytes
    n_ctx: int
    compute_bytes: int | None = None

    @property
    def must_fit_bytes(self) -> int:
        """Bytes that cannot be paged: resident weights, KV cache, compute buffer."""
        return self.weights_resident_bytes + self.kv.total + (self.compute_bytes or 0)

    @property
    def comfortable_bytes(self) -> int:
        """Bytes with which nothing is read from the disk twice."""
        return self.must_fit_bytes + self.weights_bytes - self.weights_resident_bytes

    def with_compute(self, compute_bytes: int) -> MemoryEstimate:
        """The same estimate with llama.cpp's own number for the compute buffer."""
        return replace(self, compute_bytes=compute_bytes)


def estimate(
    header: GGUFHeader, n_ctx: int, n_ubatch: int = 512, *, use_mmap: bool = True, **options: Any
) -> MemoryEstimate:
    """Memory that a model will take; ``options`` and errors of `kv_cache_bytes`."""
    weights, kv = weights_bytes(header), kv_cache_bytes(header, n_ctx, n_ubatch, **options)
    return MemoryEstimate(weights, 0 if use_mmap else weights, kv, n_ctx)


def check_fits(needs: MemoryEstimate, memory: Memory | None = None, where: str | Path | None = None) -> str:
    """A warning if the weights will be paged, which is slow; else ``""``.

    Raises:
        SpaceError: resident weights, KV cache and compute buffer exceed the available memory.
    """
    memory = memory or available_memory()
    must_fit, free = binary_size(needs.must_fit_bytes), binary_size(memory.available_bytes)
    if needs.must_fit_bytes > memory.available_bytes:
        compute = "not counted" if needs.compute_bytes is None else binary_size(needs.compute_bytes)
        what = (
            f"a context of {needs.n_ctx:,} tokens needs {must_fit} "
            f"(resident weights {binary_size(needs.weights_resident_bytes)}, KV cache "
            f"{binary_size(needs.kv.total)}, compute buffer {compute}), and {free} are free ({memory.source})"
        )
        raise SpaceError(what, where=where, hint=ADVICE)
    missing = needs.comfortable_bytes - memory.available_bytes
    if missing <= 0:
        return ""
    return (
        f"weights of {binary_size(needs.weights_bytes)} and {must_fit} beside them exceed the {free} of free "
        f"memory by {binary_size(missing)}: parts of the file will be read from the disk again and again, so "
        "expect a fraction of the usual speed"
    )


def binary_size(n_bytes: int) -> str:
    """Bytes in binary units, as memory is sold.

    >>> binary_size(424 * 2**20), binary_size(7 * 2**30 // 2)
    ('424.0 MiB', '3.50 GiB')
    """
    return f"{n_bytes / 2**20:,.1f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:,.2f} GiB"


def cache_table(header: GGUFHeader, contexts: Sequence[int]) -> pd.DataFrame:
    """KV cache in MiB (f16) by ``n_ctx``, in the columns ``swa_full=False`` and ``swa_full=True``."""
    import pandas as pd

    cache = {
        f"swa_full={full}": [kv_cache_bytes(header, n, swa_full=full).total / 2**20 for n in contexts]
        for full in (False, True)
    }
    return pd.DataFrame(cache, pd.Index(contexts, name="n_ctx"))
