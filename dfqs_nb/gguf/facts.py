"""What a GGUF header says about the model: identity, experts, attention, parameters, bits.

Everything here is computed from metadata fields and tensor shapes; no tensor data is read. Works for any
architecture; what only DeepSeek models declare is empty for the others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfqs_nb.gguf.header import GGUFHeader, Tensor

if TYPE_CHECKING:
    import pandas as pd

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
INTEGER_TYPES = ("I8", "I16", "I32", "I64")  # tables, not weights
GATING = {1: "softmax", 2: "sigmoid", 3: "softmax over the chosen", 4: "sqrtsoftplus"}  # llama.cpp's codes


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layout.

    Attributes:
        total: routed experts a layer; 0 for a dense model.
        used: routed experts a token.
        shared: experts that every token uses besides.
        moe_layers: layers with routed experts.
        hash_layers: how many of them, the first ones, choose by token id from a table, without a score.
        gating: how router scores are made.
        weights_scale: factor on the chosen experts' weights.
    """

    total: int
    used: int
    shared: int
    moe_layers: int
    hash_layers: int
    gating: str
    weights_scale: float


@dataclass(frozen=True)
class Parameters:
    """Weights, by count. Tables of integers are not weights.

    Attributes:
        total: all weights of the file.
        active: weights that one token passes through: routed experts count by used / total, and the
            embedding, a look-up, counts as the one row that is read.
        routed: weights of the routed experts.
    """

    total: int
    active: int
    routed: int


def layer_of(name: str) -> int | None:
    """The block a tensor belongs to, from its name; ``None`` outside the blocks.

    >>> layer_of("blk.12.attn_kv.weight"), layer_of("output.weight")
    (12, None)
    """
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None


def class_of(name: str) -> str:
    """The tensor's class, from its name.

    >>> class_of("blk.0.ffn_gate_exps.weight"), class_of("blk.3.hc_attn_fn.weight"), class_of("v.x")
    ('routed experts', 'hyper-connections', 'other')
    """
    inner = re.sub(r"^blk\.\d+\.", "", name)
    return next((label for label, pattern in CLASSES if re.search(pattern, inner)), "other")


def experts(header: GGUFHeader) -> Experts:
    """The expert layout; see ``Experts``."""
    moe_layers = {layer_of(t.name) for t in header.tensors if class_of(t.name) == "routed experts"}
    code = int(header.arch("expert_gating_func", 0))
    return Experts(
        int(header.arch("expert_count", 0)),
        int(header.arch("expert_used_count", 0)),
        int(header.arch("expert_shared_count", 0)),
        len(moe_layers),
        int(header.arch("hash_layer_count", 0)),
        GATING.get(code, "not stated"),
        float(header.arch("expert_weights_scale", 1.0)),
    )


def parameters(header: GGUFHeader) -> Parameters:
    """Count the weights from the tensor shapes; see ``Parameters``."""
    layout, total, active, routed = experts(header), 0, 0.0, 0
    for tensor in header.tensors:
        if tensor.type in INTEGER_TYPES:
            continue
        total += tensor.n_elements
        kind = class_of(tensor.name)
        if kind == "routed experts" and layout.total:
            routed += tensor.n_elements
            active += tensor.n_elements * layout.used / layout.total
        elif kind == "embedding" and _has_output(header):
            active += tensor.shape[0]
        else:
            active += tensor.n_elements
    return Parameters(total, round(active), routed)


def _has_output(header: GGUFHeader) -> bool:
    """Whether the output matrix is a tensor of its own (else the embedding serves as both)."""
    return any(tensor.name == "output.weight" for tensor in header.tensors)


def bits_per_weight(tensors: Iterable[Tensor]) -> float:
    """Average bits a weight over ``tensors``, their scales and padding blocks included."""
    chosen = [tensor for tensor in tensors if tensor.type not in INTEGER_TYPES]
    weights = sum(tensor.n_elements for tensor in chosen)
    return 8 * sum(tensor.nbytes for tensor in chosen) / weights if weights else float("nan")


