"""Bytes that a token reads, held to closed forms and to the real artifact's shape."""

from __future__ import annotations

import pytest
from gguf_fixtures import real_size_header
from published import FLASH

from conftest import REFERENCE
from dfqs_nb.gguf import facts as header_facts
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.memory import active_bytes
from dfqs_nb.gguf.shards import open_shards

Q8_0 = 34 / 32


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    return read_header(real_size_header(tmp_path_factory.mktemp("flash") / "flash.gguf"))


def test_experts_of_the_real_shape_count_by_use(flash):
    active = active_bytes(flash)
    layers, experts, used, width, hidden = 43, 256, 6, 2048, 4096
    matrix = width * hidden
    iq1_s, q2_k = matrix * 50 // 256, matrix * 84 // 256
    assert active.routed_total == experts * (layers * 3 * iq1_s + 2 * (q2_k - iq1_s))
    assert active.routed == pytest.approx(active.routed_total * used / experts, abs=1)
    assert (active.routed, active.routed_total) == (FLASH.routed, FLASH.routed_total)


def test_the_artifacts_bytes_follow_from_its_published_size(flash):
    embedding = int(129_280 * 4096 * Q8_0)
    assert FLASH.weights == 49_952_658_368 + 11_588_146_976
    assert FLASH.dense == FLASH.weights - FLASH.routed_total - embedding
    from_shapes = active_bytes(flash)
    assert FLASH.dense < from_shapes.dense < 1.2 * FLASH.dense, (
        "all at Q8_0 is a little more than was published"
    )
    assert FLASH.total / 1e9 == pytest.approx(7.58, abs=0.01)


def test_bytes_agree_with_the_count_of_active_parameters(flash):
    """A second way: active parameters times their bits, class by class."""
    bits = 8 * active_bytes(flash).total / header_facts.parameters(flash).active
    assert 1.5625 < bits < 8.6
    one_row = next(t for t in flash.tensors if t.name == "token_embd.weight").nbytes // 129_280
    tables = [t for t in flash.tensors if t.type == "I32"]
    everything = active_bytes(flash)
    rest = sum(
        t.nbytes
        for t in flash.tensors
        if header_facts.class_of(t.name) not in ("routed experts", "embedding") and t.type != "I32"
    )
    assert everything.dense == rest + one_row + 4 * 6 * len(tables)


def test_shards_together_read_what_the_merged_file_reads(merged_reference):
    shards = open_shards(REFERENCE / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf")
    assert active_bytes(shards.as_one) == active_bytes(read_header(merged_reference))
