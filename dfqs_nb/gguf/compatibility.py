"""Does a header hold what llama.cpp's loader requires of its architecture?

The requirements of ``deepseek4`` stand below as tables, in the order in which llama.cpp meets them, so that
the first problem reported here is the one it stops at. Source: llama.cpp as vendored by llama-cpp-python
0.3.36, ``src/models/deepseek4.cpp``, ``src/llama-model.cpp`` (``load_hparams``), ``src/llama-vocab.cpp`` and
``src/llama-model-loader.cpp``. tests/test_compatibility.py holds them to the real loader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfqs_nb.gguf.header import GGUFHeader, Tensor
from dfqs_nb.gguf.shards import ShardSet

if TYPE_CHECKING:
    import pandas as pd

CHECKED = ("deepseek4",)
MAX_LAYERS, MAX_EXPERTS, N_STREAMS, SQRT_SOFTPLUS = 512, 1024, 4, 4
ABORTS = "GGML_ASSERT({}) failed"
# The loader names value types so.
TYPE_NAMES = {
    "UINT8": "u8",
    "INT8": "i8",
    "UINT16": "u16",
    "INT16": "i16",
    "UINT32": "u32",
    "INT32": "i32",
    "FLOAT32": "f32",
    "BOOL": "bool",
    "STRING": "str",
    "UINT64": "u64",
    "INT64": "i64",
    "FLOAT64": "f64",
}


@dataclass(frozen=True)
class Problem:
    """One thing that llama.cpp refuses the file for.

    Attributes:
        item: the key or tensor.
        required: what the loader wants there.
        found: what is there: ``missing``, another type, shape or value, or its name in another dialect.
        consequence: llama.cpp's own words.
        aborts: it ends the process (an assertion) in place of returning an error.
    """

    item: str
    required: str
    found: str
    consequence: str
    aborts: bool = False


@dataclass(frozen=True)
class Compatibility:
    """What a check found; ``checked`` is false, and says nothing, for an architecture without a table."""

    architecture: str
    checked: bool
    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Checked, and without a problem."""
        return self.checked and not self.problems

    @property
    def aborts(self) -> bool:
        """The problem that llama.cpp meets first ends the process."""
        return bool(self.problems) and self.problems[0].aborts

    @property
    def summary(self) -> str:
        """One sentence."""
        if not self.checked:
            return f"not checked: no table of requirements for the architecture {self.architecture!r}"
        if not self.problems:
            return f"the header holds what llama.cpp requires of {self.architecture}"
        first = self.problems[0]
        return (
            f"{len(self.problems)} problems for llama.cpp's {self.architecture} loader; it stops at "
            f"{first.item}: {first.consequence}"
        )


# ---- keys: name, type, whether required. "*": one value, or an array with one for each layer. ----

