"""Placement: every tensor and its layer's cache counted once, where llama.cpp's rules put it."""

from __future__ import annotations

import importlib
import itertools
import random
import re
import time
from functools import cache
from pathlib import Path

import pytest
from gguf_fixtures import real_size_header
from llama_fit import replay

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import REPOSITORY
from dfqs_nb.gguf import memory
from dfqs_nb.gguf.broken import reference_shards
from dfqs_nb.gguf.facts import parameters
from dfqs_nb.gguf.header import GGUFHeader, Tensor, read_header
from dfqs_nb.gguf.memory import kv_cache_bytes

GB = 1 << 30
MACHINES = [
    (24, ()),
    (64, ()),
    (64, (24,)),
    (64, (24, 24)),
    (64, (24, 12)),
    (128, (80,)),
    (64, (8,)),
    (16, (4,)),
]


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    return read_header(real_size_header(tmp_path_factory.mktemp("real") / "flash.gguf"))


@pytest.mark.parametrize(("ram", "cards"), MACHINES)
def test_the_flags_put_every_tensor_where_the_plan_has_it(flash, ram, cards):
    placed = memory.place(memory.Sizes(flash), 32768, ram * GB, [card * GB for card in cards])
    planned = [device.dense_bytes + device.expert_bytes for device in placed.devices]
    assert replay(flash, placed.flags, len(cards)) == planned
    assert sum(planned) == sum(tensor.nbytes for tensor in flash.tensors)
    caches = [device.cache_bytes for device in placed.devices]
    assert sum(caches) == kv_cache_bytes(flash, 32768).total
    assert all(device.left_bytes >= memory.SPARE_BYTES for device in placed.devices[:-1])
    read = sum(device.token_bytes for device in placed.devices)
    assert read == pytest.approx(parameters(flash, in_bytes=True).active, abs=4), (
        "a token reads as much wherever it lies"
    )


def test_caches_by_layer_are_the_cache(flash):
    nano = reference_shards().as_one
    for header in (flash, nano):
        assert len(kv_cache_bytes(header, 4096).layers) == header.n_layers


def test_flags_read_as_people_write_them(flash):
    model = memory.Sizes(flash)

    def flags(*cards: int) -> str:
        return " ".join(memory.place(model, 32768, 64 * GB, [card * GB for card in cards]).flags)

    assert flags() == "-ngl 0"
    assert re.fullmatch(r"-ngl 99 -fa on --n-cpu-moe \d+", flags(24))
    assert re.fullmatch(r"-ngl 99 -fa on -ts \d+,\d+ --n-cpu-moe \d+", flags(24, 24))
    assert re.fullmatch(r"-ngl 99 -fa on -ts \d+,\d+ -ot blk\\\.\([\d|]+\)\\\.ffn_.*=CPU", flags(24, 12))
    assert flags(80) == "-ngl 99 -fa on"
    assert re.fullmatch(r"-ngl \d+ -fa on --n-cpu-moe 43", flags(8)), "some layers on no card at all"
    assert flags(1) == "-ngl 0 -fa on", "the card has no room"


def rated(beside, experts, rooms, whole, groups):
    """What `_on_cards` prefers: the most layers, the most bytes of experts, rooms filled alike."""
    uneven, n_bytes = 0.0, 0
    for room, (first, routed, end) in zip(rooms, groups, strict=True):
        own = sum(experts[routed:end])
        used = sum(beside[first:end]) + own
        if used > room or (whole and any(experts[first:routed])):
            return None
        n_bytes, uneven = n_bytes + own, uneven + used**2 / max(room, 1)
    return len(beside) - groups[0][0], n_bytes, -uneven


@pytest.mark.parametrize("seed", range(60))
def test_cards_hold_what_the_best_of_all_divisions_holds(seed):
    draw = random.Random(seed)
    count, whole = draw.randint(1, 6), seed % 3 == 0
    beside = [draw.randint(1, 9) for _ in range(count)]
    experts = [draw.choice((0, draw.randint(1, 30))) for _ in range(count)]
    rooms = [draw.randint(0, 60) for _ in range(draw.randint(1, 4))]
    best = (0, 0, 0.0)
    for ends in itertools.combinations_with_replacement(range(count + 1), len(rooms)):
        for routed in itertools.product(*(range(a, b + 1) for a, b in itertools.pairwise((*ends, count)))):
            groups = [*zip(ends, routed, (*ends[1:], count), strict=True)]
            best = max(best, rated(beside, experts, rooms, whole, groups) or best)
    found = memory._on_cards(beside, experts, rooms, whole)
    assert found[-1][2] == count and all(a[2] == b[0] for a, b in itertools.pairwise(found))
    assert rated(beside, experts, rooms, whole, found) == pytest.approx(best)


