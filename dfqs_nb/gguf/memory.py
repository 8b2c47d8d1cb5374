"""Memory of a run, from the header: weights, KV cache, and whether they fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dfqs_nb.core.display import size
from dfqs_nb.core.errors import HeaderError, SpaceError
from dfqs_nb.core.machine import Memory, available_memory
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.header import OTHER_TOOL, TENSOR_TYPES, GGUFHeader, padded

if TYPE_CHECKING:
    import pandas as pd

# Bytes and elements of a block, for the types that llama.cpp takes for a KV cache.
CACHE_TYPES = {
    name.lower(): (n_bytes, elements)
    for name, elements, n_bytes in TENSOR_TYPES.values()
    if name in ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
}
CSA_RATIO, HCA_RATIO, CELL_PADDING = 4, 128, 256
ADVICE = "lower n_ctx or n_ubatch, set use_mmap=True, swa_full=False, flash_attn=True, or close programs"


@dataclass(frozen=True)
class KvCacheBytes:
    """Bytes of a context's cache in each layer, and how exact they are."""

    layers: list[int]
    exactness: Literal["exact", "upper bound", "rough"] = "exact"
    note: str = ""

    @property
    def total(self) -> int:
        """Bytes in all layers."""
        return sum(self.layers)


def kv_cache_bytes(
    header: GGUFHeader,
    n_ctx: int,
    n_ubatch: int = 512,
    type_k: str = "f16",
    type_v: str = "f16",
    swa_full: bool = False,  # the library's default is True: every token in sliding-window layers
) -> KvCacheBytes:
    """Bytes of the KV cache that llama.cpp allocates for ``n_ctx`` tokens, from the header alone.

    Source: ``src/llama-kv-cache*.cpp`` of llama-cpp-python 0.3.36. `HeaderError`: the header lacks a key.
    """
    if min(n_ctx, n_ubatch) < 1:
        raise ValueError("n_ctx and n_ubatch must be at least 1")
    cells, _ = padded(n_ctx, CELL_PADDING), _stated(header, "block_count")
    if header.architecture == "deepseek4":
        return KvCacheBytes(_deepseek4(header, cells, min(n_ctx, n_ubatch), type_k, swa_full))
    layers = _attention(header, cells, type_k, type_v)
    if header.arch("ssm.state_size") or header.arch("wkv.head_size"):
        note = "recurrent layers counted as attention; their state is not counted"
        return KvCacheBytes(layers, "rough", note)
    if header.arch("attention.sliding_window"):
        note = "sliding-window layers counted as if they kept the whole context"
        return KvCacheBytes(layers, "upper bound", note)
    return KvCacheBytes(layers)


