"""Traces: for every token and layer the experts that were chosen, their weights, and the router's margin."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.files import whole_file
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings, default_context_params
from dfqs_nb.routing.recorder import Recorder, RoutingError

LOGIT_SAMPLE = 1024  # logits kept of each token; all of them for a small vocabulary
_ARRAYS = ("tokens", "layers", "hashed", "experts", "weights", "margin", "output")
_LOGITS = ("digest", "best", "ids", "values")


@dataclass(frozen=True)
class Logits:
    """What is kept of each token's logits: enough to see any change, and how large it is.

    Attributes:
        digest: XXH3-64 of all logits of a token, uint64 ``(n,)``: equal only where every bit is.
        best: the token with the largest logit, int32 ``(n,)``.
        ids: the sampled vocabulary ids, int32 ``(s,)``.
        values: their logits, float32 ``(n, s)``.
    """

    digest: np.ndarray
    best: np.ndarray
    ids: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Trace:
    """The routing of a run over ``n`` tokens, ``L`` layers with routed experts, ``k`` experts a token.

    Attributes:
        tokens: the tokens evaluated, int32 ``(n,)``.
        layers: block numbers, int16 ``(L,)``; none for a dense model.
        hashed: whether a layer's experts come from a table by token id, bool ``(L,)``.
        experts: chosen expert ids, best first, uint8 (uint16 above 256 experts) ``(n, L, k)``.
        weights: their weights as they multiply the experts' outputs, float16 ``(n, L, k)``.
        margin: selection score of the k-th expert minus that of the next, float32 ``(n, L)``; NaN in hash
            layers, infinite where no other expert could be chosen.
        n_experts: routed experts a layer.
        conditions: the model, the settings, and how the tokens were evaluated.
        logits: what was kept of them, if anything.
        output: the greedy continuation, int32 ``(m,)``; its routing is not recorded.
    """

    tokens: np.ndarray
    layers: np.ndarray
    hashed: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    margin: np.ndarray
    n_experts: int
    conditions: dict[str, Any] = field(repr=False)
    logits: Logits | None = field(repr=False, default=None)
    output: np.ndarray = field(repr=False, default_factory=lambda: np.zeros(0, np.int32))

    @property
    def n_tokens(self) -> int:
        """Tokens recorded."""
        return len(self.tokens)

    @property
    def routed(self) -> bool:
        """Whether the model has routed experts; False for a dense model."""
        return len(self.layers) > 0

    @property
    def nbytes(self) -> int:
        """Bytes of the routing arrays in memory, without the logits."""
        return sum(a.nbytes for a in (self.tokens, self.experts, self.weights, self.margin))

    def require_routed(self, where: str | Path | None = None) -> None:
        """Refuse a dense model's trace.

        Raises:
            ModelError: no layer has routed experts.
        """
        if not self.routed:
            raise ModelError(
                "no routed experts here: a dense model",
                where=where,
                hint="only the determinism of its logits can be measured",
            )

    def save(self, path: str | Path) -> Path:
        """Write the trace as ``.npz``, whole or not at all, and return the path."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays["n_experts"] = np.int64(self.n_experts)
        arrays["conditions"] = np.frombuffer(json.dumps(self.conditions).encode(), np.uint8)
        if self.logits is not None:
            arrays |= {f"logits_{name}": value for name, value in vars(self.logits).items()}
        with whole_file(path, "wb") as file:
            np.savez_compressed(file, **arrays)
        return Path(path)


