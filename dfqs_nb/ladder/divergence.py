"""How far a quantized model's predictions are from the original's: perplexity, KL divergence, top token.

The protocol is that of ``llama-perplexity --kl-divergence`` (llama.cpp, tools/perplexity/perplexity.cpp):
whole chunks of one context each, of which the second half is scored. Tokens of one chunk are correlated, so
intervals come from a bootstrap over chunks. The standard error over tokens stands beside them, because the
tool prints it. One difference: the tool keeps the original's predictions in 16 bits, cut off 16 nats below
the best token, so on text that surprises the model its ratio of perplexities is too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import whole_file
from dfqs_nb.core.prompts import PromptSet, load_prompts
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.routing import RecordedModel
from dfqs_nb.stats import mean_interval

Array = NDArray[Any]
TAIL = 0.99  # of the tokens lie below the tail that stands beside the mean KL divergence


class TextError(DfqsError):
    """A text to measure on is missing, or too short."""


# ---- texts, and chunks of their tokens ----


@dataclass(frozen=True)
class Text:
    """A text of this name, as documents: ``(text,)``, or ``(question, answer)`` for a chat."""

    name: str
    documents: tuple[tuple[str, ...], ...]

    def tokens(self, model: Model) -> list[int]:
        """Token ids: each chat in the model's own template (or as two lines), each document ended."""
        end = model.llama.token_eos()
        chats = bool(model.header.get("tokenizer.chat_template"))
        ids: list[int] = []
        for document in self.documents:
            if len(document) == 2 and chats:
                ids += [*chat_prompt(model, document[0]), *model.tokenize(document[1], special=False)]
            else:
                ids += model.with_bos(model.tokenize("\n".join(document), special=False))
            ids += [end] if end >= 0 and len(self.documents) > 1 else []
        return ids


class Documents(PromptSet):
    """A set of texts to calibrate on and to measure on; a document is a text, or a prompt and its answer."""

    calibration: tuple[tuple[str, ...], ...]
    held_out: tuple[tuple[str, ...], ...]


def load_text(source: str | Path, part: str = "held_out") -> Text:
    """A part of a frozen set, as ``"calibration-nano"``, or the path of a plain text file.

    Args:
        part: ``"calibration"`` or ``"held_out"``; a file is taken whole.

    Raises:
        TextError: the file cannot be read. PromptError: there is no such set.
    """
    path = Path(source)
    if path.suffix or path.is_file():
        try:
            return Text(path.name, ((path.read_text(encoding="utf-8"),),))
        except (OSError, UnicodeDecodeError) as error:
            what = f"cannot be read as text ({error})"
            raise TextError(what, where=path, hint="give a UTF-8 file") from error
    prompts = load_prompts(str(source), Documents)
    name = f"{prompts.name} ({part.replace('_', ' ')}, {prompts.sha256[:12]})"
    return Text(name, tuple(tuple(document) for document in getattr(prompts, part)))


def chunks(tokens: Sequence[int], size: int, limit: int = 0, *, least: int = 1) -> list[list[int]]:
    """Whole pieces of ``size`` tokens, in order, at most ``limit`` of them (0: all); the rest is not used.

    Raises:
        TextError: there are fewer than ``least`` pieces.

    >>> chunks([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4]]
    """
    pieces = [list(tokens[at : at + size]) for at in range(0, len(tokens) - size + 1, size)]
    if len(pieces) < least:
        what = f"{len(tokens):,} tokens fill fewer than {least} chunks of {size:,}"
        raise TextError(what, hint="take a longer text, or smaller chunks")
    return pieces[: limit or None]


def feed_chunk(model: Model | RecordedModel, piece: Sequence[int]) -> Array:
    """Evaluate a chunk from a cleared context, its first token replaced by BOS where the vocabulary adds it.

    Returns:
        A copy of the logits after each token, float32 ``(n, n_vocab)``.
    """
    recorded = model if isinstance(model, RecordedModel) else RecordedModel(model, None)
    bos, step = recorded.model.bos, recorded.model.settings.n_batch
    piece = [bos, *piece[1:]] if bos >= 0 else list(piece)
    recorded.model.clear()
    return np.concatenate([recorded.feed(piece[at : at + step]).copy() for at in range(0, len(piece), step)])


