"""Bytes a token, roofs and bounds, held to closed forms and to the real artifact's shape."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import REFERENCE
from gguf_fixtures import real_size_header

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf import facts as header_facts
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama import settings as llama_settings
from dfqs_nb.scores import speed
from dfqs_nb.scores.speed import FLASH, ActiveBytes, Place, active_bytes, speed_bound

Q8_0 = 34 / 32


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    return read_header(real_size_header(tmp_path_factory.mktemp("flash") / "flash.gguf"))


@pytest.fixture(scope="module")
def model(merged_reference):
    with llama_model.open_model(
        merged_reference, llama_settings.OpenSettings(n_ctx=512, n_threads=1)
    ) as opened:
        yield opened


def test_experts_of_the_real_shape_count_by_use(flash):
    found = active_bytes(flash)
    layers, experts, used, width, hidden = 43, 256, 6, 2048, 4096
    one = width * hidden
    iq1_s, q2_k = one * 50 // 256, one * 84 // 256
    assert found.routed_total == experts * (layers * 3 * iq1_s + 2 * (q2_k - iq1_s))
    assert found.routed == pytest.approx(found.routed_total * used / experts, abs=1)
    assert (found.routed, found.routed_total) == (FLASH.routed, FLASH.routed_total)


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
    assert active_bytes(shards.headers) == active_bytes(read_header(merged_reference))


def test_cache_reads_of_the_real_shape(flash):
    head, b = 512, 2
    assert speed.cache_bytes_read(flash, 100) == 43 * 100 * head * b + 21 * (25 * head + 25 * 128) * b
    deep = 65_536
    expected = 43 * 128 * head + 21 * (512 * head + deep // 4 * 128) + 20 * (deep // 128) * head
    assert speed.cache_bytes_read(flash, deep) == expected * b


def test_a_model_that_fits_is_bound_by_memory_alone():
    bound = speed_bound(FLASH, [Place("memory", 1e12, 70e9)])
    assert bound.tokens_per_sec == pytest.approx(70e9 / FLASH.total) and bound.shares == {"memory": 1.0}


def test_what_does_not_fit_comes_from_the_disk():
    weights = ActiveBytes(dense=10, routed=6, routed_total=90, weights=100)
    bound = speed_bound(weights, [Place("memory", 55, 1e9), Place("disk", 1e9, 2.0)])
    assert bound.shares["disk"] == pytest.approx(6 * 45 / 90 / 16)
    assert bound.tokens_per_sec == pytest.approx(2 / 3, rel=1e-6)
    none = speed_bound(weights, [Place("memory", 4, 1e9), Place("disk", 1e9, 2.0)])
    assert none.tokens_per_sec == pytest.approx(2 / 12, rel=1e-6)
    with pytest.raises(DfqsError, match="lie nowhere"):
        speed_bound(FLASH, [Place("memory", 20e9, 1e9)])


def test_more_memory_is_never_slower():
    bounds = [
        speed_bound(FLASH, [Place("memory", gb * 1e9, 50e9), Place("disk", 1e15, 3e9)]).tokens_per_sec
        for gb in range(2, 80, 3)
    ]
    assert bounds == sorted(bounds)


def test_no_claim_of_the_card_exceeds_its_bound_and_a_slow_disk_comes_nearest():
    table = speed.card_table(here=[Place("memory", 1e12, 20e9)])
    assert (table["claimed_high"].dropna() < table["bound"][: len(speed.CARD)]).all()
    assert table.loc[table["reached"].idxmax(), "machine"] == "CPU, 32 GB, SATA disk"
    assert table["machine"].iloc[-1] == "this machine" and table["claimed_high"].isna().iloc[-1]


def test_memory_bandwidth_is_that_of_memory():
    assert 1e9 < speed.memory_bandwidth(1, 64 << 20, 2) < 500e9


def test_disk_bandwidth_is_measured_or_none(tmp_path):
    found = speed.disk_bandwidth(tmp_path, 16 << 20)
    assert found is None or 1e6 < found < 100e9
    assert list(tmp_path.iterdir()) == []


def test_work_of_others_is_seen():
    code = "import time\nend = time.time() + 2\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as busy, speed.watched_load() as load:
        busy.wait()
    if load.other_cores is None:
        pytest.skip("this system does not count other processes' time")
    assert load.contended and load.other_cores > 0.3
    assert not speed.Load(0.05).contended and not speed.Load(None).contended


def test_ones_own_work_is_not_that_of_others():
    with speed.watched_load() as load:
        sum(i * i for i in range(3_000_000))
    others = load.other_cores
    with speed.watched_load() as idle:
        pass
    assert idle.other_cores is None or idle.other_cores >= 0
    assert others is None or others < 64


def test_speed_by_depth_has_a_roof(model):
    table = speed.speed_by_depth(model, [64, 256], n_tokens=16, repetitions=2, bandwidth=1e12)
    assert list(table["phase"]) == ["prefill", "decode"] * 2 and list(table["depth"]) == [64, 64, 256, 256]
    decode = table[table["phase"] == "decode"]
    read = active_bytes(model.header).total + speed.cache_bytes_read(model.header, 64 + 8)
    assert decode["roof"].iloc[0] == pytest.approx(1e12 / read)
    assert (decode["utilisation"] < 1).all() and table["contended"].dtype == bool
    with pytest.raises(llama_model.ContextFullError):
        speed.speed_by_depth(model, [512], bandwidth=1e9)