def load_trace(path: str | Path) -> Trace:
    """Read what ``Trace.save`` wrote.

    Raises:
        RoutingError: the file is missing or not such a file.
    """
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as stored:
            return Trace(
                **{name: stored[name] for name in _ARRAYS},
                n_experts=int(stored["n_experts"]),
                conditions=json.loads(stored["conditions"].tobytes()),
                logits=Logits(*(stored[f"logits_{n}"] for n in _LOGITS)) if "logits_ids" in stored else None,
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RoutingError(f"not a routing trace ({error})", where=path, hint="record it again") from error


# ---- a model that is recorded ----


@dataclass
class RecordedModel:
    """An open model with a recorder, or without one (to compare speeds)."""

    model: Model
    recorder: Recorder | None

    def clear(self) -> None:
        """Empty the context, and forget what was recorded."""
        self.model.clear()
        if self.recorder is not None:
            self.recorder.reset()

    def feed(self, tokens: Sequence[int], *, listen: bool = True) -> np.ndarray:
        """Evaluate at most ``n_batch`` tokens; the logits after each, float32 ``(n, n_vocab)``, a view.

        Logits are asked for every token, because llama.cpp routes only those tokens through its last layer.

        Raises:
            ContextFullError, DecodeError: they do not fit, or llama.cpp fails.
            RoutingError: a layer's routing was not seen.
        """
        recorder = self.recorder if listen else None
        if recorder is not None:
            recorder.begin(len(tokens))
        rows = next(self.model.logits(tokens))
        if recorder is not None:
            recorder.end()
        return rows

    def trace(self, tokens: Sequence[int], *, logits: Logits | None = None, **conditions: Any) -> Trace:
        """The trace of these tokens: everything that was recorded since `clear`.

        Args:
            logits: what was kept of them.
            conditions: beside those of the open model.

        Raises:
            RoutingError: the model was opened without a recorder.
        """
        if self.recorder is None:
            raise RoutingError("this model was opened without a recorder", hint="open it with listen=True")
        header = self.model.header
        identity = {
            "name": header.get("general.name", self.model.path.stem),
            "architecture": header.architecture,
            "first_file_bytes": header.file_size,
            "header_sha256": hashlib.sha256(header.raw).hexdigest(),
        }
        return Trace(
            tokens=np.asarray(tokens, np.int32),
            **self.recorder.arrays(),
            conditions={"model": identity, **self.model.conditions(), **conditions},
            logits=logits,
        )


@contextmanager
def open_recorded(
    path: str | Path, settings: OpenSettings | None = None, *, trial: bool = True, listen: bool = True
) -> Iterator[RecordedModel]:
    """Open a model with a recorder on its evaluation callback; arguments and errors as ``open_model``.

    Args:
        listen: False leaves the recorder out.
    """
    recorder = Recorder() if listen else None
    callback = {} if recorder is None else {"cb_eval": recorder.callback}
    with default_context_params(**callback):
        model = open_model(path, settings, trial=trial)
    model.keep_lock = True  # a callback that need not take Python's lock costs half as much
    with model:
        yield RecordedModel(model, recorder)


# ---- a run ----


@dataclass(frozen=True)
class Schedule:
    """How a run evaluates its tokens.

    The first ``prefill`` of them (all by default) go in batches of ``n_batch``, then the others one by one,
    or in batches again if ``decode`` is False. ``restore``: save the state after the first part, clear the
    context, put the state back, go on.
    """

    prefill: int | None = None
    decode: bool = True
    restore: bool = False

    def parts(self, n_tokens: int, n_batch: int) -> tuple[list[range], list[range]]:
        """Index ranges of the calls before and after the break.

        >>> Schedule(prefill=5).parts(7, 4)
        ([range(0, 4), range(4, 5)], [range(5, 6), range(6, 7)])
        """
        cut = n_tokens if self.prefill is None else min(self.prefill, n_tokens)
        step = 1 if self.decode else n_batch
        return _ranges(0, cut, n_batch), _ranges(cut, n_tokens, step)


def _ranges(start: int, stop: int, step: int) -> list[range]:
    return [range(at, min(at + step, stop)) for at in range(start, stop, step)]


def record(
    recorded: RecordedModel,
    tokens: Sequence[int],
    schedule: Schedule | None = None,
    *,
    logits: bool = True,
    n_output: int = 0,
) -> Trace:
    """Evaluate these tokens from a cleared context and return what the routers chose.

    Args:
        logits: keep each token's digest and a sample of its logits too.
        n_output: then continue greedily for up to this many tokens.

    Raises:
        ContextFullError, DecodeError: as ``RecordedModel.feed``.
        RoutingError: a layer's routing was not seen.
    """
    schedule, model = schedule or Schedule(), recorded.model
    recorded.clear()
    sample = np.unique(np.linspace(0, model.n_vocab - 1, min(LOGIT_SAMPLE, model.n_vocab)).astype(np.int32))
    kept, last = [], -1
    for number, calls in enumerate(schedule.parts(len(tokens), model.settings.n_batch)):
        if number == 1 and schedule.restore:
            model.restore(model.save())
        for call in calls:
            rows = recorded.feed(tokens[call.start : call.stop])
            last = int(rows[-1].argmax())
            if logits:
                kept.append(_sampled(rows, sample))
    output = _continue(recorded, last, n_output)
    joined = [np.concatenate(parts) for parts in zip(*kept, strict=True)]
    trace = recorded.trace(
        tokens,
        logits=Logits(joined[0], joined[1], sample, joined[2]) if kept else None,
        **vars(schedule),
        n_output=n_output,
    )
    return replace(trace, output=output)


def _sampled(logits: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import xxhash

    digests = np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in logits], np.uint64)
    return digests, logits.argmax(axis=1).astype(np.int32), logits[:, sample]


def _continue(recorded: RecordedModel, token: int, n_tokens: int) -> np.ndarray:
    """The greedy continuation that begins with ``token``; nothing is recorded."""
    model, output = recorded.model, list[int]()
    while len(output) < min(n_tokens, model.settings.n_ctx - model.n_past) and not model.ends(token):
        output.append(token)
        token = int(recorded.feed([token], listen=False)[0].argmax())
    return np.array(output, np.int32)
