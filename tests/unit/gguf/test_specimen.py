"""The specimen: the published shape, deterministic, and what llama.cpp takes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import specimen
from gguf_fixtures import REAL_TENSORS, real_size_tensors

from dfqs_nb.core.errors import DfqsError, OutputError, SpaceError
from dfqs_nb.gguf import facts
from dfqs_nb.gguf.header import check_layout, read_header
from dfqs_nb.gguf.models import outline
from dfqs_nb.llama.check import loader_verdict
from dfqs_nb.merge import diagnose

TINY = specimen.Shape(n_layers=4, n_experts=8, n_tokens=512)  # widths are the real ones: 0.8 GB


@pytest.fixture
def narrow(monkeypatch) -> None:
    """The same shape an eighth as wide where data is written: llama.cpp would not take it, and it is small."""
    rows = specimen._rows

    def cut(*arguments):
        return [
            specimen.Row(row.name, row.type, (row.shape[0], *(1 for _ in row.shape[1:])))
            for row in rows(*arguments)
        ]

    monkeypatch.setattr(specimen, "_rows", cut)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_full_shape_is_the_published_one():
    rows = list(specimen._rows(specimen.published(), specimen.Shape.full()))
    assert len(rows) == REAL_TENSORS
    assert {(row.name, row.type, row.shape) for row in rows} == {
        (spec.name, spec.type, spec.shape) for spec in real_size_tensors()
    }
    assert sum(row.nbytes for row in rows) == 62_687_281_500


def test_the_same_command_writes_the_same_bytes(tmp_path, narrow):
    paths = [specimen.write_specimen(tmp_path / f"{i}.gguf", TINY, progress=False) for i in (1, 2)]
    assert sha256(paths[0]) == sha256(paths[1])
    check_layout(read_header(paths[0]))
    assert diagnose(paths[0]).sound and sorted(tmp_path.iterdir()) == sorted(paths), "nothing else is left"
    with pytest.raises(OutputError, match="exists already"):
        specimen.write_specimen(paths[0], TINY)


def test_a_concatenation_is_one_and_has_every_tensor(tmp_path, narrow):
    path = specimen.write_specimen(tmp_path / "glued.gguf", TINY, concatenated=True, progress=False)
    whole = specimen.write_specimen(tmp_path / "whole.gguf", TINY, progress=False)
    assert str(diagnose(path).kind) == "raw concatenation"
    with outline(path) as glued:
        assert [t.name for t in glued.tensors] == [t.name for t in read_header(whole).tensors]


def test_weights_are_finite_and_tables_name_different_experts():
    row = specimen.Row("blk.0.ffn_gate_tid2eid.weight", "I32", (6, 512))
    table = np.frombuffer(b"".join(specimen._data(row, 16)), "<i4")
    experts = table.reshape(512, 6)
    assert experts.min() == 0 and experts.max() == 15 and all(len(set(row)) == 6 for row in experts)
    for kind, offsets in (("Q8_0", (0,)), ("IQ1_S", (0,)), ("Q2_K", (80, 82))):
        blocks = np.frombuffer(specimen._pool(kind), np.uint8).reshape(-1, specimen.SIZES[kind][1])
        for offset in offsets:
            scales = blocks[:, offset : offset + 2].copy().view("<f2")
            assert np.isfinite(scales).all() and scales.max() < 0.01


def test_what_cannot_be_written_is_said_first(tmp_path, monkeypatch):
    with pytest.raises(DfqsError, match="44 layers; the published model has 43"):
        specimen.write_specimen(tmp_path / "m.gguf", specimen.Shape(n_layers=44))
    monkeypatch.setattr(specimen, "SPARE_BYTES", 1 << 60)
    with pytest.raises(SpaceError, match="must stay free"):
        specimen.write_specimen(tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_llama_cpp_loads_and_runs_it(tmp_path):
    from dfqs_nb.llama import OpenSettings, open_model

    path = specimen.write_specimen(tmp_path / "m.gguf", TINY, progress=False)
    assert loader_verdict(path).accepted and facts.experts(read_header(path)).hash_layers == 3
    with open_model(path, OpenSettings(n_ctx=256, n_gpu_layers=0)) as model:
        logits = model.evaluate(model.tokenize("What is the capital of France?"))
    assert np.isfinite(logits).all() and 0.01 < logits.std() < 100


@pytest.mark.slow
def test_its_routers_use_all_experts_alike(tmp_path):
    """The worst case of paging: a token's experts say little about the next token's."""
    from dfqs_nb.llama import OpenSettings
    from dfqs_nb.routing.recorder import open_recorded

    shape = specimen.Shape(n_layers=5, n_experts=16, n_tokens=512)
    path = specimen.write_specimen(tmp_path / "m.gguf", shape, progress=False)
    tokens = np.random.default_rng(3).integers(300, 512, 48).tolist()
    with open_recorded(path, OpenSettings(n_ctx=64, n_gpu_layers=0)) as opened:
        opened.clear()
        opened.feed(tokens)
        experts = opened.trace(tokens).experts  # (token, layer, used)
    for layer in range(3, 5):
        chosen = [set(row) for row in experts[:, layer].tolist()]
        kept = np.mean([len(own & last) for own, last in zip(chosen[1:], chosen, strict=False)])
        assert kept < 1.3 * 6 * 6 / 16, (
            f"layer {layer}: {kept:.2f} of 6 experts stay; evenly drawn 2.25 would"
        )
