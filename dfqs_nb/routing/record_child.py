"""The child process of an experiment: it loads one file once and records all runs that need no fresh load.

A module of its own, because ``python -m`` wants one that the package has not imported yet.
"""

from __future__ import annotations

import time
from typing import Any

from pydantic import TypeAdapter

from dfqs_nb.core import child
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.routing.loads import Load
from dfqs_nb.routing.plan import ESSENTIAL, LOAD_OUTPUT, PROFILE_TOKENS, Condition, Costs, Lengths, fit
from dfqs_nb.routing.recorded import RecordedModel, Together, open_recorded, record, record_together
from dfqs_nb.routing.trace import Trace, joined

PROBE_TOKENS = 8
QUESTION = "What is the capital of France?"
Texts = list[dict[str, Any]]  # ``name``, ``domain``, ``text``, and its ``tokens``


def record_job(job: dict[str, Any]) -> None:
    """Load the job's model once and record each of its runs into its file, in a context of its own.

    Args:
        job: ``path``, ``runs`` (names and files, in order), ``planned`` (conditions of all processes), their
            ``keys``, ``passage``, ``n_tokens``, ``texts``, ``n_output``, ``budget_seconds`` (0: none), what
            is left of it (``left_seconds``), and ``scale`` (0: to be found).
    """
    started, names = time.monotonic(), list(job["runs"])
    planned = TypeAdapter(list[Condition]).validate_python(job["planned"])
    by_name = {condition.name: condition for condition in planned}
    child.tell(stage="while loading it")
    with open_recorded(job["path"], by_name[names[0]].settings, trial=False) as recorded:
        loaded, scale = time.monotonic() - started, job["scale"]
        tokens, texts = _tokens(recorded.model, job)
        if not scale:
            child.tell(stage="while measuring its speed")
            costs, n_profile = _costs(recorded, loaded, tokens), sum(len(text["tokens"]) for text in texts)
            lengths = Lengths(len(tokens), job["n_output"], n_profile)
            scale, kept = fit(planned, costs, lengths, job["budget_seconds"])
            child.tell(plan={"scale": scale, "kept": kept, **vars(costs)})
            names = [name for name in names if name in kept]
        for name in names:
            late = job["budget_seconds"] and time.monotonic() - started > job["left_seconds"]
            if late and by_name[name].kind not in ESSENTIAL:
                continue  # the machine is slower than it was when its speed was measured
            child.tell(stage=f"while evaluating {name!r}", begun=name)
            about, why = {"condition": name, "key": job["keys"][name], "scale": scale}, ""
            try:
                trace = _evaluate(
                    recorded, by_name[name].scaled(scale), tokens, texts, job["n_output"], about
                )
                trace.save(job["runs"][name])
            except DfqsError as error:  # refused in an orderly way: the next run has a context of its own
                why = error.what
            child.tell(done=name, why=why)


def _tokens(model: Model, job: dict[str, Any]) -> tuple[list[int], Texts]:
    """The text, and the short texts with their ``tokens``.

    The text is the passage, again and again as needed, and at the end a question in the model's chat
    template, so that the greedy continuation is an answer.
    """
    passage, *ids = (
        model.tokenize(text, special=False)
        for text in (job["passage"], *(text["text"] for text in job["texts"]))
    )
    question = chat_prompt(model, QUESTION) if model.has_template else model.tokenize(QUESTION, special=False)
    bos = [model.bos] if model.bos >= 0 else []
    left = job["n_tokens"] - len(question)
    if left < 1 + len(bos) or not all([passage, *ids]):
        what = f"{job['n_tokens']} tokens do not hold the question ({len(question)})"
        raise ModelError(what, where=job["path"], hint=f"use n_tokens={len(question) + 64} or more")
    body = [*bos, *(passage * (left // len(passage) + 1))][:left]
    texts = zip(job["texts"], ids, strict=True)
    return body + question, [{**text, "tokens": [*bos, *own][:PROFILE_TOKENS]} for text, own in texts]


def _costs(recorded: RecordedModel, load_seconds: float, tokens: list[int]) -> Costs:
    clock = [time.monotonic()]
    for part in (tokens[:PROBE_TOKENS], tokens[:1], tokens[:1]):
        recorded.feed(part)
        clock.append(time.monotonic())
    return Costs(load_seconds, (clock[1] - clock[0]) / PROBE_TOKENS, clock[3] - clock[2])


def _evaluate(
    recorded: RecordedModel,
    condition: Condition,
    tokens: list[int],
    texts: Texts,
    n_output: int,
    about: dict[str, Any],
) -> Trace:
    """The trace of one run."""
    load, scale = condition.load, about["scale"]
    n_sequences, unified = (load.n_sequences, load.unified) if load else (1, False)
    recorded.reopen(condition.settings, n_sequences=n_sequences, unified=unified)
    recorded.required().keep_scores = condition.name == "prefill" or condition.kind == "weights"
    if load:
        return _beside(recorded, load, [texts[member] for member in load.members], about)
    if condition.kind == "profile":
        lines = [text["tokens"][: max(1, round(len(text["tokens"]) * scale))] for text in texts]
        parts = [record(recorded, line, logits=False) for line in lines]
        return joined(parts, **about, **_named(texts), lengths=list(map(len, lines)), load="alone")
    tokens = tokens[:1] + tokens[len(tokens) + 1 - round(len(tokens) * scale) :]
    return record(recorded, tokens, condition.schedule, n_output=n_output, **about)


def _beside(recorded: RecordedModel, load: Load, texts: Texts, about: dict[str, Any]) -> Trace:
    """The trace of a load; a text that is too short begins again."""
    n, together = load.n_tokens, Together(recorded)
    about |= {**_named(texts), "lengths": [n] * len(texts), "load": load.label}
    lines = [(text["tokens"] * (n // len(text["tokens"]) + 1))[:n] for text in texts]
    batches = [[line] for line in lines] if load.kind == "alone" else [lines]
    arrivals = load.arrivals or [0]
    parts = [record_together(together, batch, arrivals, load.n_prefill, LOAD_OUTPUT) for batch in batches]
    return joined(parts, **about)


def _named(texts: Texts) -> dict[str, list[str]]:
    return {"sequences": [text["name"] for text in texts], "domains": [text["domain"] for text in texts]}


if __name__ == "__main__":
    child.serve(record_job)
