"""Listen to llama.cpp's graph and keep what the routers chose.

At each router's node (see `llama.graph`) nothing has overwritten yet the scores that the experts were chosen
by. A stop changes how the graph is cut, so compare recorded runs only with recorded runs.
"""

from __future__ import annotations

import ctypes
import struct
import tempfile
from typing import IO, Any

import numpy as np

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.llama.graph import Router, View, Watch, ggml_function

FLUSH_BYTES = 4 << 20  # of raw scores, before they are reduced to margins and weights
SPILL_BYTES = 16 << 20  # of one column in memory; what is beyond goes to a file
SMALLEST_SUM = 6.103515625e-5  # build_moe_ffn clamps the sum of weights here
_PROBS, _WEIGHTS, _ARGSORT = b"ffn_moe_probs", b"ffn_moe_weigh", b"ffn_moe_argsort"


class RoutingError(DfqsError):
    """Routing was not recorded, or two records cannot be compared."""


class Column:
    """Rows of an array, appended piece by piece; long ones lie in a file without a name, not in memory."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._file: IO[bytes] | None = None
        self._n = self._held = 0

    def add(self, rows: np.ndarray) -> None:
        """Append rows, all of one type and width."""
        self._parts.append(rows)
        self._n, self._held = self._n + len(rows), self._held + rows.nbytes
        if self._held > SPILL_BYTES:
            self._spill()

    def _spill(self) -> None:
        self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the rows
        for part in self._parts:
            self._file.write(np.ascontiguousarray(part).data)
        self._file.flush()
        self._parts, self._held = [self._parts[-1][:0]], 0

    def array(self) -> np.ndarray:
        """All rows: in memory, or mapped from the file."""
        if self._file is None:
            return self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        self._spill()
        kind = self._parts[0]
        return np.memmap(self._file, kind.dtype, "r", shape=(self._n, *kind.shape[1:]))


class _Router(Router):
    """One layer's router in llama.cpp's graph: its ids, selection scores and probabilities."""

    def __init__(self, address: int, probs: int) -> None:
        super().__init__(address)
        self.probs, self.source = View(probs), View(self.ids.tensor.src[0])
        self.hashed = not self.source.name.startswith(_ARGSORT)
        scores = probs if self.hashed else self.source.tensor.src[0]
        self.scores = self.probs if scores == probs else View(scores)
        self.by_expert = [self.probs] if scores == probs else [self.probs, self.scores]
        self.marks = [(view.tensor, view.name) for view in {self.ids, self.probs, self.scores}]


class Recorder(Watch):
    """Receives every node that llama.cpp evaluates and keeps what the routers chose."""

    def __init__(self) -> None:
        super().__init__()
        self.keep_scores = False  # of every expert, for rank correlations
        void, size = ctypes.c_void_p, ctypes.c_size_t
        # whichever device holds the tensor
        self._copy = ggml_function("ggml_backend_tensor_get", None, void, void, size, size)
        self._staging, self._address = np.zeros(0, np.int32), 0
        self._listening = False
        self._inputs: list[np.ndarray] | None = None
        self._probs_at = 0
        self._weighting: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded."""
        self._free = 0  # bytes of the staging area in use
        self._staged: dict[int, list[tuple[int, int, int]]] = {}  # by layer: offset, rows, bytes of the ids
        self._rows: dict[int, int] = {}
        self._blocks: list[dict[int, tuple[np.ndarray, ...]]] = []
        self._columns: dict[str, Column] = {}
        self._expected = 0
        self._shape: tuple[int, int] = (0, 0)
        self._hashed: dict[int, bool] = {}
        self._biased: dict[int, bool] = {}

    # -- around each llama_decode --

    def begin(self, n_tokens: int, *, inputs: bool = False) -> None:
        """The next ``llama_decode`` evaluates so many tokens; ``inputs``: read them in its order, too."""
        self._expected += n_tokens
        self._listening = True
        self._inputs = [] if inputs else None

    def end(self) -> np.ndarray:
        """Check that every layer routed every token once; the tokens in llama.cpp's order, where asked for.

        Raises:
            RoutingError: a layer did not, or the recorder failed.
        """
        self._listening = False
        inputs = np.concatenate(self._inputs) if self._inputs else np.zeros(0, np.int32)
        if self._error is not None:
            error, self._error = self._error, None
            raise RoutingError(f"the recorder failed ({error})", hint="report the architecture") from error
        for layer, rows in self._rows.items():
            if rows != self._expected:
                raise RoutingError(
                    f"layer {layer} routed {rows:,} of {self._expected:,} tokens",
                    hint="this architecture has no common expert block once a layer",
                )
        if self._blocks:  # all layers are equally long now
            self._flush()
            self._stack()
        return inputs

    # -- inside it: no exception may pass through llama.cpp, so end() raises them --

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
        try:
            view = View(View(address).tensor.src[1] or 0)
            if view.name != b"inp_tokens":
                raise RoutingError("its graph does not begin with the tokens")
            tokens = np.zeros(view.shape[0], np.int32)
            self._copy(view.address, tokens.ctypes.data, 0, tokens.nbytes)
            self._inputs.append(tokens)
        except Exception as error:
            self._error = error

    def _chosen(self, router: Router) -> None:
        super()._chosen(router)
        if self._listening and isinstance(router, _Router):
            self._take(router)

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
        """Reduce what lies in the staging area."""
        block: dict[int, tuple[np.ndarray, ...]] = {}
        for layer, staged in self._staged.items():
            if staged:
                chosen, scores, probs = self._unpack(np.array(staged), self._biased[layer])
                margins = np.full(len(chosen), np.nan, np.float32)
                if not self._hashed[layer]:
                    margins = margin(scores, chosen)
                if (margins < 0).any():
                    hint = "report the architecture"
                    raise RoutingError("chosen experts do not score highest", hint=hint)
                weights = self._weights(probs, chosen)
                kept = (
                    chosen.astype(np.uint8 if self._shape[1] <= 256 else np.uint16),
                    weights,
                    margins,
                    scores,
                )
                block[layer] = kept[: 3 + self.keep_scores]
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
        starts = (at[call] + row * step[call], k), (scores, width), (probs, width)
        ids, *floats = (self._staging[place[:, None] // 4 + np.arange(n // 4)] for place, n in starts)
        return ids, floats[0].view(np.float32), floats[1].view(np.float32)

    def _weights(self, probs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        weights = np.take_along_axis(probs, chosen, axis=1)
        if "softmax" in self._weighting:
            weights = np.exp(weights - weights.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
        if "norm" in self._weighting:
            weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), SMALLEST_SUM)
        return (weights * self._weighting.get("scaled", 1.0)).astype(np.float16)

    def _stack(self) -> None:
        """Move the blocks of all layers into columns, a row a token."""
        layers = sorted(self._rows)
        for i, name in enumerate(("experts", "weights", "margin", "scores")[: 3 + self.keep_scores]):
            parts = [[block[layer][i] for block in self._blocks if layer in block] for layer in layers]
            stacked = np.stack([np.concatenate(part) for part in parts], axis=1)
            self._columns.setdefault(name, Column()).add(stacked)
        self._blocks.clear()

    def arrays(self) -> dict[str, Any]:
        """What was recorded since `reset`, as fields of a `Trace`.

        Raises:
            RoutingError: a choice contradicts its scores: they were overwritten before they were read.
        """
        self._flush()
        if self._blocks:
            self._stack()
        layers, n = sorted(self._rows), self._expected
        empty = np.zeros((n, 0, 0), np.uint8), np.zeros((n, 0, 0), np.float16), np.zeros((n, 0), np.float32)
        return {
            "layers": np.array(layers, np.int16),
            "hashed": np.array([self._hashed[layer] for layer in layers], bool),
            "n_experts": int(self._shape[1]),
            **dict(zip(("experts", "weights", "margin"), empty, strict=True)),
            **{name: column.array() for name, column in self._columns.items()},
        }


def margin(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The smallest score among the chosen experts minus the largest among the others, float32 ``(n,)``.

    Of selection scores ``(n, experts)``, minus infinity where a group was excluded, and ids ``(n, k)``;
    infinite where nothing else could be chosen.

    >>> margin(np.array([[0.5, 0.25, 0.75, 0.125]], np.float32), np.array([[2, 0]])).tolist()
    [0.25]
    """
    last = np.take_along_axis(scores, chosen, axis=1).min(axis=1)
    rest = scores.copy()
    np.put_along_axis(rest, chosen, -np.inf, axis=1)
    return np.asarray(last - rest.max(axis=1, initial=-np.inf))
