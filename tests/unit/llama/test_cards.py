"""Graphics cards: what lies on them takes no memory. Their log lines are llama.cpp's; no card is needed."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest

from dfqs_nb.core.errors import ModelError, SpaceError
from dfqs_nb.core.machine import Memory
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.facts import parameters
from dfqs_nb.gguf.memory import check_fits, kv_cache_bytes
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama import build, check
from dfqs_nb.llama.build import buffers, build_llama, planned_bytes
from dfqs_nb.llama.log import LOG
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings, has_gpu_support
from dfqs_nb.llama.timing import diagnose

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
MIB = 2**20
SETTINGS = OpenSettings(n_ctx=512, n_threads=1)
# of the 62.7 GB specimen on an H200 with 143,155 MiB
LOADED = """
llama_prepare_model_devices: using device CUDA0 (NVIDIA H200) (0000:4b:00.0) - 142601 MiB free
load_tensors: offloading output layer to GPU
load_tensors: offloading 43 repeating layers to GPU
load_tensors: offloaded 44/44 layers to GPU
load_tensors:   CPU_Mapped model buffer size =   536.56 MiB
load_tensors:        CUDA0 model buffer size = 59246.70 MiB
llama_context:  CUDA_Host  output buffer size =     0.49 MiB
llama_kv_cache:      CUDA0 KV buffer size =    43.81 MiB
llama_kv_cache: size =   43.81 MiB (   768 cells,  43 layers,  1/1 seqs), K (f16):   43.81 MiB, V (f16):    0.00 MiB
llama_dsv4_comp_state:      CUDA0 DSV4 csa state buffer size =     1.31 MiB
llama_dsv4_comp_state:      CUDA0 DSV4 hca state buffer size =    10.00 MiB
sched_reserve:      CUDA0 compute buffer size =   349.34 MiB
sched_reserve:  CUDA_Host compute buffer size =    18.84 MiB
""".strip().splitlines()
# without loading, buffers of weights and cache are empty; the cache's size follows
PLANNED = [line.replace(" 536.56", "   0.00").replace("59246.70", "    0.00") for line in LOADED]
PLANNED = [line.replace("KV buffer size =    43.81", "KV buffer size =     0.00") for line in PLANNED]


def test_buffers_are_told_apart_by_where_they_lie():
    assert {
        place: {kind: round(nbytes / MIB, 2) for kind, nbytes in sizes.items()}
        for place, sizes in buffers(LOADED).items()
    } == {
        "in memory": {"weights": 536.56, "KV cache": 0, "compute buffers": 18.84},
        "on CUDA0": {"weights": 59246.7, "KV cache": 55.12, "compute buffers": 349.34},
    }


@pytest.mark.parametrize(
    ("log", "layers", "repacked"),
    [
        (LOADED, 44, False),
        (["load_tensors: offloaded 5/9 layers to GPU"], 5, None),
        (["load_tensors:   CPU_REPACK model buffer size =     1.50 MiB"], 0, True),
        ([], None, None),
    ],
)
def test_facts_of_a_load_are_what_llama_cpp_logged(log, layers, repacked):
    assert build.loaded_facts(log) == {"offloaded_layers": layers, "repacked": repacked}


def test_two_cards_have_a_row_each_and_a_macs_gpu_none():
    second = [line.replace("CUDA0", "CUDA1") for line in LOADED if "CUDA0" in line]
    assert list(buffers(LOADED + second)) == ["in memory", "on CUDA0", "on CUDA1"]
    metal = buffers([line.replace("CUDA0", "MTL0_Mapped").replace("CUDA_Host", "CPU") for line in LOADED])
    assert list(metal) == ["in memory"] and metal["in memory"]["weights"] == round(59783.26 * MIB)


def test_a_gpu_that_has_no_memory_of_its_own_takes_this_memory(monkeypatch):
    """A laptop's GPU, by Vulkan, and the like by CUDA: their names do not tell them from a card's."""
    devices = {b"CPU": (1, 0), b"CUDA0": (2, 1), b"Vulkan0": (3, 2)}
    functions = {
        "ggml_backend_dev_by_name": lambda name: devices.get(name, (None,))[0],
        "ggml_backend_dev_type": dict(devices.values()).__getitem__,
    }
    monkeypatch.setattr(build, "ggml_function", lambda name, *_: functions[name])
    shared = [line.replace("CUDA0", "Vulkan0").replace("CUDA_Host", "Vulkan_Host") for line in LOADED]
    assert list(buffers(shared)) == ["in memory"]
    assert planned_bytes(shared)["card_layers"] == 0, "its layers need this memory"
    assert list(buffers(LOADED)) == ["in memory", "on CUDA0"] and planned_bytes(LOADED)["card_layers"] == 44


def test_a_plan_counts_the_whole_cache_and_the_memory_of_compute_buffers():
    cache = round((43.81 + 1.31 + 10.0) * MIB)
    plan = {"kv_bytes": cache, "compute_bytes": round(18.84 * MIB), "card_layers": 44}
    plan["card_compute_bytes"] = round(349.34 * MIB)
    assert planned_bytes(PLANNED) == planned_bytes(LOADED) == plan
    unified = [line.replace("CUDA0", "MTL0").replace("CUDA_Host", "CPU") for line in PLANNED]
    assert planned_bytes(unified)["card_layers"] == 0, "its GPU's layers lie in memory"
    assert planned_bytes(unified)["card_compute_bytes"] == 0
    alone = [line for line in PLANNED if "CUDA" not in line and "GPU" not in line]
    assert planned_bytes(alone)["card_layers"] == 0


def test_the_log_of_a_real_load_gives_the_sizes_of_the_file():
    build_llama(NANO, SETTINGS).llama.close()
    (sizes,) = buffers(LOG.tail()).values()
    header = open_shards(NANO).as_one
    assert sizes["weights"] == pytest.approx(parameters(header, in_bytes=True).total, rel=0.02), (
        "mapped with the gaps"
    )
    assert sizes["KV cache"] == pytest.approx(kv_cache_bytes(header, 512).total, abs=0.04 * MIB)
    assert sizes["compute buffers"] == build.dry_run(NANO, SETTINGS)["compute_bytes"]


# ---- what must fit in memory ----


def needs(card_layers: int, use_mmap: bool = True):
    plan = {"kv_bytes": 10 * MIB, "compute_bytes": MIB, "card_layers": card_layers}
    plan["card_compute_bytes"] = 22 * MIB if card_layers else 0
    return check.needs_of(open_shards(NANO).as_one, replace(SETTINGS, use_mmap=use_mmap), plan)


def test_layers_on_a_card_take_no_memory():
    header = open_shards(NANO).as_one
    n, caches = header.n_layers, kv_cache_bytes(header, 512).layers
    sizes = {t.name: t.nbytes for t in header.tensors}
    none, output, half, every = (needs(layers) for layers in (0, 1, 1 + n // 2, n + 1))
    assert none.weights_bytes == sum(sizes.values()) and none.kv.layers == caches
    ends = sum(size for name, size in sizes.items() if name.startswith("output"))
    assert output.weights_bytes == none.weights_bytes - ends and output.kv.layers == caches
    assert half.kv.layers == caches[: n - n // 2] and every.kv.layers == []
    assert every.weights_bytes == sizes["token_embd.weight"]
    assert every.must_fit_bytes == every.compute_bytes == MIB, "the embedding is mapped"
    beside = sum(sizes.values()) - sizes["token_embd.weight"] + sum(caches)
    assert (none.card_bytes, every.card_bytes) == (0, beside + 22 * MIB)
    assert output.card_bytes == ends + 22 * MIB


def test_a_card_that_cannot_hold_its_layers_is_named_before_anything_is_loaded(monkeypatch):
    every, large = needs(open_shards(NANO).headers[0].n_layers + 1), Memory(64 * MIB, 64 * MIB, "test")

    def on(*free: int) -> str:
        monkeypatch.setattr("dfqs_nb.gguf.memory.gpu_memories", lambda: list(free))
        return check_fits(every, large)

    with pytest.raises(
        SpaceError, match=r"need 29\.\d MB on graphics cards, and 20\.0 MB are free"
    ) as caught:
        on(20_000_000)
    assert "lower n_gpu_layers" in caught.value.hint and "flash_attn=True" in caught.value.hint
    assert on(20_000_000, 20_000_000) == on() == "", (
        "two cards hold it; of others than NVIDIA's nothing is known"
    )
    monkeypatch.setattr("dfqs_nb.gguf.memory.gpu_memories", lambda: pytest.fail("no layer is on a card"))
    assert check_fits(needs(0), large) == ""


def test_a_model_that_the_card_holds_need_not_fit_in_memory():
    small = Memory(4 * MIB, 2 * MIB, "test")
    on_card, in_memory = needs(open_shards(NANO).headers[0].n_layers + 1, False), needs(0, False)
    assert check_fits(on_card, small) == ""
    with pytest.raises(SpaceError):
        check_fits(in_memory, small)
    assert "read from the disk again" in check_fits(needs(1), small), "the other layers are paged"


def test_a_cache_that_is_only_bounded_is_taken_from_the_plan(monkeypatch):
    kv = kv_cache_bytes(open_shards(NANO).as_one, 512)
    monkeypatch.setattr("dfqs_nb.gguf.memory.kv_cache_bytes", lambda *_, **__: replace(kv, exactness="rough"))
    n = len(kv.layers)
    assert needs(0).kv.total == 10 * MIB // n * n
    assert needs(3).kv.total == 10 * MIB // n * (n - 2), "two layers and the output are on the card"


def test_what_a_card_holds_is_not_read_from_the_disk(monkeypatch):
    memory = Memory(10**7, 3 * 10**6, "test")
    monkeypatch.setattr("dfqs_nb.llama.timing.available_memory", lambda: memory)
    with open_model(NANO, SETTINGS, trial=False) as model:
        assert diagnose(model, 1)[1]["experts that stay in memory"] != "100 %"
        model.buffers = buffers([line for line in LOADED if "Host" not in line])
        assert diagnose(model, 1)[1]["experts that stay in memory"] == "100 %"


def test_a_card_that_is_too_small_is_named_with_what_is_free():
    LOG.install()
    for level, line in (
        (2, LOADED[0]),
        (4, "x: allocating 59246.70 MiB on device 0: cudaMalloc failed: out of memory"),
    ):
        LOG._receive(level, f"{line}\n".encode(), None)
    error = build.refusal(Path("m.gguf"))
    assert isinstance(error, ModelError)
    assert "allocating 59246.70 MiB on device 0" in error.what and "CUDA0 (NVIDIA H200)" in error.what
    assert error.what.endswith("142601 MiB free)") and "n_gpu_layers" in error.hint
    assert "(before the load: CUDA0" in error.what, "the weights took some of it since"


def test_buffers_are_planned_with_all_layers_on_the_card_that_llama_cpp_finds(monkeypatch):
    """What an H100's dry run gave of 14 layers of qwen3moe with flash attention, and without a card."""
    asked, card = list[OpenSettings](), {"card_layers": 15, "card_compute_bytes": 356_526_326}
    none = {"card_layers": 0, "card_compute_bytes": 0}

    def plan(found: dict[str, int]) -> dict[str, dict[int, int]]:
        def answer(_path: object, rows: list[OpenSettings], _worker: object) -> list[dict[str, int]]:
            asked.extend(rows)
            return [{"kv_bytes": 0, "compute_bytes": 276_834_550, **found}]

        monkeypatch.setattr(check, "plan_memory", answer)
        monkeypatch.setattr(check, "_kept", lambda _kind, _paths, _facts, make: make())
        return check.compute_buffers(open_shards(NANO), 8192, [1 << 34], [1 << 33])[0]

    buffers = plan(card)
    assert set(buffers["on_card"]) == set(buffers["compute"]) >= {256, 8192, 65536}
    assert set(buffers["on_card"].values()) == {356_526_326}
    assert {(each.n_gpu_layers, each.flash_attn) for each in asked} == {(-1, True)}
    assert plan(none)["on_card"] == {}