def log_probs(logits: Array) -> Array:
    """Natural logarithms of the softmax along the last axis, summed in float64, as float32.

    >>> np.exp(log_probs(np.zeros((1, 4), np.float32))).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    from scipy.special import log_softmax

    rows: Array = log_softmax(logits.astype(np.float64), axis=-1).astype(np.float32)
    return rows


def predict(model: Model | RecordedModel, piece: Sequence[int]) -> tuple[Array, Array]:
    """Evaluate a chunk; the predictions in its second half, and the tokens that came.

    Returns:
        Log-probabilities float32 ``(n, n_vocab)``, and token ids ``(n,)``; n = size - 1 - size // 2.
    """
    first = len(piece) // 2
    return log_probs(feed_chunk(model, piece)[first:-1]), np.asarray(piece[first + 1 :])


# ---- against the original ----


@dataclass(frozen=True)
class Tokens:
    """Two models' predictions of each scored token, arrays ``(chunks, n)``.

    Attributes:
        nll: negative log-likelihood of the token that came, in nats; ``nll_base``: the original's.
        kld: KL divergence of the prediction from the original's, in nats.
        same_top: whether the most likely token is the same.
    """

    nll: Array
    nll_base: Array
    kld: Array
    same_top: Array

    def save(self, path: str | Path) -> None:
        """Write as ``.npz``, whole or not at all."""
        with whole_file(path, "wb") as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def load(cls, path: str | Path) -> Tokens:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{name: stored[name] for name in cls.__dataclass_fields__})


def compare_chunk(base: Array, other: Array, targets: Array) -> tuple[Array, Array, Array, Array]:
    """The four arrays of `Tokens` for one chunk, from log-probabilities float32 ``(n, n_vocab)``.

    >>> same = log_probs(np.array([[0.0, 2.0]], np.float32))
    >>> _, _, kld, same_top = compare_chunk(same, same, np.array([1]))
    >>> kld.tolist(), same_top.tolist()
    ([0.0], [True])
    """
    from scipy.special import rel_entr

    rows = np.arange(len(targets))
    kld = rel_entr(np.exp(base, dtype=np.float64), np.exp(other, dtype=np.float64)).sum(axis=1)
    return (
        -other[rows, targets].astype(float),
        -base[rows, targets].astype(float),
        np.maximum(kld, 0.0),
        base.argmax(axis=1) == other.argmax(axis=1),
    )


def estimate(name: str, values: Array) -> dict[str, float]:
    """The mean of values ``(chunks, n)`` under this name, with its uncertainty.

    ``<name>_low`` and ``<name>_high``: the 95 % interval (bootstrap over chunks; NaN for fewer than 6);
    ``<name>_se``: the standard error over tokens.

    >>> estimate("kld", np.full((2, 3), 0.5))
    {'kld': 0.5, 'kld_low': nan, 'kld_high': nan, 'kld_se': 0.0}
    """
    low, high = mean_interval(values.mean(axis=1))
    error = float(values.std()) / sqrt(max(values.size - 1, 1))
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high, f"{name}_se": error}


def summary(tokens: Tokens) -> dict[str, Any]:
    """Estimates of the scored tokens, flat, for a table.

    Keys ``n_tokens``, ``n_chunks``; `estimate` of ``perplexity``, ``log_ratio`` (ln of the perplexity over
    the original's), ``kld`` and ``same_top``; and ``kld_tail``, which the KL of 99 % of the tokens is below.
    """
    perplexity = {
        name: value if name.endswith("se") else exp(value)
        for name, value in estimate("perplexity", tokens.nll).items()
    }
    perplexity["perplexity_se"] *= perplexity["perplexity"]
    return {
        "n_tokens": tokens.nll.size,
        "n_chunks": len(tokens.nll),
        **perplexity,
        **estimate("log_ratio", tokens.nll - tokens.nll_base),
        **estimate("kld", tokens.kld),
        **estimate("same_top", tokens.same_top.astype(float)),
        "kld_tail": float(np.quantile(tokens.kld, TAIL)),
    }
