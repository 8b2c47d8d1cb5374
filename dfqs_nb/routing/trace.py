"""Traces: for every token and layer the chosen experts, their weights, and the router's margin."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.files import whole_file
from dfqs_nb.routing.recorder import RoutingError

if TYPE_CHECKING:
    import pandas as pd

_ARRAYS = ("tokens", "layers", "hashed", "experts", "weights", "margin", "output")
_KEPT = ("digest", "logit_ids", "logits", "scores")  # not in every trace
_ROWS = ("tokens", "experts", "weights", "margin", "digest", "logits")  # have a row a token


def nothing() -> np.ndarray:
    """What a trace has where nothing was kept."""
    return np.zeros(0)


@dataclass(frozen=True)
class Trace:
    """The routing of a run over ``n`` tokens, ``L`` layers with routed experts, ``k`` experts a token.

    ``digest`` to ``scores`` are empty where they were not kept.
    """

    tokens: np.ndarray  # evaluated, int32 (n,)
    layers: np.ndarray  # block numbers, int16 (L,); none for a dense model
    hashed: np.ndarray  # bool (L,): a table gives the layer's experts by token id
    experts: np.ndarray  # chosen ids, best first, uint8 (uint16 above 256 experts) (n, L, k)
    weights: np.ndarray  # what multiplies the experts' outputs, float16 (n, L, k)
    margin: np.ndarray  # k-th score minus the next, float32 (n, L); NaN if hashed, infinite without a next
    n_experts: int
    conditions: dict[str, Any] = field(repr=False)  # model, settings, and how the tokens were evaluated
    # XXH3-64 of all logits of a token, uint64 (n,): equal only where every bit is
    digest: np.ndarray = field(repr=False, default_factory=nothing)
    logit_ids: np.ndarray = field(repr=False, default_factory=nothing)  # sampled vocabulary ids, int32 (s,)
    logits: np.ndarray = field(repr=False, default_factory=nothing)  # their logits, float32 (n, s)
    # the greedy continuation, int32 (m,), or (sequences, m) with -1 behind the end; its routing is not kept
    output: np.ndarray = field(repr=False, default_factory=nothing)
    scores: np.ndarray = field(repr=False, default_factory=nothing)  # of all experts, float32 (n, L, experts)

    @property
    def n_tokens(self) -> int:
        """Tokens recorded."""
        return len(self.tokens)

    @property
    def routed(self) -> bool:
        """Whether the model has routed experts; False for a dense model."""
        return len(self.layers) > 0

    def rows(self, chosen: slice | np.ndarray) -> Trace:
        """The trace of some of its tokens, without the greedy continuation and the scores."""
        parts = {name: getattr(self, name)[chosen] for name in _ROWS}
        return replace(self, **parts, output=nothing(), scores=nothing())

    def part(self, place: int) -> Trace:
        """One sequence of several equally long ones, with its greedy continuation."""
        n, output = self.n_tokens // len(self.output), self.output[place]
        return replace(self.rows(slice(n * place, n * place + n)), output=output[output >= 0])

    def require_routed(self) -> None:
        """Refuse a dense model's trace (`ModelError`)."""
        if not self.routed:
            hint = "only the determinism of its logits can be measured"
            raise ModelError("no routed experts here: a dense model", hint=hint)

    def save(self, path: str | Path) -> Path:
        """Write the trace as ``.npz``, whole or not at all, and return the path."""
        arrays = {name: getattr(self, name) for name in (*_ARRAYS, *_KEPT)}
        arrays["n_experts"] = np.int64(self.n_experts)
        arrays["conditions"] = np.frombuffer(json.dumps(self.conditions).encode(), np.uint8)
        with whole_file(path, "wb") as file:
            np.savez_compressed(file, **arrays)
        return Path(path)


def load_trace(path: str | Path) -> Trace:
    """Read what ``Trace.save`` wrote; a `RoutingError` if the file is missing or is no trace."""
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as stored:
            return Trace(
                **{name: stored[name] for name in (*_ARRAYS, *_KEPT) if name in {*_ARRAYS, *stored}},
                n_experts=int(stored["n_experts"]),
                conditions=json.loads(stored["conditions"].tobytes()),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RoutingError(f"not a routing trace ({error})", where=path, hint="record it again") from error


def joined(traces: Sequence[Trace], **conditions: Any) -> Trace:
    """One trace of several sequences, one after another; conditions are the first one's, and those given."""
    first = traces[0]
    parts: dict[str, Any] = {
        name: np.concatenate([getattr(trace, name) for trace in traces]) for name in _ROWS
    }
    if first.output.ndim == 2:
        parts["output"] = np.concatenate([trace.output for trace in traces])
    return replace(first, **parts, scores=nothing(), conditions=first.conditions | conditions)


def trace_frames(trace: Trace) -> Iterable[pd.DataFrame]:
    """The trace as tidy rows, one a chosen expert, by sequence; docs/routing.md explains the columns."""
    import pandas as pd

    about, (_, n_layers, k), start = trace.conditions, trace.experts.shape, 0
    lengths = about.get("lengths", [trace.n_tokens])
    names, domains = about.get("sequences", ["text"]), about.get("domains", [""])
    for name, domain, n in zip(names, domains, lengths, strict=True):
        rows, start = slice(start, start + n), start + n
        columns: dict[str, Any] = {
            "load": about.get("load", "alone"),
            "domain": domain,
            "sequence": name,
            "position": np.repeat(np.arange(n), n_layers * k),
            "token": np.repeat(trace.tokens[rows], n_layers * k),
            "layer": np.tile(np.repeat(trace.layers, k), n),
            "rank": np.tile(np.arange(k), n * n_layers),
            "expert": trace.experts[rows].ravel(),
            "weight": trace.weights[rows].ravel(),
            "margin": np.repeat(trace.margin[rows].ravel(), k),
        }
        yield pd.DataFrame(columns)


def require_csv(path: str | Path) -> Path:
    """The path, or a `RoutingError` where it is of another format or in no folder."""
    path = Path(path).expanduser()
    if not path.name.endswith((".csv", ".csv.gz")):
        hint = f"--export {quoted(path.with_name((path.stem or 'trace') + '.csv.gz'))}"
        raise RoutingError("traces are exported as .csv or .csv.gz", where=path, hint=hint)
    if not path.parent.is_dir():
        raise RoutingError(
            "there is no such folder", where=path.parent, hint=f"mkdir -p {quoted(path.parent)}"
        )
    return path


def export(traces: Iterable[Trace], path: str | Path) -> Path:
    """Write traces as one CSV, which ``pandas.read_csv(path)`` reads; a dense model's is a `ModelError`."""
    path = require_csv(path)
    compression: Any = "gzip" if path.name.endswith(".gz") else None
    with whole_file(path, "wb") as file:
        header = True
        for trace in traces:
            trace.require_routed()
            for frame in trace_frames(trace):
                frame.to_csv(file, compression=compression, header=header, index=False, float_format="%.6g")
                header = False
    return path
