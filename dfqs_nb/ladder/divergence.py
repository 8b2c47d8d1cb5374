"""How far a quantized model's predictions are from the original's: perplexity, KL divergence, top token.

The protocol is that of ``llama-perplexity --kl-divergence`` (llama.cpp, tools/perplexity/perplexity.cpp):
whole chunks of one context each, of which the second half is scored. Intervals come from a bootstrap over
chunks, because their tokens are correlated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import whole_path
from dfqs_nb.core.prompts import PromptSet, load_prompts
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.routing import RecordedModel
from dfqs_nb.stats import mean_interval

Array = NDArray[Any]
TAIL = 0.99  # of the tokens lie below the tail that stands beside the mean KL divergence
STEP = 128  # tokens whose logits are held at once


@dataclass(frozen=True)
class Text:
    """A text of this name, as documents: ``(text,)``, or ``(question, answer)`` for a chat."""

    name: str
    documents: tuple[tuple[str, ...], ...]

    def tokens(self, model: Model) -> list[int]:
        """Token ids: each chat in the model's own template (or as two lines), each document ended."""
        end, ids = model.llama.token_eos(), list[int]()
        for document in self.documents:
            if len(document) == 2 and model.has_template:
                ids += [*chat_prompt(model, document[0]), *model.tokenize(document[1], special=False)]
            else:
                ids += model.with_bos(model.tokenize("\n".join(document), special=False))
            ids += [end] if end >= 0 and len(self.documents) > 1 else []
        return ids

    def chunks(self, model: Model, size: int, limit: int = 0, *, least: int = 1) -> list[list[int]]:
        """Whole pieces of ``size`` tokens, at most ``limit`` (0: all); BOS replaces the first token of each.

        A `DfqsError`: there are fewer than ``least``.
        """
        tokens, first = self.tokens(model), [model.bos] if model.bos >= 0 else []
        starts = range(0, len(tokens) - size + 1, size)
        if len(starts) < least:
            what = f"{len(tokens):,} tokens of {self.name} fill fewer than {least} chunks of {size:,}"
            raise DfqsError(what, hint="take a longer text, or smaller chunks")
        return [[*first, *tokens[at + len(first) : at + size]] for at in starts[: limit or None]]


class Documents(PromptSet):
    """A set of texts to calibrate on and to measure on; a document is a text, or a prompt and its answer."""

    calibration: tuple[tuple[str, ...], ...]
    held_out: tuple[tuple[str, ...], ...]


def load_text(source: str | Path, part: str = "held_out") -> Text:
    """The part ``"calibration"`` or ``"held_out"`` of a frozen set, or a whole text file by its path.

    A `DfqsError`: the file cannot be read, or there is no such set.
    """
    path = Path(source)
    if path.suffix or path.is_file():
        try:
            return Text(path.name, ((path.read_text(encoding="utf-8"),),))
        except (OSError, UnicodeDecodeError) as error:
            what = f"cannot be read as text ({error})"
            raise DfqsError(what, where=path, hint="give a UTF-8 file") from error
    prompts = load_prompts(str(source), Documents)
    return Text(f"{prompts.name} ({part.replace('_', ' ')}, {prompts.sha256[:12]})", getattr(prompts, part))