def test_sixteen_unlike_cards_take_no_time(flash):
    model, cards = memory.Sizes(flash), [(3 + i) * GB for i in range(16)]
    began = time.perf_counter()
    placed = memory.place(model, 32768, 64 * GB, cards)
    assert time.perf_counter() - began < 1
    planned = [device.dense_bytes + device.expert_bytes for device in placed.devices]
    assert replay(flash, placed.flags, len(cards)) == planned


def test_more_of_anything_is_never_slower_and_never_holds_less(flash):
    model, speeds = memory.Sizes(flash), {"GPU": 936e9, "RAM": 80e9, "disk": 3.5e9}
    rates = [
        memory.place(model, 8192, ram * GB, [card * GB for card in cards]).bound(speeds)[0]
        for ram, cards in ((16, ()), (32, ()), (64, ()), (64, (24,)), (64, (24, 24)), (64, (80,)))
    ]
    assert rates == sorted(rates)
    card = memory.place(model, 8192, 64 * GB, [24 * GB])
    assert card.bound({"RAM": 80e9}) == (None, ["GPU"])
    paged = memory.place(model, 8192, 16 * GB, [])
    assert paged.bound({"RAM": 80e9}) == (None, ["disk"])


@pytest.fixture(scope="module")
def dense():
    """Llama 3 of 70 billion weights in Q6_K, by its sizes: a model without experts that fills a machine."""
    fields = {"block_count": 80, "context_length": 131072, "embedding_length": 8192}
    fields |= {"attention.head_count": 64, "attention.head_count_kv": 8}
    fields = {"general.architecture": "llama", **{f"llama.{key}": n for key, n in fields.items()}}
    names = ["token_embd.weight", "output.weight", *(f"blk.{i}.ffn_up.weight" for i in range(80))]
    sizes = [862 << 20, 862 << 20, *[669 << 20] * 80]
    rows = zip(names, sizes, strict=True)
    tensors = tuple(Tensor(name, (8192, 1), "Q6_K", 14, 0, 8192, nbytes) for name, nbytes in rows)
    return GGUFHeader(Path("dense.gguf"), 0, 3, 32, fields, tensors, 0, 0, b"")


COMPUTE = {256: 148 << 20, 2048: 361 << 20, 131072: 17536 << 20}  # as llama.cpp planned it
RAMS = [24, 57, 60, 64, 72]
CARDS = [(), (8,), (24,), (24, 3), (24, 12)]


@pytest.fixture(scope="module", params=["dense", "flash"])
def largest(request):
    """The largest context of a model by memory and cards in GiB, each found once; and the model."""
    model = memory.Sizes(request.getfixturevalue(request.param))
    model.n_context = 65536

    @cache
    def find(ram, cards):
        return memory.largest_context(model, ram * GB, [card * GB for card in cards], compute=COMPUTE)

    return find, model


def test_more_memory_or_a_card_never_makes_the_largest_context_smaller(largest):
    find, _ = largest
    for cards in CARDS:
        found = [find(ram, cards) for ram in RAMS]
        assert found == sorted(found), cards
        for ram, other in ((57, 3), (64, 12)) if len(cards) < 2 else ():
            assert all(find(ram, more) >= find(ram, cards) for more in ((*cards, other), (other, *cards)))
    larger = [find(57, (card,)) for card in range(2, 40, 5)]
    assert larger == sorted(larger)