# ---- is there a card? ----


def test_settings_ask_for_no_layer_where_llama_cpp_finds_no_gpu(monkeypatch):
    """Built for a GPU or not: llama.cpp counts the devices that it finds."""
    for found, layers in ((False, 0), (True, -1)):
        monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda found=found: found)
        assert OpenSettings.of(NANO).n_gpu_layers == layers


def test_what_a_gpus_library_logs_when_it_starts_is_not_printed(monkeypatch, capfd):
    from llama_cpp import _logger

    def starts() -> bool:
        llama_cpp.llama_model_load_from_file(b"no file", llama_cpp.llama_model_default_params())
        return False

    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", starts)
    monkeypatch.setattr(_logger.logger, "level", 0)
    llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
    starts()
    assert capfd.readouterr().err, "llama-cpp-python prints what llama.cpp logs"
    assert not has_gpu_support()
    assert capfd.readouterr() == ("", "") and LOG.tail()


def test_a_death_is_named_once(tmp_path, monkeypatch):
    def dies(*_: object, **__: object) -> None:
        raise check.child.died("SIGSEGV", None, [{"stage": "in its loader"}], [])

    monkeypatch.setattr(check.child.Worker, "run", dies)
    verdict = check.loader_verdict(tmp_path / "m.gguf")
    assert verdict.sentence == "llama.cpp refuses this file: llama.cpp died (SIGSEGV)"
    assert (verdict.accepted, verdict.death) == (False, "SIGSEGV")
