"""Held-out texts: next-token loss and routing by how deep a token lies in the context."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations, islice
from math import log, nan
from typing import TYPE_CHECKING

import numpy as np

from dfqs_nb.context.cost import PrefillSpeed
from dfqs_nb.context.haystacks import Frame, Haystacks, Probe, frame_of, sentences
from dfqs_nb.core.budget import fit
from dfqs_nb.core.stage import Stage
from dfqs_nb.gguf.facts import tokenizer
from dfqs_nb.llama.model import Model
from dfqs_nb.routing import RecordedModel, Trace, expert_counts, open_recorded
from dfqs_nb.stats import mean_interval

if TYPE_CHECKING:
    import pandas as pd

CHUNK_TOKENS = 128  # evaluated at once, so that logits take little memory
LOGIT_SECONDS = 3e-8  # that a logit takes to become a probability, measured on one core
FIRST_BAND = 32  # tokens before it belong to the chat template
N_SENTENCES = 2000  # that the source's entropy is estimated from


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

    def loss_by_position(self) -> pd.DataFrame:
        """Mean loss by bands of position, ``start`` to ``end``, with ``texts``, ``tokens`` and ``source``.

        ``loss`` is in nats; ``low`` to ``high``: 95 % interval from a bootstrap over texts.
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
        """Expert usage and router margins by position; see `usage_by_position`. Empty for a dense model."""
        return usage_by_position([trace for trace in self.traces if trace.routed], self.edges)


def read_held_out(
    model: Model, probe: Probe, longest: int, n_texts: int, stage: Stage, speed: PrefillSpeed
) -> HeldOut:
    """Read held-out texts of ``longest`` tokens, with a recorder, in half of the time that a stage has left.

    Cut in this order: 4 texts, shorter texts down to 128 tokens, 2 texts, none. No text is begun that is not
    expected to end in time, and a single text counts as none. The stage notes what is left out.

    Args:
        model: closed, so that its weights lie in memory once; it is loaded anew.
        speed: what a text costs.
    """
    seconds, n_vocab = stage.seconds_left / 2, tokenizer(model.header)["vocabulary (tokens)"]
    cuts = [{"texts": 4}, *({"tokens": longest >> k} for k in range(1, 20) if longest >> k >= 128)]

    def cost(cut: dict[str, int]) -> float:
        each = speed.seconds(cut["tokens"]) + cut["tokens"] * n_vocab * LOGIT_SECONDS
        return model.load_seconds + cut["texts"] * each if cut["texts"] else 0.0

    names, whole = {"texts": "held-out texts", "tokens": "tokens of a held-out text"}, {"texts": n_texts}
    plan = fit(whole | {"tokens": longest}, [*cuts, {"texts": 2}, {"texts": 0}], cost, seconds, names)
    n, n_tokens = plan.values["texts"], plan.values["tokens"]
    began, slowest, losses, traces = time.monotonic(), 0.0, [], []
    with ExitStack() as stack:
        for number in range(n):
            if not number:
                recorded = stack.enter_context(open_recorded(model.path, model.settings, trial=False))
                haystacks = Haystacks(frame_of(recorded.model, probe), probe)
            started = time.monotonic()
            if number and started - began + slowest > seconds:
                break
            tokens = held_out_text(haystacks, number, n_tokens)
            losses.append(token_losses(recorded, tokens))
            traces.append(recorded.trace(tokens))
            slowest = max(slowest, time.monotonic() - started)
        if len(losses) < 2:
            stage.leave_out(["loss and routing by position: not measured"])
            return HeldOut(np.empty((0, 0)), (), (), nan)
        source = source_entropy(haystacks.frame, probe)
    stage.leave_out(plan.left_out)
    edges = bands(max(FIRST_BAND, len(haystacks.frame.head)), n_tokens)
    return HeldOut(np.stack(losses), tuple(traces), tuple(edges), source)


