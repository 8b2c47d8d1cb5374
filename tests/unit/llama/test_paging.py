"""Help for a file larger than memory: the same numbers, the right bytes, and never more than is allowed."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import specimen
from moe_models import VOCAB, write_model

from dfqs_nb.core import machine
from dfqs_nb.core.display import size
from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.machine import Disk, Memory
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf import memory
from dfqs_nb.gguf.broken import glue
from dfqs_nb.gguf.header import headers_inside, read_header
from dfqs_nb.gguf.memory import Layout, Sizes
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama import build, check, graph, timing
from dfqs_nb.llama.graph import Paging
from dfqs_nb.llama.model import DecodeError, open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.llama.timing import Forecast, bound, diagnose, forecast
from dfqs_nb.routing.recorder import open_recorded, record

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 40).tolist()
pytestmark = pytest.mark.filterwarnings("ignore:.*no chat template", "ignore:paging help")
linux_only = pytest.mark.skipif(not graph.LINUX, reason="the help is for Linux")


def settings(mode: str, **fields: int) -> OpenSettings:
    return OpenSettings(n_ctx=256, n_threads=1, n_batch=32, n_ubatch=20, paging=mode, **fields)


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return write_model("olmoe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def flash(tmp_path_factory) -> Path:
    """Four layers of the published shape with few experts: hash routing, compressed attention."""
    shape = specimen.Shape(4, 16, 512)
    return specimen.write_specimen(tmp_path_factory.mktemp("flash") / "m.gguf", shape, progress=False)


def logits(path: Path, how: OpenSettings, prompt: int = 24) -> np.ndarray:
    """The logits after a prompt, and after each token that follows it."""
    with open_model(path, how, trial=False) as model:
        assert model.conditions()["paging"] == (how.paging if graph.LINUX else "off")
        return np.array([model.evaluate(TOKENS[:prompt]), *(model.evaluate([t]) for t in TOKENS[prompt:])])


@pytest.mark.parametrize("arch", ["qwen3moe", "olmoe", "deepseek2", "gpt-oss"])
def test_the_numbers_are_the_same_with_help_and_without(arch, tmp_path):
    path = write_model(arch, tmp_path)
    with pytest.warns(RuntimeWarning, match="paging help is on"):
        helped = logits(path, settings("on"))
    assert np.array_equal(helped, logits(path, settings("off")))


def test_the_numbers_of_the_reference_model_are_the_same():
    assert np.array_equal(logits(NANO, settings("on")), logits(NANO, settings("off")))


@pytest.mark.slow
def test_the_numbers_of_the_published_shape_are_the_same(flash):
    assert np.array_equal(logits(flash, settings("on")), logits(flash, settings("off")))


def places(path: Path, layer: int, experts: np.ndarray) -> set[tuple[int, int]]:
    """Where the file has these experts of a layer, from the header alone."""
    header, wanted = read_header(path), set()
    for tensor in header.tensors:
        if re.fullmatch(rf"blk\.{layer}\.ffn_(up|gate|down)_exps\.weight", tensor.name):
            size = tensor.nbytes // tensor.shape[-1]
            start = header.data_offset + tensor.offset
            wanted |= {(start + size * int(expert), size) for expert in experts}
    return wanted


@linux_only
def test_exactly_the_chosen_experts_are_read_and_recording_goes_on(moe, monkeypatch):
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, at, n, _advice: advised.append((at, n)))
    with open_recorded(moe, settings("on"), trial=False) as model:
        helped = record(model, TOKENS, 24)
        advised.clear()
        single = record(model, TOKENS[:1], 0)
    with open_recorded(moe, settings("off"), trial=False) as model:
        plain = record(model, TOKENS, 24)
    assert np.array_equal(helped.experts, plain.experts) and np.array_equal(helped.margin, plain.margin)
    assert np.array_equal(helped.digest, plain.digest)
    expected = [places(moe, layer, single.experts[0, at]) for at, layer in enumerate(single.layers.tolist())]
    read = {at + step * n for at, n in advised for step in (0, 1)}
    edges = {edge for part in expected for at, n in part for edge in (at, at + n)}
    assert read <= edges, "only whole experts are read"
    assert sum(n for _, n in advised) == sum(n for part in expected for _, n in part)


@linux_only
def test_a_batch_that_needs_most_experts_is_left_to_the_kernel(moe, monkeypatch):
    advised: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, at, _n, _advice: advised.append(at))
    with open_model(moe, settings("on"), trial=False) as model:
        first, last = model.paging.layout.experts.values()
        advised.clear()  # dense weights
        model.evaluate(TOKENS[:20])  # the last layer routes only the last token
        assert advised and all(
            any(0 <= at - part.start < part.slice_bytes * part.n for part in last) for at in advised
        )
        model.evaluate(TOKENS[:1])
        assert any(0 <= at - part.start < part.slice_bytes * part.n for part in first for at in advised)


@linux_only
def test_hash_layers_are_read_by_token(monkeypatch):
    seen: list[tuple[int, list[int]]] = []
    with open_model(NANO, settings("on"), trial=False) as model:
        tables = model.paging.layout.tables
        monkeypatch.setattr(Paging, "_read", lambda _s, layer, ids: seen.append((layer, ids.tolist())))
        model.decode([7])
    with open_recorded(NANO, settings("off"), trial=False) as recorded:
        trace = record(recorded, [7])
    hashed = trace.layers[trace.hashed].tolist()
    assert hashed and sorted(tables) == hashed
    assert seen[: len(hashed)] == [(at, sorted(trace.experts[0, at].tolist())) for at in hashed]


@linux_only
@pytest.mark.parametrize("token", [-1, 1_000, 1_000_000_000])
def test_a_token_that_there_is_not_is_refused_as_without_help(token):
    with open_model(NANO, settings("on"), trial=False) as model:
        with pytest.raises(DecodeError, match="llama_decode returned -1"):
            model.evaluate([token])
        model.evaluate([7])


@linux_only
@pytest.mark.parametrize("limit", [0, 40_960])
def test_no_more_is_locked_than_the_system_allows(moe, monkeypatch, limit):
    monkeypatch.setattr(graph, "may_lock", lambda: limit)
    before = locked_kib()
    with open_model(moe, settings("on"), trial=False) as model:
        assert model.paging.pinned_bytes <= limit
        assert locked_kib() - before <= limit // 1024, "whole pages are locked, and tensors begin within one"
        assert "raise `ulimit -l`" in model.loaded["paging"]
        assert "opening reads the whole file once" in model.loaded["paging"]


@linux_only
def test_no_more_is_locked_than_memory_leaves(moe, monkeypatch):
    monkeypatch.setattr(graph, "available_memory", lambda: Memory(8 << 30, 400 << 20, "test"))
    with open_model(moe, settings("on"), trial=False) as model:
        assert model.paging.pinned_bytes == 0
        assert "close other programs" in model.loaded["paging"]


@linux_only
def test_after_a_lock_that_fails_nothing_is_read_in_vain(moe, monkeypatch):
    """Under the usual limit of 8 MB a lock can fail for each of a thousand tensors."""
    advised: list[int] = []
    monkeypatch.setattr(graph, "advise_read", lambda _file, start, _end, _window: advised.append(start))
    refused = type("Lock", (), {"__call__": lambda *_: -1})()
    libc = type("Libc", (), {"mlock": refused, "mlockall": refused})()
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libc)
    help_ = Paging(open_shards(moe))
    help_.start(0)
    assert help_.pinned_bytes == 0 and len(advised) == 1 < len(help_.layout.dense)
    help_.close()


def locked_kib() -> int:
    """KiB that this process has locked."""
    return int(re.search(r"VmLck:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@linux_only
def test_what_is_locked_is_given_back(moe):
    before = locked_kib()
    with (
        pytest.warns(RuntimeWarning, match="of dense weights locked"),
        open_model(moe, settings("on")) as model,
    ):
        dense = Layout.of(open_shards(moe).headers).dense_bytes
        if graph.may_lock() is None:
            assert model.paging.pinned_bytes == dense and locked_kib() > before
    assert locked_kib() == before


@linux_only
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_the_root_of_a_container_has_the_limit_of_its_user():
    code = "from dfqs_nb.llama.graph import may_lock; print(may_lock())"
    words = f"ulimit -l 64; {shlex.quote(sys.executable)} -c '{code}'"
    done = subprocess.run(["unshare", "-r", "bash", "-c", words], capture_output=True, text=True, check=False)
    if done.stderr.startswith("unshare:"):
        pytest.skip(done.stderr)  # not allowed here
    assert done.stdout == "65536\n", done.stderr


@linux_only
def test_ctrl_c_waits_for_the_graph_and_changes_no_number(moe, monkeypatch):
    kept, signals = Paging._read, [signal.SIGINT]
    expected = logits(moe, settings("off"))

    def interrupted(self, layer, experts):
        if signals:
            os.kill(os.getpid(), signals.pop())
        kept(self, layer, experts)

    with open_model(moe, settings("on"), trial=False) as model:
        model.evaluate(TOKENS[:24])
        monkeypatch.setattr(Paging, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.evaluate(TOKENS[24:25])
        assert np.array_equal(model.evaluate(TOKENS[25:26]), expected[2])


@linux_only
def test_a_fault_of_the_help_is_a_message(moe, monkeypatch):
    with open_model(moe, settings("on"), trial=False) as model:
        monkeypatch.setattr(os, "posix_fadvise", lambda *_: 1 / 0)
        model.evaluate(TOKENS[:4])
        with pytest.raises(ModelError, match="division by zero.*paging='off'"):
            model.evaluate(TOKENS[4:8])


def test_it_is_on_where_the_file_exceeds_memory_and_off_elsewhere(moe, monkeypatch):
    def on(mode: str, **fields: int) -> bool:
        return not Paging.unhelped(open_shards(moe), settings(mode, **fields))

    nbytes = open_shards(moe).nbytes
    assert not on("auto") and on("on")
    why = [Paging.unhelped(open_shards(moe), settings(mode)) for mode in ("auto", "off", "on")]
    assert why == ["off: the model fits in memory", "off: you set it", ""]
    monkeypatch.setattr(graph, "available_memory", lambda: Memory(nbytes, nbytes // 2, "test"))
    assert on("auto") and not on("off") and not on("auto", use_mmap=False)
    assert not on("on", use_extra_bufts=True)
    monkeypatch.setattr(graph, "has_gpu_support", lambda: True)
    assert not on("on", n_gpu_layers=2)
    monkeypatch.setattr(graph, "has_gpu_support", lambda: False)
    assert on("on", n_gpu_layers=2)
    monkeypatch.setattr(graph, "LINUX", False)
    assert not on("on")
    with pytest.raises(ModelError, match="paging is 'maybe'"):
        settings("maybe")


def test_a_group_of_this_process_limits_its_memory(tmp_path):
    own, listed = tmp_path / "a" / "b", tmp_path / "cgroup"
    own.mkdir(parents=True)
    listed.write_text("0::/a/b\n")
    (own.parent / "memory.max").write_text(str(2 << 30))
    (own.parent / "memory.current").write_text(str(1 << 30))
    groups = [machine._cgroup_memory(place) for place in machine._own_groups(tmp_path, listed)]
    assert [group.available_bytes for group in groups if group] == [1 << 30]


# ---- the forecast, and what was measured ----


@pytest.mark.parametrize("share", [0.2, 0.5, 2.0])
def test_the_forecast_agrees_with_the_placement(moe, share, monkeypatch):
    monkeypatch.setattr(Disk, "under", lambda _path: Disk("vda", 0))
    headers, model = open_shards(moe).headers, Sizes(open_shards(moe).as_one)
    room = round(share * sum(model.experts)) + sum(model.dense[:-1])
    placed = memory.place(model, 256, room + model.dense[-1] + sum(model.caches(256)))
    expected = forecast(headers, room, 1e9)
    reads = [
        expected.rows[f"forecast: read from disk a token, {how}"] for how in ("with help", "without help")
    ]
    assert expected.helped == pytest.approx(placed.disk_token_bytes, abs=1) and len(set(reads)) == 1
    assert reads[0] == (f"{size(expected.helped)}, 0.00 s at that speed" if share < 1 else "0 B")
    seen = "1.0 GB/s while this model was loaded" if share < 1 else "not measured: no token reads from it"
    assert expected.rows["its speed"] == seen
    assert expected.rows["experts that stay in memory"] == f"{100 * min(1, share):.0f} %"
    parts = [part for layer in Layout.of(headers).experts.values() for part in layer]
    piece = sum(part.slice_bytes for part in parts) // len(parts)
    monkeypatch.setattr(Disk, "under", lambda _path: Disk("vda", piece))
    larger = forecast(headers, room, 1e9)
    assert larger.helped == expected.helped
    without = size(min(3 * expected.helped, sum(model.experts)))
    assert larger.rows["forecast: read from disk a token, without help"].split(",")[0] == without, (
        "a window before and behind each slice"
    )


def test_places_count_from_the_start_of_the_file(tmp_path):
    path = glue(tmp_path)
    layout = Layout.of(list(headers_inside(path)))
    places = [place for layer in layout.experts.values() for place in layer if place.file == 1]
    assert 0 < max(place.start + place.slice_bytes * place.n for place in places) <= path.stat().st_size


@pytest.mark.parametrize("arch", ["gpt-oss", "granitemoe"])
def test_every_tensor_of_experts_has_its_place_biases_too(arch, tmp_path):
    shards = open_shards(write_model(arch, tmp_path))
    places = [place for layer in Layout.of(shards.headers).experts.values() for place in layer]
    theirs = [tensor for tensor in shards.as_one.tensors if "_exps." in tensor.name]
    assert sorted(place.start for place in places) == sorted(
        shards.headers[0].data_offset + tensor.offset for tensor in theirs
    )
    assert sum(place.slice_bytes * place.n for place in places) == sum(Sizes(shards.as_one).experts)


def test_memory_that_does_not_hold_the_dense_part_reads_it_again(moe, monkeypatch):
    monkeypatch.setattr(Disk, "under", lambda _path: Disk("", None))
    layout = Layout.of(open_shards(moe).headers)
    expected = forecast(open_shards(moe).headers, layout.dense_bytes - 1000)
    assert expected.rows["experts that stay in memory"] == "0 %"
    assert expected.helped == layout.token_bytes + 1000
    assert expected.rows["the disk"] == "no block device, read-ahead not known"


@pytest.mark.parametrize(
    ("helped", "seconds", "read_bytes", "words"),
    [
        (0, 2.0, 0.0, "the model fits in memory"),
        (
            10**9,
            1.6,
            9e8,
            "faster disk or more free memory helps, paging='on', or as root `blockdev --setra 256 /",
        ),
        (10**9, 2.0, 9e8, "less than half of the time"),
        (10**9, 2.0, math.nan, "was not measured in this run"),
    ],
)
def test_what_bounds_a_token_is_named_with_its_remedy(helped, seconds, read_bytes, words):
    expected = Forecast(helped, Disk("vda", 8 << 20), 1e9, {})
    assert words in bound(expected, seconds, read_bytes)


def test_an_open_model_is_diagnosed(moe, monkeypatch):
    with open_model(moe, settings("on")) as model:
        sentence, rows = diagnose(model, n_tokens=2)
        assert (
            sentence.endswith("fits in memory.")
            and rows["forecast: read from disk a token, with help"] == "0 B"
        )
        assert float(rows["measured: seconds a token"].split()[0]) > 0 and model.n_past == 0
        monkeypatch.setattr(psutil, "Process", lambda: None)
        assert diagnose(model, n_tokens=1)[1]["measured: read from disk a token"] == "not measured", (
            "not counted here"
        )


def test_the_forecast_prefers_the_speed_that_the_load_saw(moe, monkeypatch):
    counts = iter([0.0, 3e9])
    with monkeypatch.context() as patched:
        patched.setattr(build, "read_bytes", lambda: next(counts))
        patched.setattr(build, "time", SimpleNamespace(perf_counter=iter([10.0, 12.0]).__next__))
        own = open_model(moe, settings("off"), trial=False)
    with own:
        assert own.loading_speed == 1.5e9, "3 GB in 2 s"
        monkeypatch.setattr(timing, "available_memory", lambda: Memory(8 << 30, 1 << 16, "test"))
        rows = diagnose(own, n_tokens=1)[1]
    assert rows["its speed"] == "1.5 GB/s while this model was loaded"
    assert rows["forecast: read from disk a token, with help"].endswith(" s at that speed")
    with monkeypatch.context() as patched:
        patched.setattr(check, "trial", lambda *_: ("", 5e8))
        with open_model(moe, settings("off")) as tried:
            assert tried.loading_speed == 5e8, "its trial read the file, and left it in the cache"
    with open_model(moe, settings("off"), trial=False) as small:
        assert math.isnan(small.loading_speed)
