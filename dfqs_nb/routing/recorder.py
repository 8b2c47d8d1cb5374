"""Read llama.cpp's graph while it is computed, and keep what the routers chose: of one sequence, or several.

At each router's node (see `llama.graph`) nothing has overwritten yet the scores that the experts were chosen
by. A stop changes how the graph is cut, so compare recorded runs only with recorded runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.llama.build import default_params, refusal, set_context
from dfqs_nb.llama.generate import next_tokens
from dfqs_nb.llama.graph import Router, Tensor, Watch, ggml_function, read
from dfqs_nb.llama.log import LOG
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing.trace import Trace

FLUSH_BYTES = 1 << 20  # of copies, before they are reduced to ids and margins
LOGIT_SAMPLE = 1024  # logits kept of each token; all of them for a small vocabulary
REPORT = "report the architecture"


@dataclass
class _Layer:
    """What one layer chose: copies of the graph's rows that are not reduced yet."""

    hashed: bool
    width: int  # ids in a row: the chosen ones, or of all experts, the best first
    ids: list[Any] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)
    n_tokens: int = 0

    def reduced(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the ``k`` chosen experts and their margins, a row a token; the copies are let go."""
        order = np.frombuffer(b"".join(self.ids), np.int32).reshape(-1, self.width)
        margins = np.full(len(order), np.nan, np.float32)
        if not self.hashed:
            scores = np.frombuffer(b"".join(self.scores), np.float32).reshape(order.shape)
            ranked = np.take_along_axis(scores, order, axis=1)  # minus infinity for excluded groups
            margins = ranked[:, :k].min(axis=1) - ranked[:, k:].max(axis=1, initial=-np.inf)
            if (margins < 0).any():
                raise DfqsError("chosen experts do not score highest", hint=REPORT)
        self.ids, self.scores = [], []
        return order[:, :k].astype(np.uint16), margins


class Recorder(Watch):
    """Receives every node that llama.cpp evaluates and keeps what the routers chose."""

    def __init__(self) -> None:
        super().__init__()
        void, size = ctypes.c_void_p, ctypes.c_size_t  # copies from whichever device holds the tensor
        self._copy = ggml_function("ggml_backend_tensor_get", None, void, void, size, size)
        self.listeners.append(self._chosen)
        self._listening = False
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded."""
        self._layers: dict[int, _Layer] = {}
        self._columns: dict[str, list[np.ndarray]] = {}  # rows in pieces, by their field of a `Trace`
        self._expected = self._raw_bytes = self._k = 0
        self._logit_ids = np.zeros(0, np.int32)

    def begin(self, n_tokens: int) -> None:
        """The next ``llama_decode`` evaluates so many tokens."""
        self._expected += n_tokens
        self._inputs: list[int] = []
        self._listening = True

    def end(self) -> list[int]:
        """Check that each layer routed every token once; the tokens in the order that llama.cpp took."""
        self._listening = False
        if self.error is not None:
            error, self.error = self.error, None
            raise DfqsError(f"the recorder failed ({error})", hint=REPORT) from error
        for number, layer in self._layers.items():
            if layer.n_tokens != self._expected:
                what = f"layer {number} routed {layer.n_tokens:,} of {self._expected:,} tokens"
                raise DfqsError(what, hint="this architecture has no common expert block once a layer")
        if self._raw_bytes > FLUSH_BYTES:
            self._reduce()
        return self._inputs

    def keep_logits(self, rows: np.ndarray) -> None:
        """Keep a digest of the logits of each token, float32 ``(n, n_vocab)``, and a sample of them."""
        ids = self._logit_ids = np.unique(np.linspace(0, rows.shape[1] - 1, LOGIT_SAMPLE).astype(np.int32))
        digests = np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows], np.uint64)
        self._add(digest=digests, logits=rows[:, ids])

    def arrays(self) -> dict[str, Any]:
        """What was recorded since `reset`, as fields of a `Trace`.

        A `DfqsError` if a choice contradicts its scores: they were overwritten before they were read.
        """
        if self._raw_bytes:
            self._reduce()
        layers, n = sorted(self._layers), self._expected
        columns: dict[str, Any] = {"experts": np.zeros((n, 0, 0), "u2"), "margin": np.zeros((n, 0), "f4")}
        columns |= {name: np.concatenate(pieces) for name, pieces in self._columns.items()}
        highest = int(columns["experts"].max(initial=0))
        return {
            "layers": np.array(layers, np.int16),
            "hashed": np.array([self._layers[layer].hashed for layer in layers], bool),
            # a row of scored ids has all experts; with hash layers alone, those that were chosen count
            "n_experts": max((max(it.width, highest + 1) for it in self._layers.values()), default=0),
            "logit_ids": self._logit_ids,
            **columns,
        }

    def _add(self, **rows: np.ndarray) -> None:
        for name, piece in rows.items():
            self._columns.setdefault(name, []).append(piece)

    def _reduce(self) -> None:
        """Turn the copies of all layers, which hold equally many tokens, into rows of columns."""
        layers = [self._layers[number].reduced(self._k) for number in sorted(self._layers)]
        experts, margins = (np.stack(parts, axis=1) for parts in zip(*layers, strict=True))
        self._add(experts=experts, margin=margins)
        self._raw_bytes = 0

    # -- called by llama.cpp: the watch keeps an exception, and end() raises it --

    def _begun(self, address: int) -> None:
        """The tokens of a graph: its first node looks up their embeddings."""
        source = Tensor.from_address(address).src[1]
        if self._listening and source and Tensor.from_address(source).name == b"inp_tokens":
            self._inputs += read(source, np.int32).ravel().tolist()

    def _chosen(self, router: Router) -> None:
        if not self._listening:
            return
        k, n, width = router.ids.ne[0], router.ids.ne[1], router.reads[0].ne[0]
        if self._k not in (0, k):
            raise DfqsError(f"layer {router.layer} chooses {k} experts, and others {self._k}")
        self._k, layer = k, self._layers.setdefault(router.layer, _Layer(router.hashed, width))
        for tensor, copies in zip(router.reads, (layer.ids, layer.scores), strict=False):
            size = 4 * n * tensor.ne[0]
            copies.append(copy := ctypes.create_string_buffer(size))
            self._copy(ctypes.addressof(tensor), copy, 0, size)
            self._raw_bytes += size
        layer.n_tokens += n


