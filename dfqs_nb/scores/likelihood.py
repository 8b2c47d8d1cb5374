"""Multiple choice by log-likelihood: the likeliest choice is the answer, and no text is generated.

The protocol is that of lm-evaluation-harness (``multiple_choice``, Gao et al. 2024): the context and each
choice are tokenized together, and a choice's score is the sum of its tokens' log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from os.path import commonprefix
from typing import Any

import numpy as np
from scipy.special import log_softmax

from dfqs_nb.llama.model import Model, SavedState
from dfqs_nb.scores.request import Request


def chooser(model: Model, requests: Sequence[Request]) -> Callable[[Request], dict[str, Any]]:
    """A function that scores each choice of one of these requests.

    It returns ``log_likelihoods`` (nats) and ``greedy`` (whether greedy decoding gives it) of each choice,
    and their ``tokens``. What all contexts begin with, and what the choices of a question share, is evaluated
    once and then restored, so four choices cost little more than one.
    """

    @cache
    def start() -> SavedState | None:
        shared = commonprefix([encode(model, request)[0] for request in requests])
        if not shared:
            return None
        model.clear()
        model.decode(shared)
        return model.save()

    return lambda request: _scored(model, start(), request)


def encode(model: Model, request: Request) -> tuple[list[int], list[list[int]]]:
    """Token ids of the context, and of each choice behind it.

    Blanks at the context's end belong to the choices, and both are tokenized together, because tokenizers
    join a blank with the word behind it. A model without a template has one behind the frame's "Answer:".
    """
    choices = request.choices
    if request.chat:
        texts = choices if model.has_template else [f" {choice.lstrip(' ')}" for choice in choices]
        return request.tokens(model), [model.tokenize(text, special=False) for text in texts]
    whole = request.text.rstrip(), *(request.text + choice for choice in choices)
    context, *together = (model.with_bos(model.tokenize(text, special=False)) for text in whole)
    return context, [tokens[len(context) :] or tokens[-1:] for tokens in together]


def _scored(model: Model, start: SavedState | None, request: Request) -> dict[str, Any]:
    """See `chooser`; ``start``: a state that holds the beginning of the context."""
    context, choices = encode(model, request)
    if start and len(context) > start.n_tokens:
        model.restore(start)
        context = context[start.n_tokens :]
    else:  # where the whole context is shared, its last token is evaluated again, for its logits
        model.clear()
    first = log_softmax(model.evaluate(context).astype(float))[None]
    values, greedy, state = list[float](), list[bool](), model.save()
    for tokens in choices:
        rows = first
        if len(tokens) > 1:
            model.restore(state)
            logits = np.concatenate([chunk.copy() for chunk in model.logits(tokens[:-1])])
            rows = np.concatenate([first, log_softmax(logits.astype(float), axis=-1)])
        values.append(float(rows[np.arange(len(tokens)), tokens].sum()))
        greedy.append(bool((rows.argmax(axis=1) == tokens).all()))
    return {"log_likelihoods": values, "greedy": greedy, "tokens": sum(map(len, choices))}
