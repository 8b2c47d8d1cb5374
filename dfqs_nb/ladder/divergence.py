"""How far a quantized model's predictions are from the original's: perplexity, KL divergence, top token.

The protocol is that of ``llama-perplexity --kl-divergence`` (llama.cpp, tools/perplexity/perplexity.cpp):
whole chunks of one context each, of which the second half is scored. Intervals come from a bootstrap over
chunks, because their tokens are correlated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
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
Windows = list[tuple[int, int]]
TAIL = 0.99  # of the tokens lie below the tail that stands beside the mean KL divergence
LAST = 4  # number of the last of the `bands`
WINDOW = 32  # positions that are scored of each band before the last
STEP = 128  # tokens whose logits are held at once


class TextError(DfqsError):
    """A text to measure on is missing, or too short."""


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


class Documents(PromptSet):
    """A set of texts to calibrate on and to measure on; a document is a text, or a prompt and its answer."""

    calibration: tuple[tuple[str, ...], ...]
    held_out: tuple[tuple[str, ...], ...]


def load_text(source: str | Path, part: str = "held_out") -> Text:
    """The part ``"calibration"`` or ``"held_out"`` of a frozen set, or a whole text file by its path.

    A `TextError`: the file cannot be read. A `PromptError`: there is no such set.
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
    return Text(name, getattr(prompts, part))


def chunks(tokens: Sequence[int], size: int, limit: int = 0, *, least: int = 1) -> list[list[int]]:
    """Whole pieces of ``size`` tokens, at most ``limit`` (0: all); a `TextError` for fewer than ``least``.

    >>> chunks([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4]]
    """
    pieces = [list(tokens[at : at + size]) for at in range(0, len(tokens) - size + 1, size)]
    if len(pieces) < least:
        what = f"{len(tokens):,} tokens fill fewer than {least} chunks of {size:,}"
        raise TextError(what, hint="take a longer text, or smaller chunks")
    return pieces[: limit or None]


def bands(n_tokens: int) -> Windows:
    """Stretches of a text that double in width; the last is what llama-perplexity scores of a chunk.

    >>> bands(1024)
    [(0, 64), (64, 128), (128, 256), (256, 512), (512, 1023)]
    """
    edges = [0, *(n_tokens >> shift for shift in (4, 3, 2, 1)), n_tokens - 1]
    return list(pairwise(edges))


def stratified(n_tokens: int, seed: int) -> Windows:
    """The whole last of the `bands`, and up to 32 positions at a random place of each other."""
    draw, width, (*others, last) = np.random.default_rng(seed), min(WINDOW, n_tokens >> 4), bands(n_tokens)
    starts = [int(draw.integers(start, end - width + 1)) for start, end in others]
    return [*((start, start + width) for start in starts), last]


def feed(model: Model | RecordedModel, piece: Sequence[int], step: int = 0) -> Iterator[tuple[int, Array]]:
    """Evaluate a chunk from a cleared context, its first token replaced by BOS where the vocabulary adds it.

    Yields where a step (of at most ``n_batch`` tokens) begins, and the logits after each of its tokens: a
    view float32 ``(step, n_vocab)`` that the next step overwrites.
    """
    opened = model.model if isinstance(model, RecordedModel) else model
    bos, n_batch = opened.bos, opened.settings.n_batch
    piece, step = [bos, *piece[1:]] if bos >= 0 else list(piece), min(step or n_batch, n_batch)
    opened.clear()  # what is recorded goes on
    for at in range(0, len(piece), step):
        part = piece[at : at + step]
        yield at, model.feed(part) if isinstance(model, RecordedModel) else next(model.logits(part))


def log_probs(logits: Array) -> Array:
    """Natural logarithms of the softmax along the last axis, summed in float64, as float32.

    >>> np.exp(log_probs(np.zeros((1, 4), np.float32))).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    from scipy.special import log_softmax

    rows: Array = log_softmax(logits.astype(np.float64), axis=-1).astype(np.float32)
    return rows


def predictions(
    model: Model | RecordedModel, piece: Sequence[int], windows: Windows, step: int = 0
) -> Iterator[tuple[Array, Array]]:
    """Evaluate a chunk; its predictions in the windows, float32 ``(n, n_vocab)``, and the tokens that came.

    A window is ``(start, end)`` of predicting positions. Only one step's logits are held, so their memory
    does not grow with the length of the chunk.
    """
    for at, logits in feed(model, piece, step or STEP):
        for start, end in windows:
            first, last = max(start, at), min(end, at + len(logits))
            if first < last:
                yield log_probs(logits[first - at : last - at]), np.asarray(piece[first + 1 : last + 1])


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
    model: Model | RecordedModel, pieces: Sequence[Sequence[int]], reference: Path, *, is_source: bool
) -> pd.DataFrame:
    """The predictions in the `stratified` windows of each chunk, beside the source's in ``reference``.

    One row a token: ``chunk``, ``band`` (number of the `bands`), and the columns of `compared`.
    ``is_source``: write that file, float32 ``(chunks, n, n_vocab)``, in place of reading it.
    """
    n_vocab = (model.model if isinstance(model, RecordedModel) else model).n_vocab
    windows = [stratified(len(piece), seed) for seed, piece in enumerate(pieces)]
    band = np.repeat(np.arange(LAST + 1), [end - start for start, end in windows[0]])
    with whole_path(reference) if is_source else nullcontext(reference) as path:
        if is_source:  # it need not fit in memory
            shape = len(pieces), len(band), n_vocab
            base = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        else:
            base = np.load(path, mmap_mode="r")
        parts = []
        for chunk, (kept, piece, spans) in enumerate(zip(base, pieces, windows, strict=True)):
            n_done = 0
            for predicted, targets in predictions(model, piece, spans):
                place = slice(n_done, n_done := n_done + len(targets))
                if is_source:
                    kept[place] = predicted
                columns = compared(kept[place], predicted, targets)
                parts.append(pd.DataFrame({"chunk": chunk, "band": band[place], **columns}))
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


def summary(tokens: pd.DataFrame) -> dict[str, Any]:
    """Estimates of ``perplexity``, ``kld``, ``same_top`` in the last band, counts, and the ``kld_tail``."""
    tokens = tokens[tokens["band"] == LAST]
    means = tokens.groupby("chunk")[["nll", "kld", "same_top"]].mean()
    return {
        "n_tokens": len(tokens),
        "n_chunks": len(means),
        **{name: exp(value) for name, value in estimate("perplexity", means["nll"]).items()},
        **estimate("kld", means["kld"]),
        **estimate("same_top", means["same_top"]),
        "kld_tail": float(tokens["kld"].quantile(TAIL)),
    }
