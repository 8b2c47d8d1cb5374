"""Write a trained model as GGUF: ``python export.py RUN MODEL.gguf [--type F32|F16]``.

Names of tensors are those of llama.cpp's ``deepseek4``; tensors that its quantizer should leave alone (norms, routers,
hyper-connections, position biases, sinks) are F32 in both types.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from model import RATIOS
from tokenizer import BOS, CHAT_TEMPLATE, EOS, SPECIAL
from train import restored

# transformers' name in a layer -> GGUF's
PARTS = {"kv_proj": "kv", "gate_proj": "gate", "position_bias": "ape", "kv_norm": "norm"}
LAYER = {
    "self_attn.sinks": "attn_sinks", "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_norm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_proj": "attn_kv", "self_attn.kv_norm": "attn_kv_a_norm",
    "self_attn.o_a_proj": "attn_output_a", "self_attn.o_b_proj": "attn_output_b",
    **{f"self_attn.compressor.{theirs}": f"attn_compressor_{ours}" for theirs, ours in PARTS.items()},
    **{f"self_attn.compressor.indexer.{theirs}": f"indexer_compressor_{ours}" for theirs, ours in PARTS.items()},
    "self_attn.compressor.indexer.q_b_proj": "indexer.attn_q_b",
    "self_attn.compressor.indexer.scorer.weights_proj": "indexer.proj",
    "mlp.gate": "ffn_gate_inp", "mlp.gate.tid2eid": "ffn_gate_tid2eid", "mlp.experts.down_proj": "ffn_down_exps",
    **{f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    **{f"{at}_hc.{part}": f"hc_{at}_{part}" for at in ("attn", "ffn") for part in ("fn", "base", "scale")},
}  # fmt: skip
ROOT = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        **{f"model.hc_head.hc_{part}": f"output_hc_{part}" for part in ("fn", "base", "scale")}}  # fmt: skip
KEPT_F32 = re.compile(r"norm|_ape|hc_|ffn_gate_inp|exp_probs|sinks")


def tensors(model):
    """Name and array of every tensor of the GGUF file, in F32 (the hash table in I32)."""
    for name, value in model.state_dict().items():
        data, layer = value.numpy(), re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            yield f"{ROOT[name.removesuffix('.weight')]}.weight", data
            continue
        number, part = layer[1], layer[2].removesuffix(".weight")
        if part == "mlp.experts.gate_up_proj":
            gate, up = np.split(data, 2, axis=1)
            yield f"blk.{number}.ffn_gate_exps.weight", np.ascontiguousarray(gate)
            yield f"blk.{number}.ffn_up_exps.weight", np.ascontiguousarray(up)
        elif part == "mlp.gate.e_score_correction_bias":
            yield f"blk.{number}.exp_probs_b.bias", data
        else:
            data = data.astype(np.int32) if part.endswith("tid2eid") else data
            yield f"blk.{number}.{LAYER[part]}.weight", data


def add_header(writer: GGUFWriter, config) -> None:
    a, layers, width = "deepseek4", config.num_hidden_layers, config.moe_intermediate_size
    writer.add_name("DFQS-Nano")
    writer.add_type("model")
    writer.add_license("MIT")
    writer.add_description("Tiny mixture-of-experts model with the deepseek4 architecture, trained on synthetic tasks; "
                           "reference model of the DFQS workbook")  # fmt: skip
    for key, value in {
        "block_count": layers, "context_length": config.max_position_embeddings, "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size, "embedding_length_out": config.hidden_size * config.hc_mult,
        "feed_forward_length": width, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "rope.dimension_count": config.qk_rope_head_dim,
        "attention.q_lora_rank": config.q_lora_rank, "attention.sliding_window": config.sliding_window,
        "expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": width, "expert_shared_count": config.n_shared_experts,
        "expert_gating_func": 4, "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim, "attention.indexer.top_k": config.index_topk,
        "attention.output_group_count": config.o_groups, "attention.output_lora_rank": config.o_lora_rank,
        "hyper_connection.count": config.hc_mult, "hash_layer_count": 1,
        "hyper_connection.sinkhorn_iterations": config.hc_sinkhorn_iters,
    }.items():  # fmt: skip
        writer.add_uint32(f"{a}.{key}", value)
    for key, value in {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_theta,
        "expert_weights_scale": config.routed_scaling_factor, "hyper_connection.epsilon": config.hc_eps,
        "attention.compress_rope_freq_base": config.compress_rope_theta,
    }.items():  # fmt: skip
        writer.add_float32(f"{a}.{key}", float(value))
    writer.add_bool(f"{a}.expert_weights_norm", True)
    for part in ("exp", "shexp"):
        writer.add_array(f"{a}.swiglu_clamp_{part}", [float(config.swiglu_limit)] * layers)
    writer.add_array(f"{a}.attention.compress_ratios", list(RATIOS))


def add_tokenizer(writer: GGUFWriter, tokenizer) -> None:
    import json

    content = json.loads(tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda one: one[1])
    merges = [one if isinstance(one, str) else " ".join(one) for one in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([one for one, _ in vocabulary])
    writer.add_token_types(
        [TokenType.CONTROL if one in SPECIAL else TokenType.NORMAL for one, _ in vocabulary]
    )
    writer.add_token_merges(merges)
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.add_bos_token_id(tokenizer.token_to_id(BOS))
    writer.add_eos_token_id(tokenizer.token_to_id(EOS))
    writer.add_add_bos_token(True)


def export(model, tokenizer, path: Path, kind: str = "F16") -> None:
    """Write the file, whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    writer = GGUFWriter(fresh, "deepseek4")
    add_header(writer, model.config)
    add_tokenizer(writer, tokenizer)
    for name, data in tensors(model):
        if kind == "F16" and data.dtype == np.float32 and data.ndim > 1 and not KEPT_F32.search(name):
            data = data.astype(np.float16)
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path(fresh).replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("path", type=Path)
    parser.add_argument("--type", choices=("F32", "F16"), default="F16")
    asked = parser.parse_args()
    encoder, model = restored(asked.run)
    export(model, encoder.tokenizer, asked.path, asked.type)


if __name__ == "__main__":
    main()
