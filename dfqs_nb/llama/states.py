"""Save the state of a context and put it back, so that several questions follow one evaluated text.

Architectures such as ``deepseek4`` refuse to forget a part of their cache; every architecture can save and
restore the whole. Whether that changes what is computed is not assumed but measured: ``check_reuse``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dfqs_nb.llama.model import DecodeError, Model

TOLERANCE = 1e-2  # of a logit; the logits of a vocabulary spread over about 2


@dataclass(frozen=True)
class SavedState:
    """One sequence's cache with everything else it needs, and how many tokens it holds."""

    n_tokens: int
    data: Any = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy, which lies in this process's memory."""
        return len(self.data)


def save_state(model: Model) -> SavedState:
    """Copy the context's state.

    Raises:
        DecodeError: llama.cpp does not give it.
    """
    import llama_cpp.llama_cpp as api

    context = model._open().ctx
    size = api.llama_state_seq_get_size(context, 0)
    data = (ctypes.c_uint8 * size)()
    if size == 0 or api.llama_state_seq_get_data(context, data, size, 0) != size:
        raise DecodeError("llama.cpp does not give its state", where=model.path, hint="use reuse=False")
    return SavedState(model.n_past, data)


def restore_state(model: Model, state: SavedState) -> None:
    """Put a saved state back; the tokens evaluated since are forgotten.

    Raises:
        DecodeError: llama.cpp does not take it.
    """
    import llama_cpp.llama_cpp as api

    model.clear()
    llama = model._open()
    if api.llama_state_seq_set_data(llama.ctx, state.data, len(state.data), 0) != len(state.data):
        raise DecodeError("llama.cpp does not take its state back", where=model.path, hint="use reuse=False")
    llama.n_tokens = state.n_tokens


@dataclass(frozen=True)
class ReuseCheck:
    """Logits after a question asked from a saved state, against those of the same tokens evaluated afresh.

    ``largest_difference`` is over all logits and questions; ``evaluated_tokens`` what the check itself cost.
    """

    allowed: bool
    bit_identical: bool
    same_choice: bool
    largest_difference: float
    tolerance: float
    evaluated_tokens: int

    @property
    def sentence(self) -> str:
        """The verdict for people."""
        how = "bit-identical" if self.bit_identical else f"largest difference {self.largest_difference:.1e}"
        end = (
            "one haystack serves all its questions" if self.allowed else "every question is evaluated afresh"
        )
        return f"logits from a saved state against fresh ones: {how} (tolerance {self.tolerance:g}); {end}"


def check_reuse(
    model: Model,
    parts: Sequence[Sequence[int]],
    questions: Sequence[Sequence[int]],
    tolerance: float = TOLERANCE,
) -> ReuseCheck:
    """Whether growing a text in ``parts`` and asking from its saved state equals fresh evaluation.

    Allowed when every logit agrees within ``tolerance`` and the most likely token is the same.
    """
    model.clear()
    for part in parts:
        model.decode(part)
    state, reused = save_state(model), []
    for question in questions:
        restore_state(model, state)
        reused.append(model.evaluate(question))
    text = [token for part in parts for token in part]
    fresh, n_tokens = [], len(text)
    for question in questions:
        model.clear()
        fresh.append(model.evaluate([*text, *question]))
        n_tokens += len(text) + 2 * len(question)
    largest = max(float(np.abs(a - b).max()) for a, b in zip(reused, fresh, strict=True))
    same = all(np.argmax(a) == np.argmax(b) for a, b in zip(reused, fresh, strict=True))
    model.clear()
    return ReuseCheck(same and largest <= tolerance, largest == 0, same, largest, tolerance, n_tokens)
