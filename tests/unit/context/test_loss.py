"""Loss and routing by position, against other ways to compute the same."""

from __future__ import annotations

import numpy as np
import pytest
from test_memory import NANO, smollm2

from dfqs_nb.context import figures, loss
from dfqs_nb.context.cost import PrefillSpeed
from dfqs_nb.context.haystacks import Haystacks, frame_of, probe_of
from dfqs_nb.context.loss import read_held_out, usage_by_position
from dfqs_nb.core.stage import Stage
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing import RecordedModel, Trace

FREE = PrefillSpeed(0.0, 0.0)
SETTINGS = OpenSettings(n_ctx=640, n_threads=1)


@pytest.fixture(scope="module")
def nano():
    with open_model(NANO, SETTINGS, trial=False) as model:
        yield RecordedModel(model, None)


def text_of(recorded: RecordedModel, n_tokens: int = 300) -> list[int]:
    probe = probe_of("long-context-nano")
    return loss.held_out_text(Haystacks(frame_of(recorded.model, probe), probe), 0, n_tokens)


def nats_by_hand(logits: np.ndarray, target: int) -> float:
    """Minus the logarithm of the softmax, in float64."""
    logits = logits.astype(float)
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


def test_loss_is_that_of_the_logits_of_the_same_pieces(nano):
    """The same pieces give the same bits, so only arithmetic could differ; pieces end at 128 and 256."""
    text = text_of(nano)
    nano.clear()
    rows = [row.copy() for at in range(0, 300, 128) for row in nano.feed(text[at : at + 128])]
    by_hand = [nats_by_hand(rows[at], text[at + 1]) for at in range(299)]
    np.testing.assert_allclose(loss.token_losses(nano, text), by_hand, rtol=1e-9)


def test_loss_equals_logits_taken_one_prefix_at_a_time(nano, monkeypatch):
    """A prefix is computed in another order of sums, so it differs as much as other pieces do.

    How much that is depends on the processor. It is measured here, by cutting the text into pieces of
    several sizes. A target off by one token would differ by whole nats.
    """
    text = text_of(nano)
    cut = []
    for size in (1, 7, 64, 128, 300):
        monkeypatch.setattr(loss, "CHUNK_TOKENS", size)
        cut.append(loss.token_losses(nano, text))
    spread = float(np.ptp(np.stack(cut), axis=0).max())
    for at in (1, 5, 127, 128, 129, 256, 299):
        nano.model.clear()
        expected = nats_by_hand(nano.model.evaluate(text[:at]), text[at])
        assert cut[3][at - 1] == pytest.approx(expected, abs=2 * spread + 1e-6), f"spread {spread}"
    assert spread < 0.5, "pieces of other sizes give another text"


def test_loss_of_the_reference_model_meets_the_entropy_of_its_source(nano, tmp_path):
    """It was trained on this source: within its training length it cannot be far above, nor well below."""
    stage = Stage(tmp_path, "long_context")
    held_out = read_held_out(nano.model, probe_of("long-context-nano"), 512, 3, stage, FREE)
    table = held_out.loss_by_position()
    middle = table[table["end"] == 256].iloc[0]
    assert middle["loss"] == pytest.approx(middle["source"], rel=0.1)
    assert table["start"].tolist() == [32, 64, 128, 256] and table["high"].isna().all()
    routing = held_out.routing_by_position()
    assert routing["overlap"].between(0.3, 1).all() and (routing["choices"] > 0).all()


def test_routing_by_position_of_a_router_that_changes_half_way():
    """Two experts early, two others late: usage of the late band does not overlap the first at all."""
    draw, n = np.random.default_rng(0), 128
    late = (np.arange(n) >= 64)[:, None, None]
    traces = [
        Trace(
            np.zeros(n, np.int32),
            np.array([0, 1], np.int16),
            np.array([True, False]),
            (draw.integers(0, 2, (n, 2, 1)) + 2 * late).astype(np.uint8),
            np.ones((n, 2, 1), np.float16),
            np.full((n, 2), 0.5, np.float32),
            4,
            {},
        )
        for _ in range(4)
    ]
    table = usage_by_position(traces, [(0, 64), (64, 128)])
    assert table["overlap"].iloc[1] == 0 and table["overlap"].iloc[0] > 0.85
    assert (table["chance"] > 0.85).all() and (table["margin_median"] == 0.5).all()
    for margin, n_axes in ((0.5, 2), (np.inf, 1)):  # infinite: all experts are used
        ax = figures.routing_by_position(table.assign(start=[32, 64], margin_median=margin))
        assert len(ax.figure.axes) == n_axes


def test_a_dense_model_has_losses_and_no_routing_by_position(tmp_path):
    with open_model(smollm2(), OpenSettings(n_ctx=256, n_threads=1), trial=False) as model:
        stage = Stage(tmp_path, "long_context")
    held_out = read_held_out(model, probe_of("standard"), 96, 2, stage, FREE)
    assert (held_out.loss_by_position()["loss"] > 0).all() and held_out.routing_by_position().empty
    figures.routing_by_position(held_out.routing_by_position())
