"""Importance matrices: how strongly each input column of a weight is used, collected, read and written.

A low-bit quantizer weighs its error by the mean square of the activation that meets each column. llama.cpp
collects those sums with ``llama-imatrix`` through the evaluation callback; here the same callback is taken
from Python: the input of every matrix product whose weight is a tensor of a block, and for the routed experts
the rows that each expert was given. The files are llama.cpp's own (``general.type = imatrix``, and the older
``.dat``): format in its common/imatrix-loader.cpp, arithmetic in tools/imatrix/imatrix.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import whole_file
from dfqs_nb.gguf.facts import class_of, layer_of
from dfqs_nb.gguf.header import MAGIC, GGUFHeader, check_layout, read_header
from dfqs_nb.llama.graph import Tensor, ggml_function
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings, default_context_params
from dfqs_nb.routing import RecordedModel

if TYPE_CHECKING:
    import pandas as pd

CHUNK_TOKENS = 512  # llama-imatrix's default
LEAST_ROWS = 16  # llama-imatrix passes over smaller products of dense weights
SUMS, COUNTS = ".in_sum2", ".counts"
FLAT = "none (every column weighs the same)"
_MAX_LEGACY_NAME = 1024


class ImatrixError(DfqsError):
    """An importance matrix cannot be read, collected, or used."""


@dataclass(frozen=True)
class Entry:
    """One weight's sums of squares.

    Attributes:
        sums: float32 ``(matrices, columns)``: one row an expert; one row for a dense weight.
        counts: rows of activations summed, int64 ``(matrices,)``, or ``(1,)`` for all matrices together.
    """

    sums: np.ndarray
    counts: np.ndarray

    def weights(self) -> np.ndarray:
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
    """

    entries: Mapping[str, Entry] = field(repr=False)
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    path: str = ""

    def only(self, pattern: str) -> ImportanceMatrix:
        """The entries whose name contains a match of the pattern."""
        kept = {name: entry for name, entry in self.entries.items() if re.search(pattern, name)}
        return replace(self, entries=kept)

    def fitting(self, header: GGUFHeader) -> ImportanceMatrix:
        """The entries that have a value for each column (and expert) of the model's tensor of that name.

        llama-quantize refuses the others: of ``deepseek4`` those of ``attn_output_a``, whose groups of
        columns llama.cpp multiplies as matrices of their own.
        """
        sizes = {
            one.name: one.shape[0] * (one.shape[2] if len(one.shape) > 2 else 1) for one in header.tensors
        }
        kept = {name: entry for name, entry in self.entries.items() if sizes.get(name) == entry.sums.size}
        return replace(self, entries=kept)


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
        raise ImatrixError(
            f"a GGUF of type {kind}, not an importance matrix",
            where=path,
            hint="collect one with imatrix.collect, or with llama-imatrix",
        )
    tensors = {one.name: one for one in header.tensors}
    entries = {}
    for name in tensors:
        if name.endswith(SUMS):
            base = name.removesuffix(SUMS)
            if base + COUNTS not in tensors:
                raise ImatrixError(f"{base} has sums but no counts", where=path, hint="collect it again")
            sums, counts = _values(header, tensors[name]), _values(header, tensors[base + COUNTS])
            if not counts.size or sums.size % counts.size:
                raise ImatrixError(
                    f"{base} has {sums.size:,} sums for {counts.size:,} counts",
                    where=path,
                    hint="collect it again",
                )
            entries[base] = Entry(sums.reshape(counts.size, -1), np.rint(counts).astype(np.int64))
    if not entries:
        raise ImatrixError("holds no entry", where=path, hint="collect it again")
    return ImportanceMatrix(
        entries,
        tuple(header.get("imatrix.datasets", ())),
        int(header.get("imatrix.chunk_count", 0)),
        int(header.get("imatrix.chunk_size", 0)),
        str(path),
    )


def _values(header: GGUFHeader, tensor: Any) -> np.ndarray:
    if tensor.type != "F32":
        raise ImatrixError(
            f"{tensor.name} is {tensor.type}, not F32", where=header.path, hint="collect it again"
        )
    at = header.data_offset + tensor.offset
    return np.fromfile(header.path, np.float32, tensor.n_elements, offset=at)


