"""The child process of an experiment: it loads one file once and records all runs that need no fresh load.

A module of its own, because ``python -m`` wants one that the package has not imported yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter

from dfqs_nb.core import child
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.routing.plan import ESSENTIAL, LOAD_OUTPUT, PROFILE_TOKENS, Condition, Costs, fit
from dfqs_nb.routing.recorded import RecordedModel, Together, open_recorded, record, record_together
from dfqs_nb.routing.trace import Trace, joined

PROBE_TOKENS = 8
QUESTION = "What is the capital of France?"


def record_job(job: dict[str, Any]) -> None:
    """Load the job's model once and record each of its runs into its file, in a context of its own.

    Args:
        job: ``path``, ``runs`` (names and files, in order), ``planned`` (conditions of all processes), their
            ``keys``, ``passage``, ``n_tokens``, ``texts``, ``n_output``, ``budget_seconds`` (0: none), what
            is left of it (``left_seconds``), and ``scale`` (0: to be found).
    """
    started, names, scale, budget = time.monotonic(), list(job["runs"]), job["scale"], job["budget_seconds"]
    planned = TypeAdapter(list[Condition]).validate_python(job["planned"])
    by_name = {condition.name: condition for condition in planned}
    child.tell(stage="while loading it")
    with open_recorded(job["path"], by_name[names[0]].settings, trial=False) as recorded:
        loaded, texts = time.monotonic() - started, _Texts(recorded.model, job)
        if not scale:
            child.tell(stage="while measuring its speed")
            costs = _costs(recorded, loaded, texts)
            scale, kept = fit(planned, costs, budget)
            child.tell(plan={"scale": scale, "kept": kept, **vars(costs)})
            names = [name for name in names if name in kept]
        for name in names:
            late = budget and time.monotonic() - started > job["left_seconds"]
            if late and by_name[name].kind not in ESSENTIAL:
                continue  # the machine is slower than it was when its speed was measured
            child.tell(stage=f"while evaluating {name!r}", begun=name)
            about, why = {"condition": name, "key": job["keys"][name], "scale": scale}, ""
            try:
                _evaluate(recorded, by_name[name].scaled(scale), texts, about).save(job["runs"][name])
            except DfqsError as error:  # refused in an orderly way: the next run has a context of its own
                why = error.what
            child.tell(done=name, why=why)


class _Texts:
    """The long text and the short ones, in the model's tokens.

    The long one is the passage, again and again as needed, and at the end a question in the model's chat
    template, so that the greedy continuation is an answer.
    """

    def __init__(self, model: Model, job: dict[str, Any]) -> None:
        self.short, self.n_output = job["texts"], job["n_output"]
        given = [job["passage"], *(text["text"] for text in self.short)]
        passage, *lines = (model.tokenize(text, special=False) for text in given)
        plain = model.tokenize(QUESTION, special=False)
        question = chat_prompt(model, QUESTION) if model.has_template else plain
        bos, left = model.with_bos([]), job["n_tokens"] - len(question)
        if left < 1 + len(bos) or not all([passage, *lines]):
            what = f"{job['n_tokens']} tokens do not hold the question ({len(question)})"
            raise ModelError(what, where=job["path"], hint=f"use n_tokens={len(question) + 64} or more")
        self.tokens = [*bos, *(passage * (left // len(passage) + 1))][:left] + question
        self.lines = [[*bos, *line][:PROFILE_TOKENS] for line in lines]

    def named(self, numbers: Iterable[int], lines: list[list[int]], load: str) -> dict[str, Any]:
        """Names, domains and lengths of these short texts, for their trace."""
        names, domains = zip(
            *((self.short[i]["name"], self.short[i]["domain"]) for i in numbers), strict=True
        )
        return {"sequences": names, "domains": domains, "lengths": list(map(len, lines)), "load": load}


def _costs(recorded: RecordedModel, load_seconds: float, texts: _Texts) -> Costs:
    clock = [time.monotonic()]
    for part in (texts.tokens[:PROBE_TOKENS], texts.tokens[:1], texts.tokens[:1]):
        recorded.feed(part)
        clock.append(time.monotonic())
    lengths = len(texts.tokens), texts.n_output, sum(map(len, texts.lines))
    return Costs(load_seconds, (clock[1] - clock[0]) / PROBE_TOKENS, clock[3] - clock[2], *lengths)


def _evaluate(recorded: RecordedModel, condition: Condition, texts: _Texts, about: dict[str, Any]) -> Trace:
    """The trace of one run."""
    load, scale = condition.load, about["scale"]
    n_sequences, unified = (load.n_sequences, load.unified) if load else (1, False)
    recorded.reopen(condition.settings, n_sequences=n_sequences, unified=unified)
    recorded.required().keep_scores = condition.name == "prefill" or condition.kind == "weights"
    if load:
        n, together = load.n_tokens, Together(recorded)
        # a text that is too short begins again
        lines = [(texts.lines[i] * (n // len(texts.lines[i]) + 1))[:n] for i in load.members]
        batches = [[line] for line in lines] if load.kind == "alone" else [lines]
        order = load.arrivals or [0]
        parts = [record_together(together, batch, order, load.n_prefill, LOAD_OUTPUT) for batch in batches]
        return joined(parts, **about, **texts.named(load.members, lines, load.label))
    if condition.kind == "profile":
        lines = [line[: max(1, round(len(line) * scale))] for line in texts.lines]
        parts = [record(recorded, line, logits=False) for line in lines]
        return joined(parts, **about, **texts.named(range(len(lines)), lines, "alone"))
    n = round(len(texts.tokens) * scale)
    tokens = texts.tokens[:1] + texts.tokens[len(texts.tokens) + 1 - n :]
    return record(recorded, tokens, condition.schedule, n_output=texts.n_output, **about)


if __name__ == "__main__":
    child.serve(record_job)
