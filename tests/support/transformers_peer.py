"""A tiny random DeepSeek-V4 model by ``transformers``: written as GGUF, evaluated, and its routers overheard.

    python tests/support/transformers_peer.py MODEL.gguf ONE_SEQUENCE.npz BATCH.npz

Needs torch and transformers (``pip install --group peer``). Names of tensors: llama.cpp's conversion/deepseek.py and
transformers' conversion_mapping.py for ``deepseek_v4``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import torch
from gguf_fixtures import Spec, field, gguf_bytes
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

N_TOKENS, VOCAB, RATIOS, HASH_LAYERS = 700, 256, [0, 4, 128, 4], 1
BATCH = (3, 240)  # sequences, and tokens of each
KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": len(RATIOS),
    "num_attention_heads": 4,
    "head_dim": 64,
    "q_lora_rank": 64,
    "num_experts_per_tok": 2,
    "n_routed_experts": 16,
    "o_groups": 2,
    "o_lora_rank": 32,
    "index_n_heads": 4,
    "index_head_dim": 64,
    # above 700 / 4 compressed entries: where the indexer has to choose among them, its own near-ties part the
    # two implementations (at 64, logits agree to 2e-5 up to token 256, and to 2 after it)
    "index_topk": 192,
    "sliding_window": 64,
    "partial_rotary_factor": 0.5,
}

# transformers' name in a layer -> GGUF's
LAYER = {
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_norm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_proj.weight": "attn_kv.weight",
    "self_attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_a_proj.weight": "attn_output_a.weight",
    "self_attn.o_b_proj.weight": "attn_output_b.weight",
    "self_attn.compressor.position_bias": "attn_compressor_ape.weight",
    "self_attn.compressor.kv_proj.weight": "attn_compressor_kv.weight",
    "self_attn.compressor.gate_proj.weight": "attn_compressor_gate.weight",
    "self_attn.compressor.kv_norm.weight": "attn_compressor_norm.weight",
    "self_attn.compressor.indexer.position_bias": "indexer_compressor_ape.weight",
    "self_attn.compressor.indexer.kv_proj.weight": "indexer_compressor_kv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "indexer_compressor_gate.weight",
    "self_attn.compressor.indexer.kv_norm.weight": "indexer_compressor_norm.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "indexer.attn_q_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "indexer.proj.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{
        f"{at}_hc.{part}": f"hc_{at}_{part}.weight"
        for at in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
}
ROOT = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.hc_head.hc_fn": "output_hc_fn.weight",
    "model.hc_head.hc_base": "output_hc_base.weight",
    "model.hc_head.hc_scale": "output_hc_scale.weight",
}


def random_model(seed: int = 7) -> DeepseekV4ForCausalLM:
    """Every weight random, norms around 1, the hash table too."""
    config = DeepseekV4Config(
        **SIZES,
        layer_types=[KINDS[ratio] for ratio in RATIOS],
        attn_implementation="eager",
        mlp_layer_types=["hash_moe"] * HASH_LAYERS + ["moe"] * (len(RATIOS) - HASH_LAYERS),
    )
    model = DeepseekV4ForCausalLM(config).eval()
    maker = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("tid2eid"):
            value.copy_(torch.stack([torch.randperm(16, generator=maker)[:2] for _ in range(VOCAB)]))
            continue
        noise = torch.randn(value.shape, generator=maker)
        if "norm" in name or name.endswith("scale"):
            value.copy_(1 + 0.1 * noise)
        else:
            value.copy_(noise / max(value.shape[-1], 8) ** 0.5 if value.dim() > 1 else 0.1 * noise)
    return model


def write_gguf(model: DeepseekV4ForCausalLM, path: Path) -> None:
    tensors = []
    for name, value in model.state_dict().items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        data = value.numpy()
        if match is None:
            tensors.append(spec(ROOT[name], data))
        elif match[2] == "mlp.experts.gate_up_proj":
            gate, up = np.split(data, 2, axis=1)
            tensors += [
                spec(f"blk.{match[1]}.ffn_gate_exps.weight", gate),
                spec(f"blk.{match[1]}.ffn_up_exps.weight", up),
            ]
        else:
            tensors.append(spec(f"blk.{match[1]}.{LAYER[match[2]]}", data))
    path.write_bytes(gguf_bytes(fields(model.config), tensors))


def spec(name: str, data: np.ndarray) -> Spec:
    kind, code = ("I32", "<i4") if "tid2eid" in name else ("F32", "<f4")
    return Spec(name, kind, data.shape[::-1], data=np.ascontiguousarray(data, code).tobytes())


def fields(config: DeepseekV4Config) -> list[bytes]:
    layers = len(RATIOS)
    numbers = {
        "block_count": layers,
        "context_length": 4096,
        "embedding_length": config.hidden_size,
        "embedding_length_out": config.hidden_size * config.hc_mult,
        "vocab_size": VOCAB,
        "feed_forward_length": config.moe_intermediate_size,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "rope.dimension_count": 32,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.sliding_window": config.sliding_window,
        "expert_count": 16,
        "expert_used_count": 2,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": 1,
        "expert_gating_func": 4,
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk,
        "attention.output_group_count": config.o_groups,
        "attention.output_lora_rank": config.o_lora_rank,
        "hyper_connection.count": config.hc_mult,
        "hash_layer_count": HASH_LAYERS,
        "hyper_connection.sinkhorn_iterations": config.hc_sinkhorn_iters,
    }
    floats = {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "expert_weights_scale": config.routed_scaling_factor,
        "hyper_connection.epsilon": config.hc_eps,
        "attention.compress_rope_freq_base": config.compress_rope_theta,
    }
    a = "deepseek4"
    return [
        field("general.architecture", "STRING", a),
        *(field(f"{a}.{name}", "UINT32", value) for name, value in numbers.items()),
        *(field(f"{a}.{name}", "FLOAT32", value) for name, value in floats.items()),
        field(f"{a}.expert_weights_norm", "BOOL", True),
        field(f"{a}.swiglu_clamp_exp", "[FLOAT32]", [config.swiglu_limit] * layers),
        field(f"{a}.swiglu_clamp_shexp", "[FLOAT32]", [config.swiglu_limit] * layers),
        field(f"{a}.attention.compress_ratios", "[INT32]", RATIOS),
        field("tokenizer.ggml.model", "STRING", "test"),
        field("tokenizer.ggml.tokens", "[STRING]", [f"tok_{i}" for i in range(VOCAB)]),
        field("tokenizer.ggml.token_type", "[INT32]", [1] * VOCAB),
        field("tokenizer.ggml.scores", "[FLOAT32]", [0.0] * VOCAB),
        field("tokenizer.ggml.add_bos_token", "BOOL", False),
    ]


def overhear(model: DeepseekV4ForCausalLM, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Of sequences ``(batch, n)``, evaluated in one batch: logits of every token, and of every router experts,
    their weights, and all selection scores; a row a token, one sequence after another."""
    heard: dict[str, np.ndarray] = {"tokens": tokens}

    def listen(layer: int):
        def hook(router, _inputs, output):
            logits, weights, experts = output
            bias = getattr(router, "e_score_correction_bias", torch.zeros(1))
            found = {"scores": router.score_fn(logits) + bias, "weights": weights, "experts": experts}
            for name, value in found.items():
                heard[f"{name}_{layer}"] = value.reshape(tokens.size, -1).numpy()

        return hook

    handles = [
        block.mlp.gate.register_forward_hook(listen(layer)) for layer, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        heard["logits"] = model(torch.tensor(tokens)).logits.reshape(tokens.size, -1).numpy()
    for handle in handles:
        handle.remove()
    return heard


def main() -> None:
    torch.set_num_threads(1)
    model = random_model()
    write_gguf(model, Path(sys.argv[1]))
    draw = np.random.default_rng(8)
    for path, shape in zip(sys.argv[2:], ((1, N_TOKENS), BATCH), strict=True):
        np.savez(path, **overhear(model, draw.integers(0, VOCAB, shape)))


if __name__ == "__main__":
    main()