def token_losses(recorded: RecordedModel, tokens: Sequence[int]) -> np.ndarray:
    """Negative log-likelihood in nats of each token after the first, given all before it: ``(n - 1,)``."""
    recorded.clear()
    step = min(CHUNK_TOKENS, recorded.model.settings.n_batch)
    starts = range(0, len(tokens), step)
    return np.concatenate(
        [nats(recorded.feed(tokens[at : at + step]), tokens[at + 1 : at + step + 1]) for at in starts]
    )


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


def source_entropy(frame: Frame, probe: Probe) -> float:
    """Nats a token of the filler's source: no model that knows only the source can be below it on average.

    Sentences are drawn evenly, and words evenly into their slots, so a sentence carries log(sentences) +
    sum of log(words of each slot).
    """
    sizes, n = {slot: len(words) for slot, words in probe.slots.items()}, len(probe.sentences)
    words = [log(sizes[slot]) for text in probe.sentences for slot in re.findall(r"{(\w+)}", text)]
    drawn = islice(sentences(probe, Haystacks(frame, probe).generator("entropy")), N_SENTENCES)
    return (log(n) + sum(words) / n) / (sum(len(frame.text(" " + text)) for text in drawn) / N_SENTENCES)


def bands(first: int, n_tokens: int) -> list[tuple[int, int]]:
    """Bands of position that double in width; tokens before the first (the chat template) are left out.

    >>> bands(32, 200)
    [(32, 64), (64, 128), (128, 200)]
    """
    edges = [first]
    while edges[-1] * 2 < n_tokens:
        edges.append(edges[-1] * 2)
    return list(zip(edges, [*edges[1:], n_tokens], strict=True))


# ---- routing ----


def usage_by_position(traces: Sequence[Trace], edges: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """How expert usage and router margins change along texts of one kind.

    The overlap of two usages is the sum over experts of the smaller share (1: the same, 0: disjoint),
    averaged over the layers that route by score. A band of one half of the texts is compared with the first
    band of the other half. The texts differ, so even a router blind to position does not reach 1: ``chance``
    is the overlap with the same band of the other half. Every band counts as many tokens as the first, spread
    evenly over it, because few choices overlap less than many.

    Columns ``start``, ``end``, ``choices``, ``overlap`` (mean over all ways to halve the texts), ``low``,
    ``high`` (the least and the greatest of them), ``chance``, ``margin_p5`` and ``margin_median``.
    """
    import pandas as pd

    rows = []
    if traces:
        scored, texts = ~traces[0].hashed, set(range(len(traces)))
        usage = np.stack([_usage(trace, scored, edges) for trace in traces])
        chosen = map(set, combinations(sorted(texts), len(texts) // 2))
        halves = [(usage[sorted(half)].sum(0), usage[sorted(texts - half)].sum(0)) for half in chosen]
    for band, (start, end) in enumerate(edges if traces else ()):
        margins = np.concatenate([trace.margin[start:end, scored].ravel() for trace in traces])
        overlaps = [_overlap(a[band], b[0]) for a, b in halves]
        chance = np.mean([_overlap(a[band], b[band]) for a, b in halves])
        limits, tail = (min(overlaps), max(overlaps)), np.quantile(margins, (0.05, 0.5))
        rows.append((start, end, len(margins), np.mean(overlaps), *limits, chance, *tail))
    names = "start end choices overlap low high chance margin_p5 margin_median"
    return pd.DataFrame(rows, columns=names.split())


def _usage(trace: Trace, scored: np.ndarray, edges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Choices of each expert: ``(bands, layers, experts)``."""
    width = edges[0][1] - edges[0][0]
    picked = [np.linspace(start, end - 1, width).round().astype(int) for start, end in edges]
    return np.stack([expert_counts(trace.experts[tokens][:, scored], trace.n_experts) for tokens in picked])


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over layers of the sum of smaller shares.

    >>> _overlap(np.array([[1.0, 1.0]]), np.array([[2.0, 0.0]]))
    0.5
    """
    share_a, share_b = (counts / counts.sum(axis=1, keepdims=True) for counts in (a, b))
    return float(np.minimum(share_a, share_b).sum(axis=1).mean())