def test_the_largest_context_fits_when_it_is_planned_and_no_longer_one_does(largest):
    find, model = largest
    for ram, cards in ((ram, cards) for ram in RAMS for cards in CARDS):
        n_ctx, vram = find(ram, cards), [card * GB for card in cards]
        others = {n_ctx, n_ctx + 256, 256, 1024, 8192, 12288, 32768} - {0, model.n_context + 256}
        placed = {n: memory.place(model, n, ram * GB, vram, compute=COMPUTE) for n in others}
        fit = [n for n, each in placed.items() if each.ram.left_bytes >= 0]
        assert max(fit, default=0) == n_ctx, (ram, cards)


def test_a_longer_context_may_be_had_with_weights_read_from_the_disk(dense):
    model = memory.Sizes(dense)
    compute, machine = COMPUTE, (32 * GB,)
    assert memory.largest_context(model, *machine, compute=compute) == 0, "55 GB of weights"
    n_ctx = memory.largest_context(model, *machine, paged=True, compute=compute)
    assert memory.place(model, n_ctx, *machine, compute=compute).works
    assert not memory.place(model, n_ctx + 256, *machine, compute=compute).works
    assert memory.largest_context(model, 1 << 20, paged=True) == 0, "memory for no cache at all"


def test_a_table_of_machines(flash):
    table = memory.machines_table(
        memory.Sizes(flash), 8192, ["24 GB", "128 GB", "64GB + 24GB"], {"RAM": 80e9}
    )
    assert table.loc["128 GiB", "from disk a token"] == "0 B"
    assert table["at most tokens/s"].isna().tolist() == [True, False, True], "no disk speed was given"


def test_sizes_are_powers_of_two_and_one_that_is_none_is_refused():
    with pytest.raises(DfqsError, match="is no size; write 64GiB"):
        memory.size_of("much")
    for text in ("64", "64B", "24 "):
        with pytest.raises(DfqsError, match=rf"is {text[:2]} bytes; write {text[:2]}GiB"):
            memory.size_of(text)
    assert memory.size_of(str(64 << 30)) == 64 << 30
    assert [memory.size_of(text) for text in ("64GB", "1.5 GiB", "500M")] == [64 << 30, 3 << 29, 500 << 20]


def test_memory_for_half_of_the_experts_holds_half_of_the_reads(flash):
    model = memory.Sizes(flash)
    routed, here = sum(model.experts), sum(model.dense) + sum(model.caches(4096))
    placed = memory.place(model, 4096, here + routed // 2)
    assert placed.disk_token_bytes == pytest.approx(0.5 * routed * 6 / 256, rel=1e-3)
    assert placed.ram.compute_bytes is None, "nobody planned it"


def test_the_benchmark_of_a_card_asks_about_every_placement(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "benchmarks")
    card_memory, asked = importlib.import_module("card_memory"), list[str]()

    def no_card(_program, _path, words):
        asked.extend(words)
        return [{"error": "no card"} for _ in words]

    monkeypatch.setattr(card_memory, "ask", no_card)
    path, contexts = reference_shards().paths[0], [256, 512]
    for table in (card_memory.placements, card_memory.fits):
        assert len(table("program", path, [GB], contexts, 8 * GB)) >= len(contexts)
    assert [words.split()[0] for words in asked[:2]] == ["n_ctx=256", "n_ctx=512"]


# of 10 layers of that shape on an H100, with flash attention: what llama.cpp planned
ON_CARD = {8192: 306_718_966, 262_144: 543 << 20, 1_048_576: 1_841_655_972}


def test_a_card_keeps_more_free_where_llama_cpp_plans_a_larger_buffer(flash):
    model, card = memory.Sizes(flash), 10_249 << 20
    for n_ctx, spare in ((8192, memory.SPARE_BYTES), (1_048_576, ON_CARD[1_048_576] + memory.DRIVER_BYTES)):
        unknown, known = (memory.place(model, n_ctx, 128 * GB, [card], on_card=it) for it in (None, ON_CARD))
        (before, _), (gpu, _) = unknown.devices, known.devices
        assert (before.compute_bytes, gpu.compute_bytes) == (None, ON_CARD[n_ctx])
        assert gpu.left_bytes + gpu.compute_bytes >= spare
        assert (known.flags == unknown.flags) == (before.left_bytes >= spare), n_ctx
    between = memory.place(model, 500_000, 128 * GB, [card], on_card=ON_CARD).devices[0].compute_bytes
    assert ON_CARD[262_144] < between < ON_CARD[1_048_576]