def class_sizes(header: GGUFHeader) -> list[dict[str, Any]]:
    """One dict a tensor class, largest first: ``class``, ``tensors``, ``weights``, ``bytes``,
    ``bits_per_weight`` and ``types`` (most bytes first)."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in header.tensors:
        groups.setdefault(class_of(tensor.name), []).append(tensor)
    rows = [
        {
            "class": label,
            "tensors": len(group),
            "weights": sum(t.n_elements for t in group),
            "bytes": sum(t.nbytes for t in group),
            "bits_per_weight": bits_per_weight(group),
            "types": ", ".join(types_by_bytes(group)),
        }
        for label, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def types_by_bytes(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Bytes by tensor type, most first."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += tensor.nbytes
    return dict(sizes.most_common())


def attention_layers(header: GGUFHeader) -> list[dict[str, Any]]:
    """One dict a layer: ``layer``, ``kind``, ``ratio`` (source tokens a cached entry), ``routing``.

    ``kind`` is, for DeepSeek-V4: ``sliding window`` (ratio 0), ``compressed sparse`` (ratio 4, with an
    indexer that picks) or ``heavily compressed`` (ratio 128). Other architectures: ``full``, or ``sliding
    window`` where the header declares a window without saying for which layers.
    """
    ratios = header.arch("attention.compress_ratios")
    names = {0: "sliding window", 4: "compressed sparse", 128: "heavily compressed"}
    default = "sliding window" if header.arch("attention.sliding_window") else "full"
    n_layers = int(header.arch("block_count", 0))
    moe = {layer_of(t.name) for t in header.tensors if class_of(t.name) == "routed experts"}
    hashed = experts(header).hash_layers
    rows = []
    for layer in range(n_layers):
        ratio = ratios[layer] if ratios and layer < len(ratios) else None
        kind = default if ratio is None else names.get(ratio, f"compressed by {ratio}")
        routing = "dense" if layer not in moe else "hash" if layer < hashed else "scores"
        rows.append({"layer": layer, "kind": kind, "ratio": ratio or 1, "routing": routing})
    return rows


def identity(header: GGUFHeader) -> dict[str, Any]:
    """Who the file says it is: name, architecture, licence, sizes, quantization, provenance."""
    count = parameters(header)
    fields = {
        "name": header.get("general.name", "not stated"),
        "architecture": header.architecture or "not stated",
        "licence": header.get("general.license", "not stated"),
        "file size (bytes)": header.file_size,
        "GGUF version": header.version,
        "metadata fields": len(header),
        "tensors": len(header.tensors),
        "parameters": count.total,
        "active parameters a token": count.active,
        "bits a weight": round(bits_per_weight(header.tensors), 3),
        "tensor types": ", ".join(types_by_bytes(header.tensors)),
        "importance matrix": header.get("quantize.imatrix.file", "not stated"),
    }
    return fields


def architecture(header: GGUFHeader) -> dict[str, Any]:
    """The sizes that shape the network; ``not stated`` where the header is silent."""
    keys = {
        "layers": "block_count",
        "hidden size": "embedding_length",
        "context (tokens)": "context_length",
        "heads": "attention.head_count",
        "KV heads": "attention.head_count_kv",
        "head size": "attention.key_length",
        "rotary size": "rope.dimension_count",
        "sliding window (tokens)": "attention.sliding_window",
        "expert width": "expert_feed_forward_length",
        "indexer heads": "attention.indexer.head_count",
        "indexer top-k": "attention.indexer.top_k",
        "hyper-connection streams": "hyper_connection.count",
    }
    return {label: header.arch(key, "not stated") for label, key in keys.items()}


def tokenizer(header: GGUFHeader) -> dict[str, Any]:
    """The tokenizer's model, vocabulary and special tokens."""
    tokens = header.fields.get("tokenizer.ggml.tokens")
    merges = header.fields.get("tokenizer.ggml.merges")
    facts: dict[str, Any] = {
        "model": header.get("tokenizer.ggml.model", "not stated"),
        "pre-tokenizer": header.get("tokenizer.ggml.pre", "not stated"),
        "vocabulary (tokens)": tokens.count if tokens else 0,
        "merges": merges.count if merges else 0,
    }
    texts = header["tokenizer.ggml.tokens"] if tokens else []
    for role in ("bos", "eos", "eot", "unknown", "padding"):
        token = header.get(f"tokenizer.ggml.{role}_token_id")
        if token is not None:
            facts[f"{role} token"] = f"{texts[token]} ({token})" if token < len(texts) else str(token)
    facts["adds bos itself"] = header.get("tokenizer.ggml.add_bos_token", "not stated")
    return facts


