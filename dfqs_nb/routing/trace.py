"""Traces, kept and compared: the chosen experts of every token and layer, and the margins.

Two choices agree when the *sets* of experts are equal; their order does not matter to the model. Layers that
route by hash are not counted: their experts follow from the token alone and cannot vary.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import whole_file

_ROWS = ("tokens", "experts", "margin", "digest", "logits")  # have a row a token
_ARRAYS = (*_ROWS, "layers", "hashed", "logit_ids", "output")
_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
COMPARED = tuple("n_tokens n_layers n_choices n_differ margin_differ logits_equal logit_drift".split())
COMPARED += ("drift_of_equal_experts", "same_output")  # the values of `compare`
NOTHING = np.zeros(0)  # where nothing was kept


@dataclass(frozen=True)
class Trace:
    """The routing of a run over ``n`` tokens, ``L`` layers with routed experts, ``k`` experts a token.

    ``digest`` to ``output`` are empty where they were not kept.
    """

    tokens: np.ndarray  # evaluated, int32 (n,)
    layers: np.ndarray  # block numbers, int16 (L,); none for a dense model
    hashed: np.ndarray  # bool (L,): a table gives the layer's experts by token id
    experts: np.ndarray  # chosen ids, best first, uint16 (n, L, k)
    margin: np.ndarray  # k-th score minus the next, float32 (n, L); NaN if hashed, infinite without a next
    n_experts: int
    conditions: dict[str, Any] = field(repr=False)  # model, settings, and how the tokens were evaluated
    # XXH3-64 of all logits of a token, uint64 (n,): equal only where every bit is
    digest: np.ndarray = field(repr=False, default_factory=NOTHING.copy)
    # sampled vocabulary ids, int32 (s,), and their logits, float32 (n, s)
    logit_ids: np.ndarray = field(repr=False, default_factory=NOTHING.copy)
    logits: np.ndarray = field(repr=False, default_factory=NOTHING.copy)
    # the greedy continuation, int32 (m,), or (sequences, m) with -1 behind the end; its routing is not kept
    output: np.ndarray = field(repr=False, default_factory=NOTHING.copy)

    @property
    def n_tokens(self) -> int:
        """Tokens recorded."""
        return len(self.tokens)

    @property
    def routed(self) -> bool:
        """Whether the model has routed experts; False for a dense model."""
        return len(self.layers) > 0

    def rows(self, chosen: slice | np.ndarray) -> Trace:
        """The trace of some of its tokens, without the greedy continuation."""
        return replace(self, **{name: getattr(self, name)[chosen] for name in _ROWS}, output=NOTHING)

    def part(self, place: int) -> Trace:
        """One sequence of several equally long ones, with its greedy continuation."""
        n, output = self.n_tokens // len(self.output), self.output[place]
        return replace(self.rows(slice(n * place, n * place + n)), output=output[output >= 0])

    def save(self, path: str | Path) -> Path:
        """Write the trace as ``.npz``, whole or not at all, and return the path."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        about = np.frombuffer(json.dumps(self.conditions).encode(), np.uint8)
        with whole_file(path, "wb") as file:
            np.savez_compressed(file, **arrays, n_experts=np.int64(self.n_experts), conditions=about)
        return Path(path)


def load_trace(path: str | Path) -> Trace:
    """Read what ``Trace.save`` wrote; a `DfqsError` if the file is missing or is no trace."""
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _ARRAYS}
            about = json.loads(stored["conditions"].tobytes())
            return Trace(**arrays, n_experts=int(stored["n_experts"]), conditions=about)
    except _DAMAGED as error:
        raise DfqsError(f"not a routing trace ({error})", where=path, hint="record it again") from error


def joined(traces: Sequence[Trace], **conditions: Any) -> Trace:
    """One trace of several sequences, one after another; conditions are the first one's, and those given."""
    names, about = (*_ROWS, "output"), traces[0].conditions | conditions
    parts: dict[str, Any] = {name: np.concatenate([getattr(it, name) for it in traces]) for name in names}
    return replace(traces[0], **parts, conditions=about)


# ---- two traces ----


def differences(a: Trace, b: Trace) -> np.ndarray:
    """Whether the expert sets differ, bool ``(tokens, layers)``; other tokens or routers are an error."""
    if not np.array_equal(a.tokens, b.tokens):
        raise DfqsError("the traces are of different prompts", hint="use the same tokens")
    routers = [(t.layers.tolist(), t.hashed.tolist(), t.experts.shape, t.n_experts) for t in (a, b)]
    if routers[0] != routers[1]:
        raise DfqsError("the traces are of models with different routers", hint="compare like with like")
    return np.asarray((np.sort(a.experts, axis=2) != np.sort(b.experts, axis=2)).any(axis=2))


def compare(a: Trace, b: Trace) -> dict[str, Any]:
    """Two runs over the same tokens, the first being the reference, as the values of `COMPARED`.

    ``n_layers`` and ``n_choices`` (tokens x layers) leave out hash layers, whose choices cannot vary.
    ``margin_differ``: the largest margin of the reference at which a set differs, or NaN. ``logits_equal``:
    share of tokens whose logits are equal bit for bit; ``logit_drift``: largest difference of a kept logit;
    ``drift_of_equal_experts``: the same, of tokens without a set that differs. These are NaN where there is
    nothing to compare. ``same_output``: equal greedy answers; None where both are empty.
    Errors: as `differences`.
    """
    scored, equal, drift, of_equal = ~a.hashed, math.nan, math.nan, math.nan
    routed, answered = differences(a, b)[:, scored], len(a.output) or len(b.output)
    if len(a.digest) and len(b.digest) and np.array_equal(a.logit_ids, b.logit_ids):
        equal = float((a.digest == b.digest).mean())
        moved, same = np.abs(a.logits - b.logits).max(axis=1, initial=0.0), ~routed.any(axis=1)
        drift, of_equal = float(moved.max(initial=0.0)), float(moved[same].max()) if same.any() else math.nan
    return {
        "n_tokens": a.n_tokens,
        "n_layers": int(scored.sum()),
        "n_choices": routed.size,
        "n_differ": int(routed.sum()),
        "margin_differ": float(a.margin[:, scored][routed].max()) if routed.any() else math.nan,
        "logits_equal": equal,
        "logit_drift": drift,
        "drift_of_equal_experts": of_equal,
        "same_output": bool(np.array_equal(a.output, b.output)) if answered else None,
    }