_GENERAL_KEYS = (
    ("general.file_type", "UINT32", False),
    ("general.name", "STRING", False),
    ("deepseek4.context_length", "UINT32", True),
    ("deepseek4.embedding_length", "UINT32", True),
    ("deepseek4.embedding_length_out", "UINT32", False),
    ("deepseek4.attention.causal", "BOOL", False),
    ("deepseek4.pooling_type", "UINT32", False),
    ("deepseek4.block_count", "UINT32", True),
    ("deepseek4.nextn_predict_layers", "UINT32", False),
    ("deepseek4.expert_count", "UINT32", False),
    ("deepseek4.expert_used_count", "UINT32*", False),
    ("deepseek4.expert_group_count", "UINT32", False),
    ("deepseek4.expert_group_used_count", "UINT32", False),
)
_MODEL_KEYS = (
    ("deepseek4.feed_forward_length", "UINT32*", False),
    ("deepseek4.attention.head_count", "UINT32*", False),
    ("deepseek4.attention.head_count_kv", "UINT32*", False),
    ("deepseek4.rope.scaling.finetuned", "BOOL", False),
    ("deepseek4.rope.scaling.original_context_length", "UINT32", False),
    ("deepseek4.rope.freq_base", "FLOAT32", False),
    ("deepseek4.rope.scaling.type", "STRING", False),
    ("deepseek4.rope.scaling.factor", "FLOAT32", False),
    ("deepseek4.rope.scaling.attn_factor", "FLOAT32", False),
    ("deepseek4.rope.scaling.alpha", "FLOAT32", False),
    ("deepseek4.attention.key_length", "UINT32", False),
    ("deepseek4.attention.value_length", "UINT32", False),
    ("deepseek4.rope.dimension_count", "UINT32", False),
    ("deepseek4.attention.key_length_swa", "UINT32", False),
    ("deepseek4.attention.value_length_swa", "UINT32", False),
    ("deepseek4.rope.dimension_count_swa", "UINT32", False),
    ("deepseek4.attention.layer_norm_rms_epsilon", "FLOAT32", True),
    ("deepseek4.attention.q_lora_rank", "UINT32", True),
    ("deepseek4.attention.sliding_window", "UINT32", True),
    ("deepseek4.expert_feed_forward_length", "UINT32*", True),
    ("deepseek4.expert_shared_count", "UINT32", True),
    ("deepseek4.expert_weights_scale", "FLOAT32", True),
    ("deepseek4.expert_weights_norm", "BOOL", True),
    ("deepseek4.swiglu_clamp_exp", "FLOAT32*", True),
    ("deepseek4.swiglu_clamp_shexp", "FLOAT32*", False),
    ("deepseek4.attention.indexer.head_count", "UINT32", True),
    ("deepseek4.attention.indexer.key_length", "UINT32", True),
    ("deepseek4.attention.indexer.top_k", "UINT32", True),
    ("deepseek4.attention.output_group_count", "UINT32", True),
    ("deepseek4.attention.output_lora_rank", "UINT32", True),
    ("deepseek4.attention.compress_rope_freq_base", "FLOAT32", True),
    ("deepseek4.hyper_connection.count", "UINT32", True),
    ("deepseek4.hyper_connection.sinkhorn_iterations", "UINT32", True),
    ("deepseek4.hyper_connection.epsilon", "FLOAT32", True),
    ("deepseek4.hash_layer_count", "UINT32", True),
    ("deepseek4.attention.compress_ratios", "[UINT32]", True),
    ("deepseek4.expert_gating_func", "UINT32", True),
)

# ---- tensors: name, shape (products of the names in `dimensions`), type class, layers, required ----
# Type classes: "matrix" any float or quantized type; "rows" too, looked up by row; "f32", "i32" exactly.
# Layers: "" not in a layer, "all", "compressed", "ratio 4", "hash" (routed by token), "scored", "next"
# (predicts further tokens). A shape in brackets: only the number of elements counts.

