"""Read llama.cpp's graph while it is computed, and keep what the routers chose.

At each router's node (see `llama.graph`) nothing has overwritten yet the scores that the experts were chosen
by. A stop changes how the graph is cut, so compare recorded runs only with recorded runs.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.llama.graph import Router, View, Watch, ggml_function

FLUSH_BYTES = 1 << 20  # of copies, before they are reduced to margins and weights
LOGIT_SAMPLE = 1024  # logits kept of each token; all of them for a small vocabulary
SMALLEST_SUM = 6.103515625e-5  # build_moe_ffn clamps the sum of weights here
_PROBS, _WEIGHTS, _ARGSORT = b"ffn_moe_probs", b"ffn_moe_weigh", b"ffn_moe_argsort"


class RoutingError(DfqsError):
    """Routing was not recorded, or two records cannot be compared."""


@dataclass
class _Layer:
    """What one layer chose: copies of the graph's rows that are not reduced yet."""

    hashed: bool
    raw: list[list[Any]]  # of ids, of probabilities, and of selection scores where they differ from these
    n_tokens: int = 0


class _Router(Router):
    """One layer's router in llama.cpp's graph, and the tensors to copy: ids, probabilities, scores."""

    def __init__(self, address: int, probs: int) -> None:
        super().__init__(address)
        source = View(self.ids.tensor.src[0])
        self.hashed = not source.name.startswith(_ARGSORT)
        # scored ids are a view of the sorted experts, with gaps: whole rows of these have none
        self.reads = [self.ids if self.hashed else source, View(probs)]
        if not self.hashed and source.tensor.src[0] != probs:
            self.reads.append(View(source.tensor.src[0]))
        self.marks = [(view.tensor, view.name) for view in (self.ids, *self.reads)]


