"""Held-out texts: next-token loss and routing by how deep a token lies in the context."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dfqs_nb.context.haystacks import Frame, Haystacks, Probe, frame_of, sentences
from dfqs_nb.context.routing import usage_by_position
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing import RecordedModel, Trace, open_recorded
from dfqs_nb.stats import mean_interval

if TYPE_CHECKING:
    import pandas as pd

CHUNK_TOKENS = 128  # evaluated at once, so that logits take little memory
FIRST_BAND = 32  # tokens before it belong to the chat template


@dataclass(frozen=True)
class HeldOut:
    """Texts of a probe's filler, without keys, each read once.

    Attributes:
        losses: nats of each token after the first, float64 ``(texts, n - 1)``.
        traces: the experts chosen, a trace a text; without layers for a dense model.
        edges: bands of position, ``(start, end)`` in tokens, that double in width.
        source: nats a token of the source that the texts are drawn from.
    """

    losses: np.ndarray = field(repr=False)
    traces: tuple[Trace, ...] = field(repr=False)
    edges: tuple[tuple[int, int], ...]
    source: float

    @property
    def routed(self) -> bool:
        """Whether the model has routed experts."""
        return self.traces[0].routed

    def loss_by_position(self) -> pd.DataFrame:
        """Mean loss in bands of position.

        Columns ``start``, ``end`` (tokens), ``texts``, ``tokens``, ``loss`` (nats a token), ``low``,
        ``high``: 95 % interval from a bootstrap over texts, and ``source``.
        """
        import pandas as pd

        rows = []
        for start, end in self.edges:
            part = self.losses[:, start - 1 : end - 1]
            limits = mean_interval(part.mean(1))
            rows.append((start, end, len(part), part.size, part.mean(), *limits, self.source))
        names = ["start", "end", "texts", "tokens", "loss", "low", "high", "source"]
        return pd.DataFrame(rows, columns=names)

    def routing_by_position(self) -> pd.DataFrame:
        """Expert usage and router margins by position; see `usage_by_position`.

        Raises:
            ModelError: a dense model.
        """
        self.traces[0].require_routed()
        return usage_by_position(self.traces, self.edges)


def read_held_out(
    path: str | Path, settings: OpenSettings, probe: Probe, n_tokens: int, n_texts: int = 6
) -> HeldOut:
    """Evaluate held-out texts, with a recorder on the routers.

    Raises:
        DecodeError: a text does not fit the context.
    """
    with open_recorded(path, settings, trial=False) as recorded:
        haystacks = Haystacks(frame_of(recorded.model, probe), probe)
        losses, traces = [], []
        for number in range(n_texts):
            tokens = held_out_text(haystacks, number, n_tokens)
            losses.append(token_losses(recorded, tokens))
            traces.append(recorded.trace(tokens))
        source = source_entropy(haystacks.frame, probe)
    edges = bands(max(FIRST_BAND, len(haystacks.frame.head)), n_tokens)
    return HeldOut(np.stack(losses), tuple(traces), tuple(edges), source)


def token_losses(recorded: RecordedModel, tokens: Sequence[int]) -> np.ndarray:
    """Negative log-likelihood in nats of each token after the first, given all before it.

    Returns:
        float64 ``(n - 1,)``.

    Raises:
        DecodeError: the context does not hold them, or llama.cpp fails.
    """
    recorded.clear()
    step = min(CHUNK_TOKENS, recorded.model.settings.n_batch)
    losses = [
        nats(recorded.feed(tokens[at : at + step]), tokens[at + 1 : at + step + 1])
        for at in range(0, len(tokens), step)
    ]
    return np.concatenate(losses)


def nats(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Cross-entropy of each target under its row of logits; a last row without a target is left out.

    >>> nats(np.zeros((2, 8), np.float32), [3]).round(4).tolist()  # log(8)
    [2.0794]
    """
    from scipy.special import log_softmax

    rows = log_softmax(logits[: len(targets)].astype(np.float64), axis=1)
    return np.asarray(-rows[np.arange(len(targets)), list(targets)])


def held_out_text(haystacks: Haystacks, number: int, n_tokens: int) -> list[int]:
    """Filler of the probe, drawn apart from every haystack, behind the chat template's head."""
    frame, draw = haystacks.frame, haystacks.generator("held out", number)
    tokens = list(frame.head)
    for text in sentences(haystacks.probe, draw):
        tokens += frame.text((" " if len(tokens) > len(frame.head) else "") + text)
        if len(tokens) >= n_tokens:
            break
    return tokens[:n_tokens]


def source_entropy(frame: Frame, probe: Probe, n_sentences: int = 2000) -> float:
    """Nats a token of the filler's source: no model that knows only the source can be below it on average.

    Sentences are drawn evenly, and words evenly into their slots, so a sentence carries log(sentences) +
    sum of log(words of each slot).
    """
    sizes = {slot: len(words) for slot, words in probe.slots.items()}
    words = [log(sizes[slot]) for text in probe.sentences for slot in re.findall(r"{(\w+)}", text)]
    drawn = islice(sentences(probe, Haystacks(frame, probe).generator("entropy")), n_sentences)
    tokens = [len(frame.text(" " + text)) for text in drawn]
    n = len(probe.sentences)
    return (log(n) + sum(words) / n) / (sum(tokens) / len(tokens))


def bands(first: int, n_tokens: int) -> list[tuple[int, int]]:
    """Bands of position that double in width; tokens before the first (the chat template) are left out.

    >>> bands(32, 200)
    [(32, 64), (64, 128), (128, 200)]
    """
    edges = [first]
    while edges[-1] * 2 < n_tokens:
        edges.append(edges[-1] * 2)
    return list(zip(edges, [*edges[1:], n_tokens], strict=True))