_MODEL_TENSORS = (
    ("token_embd.weight", "n_embd, n_vocab", "rows", "", True),
    ("output_norm.weight", "n_embd", "f32", "", True),
    ("output.weight", "n_embd, n_vocab", "matrix", "", True),
    ("output_hc_fn.weight", "streams*n_embd, streams", "matrix", "", True),
    ("output_hc_base.weight", "streams", "f32", "", True),
    ("output_hc_scale.weight", "1", "f32", "", True),
)
_LAYER_TENSORS = (
    ("attn_norm.weight", "n_embd", "f32", "all", True),
    ("attn_sinks.weight", "n_head", "f32", "all", True),
    ("attn_q_a.weight", "n_embd, q_rank", "matrix", "all", True),
    ("attn_q_a_norm.weight", "q_rank", "f32", "all", True),
    ("attn_q_b.weight", "q_rank, n_head*head", "matrix", "all", True),
    ("attn_kv.weight", "n_embd, head", "matrix", "all", True),
    ("attn_kv_a_norm.weight", "head", "f32", "all", True),
    ("attn_output_a.weight", "[group_width*out_rank*groups]", "matrix", "all", True),
    ("attn_output_b.weight", "groups*out_rank, n_embd", "matrix", "all", True),
    ("hc_attn_fn.weight", "streams*n_embd, mixes", "matrix", "all", True),
    ("hc_attn_base.weight", "mixes", "f32", "all", True),
    ("hc_attn_scale.weight", "3", "f32", "all", True),
    ("hc_ffn_fn.weight", "streams*n_embd, mixes", "matrix", "all", True),
    ("hc_ffn_base.weight", "mixes", "f32", "all", True),
    ("hc_ffn_scale.weight", "3", "f32", "all", True),
    ("attn_compressor_kv.weight", "n_embd, overlap*head", "matrix", "compressed", True),
    ("attn_compressor_gate.weight", "n_embd, overlap*head", "matrix", "compressed", True),
    ("attn_compressor_ape.weight", "overlap*head, ratio", "rows", "compressed", True),
    ("attn_compressor_norm.weight", "head", "f32", "compressed", True),
    ("indexer.proj.weight", "n_embd, index_heads", "matrix", "ratio 4", True),
    ("indexer.attn_q_b.weight", "q_rank, index_heads*index_head", "matrix", "ratio 4", True),
    ("indexer_compressor_kv.weight", "n_embd, 2*index_head", "matrix", "ratio 4", True),
    ("indexer_compressor_gate.weight", "n_embd, 2*index_head", "matrix", "ratio 4", True),
    ("indexer_compressor_ape.weight", "2*index_head, ratio", "rows", "ratio 4", True),
    ("indexer_compressor_norm.weight", "index_head", "f32", "ratio 4", True),
    ("ffn_gate_inp.weight", "n_embd, n_expert", "matrix", "all", True),
    ("ffn_gate_tid2eid.weight", "n_used, n_vocab", "i32", "hash", True),
    ("exp_probs_b.bias", "n_expert", "f32", "scored", True),
    ("exp_probs_b_vl.bias", "n_expert", "f32", "all", False),
    ("ffn_norm.weight", "n_embd", "f32", "all", True),
    ("ffn_gate_exps.weight", "n_embd, n_ff, n_expert", "matrix", "all", True),
    ("ffn_down_exps.weight", "n_ff, n_embd, n_expert", "matrix", "all", True),
    ("ffn_up_exps.weight", "n_embd, n_ff, n_expert", "matrix", "all", True),
    ("ffn_gate_shexp.weight", "n_embd, n_ff*n_shared", "matrix", "all", True),
    ("ffn_down_shexp.weight", "n_ff*n_shared, n_embd", "matrix", "all", True),
    ("ffn_up_shexp.weight", "n_embd, n_ff*n_shared", "matrix", "all", True),
    ("nextn.eh_proj.weight", "2*n_embd, n_embd", "matrix", "next", True),
    ("nextn.enorm.weight", "n_embd", "f32", "next", True),
    ("nextn.hnorm.weight", "n_embd", "f32", "next", True),
    ("nextn.embed_tokens.weight", "n_embd, n_vocab", "rows", "next", False),
    ("nextn.shared_head_head.weight", "n_embd, n_vocab", "matrix", "next", False),
    ("nextn.shared_head_norm.weight", "n_embd", "f32", "next", False),
)
# Optional scales beside matrices (NVFP4 files have them): one value, or one for each expert.
_SCALED = tuple(
    (f"{name}.{kind}", shape, "f32", "all", False)
    for kind in ("scale", "input_scale")
    for name, shape in (
        ("ffn_gate_shexp", "1"),
        ("ffn_down_shexp", "1"),
        ("ffn_up_shexp", "1"),
        ("ffn_gate_exps", "n_expert"),
        ("ffn_down_exps", "n_expert"),
        ("ffn_up_exps", "n_expert"),
    )
)

_INTEGER_TYPES = ("I8", "I16", "I32", "I64", "F64")
_TYPE_CLASSES: Mapping[str, Callable[[str], bool]] = {
    "matrix": lambda name: name not in (*_INTEGER_TYPES, "Q8_1", "Q8_K"),
    "rows": lambda name: name not in (*_INTEGER_TYPES, "Q8_1", "Q8_K"),
    "f32": lambda name: name == "F32",
    "i32": lambda name: name == "I32",
}
_CLASS_WORDS = {
    "matrix": "a float or quantized type",
    "rows": "a float or quantized type",
    "f32": "F32",
    "i32": "I32",
}

