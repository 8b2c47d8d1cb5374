"""Importance matrices: how strongly each input column of a weight is used, collected, read and written.

The files are llama.cpp's own: format in its common/imatrix-loader.cpp, arithmetic in
tools/imatrix/imatrix.cpp. Like llama-imatrix we sum the squares of activations in the evaluation callback.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb.core import display, files, journal
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.facts import class_of
from dfqs_nb.gguf.header import GGUFHeader, check_layout, read_header
from dfqs_nb.gguf.shards import Files, open_shards
from dfqs_nb.ladder.divergence import Array, Text, load_text
from dfqs_nb.llama.build import default_params
from dfqs_nb.llama.graph import Tensor, ggml_function, read
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings, llama_version, threads_for

CHUNK_TOKENS = 512  # llama-imatrix's default
LEAST_ROWS = 16  # llama-imatrix passes over smaller products of dense weights
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Entry:
    """One weight's sums of squares."""

    sums: Array  # float32 ``(matrices, columns)``, one row an expert, or one for a dense weight
    counts: Array  # rows of activations summed, int64 ``(matrices,)``, or ``(1,)`` for all together

    def weights(self) -> Array:
        """Mean squares, float32 and flat, as llama-quantize hands them over; 1 where nothing was counted.

        >>> entry = Entry(np.array([[2.0, 4.0], [0.0, 0.0]], np.float32), np.array([2, 0]))
        >>> entry.weights().tolist()
        [1.0, 2.0, 1.0, 1.0]
        """
        count = self.counts.astype(np.float32)[:, None]
        return np.where(count > 0, self.sums / np.maximum(count, 1), 1).astype(np.float32).ravel()


