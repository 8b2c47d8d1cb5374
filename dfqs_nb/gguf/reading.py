"""Bytes that one token of decode reads from memory, from the tensor tables of a model."""

from __future__ import annotations

from dataclasses import dataclass

from dfqs_nb.gguf.facts import token_shares
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import CACHE_TYPES, CSA_RATIO, HCA_RATIO, kv_cache_bytes, weights_bytes


@dataclass(frozen=True)
class ActiveBytes:
    """Bytes of weights that a token of decode reads.

    ``dense``: of what every token uses (of look-up tables, a row). ``routed``: of the routed experts that it
    is sent to, of ``routed_total``. ``weights``: of all weights.
    """

    dense: int
    routed: int
    routed_total: int
    weights: int

    @property
    def total(self) -> int:
        """Bytes a token."""
        return self.dense + self.routed


# DeepSeek-V4-Flash-IQ1_S-XL. Experts: from the shapes and types of its configuration. The rest: what the
# published file's 61,540,805,344 bytes leave, less the embedding (129,280 x 4096 at Q8_0), of which a token
# reads a row. With everything but experts at Q8_0 or F32, shapes alone would say 8.7 GB a token instead of
# 7.6.
FLASH = ActiveBytes(
    dense=6_301_231_840, routed=1_281_490_944, routed_total=54_676_946_944, weights=61_540_805_344
)


def active_bytes(header: GGUFHeader) -> ActiveBytes:
    """Bytes that a token reads, from the tensor table of a model."""
    rows = [(tensor.nbytes, is_routed, share) for tensor, is_routed, share in token_shares(header)]
    dense = round(sum(n * share for n, is_routed, share in rows if not is_routed))
    routed = round(sum(n * share for n, is_routed, share in rows if is_routed))
    return ActiveBytes(dense, routed, sum(n for n, is_routed, _ in rows if is_routed), weights_bytes(header))


def cache_bytes_read(header: GGUFHeader, depth: int, type_k: str = "f16", type_v: str = "f16") -> int:
    """Bytes of KV cache that a token at ``depth`` reads at least; 0 where the header does not tell.

    ``deepseek4``: the sliding window in every layer; in layers of ratio 4 the indexer's keys and the entries
    that it picks; in layers of ratio 128 every entry.
    """
    if header.architecture != "deepseek4":
        cache = kv_cache_bytes(header, max(depth, 1), type_k=type_k, type_v=type_v)
        return cache.total * depth // (-(-max(depth, 1) // 256) * 256) if cache.exactness == "exact" else 0
    keys = ("key_length", "indexer.key_length", "indexer.top_k", "sliding_window")
    width, indexer, top_k, window = (int(header.arch(f"attention.{key}", 0)) for key in keys)
    block_bytes, block = CACHE_TYPES[type_k]
    ratios = list(header.arch("attention.compress_ratios", []))[: int(header.arch("block_count", 0))]
    elements = len(ratios) * min(depth, window) * width
    elements += ratios.count(CSA_RATIO) * (
        min(depth // CSA_RATIO, top_k) * width + depth // CSA_RATIO * indexer
    )
    elements += ratios.count(HCA_RATIO) * (depth // HCA_RATIO) * width
    return elements * block_bytes // block