def _deepseek4(header: GGUFHeader, cells: int, n_ubatch: int, type_k: str, swa_full: bool) -> list[int]:
    """One K row a layer and cell, no V; compressed layers add a row for each 4 or 128 tokens, and a state."""
    head_dim = max(_stated(header, "attention.key_length"))
    indexer_dim = max(_stated(header, "attention.indexer.key_length"))
    ratios = _stated(header, "attention.compress_ratios")[: header.n_layers]
    window = cells if swa_full else min(cells, max(_stated(header, "attention.sliding_window")) + n_ubatch)
    csa_rows, hca_rows = (padded(-(-cells // ratio), CELL_PADDING) for ratio in (CSA_RATIO, HCA_RATIO))
    row_bytes, state_bytes = _row_bytes(head_dim, type_k), 2 * 4  # two F32
    csa = csa_rows * (row_bytes + _row_bytes(indexer_dim, type_k))
    csa += 2 * CSA_RATIO * 2 * (head_dim + indexer_dim) * state_bytes
    more = {CSA_RATIO: csa, HCA_RATIO: hca_rows * row_bytes + HCA_RATIO * head_dim * state_bytes}
    raw = padded(window, CELL_PADDING) * row_bytes
    return [raw + more.get(ratio, 0) for ratio in ratios + [0] * (header.n_layers - len(ratios))]


def _attention(header: GGUFHeader, cells: int, type_k: str, type_v: str) -> list[int]:
    """Grouped-query attention: a K and a V row for each layer and cell; latent attention keeps K only."""
    heads = _stated(header, "attention.head_count_kv", "attention.head_count")
    heads = heads * header.n_layers if len(heads) == 1 else heads
    head_dim = header.count("attention.key_length")
    if not head_dim:
        n_heads = _stated(header, "attention.head_count")[0]  # of the first layer, as llama.cpp has it
        head_dim = max(_stated(header, "embedding_length")) // max(1, n_heads)
    value_dim = header.count("attention.value_length") or head_dim
    if header.arch("attention.key_length_mla"):  # latent; 0: llama.cpp's own tools write every key
        value_dim = 0
    return [cells * (_row_bytes(n * head_dim, type_k) + _row_bytes(n * value_dim, type_v)) for n in heads]


def _stated(header: GGUFHeader, *keys: str) -> list[int]:
    """The first of the architecture's keys that the header has: a count, or one for each layer."""
    if values := next(filter(None, map(header.counts, keys)), None):
        return values
    raise HeaderError(f"{header.architecture}.{keys[0]} is missing", where=header.path, hint=OTHER_TOOL)


def _row_bytes(n_elements: int, cache_type: str) -> int:
    if cache_type not in CACHE_TYPES:
        raise ValueError(f"unknown KV cache type {cache_type!r}: use one of {', '.join(CACHE_TYPES)}")
    block_bytes, block = CACHE_TYPES[cache_type]
    return -(-n_elements // block) * block_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """What an open model takes of this memory, in bytes; layers on graphics cards take none."""

    weights_bytes: int
    weights_resident_bytes: int  # that must lie in memory; others the kernel reads and drops as it needs
    kv: KvCacheBytes
    n_ctx: int
    compute_bytes: int | None = None  # None until llama.cpp is asked: it can exceed the cache

    @property
    def must_fit_bytes(self) -> int:
        """Bytes that cannot be paged: resident weights, KV cache, compute buffer."""
        return self.weights_resident_bytes + self.kv.total + (self.compute_bytes or 0)


def estimate(
    header: GGUFHeader, n_ctx: int, n_ubatch: int = 512, *, use_mmap: bool = True, **options: Any
) -> MemoryEstimate:
    """Memory that a model will take; ``options`` and errors of `kv_cache_bytes`."""
    weights, kv = sum(t.nbytes for t in header.tensors), kv_cache_bytes(header, n_ctx, n_ubatch, **options)
    return MemoryEstimate(weights, 0 if use_mmap else weights, kv, n_ctx)


def check_fits(needs: MemoryEstimate, memory: Memory | None = None, where: str | Path | None = None) -> str:
    """A warning if weights will be paged, which is slow; `SpaceError`: what cannot be paged does not fit."""
    memory = memory or available_memory()
    free, must_fit = memory.available_bytes, needs.must_fit_bytes
    if must_fit > free:
        compute = "not counted" if needs.compute_bytes is None else size(needs.compute_bytes)
        parts = f"weights {size(needs.weights_resident_bytes)}, KV cache {size(needs.kv.total)}"
        what = f"a context of {needs.n_ctx:,} tokens needs {size(must_fit)} ({parts}, compute buffer "
        what += f"{compute}), and {size(free)} are free ({memory.source})"
        raise SpaceError(what, where=where, hint=ADVICE)
    missing = must_fit + needs.weights_bytes - needs.weights_resident_bytes - free
    slow = (
        f"weights of {size(needs.weights_bytes)} and {size(must_fit)} beside them exceed the {size(free)} of "
        f"free memory by {size(missing)}: parts of the file will be read from the disk again and again, so "
        "expect a fraction of the usual speed"
    )
    return slow if missing > 0 else ""


def cache_table(header: GGUFHeader, contexts: Sequence[int]) -> pd.DataFrame:
    """KV cache in MiB (f16) by ``n_ctx``, in the columns ``swa_full=False`` and ``swa_full=True``."""
    import pandas as pd

    both = (False, True)
    mib = [[kv_cache_bytes(header, n, swa_full=full).total / 2**20 for full in both] for n in contexts]
    return pd.DataFrame(mib, pd.Index(contexts, name="n_ctx"), [f"swa_full={full}" for full in both])


def published() -> dict[str, Any]:
    """What DeepSeek published, and the specimen's shape: ``data/deepseek_v4_flash.json``."""
    return dict(json.loads((data_dir() / "deepseek_v4_flash.json").read_text(encoding="utf-8")))


def published_shape() -> GGUFHeader:
    """The published sizes of DeepSeek-V4-Flash as a header without tensors."""
    fields = {f"deepseek4.{key}": value for key, value in published()["keys"].items()}
    fields["general.architecture"] = "deepseek4"
    return GGUFHeader(Path(published()["name"]), 0, 3, 32, fields, (), 0, 0, b"")