def _read_legacy(path: Path) -> ImportanceMatrix:
    """The format before GGUF: a count of entries, each with name, calls and means; then chunks, dataset."""
    raw, position = path.read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal position
        value = struct.unpack_from("<" + form, raw, position)
        position += struct.calcsize("<" + form)
        return value[0] if len(value) == 1 else value

    entries: dict[str, Entry] = {}
    try:
        n_entries = take("i")
        for _ in range(n_entries):
            length = take("i")
            if not 0 < length <= _MAX_LEGACY_NAME:
                raise ValueError(f"a name of {length:,} bytes")
            name = take(f"{length}s").decode("utf-8")
            calls, n = take("i"), take("i")
            if n < 1 or calls < 0 or 4 * n > len(raw) - position:
                raise ValueError(f"{name} claims {n:,} values")
            sums = np.frombuffer(raw, "<f4", n, position).reshape(1, -1)
            entries[name] = Entry(sums, np.array([calls], np.int64))
            position += 4 * n
        if not entries:
            raise ValueError("no entries")
        chunks = take("i") if position < len(raw) else 0
        dataset = take(f"{take('i')}s").decode("utf-8", "replace") if position < len(raw) else ""
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise ImatrixError(
            f"not an importance matrix ({error})",
            where=path,
            hint="collect one with imatrix.collect, or with llama-imatrix",
        ) from error
    return ImportanceMatrix(entries, (dataset,) if dataset else (), chunks, 0, str(path))


