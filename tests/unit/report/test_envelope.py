"""The hardware envelope: what fits where, against llama.cpp's own plan and the published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import gguf_fixtures
import pytest

from dfqs_nb.core.errors import RegistryError
from dfqs_nb.gguf import memory
from dfqs_nb.gguf.broken import reference_shards
from dfqs_nb.gguf.facts import parameters
from dfqs_nb.gguf.header import GGUFHeader, read_header
from dfqs_nb.llama import settings
from dfqs_nb.report import metrics
from dfqs_nb.report.metrics import (
    DOES_NOT_FIT,
    FITS,
    GB,
    NOT_KNOWN,
    PAGED,
    hardware_envelope,
    planned_compute,
)
from dfqs_nb.report.template import spec_table
from dfqs_nb.report.text import needs_table

SMALL, LARGE = 16 * GB, 256 * GB  # bytes of memory


@pytest.fixture(scope="module")
def flash_file(tmp_path_factory):
    """The real shape with 129,280 distinct tokens, sparse, so that llama.cpp itself plans it."""
    n = gguf_fixtures.REAL_TOKENS
    kept = [part for part in gguf_fixtures.real_size_fields() if b"tokenizer." not in part[:24]]
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
    path = tmp_path_factory.mktemp("flash") / "flash.gguf"
    raw = gguf_fixtures.header_bytes(kept + vocabulary, tensors)
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + sum(tensor.nbytes + -tensor.nbytes % 32 for tensor in tensors))
    return path


def fits(needs: dict, n_ctx: int) -> list[str]:
    """What is said of each limit at a context, this machine first."""
    return next(list(row["fits"].values()) for row in needs["rows"] if row["n_ctx"] == n_ctx)


def test_the_recorded_compute_buffers_are_what_llama_cpp_plans_for_the_published_shapes(flash_file):
    table = spec_table("requirements")["envelope"]["published_compute"]
    recorded = {int(n_ctx): row for n_ctx, row in table.items()}
    assert recorded.keys() == set(metrics.CONTEXTS)
    for flash in (False, True):
        given = settings.OpenSettings(n_threads=1, flash_attn=flash)
        planned = planned_compute(flash_file, list(recorded), given)
        wanted = {n_ctx: row["flash" if flash else "plain"] for n_ctx, row in recorded.items()}
        assert planned == pytest.approx(wanted, rel=1e-6)


def test_the_artifacts_own_header_is_held_against_the_specifications_table(flash_file):
    header, compute = read_header(flash_file), dict.fromkeys(metrics.CONTEXTS, GB)
    small, large = (hardware_envelope(header, n, compute, is_artifact=True) for n in (SMALL, LARGE))
    assert fits(small, 8192) == [PAGED, FITS, FITS], "this machine, then 80 and 128 GB"
    assert fits(small, 1048576) == [PAGED, FITS, FITS] and fits(large, 1048576)[0] == FITS
    high = hardware_envelope(header, SMALL, dict.fromkeys(metrics.CONTEXTS, 40 * GB), is_artifact=True)
    assert fits(high, 8192) == [DOES_NOT_FIT, PAGED, FITS]


def test_without_the_compute_buffer_nothing_is_said_to_fit(merged_reference):
    header = read_header(merged_reference)
    assert {
        word for row in hardware_envelope(header, LARGE, {})["rows"] for word in row["fits"].values()
    } == {NOT_KNOWN}
    assert fits(hardware_envelope(header, 10**6, {}), 8192) == [DOES_NOT_FIT]


def test_with_llama_cpps_plan_the_reference_model_fits(merged_reference):
    header = read_header(merged_reference)
    compute = planned_compute(merged_reference, [8192, 65536], settings.OpenSettings(n_threads=1))
    needs = hardware_envelope(header, LARGE, compute)
    assert fits(needs, 65536) == [FITS] and fits(needs, 32768) == [NOT_KNOWN]
    row = needs["rows"][0]
    assert row["need_bytes"] == parameters(header, in_bytes=True).total + row["kv_bytes"] + compute[8192]


def test_the_buffer_is_that_of_all_layers_in_memory_also_after_a_run_on_a_card(monkeypatch):
    """Beside layers on a card it is a part: 13 MB of 51 MB for the reference model on an H100."""
    asked = []
    monkeypatch.setattr(
        "dfqs_nb.llama.check.plan_memory", lambda _, rows: asked.extend(rows) or [{"compute_bytes": 1}]
    )
    assert planned_compute("m.gguf", [8192], settings.OpenSettings(n_threads=1, n_gpu_layers=-1)) == {8192: 1}
    assert [(each.n_ctx, each.n_gpu_layers) for each in asked] == [(8192, 0)]


def test_a_file_that_llama_cpp_refuses_has_no_planned_buffer(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert planned_compute(tmp_path / "m.gguf", [8192], settings.OpenSettings(n_threads=1)) == {}


def test_the_models_own_context_is_added_and_nothing_is_said_of_what_lies_beyond(merged_reference):
    rows = hardware_envelope(read_header(merged_reference), SMALL, {})["rows"]
    assert [row["n_ctx"] for row in rows] == [8192, 16384, 32768, 65536]


def test_a_cache_that_is_an_upper_bound_refuses_nothing_alone(monkeypatch, merged_reference):
    bound = memory.KvCacheBytes([100 * GB], "upper bound", "a note")
    monkeypatch.setattr(metrics, "kv_cache_bytes", lambda *_, **__: bound)
    header, compute = read_header(merged_reference), {8192: 0}
    assert fits(hardware_envelope(header, SMALL, compute), 8192) == [NOT_KNOWN]
    assert fits(hardware_envelope(header, LARGE, compute), 8192) == [FITS]


def test_a_cache_with_sliding_windows_is_said_to_be_an_upper_bound():
    """llama.cpp keeps the window only; the formula from the header counts the whole context."""
    keys = {"block_count": 2, "embedding_length": 64, "context_length": 8192, "attention.head_count": 2}

    def needs(**more: int) -> dict:
        fields = {f"gemma3.{name}": value for name, value in {**keys, **more}.items()}
        shape = GGUFHeader(
            Path("gemma"), 0, 3, 32, {"general.architecture": "gemma3", **fields}, (), 0, 0, b""
        )
        return hardware_envelope(shape, LARGE, {})

    sliding, whole = needs(**{"attention.sliding_window": 512}), needs()
    assert "the upper bound size: sliding-window layers counted as if" in sliding["note"]
    assert not whole["note"]


def test_shards_give_the_needs_of_the_merged_file(merged_reference):
    shards = hardware_envelope(reference_shards().as_one, SMALL, {})
    assert shards["rows"] == hardware_envelope(read_header(merged_reference), SMALL, {})["rows"]


def test_the_envelope_is_json_and_its_table_comes_from_it_alone(merged_reference):
    needs = json.loads(json.dumps(hardware_envelope(read_header(merged_reference), SMALL, {})))
    table = needs_table(needs)
    assert list(table) == ["KV cache (MB)", "with all weights (MB)", "this machine (16.0 GB)"]
    assert table.index.tolist() == [8192, 16384, 32768, 65536]


def test_a_missing_table_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("DFQS_DATA", str(tmp_path))
    with pytest.raises(RegistryError, match="git checkout data/spec"):
        spec_table("requirements")
