"""Importance matrices: how strongly each input column of a weight is used, collected, read and written.

A low-bit quantizer weighs its error by the mean square of the activation that meets each column. llama.cpp
collects those sums with ``llama-imatrix`` through the evaluation callback. Here the same callback is taken
from Python: the input of every matrix product whose weight is a tensor of a block, and for the routed experts
the rows that each expert received. The files are llama.cpp's own (``general.type = imatrix``, and the older
``.dat``): format in its common/imatrix-loader.cpp, arithmetic in tools/imatrix/imatrix.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import whole_path
from dfqs_nb.gguf.facts import class_of, layer_of
from dfqs_nb.gguf.header import MAGIC, GGUFHeader, check_layout, read_header
from dfqs_nb.ladder.divergence import Array, chunks, feed_chunk
from dfqs_nb.llama.graph import Tensor, ggml_function
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings, default_context_params

if TYPE_CHECKING:
    import pandas as pd

CHUNK_TOKENS = 512  # llama-imatrix's default
LEAST_ROWS = 16  # llama-imatrix passes over smaller products of dense weights
SUMS, COUNTS = ".in_sum2", ".counts"
UNIFORM = "none (every column weighs the same)"
MAX_NAME_BYTES = 1024  # of an entry in the older format
COLLECT = "collect one with llama-imatrix, or in notebook 08"


class ImatrixError(DfqsError):
    """An importance matrix cannot be read, collected, or used."""


@dataclass(frozen=True)
class Entry:
    """One weight's sums of squares.

    Attributes:
        sums: float32 ``(matrices, columns)``: one row an expert; one row for a dense weight.
        counts: rows of activations summed, int64 ``(matrices,)``, or ``(1,)`` for all matrices together.
    """

    sums: Array
    counts: Array

    def weights(self) -> Array:
        """Mean squares, float32 and flat, as llama-quantize hands them over; 1 where nothing was counted.

        >>> entry = Entry(np.array([[2.0, 4.0], [0.0, 0.0]], np.float32), np.array([2, 0]))
        >>> entry.weights().tolist()
        [1.0, 2.0, 1.0, 1.0]
        """
        sums = self.sums.reshape(len(self.counts), -1)
        count = self.counts.astype(np.float32)[:, None]
        return np.where(count > 0, sums / np.maximum(count, 1), 1).astype(np.float32).ravel()


@dataclass(frozen=True)
class ImportanceMatrix:
    """An importance matrix.

    Attributes:
        entries: by the weight's name.
        datasets: names of the texts it was collected on.
        chunk_count, chunk_size: how many pieces of how many tokens.
        path: the file it was read from or written to; empty otherwise.

    Raises:
        ImatrixError: a value is not finite or negative. llama.cpp would blame the model's weights for it.
    """

    entries: Mapping[str, Entry] = field(repr=False)
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    path: str = ""

    def __post_init__(self) -> None:
        for name, entry in self.entries.items():
            if not (np.isfinite(entry.sums).all() and (entry.sums >= 0).all() and (entry.counts >= 0).all()):
                raise ImatrixError(
                    f"the importance matrix has values for {name} that are not finite or negative",
                    where=self.path or None,
                    hint="collect it again; if that repeats, get the model again",
                )

    def only(self, pattern: str) -> ImportanceMatrix:
        """The entries whose name contains a match of the pattern."""
        kept = {name: entry for name, entry in self.entries.items() if re.search(pattern, name)}
        return replace(self, entries=kept)

    def fitting(self, header: GGUFHeader) -> ImportanceMatrix:
        """The entries that have a value for each column (and expert) of the model's tensor of that name.

        llama-quantize refuses the others. Of ``deepseek4`` it refuses those of ``attn_output_a``, whose
        groups of columns llama.cpp multiplies as matrices of their own.

        Raises:
            ImatrixError: most entries do not fit, so it is a matrix of another model.
        """
        sizes = {
            tensor.name: tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)
            for tensor in header.tensors
        }
        kept = {name: entry for name, entry in self.entries.items() if sizes.get(name) == entry.sums.size}
        if 2 * len(kept) < len(self.entries):
            odd = next(name for name in self.entries if name not in kept)
            why = (
                f"{self.entries[odd].sums.size:,} values, not {sizes[odd]:,}"
                if odd in sizes
                else "no such tensor"
            )
            raise ImatrixError(
                f"the importance matrix is of another model: {len(self.entries) - len(kept):,} of its "
                f"{len(self.entries):,} entries do not fit this one ({odd}: {why})",
                where=self.path or None,
                hint="collect one on this model: `--calibrate calibration-nano` does, or llama-imatrix",
            )
        return replace(self, entries=kept)

    def coverage(self) -> pd.DataFrame:
        """How many rows each entry counts, one row a weight.

        Columns ``weight``, ``class``, ``layer``, ``matrices`` (experts), ``least`` and ``most`` rows counted
        in one of them, ``unused`` (experts never chosen), and ``top_tenth``: the share of the squares that
        lies in the tenth of the columns with the largest.
        """
        import pandas as pd

        rows = []
        for name, entry in sorted(self.entries.items()):
            columns, layer = np.sort(entry.sums.sum(axis=0))[::-1], layer_of(name)
            rows.append(
                {
                    "weight": name,
                    "class": class_of(name),
                    "layer": -1 if layer is None else layer,
                    "matrices": len(entry.counts),
                    "least": int(entry.counts.min()),
                    "most": int(entry.counts.max()),
                    "unused": int((entry.counts == 0).sum()),
                    "top_tenth": float(
                        columns[: max(1, len(columns) // 10)].sum() / max(columns.sum(), 1e-30)
                    ),
                }
            )
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> ImportanceMatrix:
        """Write a GGUF that llama-quantize and llama-imatrix read; the matrix with its path."""
        import gguf

        class Writer(gguf.GGUFWriter):
            def add_architecture(self) -> None:
                """None: it is not a model."""

        with whole_path(path) as part:
            writer = Writer(part, "")
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", list(self.datasets) or ["not stated"])
            writer.add_uint32("imatrix.chunk_count", self.chunk_count)
            writer.add_uint32("imatrix.chunk_size", self.chunk_size)
            for name, entry in sorted(self.entries.items()):
                writer.add_tensor(name + SUMS, entry.sums.reshape(len(entry.counts), -1).astype(np.float32))
                writer.add_tensor(name + COUNTS, entry.counts.astype(np.float32)[:, None])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return replace(self, path=str(path))


def uniform(header: GGUFHeader) -> ImportanceMatrix:
    """A matrix in which every column weighs the same: what a quantization without one would be.

    llama.cpp refuses the lowest types without a matrix, so their quality without one is measured with this.
    """
    entries = {}
    for tensor in header.tensors:
        if len(tensor.shape) > 1 and layer_of(tensor.name) is not None:
            n = tensor.shape[2] if len(tensor.shape) > 2 else 1
            entries[tensor.name] = Entry(np.ones((n, tensor.shape[0]), np.float32), np.ones(n, np.int64))
    return ImportanceMatrix(entries, (UNIFORM,), path=UNIFORM)


# ---- files ----


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read an importance matrix of llama.cpp: GGUF, or the older ``.dat``.

    Raises:
        ImatrixError: it is neither, or broken.
        HeaderError, LayoutError: it is a GGUF that llama.cpp would refuse.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ImatrixError(f"cannot be read ({error.strerror})", where=path, hint="check the path") from error
    return _read_gguf(path) if magic == MAGIC else _read_legacy(path)


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = read_header(path)
    check_layout(header)
    if header.get("general.type") != "imatrix":
        kind = header.get("general.type", header.architecture or "unknown")
        raise ImatrixError(f"a GGUF of type {kind}, not an importance matrix", where=path, hint=COLLECT)
    tensors = {tensor.name: tensor for tensor in header.tensors}

    def values(name: str) -> Array:
        if name not in tensors or tensors[name].type != "F32":
            raise ImatrixError(f"{name} is missing or not F32", where=path, hint=COLLECT)
        at = header.data_offset + tensors[name].offset
        return np.fromfile(path, np.float32, tensors[name].n_elements, offset=at)

    entries = {}
    for base in [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]:
        sums, counts = values(base + SUMS), values(base + COUNTS)
        if not counts.size or sums.size % counts.size:
            what = f"{base} has {sums.size:,} sums for {counts.size:,} counts"
            raise ImatrixError(what, where=path, hint=COLLECT)
        counts = np.where(np.isfinite(counts), np.rint(counts), -1)
        entries[base] = Entry(sums.reshape(counts.size, -1), counts.astype(np.int64))
    if not entries:
        raise ImatrixError("holds no entry", where=path, hint=COLLECT)
    return ImportanceMatrix(
        entries,
        tuple(header.get("imatrix.datasets", ())),
        int(header.get("imatrix.chunk_count", 0)),
        int(header.get("imatrix.chunk_size", 0)),
        str(path),
    )


def _read_legacy(path: Path) -> ImportanceMatrix:
    """The format before GGUF: a count of entries, each with name, calls and means; then chunks, dataset."""
    raw, position = path.read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal position
        (value,) = struct.unpack_from("<" + form, raw, position)
        position += struct.calcsize("<" + form)
        return value

    entries: dict[str, Entry] = {}
    try:
        for _ in range(take("i")):
            if not 0 < (length := take("i")) <= MAX_NAME_BYTES:
                raise ValueError(f"a name of {length:,} bytes")
            name = take(f"{length}s").decode("utf-8")
            calls, n = take("i"), take("i")
            if n < 1 or calls < 0 or 4 * n > len(raw) - position:
                raise ValueError(f"{name} claims {n:,} values")
            entries[name] = Entry(np.frombuffer(raw, "<f4", n, position).reshape(1, -1), np.array([calls]))
            position += 4 * n
        if not entries:
            raise ValueError("no entries")
        n_chunks = take("i") if position < len(raw) else 0
        dataset = take(f"{take('i')}s").decode("utf-8", "replace") if position < len(raw) else ""
    except (struct.error, ValueError) as error:
        raise ImatrixError(f"not an importance matrix ({error})", where=path, hint=COLLECT) from error
    return ImportanceMatrix(entries, (dataset,) if dataset else (), n_chunks, 0, str(path))


# ---- collecting ----


class Collector:
    """Hears about every node that llama.cpp evaluates and sums the squares of what enters the products."""

    def __init__(self) -> None:
        import llama_cpp.llama_cpp as api

        self.callback = api.ggml_backend_sched_eval_callback(self._hear)
        void, size = ctypes.c_void_p, ctypes.c_size_t
        self._copy = ggml_function("ggml_backend_tensor_get", None, void, void, size, size)
        self._nbytes = ggml_function("ggml_nbytes", size, void)
        codes = _op_codes()
        self._dense, self._routed = codes["MUL_MAT"], codes["MUL_MAT_ID"]
        self._sums: dict[str, Array] = {}
        self._counts: dict[str, Array] = {}
        self._error: BaseException | None = None

    def matrix(self, datasets: Sequence[str], chunk_count: int, chunk_size: int) -> ImportanceMatrix:
        """What was collected.

        Raises:
            ImatrixError: a node could not be read, nothing was collected, or values are not finite.
        """
        if self._error is not None:
            raise ImatrixError(
                f"the collector failed ({self._error})", hint="report the architecture"
            ) from self._error
        entries = {
            name: Entry(sums.astype(np.float32).reshape(len(counts), -1), counts)
            for name, sums in self._sums.items()
            for counts in [self._counts[name]]
        }
        broken = [name for name, entry in entries.items() if not np.isfinite(entry.sums).all()]
        if not entries or broken:
            what = f"{broken[0]} met values that are not finite" if broken else "no weight was used"
            raise ImatrixError(what, hint="verify the model's hash")
        return ImportanceMatrix(entries, tuple(datasets), chunk_count, chunk_size)

    def _hear(self, address: int, asks: bool, _user_data: object) -> bool:
        """llama.cpp asks about a node, and comes again once it is computed; no exception may pass through."""
        if self._error is None:
            try:
                node = Tensor.from_address(address)
                return self._wants(node) if asks else self._take(node)
            except Exception as error:
                self._error = error
        return not asks

    def _wants(self, node: Any) -> bool:
        if node.op == self._routed:
            return True
        if node.op != self._dense:
            return False
        rows = Tensor.from_address(node.src[1])
        weight = Tensor.from_address(node.src[0])
        return rows.ne[1] >= LEAST_ROWS and rows.type == 0 and _name(weight).startswith("blk.")

    def _take(self, node: Any) -> bool:
        weight, rows = (Tensor.from_address(node.src[i]) for i in range(2))
        if node.op == self._routed:
            self._take_routed(
                _name(weight),
                weight.ne[2],
                self._read(node.src[1], rows, np.float32),
                self._read(node.src[2], Tensor.from_address(node.src[2]), np.int32),
            )
        else:
            self._take_dense(_name(weight), weight, self._read(node.src[1], rows, np.float32))
        return True

    def _read(self, address: int, tensor: Any, kind: type) -> Array:
        """A tensor of the graph as an array (slowest dimension first), whichever device and strides."""
        nbytes = self._nbytes(address)
        raw = np.empty(nbytes, np.uint8)
        self._copy(address, raw.ctypes.data, 0, nbytes)
        return np.lib.stride_tricks.as_strided(raw.view(kind), tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1])

    def _take_routed(self, name: str, n_experts: int, rows: Array, ids: Array) -> None:
        """Rows ``(1, tokens, k or 1, columns)``; ids ``(1, 1, tokens, k)``: which expert each row enters."""
        rows, ids = rows[0], ids[0, 0]
        sums, counts = self._entry(name, n_experts, n_experts, rows.shape[2])
        for place in range(ids.shape[1]):
            squares = np.square(rows[:, place % rows.shape[1]], dtype=np.float64)
            order = np.argsort(ids[:, place], kind="stable")
            chosen, first, n = np.unique(ids[order, place], return_index=True, return_counts=True)
            sums[chosen] += np.add.reduceat(squares[order], first, axis=0)
            counts[chosen] += n

    def _take_dense(self, name: str, weight: Any, rows: Array) -> None:
        """Rows ``(n3, n2, n, columns)``; a weight of several matrices takes the planes in turn."""
        n_matrices = weight.ne[2] * weight.ne[3]
        sums, counts = self._entry(name, n_matrices, 1, rows.shape[3])
        squares = np.square(rows, dtype=np.float64).sum(axis=2)
        for i3, i2 in np.ndindex(squares.shape[:2]):
            sums[(i3 % weight.ne[3]) * weight.ne[2] + i2 % weight.ne[2]] += squares[i3, i2]
        counts += rows.shape[0] * rows.shape[1] * rows.shape[2] // n_matrices

    def _entry(self, name: str, n_matrices: int, n_counts: int, n_columns: int) -> tuple[Array, Array]:
        if name not in self._sums:
            self._sums[name] = np.zeros((n_matrices, n_columns))
            self._counts[name] = np.zeros(n_counts, np.int64)
        return self._sums[name], self._counts[name]


def _name(tensor: Any) -> str:
    """A tensor's name without what a device's copy puts around it (``CUDA0#name#0``)."""
    text: str = tensor.name.decode("utf-8", "replace")
    return text.split("#")[1] if "#" in text else text


@functools.cache
def _op_codes() -> dict[str, int]:
    """Ggml's codes of its operations, by name, as this build numbers them."""
    function = ggml_function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
    codes: dict[str, int] = {}
    for code in range(64):  # far fewer than there are, and as many as are sure to exist
        codes.setdefault((function(code) or b"").decode(), code)
    return codes


def collect(
    path: str | Path,
    tokens: Sequence[int],
    *,
    dataset: str,
    chunk_tokens: int = CHUNK_TOKENS,
    settings: OpenSettings | None = None,
    progress: bool = True,
) -> ImportanceMatrix:
    """Collect an importance matrix over these tokens, in chunks that each begin from a cleared context.

    As llama-imatrix does: whole chunks only, the first token of each replaced by BOS where the vocabulary
    asks for one, and every token taken through every layer.

    Args:
        path: the model, in the precision that the quantization starts from.
        dataset: what the text is called, for the file's header.

    Raises:
        ImatrixError: fewer tokens than one chunk, or a node that could not be read.
        ModelError, DecodeError: llama.cpp refuses the model, or fails.
    """
    pieces = chunks(tokens, chunk_tokens)
    if not pieces:
        raise ImatrixError(
            f"{len(tokens):,} tokens do not fill one chunk of {chunk_tokens:,}",
            hint="take a longer text, or smaller chunks",
        )
    collector = Collector()
    with default_context_params(cb_eval=collector.callback):
        model = open_model(path, replace(settings or OpenSettings(), n_ctx=chunk_tokens))
    with model:
        for piece in tqdm(pieces, desc="importance matrix", disable=not progress):
            feed_chunk(model, piece)
    return collector.matrix([dataset], len(pieces), chunk_tokens)
