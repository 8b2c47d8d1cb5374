"""Loss by position: how well each token of a held-out text is foreseen, by how deep in the context it lies.

No ``logits_all``: logits are asked for in chunks, so memory does not grow with the context.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from math import log
from typing import TYPE_CHECKING

import numpy as np

from dfqs_nb.context.haystacks import Frame, Haystacks, frame_of, sentences
from dfqs_nb.context.prompts import PromptSet
from dfqs_nb.llama.model import DecodeError, Model

if TYPE_CHECKING:
    import pandas as pd
from dfqs_nb.stats import mean_interval  # MOVED

CHUNK_TOKENS = 128


def token_losses(model: Model, tokens: Sequence[int]) -> np.ndarray:
    """Negative log-likelihood in nats of each token after the first, given all before it, as
    float64 ``(n - 1,)``.

    Raises:
        DecodeError: the context does not hold them, or llama.cpp fails.
    """
    model.clear()
    losses, carried = [], None
    for start in range(0, len(tokens), CHUNK_TOKENS):
        logits = _chunk_logits(model, tokens[start : start + CHUNK_TOKENS])
        before = logits[:-1] if carried is None else np.concatenate([carried, logits[:-1]])
        targets = tokens[start + (carried is None) : start + len(logits)]
        losses.append(_nats(before, targets))
        carried = logits[-1:]
    model.clear()
    return np.concatenate(losses)


def _chunk_logits(model: Model, tokens: Sequence[int]) -> np.ndarray:
    """Evaluate a chunk; the logits after each of its tokens, float32 ``(n, n_vocab)``, copied."""
    llama = model._open()
    n_past = llama.n_tokens
    if n_past + len(tokens) > model.settings.n_ctx:
        raise DecodeError(
            "the text exceeds the context", where=model.path, hint="open it with a larger n_ctx"
        )
    llama._batch.set_batch(batch=list(tokens), n_past=n_past, logits_all=True)
    try:
        llama._ctx.decode(llama._batch)
    except RuntimeError as error:
        raise DecodeError(str(error), where=model.path, hint="lower n_ubatch if memory is short") from error
    llama.n_tokens = n_past + len(tokens)
    return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(len(tokens), model.n_vocab)).copy()


def _nats(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Cross-entropy of each row's target.

    >>> _nats(np.zeros((1, 8), np.float32), [3]).round(4).tolist()  # log(8)
    [2.0794]
    """
    peak = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp((logits - peak).astype(np.float64)).sum(axis=1)) + peak[:, 0]
    return total - logits[np.arange(len(targets)), list(targets)]


def held_out_text(haystacks: Haystacks, number: int, n_tokens: int) -> list[int]:
    """Filler of the prompt set without needles, drawn apart from every haystack, behind the chat
    template's head.
    """
    frame, draw = haystacks.frame, haystacks.random("held out", number)
    tokens = list(frame.head)
    for text in sentences(haystacks.prompts, draw):
        tokens += frame.text((" " if len(tokens) > len(frame.head) else "") + text)
        if len(tokens) >= n_tokens:
            return tokens[:n_tokens]
    raise AssertionError("filler does not end")


def source_entropy(frame: Frame, prompts: PromptSet, n_sentences: int = 2000) -> float:
    """Nats a token of the filler's source: no model that knows only the source can be below it on average.

    Sentences are drawn evenly, and words evenly into their slots, so a sentence carries log(sentences) +
    sum of log(words of each slot).
    """
    sizes = {slot: len(words) for slot, words in prompts["slots"].items()}
    templates = prompts["sentences"]
    words = [log(sizes[slot]) for text in templates for slot in re.findall(r"{(\w+)}", text)]
    drawn = islice(sentences(prompts, Haystacks(frame, prompts, ()).random("entropy")), n_sentences)
    tokens = [len(frame.text(" " + text)) for text in drawn]
    return (log(len(templates)) + sum(words) / len(templates)) / (sum(tokens) / len(tokens))


def loss_by_position(model: Model, prompts: PromptSet, n_tokens: int, n_texts: int = 8) -> pd.DataFrame:
    """Mean loss on held-out texts in bands of position that double.

    Columns ``start``, ``end`` (tokens), ``texts``, ``tokens``, ``loss`` (nats a token), ``low``, ``high``:
    95 % interval from a bootstrap over texts, and ``source``: the entropy of the text's source.
    """
    import pandas as pd

    frame = frame_of(model, prompts)
    haystacks = Haystacks(frame, prompts, ())
    texts = [held_out_text(haystacks, number, n_tokens) for number in range(n_texts)]
    losses = np.stack([token_losses(model, text) for text in texts])
    entropy = source_entropy(frame, prompts)
    rows = []
    for start, end in bands(max(32, len(frame.head)), n_tokens):
        part = losses[:, start - 1 : end - 1]
        low, high = mean_interval(part.mean(1))
        rows.append(
            {
                "start": start,
                "end": end,
                "texts": n_texts,
                "tokens": part.size,
                "loss": part.mean(),
                "low": low,
                "high": high,
                "source": entropy,
            }
        )
    return pd.DataFrame(rows)


def bands(first: int, n_tokens: int) -> list[tuple[int, int]]:
    """Bands of position that double in width; tokens before the first (the chat template) are left out.

    >>> bands(32, 200)
    [(32, 64), (64, 128), (128, 200)]
    """
    edges = [first]
    while edges[-1] * 2 < n_tokens:
        edges.append(edges[-1] * 2)
    return list(zip(edges, [*edges[1:], n_tokens], strict=True))