class Recorder(Watch):
    """Receives every node that llama.cpp evaluates and keeps what the routers chose."""

    def __init__(self) -> None:
        super().__init__()
        void, size = ctypes.c_void_p, ctypes.c_size_t
        # whichever device holds the tensor
        self._copy = ggml_function("ggml_backend_tensor_get", None, void, void, size, size)
        self._listening = False
        self._inputs: list[np.ndarray] | None = None
        self._probs_at = 0
        self._weighting: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded."""
        self._layers: dict[int, _Layer] = {}
        self._columns: dict[str, list[np.ndarray]] = {}  # rows in pieces, by their field of a `Trace`
        self._expected = self._raw_bytes = 0
        self._logit_ids = np.zeros(0, np.int32)
        self._shape = 0, 0  # experts chosen, and experts

    def begin(self, n_tokens: int, *, inputs: bool = False) -> None:
        """The next ``llama_decode`` evaluates so many tokens; ``inputs``: read them in its order, too."""
        self._expected += n_tokens
        self._listening = True
        self._inputs = [] if inputs else None

    def end(self) -> np.ndarray:
        """Check that each layer routed every token once; the tokens in llama.cpp's order, if asked for."""
        self._listening = False
        if self._error is not None:
            error, self._error = self._error, None
            raise RoutingError(f"the recorder failed ({error})", hint="report the architecture") from error
        for number, layer in self._layers.items():
            if layer.n_tokens != self._expected:
                what = f"layer {number} routed {layer.n_tokens:,} of {self._expected:,} tokens"
                raise RoutingError(what, hint="this architecture has no common expert block once a layer")
        if self._raw_bytes > FLUSH_BYTES:
            self._reduce()
        return np.concatenate(self._inputs) if self._inputs else np.zeros(0, np.int32)

    def keep_logits(self, rows: np.ndarray) -> None:
        """Keep a digest of the logits of each token, float32 ``(n, n_vocab)``, and a sample of them."""
        import xxhash

        ids = np.unique(np.linspace(0, rows.shape[1] - 1, LOGIT_SAMPLE).astype(np.int32))
        digests = np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows], np.uint64)
        self._logit_ids = ids
        for name, kept in (("digest", digests), ("logits", rows[:, ids])):
            self._columns.setdefault(name, []).append(kept)

    # -- called by llama.cpp: the watch keeps an exception, and end() raises it --

    def _router(self, address: int) -> Router:
        return _Router(address, self._probs_at)

    def _other(self, address: int, prefix: bytes) -> None:
        """The probabilities, and what build_moe_ffn does to the chosen ones, from the names of its nodes."""
        if prefix not in (_PROBS, _WEIGHTS):
            return
        view = View(address)
        step = view.name.rsplit(b"-", 1)[0].decode()
        if step == "ffn_moe_probs" and b" " not in view.name:
            self._probs_at = view.address
        elif step.startswith("ffn_moe_weights_"):
            factor = struct.unpack("f", struct.pack("i", view.tensor.op_params[0]))[0]
            self._weighting[step.removeprefix("ffn_moe_weights_")] = factor

    def _begun(self, address: int) -> None:
        """The tokens of a graph: its first node looks up their embeddings."""
        if self._inputs is None:
            return
        source = View(address).tensor.src[1]
        if not source or (view := View(source)).name != b"inp_tokens":
            raise RoutingError("its graph does not begin with the tokens")
        tokens = np.zeros(view.shape[0], np.int32)
        self._copy(view.address, tokens.ctypes.data, 0, tokens.nbytes)
        self._inputs.append(tokens)

    def _chosen(self, router: Router) -> None:
        super()._chosen(router)
        if not self._listening or not isinstance(router, _Router):
            return
        n, layer = router.ids.shape[1], self._layers.get(router.layer)
        if layer is None:
            shape = router.ids.row_bytes // 4, router.reads[1].row_bytes // 4
            if self._shape not in ((0, 0), shape):
                raise RoutingError(f"layer {router.layer} chooses {shape[0]} of {shape[1]}, unlike others")
            self._shape = shape
            self._layers[router.layer] = layer = _Layer(router.hashed, [[] for _ in router.reads])
        for view, copies in zip(router.reads, layer.raw, strict=True):
            size = n * view.row_bytes
            copies.append(copy := ctypes.create_string_buffer(size))
            self._copy(view.address, copy, 0, size)
            self._raw_bytes += size
        layer.n_tokens += n

    def _reduce(self) -> None:
        """Turn the copies of all layers, which hold equally many tokens, into rows of columns."""
        layers = [self._reduced(self._layers[number]) for number in sorted(self._layers)]
        for name, parts in zip(("experts", "weights", "margin"), zip(*layers, strict=True), strict=True):
            self._columns.setdefault(name, []).append(np.stack(parts, axis=1))
        self._raw_bytes = 0

    def _reduced(self, layer: _Layer) -> tuple[np.ndarray, ...]:
        """Ids, weights and margins of a layer, a row a token."""
        k, n_experts = self._shape
        ids, *floats = (np.frombuffer(b"".join(copies), np.int32) for copies in layer.raw)
        for copies in layer.raw:
            copies.clear()
        chosen = ids.reshape(-1, k if layer.hashed else n_experts)[:, :k]
        probs, scores = (each.view(np.float32).reshape(-1, n_experts) for each in (floats[0], floats[-1]))
        margins = np.full(len(chosen), np.nan, np.float32) if layer.hashed else margin(scores, chosen)
        if (margins < 0).any():
            raise RoutingError("chosen experts do not score highest", hint="report the architecture")
        weights = np.take_along_axis(probs, chosen, axis=1)
        if "softmax" in self._weighting:
            weights = np.exp(weights - weights.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
        if "norm" in self._weighting:
            weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), SMALLEST_SUM)
        weights = weights * self._weighting.get("scaled", 1.0)
        small = np.uint8 if n_experts <= 256 else np.uint16
        return chosen.astype(small), weights.astype(np.float16), margins

    def arrays(self) -> dict[str, Any]:
        """What was recorded since `reset`, as fields of a `Trace`.

        A `RoutingError` if a choice contradicts its scores: they were overwritten before they were read.
        """
        if self._raw_bytes:
            self._reduce()
        layers, n = sorted(self._layers), self._expected
        return {
            "layers": np.array(layers, np.int16),
            "hashed": np.array([self._layers[layer].hashed for layer in layers], bool),
            "n_experts": int(self._shape[1]),
            "experts": np.zeros((n, 0, 0), np.uint8),
            "weights": np.zeros((n, 0, 0), np.float16),
            "margin": np.zeros((n, 0), np.float32),
            "logit_ids": self._logit_ids,
            **{name: np.concatenate(pieces) for name, pieces in self._columns.items()},
        }


def margin(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The smallest score among the chosen experts minus the largest among the others, float32 ``(n,)``.

    Of selection scores ``(n, experts)``, minus infinity for excluded groups, and ids ``(n, k)``.

    >>> margin(np.array([[0.5, 0.25, 0.75, 0.125]], np.float32), np.array([[2, 0]])).tolist()
    [0.25]
    """
    last = np.take_along_axis(scores, chosen, axis=1).min(axis=1)
    rest = scores.copy()
    np.put_along_axis(rest, chosen, -np.inf, axis=1)
    return np.asarray(last - rest.max(axis=1, initial=-np.inf))
