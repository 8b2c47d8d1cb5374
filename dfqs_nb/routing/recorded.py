"""A model with a recorder: open it, change its context, evaluate one sequence or several."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dfqs_nb.llama.build import LOG, default_params, refusal, set_context
from dfqs_nb.llama.graph import Watch, interrupts_held
from dfqs_nb.llama.model import DecodeError, Model, open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing.recorder import Recorder, RoutingError
from dfqs_nb.routing.trace import Trace


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
        """Evaluate at most ``n_batch`` tokens; the logits after each, float32 ``(n, n_vocab)``, a view.

        We ask for the logits of every token, because llama.cpp routes only those through its last layer.
        Errors: those of `Model.logits`, and a `RoutingError` where a layer's routing was not seen.
        """
        self.recorder.begin(len(tokens))
        rows = next(self.model.logits(tokens))
        self.recorder.end()
        return rows

    def trace(self, tokens: Sequence[int], **conditions: Any) -> Trace:
        """The trace of these tokens, of everything since `clear`."""
        header = self.model.header
        identity = {
            "name": header.get("general.name", self.model.path.stem),
            "architecture": header.architecture,
            "first_file_bytes": header.file_size,
            "header_sha256": hashlib.sha256(header.raw).hexdigest(),
        }
        about = {"model": identity, **self.model.conditions(), **conditions}
        arrays = {"tokens": np.asarray(tokens, np.int32), **self.recorder.arrays()}
        return Trace(**arrays, conditions=about)


@contextmanager
def open_recorded(
    path: str | Path, settings: OpenSettings | None = None, *, trial: bool = True
) -> Iterator[RecordedModel]:
    """Open a model with a recorder; arguments and errors as ``open_model``."""
    recorder = Recorder()
    with default_params(cb_eval=recorder.callback):
        model = open_model(path, settings, trial=trial)
    model.keep_lock = True  # a callback that need not take Python's lock costs half as much
    with model:
        yield RecordedModel(model, recorder)


def calls(n_tokens: int, n_prefill: int | None, n_batch: int) -> list[range]:
    """Index ranges of the calls: the first ``n_prefill`` tokens (None: all) in batches, the others one by one.

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
    n_output: int = 0,
    **conditions: Any,
) -> Trace:
    """Evaluate these tokens from a cleared context, as `calls` says, and return what the routers chose.

    With ``logits``, each token's digest and a sample of its logits are kept. Then it goes on greedily for up
    to ``n_output`` tokens. ``conditions`` are kept in the trace. Errors: those of `RecordedModel.feed`.
    """
    model, token, output = recorded.model, -1, list[int]()
    recorded.clear()
    for call in calls(len(tokens), n_prefill, model.settings.n_batch):
        rows = recorded.feed(tokens[call.start : call.stop])
        token = int(rows[-1].argmax())
        if logits:
            recorded.recorder.keep_logits(rows)
    room = min(n_output, model.settings.n_ctx - model.n_past)
    while len(output) < room and not model.ends(token):
        output.append(token)
        token = int(next(model.logits([token]))[0].argmax())  # not recorded
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

    The order in which llama.cpp evaluates a batch decides which routed row belongs to which sequence. It
    depends on the architecture's cache, so two small batches find the rule (or a `RoutingError`), and every
    batch is checked against the tokens that the graph really evaluates.
    """

    def __init__(self, recorded: RecordedModel) -> None:
        self.recorded, self.recorder = recorded, recorded.recorder
        params, possible = recorded.model.llama.context_params, ["simple", "sequential", "equal"]
        self._n_ubatch = params.n_ubatch
        for slots in ([0, 0, 0, 1], [0, 0, 0, params.n_seq_max - 1]) if params.n_seq_max > 1 else ():
            recorded.clear()
            seen = self.decode(slots, [0, 1, 2, 3], [0, 1, 2, 0])[1].tolist()
            possible = [rule for rule in possible if cut(slots, self._n_ubatch, rule) == seen]
        if not possible:
            raise RoutingError("llama.cpp cuts batches in an unknown way", hint="report the architecture")
        self.rule = possible[0]
        recorded.clear()

    def decode(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Any:
        """One ``llama_decode`` of entries: their logits, a view, and the tokens in the order evaluated.

        A `DecodeError` where llama.cpp fails.
        """
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
        self.recorder.begin(n, inputs=True)
        with interrupts_held():
            status = api.llama_decode(model.llama.ctx, batch)
        if status != 0:
            what = f"llama_decode returned {status} on a batch of {len(set(slots))} sequences"
            raise DecodeError(f"{what} ({'; '.join(LOG.tail(2))})", where=model.path, hint="lower n_ctx")
        seen = self.recorder.end()
        return np.ctypeslib.as_array(model.llama._ctx.get_logits(), shape=(n, model.n_vocab)), seen

    def record(
        self, texts: Sequence[Sequence[int]], arrivals: Sequence[int], n_prefill: int, n_output: int
    ) -> Trace:
        """Evaluate equally long texts side by side, as a server does: the trace of all, one after another.

        ``texts`` are the tokens of the sequences 0, 1, ..., and ``arrivals`` the steps in which they come. In
        every step each text that has arrived hands over its first ``n_prefill`` tokens, or its next token.
        After its last token it goes on greedily for up to ``n_output`` tokens.
        """
        model, n, places = self.recorded.model, len(texts[0]), list[np.ndarray]()
        self.recorded.clear()
        lines = [list(text) for text in texts]  # they get their answers
        done, active, step = [0] * len(texts), set(range(len(texts))), 0
        while active:
            ready = [slot for slot in sorted(active) if arrivals[slot] <= step]
            step += 1
            ends = {slot: done[slot] + 1 if done[slot] else n_prefill for slot in ready}
            entries = [(slot, at) for slot, end in ends.items() for at in range(done[slot], end)]
            if not entries:
                continue
            slots, positions = zip(*entries, strict=True)
            tokens = [lines[slot][at] for slot, at in entries]
            rows, seen = self.decode(slots, tokens, positions)
            order = np.array(cut(slots, self._n_ubatch, self.rule))
            if not np.array_equal(np.array(tokens)[order], seen):
                raise RoutingError(
                    "llama.cpp cut a batch in an unexpected way", hint="report the architecture"
                )
            self.recorder.keep_logits(rows[order])
            places.append(np.array(entries)[order])
            best = dict(zip(slots, rows.argmax(axis=1).tolist(), strict=True))  # after the last entry of each
            for slot, end in ends.items():
                done[slot], going_on = end, end < n
                if not going_on and n_output and not model.ends(best[slot]):
                    lines[slot].append(best[slot])
                    going_on = len(lines[slot]) - n < n_output
                if not going_on:
                    active.remove(slot)
        place = np.concatenate(places)
        order = np.lexsort((place[:, 1], place[:, 0]))
        order = order[place[order, 1] < n]  # answers are not part of the trace
        output = np.full((len(lines), n_output), -1, np.int32)
        for slot, line in enumerate(lines):
            output[slot, : len(line) - n] = line[n:]
        trace = self.recorded.trace([0] * len(place), rule=self.rule).rows(order)
        return replace(trace, tokens=np.array(texts, np.int32).ravel(), output=output)
