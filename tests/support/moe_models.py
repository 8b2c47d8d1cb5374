"""Tiny random mixture-of-experts models of several architectures, written from llama.cpp's loaders
(src/models/*.cpp), and an independent account of what their routers choose.

Each has 8 experts (llama.cpp's own tests/test-llama-archs writes 2 of 2, where there is nothing to choose).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from gguf_fixtures import Spec, field, gguf_bytes

EMBD, HEADS, HEAD, EXPERTS, WIDTH, VOCAB = 64, 2, 32, 8, 32, 96
LORA, ROPE, NOPE = 32, 16, 16  # of deepseek2's compressed attention
# deepseek2 is DeepSeek-V2 and V3; llama with experts is Mixtral
ARCHITECTURES = ("qwen3moe", "olmoe", "granitemoe", "deepseek2", "glm4moe", "gpt-oss", "llama", "llama4")
USED = {"qwen3moe": 3, "deepseek2": 3, "llama4": 1}  # others 2
GROUPS, GROUPS_USED = 4, 2  # of deepseek2
LAYERS = {"llama4": 4}  # its fourth layer alone reads the positions that llama.cpp hands it; others 2
LEAD = {"deepseek2": 1, "glm4moe": 1}  # dense layers before the first router
SHARED = ("deepseek2", "glm4moe", "llama4")  # have an expert that every token uses


def write_model(arch: str, folder: Path, seed: int = 5) -> Path:
    """Write the model of this architecture and return its path."""
    rng = np.random.default_rng(seed)

    def tensor(name: str, *shape: int) -> Spec:
        norm = "norm" in name
        values = np.ones(shape[::-1]) if norm else rng.normal(0, 1.5 / shape[0] ** 0.5, shape[::-1])
        return Spec(name, "F32", shape, data=values.astype("<f4").tobytes())

    tensors = [
        tensor("token_embd.weight", EMBD, VOCAB),
        tensor("output_norm.weight", EMBD),
        tensor("output.weight", EMBD, VOCAB),
    ]
    for layer in range(LAYERS.get(arch, 2)):
        tensors += [tensor(f"blk.{layer}.{name}", *shape) for name, shape in _block(arch, layer)]
    path = folder / f"{arch}.gguf"
    path.write_bytes(gguf_bytes(_fields(arch), tensors))
    return path


def _block(arch: str, layer: int) -> list[tuple[str, tuple[int, ...]]]:
    wide = HEADS * HEAD
    block = [("attn_norm.weight", (EMBD,)), ("attn_output.weight", (wide, EMBD))]
    if arch == "deepseek2":
        block += [
            ("attn_q_a.weight", (EMBD, LORA)),
            ("attn_q_a_norm.weight", (LORA,)),
            ("attn_q_b.weight", (LORA, HEADS * (NOPE + ROPE))),
            ("attn_kv_a_mqa.weight", (EMBD, LORA + ROPE)),
            ("attn_kv_a_norm.weight", (LORA,)),
            ("attn_k_b.weight", (NOPE, LORA, HEADS)),
            ("attn_v_b.weight", (LORA, HEAD, HEADS)),
        ]
    else:
        block += [(f"attn_{x}.weight", (EMBD, wide)) for x in "qkv"]
    if arch == "qwen3moe":
        block += [("attn_q_norm.weight", (HEAD,)), ("attn_k_norm.weight", (HEAD,))]
    if arch == "olmoe":
        block += [("attn_q_norm.weight", (EMBD,)), ("attn_k_norm.weight", (EMBD,))]
    if arch == "gpt-oss":
        block += [(f"attn_{x}.bias", (wide,)) for x in "qkv"]
        block += [
            ("attn_output.bias", (EMBD,)),
            ("attn_sinks.weight", (HEADS,)),
            ("post_attention_norm.weight", (EMBD,)),
            ("ffn_gate_inp.bias", (EXPERTS,)),
            ("ffn_gate_exps.bias", (WIDTH, EXPERTS)),
            ("ffn_up_exps.bias", (WIDTH, EXPERTS)),
            ("ffn_down_exps.bias", (EMBD, EXPERTS)),
        ]
    else:
        block += [(f"{'post_attention' if arch == 'glm4moe' else 'ffn'}_norm.weight", (EMBD,))]
    if layer < LEAD.get(arch, 0):
        return block + [
            ("ffn_gate.weight", (EMBD, WIDTH)),
            ("ffn_up.weight", (EMBD, WIDTH)),
            ("ffn_down.weight", (WIDTH, EMBD)),
        ]
    if arch in ("deepseek2", "glm4moe"):
        block += [("exp_probs_b.bias", (EXPERTS,))]
    if arch in SHARED:
        block += [
            ("ffn_gate_shexp.weight", (EMBD, WIDTH)),
            ("ffn_up_shexp.weight", (EMBD, WIDTH)),
            ("ffn_down_shexp.weight", (WIDTH, EMBD)),
        ]
    return block + [
        ("ffn_gate_inp.weight", (EMBD, EXPERTS)),
        ("ffn_gate_exps.weight", (EMBD, WIDTH, EXPERTS)),
        ("ffn_up_exps.weight", (EMBD, WIDTH, EXPERTS)),
        ("ffn_down_exps.weight", (WIDTH, EMBD, EXPERTS)),
    ]


def _fields(arch: str) -> list[bytes]:
    numbers = {
        "vocab_size": VOCAB,
        "context_length": 256,
        "embedding_length": EMBD,
        "block_count": LAYERS.get(arch, 2),
        "feed_forward_length": WIDTH,
        "expert_feed_forward_length": WIDTH,
        "expert_count": EXPERTS,
        "expert_used_count": USED.get(arch, 2),
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.dimension_count": HEAD,
    }
    floats = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4}
    more = []
    if arch == "deepseek2":
        numbers |= {
            "attention.head_count_kv": 1,
            "attention.key_length": LORA + ROPE,
            "attention.value_length": LORA,
            "rope.dimension_count": ROPE,
            "attention.q_lora_rank": LORA,
            "attention.kv_lora_rank": LORA,
            "attention.key_length_mla": NOPE + ROPE,
            "attention.value_length_mla": HEAD,
            "leading_dense_block_count": LEAD[arch],
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_group_count": GROUPS,
            "expert_group_used_count": GROUPS_USED,
        }
        floats |= {"expert_weights_scale": 2.5}
        more = [field(f"{arch}.expert_weights_norm", "BOOL", True)]
    if arch == "glm4moe":
        numbers |= {"leading_dense_block_count": LEAD[arch], "expert_shared_count": 1}
        floats |= {"expert_weights_scale": 1.5}
        more = [field(f"{arch}.expert_weights_norm", "BOOL", True)]
    if arch == "llama4":
        numbers |= {"interleave_moe_layer_step": 1}
    if arch == "granitemoe":
        floats |= {"logit_scale": 1.0}
    if arch == "gpt-oss":
        numbers |= {"attention.sliding_window": 32}
    return [
        field("general.architecture", "STRING", arch),
        *more,
        *(field(f"{arch}.{name}", "UINT32", value) for name, value in numbers.items()),
        *(field(f"{arch}.{name}", "FLOAT32", value) for name, value in floats.items()),
        field("tokenizer.ggml.model", "STRING", "test"),
        field("tokenizer.ggml.tokens", "[STRING]", [f"tok_{i}" for i in range(VOCAB)]),
        field("tokenizer.ggml.token_type", "[INT32]", [1] * VOCAB),
        field("tokenizer.ggml.scores", "[FLOAT32]", [0.0] * VOCAB),
        field("tokenizer.ggml.add_bos_token", "BOOL", False),
    ]


# ---- what the routers choose, by the published formulas, in float64 ----


def choose(arch: str, logits: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Experts (best first), their weights, and the margin, from router logits ``(n, experts)``."""
    used = USED.get(arch, 2)
    logits = logits.astype(np.float64)
    if arch == "deepseek2":  # sigmoid, a bias for the choice only, and the best groups by their best two
        scores = 1 / (1 + np.exp(-logits))
        biased = scores + bias
        grouped = biased.reshape(len(logits), GROUPS, -1)
        best_two = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.argsort(-best_two, axis=1)[:, :GROUPS_USED]
        allowed = np.zeros((len(logits), GROUPS), bool)
        np.put_along_axis(allowed, kept, True, axis=1)
        selection = np.where(np.repeat(allowed, EXPERTS // GROUPS, axis=1), biased, -np.inf)
    elif arch in ("glm4moe", "llama4"):  # sigmoid; the best logits choose, with glm4moe's bias on the scores
        scores = 1 / (1 + np.exp(-logits))
        selection = logits if arch == "llama4" else scores + bias
    else:
        scores = selection = logits if arch == "gpt-oss" else _softmax(logits)
    order = np.argsort(-selection, axis=1, kind="stable")[:, : used + 1]
    experts, ranked = order[:, :used], np.take_along_axis(selection, order, axis=1)
    weights = np.take_along_axis(scores, experts, axis=1)
    if arch == "gpt-oss":
        weights = _softmax(weights)
    if arch in ("qwen3moe", "granitemoe", "deepseek2", "glm4moe", "llama"):
        weights = weights / weights.sum(axis=1, keepdims=True)
    weights *= {"deepseek2": 2.5, "glm4moe": 1.5}.get(arch, 1.0)
    return experts, weights, ranked[:, used - 1] - ranked[:, used]


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# ---- the plainest reading there is: every router node, by name, one after another ----


class PlainReader:
    """A second recorder that shares nothing with the first: asks for all nodes called ``ffn_moe_*``, reads
    them through libggml's own functions, one element at a time."""

    def __init__(self) -> None:
        import llama_cpp._ggml as ggml
        import llama_cpp.llama_cpp as api

        self.found: dict[str, list[np.ndarray]] = {}
        self.tokens: list[int] = []
        self._ggml = ggml.libggml
        self._ggml.ggml_get_name.restype, self._ggml.ggml_get_name.argtypes = (
            ctypes.c_char_p,
            [ctypes.c_void_p],
        )
        for name in ("ggml_nrows", "ggml_nelements"):
            getattr(self._ggml, name).restype = ctypes.c_int64
            getattr(self._ggml, name).argtypes = [ctypes.c_void_p]
        for name, result in (("ggml_get_f32_nd", ctypes.c_float), ("ggml_get_i32_nd", ctypes.c_int32)):
            library = self._element_functions()
            function = getattr(library, name)
            function.restype, function.argtypes = result, [ctypes.c_void_p, *[ctypes.c_int] * 4]
            setattr(self, name, function)
        self.callback = api.ggml_backend_sched_eval_callback(self._hear)

    def _element_functions(self):
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        return ctypes.CDLL(str(next(folder.glob("libggml-cpu*.so"))))

    def _hear(self, tensor: int, ask: bool, _data: object) -> bool:
        name = self._ggml.ggml_get_name(tensor).decode()
        if name == "embd" and ask:  # its second source holds the tokens: src[1] of struct ggml_tensor
            inputs = ctypes.c_void_p.from_address(tensor + 160).value
            n = self._ggml.ggml_nelements(inputs)
            self.tokens += [self.ggml_get_i32_nd(inputs, i, 0, 0, 0) for i in range(n)]
        if not name.startswith("ffn_moe_") or "(" in name:
            return False
        kind = name.rsplit("-", 1)[0].removeprefix("ffn_moe_")
        if kind not in (
            "logits",
            "probs",
            "topk",
            "weights",
            "weights_norm",
            "weights_scaled",
            "weights_softmax",
        ):
            return False
        if not ask:
            shape = [s for s in (ctypes.c_int64 * 4).from_address(tensor + 16)]
            n = shape[2] if kind.startswith("weights") and shape[0] == 1 else shape[1]
            width = self._ggml.ggml_nelements(tensor) // n
            get = self.ggml_get_i32_nd if kind == "topk" else self.ggml_get_f32_nd
            three = kind.startswith("weights") and shape[0] == 1
            rows = [
                [get(tensor, 0, j, i, 0) if three else get(tensor, j, i, 0, 0) for j in range(width)]
                for i in range(n)
            ]
            self.found.setdefault(name.removeprefix("ffn_moe_"), []).append(np.array(rows))
        return True

    def rows(self, kind: str, layer: int) -> np.ndarray:
        """Everything read from this node, in the order of the tokens."""
        return np.concatenate(self.found[f"{kind}-{layer}"])
