"""The routing of a random DeepSeek-V4 model, one sequence and batches, against transformers' own implementation.

Slow, and only with ``pip install --group peer``, or when ``$DFQS_PEER_PYTHON`` names an interpreter that has
torch, transformers and gguf.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing.recorder import LOGIT_SAMPLE, Together, open_recorded, record
from dfqs_nb.routing.trace import Trace

NOISE = 5e-5  # selection scores of the two implementations differ by less


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """The model's file, and what transformers computed."""
    here = sys.executable if find_spec("transformers") and find_spec("torch") else ""
    python = os.environ.get("DFQS_PEER_PYTHON") or here
    if not python:
        pytest.skip("needs torch and transformers (pip install --group peer), or DFQS_PEER_PYTHON")
    folder = tmp_path_factory.mktemp("peer")
    script = Path(__file__).resolve().parents[1] / "support" / "transformers_peer.py"
    results = folder / "one.npz", folder / "batch.npz"
    subprocess.run([python, script, folder / "model.gguf", *results], check=True, timeout=600)
    return folder / "model.gguf", *(dict(np.load(path)) for path in results)


SETTINGS = OpenSettings(n_ctx=1024, n_threads=1, type_k="f32", type_v="f32")


@pytest.mark.slow
@pytest.mark.parametrize("n_prefill", [None, 350], ids=["prefill", "prefill and decode"])
def test_routing_equals_transformers_token_for_token(peer, n_prefill, record_property):
    path, theirs, _ = peer
    with open_recorded(path, SETTINGS) as model:
        ours = record(model, theirs["tokens"][0].tolist(), n_prefill)
    agree(ours, theirs, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("arrivals", [(0, 0, 0), (0, 20, 5)], ids=["at once", "one after another"])
@pytest.mark.parametrize("unified", [True, False], ids=["one cache", "a cache each"])
def test_a_batch_of_sequences_equals_transformers_batch(peer, unified, arrivals, record_property):
    """Three sequences share llama.cpp's batches, and transformers evaluates them as one batch."""
    path, _, theirs = peer
    with open_recorded(path, SETTINGS) as model:
        model.reopen(SETTINGS, n_sequences=len(arrivals), unified=unified)
        texts = theirs["tokens"].tolist()
        ours = Together(model).record(texts, arrivals, 100, 0)
    agree(ours, theirs, record_property)


def agree(ours: Trace, theirs: dict[str, np.ndarray], record_property) -> None:
    """Choices are equal but at margins within the noise; scores and logits nearly are."""
    assert ours.hashed.tolist() == [True, False, False, False] and ours.logits.shape[1] <= LOGIT_SAMPLE
    np.testing.assert_array_equal(ours.tokens, theirs["tokens"].ravel())
    drift = np.abs(ours.logits - theirs["logits"][:, ours.logit_ids]).max()
    worst, clear, same = 0.0, 0, 0
    for layer in range(4):
        experts = theirs[f"experts_{layer}"]
        equal = (np.sort(ours.experts[:, layer], axis=1) == np.sort(experts, axis=1)).all(axis=1)
        if layer == 0:
            assert equal.all(), "hash layer"
            continue
        ranked = -np.sort(-theirs[f"scores_{layer}"], axis=1)
        margin = ranked[:, 1] - ranked[:, 2]
        worst = max(worst, float(np.abs(ours.margin[:, layer] - margin)[equal].max()))
        assert equal[margin > NOISE].all(), f"layer {layer} chooses otherwise at a clear margin"
        clear, same = clear + int((margin > NOISE).sum()), same + int(equal.sum())
    for name, value in (("logit_drift", drift), ("margin_drift", worst), ("clear", clear), ("same", same)):
        record_property(name, value)
    print(
        f"\nlogits within {drift:.2g}, margins within {worst:.2g}; {same} of {3 * ours.n_tokens:,} sets equal, "
        f"{clear} of them asked for (margin above {NOISE})"
    )
    assert worst < NOISE and drift < 1e-2
