"""The child process of an experiment: it loads one file once and records one run after another.

A module of its own, because ``python -m`` wants one that the package has not imported yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from pydantic import TypeAdapter

from dfqs_nb.core import child
from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.routing.plan import LOAD_OUTPUT, LOAD_TOKENS, PROFILE_TOKENS, Condition
from dfqs_nb.routing.recorded import RecordedModel, Together, open_recorded, record, record_together
from dfqs_nb.routing.trace import Trace, joined

PROBE_TOKENS = 8
QUESTION = "What is the capital of France?"


class Recording:
    """The model of this process, which its first job opens, and the texts in the model's tokens."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._opened: tuple[RecordedModel, list[int], list[list[int]]] | None = None

    def work(self, job: dict[str, Any]) -> dict[str, Any]:
        """Record a run in a context of its own, and write its trace; without a ``file``, measure the speed.

        Args:
            job: ``path``, ``condition`` (scaled), ``file``, ``about`` (what the trace's conditions get:
                ``condition``, ``key`` and ``scale``), ``passage``, ``n_tokens``, ``texts`` and ``n_output``.
        """
        started, condition = time.monotonic(), TypeAdapter(Condition).validate_python(job["condition"])
        if self._opened is None:
            child.tell(stage="while loading it")
            opening = open_recorded(job["path"], condition.settings, trial=False)
            recorded = self._stack.enter_context(opening)
            self._opened = recorded, *_tokens(recorded.model, job)
        loaded = time.monotonic() - started
        recorded, tokens, lines = self._opened
        if not job["file"]:
            child.tell(stage="while measuring its speed")
            lengths = len(tokens), job["n_output"], sum(map(len, lines))
            return {"costs": [loaded, *_speeds(recorded, tokens), *lengths]}
        child.tell(stage=f"while evaluating {condition.name!r}")
        recorded.reopen(condition.settings, n_sequences=condition.n_sequences, unified=condition.unified)
        recorded.required().keep_scores = condition.name == "prefill" or condition.kind == "weights"
        scale = job["about"]["scale"]
        if condition.texts or condition.kind == "profile":
            trace = _short_texts(recorded, condition, lines, job)
        else:
            tokens = tokens[:1] + tokens[len(tokens) + 1 - round(len(tokens) * scale) :]
            trace = record(recorded, tokens, condition.schedule, n_output=job["n_output"], **job["about"])
        trace.save(job["file"])
        return {}


def _tokens(model: Model, job: dict[str, Any]) -> tuple[list[int], list[list[int]]]:
    """The long text, and the short ones.

    The long one is the passage, again and again as needed, and at the end a question in the model's chat
    template, so that the greedy continuation is an answer.
    """
    given = [job["passage"], *(text["text"] for text in job["texts"])]
    passage, *lines = (model.tokenize(text, special=False) for text in given)
    plain = model.tokenize(QUESTION, special=False)
    question = chat_prompt(model, QUESTION) if model.has_template else plain
    bos, left = model.with_bos([]), job["n_tokens"] - len(question)
    if left < 1 + len(bos) or not all([passage, *lines]):
        what = f"{job['n_tokens']} tokens do not hold the question ({len(question)})"
        raise ModelError(what, where=job["path"], hint=f"use n_tokens={len(question) + 64} or more")
    tokens = [*bos, *(passage * (left // len(passage) + 1))][:left] + question
    return tokens, [[*bos, *line][:PROFILE_TOKENS] for line in lines]


def _speeds(recorded: RecordedModel, tokens: Sequence[int]) -> tuple[float, float]:
    """Seconds of a token in prefill, and in decode."""
    clock = [time.monotonic()]
    for part in (tokens[:PROBE_TOKENS], tokens[:1], tokens[:1]):
        recorded.feed(part)
        clock.append(time.monotonic())
    return (clock[1] - clock[0]) / PROBE_TOKENS, clock[3] - clock[2]


def _short_texts(
    recorded: RecordedModel, condition: Condition, lines: Sequence[list[int]], job: dict[str, Any]
) -> Trace:
    """The trace of all texts of the profile, or of one load, one after another."""
    numbers, scale = condition.texts or range(len(lines)), job["about"]["scale"]
    if condition.texts:
        n = max(2, round(LOAD_TOKENS * scale))
        # a text that is too short begins again
        lines = [(lines[i] * (n // len(lines[i]) + 1))[:n] for i in numbers]
        batches, order = ([lines], condition.arrivals) if condition.arrivals else ([[x] for x in lines], [0])
        together, first = Together(recorded), condition.schedule.prefill or 1
        parts = [record_together(together, batch, order, first, LOAD_OUTPUT) for batch in batches]
    else:
        lines = [line[: max(1, round(len(line) * scale))] for line in lines]
        parts = [record(recorded, line, logits=False) for line in lines]
    texts = [job["texts"][number] for number in numbers]
    named = {"sequences": [text["name"] for text in texts], "domains": [text["domain"] for text in texts]}
    load = condition.load if condition.arrivals else "alone"
    return joined(parts, **job["about"], **named, lengths=list(map(len, lines)), load=load)


if __name__ == "__main__":
    child.serve(Recording().work)
