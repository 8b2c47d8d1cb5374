"""What a GGUF header says about the model: identity, experts, attention, parameters, bits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqs_nb.core.display import entries
from dfqs_nb.core.errors import ModelError
from dfqs_nb.gguf.header import GGUFHeader, Tensor, check_layout, read_header

# Tensor classes, by the first pattern that the name (without "blk.N.") contains.
CLASSES = (
    ("routed experts", r"_exps\."),
    ("shared expert", r"_shexp\."),
    ("router", r"ffn_gate_inp|exp_probs_b|ffn_gate_tid2eid"),
    ("indexer", r"^indexer"),
    ("compressor", r"compressor"),
    ("hyper-connections", r"hc_"),
    ("norms", r"norm"),
    ("attention", r"^attn"),
    ("embedding", r"^token_embd|^position_embd|^per_layer_token_embd"),
    ("output", r"^output"),
    ("dense feed-forward", r"^ffn"),
)
SIZES = entries("""
layers: block_count | hidden size: embedding_length | context (tokens): context_length |
heads: attention.head_count | KV heads: attention.head_count_kv | head size: attention.key_length |
rotary size: rope.dimension_count | sliding window (tokens): attention.sliding_window |
expert width: expert_feed_forward_length | indexer heads: attention.indexer.head_count |
indexer top-k: attention.indexer.top_k | hyper-connection streams: hyper_connection.count
""")
INTEGER_TYPES = ("I8", "I16", "I32", "I64")  # tables, not weights
OTHER_TYPES = ("adapter", "imatrix", "controlvector", "mmproj", "clip")  # of files beside a model


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layout."""

    total: int  # routed experts a layer
    used: int  # of them by a token, at most
    shared: int  # that every token uses, too
    moe_layers: int
    hash_layers: int  # the first ones, whose table of token ids chooses; scores only weight the chosen

    @property
    def sentence(self) -> str:
        """The layout for people."""
        if not self.moe_layers:
            return "a dense model: no routed experts, every token uses all weights"
        where = f"{self.moe_layers} layers, {self.hash_layers} of them by hash"
        return f"{self.used} of {self.total} experts a token in {where}"


@dataclass(frozen=True)
class Parameters:
    """The weights, as numbers or in bytes."""

    total: int
    active: int  # in one token: used / total of the routed experts, and of the embedding the row that is read
    routed: int  # of routed experts