def chat_template(header: GGUFHeader) -> str:
    """The chat template, in Jinja; empty when the header has none."""
    return header.get("tokenizer.chat_template", "")


def facts_frame(facts: dict[str, Any], name: str = "value") -> pd.DataFrame:
    """A dict of facts as a one-column table, numbers with thousands separators."""
    import pandas as pd

    shown = {
        key: f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        for key, value in facts.items()
    }
    return pd.DataFrame({name: shown})


def tensor_table(header: GGUFHeader) -> pd.DataFrame:
    """One row a tensor: ``name``, ``layer`` (-1 outside the blocks), ``class``, ``type``, ``shape``
    (ggml's order), ``weights``, ``bytes``, ``bits_per_weight``."""
    import pandas as pd

    rows = []
    for t in header.tensors:
        layer = layer_of(t.name)
        rows.append(
            {
                "name": t.name,
                "layer": -1 if layer is None else layer,
                "class": class_of(t.name),
                "type": t.type,
                "shape": t.shape,
                "weights": t.n_elements,
                "bytes": t.nbytes,
                "bits_per_weight": 8 * t.nbytes / t.n_elements if t.n_elements else float("nan"),
            }
        )
    columns = ["name", "layer", "class", "type", "shape", "weights", "bytes", "bits_per_weight"]
    return pd.DataFrame(rows, columns=columns)


def quantization_by_layer(table: pd.DataFrame) -> pd.DataFrame:
    """Bytes by layer (rows) and tensor type (columns, most bytes first), blocks only."""
    blocks = table[table["layer"] >= 0]
    mix = blocks.pivot_table(index="layer", columns="type", values="bytes", aggfunc="sum", fill_value=0)
    return mix[mix.sum().sort_values(ascending=False).index]


# ---- the early dialect of deepseek4 ----

# The first conversions of DeepSeek-V4 say ``deepseek4`` too, but name some tensors so. Upstream llama.cpp (since
# b9840) expects the names behind them, and the key ``attention.output_lora_rank``, which those files lack.
EARLY_NAMES = (
    (r"\battn_kv_latent\b", "attn_kv"),
    (r"\battn_compress_", "attn_compressor_"),
    (r"\bindexer\.compress_", "indexer_compressor_"),
    (r"^hc_head_", "output_hc_"),
    (r"\bexp_probs_b(\.weight)?$", "exp_probs_b.bias"),
    (r"^((?!.*\.(weight|bias)$).*)$", r"\1.weight"),
)


def early_dialect(header: GGUFHeader) -> dict[str, str]:
    """Tensors named in the early dialect of ``deepseek4``, each with the name that llama.cpp expects.

    Such a file can be sound, and upstream llama.cpp still refuses it: it needs the fork that made it, or a newer
    conversion.

    >>> from dfqs_nb.gguf.broken import reference_shards
    >>> early_dialect(reference_shards().as_one)
    {}
    """
    names = {}
    for tensor in header.tensors if header.architecture == "deepseek4" else ():
        expected = tensor.name
        for early, now in EARLY_NAMES:
            expected = re.sub(early, now, expected)
        if expected != tensor.name:
            names[tensor.name] = expected
    return names