# ---- a model with a recorder ----


@dataclass
class RecordedModel:
    """An open model, and the recorder that llama.cpp calls while it computes."""

    model: Model
    recorder: Recorder

    def clear(self) -> None:
        """Empty the context, and forget what was recorded."""
        self.model.clear()
        self.recorder.reset()

    def reopen(self, settings: OpenSettings, *, n_sequences: int = 1, unified: bool = False) -> None:
        """Make another context on the loaded weights, or a `ModelError` where llama.cpp refuses the settings.

        It holds ``n_sequences`` side by side, in ``n_ctx`` tokens together, with one KV cache or a part each.
        """
        from llama_cpp._internals import LlamaContext

        model, llama = self.model, self.model.llama
        params = llama.context_params
        set_context(params, settings)
        params.n_seq_max, params.kv_unified = n_sequences, unified
        llama._ctx.close()
        LOG.install()
        try:
            llama._ctx = LlamaContext(model=llama._model, params=params, verbose=False)
        except ValueError as error:
            raise refusal(model.path) from error
        model.n_past, model.settings = 0, settings
        if (watch := Watch.behind(params.cb_eval)) is not None:  # the recorder's, or the paging help's
            watch.forget_graph()
        self.recorder.reset()

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """As `Model.logits`, of at most ``n_batch`` tokens; a `DfqsError` if a layer was not heard.

        We ask for the logits of every token, because llama.cpp routes only those through its last layer.
        """
        self.recorder.begin(len(tokens))
        rows = next(self.model.logits(tokens))
        self.recorder.end()
        return rows

    def trace(self, tokens: Sequence[int], **conditions: Any) -> Trace:
        """The trace of these tokens, of everything since `clear`."""
        name = self.model.header.text("general.name") or self.model.path.stem
        about = {"model": name, **self.model.conditions(), **conditions}
        return Trace(tokens=np.asarray(tokens, np.int32), **self.recorder.arrays(), conditions=about)


