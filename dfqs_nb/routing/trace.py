"""Record which experts a mixture-of-experts model chose: for every token and layer the expert ids, their
weights, and the router's margin.

llama.cpp asks a callback (``cb_eval``) about every node of its graph. The recorder says yes to one node a
layer, ``ffn_moe_topk``, where the graph then stops: the chosen ids are computed, and nothing that follows has
overwritten the scores they were chosen by. Names and order of the nodes: ``build_moe_ffn`` in llama.cpp's
src/llama-graph.cpp, which all its common mixture-of-experts architectures go through. Stopping there changes
how the graph is cut, so compare recorded runs with recorded runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.files import whole_file
from dfqs_nb.llama.graph import NAME_OFFSET, Tensor, ggml_function  # MOVED
from dfqs_nb.llama.model import ContextFullError, DecodeError, Model, open_model
from dfqs_nb.llama.settings import OpenSettings, default_context_params

FLUSH_BYTES = 4 << 20  # of raw scores, before they are reduced to margins and weights
LOGIT_SAMPLE = 1024  # logits kept of each token; all of them for a small vocabulary
SMALLEST_SUM = 6.103515625e-5  # build_moe_ffn clamps the sum of weights here
_PREFIX_BYTES = 13  # tells the names below apart
_TOPK, _PROBS, _WEIGHTS, _ARGSORT = b"ffn_moe_topk-", b"ffn_moe_probs", b"ffn_moe_weigh", b"ffn_moe_argsort"


class RoutingError(DfqsError):
    """Routing was not recorded, or two records cannot be compared."""


# ---- what is kept ----


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
    def nbytes(self) -> int:
        """Bytes of the routing arrays in memory, without the logits."""
        return sum(a.nbytes for a in (self.tokens, self.experts, self.weights, self.margin))

    def save(self, path: str | Path, **extra: str) -> Path:
        """Write the trace as ``.npz``, whole or not at all; ``extra``: strings stored beside it."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays["n_experts"] = np.int64(self.n_experts)
        texts = {"conditions": json.dumps(self.conditions), **extra}
        arrays.update({name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()})
        if self.logits is not None:
            arrays.update({f"logits_{name}": value for name, value in vars(self.logits).items()})
        with whole_file(path, "wb") as file:
            np.savez_compressed(file, **arrays)
        return Path(path)


_ARRAYS = ("tokens", "layers", "hashed", "experts", "weights", "margin", "output")


