"""How far a quantized model's predictions are from the original's: perplexity, KL divergence, top token.

The protocol is that of ``llama-perplexity --kl-divergence`` (llama.cpp, tools/perplexity/perplexity.cpp):
whole chunks of one context each, of which the second half is scored. Tokens of one chunk stick together, so
intervals come from a bootstrap over chunks; the standard error over tokens stands beside them, because it is
what the tool prints. One difference: the tool keeps the original's predictions in 16 bits, cut off 16 nats
below the best token, so on text that surprises the model its ratio of perplexities is too large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.context.prompts import load_prompts
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import whole_file
from dfqs_nb.ladder.imatrix import chunks, feed_chunk
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.routing import RecordedModel
from dfqs_nb.stats import mean_interval

if TYPE_CHECKING:
    import pandas as pd


class TextError(DfqsError):
    """A text to measure on is missing, or too short."""


# ---- texts ----


@dataclass(frozen=True)
class Text:
    """A text as documents: ``(text,)``, or ``(question, answer)`` for a chat. ``name`` says which."""

    name: str
    documents: tuple[tuple[str, ...], ...]

    def tokens(self, model: Model) -> list[int]:
        """Token ids, each chat in the model's own template (else as two lines), each document ended."""
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


def load_text(source: str | Path, part: str = "held_out") -> Text:
    """A part of a frozen set, as ``"calibration-nano"``, or the path of a plain text file.

    Args:
        part: ``"calibration"`` or ``"held_out"``; of a file, all of it is taken.

    Raises:
        TextError: the file cannot be read. PromptError: there is no such set.
    """
    path = Path(source)
    if path.suffix or path.is_file():
        try:
            return Text(path.name, ((path.read_text(encoding="utf-8"),),))
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(
                f"cannot be read as text ({error})", where=path, hint="give a UTF-8 text file"
            ) from error
    prompts = load_prompts(str(source))
    name = f"{prompts.name} ({part.replace('_', ' ')}, {prompts.sha256[:12]})"
    return Text(name, tuple(tuple(one) for one in prompts[part]))


# ---- one model ----


def scored_from(chunk_tokens: int) -> int:
    """The first token of a chunk whose successor is scored: half of the context comes before it."""
    return chunk_tokens // 2


def log_probs(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the softmax along the last axis, float32.

    >>> np.exp(log_probs(np.zeros((1, 4), np.float32))).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(shifted, dtype=np.float64).sum(axis=-1, keepdims=True))
    return (shifted - total).astype(np.float32)


def predict(
    model: Model | RecordedModel,
    tokens: Sequence[int],
    chunk_tokens: int,
    n_chunks: int,
    use: Callable[[int, np.ndarray, np.ndarray], Any],
    tick: Callable[[], Any] = lambda: None,
) -> int:
    """Evaluate chunk after chunk and hand on what was predicted where it is scored.

    Args:
        use: called with the chunk's number, the log-probabilities float32 ``(n, n_vocab)``, and the tokens
            that came, ``(n,)``; n = chunk_tokens - 1 - chunk_tokens // 2.
        tick: called after each chunk.

    Returns:
        The number of chunks.

    Raises:
        TextError: the text does not fill two chunks.
        DecodeError: as ``Model.decode``.
    """
    pieces = chunks(tokens, chunk_tokens, n_chunks)
    if len(pieces) < 2:
        raise TextError(
            f"{len(tokens):,} tokens do not fill two chunks of {chunk_tokens:,}",
            hint="take a longer text, or smaller chunks",
        )
    first = scored_from(chunk_tokens)
    for number, piece in enumerate(pieces):
        logits = feed_chunk(model, piece)
        use(number, log_probs(logits[first:-1]), np.asarray(piece[first + 1 :]))
        tick()
    return len(pieces)


# ---- against the original ----


@dataclass(frozen=True)
class Tokens:
    """What two models said of each scored token, arrays ``(chunks, n)``.

    Attributes:
        nll: negative log-likelihood of the token that came, in nats; ``nll_base``: the original's.
        kld: KL divergence of the prediction from the original's, in nats.
        same_top: whether the most likely token is the same.
    """

    nll: np.ndarray
    nll_base: np.ndarray
    kld: np.ndarray
    same_top: np.ndarray

    def save(self, path: str | Path) -> Path:
        """Write as ``.npz``, whole or not at all."""
        with whole_file(path, "wb") as file:
            np.savez_compressed(file, **vars(self))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Tokens:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{name: stored[name] for name in cls.__dataclass_fields__})


def compare_chunk(base: np.ndarray, other: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, ...]:
    """The four arrays of ``Tokens`` for one chunk, from log-probabilities float32 ``(n, n_vocab)``.

    >>> same = log_probs(np.array([[0.0, 2.0]], np.float32))
    >>> _, _, kld, same_top = compare_chunk(same, same, np.array([1]))
    >>> kld.tolist(), same_top.tolist()
    ([0.0], [True])
    """
    rows = np.arange(len(targets))
    kld = (np.exp(base, dtype=np.float64) * (base - other)).sum(axis=1)
    return (
        -other[rows, targets].astype(float),
        -base[rows, targets].astype(float),
        np.maximum(kld, 0.0),
        base.argmax(axis=1) == other.argmax(axis=1),
    )


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval (bootstrap over chunks; NaN where it is unknown) and the standard error
    over tokens.
    """

    value: float
    low: float
    high: float
    standard_error: float


@dataclass(frozen=True)
class Divergence:
    """Summary of ``Tokens``: ``n`` scored tokens in ``n_chunks`` chunks.

    ``log_ratio``: ln(perplexity / the original's perplexity).
    """

    n: int
    n_chunks: int
    perplexity: Estimate
    log_ratio: Estimate
    kld: Estimate
    same_top: Estimate

    def row(self) -> dict[str, Any]:
        """Flat, for a table: each estimate as ``name``, ``name_low``, ``name_high``, ``name_se``."""
        flat: dict[str, Any] = {"n_tokens": self.n, "n_chunks": self.n_chunks}
        for name in ("perplexity", "log_ratio", "kld", "same_top"):
            one = getattr(self, name)
            flat |= {
                name: one.value,
                f"{name}_low": one.low,
                f"{name}_high": one.high,
                f"{name}_se": one.standard_error,
            }
        return flat


def summarize(tokens: Tokens) -> Divergence:
    """Means with intervals; see ``Divergence``."""
    nll = _mean(tokens.nll)
    perplexity = Estimate(exp(nll.value), exp(nll.low), exp(nll.high), exp(nll.value) * nll.standard_error)
    return Divergence(
        tokens.nll.size,
        len(tokens.nll),
        perplexity,
        _mean(tokens.nll - tokens.nll_base),
        _mean(tokens.kld),
        _mean(tokens.same_top.astype(float)),
    )


def _mean(values: np.ndarray) -> Estimate:
    low, high = mean_interval(values.mean(axis=1))
    error = float(values.std()) / sqrt(max(values.size - 1, 1))
    return Estimate(float(values.mean()), low, high, error)


def token_frame(tokens: Tokens) -> pd.DataFrame:
    """One row a scored token: ``chunk``, ``place``, and the four values."""
    import pandas as pd

    chunk, place = np.indices(tokens.nll.shape)
    return pd.DataFrame(
        {
            "chunk": chunk.ravel(),
            "place": place.ravel(),
            **{name: values.ravel() for name, values in vars(tokens).items()},
        }
    )