@contextmanager
def open_recorded(
    path: str | Path, settings: OpenSettings | None = None, *, trial: bool = True
) -> Iterator[RecordedModel]:
    """Open a model with a recorder; arguments and errors as ``open_model``."""
    recorder = Recorder()
    with default_params(cb_eval=recorder.callback):
        model = open_model(path, settings, trial=trial)
    with model:
        yield RecordedModel(model, recorder)


def calls(n_tokens: int, n_prefill: int | None, n_batch: int) -> list[range]:
    """Index ranges of the calls: the first ``n_prefill`` tokens (None: all) in batches, then one by one.

    >>> calls(7, 5, 4)
    [range(0, 4), range(4, 5), range(5, 6), range(6, 7)]
    """
    cut = n_tokens if n_prefill is None else min(n_prefill, n_tokens)
    batches = [range(at, min(at + n_batch, cut)) for at in range(0, cut, n_batch)]
    return batches + [range(at, at + 1) for at in range(cut, n_tokens)]


def record(
    recorded: RecordedModel,
    tokens: Sequence[int],
    n_prefill: int | None = None,
    *,
    logits: bool = True,
    restored: bool = False,
    n_output: int = 0,
    **conditions: Any,
) -> Trace:
    """Evaluate these tokens from a cleared context, as `calls` says, and return what the routers chose.

    With ``logits``, each token's digest and a sample of its logits are kept. ``restored``: the context is
    saved, cleared and restored between the calls. Then it goes on greedily for up to ``n_output`` tokens.
    ``conditions`` are kept in the trace. Errors: those of `RecordedModel.feed`.
    """
    model = recorded.model
    recorded.clear()
    for call in calls(len(tokens), n_prefill, model.settings.n_batch):
        if restored and call.start:
            model.restore(model.save())  # which clears the context
        rows = recorded.feed(tokens[call.start : call.stop])
        if logits:
            recorded.recorder.keep_logits(rows)
    answer = next_tokens(model, rows[-1], min(n_output, model.settings.n_ctx - model.n_past))  # not recorded
    output = [token for token in answer if not model.ends(token)]
    trace = recorded.trace(tokens, n_prefill=n_prefill, n_output=n_output, **conditions)
    return replace(trace, output=np.array(output, np.int32))