@dataclass(frozen=True)
class ImportanceMatrix:
    """An importance matrix: ``entries`` by the weight's name, and the texts, chunks and file it comes from.

    A `DfqsError`: a value is negative or not finite, for which llama.cpp would blame the model's weights.
    """

    entries: Mapping[str, Entry] = field(repr=False)
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    path: str = ""

    def __post_init__(self) -> None:
        for name, entry in self.entries.items():
            if not (np.isfinite(entry.sums).all() and (entry.sums >= 0).all() and (entry.counts >= 0).all()):
                what = f"the importance matrix has values for {name} that are not finite or negative"
                hint = "collect it again; if that repeats, get the model again"
                raise DfqsError(what, where=self.path or None, hint=hint)

    def fitting(self, header: GGUFHeader, pattern: re.Pattern[str]) -> list[str]:
        """The names of the entries that a model's tensors can use, and whose name contains a match.

        llama-quantize refuses an entry that has not a value for each column (and expert) of its tensor, as of
        ``attn_output_a`` of ``deepseek4``, whose columns llama.cpp multiplies in groups. A `DfqsError`: most
        entries do not fit.
        """
        sizes = {t.name: t.shape[0] * (t.shape[2] if len(t.shape) > 2 else 1) for t in header.tensors}
        odd = [name for name, entry in self.entries.items() if sizes.get(name) != entry.sums.size]
        if 2 * len(odd) > len(self.entries):
            what = f"{len(odd):,} of {len(self.entries):,} entries, as of {odd[0]}, do not fit this model"
            what = f"the importance matrix is of another model: {what}"
            hint = "collect one on this model: `--calibrate calibration-nano` does, or llama-imatrix"
            raise DfqsError(what, where=self.path or None, hint=hint)
        return [name for name in self.entries if pattern.search(name) and name not in odd]

    def coverage(self) -> pd.DataFrame:
        """By weight: the fewest and the most rows counted in one of its matrices, and how many had none."""
        counts = [(name, entry.counts) for name, entry in sorted(self.entries.items())]
        rows = [(name, class_of(name), len(n), n.min(), n.max(), (n == 0).sum()) for name, n in counts]
        return pd.DataFrame(rows, columns=["weight", "class", "matrices", "least", "most", "unused"])

    def save(self, path: str | Path) -> ImportanceMatrix:
        """Write a GGUF that llama-quantize and llama-imatrix read; the matrix with its path."""
        import gguf

        with files.whole_path(path) as part:
            writer = gguf.GGUFWriter(part, "imatrix")
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", list(self.datasets) or ["not stated"])
            writer.add_uint32("imatrix.chunk_count", self.chunk_count)
            writer.add_uint32("imatrix.chunk_size", self.chunk_size)
            for name, entry in sorted(self.entries.items()):
                writer.add_tensor(name + SUMS, entry.sums)
                writer.add_tensor(name + COUNTS, entry.counts.astype(np.float32)[:, None])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return replace(self, path=str(path))


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read an importance matrix of llama.cpp in GGUF; a `DfqsError` if the file is none."""
    header = read_header(path)
    check_layout(header)

    def broken(what: str) -> DfqsError:
        hint = "collect one with llama-imatrix, or with --calibrate"
        return DfqsError(f"not an importance matrix ({what})", where=path, hint=hint)

    if header.get("general.type") != "imatrix":
        raise broken(f"a GGUF of type {header.get('general.type', header.architecture or 'unknown')}")
    tensors = {tensor.name: tensor for tensor in header.tensors}

    def values(name: str) -> Array:
        if name not in tensors or tensors[name].type != "F32":
            raise broken(f"{name} is missing or not F32")
        at = header.data_offset + tensors[name].offset
        return np.fromfile(path, np.float32, tensors[name].n_elements, offset=at)

    entries = {}
    for base in [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]:
        sums, counts = values(base + SUMS), values(base + COUNTS)
        if not counts.size or sums.size % counts.size:
            raise broken(f"{base} has {sums.size:,} sums for {counts.size:,} counts")
        counts = np.where(np.isfinite(counts), np.rint(counts), -1)
        entries[base] = Entry(sums.reshape(counts.size, -1), counts.astype(np.int64))
    if not entries:
        raise broken("it holds no entry")
    n, size = (header.count(f"imatrix.chunk_{name}") for name in ("count", "size"))
    return ImportanceMatrix(entries, tuple(map(str, header.get("imatrix.datasets", []))), n, size, str(path))


class Collector:
    """Receives every node that llama.cpp evaluates, and sums the squares of what enters the products.

    ``totals``: sums and counts by the weight's name, as of `Entry`. ``error``: why a node could not be read.
    """

    def __init__(self) -> None:
        import llama_cpp.llama_cpp as api

        self.callback = api.ggml_backend_sched_eval_callback(self._hear)
        self.totals: dict[str, tuple[Array, Array]] = {}
        self.error: BaseException | None = None
        name_of = ggml_function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
        names = [name_of(code) for code in range(64)]  # fewer than there are: all of these are sure to exist
        self._dense, self._routed = names.index(b"MUL_MAT"), names.index(b"MUL_MAT_ID")

    def _hear(self, address: int, asks: bool, _user_data: object) -> bool:
        """llama.cpp asks about a node, and comes again once it is computed; no exception may pass through."""
        if self.error is None:
            try:
                node = Tensor.from_address(address)
                return self._wants(node) if asks else self._take(node)
            except Exception as error:
                self.error = error
        return not asks

    def _wants(self, node: Any) -> bool:
        if node.op != self._dense:
            return bool(node.op == self._routed)
        weight, rows = (Tensor.from_address(node.src[i]) for i in range(2))
        return rows.ne[1] >= LEAST_ROWS and rows.type == 0 and _name(weight).startswith("blk.")

    def _take(self, node: Any) -> bool:
        """Add the rows ``(n3, n2, n, columns)`` that enter a weight, by expert, or plane by plane."""
        weight, rows = Tensor.from_address(node.src[0]), read(node.src[1], np.float32)
        routed, n = node.op == self._routed, weight.ne[2] * weight.ne[3]
        empty = np.zeros((n, rows.shape[3])), np.zeros(n if routed else 1, np.int64)
        sums, counts = self.totals.setdefault(_name(weight), empty)
        if routed:  # of each token, the row for the expert at each place, or one row for all
            ids = read(node.src[2], np.int32)[0, 0]  # (tokens, k)
            for place in range(ids.shape[1]):
                np.add.at(sums, ids[:, place], np.square(rows[0, :, place % rows.shape[2]], dtype=np.float64))
            counts += np.bincount(ids.ravel(), minlength=n)
            return True
        planes = np.square(rows, dtype=np.float64).sum(axis=2).reshape(-1, rows.shape[3])
        for number, plane in enumerate(planes):  # a weight of several matrices takes them in turn
            sums[number % n] += plane
        counts += len(planes) * rows.shape[2] // n
        return True


def _name(tensor: Any) -> str:
    """A tensor's name without what a device's copy puts around it (``CUDA0#name#0``)."""
    return re.sub("[^#]*#([^#]*).*", r"\1", tensor.name.decode("utf-8", "replace"))


def collect(
    source: Files,
    text: Text | str,
    path: str | Path,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    n_chunks: int = 24,
    n_threads: int = 0,
    fresh: bool = False,
    overwrite: bool = False,
) -> ImportanceMatrix:
    """Collect an importance matrix over a text, in whole chunks that each begin from a cleared context.

    ``source``: the model, in the precision that the quantization starts from. ``text``: or the name of a
    prompt set or a text file. ``path``: the file that it is written to; one from the same text and model is
    read, unless ``fresh``; any other stays, unless ``overwrite``. ``n_chunks``: the most; 0: all.
    ``n_threads``: 0: as suits the model's size. A `DfqsError`: there is no such text, it is too short, or
    another file has the name.
    """
    text, path = load_text(text, "calibration") if isinstance(text, str) else text, Path(path)
    shards = open_shards(source)
    known: dict[str, Any] = {"source": shards.sha256, "text": asdict(text)}
    known |= {"tokens": chunk_tokens, "chunks": n_chunks, "runtime": llama_version()}
    dataset = f"{text.name} {journal.conditions_hash(known)}"
    if path.exists():
        kept = None
        with suppress(DfqsError):  # it is damaged, or none
            kept = read_imatrix(path)
        if kept is None or kept.datasets != (dataset,):
            files.check_output(path, overwrite=overwrite)
        elif not fresh:
            return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    files.remove_stale(path)
    collector, n_threads = Collector(), n_threads or threads_for(shards.as_one)
    with default_params(cb_eval=collector.callback):
        model = open_model(shards, OpenSettings(n_ctx=chunk_tokens, n_threads=n_threads))
    with model:
        pieces = text.chunks(model, chunk_tokens, n_chunks)
        for piece in display.tqdm(pieces, desc="importance matrix", leave=False):
            model.clear()
            deque(model.logits(piece), maxlen=0)  # of every token: only those pass the last layer
    if collector.error or not collector.totals:
        why = f"the collector failed ({collector.error})" if collector.error else "no weight was used"
        raise DfqsError(why, hint="report the architecture") from collector.error
    totals = collector.totals.items()
    entries = {name: Entry(sums.astype("f4").reshape(len(n), -1), n) for name, (sums, n) in totals}
    return ImportanceMatrix(entries, (dataset,), len(pieces), chunk_tokens).save(path)
