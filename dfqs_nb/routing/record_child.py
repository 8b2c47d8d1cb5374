"""The child process of an experiment: it loads one file once and records one run after another.

A module of its own, because ``python -m`` wants one that the package has not imported yet.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from dfqs_nb.core import child
from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.routing.plan import LOAD_OUTPUT, LOAD_TOKENS, N_SEQUENCES, PROFILE_TOKENS, Condition
from dfqs_nb.routing.recorded import RecordedModel, Together, open_recorded, record
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
            job: ``path``, ``condition``, ``file`` (of the trace), ``passage``, ``n_tokens``, ``texts`` and
                ``n_output``.
        """
        started, condition = time.monotonic(), TypeAdapter(Condition).validate_python(job["condition"])
        if self._opened is None:
            child.tell(stage="while loading it")
            opening = open_recorded(job["path"], condition.settings, trial=False)
            recorded = self._stack.enter_context(opening)
            self._opened = recorded, *_tokens(recorded.model, job)
        recorded, tokens, lines = self._opened
        if not job["file"]:
            child.tell(stage="while measuring its speed")
            clock = [started, time.monotonic()]
            for part in (tokens[:PROBE_TOKENS], tokens[:1], tokens[:1]):
                recorded.feed(part)
                clock.append(time.monotonic())
            load, prefill, _, decode = np.diff(clock).tolist()
            lengths = {"text": len(tokens), "answer": job["n_output"], "profile": sum(map(len, lines))}
            return {"load": load, "prefill": prefill / PROBE_TOKENS, "decode": decode, **lengths}
        child.tell(stage=f"while evaluating {condition.name!r}")
        n_sequences = N_SEQUENCES if condition.texts else 1
        recorded.reopen(condition.settings, n_sequences=n_sequences, unified=condition.unified)
        about = {"condition": condition.name, "scale": condition.scale}
        if condition.texts or condition.kind == "profile":
            trace = _short_texts(recorded, condition, lines, job["texts"], about)
        else:
            tokens = tokens[:1] + tokens[len(tokens) + 1 - round(len(tokens) * condition.scale) :]
            trace = record(recorded, tokens, condition.n_prefill, n_output=job["n_output"], **about)
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


def _short_texts(
    recorded: RecordedModel,
    condition: Condition,
    lines: list[list[int]],
    texts: list[dict[str, str]],
    about: dict[str, Any],
) -> Trace:
    """The trace of all texts of the profile, or of one load, one after another."""
    numbers = condition.texts or range(len(lines))
    if condition.texts:
        n = max(2, round(LOAD_TOKENS * condition.scale))
        # a text that is too short begins again
        lines = [(lines[i] * (n // len(lines[i]) + 1))[:n] for i in numbers]
        batches = [lines] if condition.arrivals else [[line] for line in lines]
        together, order, first = (
            Together(recorded),
            condition.arrivals or [0],
            condition.n_prefill or 1,
        )
        parts = [together.record(batch, order, first, LOAD_OUTPUT) for batch in batches]
    else:
        lines = [line[: max(1, round(len(line) * condition.scale))] for line in lines]
        parts = [record(recorded, line, logits=False) for line in lines]
    named = {
        "sequences": [texts[i]["name"] for i in numbers],
        "domains": [texts[i]["domain"] for i in numbers],
    }
    load = condition.load if condition.arrivals else "alone"
    return joined(parts, **about, **named, lengths=list(map(len, lines)), load=load)


if __name__ == "__main__":
    child.serve(Recording().work)
