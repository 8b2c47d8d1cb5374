"""The hardware envelope: what fits where, against llama.cpp's own plan and the published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import gguf_fixtures
import pytest

from dfqs_nb.core.errors import RegistryError
from dfqs_nb.gguf.broken import reference_shards
from dfqs_nb.gguf.header import GGUFHeader, read_header
from dfqs_nb.llama import settings
from dfqs_nb.report import envelope
from dfqs_nb.report.envelope import (
    AS_PLANNED,
    DOES_NOT_FIT,
    FITS,
    GB,
    NOT_KNOWN,
    envelope_tables,
    hardware_envelope,
    planned_compute,
    published_envelope,
)
from dfqs_nb.report.spec import spec_table

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


def fit(needs: dict, resource: str, limit: str, n_ctx: int) -> dict:
    return next(
        row
        for row in needs["fits"]
        if (row["resource"], row["limit"], row["n_ctx"]) == (resource, limit, n_ctx)
    )


def test_the_recorded_compute_buffers_are_what_llama_cpp_plans_for_the_published_shapes(flash_file):
    recorded = spec_table("requirements")["envelope"]["published_compute"]
    planned = planned_compute(flash_file, recorded, settings.OpenSettings(n_threads=1))
    assert planned.keys() == recorded.keys() == set(envelope.CONTEXTS)
    for n_ctx, row in recorded.items():
        assert planned[n_ctx] == pytest.approx(row, rel=1e-6)


def test_header_and_published_shape_give_the_same_cache(flash_file):
    own, published = hardware_envelope(read_header(flash_file), SMALL), published_envelope(SMALL)
    for mine, theirs in zip(own["cache"], published["cache"], strict=True):
        for key in ("n_ctx", "kv_bytes", "kv_swa_full_bytes"):
            assert mine[key] == theirs[key]


def test_the_published_artifact_in_the_specifications_table():
    needs = published_envelope(SMALL)
    assert fit(needs, "RAM", "DFQS 1.0 minimum", 8192)["verdict"] == FITS
    assert fit(needs, "RAM", "DFQS 1.0 minimum", 1048576)["verdict"] == DOES_NOT_FIT
    assert fit(needs, "RAM", "DFQS 1.0 recommended", 1048576)["verdict"] == FITS
    assert fit(needs, "VRAM", "DFQS 1.0 minimum", 8192)["verdict"] == DOES_NOT_FIT
    assert fit(needs, "VRAM", "DFQS 1.0 minimum", 8192)["least_verdict"] == FITS + AS_PLANNED


def test_this_machine_decides_what_fits_here():
    small, large = published_envelope(SMALL), published_envelope(LARGE)
    assert fit(small, "RAM", "this machine", 8192)["verdict"] == DOES_NOT_FIT
    assert fit(small, "RAM", "this machine", 8192)["least_verdict"] == FITS
    assert fit(large, "RAM", "this machine", 1048576)["verdict"] == FITS


def test_without_the_compute_buffer_nothing_is_said_to_fit(merged_reference):
    header = read_header(merged_reference)
    needs = hardware_envelope(header, LARGE)
    assert {row["verdict"] for row in needs["fits"]} == {NOT_KNOWN}
    tiny = 10**6
    assert fit(hardware_envelope(header, tiny), "RAM", "this machine", 8192)["verdict"] == DOES_NOT_FIT


def test_with_llama_cpps_plan_the_reference_model_fits(merged_reference):
    header = read_header(merged_reference)
    compute = planned_compute(merged_reference, [8192, 65536], settings.OpenSettings(n_threads=1))
    needs = hardware_envelope(header, LARGE, compute)
    row = fit(needs, "RAM", "this machine", 65536)
    assert row["verdict"] == FITS and row["counted"].endswith(
        "compute buffer as planned for the CPU without flash attention"
    )
    assert row["need_bytes"] == needs["weights_bytes"] + row["least_bytes"]
    assert fit(needs, "RAM", "this machine", 32768)["verdict"] == NOT_KNOWN


def test_the_models_own_context_is_added_and_nothing_is_said_of_what_lies_beyond(merged_reference):
    rows = hardware_envelope(read_header(merged_reference), SMALL)["cache"]
    assert [row["n_ctx"] for row in rows] == [8192, 16384, 32768, 65536]


def test_a_cache_that_is_an_upper_bound_refuses_nothing_alone(tmp_path, monkeypatch, merged_reference):
    from dfqs_nb.gguf.memory import KvCacheBytes

    bound = KvCacheBytes([100 * GB], "upper bound")
    monkeypatch.setattr(envelope, "kv_cache_bytes", lambda *_, **__: bound)
    compute = {8192: {"plain": 0, "flash": 0}}
    needs = hardware_envelope(read_header(merged_reference), SMALL, compute)
    assert fit(needs, "RAM", "this machine", 8192)["verdict"] == NOT_KNOWN
    assert fit(needs, "RAM", "this machine", 8192)["verdict"] == NOT_KNOWN
    roomy = hardware_envelope(read_header(merged_reference), LARGE, compute)
    assert fit(roomy, "RAM", "this machine", 8192)["verdict"] == FITS


def test_a_cache_with_sliding_windows_is_said_to_be_an_upper_bound():
    """llama.cpp keeps the window only; the formula from the header counts the whole context."""
    keys = {"block_count": 2, "embedding_length": 64, "context_length": 8192, "attention.head_count": 2}

    def needs(**more: int) -> dict:
        fields = {f"gemma3.{name}": value for name, value in {**keys, **more}.items()}
        shape = GGUFHeader(
            Path("gemma"), 0, 3, 32, {"general.architecture": "gemma3", **fields}, (), 0, 0, b""
        )
        return hardware_envelope(shape, LARGE)

    sliding, whole = needs(**{"attention.sliding_window": 512}), needs()
    assert list(envelope_tables(sliding)["cache"]) == ["KV cache, at most (MB)", "KV cache, swa_full (MB)"]
    assert "as if they kept the whole context" in sliding["assumptions"][0]
    assert "KV cache (at most)" in sliding["fits"][0]["counted"]
    assert list(envelope_tables(whole)["cache"]) == ["KV cache (MB)"] and not whole["assumptions"]


def test_shards_give_the_weights_of_the_merged_file(merged_reference):
    shards = hardware_envelope(reference_shards().as_one, SMALL)
    merged = hardware_envelope(read_header(merged_reference), SMALL)
    assert shards["weights_bytes"] == merged["weights_bytes"]
    assert shards["routed_bytes"] == merged["routed_bytes"]


def test_the_envelope_is_json_and_its_tables_come_from_it_alone(merged_reference):
    needs = json.loads(json.dumps(hardware_envelope(read_header(merged_reference), SMALL)))
    tables = envelope_tables(needs)
    assert list(tables) == ["cache", "fits"]
    assert set(tables["fits"].to_numpy().ravel()) <= {FITS, DOES_NOT_FIT, NOT_KNOWN}
    assert len(tables["fits"]) == 2, "the hardware table of DFQS 1.0 is about another model"
    assert len(envelope_tables(published_envelope(SMALL))["fits"]) == 2 * 5


def test_the_split_of_the_artifact_is_a_range_that_says_what_it_assumes():
    needs = published_envelope(SMALL)
    text = " ".join(needs["assumptions"])
    assert "A token uses 7.6 GB of weights" in text
    assert "54.11 GB if all are IQ1_S" in text and "less than the 8.5 bits of Q8_0" in text


def test_of_a_gpu_nothing_is_planned_from_the_cpu():
    needs = published_envelope(LARGE)
    rows = [row for row in needs["fits"] if row["resource"] == "VRAM"]
    assert {row["verdict"] for row in rows} == {DOES_NOT_FIT}, "62 GB of weights are more than 24"
    assert {row["least_verdict"] for row in rows} == {FITS + AS_PLANNED}
    assert not [row for row in rows if "CPU" in row["counted"]]
    columns = " ".join(envelope_tables(needs)["cache"])
    assert "planned on an H100" in columns and "logged on a GPU by others" in columns


def test_of_another_shape_a_gpus_buffer_is_not_known(merged_reference):
    needs = hardware_envelope(read_header(merged_reference), LARGE, is_artifact=True)
    rows = [row for row in needs["fits"] if row["resource"] == "VRAM"]
    assert rows and {row["least_verdict"] for row in rows} == {NOT_KNOWN}


def test_a_missing_table_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("DFQS_DATA", str(tmp_path))
    with pytest.raises(RegistryError, match="git checkout data/spec"):
        spec_table("requirements")
