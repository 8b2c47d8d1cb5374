"""The child process of an experiment: it loads one file once and records all runs that need no fresh load.

A module of its own, because ``python -m`` wants one that the package has not imported yet.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from dfqs_nb.core import child
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.settings import LOG, OpenSettings, default_model_params, refusal
from dfqs_nb.routing.loads import Load
from dfqs_nb.routing.plan import ESSENTIAL, LOAD_OUTPUT, Costs, fit, scaled
from dfqs_nb.routing.recorded import RecordedModel, Schedule, Together, open_recorded, record, record_together
from dfqs_nb.routing.trace import Trace, joined

PROBE_TOKENS = 8


def tokenize_job(job: dict[str, Any]) -> dict[str, Any]:
    """Token ids of the job's texts, and of its question in the model's chat template; no weights are loaded.

    Args:
        job: ``path``, ``texts`` and ``question``.
    """
    import llama_cpp.llama_cpp as api
    from llama_cpp._internals import LlamaModel

    LOG.install()
    shards = open_shards(job["path"])
    child.tell(stage="while reading its vocabulary")
    path = str(shards.paths[0])
    try:
        with default_model_params(vocab_only=True):
            params = api.llama_model_default_params()
            vocabulary = LlamaModel(path_model=path, params=params, verbose=False)
    except ValueError as error:
        raise refusal(shards.paths[0]) from error
    names = ("tokenize", "token_bos", "token_eos", "close")
    llama: Any = SimpleNamespace(_model=vocabulary, **{name: getattr(vocabulary, name) for name in names})
    nothing: Any = None  # is estimated or tried
    with Model(llama, shards.paths[0], shards.as_one, OpenSettings(), nothing, nothing, 0.0) as model:
        has_template, question = bool(model.header.get("tokenizer.chat_template")), job["question"]
        asked = chat_prompt(model, question) if has_template else model.tokenize(question, special=False)
        texts = [model.tokenize(text, special=False) for text in job["texts"]]
        return {"question": asked, "texts": texts, "bos": model.bos}


def record_job(job: dict[str, Any]) -> None:
    """Load the job's model once and record each of its runs into its file, in a context of its own.

    Args:
        job: ``path``, ``runs`` (what `plan.Condition.as_run` makes), ``tokens``, ``texts`` (``name``,
            ``domain``, ``tokens``), ``n_output``, ``budget_seconds`` (0: none) and what is left of it
            (``left_seconds``), ``scale`` (0: to be found) and ``all_runs`` (of all processes).
    """
    runs, started = job["runs"], time.monotonic()
    child.tell(stage="while loading it")
    with open_recorded(job["path"], OpenSettings(**runs[0]["settings"]), trial=False) as recorded:
        loaded, scale = time.monotonic() - started, job["scale"]
        if not scale:
            child.tell(stage="while measuring its speed")
            clock = [time.monotonic()]
            for part in (job["tokens"][:PROBE_TOKENS], job["tokens"][:1], job["tokens"][:1]):
                recorded.feed(part)
                clock.append(time.monotonic())
            costs = Costs(loaded, (clock[1] - clock[0]) / PROBE_TOKENS, clock[3] - clock[2])
            scale, kept = fit(job["all_runs"], costs, job["budget_seconds"])
            child.tell(plan={"scale": scale, "kept": kept, **vars(costs)})
            runs = [run for run in runs if run["name"] in kept]
        for run in runs:
            late = job["budget_seconds"] and time.monotonic() - started > job["left_seconds"]
            if late and run["kind"] not in ESSENTIAL:
                continue  # the machine is slower than it was when its speed was measured
            child.tell(stage=f"while evaluating {run['name']!r}", begun=run["name"])
            why = ""
            try:
                _evaluate(recorded, scaled(run, scale), job).save(run["file"])
            except DfqsError as error:  # refused in an orderly way: the next run has a context of its own
                why = error.what
            child.tell(done=run["name"], why=why)


def _evaluate(recorded: RecordedModel, run: dict[str, Any], job: dict[str, Any]) -> Trace:
    """The trace of one run."""
    load = Load(**run["load"]) if run["load"] else None
    n_sequences, unified = (load.n_sequences, load.unified) if load else (1, False)
    recorded.reopen(OpenSettings(**run["settings"]), n_sequences=n_sequences, unified=unified)
    recorded.required().keep_scores = run["keep_scores"]
    about = {"condition": run["name"], "key": run["key"], "scale": run["scale"]}
    if run["kind"] == "profile":
        texts = job["texts"]
        most = [min(len(text["tokens"]), run["settings"]["n_ctx"]) for text in texts]
        lengths = [max(1, round(n * run["scale"])) for n in most]
        parts = [record(recorded, t["tokens"][:n], logits=False) for t, n in zip(texts, lengths, strict=True)]
        return joined(parts, **about, **_named(texts), lengths=lengths, load="alone")
    if load is None:
        tokens = job["tokens"]
        tokens = tokens[:1] + tokens[len(tokens) + 1 - round(len(tokens) * run["scale"]) :]
        trace = record(recorded, tokens, Schedule(**run["schedule"]), n_output=job["n_output"])
        trace.conditions.update(about)
        return trace
    texts = [job["texts"][member] for member in load.members]
    about |= {**_named(texts), "lengths": [load.n_tokens] * len(texts), "load": load.label}
    n = load.n_tokens  # a text that is too short begins again
    lines = [(text["tokens"] * (n // len(text["tokens"]) + 1))[:n] for text in texts]
    together = Together(recorded)
    if load.kind == "alone":
        each = [record_together(together, [line], [0], load.n_prefill, LOAD_OUTPUT) for line in lines]
        return joined(each, **about, rule=together.rule)
    return record_together(together, lines, load.arrivals, load.n_prefill, LOAD_OUTPUT, **about)


def _named(texts: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {"sequences": [text["name"] for text in texts], "domains": [text["domain"] for text in texts]}


if __name__ == "__main__":
    child.serve(lambda job: tokenize_job(job) if "question" in job else record_job(job))
