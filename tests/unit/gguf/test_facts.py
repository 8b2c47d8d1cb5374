"""The dialect of the first DeepSeek-V4 conversions, against llama.cpp's loader; titles of figures."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from gguf_fixtures import field, gguf_bytes
from models_apart import Apart, early_dialect

from dfqs_nb.gguf import facts, figures
from dfqs_nb.gguf.header import read_header
from dfqs_nb.llama.check import loader_verdict


def test_a_file_of_the_early_dialect_is_sound_and_upstream_llama_cpp_refuses_it(
    merged_reference: Path, tmp_path: Path
) -> None:
    path = tmp_path / "early.gguf"
    path.write_bytes(early_dialect(Apart.of(merged_reference)).bytes())
    names = facts.early_dialect(read_header(path))
    verdict = loader_verdict(path)
    assert "key not found in model: deepseek4.attention.output_lora_rank" in verdict.reason
    words = verdict.explain(read_header(path))
    assert words.startswith("a sound file that upstream llama.cpp refuses: ") and verdict.reason in words
    assert names["blk.2.attn_kv_latent.weight"] == "blk.2.attn_kv.weight"
    assert names["hc_head_fn"] == "output_hc_fn.weight"
    assert names["blk.0.ffn_gate_tid2eid"] == "blk.0.ffn_gate_tid2eid.weight"
    assert names["blk.1.exp_probs_b"] == "blk.1.exp_probs_b.bias"
    assert names["blk.1.indexer.compress_ape.weight"] == "blk.1.indexer_compressor_ape.weight"
    assert set(names.values()) <= {tensor.name for tensor in read_header(merged_reference).tensors}


@pytest.mark.parametrize(
    ("architecture", "key", "value", "title"),
    [
        ("llama", "block_count", 3, "All 3 layers attend to the whole context"),
        ("gemma3", "attention.sliding_window", 512, "sliding window, and does not say which layers"),
        ("deepseek4", "attention.compress_ratios", [0, 4, 128], "2 of 3 layers compress their attention"),
    ],
)
def test_the_attention_figures_title_is_about_this_model(tmp_path, architecture, key, value, title):
    kind = "[UINT32]" if isinstance(value, list) else "UINT32"
    fields = [field("general.architecture", "STRING", architecture)]
    fields += [
        field(f"{architecture}.{name}", *of)
        for name, of in {"block_count": ("UINT32", 3), key: (kind, value)}.items()
    ]
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(fields, []))
    layers = facts.attention_layers(read_header(tmp_path / "m.gguf"))
    assert title in figures.attention_layout(pd.DataFrame(layers)).get_title(loc="left")


def test_a_model_without_layers_of_a_decoder_has_a_figure_of_its_types() -> None:
    tensors = pd.DataFrame({"layer": [-1], "type": ["F16"], "bytes": [2]})  # T5's are enc.blk.0 and so on
    with pytest.warns(UserWarning, match="No artists with labels"):
        ax = figures.quantization_mix(tensors)
    assert ax.get_title(loc="left").startswith("All 0 layers")
