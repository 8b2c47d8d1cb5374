"""What a GGUF header says about the model: identity, experts, attention, parameters, bits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dfqs_nb.core.display import entries
from dfqs_nb.core.errors import ModelError
from dfqs_nb.gguf.header import GGUFHeader, Tensor, check_layout, read_header

EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # LLM_FFN_EXPS_REGEX of llama.cpp's common/common.h
# Tensor classes, by the first pattern that the name (without "blk.N.") contains.
CLASSES = (
    ("routed experts", EXPERTS.removeprefix(r"\.")),
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


class Weights(NamedTuple):
    """A tensor of a model: where it lies, and how much of it a token reads."""

    tensor: Tensor
    file: int  # number of its shard, from 0
    start: int  # in that file
    layer: int  # -1 outside the blocks
    use: str  # of routed experts ``up``, ``gate``, ``gate_up`` or ``down``; else empty
    share: float  # that a token reads: of experts those used, of a table one row

    @property
    def token_bytes(self) -> float:
        """Bytes that a token reads, on average."""
        return self.tensor.nbytes * self.share


def weights(*headers: GGUFHeader) -> list[Weights]:
    """All tensors of a model, from the headers of its shards in order."""
    rows, tied, n_experts = list[Weights](), is_tied(*headers), headers[0].count("expert_count")
    used = headers[0].counts("expert_used_count") or [0]
    for file, header in enumerate(headers):
        for it in header.tensors:
            block, n, routed = layer_of(it.name), max(it.shape[-1], 1), re.search(EXPERTS, it.name)
            layer = -1 if block is None else block
            use = routed[1] if routed and block is not None and n_experts else ""
            is_table = it.type in INTEGER_TYPES or (class_of(it.name) == "embedding" and not tied)
            share = min(used[min(layer, len(used) - 1)], n) / n if use else 1 / n if is_table else 1.0
            rows.append(Weights(it, file, header.data_offset + it.offset, layer, use, share))
    return rows


def parameters(header: GGUFHeader, *, in_bytes: bool = False) -> Parameters:
    """Count the weights from the tensor shapes, or the bytes of all tensors."""
    counted = [row for row in weights(header) if in_bytes or row.tensor.type not in INTEGER_TYPES]
    rows = [(row.tensor.nbytes if in_bytes else row.tensor.n_elements, row) for row in counted]
    active = round(sum(n * row.share for n, row in rows))
    return Parameters(sum(n for n, _ in rows), active, sum(n for n, row in rows if row.use))


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