def layer_of(name: str) -> int | None:
    """The block of a tensor, from its name (``blk.12.attn_kv.weight``); ``None`` outside the blocks."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None


def class_of(name: str) -> str:
    """The class of a tensor, from its name, such as ``routed experts`` of ``blk.0.ffn_gate_exps.weight``."""
    inner = re.sub(r"^blk\.\d+\.", "", name)
    return next((label for label, pattern in CLASSES if re.search(pattern, inner)), "other")


def experts(header: GGUFHeader) -> Experts:
    """The expert layout."""
    keys = ("expert_count", "expert_used_count", "expert_shared_count", "hash_layer_count")
    total, used, shared, hashed = map(header.count, keys)
    moe_layers = {layer_of(t.name) for t in header.tensors if class_of(t.name) == "routed experts"}
    return Experts(total, used, shared, len(moe_layers), hashed)


def is_tied(*headers: GGUFHeader) -> bool:
    """Whether the embedding is the output, too: no shard has an output of its own."""
    return "output.weight" not in {tensor.name for header in headers for tensor in header.tensors}


def token_shares(header: GGUFHeader) -> Iterator[tuple[Tensor, bool, float]]:
    """Each tensor, whether it holds routed experts, and the share that a token uses, as in `Parameters`."""
    n_experts, tied = header.count("expert_count"), is_tied(header)
    used = header.counts("expert_used_count") or [0]
    for tensor in header.tensors:
        kind = class_of(tensor.name)
        if kind == "routed experts" and n_experts:
            yield tensor, True, used[min(layer_of(tensor.name) or 0, len(used) - 1)] / n_experts
        else:
            is_table = tensor.type in INTEGER_TYPES or (kind == "embedding" and not tied)
            yield tensor, False, 1 / max(tensor.shape[-1], 1) if is_table else 1.0


def parameters(header: GGUFHeader, *, in_bytes: bool = False) -> Parameters:
    """Count the weights from the tensor shapes, or the bytes of all tensors."""
    rows = [
        (tensor.nbytes if in_bytes else tensor.n_elements, is_routed, share)
        for tensor, is_routed, share in token_shares(header)
        if in_bytes or tensor.type not in INTEGER_TYPES
    ]
    active = round(sum(n * share for n, _, share in rows))
    return Parameters(sum(n for n, *_ in rows), active, sum(n for n, is_routed, _ in rows if is_routed))


def bits_per_weight(tensors: Iterable[Tensor]) -> float:
    """Average bits a weight, with scales and padding blocks."""
    chosen = [tensor for tensor in tensors if tensor.type not in INTEGER_TYPES]
    weights = sum(tensor.n_elements for tensor in chosen)
    return 8 * sum(tensor.nbytes for tensor in chosen) / weights if weights else float("nan")


def class_sizes(header: GGUFHeader) -> list[dict[str, Any]]:
    """One dict a tensor class, largest first; its ``types`` with most bytes first."""
    groups, rows = dict[str, list[Tensor]](), list[dict[str, Any]]()
    for tensor in header.tensors:
        groups.setdefault(class_of(tensor.name), []).append(tensor)
    for label, group in groups.items():
        row = {"class": label, "tensors": len(group), "weights": sum(t.n_elements for t in group)}
        row |= {"bytes": sum(t.nbytes for t in group), "bits_per_weight": bits_per_weight(group)}
        rows.append(row | {"types": ", ".join(types_by_bytes(group))})
    return sorted(rows, key=lambda row: -row["bytes"])


def types_by_bytes(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Bytes by tensor type, most first."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += tensor.nbytes
    return dict(sizes.most_common())


def identity(header: GGUFHeader) -> dict[str, Any]:
    """The header's identity: name, architecture, licence, sizes, quantization, provenance."""
    count = parameters(header)
    return {
        "name": header.text("general.name") or "not stated",
        "architecture": header.architecture or "not stated",
        "licence": header.text("general.license") or "not stated",
        "file size (bytes)": header.file_size,
        "GGUF version": header.version,
        "tensors": len(header.tensors),
        "parameters": count.total,
        "active parameters a token": count.active,
        "bits a weight": round(bits_per_weight(header.tensors), 3),
        "tensor types": ", ".join(types_by_bytes(header.tensors)),
        "importance matrix": header.text("quantize.imatrix.file") or "not stated",
    }


def architecture(header: GGUFHeader) -> dict[str, Any]:
    """The sizes that shape the network, each ``not stated`` if the header lacks it."""
    return {label: header.arch(key, "not stated") for label, key in SIZES.items()}


def role(header: GGUFHeader) -> str:
    """What the file is if it is no language model, such as an adapter; else empty."""
    kind = header.text("general.type")
    if kind in ("", "model"):
        kind = header.architecture if header.architecture in OTHER_TYPES else ""
    if not header.tensors and "tokenizer.ggml.tokens" in header:
        return "a vocabulary without weights"
    return kind and f"a file of the type {kind[:40]!r}"


def require_model(header: GGUFHeader) -> None:
    """Raise a ModelError for a file that is not a language model; see `role`."""
    if what := role(header):
        raise ModelError(f"{what}, not a language model", where=header.path, hint="name the model it is for")


def model_header(path: str | Path) -> GGUFHeader:
    """Read a header, and check that its tensors lie where it says and that it is of a language model."""
    check_layout(header := read_header(path))
    require_model(header)
    return header