# Names in the dialect of the first conversions (general.architecture is deepseek4 there too, but other keys).
_OTHER_DIALECT = (
    (re.compile(r"(blk\.\d+\.)attn_kv_latent(\.weight)?"), r"\1attn_kv.weight"),
    (re.compile(r"(blk\.\d+\.)attn_compress_(\w+?)(\.weight)?"), r"\1attn_compressor_\2.weight"),
    (re.compile(r"(blk\.\d+\.)indexer\.compress_(\w+?)(\.weight)?"), r"\1indexer_compressor_\2.weight"),
    (re.compile(r"hc_head_(\w+?)(\.weight)?"), r"output_hc_\1.weight"),
    (re.compile(r"(blk\.\d+\.exp_probs_b)(\.weight)?"), r"\1.bias"),
    (re.compile(r"(.+)(?<!\.weight)(?<!\.bias)"), r"\1.weight"),
)


def check_compatibility(model: GGUFHeader | ShardSet | Sequence[GGUFHeader]) -> Compatibility:
    """Check a model's header (or its shards' headers, first one first) against llama.cpp's requirements.

    Nothing but the headers is read. For an architecture other than those in ``CHECKED`` the result says that
    nothing was checked.
    """
    headers = (
        model.headers if isinstance(model, ShardSet) else [model] if isinstance(model, GGUFHeader) else model
    )
    header = headers[0]
    architecture = header.architecture if isinstance(header.architecture, str) else ""
    if architecture not in CHECKED:
        return Compatibility(architecture, checked=False)
    tensors = {tensor.name: tensor for one in headers for tensor in one.tensors}
    return Compatibility(architecture, True, tuple(_Check(header, tensors).problems()))


def compatibility_table(found: Compatibility) -> pd.DataFrame:
    """One row a problem, in the order in which llama.cpp meets them: ``item``, ``required``, ``found``,
    ``consequence``, ``aborts``."""
    import pandas as pd

    columns = ["item", "required", "found", "consequence", "aborts"]
    return pd.DataFrame([[getattr(one, name) for name in columns] for one in found.problems], columns=columns)


