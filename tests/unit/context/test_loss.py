"""Loss by position, against other ways to compute the same."""

from __future__ import annotations

import numpy as np
import pytest
from test_memory import NANO

from dfqs_nb.context import curve, figures
from dfqs_nb.context.haystacks import Haystacks, frame_of, probe_of
from dfqs_nb.context.plan import PrefillSpeed
from dfqs_nb.core.stage import Stage
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings

FREE = PrefillSpeed(0.0, 0.0)
SETTINGS = OpenSettings(n_ctx=640, n_threads=1)


@pytest.fixture(scope="module")
def nano():
    with open_model(NANO, SETTINGS, trial=False) as model:
        yield model


def text_of(model: Model, n_tokens: int = 300) -> list[int]:
    probe = probe_of("long-context-nano")
    return curve.held_out_text(Haystacks(frame_of(model, probe), probe), 0, n_tokens)


def nats_by_hand(logits: np.ndarray, target: int) -> float:
    """Minus the logarithm of the softmax, in float64."""
    logits = logits.astype(float)
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


def test_loss_is_that_of_the_logits_of_the_same_pieces(nano):
    """The same pieces give the same bits, so only arithmetic could differ; pieces end at 128 and 256."""
    text = text_of(nano)
    nano.clear()
    rows = [row.copy() for logits in nano.logits(text, 128) for row in logits]
    by_hand = [nats_by_hand(rows[at], text[at + 1]) for at in range(299)]
    np.testing.assert_allclose(curve.token_losses(nano, text), by_hand, rtol=1e-9, atol=1e-12)


def test_loss_equals_logits_taken_one_prefix_at_a_time(nano, monkeypatch):
    """A prefix is computed in another order of sums, so it differs as much as other pieces do.

    How much that is depends on the processor. It is measured here, by cutting the text into pieces of
    several sizes. A target off by one token would differ by whole nats.
    """
    text = text_of(nano)
    cut = []
    for size in (1, 7, 64, 128, 300):
        monkeypatch.setattr(curve, "CHUNK_TOKENS", size)
        cut.append(curve.token_losses(nano, text))
    spread = float(np.ptp(np.stack(cut), axis=0).max())
    for at in (1, 5, 127, 128, 129, 256, 299):
        nano.clear()
        expected = nats_by_hand(nano.evaluate(text[:at]), text[at])
        assert cut[3][at - 1] == pytest.approx(expected, abs=2 * spread + 1e-6), f"spread {spread}"
    assert spread < 0.5, "pieces of other sizes give another text"


def test_loss_by_position_is_the_mean_of_a_band(nano, tmp_path):
    stage, probe = Stage(tmp_path, "long_context"), probe_of("long-context-nano")
    table = curve.loss_by_position(nano, probe, 512, 3, stage, FREE)
    assert table["start"].tolist() == [32, 64, 128, 256] and table["high"].isna().all()
    assert (table["texts"] == 3).all() and table["tokens"].tolist() == [96, 192, 384, 768]
    text = [curve.held_out_text(Haystacks(frame_of(nano, probe), probe), k, 512) for k in range(3)]
    by_hand = np.stack([curve.token_losses(nano, tokens) for tokens in text])
    assert table["loss"].iloc[1] == pytest.approx(by_hand[:, 63:127].mean())
    assert (
        "too few texts" in figures.loss_by_position(table).get_title(loc="left") or table["loss"].iloc[-1] < 9
    )


def test_what_the_budget_does_not_hold_is_not_measured(nano, tmp_path):
    stage = Stage(tmp_path, "long_context", budget_minutes=1)
    slow = PrefillSpeed(10.0, 0.0)
    table = curve.loss_by_position(nano, probe_of("long-context-nano"), 512, 3, stage, slow)
    assert table.empty and stage.left_out == ["loss by position: not measured"]
    assert figures.loss_by_position(table) == "No figure of the loss: it was not measured."