def log_probs(logits: Array) -> Array:
    """Natural logarithms of the softmax along the last axis, summed in float64, as float32.

    >>> np.exp(log_probs(np.zeros((1, 4), np.float32))).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    from scipy.special import log_softmax

    return np.asarray(log_softmax(logits.astype(np.float64), axis=-1), np.float32)


def predictions(recorded: RecordedModel, piece: Sequence[int]) -> Iterator[tuple[Array, Array]]:
    """Evaluate a chunk; its predictions in the second half, float32 ``(n, n_vocab)``, and what came.

    Only the logits of `STEP` tokens are held, so their memory does not grow with the chunk.
    """
    recorded.model.clear()  # what is recorded goes on
    half, last = len(piece) // 2, len(piece) - 1
    for at in range(0, len(piece), STEP):
        logits = recorded.feed(piece[at : at + STEP])
        first, end = max(half, at), min(last, at + STEP)
        if first < end:
            yield log_probs(logits[first - at : end - at]), np.asarray(piece[first + 1 : end + 1])


def compared(base: Array, other: Array, targets: Array) -> dict[str, Array]:
    """Two models' log-probabilities, float32 ``(n, n_vocab)``, token by token.

    ``nll`` (nats): of the token that came. ``kld`` (nats): divergence from ``base``. ``same_top``: whether
    the likeliest token is the same.

    >>> same = log_probs(np.array([[0.0, 2.0]], np.float32))
    >>> [(name, values.tolist()) for name, values in compared(same, same, np.array([1])).items()][1:]
    [('kld', [0.0]), ('same_top', [True])]
    """
    from scipy.special import rel_entr

    nll = -other[np.arange(len(targets)), targets].astype(float)
    kld = rel_entr(np.exp(base, dtype=np.float64), np.exp(other, dtype=np.float64)).sum(axis=1)
    return {"nll": nll, "kld": np.maximum(kld, 0.0), "same_top": base.argmax(axis=1) == other.argmax(axis=1)}


def beside_source(
    recorded: RecordedModel, pieces: Sequence[Sequence[int]], reference: Path, *, is_source: bool
) -> pd.DataFrame:
    """The predictions in the second half of each chunk, beside the source's in the file ``reference``.

    One row a token: ``chunk``, and the columns of `compared`. ``is_source``: write that file, float32
    ``(chunks, n, n_vocab)``, in place of reading it; it need not fit in memory.
    """
    size, parts = len(pieces[0]), list[pd.DataFrame]()
    with whole_path(reference) if is_source else nullcontext(reference) as path:
        shape = len(pieces), size - 1 - size // 2, recorded.model.n_vocab
        base = np.lib.format.open_memmap(path, "w+" if is_source else "r", np.float32, shape)
        for chunk, (kept, piece) in enumerate(zip(base, pieces, strict=True)):
            n_done = 0
            for predicted, targets in predictions(recorded, piece):
                place = slice(n_done, n_done := n_done + len(targets))
                if is_source:
                    kept[place] = predicted
                parts.append(pd.DataFrame({"chunk": chunk, **compared(kept[place], predicted, targets)}))
        del base, kept  # flushes them
    return pd.concat(parts, ignore_index=True)


def estimate(name: str, values: Any) -> dict[str, float]:
    """The mean of values, one a chunk, with its 95 % interval.

    >>> estimate("kld", [0.5, 0.5])
    {'kld': 0.5, 'kld_low': nan, 'kld_high': nan}
    """
    values = np.asarray(values, float)
    low, high = mean_interval(values)
    return {name: float(values.mean()) if values.size else low, f"{name}_low": low, f"{name}_high": high}


def summary(tokens: pd.DataFrame, source: pd.DataFrame) -> dict[str, Any]:
    """Estimates of ``kld`` and ``same_top``, counts, ``kld_tail``, ``perplexity`` and ``perplexity_ratio``.

    The ratio is to the perplexity of ``source``, its tokens of the same chunks. Paired by chunk, its interval
    leaves out how much the chunks differ. ``llama-perplexity`` clips the source 16 nats below its likeliest.
    """
    means = tokens.groupby("chunk")[["nll", "kld", "same_top"]].mean()
    changes = means["nll"] - source.groupby("chunk")["nll"].mean()
    row = {"n_tokens": len(tokens), "n_chunks": len(means), "perplexity": exp(means["nll"].mean())}
    row |= {name: exp(value) for name, value in estimate("perplexity_ratio", changes).items()}
    row |= estimate("kld", means["kld"]) | estimate("same_top", means["same_top"])
    return row | {"kld_tail": float(tokens["kld"].quantile(TAIL))}