def write_imatrix(path: str | Path, matrix: ImportanceMatrix) -> ImportanceMatrix:
    """Write a GGUF that llama-quantize and llama-imatrix read, whole or not at all; the matrix with its path."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def add_architecture(self) -> None:
            """None: it is not a model."""

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "imatrix.gguf"
        writer = Writer(made, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(matrix.datasets) or ["not stated"])
        writer.add_uint32("imatrix.chunk_count", matrix.chunk_count)
        writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
        for name, entry in sorted(matrix.entries.items()):
            writer.add_tensor(name + SUMS, entry.sums.reshape(len(entry.counts), -1).astype(np.float32))
            writer.add_tensor(name + COUNTS, entry.counts.astype(np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with whole_file(path, "wb") as file, made.open("rb") as finished:
            shutil.copyfileobj(finished, file)
    return replace(matrix, path=str(path))


def flat(header: GGUFHeader) -> ImportanceMatrix:
    """A matrix in which every column weighs the same: what a quantization without one would be.

    llama.cpp refuses the lowest types without a matrix, so their quality without one is measured with this.
    """
    entries = {}
    for one in header.tensors:
        if len(one.shape) > 1 and layer_of(one.name) is not None:
            n = one.shape[2] if len(one.shape) > 2 else 1
            entries[one.name] = Entry(np.ones((n, one.shape[0]), np.float32), np.ones(n, np.int64))
    return ImportanceMatrix(entries, (FLAT,), 0, 0, FLAT)


def coverage(matrix: ImportanceMatrix) -> pd.DataFrame:
    """How well each entry was fed, one row a weight.

    Columns ``weight``, ``class``, ``layer``, ``matrices`` (experts), ``least`` and ``most`` rows counted in
    one of them, ``unused`` (experts never chosen), and ``top_tenth``: the share of the squares that lies in
    the tenth of the columns with the largest.
    """
    import pandas as pd

    rows = []
    for name, entry in sorted(matrix.entries.items()):
        columns = np.sort(entry.sums.sum(axis=0))[::-1]
        top = columns[: max(1, len(columns) // 10)].sum() / max(columns.sum(), 1e-30)
        layer = layer_of(name)
        rows.append(
            {
                "weight": name,
                "class": class_of(name),
                "layer": -1 if layer is None else layer,
                "matrices": len(entry.counts),
                "least": int(entry.counts.min()),
                "most": int(entry.counts.max()),
                "unused": int((entry.counts == 0).sum()),
                "top_tenth": float(top),
            }
        )
    return pd.DataFrame(rows)


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
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}
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

    def _read(self, address: int, tensor: Any, kind: type) -> np.ndarray:
        """A tensor of the graph as an array (slowest dimension first), whichever device and strides."""
        nbytes = self._nbytes(address)
        raw = np.empty(nbytes, np.uint8)
        self._copy(address, raw.ctypes.data, 0, nbytes)
        return np.lib.stride_tricks.as_strided(raw.view(kind), tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1])

    def _take_routed(self, name: str, n_experts: int, rows: np.ndarray, ids: np.ndarray) -> None:
        """Rows ``(1, tokens, k or 1, columns)``; ids ``(1, 1, tokens, k)``: which expert each row enters."""
        rows, ids = rows[0], ids[0, 0]
        sums, counts = self._entry(name, n_experts, n_experts, rows.shape[2])
        for place in range(ids.shape[1]):
            squares = np.square(rows[:, place % rows.shape[1]], dtype=np.float64)
            order = np.argsort(ids[:, place], kind="stable")
            chosen, first, n = np.unique(ids[order, place], return_index=True, return_counts=True)
            sums[chosen] += np.add.reduceat(squares[order], first, axis=0)
            counts[chosen] += n

    def _take_dense(self, name: str, weight: Any, rows: np.ndarray) -> None:
        """Rows ``(n3, n2, n, columns)``; a weight of several matrices takes the planes in turn."""
        n_matrices = weight.ne[2] * weight.ne[3]
        sums, counts = self._entry(name, n_matrices, 1, rows.shape[3])
        squares = np.square(rows, dtype=np.float64).sum(axis=2)
        for i3, i2 in np.ndindex(squares.shape[:2]):
            sums[(i3 % weight.ne[3]) * weight.ne[2] + i2 % weight.ne[2]] += squares[i3, i2]
        counts += rows.shape[0] * rows.shape[1] * rows.shape[2] // n_matrices

    def _entry(
        self, name: str, n_matrices: int, n_counts: int, n_columns: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._sums:
            self._sums[name] = np.zeros((n_matrices, n_columns))
            self._counts[name] = np.zeros(n_counts, np.int64)
        return self._sums[name], self._counts[name]


def _name(tensor: Any) -> str:
    """A tensor's name without what a device's copy puts around it (``CUDA0#name#0``)."""
    text = tensor.name.decode("utf-8", "replace")
    return text.split("#")[1] if "#" in text else text


@functools.cache
def _op_codes() -> dict[str, int]:
    """ggml's codes of its operations, by name, as this build numbers them."""
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
        ModelError, DecodeError: as ``open_model`` and ``Model.decode``.
    """
    pieces = chunks(tokens, chunk_tokens)
    if not pieces:
        raise ImatrixError(
            f"{len(tokens):,} tokens do not fill one chunk of {chunk_tokens:,}",
            hint="take a longer text, or smaller chunks",
        )
    settings = replace(settings or OpenSettings(), n_ctx=chunk_tokens)
    collector = Collector()
    with default_context_params(cb_eval=collector.callback):
        model = open_model(path, settings)
    with model:
        for piece in tqdm(pieces, desc="importance matrix", disable=not progress):
            feed_chunk(model, piece)
    return collector.matrix([dataset], len(pieces), chunk_tokens)


def chunks(tokens: Sequence[int], size: int, limit: int | None = None) -> list[list[int]]:
    """Whole pieces of ``size`` tokens, in order; what is left over is not used.

    >>> chunks([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4]]
    """
    pieces = [list(tokens[at : at + size]) for at in range(0, len(tokens) - size + 1, size)]
    return pieces[:limit]


def feed_chunk(model: Model | RecordedModel, piece: Sequence[int]) -> np.ndarray:
    """Evaluate one chunk from a cleared context, BOS in place of its first token where the vocabulary adds
    one; the logits after each token, float32 ``(n, n_vocab)``, copied."""
    recorded = model if isinstance(model, RecordedModel) else RecordedModel(model, None)
    llama = recorded.model._open()
    bos = llama.token_bos() if llama._model.add_bos_token() else -1
    piece = [bos, *piece[1:]] if bos >= 0 else list(piece)
    recorded.model.clear()
    step = recorded.model.settings.n_batch
    parts = [recorded.feed(piece[at : at + step]).copy() for at in range(0, len(piece), step)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
