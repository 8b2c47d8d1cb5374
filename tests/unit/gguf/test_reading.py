"""Bytes that a token reads, held to closed forms and to the real artifact's shape."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from gguf_fixtures import real_size_header
from published import FLASH

from conftest import REFERENCE
from dfqs_nb.gguf.facts import class_of, experts, parameters
from dfqs_nb.gguf.header import GGUFHeader, Tensor, read_header
from dfqs_nb.gguf.memory import Layout, Sizes
from dfqs_nb.gguf.shards import open_shards

Q8_0 = 34 / 32


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    return read_header(real_size_header(tmp_path_factory.mktemp("flash") / "flash.gguf"))


def dense_bytes(header: GGUFHeader) -> int:
    """What a token reads beside routed experts: a row of each look-up table (4 bytes for each of 6 experts), and the rest."""
    one_row = next(t for t in header.tensors if t.name == "token_embd.weight").nbytes // 129_280
    tables = [t for t in header.tensors if t.type == "I32"]
    kinds = ("routed experts", "embedding")
    rest = [t.nbytes for t in header.tensors if class_of(t.name) not in kinds and t.type != "I32"]
    return sum(rest) + one_row + 4 * 6 * len(tables)


def test_experts_of_the_real_shape_count_by_use(flash):
    weights = parameters(flash, in_bytes=True)
    layers, experts, used, width, hidden = 43, 256, 6, 2048, 4096
    matrix = width * hidden
    iq1_s, q2_k = matrix * 50 // 256, matrix * 84 // 256
    assert weights.routed == experts * (layers * 3 * iq1_s + 2 * (q2_k - iq1_s))
    routed = weights.active - dense_bytes(flash)
    assert routed == pytest.approx(weights.routed * used / experts, abs=1)
    assert (routed, weights.routed) == (FLASH.routed, FLASH.routed_total)


def test_the_artifacts_bytes_follow_from_its_published_size(flash):
    embedding = int(129_280 * 4096 * Q8_0)
    assert FLASH.weights == 49_952_658_368 + 11_588_146_976
    assert FLASH.dense == FLASH.weights - FLASH.routed_total - embedding
    assert FLASH.dense < dense_bytes(flash) < 1.2 * FLASH.dense, "all at Q8_0 is a little more than published"
    assert FLASH.total / 1e9 == pytest.approx(7.58, abs=0.01)


def test_bytes_agree_with_the_count_of_active_parameters(flash):
    """A second way: active parameters times their bits, class by class."""
    bits = 8 * parameters(flash, in_bytes=True).active / parameters(flash).active
    assert 1.5625 < bits < 8.6


def test_shards_together_read_what_the_merged_file_reads(merged_reference):
    shards = open_shards(REFERENCE / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf")
    assert parameters(shards.as_one, in_bytes=True) == parameters(
        read_header(merged_reference), in_bytes=True
    )


def test_a_second_set_of_experts_counts_as_routed_everywhere():
    """GroveMoE (llama.cpp's src/models/grovemoe.cpp): 4 chunk experts beside 8 experts, 6 and at most 4 used."""
    shapes = {
        "token_embd.weight": (4, 100),
        "output.weight": (4, 100),
        "blk.0.ffn_norm_exps.weight": (4,),
        "blk.0.ffn_gate_exps.weight": (4, 2, 8),
        "blk.0.ffn_gate_chexps.weight": (4, 2, 4),
    }
    tensors, start = [], 0
    for name, shape in shapes.items():
        tensors.append(Tensor(name, shape, "F32", 0, start, math.prod(shape), 4 * math.prod(shape)))
        start += tensors[-1].nbytes
    counts = {"block_count": 1, "expert_count": 8, "expert_used_count": 6}
    fields = {"general.architecture": "grovemoe", **{f"grovemoe.{key}": n for key, n in counts.items()}}
    header = GGUFHeader(Path("x.gguf"), 0, 3, 32, fields, tuple(tensors), 0, start, b"")
    routed, read = 64 + 32, 64 * 6 // 8 + 32
    assert experts(header).moe_layers == 1 and class_of("blk.0.ffn_norm_exps.weight") == "norms"
    assert parameters(header).routed == routed and parameters(header).active == 4 + 400 + 4 + read
    sizes, layout = Sizes(header), Layout.of([header])
    assert sizes.experts == [4 * routed, 0, 0] and sizes.dense == [16, 1600, 1600]
    assert sizes.used == pytest.approx(read / routed)
    assert (layout.expert_bytes, layout.token_bytes, layout.dense_bytes) == (4 * routed, 4 * read, 1616)
    assert [part.n for part in layout.experts[0]] == [8], "the router numbers only the first set"