def cut(slots: Sequence[int], n_ubatch: int, rule: str) -> list[int]:
    """In which order llama.cpp evaluates a batch's entries, by their sequences.

    The rules are those of ``llama_batch_allocr`` in llama.cpp's src/llama-batch.cpp, without sequences that
    share tokens: ``simple`` (a unified cache) takes entries as they come; ``sequential`` (a cache a sequence)
    takes equally many of each of the sequences whose numbers follow each other, and ``equal`` of all.

    >>> cut([0, 0, 0, 1], 8, "simple"), cut([0, 0, 0, 1], 8, "sequential"), cut([0, 0, 2], 8, "equal")
    ([0, 1, 2, 3], [0, 3, 1, 2], [0, 2, 1])
    """
    if rule == "simple":
        return list(range(len(slots)))
    waiting: dict[int, list[int]] = {}
    for entry, slot in enumerate(slots):
        waiting.setdefault(slot, []).append(entry)
    order: list[int] = []
    while waiting:
        together: list[int] = []
        for slot in sorted(waiting, key=lambda slot: waiting[slot][0]):
            if len(together) <= n_ubatch and (rule == "equal" or not together or slot == together[-1] + 1):
                together.append(slot)
        n = min(min(len(waiting[slot]) for slot in together), max(1, n_ubatch // len(together)))
        for slot in together:
            order += waiting[slot][:n]
            waiting[slot] = waiting[slot][n:]
        waiting = {slot: entries for slot, entries in waiting.items() if entries}
    return order


class Together:
    """Several sequences of one context, evaluated side by side and recorded.

    Whose a routed row is follows from the order in which llama.cpp evaluates a batch. Two small batches find
    its rule (or a `DfqsError`); every batch is checked against the tokens that the graph evaluates.
    """

    def __init__(self, recorded: RecordedModel) -> None:
        self.recorded, self.recorder = recorded, recorded.recorder
        params, possible = recorded.model.llama.context_params, ["simple", "sequential", "equal"]
        self._n_ubatch = params.n_ubatch
        for last in {1, params.n_seq_max - 1} if params.n_seq_max > 1 else ():
            recorded.clear()
            slots = [0, 0, 0, last]
            _, seen = self.decode(slots, [0, 1, 2, 3], [0, 1, 2, 0])
            possible = [rule for rule in possible if cut(slots, self._n_ubatch, rule) == seen]
        if not possible:
            raise DfqsError("llama.cpp cuts batches in an unknown way", hint=REPORT)
        self.rule = possible[0]
        recorded.clear()

    def decode(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Any:
        """One ``llama_decode`` of entries: their logits, a view, and the tokens in the order evaluated."""
        import llama_cpp.llama_cpp as api

        model, n = self.recorded.model, len(tokens)
        sequence = [ctypes.pointer(api.llama_seq_id(slot)) for slot in slots]  # of each entry
        batch = api.llama_batch(
            n_tokens=n,
            token=(api.llama_token * n)(*tokens),
            pos=(api.llama_pos * n)(*positions),
            n_seq_id=(ctypes.c_int32 * n)(*[1] * n),
            seq_id=(ctypes.POINTER(api.llama_seq_id) * n)(*sequence),
            logits=(ctypes.c_int8 * n)(*[1] * n),
        )
        self.recorder.begin(n)
        model.decode_batch(batch)
        seen = self.recorder.end()
        return np.ctypeslib.as_array(model.llama._ctx.get_logits(), shape=(n, model.n_vocab)), seen

    def record(
        self, texts: Sequence[Sequence[int]], arrivals: Sequence[int], n_prefill: int, n_output: int
    ) -> Trace:
        """Evaluate equally long texts side by side, as a server does: the trace of all, one after another.

        ``arrivals``: the steps in which they come. In every step each text that has arrived hands over its
        first ``n_prefill`` tokens, or its next token; after its last, it goes on greedily for ``n_output``.
        """
        n, places, done, step = len(texts[0]), list[np.ndarray](), [0] * len(texts), 0
        self.recorded.clear()
        lines, last = [list(text) for text in texts], n + max(0, n_output - 1)  # lines get their answers
        while going := [slot for slot, line in enumerate(lines) if done[slot] < min(len(line), last)]:
            ready = [slot for slot in going if arrivals[slot] <= step]
            step += 1
            ends = {slot: done[slot] + 1 if done[slot] else n_prefill for slot in ready}
            entries = [(slot, at) for slot, end in ends.items() for at in range(done[slot], end)]
            if not entries:
                continue
            slots, positions = zip(*entries, strict=True)
            tokens = [lines[slot][at] for slot, at in entries]
            rows, seen = self.decode(slots, tokens, positions)
            order = cut(slots, self._n_ubatch, self.rule)
            if [tokens[entry] for entry in order] != seen:
                raise DfqsError("llama.cpp cut a batch unexpectedly", hint=REPORT)
            self.recorder.keep_logits(rows[order])
            places.append(np.array(entries)[order])
            best = dict(zip(slots, rows.argmax(axis=1).tolist(), strict=True))  # after the last entry of each
            for slot, end in ends.items():
                done[slot] = end
                answered = len(lines[slot]) - n
                if end >= n and answered < n_output and not self.recorded.model.ends(best[slot]):
                    lines[slot].append(best[slot])
        place = np.concatenate(places)
        kept = np.lexsort((place[:, 1], place[:, 0]))
        kept = kept[place[kept, 1] < n]  # answers are not part of the trace
        output = np.array([line[n:] + [-1] * (n + n_output - len(line)) for line in lines], np.int32)
        trace = self.recorded.trace([0] * len(place)).rows(kept)
        return replace(trace, tokens=np.array(texts, np.int32).ravel(), output=output)
