"""Score a served model as notebook 06 scores a file, and compare the answers of both.

A server that cuts a long prompt without a word would look like a model that is wrong. So the tokens that it
counts of a text are compared with those of its halves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb import scores
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import PLAIN_CHAT, PLAIN_STOP, Model
from dfqs_nb.scores import Answerer, ItemSet, Options, SetRun
from dfqs_nb.serve.client import ContextOverflowError, Endpoint, EndpointError, Reply, side_by_side

if TYPE_CHECKING:
    import pandas as pd

MARK = "MESSAGE-STANDS-HERE"
CUT_SHARE, CUT_TOKENS = 0.02, 8  # by which halves may have more tokens than their whole, which ends in no cut
SHORT = 1_600  # characters that every server reads whole
NEAR_TIE = 0.1  # of a logit: well above what other batches and kernels move
DEFAULTS = Options()
LARGER = "start the server with a larger context (Ollama: OLLAMA_CONTEXT_LENGTH), or use shorter texts"


def check_whole(endpoint: Endpoint, ask: Callable[[str, int], Reply], text: str) -> None:
    """Raise a `ContextOverflowError` if the server cuts this text and answers from the rest.

    ``ask`` gets the text and both its halves: together these have more tokens than a text that was cut.
    """
    if len(text) < SHORT:
        return
    middle = text.find(" ", len(text) // 2)
    # numbered, so that no cache of the server begins with it: what is cached is not counted everywhere
    parts = (f"{number}. {part}" for number, part in enumerate((text, text[:middle], text[middle:]), 1))
    whole, first, second = (ask(part, 1).n_prompt for part in parts)
    if first + second > whole * (1 + CUT_SHARE) + CUT_TOKENS:
        what = f"the server cut the prompt: it read {whole:,} of at least {first + second:,} tokens"
        raise ContextOverflowError(what, where=endpoint.url, hint=LARGER)


def score_set(
    endpoint: Endpoint,
    item_set: ItemSet,
    folder: str | Path,
    options: Options = DEFAULTS,
    *,
    model_id: str = "",
    model: Model | None = None,
) -> SetRun:
    """``score_set`` of the scores stage over an endpoint, in the server's template.

    ``model_id`` is the model's SHA-256, where it is known; ``model`` the same file in this process: where it
    has no chat template, the server gets the text that the process gets. An answer that fills the context is
    a `ContextOverflowError`. After an `EndpointError` a second call goes on from there.
    """
    url, n_ctx = endpoint.url, endpoint.n_ctx
    if options.thinking != "template":
        hint = "start it with thinking on or off, and leave --thinking out"
        raise EndpointError("a server decides about thinking when it starts", where=url, hint=hint)
    if item_set.kind == "choice":
        hint = "score the model's file: dfqs-nb score model.gguf --set FILE.jsonl"
        raise EndpointError("a server shows no likelihood of a choice", where=url, hint=hint)
    bare = model if model is not None and not model.has_template else None
    mode = Answerer.of(bare, item_set).mode if bare else item_set.mode
    chat = mode == "chat" and not bare
    ask = endpoint.chat if chat else endpoint.complete
    items = item_set.part(options.limit).items
    prompts = [item.asked(item_set.instruction) if chat else item.prompt for item in items]

    @cache
    def check_longest() -> None:
        check_whole(endpoint, ask, max(prompts, key=len))

    def answer(request: Any) -> Any:
        check_longest()  # unless all answers are there already
        text = request.rendered(bare) if bare else request.text
        stop = (*request.stop, PLAIN_STOP) if bare and request.chat else request.stop
        reply = ask(text, request.max_tokens, sampling=request.options.sampling, stop=stop)
        full = reply.n_prompt + reply.n_tokens >= (n_ctx or 2**31)
        if reply.finish_reason == "length" and full and reply.n_tokens < request.max_tokens:
            what = f"the server's {n_ctx:,} tokens of context were full after {reply.n_tokens} of an answer"
            raise ContextOverflowError(what, where=url, hint=LARGER)
        return reply

    template = endpoint.chat_template
    known = hashlib.sha256(template.encode()).hexdigest() if template else "the server's"
    conditions = {"chat_template_sha256": known if chat else "none", **endpoint.conditions()}
    if bare and mode == "chat":
        conditions["chat_frame"] = PLAIN_CHAT
    answerer = Answerer(answer, mode, conditions, model_id or endpoint.identity)
    return answerer.score(item_set, folder, options)


# ---- the same questions in this process and through a server, item by item ----


def room_for(model: Model) -> int:
    """How many runtimes with this model's threads have a core for each thread; at least one."""
    return max(1, usable_cores() // (model.settings.n_threads or 1))


def compare_all(
    model: Model,
    connected: Mapping[str, Endpoint],
    item_sets: Sequence[ItemSet],
    folder: str | Path,
    *,
    model_id: str,
    local: Collection[str],
    stopped: dict[str, str],
    **options: Any,
) -> pd.DataFrame:
    """Score sets in process and through each server, and `explain` where their texts differ.

    A row a server and item: ``server``, ``set``, ``id``, ``family``, ``text_...`` and ``correct_...`` of
    ``process`` and ``server``, ``same_text``; where texts differ also what `explain` gives.

    ``model_id``: the SHA-256 of the model in this process, under which its answers are kept. ``local``: the
    servers that were started with this process's file, whose ``model_id`` it is, too. ``stopped`` gets the
    servers that failed for good, with the reason. An `EndpointError`: all did. ``options``: of `Options`.
    """
    import pandas as pd

    chosen, place, tables = Options(**options), Path(folder), list[pd.DataFrame]()

    def ask(name: str) -> list[SetRun]:
        known: dict[str, Any] = {"model_id": model_id if name in local else "", "model": model}
        try:
            return [score_set(connected[name], s, place / name, chosen, **known) for s in item_sets]
        except EndpointError as error:
            stopped[name] = error.what
            return []

    with side_by_side(ask, connected, room_for(model) - 1) as served:
        here = place / "process"
        runs = [scores.score_set(model, s, here, chosen, model_id=model_id) for s in item_sets]
        all_served = list(served)
    for name, answers in zip(connected, all_served, strict=True):
        # a server that failed has no answers
        for item_set, run, theirs in zip(item_sets, runs, answers, strict=False):
            tables.append(_compared(model, item_set, run, theirs).assign(server=name))
    if not tables:
        raise EndpointError(f"no server answers: {'; '.join(stopped.values())}", hint="read its log")
    items = pd.concat(tables, ignore_index=True)
    return items[["server", "set", *items.columns.drop(["server", "set"])]]


def _compared(model: Model, item_set: ItemSet, run: SetRun, theirs: SetRun) -> pd.DataFrame:
    """The answers to a set in this process and of one server, item by item."""
    import pandas as pd

    opening = ""  # of a thinking that the template itself writes: llama.cpp's server repeats it
    if item_set.mode == "chat" and model.has_template:
        opening = "".join(chat_text(model, MARK).rpartition(MARK)[2].partition("<think>")[1:])
    table = run.items[["set", "id", "family"]].copy()
    table["text_process"] = run.items["completion"]
    table["text_server"] = theirs.items["completion"].astype(str).str.removeprefix(opening)
    table["same_text"] = table["text_process"] == table["text_server"]
    table["correct_process"], table["correct_server"] = run.items["correct"], theirs.items["correct"]
    by_id, other = {item.id: item for item in item_set.items}, table[~table["same_text"]]
    pairs = zip(other["id"], other["text_server"], strict=True)
    why = [explain(model, item_set, by_id[id_], text) for id_, text in pairs]
    return table.join(pd.DataFrame(why, other.index, ["token", "margin", "cause"]))


def explain(model: Model, item_set: ItemSet, item: Any, served: str) -> dict[str, Any]:
    """Why the server's text differs from this process's; notebook 09 explains each ``cause``.

    ``token``: the first of ours that theirs does not have. ``margin``: of the two largest logits there.
    """
    answerer = Answerer.of(model, item_set)
    request = answerer.request(item_set, item)
    ours, rest, at = answerer.answer(request), served.encode(), 0  # rest: what theirs has beyond `at` tokens
    for piece in map(model.token_bytes, ours.token_ids):
        if not rest.startswith(piece):
            break
        rest, at = rest[len(piece) :], at + 1
    model.clear()
    logits = model.evaluate([*request.tokens(model), *ours.token_ids[:at]])
    second, first = np.sort(logits)[-2:].tolist()
    cause = "near-tie" if first - second <= NEAR_TIE else "other numbers"
    return {"token": at, "margin": first - second, "cause": cause}


def comparison_table(items: pd.DataFrame) -> pd.DataFrame:
    """A row a server and set of `compare_all`: items, same texts, right answers, causes of differences."""
    counts = {"items": ("id", "size"), "same_text": ("same_text", "sum")}
    counts |= {f"right_{where}": (f"correct_{where}", "sum") for where in ("process", "server")}
    groups = items.groupby(["server", "set"], sort=False)
    return groups.agg(**counts, causes=("cause", tally)).reset_index()


def tally(words: pd.Series) -> str:
    """Words with their number; "none" where there are none."""
    return ", ".join(f"{n} {word}" for word, n in words.value_counts().items()) or "none"
