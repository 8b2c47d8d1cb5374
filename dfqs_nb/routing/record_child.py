"""The child process of an experiment: it loads one file once and records one run after another.

A module of its own, because ``python -m`` wants one that the package has not imported yet.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from pydantic import TypeAdapter

from dfqs_nb.core import child
from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing.plan import LOAD_OUTPUT, LOAD_TOKENS, N_SEQUENCES, PROFILE_TOKENS, Condition
from dfqs_nb.routing.recorder import Together, open_recorded, record
from dfqs_nb.routing.trace import Trace, joined

PROBE_TOKENS, LONG_PROBE_TOKENS, PROBE_SECONDS = 8, 64, 2.0
QUESTION = "What is the capital of France?"


class Recording:
    """The model of this process, and the texts of its jobs in the model's tokens."""

    def __init__(self, job: dict[str, Any], settings: OpenSettings) -> None:
        self._stack, self.job, started = ExitStack(), job, time.monotonic()
        self.recorded = self._stack.enter_context(open_recorded(job["path"], settings, trial=False))
        self.text, self.lines = _tokens(self.recorded.model, job)
        self.load_seconds = time.monotonic() - started

    def costs(self) -> dict[str, float]:
        """What `plan.seconds` wants to know; where tokens are fast, a longer prompt counts."""

        def seconds_a_token(n_tokens: int) -> float:
            began, part = time.monotonic(), self.text[:n_tokens]
            self.recorded.feed(part)
            return (time.monotonic() - began) / len(part)

        prefill, _, decode = map(seconds_a_token, (PROBE_TOKENS, 1, 1))
        # the first batch also starts a card's kernels, and a token costs no more in a batch than alone
        if min(prefill, decode) * LONG_PROBE_TOKENS < PROBE_SECONDS:
            prefill = min(prefill, seconds_a_token(LONG_PROBE_TOKENS))
        spent = {"load": self.load_seconds, "prefill": prefill, "decode": decode}
        lengths = {"text": len(self.text), "answer": self.job["n_output"]}
        return {**spent, **lengths, "profile": sum(map(len, self.lines))}

    def run(self, condition: Condition) -> Trace:
        """Record a run in a context of its own: of the long text, of the profile's texts, or of one load."""
        n_sequences, scale = N_SEQUENCES if condition.texts else 1, condition.scale
        self.recorded.reopen(condition.settings, n_sequences=n_sequences, unified=condition.unified)
        about: dict[str, Any] = {"condition": condition.name, "scale": scale}
        if not condition.texts and condition.kind != "profile":
            tokens = self.text[:1] + self.text[len(self.text) + 1 - round(len(self.text) * scale) :]
            about["n_output"] = self.job["n_output"]
            return record(self.recorded, tokens, condition.n_prefill, restored=condition.restored, **about)
        if condition.texts:
            n = max(2, round(LOAD_TOKENS * scale))
            # a text that is too short begins again
            lines = [(self.lines[i] * (n // len(self.lines[i]) + 1))[:n] for i in condition.texts]
            batches = [lines] if condition.arrivals else [[line] for line in lines]
            together, how = Together(self.recorded), (condition.arrivals or [0], condition.n_prefill or 1)
            parts = [together.record(batch, *how, LOAD_OUTPUT) for batch in batches]
        else:
            lines = [line[: max(1, round(len(line) * scale))] for line in self.lines]
            parts = [record(self.recorded, line, logits=False) for line in lines]
        domains = [self.job["texts"][i]["domain"] for i in condition.texts or range(len(lines))]
        return joined(parts, **about, domains=domains, lengths=list(map(len, lines)))


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


_opened = list[Recording]()  # at most one: the first job of this process loads the model for all


def work(job: dict[str, Any]) -> dict[str, float]:
    """Write the trace of a run to the job's ``file``; without one, measure the speed."""
    condition = TypeAdapter(Condition).validate_python(job["condition"])
    if not _opened:
        child.tell(stage="while loading it")
        _opened.append(Recording(job, condition.settings))
    if not job["file"]:
        child.tell(stage="while measuring its speed")
        return _opened[0].costs()
    child.tell(stage=f"while evaluating {condition.name!r}")
    _opened[0].run(condition).save(job["file"])
    return {}


if __name__ == "__main__":
    child.serve(work)