class _Check:
    """One pass over a header; what depends on a value that is not there is not judged."""

    def __init__(self, header: GGUFHeader, tensors: Mapping[str, Tensor]) -> None:
        self.header, self.tensors = header, tensors
        self.expected: set[str] = set()
        self.of_wrong_type: list[Problem] = []  # loads, and ends the process later
        self.aliases = {_renamed(name): name for name in tensors}

    def problems(self) -> Iterator[Problem]:
        yield from self.keys(_GENERAL_KEYS)
        yield from self.expert_counts()
        yield from self.keys(_MODEL_KEYS)
        yield from self.vocabulary()
        yield from self.tensor_table()
        yield from self.graph()
        yield from self.of_wrong_type

    # keys

    def number(self, key: str, default: int | None = None) -> int | None:
        """An integer of the architecture; of an array the first layer's; ``default`` when missing."""
        value = self.header.arch(key, default)
        if isinstance(value, list):
            value = value[0] if value else None
        return value if isinstance(value, int) else None

    @property
    def n_layers(self) -> int:
        """All layers, those that predict further tokens included; 0 when the header does not say it well."""
        count = self.number("block_count") or 0
        return count if count <= MAX_LAYERS else 0

    @property
    def n_next(self) -> int:
        """Layers that predict further tokens; llama.cpp counts them when the file has their tensors."""
        count = self.number("nextn_predict_layers", 0) or 0
        probe = f"blk.{self.n_layers - count}.nextn.eh_proj.weight"
        return count if 0 < count <= self.n_layers and probe in self.tensors else 0

    def keys(self, table: Sequence[tuple[str, str, bool]]) -> Iterator[Problem]:
        for name, kind, required in table:
            if name not in self.header:
                if required:
                    yield Problem(name, _described(kind), "missing", f"key not found in model: {name}")
            else:
                yield from self.key_type(name, kind)
            yield from self.key_value(name)

    def key_type(self, name: str, kind: str) -> Iterator[Problem]:
        """A key that is there, of another type than the loader reads."""
        found = self.header.fields[name]
        what = _described(found.type if found.count is None else f"[{found.type}]")
        base = kind.strip("[]*")

        def problem(consequence: str) -> Problem:
            return Problem(name, _described(kind), what, consequence)

        if found.count is None:
            wanted = "arr" if kind.startswith("[") else TYPE_NAMES[base]
            if TYPE_NAMES.get(found.type) != wanted:
                yield problem(
                    f"key {name} has wrong type {TYPE_NAMES.get(found.type)} but expected type {wanted}"
                )
        elif kind == base:
            yield problem(f"key {name} has wrong type arr but expected type {TYPE_NAMES[base]}")
        elif kind.endswith("*") and found.count != self.n_layers:
            yield Problem(
                name,
                f"{self.n_layers} values",
                f"{found.count} values",
                f"key {name} has wrong array length; expected {self.n_layers}, got {found.count}",
            )
        elif found.type not in (("UINT32", "INT32", "BOOL") if base == "UINT32" else (base,)):
            if found.type in ("UINT32", "INT32", "BOOL", "UINT64", "FLOAT32", "STRING"):
                yield problem(f"{name} has wrong array element type {TYPE_NAMES[found.type]}")
            else:
                yield problem(f"{name} is not a string/float32/uint32/int32/uint64 array")

    def key_value(self, name: str) -> Iterator[Problem]:
        """A key of the right type whose value the loader does not accept."""
        value, key = self.header.get(name), name.removeprefix("deepseek4.")

        def wrong(required: str, consequence: str, aborts: bool = False) -> Problem:
            shown = f"{len(value)} values" if isinstance(value, list) else repr(value)
            return Problem(name, required, shown, consequence, aborts)

        if key == "block_count" and isinstance(value, int) and not 0 < value <= MAX_LAYERS:
            yield wrong(
                f"1 to {MAX_LAYERS}",
                ABORTS.format("hparams.n_layer_all > 0 && hparams.n_layer_all <= LLAMA_MAX_LAYERS"),
                True,
            )
        if (
            key == "nextn_predict_layers"
            and isinstance(value, int)
            and value > (self.number("block_count") or 0)
        ):
            yield wrong(
                "at most block_count", ABORTS.format("hparams.n_layer_nextn <= hparams.n_layer_all"), True
            )
        if (
            key == "rope.scaling.type"
            and isinstance(value, str)
            and value not in ("none", "linear", "yarn", "longrope")
        ):
            yield wrong(
                "none, linear, yarn or longrope",
                ABORTS.format("hparams.rope_scaling_type_train != LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED"),
                True,
            )
        if key == "attention.compress_ratios" and isinstance(value, list):
            if len(value) < self.n_layers:
                yield wrong(
                    f"{self.n_layers} values", "DeepSeek-V4 compress_ratios is shorter than block_count"
                )
            if len(value) > MAX_LAYERS:
                yield wrong(
                    f"at most {MAX_LAYERS} values",
                    ABORTS.format("n_compress_ratios <= LLAMA_MAX_LAYERS"),
                    True,
                )
        if key == "attention.output_group_count" and value == 0 and isinstance(value, int):
            yield wrong("over 0", "the process ends in a division by zero", True)
        if key == "expert_gating_func" and isinstance(value, int) and value != SQRT_SOFTPLUS:
            yield wrong(
                f"{SQRT_SOFTPLUS} (sqrtsoftplus)",
                "DeepSeek-V4 loader currently expects sqrtsoftplus MoE scoring",
            )

    def expert_counts(self) -> Iterator[Problem]:
        """The assertions on the number of experts, all of which end the process."""
        n_expert = self.number("expert_count", 0)
        value = self.header.arch("expert_used_count", 0)
        used = max(value, default=0) if isinstance(value, list) else value
        groups, groups_used = self.number("expert_group_count", 0), self.number("expert_group_used_count", 0)
        if not all(isinstance(one, int) for one in (n_expert, used, groups, groups_used)):
            return
        for holds, required, assertion in (
            (
                n_expert <= MAX_EXPERTS,
                f"at most {MAX_EXPERTS} experts",
                "hparams.n_expert <= LLAMA_MAX_EXPERTS",
            ),
            (
                used <= n_expert,
                "expert_used_count at most expert_count",
                "n_expert_used_max <= hparams.n_expert",
            ),
            (used > 0 or n_expert == 0, "expert_used_count over 0", "n_expert_used_max > 0"),
            (
                groups < n_expert or n_expert == 0,
                "expert_group_count under expert_count",
                "hparams.n_expert_groups < hparams.n_expert",
            ),
            (
                groups <= 1 or n_expert % groups == 0,
                "expert_count a multiple of expert_group_count",
                "hparams.n_expert % hparams.n_expert_groups == 0",
            ),
            (
                groups <= 1 or 0 < groups_used < groups,
                "expert_group_used_count from 1 to under expert_group_count",
                "hparams.n_group_used",
            ),
        ):
            if not holds:
                yield Problem(
                    "deepseek4.expert_count",
                    required,
                    f"{n_expert} experts, {used} used, {groups} groups",
                    ABORTS.format(assertion).replace("n_group_used)", "n_group_used"),
                    True,
                )
                return
        if n_expert == 0:
            yield Problem(
                "deepseek4.expert_count",
                "over 0",
                "missing or 0",
                "tensor 'blk.0.ffn_gate_inp.weight' has wrong shape",
            )

    # tokenizer

    def vocabulary(self) -> Iterator[Problem]:
        """What every byte-pair tokenizer needs; for other tokenizers only their name is read here."""
        model = self.header.get("tokenizer.ggml.model")
        yield from self.keys(
            (("tokenizer.ggml.model", "STRING", True), ("tokenizer.ggml.pre", "STRING", False))
        )
        if model != "gpt2":
            return
        fields = self.header.fields
        for name, consequence in (
            ("tokenizer.ggml.merges", "cannot find tokenizer merges in model file"),
            ("tokenizer.ggml.tokens", "cannot find tokenizer vocab in model file"),
        ):
            if name not in fields:
                yield Problem(name, "array of str", "missing", consequence)
            elif (fields[name].type, fields[name].count is None) != ("STRING", False):
                yield Problem(name, "array of str", fields[name].type, f"invalid gguf type for {name}")
        yield from self.token_columns()

    def token_columns(self) -> Iterator[Problem]:
        """Scores and types beside the tokens, and the tokens themselves: each must be there once."""
        fields, n_tokens = self.header.fields, self.n_tokens
        if n_tokens is None:
            return
        for name, types, words in (
            ("tokenizer.ggml.scores", ("FLOAT32", "INT32"), "scores"),
            ("tokenizer.ggml.token_type", ("INT32",), "toktypes"),
        ):
            found = fields.get(name)
            if found is None:
                continue
            if found.count is None or found.type not in types:
                yield Problem(
                    name,
                    f"array of {' or '.join(TYPE_NAMES[one] for one in types)}",
                    found.type,
                    f"invalid gguf type for {name}",
                )
            elif found.count < n_tokens:
                yield Problem(
                    name,
                    f"{n_tokens:,} values",
                    f"{found.count:,} values",
                    f"Index out of array bounds for {words} ({found.count} < {n_tokens})",
                )
        tokens = self.header["tokenizer.ggml.tokens"]
        if len(set(tokens)) != n_tokens:
            yield Problem(
                "tokenizer.ggml.tokens",
                "each token once",
                f"{n_tokens - len(set(tokens)):,} repeated",
                ABORTS.format("id_to_token.size() == token_to_id.size()"),
                True,
            )

    @property
    def n_tokens(self) -> int | None:
        found = self.header.fields.get("tokenizer.ggml.tokens")
        return found.count if found is not None and found.type == "STRING" else None

    # tensors

    def dimensions(self, layer: int | None = None) -> dict[str, int]:
        """The names that shapes are written in; those that the header does not give are left out."""
        n_embd, n_head = self.number("embedding_length"), self.number("attention.head_count", 0)
        streams, ratio = self.number("hyper_connection.count"), self.ratio(layer)
        head = (
            self.number("attention.key_length", n_embd // n_head if n_embd and n_head else 0) if n_head else 0
        )
        groups = self.number("attention.output_group_count")
        values_per_group = None if None in (n_head, head) or not groups else n_head * head // groups
        values = {
            "n_embd": n_embd,
            "n_vocab": self.n_tokens,
            "n_head": n_head,
            "head": head,
            "q_rank": self.number("attention.q_lora_rank"),
            "out_rank": self.number("attention.output_lora_rank"),
            "groups": groups,
            "group_width": values_per_group,
            "streams": streams,
            "mixes": None if streams is None else (2 + streams) * streams,
            "n_expert": self.number("expert_count", 0),
            "n_used": self.number("expert_used_count", 0),
            "n_ff": self.number("expert_feed_forward_length"),
            "n_shared": self.number("expert_shared_count"),
            "index_heads": self.number("attention.indexer.head_count"),
            "index_head": self.number("attention.indexer.key_length"),
            "ratio": ratio,
            "overlap": None if ratio is None else 2 if ratio == 4 else 1,
        }
        return {name: value for name, value in values.items() if value is not None}

    def ratio(self, layer: int | None) -> int | None:
        ratios = self.header.arch("attention.compress_ratios")
        if layer is None or not isinstance(ratios, list) or layer >= len(ratios):
            return None
        return ratios[layer] if isinstance(ratios[layer], int) else None

    def tensor_table(self) -> Iterator[Problem]:
        dimensions = self.dimensions()
        for name, shape, kind, _, required in _MODEL_TENSORS:
            yield from self.tensor(name, shape, kind, required, dimensions)
        for table in (_LAYER_TENSORS, _SCALED):  # the scales of all layers come after everything else
            for layer in range(self.n_layers):
                yield from self.layer(layer, table)
        output = self.tensors.get("output.weight")
        if output is not None and output.type == "NVFP4":
            for name in ("output.scale", "output.input_scale"):
                yield from self.tensor(name, "1", "f32", False, dimensions)
        yield from self.unexpected()

    def layer(self, layer: int, table: Sequence[tuple[str, str, str, str, bool]]) -> Iterator[Problem]:
        dimensions, ratio = self.dimensions(layer), self.ratio(layer)
        hashed = self.number("hash_layer_count")
        applies = {
            "all": True,
            "compressed": ratio not in (None, 0),
            "ratio 4": ratio == 4,
            "hash": hashed is not None and layer < hashed,
            "scored": hashed is not None and layer >= hashed,
            "next": layer >= self.n_layers - self.n_next,
        }
        for name, shape, kind, where, required in table:
            if name == "ffn_gate_inp.weight" and ratio not in (None, 0, 4, 128):
                yield Problem(
                    f"deepseek4.attention.compress_ratios[{layer}]",
                    "0, 4 or 128",
                    str(ratio),
                    "DeepSeek-V4 loader only supports compression ratios 0, 4, and 128",
                )
            if applies[where]:
                yield from self.tensor(f"blk.{layer}.{name}", shape, kind, required, dimensions)

    def tensor(
        self, name: str, shape: str, kind: str, required: bool, dimensions: Mapping[str, int]
    ) -> Iterator[Problem]:
        self.expected.add(name)
        found, wanted = self.tensors.get(name), _shape(shape, dimensions)
        shown = f"{_CLASS_WORDS[kind]}, {_shown(wanted, shape)}"
        if found is None:
            if required:
                alias = self.aliases.get(name)
                yield Problem(
                    name, shown, f"named {alias!r}" if alias else "missing", f"tensor '{name}' not found"
                )
            return
        if wanted is not None and not _fits(found.shape, wanted, shape):
            yield Problem(
                name, shown, f"{found.type}, {_shown(found.shape)}", f"tensor '{name}' has wrong shape"
            )
        elif not _TYPE_CLASSES[kind](found.type):
            there = f"{found.type}, {_shown(found.shape)}"
            what = "the process ends when it first computes with it"
            self.of_wrong_type.append(Problem(name, shown, there, what, aborts=True))

    def unexpected(self) -> Iterator[Problem]:
        """Tensors that nothing asks for: the loader counts, and refuses a file with more than it used."""
        if self.ratio(0) is None or self.number("hash_layer_count") is None or not self.n_layers:
            return  # which tensors are asked for is not known
        extra = [name for name in self.tensors if name not in self.expected]
        used = len(self.tensors) - len(extra)
        for name in extra:
            meant = _renamed(name)
            found = (
                f"named so in another dialect: {meant!r} is meant"
                if meant in self.expected
                else "not asked for"
            )
            yield Problem(
                name,
                "no such tensor",
                found,
                f"wrong number of tensors; expected {len(self.tensors)}, got {used}",
            )

    # what the first graph asserts

    def graph(self) -> Iterator[Problem]:
        """Assertions that fire when the context is made, after a load that went well."""
        have = self.dimensions()
        n_kv = self.number("attention.head_count_kv", have.get("n_head"))
        if n_kv == 0:
            yield Problem(
                "deepseek4.attention.head_count_kv", "1", "0", "failed to allocate buffer for kv cache"
            )
        elif n_kv not in (None, 1):
            yield Problem(
                "deepseek4.attention.head_count_kv",
                "1",
                f"{n_kv} (head_count, when the key is missing)",
                ABORTS.format("a->ne[0] == b->ne[0]"),
                aborts=True,
            )
        value_length = self.number("attention.value_length", have.get("head"))
        rotary = self.number("rope.dimension_count", have.get("head"))
        rules = (
            (
                "hyper_connection.count",
                f"{N_STREAMS}",
                have.get("streams"),
                lambda x: x == N_STREAMS,
                "hc == 4",
            ),
            (
                "hyper_connection.sinkhorn_iterations",
                "over 0",
                self.number("hyper_connection.sinkhorn_iterations"),
                lambda x: 0 < x < 1 << 31,
                "n_iter > 0",
            ),
            (
                "attention.value_length",
                "the same as key_length",
                value_length,
                lambda x: x == have.get("head"),
                "n_embd_head == n_embd_head_v",
            ),
            (
                "attention.output_group_count",
                "a divisor of head_count",
                have.get("groups"),
                lambda x: x > 0 and have.get("n_head", 0) % x == 0,
                "n_head % n_groups == 0",
            ),
            (
                "rope.dimension_count",
                "at most key_length and the indexer's key_length",
                rotary,
                lambda x: x <= min(have.get("head", x), have.get("index_head", x)),
                "n_embd_head >= n_embd_head_rope",
            ),
        )
        for key, required, value, holds, assertion in rules:
            if value is not None and not holds(value):
                yield Problem(f"deepseek4.{key}", required, str(value), ABORTS.format(assertion), aborts=True)


def _described(kind: str) -> str:
    """
    >>> _described("UINT32*"), _described("[INT32]"), _described("STRING")
    ('u32, or an array with one for each layer', 'array of i32', 'str')
    """
    base = TYPE_NAMES.get(kind.strip("[]*"), kind)
    return (
        f"array of {base}"
        if kind.startswith("[")
        else f"{base}, or an array with one for each layer"
        if kind.endswith("*")
        else base
    )


def _shape(shape: str, dimensions: Mapping[str, int]) -> tuple[int, ...] | None:
    """The extents that a shape is written for, or ``None`` when the header lacks one.

    >>> _shape("n_embd, 2*head", {"n_embd": 8, "head": 3})
    (8, 6)
    """
    extents = []
    for product in shape.strip("[]").split(", "):
        factors = [int(one) if one.isdigit() else dimensions.get(one) for one in product.split("*")]
        if None in factors:
            return None
        extents.append(math.prod(factors))
    return tuple(extents)


def _fits(found: tuple[int, ...], wanted: tuple[int, ...], shape: str) -> bool:
    if shape.startswith("["):
        return math.prod(found) == math.prod(wanted)
    longest = max(len(found), len(wanted))
    return found + (1,) * (longest - len(found)) == wanted + (1,) * (longest - len(wanted))


def _shown(extents: tuple[int, ...] | None, shape: str = "") -> str:
    if extents is None:
        return f"shape ({shape})"
    if shape.startswith("["):
        return f"{extents[0]:,} elements"
    return " x ".join(str(extent) for extent in extents)


def _renamed(name: str) -> str:
    """The name that llama.cpp gives a tensor of the early dialect, or an empty string.

    >>> _renamed("blk.3.attn_kv_latent.weight"), _renamed("hc_head_fn"), _renamed("blk.0.hc_attn_base")
    ('blk.3.attn_kv.weight', 'output_hc_fn.weight', 'blk.0.hc_attn_base.weight')
    """
    for pattern, replacement in _OTHER_DIALECT:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    return ""