def load_trace(path: str | Path) -> Trace:
    """Read what ``Trace.save`` wrote.

    Raises:
        RoutingError: the file is missing or not such a file.
    """
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as stored:
            names = ("digest", "best", "ids", "values")
            kept = Logits(**{n: stored[f"logits_{n}"] for n in names}) if "logits_ids" in stored else None
            return Trace(
                **{n: stored[n] for n in _ARRAYS},
                n_experts=int(stored["n_experts"]),
                logits=kept,
                conditions=json.loads(stored["conditions"].tobytes()),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RoutingError(f"not a routing trace ({error})", where=path, hint="record it again") from error


# ---- the recorder ----


class _View:
    """One tensor of llama.cpp's graph, read where it lies."""

    __slots__ = ("address", "name", "row_bytes", "shape", "steps", "tensor")

    def __init__(self, address: int) -> None:
        self.address, self.tensor = address, Tensor.from_address(address)
        self.name, self.shape, self.steps = self.tensor.name, self.tensor.ne, self.tensor.nb
        self.row_bytes = self.shape[0] * 4


class _Hook:
    """A key of `_Nodes` that calls a function when its address is looked up.

    A dictionary asks a key for equality only when the hashes are equal, so Python code runs at these few
    nodes, and the hundreds of others are answered by the dictionary alone.
    """

    __slots__ = ("address", "call")

    def __init__(self, address: int, call: Callable[[], object]) -> None:
        self.address, self.call = address, call

    def __hash__(self) -> int:
        return hash(self.address)

    def __eq__(self, other: object) -> bool:
        if self.address == other:
            self.call()
            return True
        return self is other


class _Nodes(dict[Any, bool]):
    """For every node of the graph, by address: does llama.cpp stop there? Unknown ones are learned."""

    def __init__(self, learn: Callable[[int], bool]) -> None:
        self._learn = learn

    def __missing__(self, address: int) -> bool:
        return self._learn(address)


class _Router:
    """One layer's router in llama.cpp's graph: its ids, selection scores and probabilities."""

    def __init__(self, address: int, probs: int) -> None:
        self.ids, self.probs = _View(address), _View(probs)
        self.layer = int(self.ids.name.rsplit(b"-", 1)[1])
        self.source = _View(self.ids.tensor.src[0])
        self.hashed = not self.source.name.startswith(_ARGSORT)
        scores = probs if self.hashed else self.source.tensor.src[0]
        self.scores = self.probs if scores == probs else _View(scores)
        self.by_expert = [self.probs] if scores == probs else [self.probs, self.scores]
        self.stopped = False
        self.marks = [(view.tensor, view.name) for view in {self.ids, self.probs, self.scores}]


class Recorder:
    """Hears about every node that llama.cpp evaluates and keeps what the routers chose.

    In decode a graph of the same shape comes again and again at the same addresses. So nodes are known by
    address: reading each one's name costs a small model 40 % of its speed, a dictionary 5 %. At the first
    node of each graph the names at the addresses that matter are checked; another graph is learned afresh.
    """

    def __init__(self) -> None:
        import llama_cpp.llama_cpp as api

        self._nodes = _Nodes(self._learn)
        # llama.cpp also passes whether it asks or has computed, and user data: a node that we stop at
        # comes exactly twice, so we leave both out, which makes the call cheaper
        self._function = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(self._nodes.__getitem__)
        self.callback = ctypes.cast(self._function, api.ggml_backend_sched_eval_callback)
        void, size = ctypes.c_void_p, ctypes.c_size_t
        # whichever device holds the tensor
        self._copy = ggml_function("ggml_backend_tensor_get", None, void, void, size, size)
        self._staging, self._address = np.zeros(0, np.int32), 0
        self._marks: list[tuple[Tensor, bytes]] = []  # what must lie where, for the known addresses to hold
        self._listening = False
        self._probs_at = 0
        self._error: BaseException | None = None
        self._weighting: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded."""
        self._free = 0  # bytes of the staging area in use
        self._staged: dict[int, list[tuple[int, int, int]]] = {}  # by layer: offset, rows, bytes of the ids
        self._rows: dict[int, int] = {}
        self._blocks: list[dict[int, tuple[np.ndarray, ...]]] = []
        self._expected = 0
        self._shape: tuple[int, int] = (0, 0)
        self._hashed: dict[int, bool] = {}
        self._biased: dict[int, bool] = {}

    # -- around each llama_decode --

    def begin(self, n_tokens: int) -> None:
        """Say that the next ``llama_decode`` evaluates this many tokens, to be recorded."""
        self._expected += n_tokens
        self._listening = True

    def end(self) -> None:
        """Check that every layer told about every token.

        Raises:
            RoutingError: one did not, or told twice.
        """
        self._listening = False
        if self._error is not None:
            error, self._error = self._error, None
            raise RoutingError(f"the recorder failed ({error})", hint="report the architecture") from error
        for layer, rows in self._rows.items():
            if rows != self._expected:
                raise RoutingError(
                    f"layer {layer} routed {rows:,} of {self._expected:,} tokens",
                    hint="this architecture has no common expert block once a layer",
                )

    # -- inside it: no exception may pass through llama.cpp, so end() raises them --

    def _learn(self, address: int) -> bool:
        """A node at an unknown address, by its name."""
        stop = False
        try:
            if not self._nodes:
                self._nodes[_Hook(address, self._start)] = False
                return False
            prefix = ctypes.string_at(address + NAME_OFFSET, _PREFIX_BYTES)
            if prefix == _TOPK:
                router = _Router(address, self._probs_at)
                self._marks += router.marks
                self._nodes[_Hook(address, functools.partial(self._visit, router))] = stop = True
                self._visit(router)
                return stop
            if prefix in (_PROBS, _WEIGHTS):
                self._learn_named(_View(address))
        except Exception as error:
            self._error = error
        self._nodes[address] = stop
        return stop

    def _learn_named(self, view: _View) -> None:
        """The probabilities, and what build_moe_ffn does to the chosen ones, from the names of its nodes."""
        step = view.name.rsplit(b"-", 1)[0].decode()
        if step == "ffn_moe_probs" and b" " not in view.name:
            self._probs_at = view.address
        elif step.startswith("ffn_moe_weights_"):
            factor = struct.unpack("f", struct.pack("i", view.tensor.op_params[0]))[0]
            self._weighting[step.removeprefix("ffn_moe_weights_")] = factor

    def _start(self) -> None:
        """The first node of a graph: forget the known addresses unless they hold what they held."""
        for tensor, name in self._marks:
            if tensor.name != name:
                self._nodes.clear()
                self._marks = []
                return

    def _visit(self, router: _Router) -> None:
        """A router's node: first llama.cpp asks whether to stop behind it, then it has stopped."""
        router.stopped = not router.stopped
        if router.stopped or not self._listening:
            return
        try:
            self._take(router)
        except Exception as error:
            self._error = error

    def _take(self, router: _Router) -> None:
        """Copy the ids, as they lie (with a stride in prefill), and the scores of every expert behind."""
        n, ids, copy = router.ids.shape[1], router.ids, self._copy
        ids_bytes = ids.row_bytes if n == 1 else (n - 1) * ids.steps[1] + ids.row_bytes
        width = n * router.probs.row_bytes
        if router.layer not in self._rows:
            self._meet(router)
        at = self._reserve(ids_bytes + width * len(router.by_expert))
        self._staged[router.layer].append((at, n, ids_bytes))
        target = self._address + at
        copy(ids.address, target, 0, ids_bytes)
        target += ids_bytes
        for view in router.by_expert:
            copy(view.address, target, 0, width)
            target += width
        self._rows[router.layer] += n

    def _reserve(self, nbytes: int) -> int:
        """Room in the staging area, as an offset in bytes; what it holds is reduced first if it is full."""
        if self._free + nbytes > self._staging.nbytes:
            self._flush()
            if nbytes > self._staging.nbytes:
                self._staging = np.zeros(max(nbytes, FLUSH_BYTES) // 4, np.int32)
                self._address = self._staging.ctypes.data
        at, self._free = self._free, self._free + nbytes
        return at

    def _meet(self, router: _Router) -> None:
        """The first rows of a layer."""
        shape = router.ids.row_bytes // 4, router.probs.row_bytes // 4
        if self._shape not in ((0, 0), shape):
            raise RoutingError(f"layer {router.layer} chooses {shape[0]} of {shape[1]}, unlike others")
        self._shape, self._hashed[router.layer] = shape, router.hashed
        self._biased[router.layer] = len(router.by_expert) > 1
        self._rows[router.layer], self._staged[router.layer] = 0, []

    # -- from raw scores to margins and weights --

    def _flush(self) -> None:
        block = {}
        for layer, staged in self._staged.items():
            if staged:
                chosen, scores, probs = self._unpack(np.array(staged), self._biased[layer])
                margins = np.full(len(chosen), np.nan, np.float32)
                if not self._hashed[layer]:
                    margins = margin(scores, chosen)
                block[layer] = chosen.astype(self._id_type()), self._weights(probs, chosen), margins
                staged.clear()
        if block:
            self._blocks.append(block)
        self._free = 0

    def _unpack(self, staged: np.ndarray, biased: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, selection scores and probabilities of a layer, a row a token, from the staging area."""
        at, n, ids_bytes = staged.T
        call = np.repeat(np.arange(len(n)), n)
        row = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        k, width = (4 * size for size in self._shape)
        step = (ids_bytes - k) // np.maximum(n - 1, 1)
        probs = (at + ids_bytes)[call] + row * width
        scores = probs + biased * n[call] * width
        return (
            self._gather(at[call] + row * step[call], k),
            self._gather(scores, width).view(np.float32),
            self._gather(probs, width).view(np.float32),
        )

    def _gather(self, starts: np.ndarray, nbytes: int) -> np.ndarray:
        return self._staging[starts[:, None] // 4 + np.arange(nbytes // 4)]

    def _id_type(self) -> type:
        return np.uint8 if self._shape[1] <= 256 else np.uint16

    def _weights(self, probs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        weights = np.take_along_axis(probs, chosen, axis=1)
        if "softmax" in self._weighting:
            weights = np.exp(weights - weights.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
        if "norm" in self._weighting:
            weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), SMALLEST_SUM)
        return (weights * self._weighting.get("scaled", 1.0)).astype(np.float16)

    def arrays(self) -> dict[str, Any]:
        """What was recorded since ``reset``, as the fields of a `Trace`.

        Raises:
            RoutingError: a choice contradicts its scores: they were overwritten before they were read.
        """
        self._flush()
        layers = sorted(self._rows)
        fields = {
            "layers": np.array(layers, np.int16),
            "n_experts": int(self._shape[1]),
            "hashed": np.array([self._hashed[layer] for layer in layers], bool),
        }
        empty = (
            np.zeros((self._expected, 0, 0), np.uint8),
            np.zeros((self._expected, 0, 0), np.float16),
            np.zeros((self._expected, 0), np.float32),
        )
        for i, name in enumerate(("experts", "weights", "margin")):
            found = [[block[layer][i] for block in self._blocks if layer in block] for layer in layers]
            fields[name] = np.stack([np.concatenate(part) for part in found], axis=1) if found else empty[i]
        if (fields["margin"] < 0).any():
            raise RoutingError("chosen experts do not score highest", hint="report the architecture")
        return fields


def margin(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The smallest score among the chosen experts minus the largest among the others.

    Args:
        scores: selection scores, float32 ``(n, experts)``; minus infinity where a group was excluded.
        chosen: expert ids, integers ``(n, k)``.

    Returns:
        float32 ``(n,)``; infinite where nothing else could be chosen.

    >>> margin(np.array([[0.5, 0.25, 0.75, 0.125]], np.float32), np.array([[2, 0]])).tolist()
    [0.25]
    """
    last = np.take_along_axis(scores, chosen, axis=1).min(axis=1)
    rest = scores.copy()
    np.put_along_axis(rest, chosen, -np.inf, axis=1)
    return last - rest.max(axis=1, initial=-np.inf)


# ---- a run ----


@dataclass
class RecordedModel:
    """An open model with a recorder that listens, or without one (to compare speeds)."""

    model: Model
    recorder: Recorder | None

    def feed(self, tokens: Sequence[int], *, listen: bool = True) -> np.ndarray:
        """Evaluate at most ``n_batch`` tokens; the logits after each, float32 ``(n, n_vocab)``, a view.

        Logits are asked for every token, because llama.cpp routes only those tokens through its last layer.

        Raises:
            ContextFullError, DecodeError: they do not fit, or llama.cpp fails.
            RoutingError: a layer's routing was not seen.
        """
        import llama_cpp.llama_cpp as api

        recorder = self.recorder if listen else None
        if recorder is not None:
            recorder.begin(len(tokens))
        llama = self.model._open()
        _decode(self.model, tokens)
        if recorder is not None:
            recorder.end()
        return np.ctypeslib.as_array(api.llama_get_logits(llama.ctx), (len(tokens), self.model.n_vocab))

    def restore(self) -> None:
        """Save the sequence's state, clear the context, and put the state back."""
        import llama_cpp.llama_cpp as api

        ctx, n_past = self.model._open().ctx, self.model.n_past
        size = api.llama_state_seq_get_size(ctx, 0)
        state = (ctypes.c_uint8 * size)()
        saved = api.llama_state_seq_get_data(ctx, state, size, 0)
        self.model.clear()
        if saved != size or api.llama_state_seq_set_data(ctx, state, size, 0) != size:
            raise DecodeError("llama.cpp does not save and restore its state", where=self.model.path)
        self.model.llama.n_tokens = n_past


def _decode(model: Model, tokens: Sequence[int]) -> None:
    """One ``llama_decode`` of these tokens after those in the context, with logits for each."""
    import llama_cpp.llama_cpp as api

    llama, n, past = model.llama, len(tokens), model.n_past
    if past + n > model.settings.n_ctx:
        raise ContextFullError(
            f"{past + n:,} tokens exceed the context of {model.settings.n_ctx:,}",
            where=model.path,
            hint="open the model with a larger n_ctx",
        )
    ids, positions = (api.llama_token * n)(*tokens), (api.llama_pos * n)(*range(past, past + n))
    sequence, wanted = (api.llama_seq_id * 1)(0), (ctypes.c_int8 * n)(*[1] * n)
    sequences = (ctypes.POINTER(api.llama_seq_id) * n)(*[sequence] * n)
    counts = (ctypes.c_int32 * n)(*[1] * n)
    batch = api.llama_batch(
        n_tokens=n, token=ids, embd=None, pos=positions, n_seq_id=counts, seq_id=sequences, logits=wanted
    )
    status = (_decode_holding_gil() if n == 1 else api.llama_decode)(llama.ctx, batch)
    if status != 0:
        raise DecodeError(f"llama_decode returned {status} after {past:,} tokens", where=model.path)
    llama.n_tokens = past + n


@functools.cache
def _decode_holding_gil() -> Any:
    """``llama_decode`` that keeps Python's lock: a callback that need not take it costs half as much."""
    import llama_cpp.llama_cpp as api

    function = ctypes.PyDLL(api._lib._name).llama_decode
    function.argtypes, function.restype = api.llama_decode.argtypes, api.llama_decode.restype
    return function


@contextmanager
def open_recorded(
    path: str | Path, settings: OpenSettings | None = None, *, probe: bool = True, listen: bool = True
) -> Iterator[RecordedModel]:
    """Open a model with a recorder on its evaluation callback; arguments and errors as ``open_model``.

    Args:
        listen: False leaves the recorder out.
    """
    recorder = Recorder() if listen else None
    if recorder is None:
        model = open_model(path, settings, trial=probe)
    else:
        with default_context_params(cb_eval=recorder.callback):
            model = open_model(path, settings, trial=probe)
    with model:
        yield RecordedModel(model, recorder)


@dataclass(frozen=True)
class Schedule:
    """How a run evaluates its tokens: the first ``prefill`` of them (all by default) in batches of
    ``n_batch``, then the others one by one, or in batches again if ``decode`` is False.

    ``restore``: save the state after the first part, clear the context, put the state back, go on.
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
        return (_ranges(0, cut, n_batch), _ranges(cut, n_tokens, step))


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
    schedule, model, recorder = schedule or Schedule(), recorded.model, recorded.recorder
    if recorder is None:
        raise RoutingError("this model was opened without a recorder", hint="open it with listen=True")
    recorder.reset()
    model.clear()
    sample = np.unique(np.linspace(0, model.n_vocab - 1, min(LOGIT_SAMPLE, model.n_vocab)).astype(np.int32))
    kept, last = [], -1
    for number, calls in enumerate(schedule.parts(len(tokens), model.settings.n_batch)):
        if number == 1 and schedule.restore:
            recorded.restore()
        for call in calls:
            found = recorded.feed(tokens[call.start : call.stop])
            last = int(found[-1].argmax())
            if logits:
                kept.append(_keep(found, sample))
    output = _continue(recorded, last, n_output)
    return Trace(
        tokens=np.asarray(tokens, np.int32),
        **recorder.arrays(),
        output=output,
        conditions={**_conditions(model), **vars(schedule), "n_output": n_output},
        logits=_join(kept, sample) if logits else None,
    )


def _keep(logits: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import xxhash

    digests = np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in logits], np.uint64)
    return digests, logits.argmax(axis=1).astype(np.int32), logits[:, sample]


def _join(kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]], sample: np.ndarray) -> Logits:
    digest, best, values = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    return Logits(digest, best, sample, values)


def _continue(recorded: RecordedModel, token: int, n_tokens: int) -> np.ndarray:
    """The greedy continuation that begins with ``token``; nothing is recorded."""
    model, output = recorded.model, []
    while len(output) < min(n_tokens, model.settings.n_ctx - model.n_past) and not model.ends(token):
        output.append(token)
        token = int(recorded.feed([token], listen=False)[0].argmax())
    return np.array(output, np.int32)


def _conditions(model: Model) -> dict[str, Any]:
    return {"model": model_identity(model), **model.conditions()}


def model_identity(model: Model) -> dict[str, Any]:
    """What tells one model from another without reading its weights."""
    header = model.header
    return {
        "name": header.get("general.name", model.path.stem),
        "architecture": header.architecture,
        "first_file_bytes": header.file_size,
        "header_sha256": hashlib.sha256(header.raw).hexdigest(),
    }


def require_routed(trace: Trace, where: str | Path | None = None) -> None:
    """Refuse a dense model's trace.

    Raises:
        ModelError: no layer has routed experts.
    """
    if not len(trace.layers):
        raise ModelError(
            "no routed experts here: a dense model",
            where=where,
            hint="only the determinism of its logits can be measured",
        )
