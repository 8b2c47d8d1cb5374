"""Measure a served model: what notebooks 05 and 06 ask of a file, asked of a server, and both compared.

A server that cuts a long prompt without a word would look like a model that forgets, or is wrong. So the
tokens that the server counts are compared with those that were sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb import context, scores
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import PLAIN_CHAT, PLAIN_STOP, Model
from dfqs_nb.scores import Answerer, ItemSet, Options, SetRun
from dfqs_nb.serve.client import Endpoint, Reply, pick
from dfqs_nb.serve.wire import ContextOverflowError, EndpointError, TemporaryError

if TYPE_CHECKING:
    import pandas as pd

MARK = "MESSAGE-STANDS-HERE"
SAMPLE = "The red key is kept in the old box. " * 8
CUT_SHARE, CUT_TOKENS = 0.02, 8  # by which halves may have more tokens than their whole, which ends in no cut
SHORT = 1_600  # characters that every server reads whole
SAME_LENGTH = 1.2  # texts of one length differ by less in their characters
NEAR_TIE = 0.1  # of a logit: well above what other batches and kernels move
LARGER = "start the server with a larger context (Ollama: OLLAMA_CONTEXT_LENGTH), or use shorter texts"
DEFAULTS = Options()


def token_counter(endpoint: Endpoint) -> tuple[Callable[[str], int], str]:
    """How to count a text's tokens, and by what: the server's tokenizer, else its characters a token.

    The function raises a `TemporaryError` where the server stops counting: no length is a silent guess.
    """
    forms: dict[str, tuple[str, str, dict[str, Any]]] = {
        "llama.cpp": ("/tokenize", "content", {"add_special": False, "parse_special": True}),
        "llama-cpp-python": ("/extras/tokenize", "input", {}),
        "vLLM": ("/tokenize", "prompt", {"model": endpoint.model, "add_special_tokens": False}),
    }
    path, name, options = forms.get(endpoint.server, ("", "", {}))

    def ids(text: str) -> list[Any] | None:
        return pick(endpoint.optional(path, {name: text, **options}), "tokens", list)

    if not path or (start := ids("")) is None:
        each = (endpoint.complete(SAMPLE, 1).n_prompt or len(SAMPLE) // 4) / len(SAMPLE)
        return lambda text: max(1, round(len(text) * each)), "estimated tokens"

    def count(text: str) -> int:
        if (counted := ids(text)) is None:
            hint = "read its log; the same call goes on from there"
            raise TemporaryError("the server stopped counting tokens", where=endpoint.url, hint=hint)
        return len(counted) - len(start)  # llama-cpp-python puts a BOS in front

    return count, "the server's tokens"


def shown_chat(endpoint: Endpoint, message: str) -> str:
    """A chat with this message as the server's template writes it; "" where the server does not show that."""
    messages = [{"role": "user", "content": message}]
    return pick(endpoint.optional("/apply-template", {"messages": messages}), "prompt", str) or ""


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


class _Remote:
    """An endpoint in the place of a model, for `measure_long_context`: it frames, holds and asks in text.

    A server takes texts, so a "token" is a piece of text here: a text of n tokens is the text itself and
    n - 1 empty pieces. Pieces have the right number, and joined they are the text again.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        count, self.counted_by = token_counter(endpoint)
        self._count, self.endpoint = lru_cache(maxsize=8192)(count), endpoint
        before, mark, after = shown_chat(endpoint, MARK).partition(MARK)
        self.around = (before, after) if mark else ("", "\nAnswer:")
        self.settings = SimpleNamespace(n_ctx=endpoint.n_ctx or 2**31)
        self._body: tuple[Any, ...] = ()
        self._whole = 0.0  # characters of a text that the server is known to read whole
        self.clear = lambda: None  # the server is told not to use its cache, or clears it itself
        self.with_bos = lambda tokens: tokens  # the server puts its BOS in front

    def tokenize(self, text: str, *, special: bool = True) -> tuple[Any, ...]:
        return (text, *[""] * (self._count(text) - 1)) if text else ()

    def conditions(self) -> dict[str, Any]:
        return {**self.endpoint.conditions(), "lengths": self.counted_by, "around": list(self.around)}

    def hold(self, body: tuple[Any, ...]) -> int:
        self._body = body  # sent with each question
        return 0

    def ask(self, question: Any) -> tuple[str, int]:
        """The greedy answer to a question about the haystack that is held, and the tokens evaluated."""
        sent = (*self._body, *question.prompt)
        text = "".join(map(str, sent))
        if len(text) > self._whole:
            check_whole(self.endpoint, self.endpoint.complete, text)
            self._whole = len(text) * SAME_LENGTH
        reply = self.endpoint.complete(text, question.max_tokens)
        return reply.text.strip(), (reply.n_prompt or len(sent)) + reply.n_tokens


def measure_long_context(
    endpoint: Endpoint,
    folder: str | Path,
    *,
    prompt_set: str = "long-context-nano",
    longest: int = 1024,
    shortest: int | None = None,
    n_haystacks: int = 4,
    fresh: bool = False,
) -> Any:
    """Notebook 05's retrieval at growing lengths, asked in text through ``/v1/completions``.

    Lengths are the server's tokens where it shows its tokenizer, else an estimate (``conditions`` tell
    which). A length that the server has no room for, or whose prompts it cuts, ends the curve as a failure
    of the runtime. After an `EndpointError` a second call goes on from there.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    remote: Any = _Remote(endpoint)
    options: dict[str, Any] = {"shortest": shortest, "n_haystacks": n_haystacks, "rounds": 0}
    plan = context.make_plan(remote, prompt_set, longest, **options)
    return context.measure(remote, plan, folder, model_sha256=endpoint.identity, fresh=fresh)


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
    url, n_ctx, template = endpoint.url, endpoint.n_ctx, endpoint.chat_template
    if options.thinking != "template":
        hint = "start it with thinking on or off, and leave --thinking out"
        raise EndpointError("a server decides about thinking when it starts", where=url, hint=hint)
    bare = model if model is not None and not model.has_template else None
    mode = Answerer.of(bare, item_set).mode if bare else item_set.mode
    chat = mode == "chat" and not bare
    ask = endpoint.chat if chat else endpoint.complete
    items = item_set.items[: options.limit]
    prompts = [item.asked(item_set.instruction) if chat else item.prompt for item in items]

    @cache
    def check_longest() -> None:
        check_whole(endpoint, ask, max(prompts, key=len))

    def answer(request: Any) -> Any:
        check_longest()  # unless all answers are there already
        text = request.rendered(bare) if bare else request.text
        stop = (*request.stop, PLAIN_STOP) if bare and request.chat else request.stop
        reply = ask(text, request.max_tokens, sampling=request.sampling, stop=stop)
        full = reply.n_prompt + reply.n_tokens >= (n_ctx or 2**31)
        if reply.finish_reason == "length" and full and reply.n_tokens < request.max_tokens:
            what = f"the server's {n_ctx:,} tokens of context were full after {reply.n_tokens} of an answer"
            raise ContextOverflowError(what, where=url, hint=LARGER)
        return reply

    if chat and "strftime_now" in template:  # the server's clock is not ours: what it writes counts, too
        template += shown_chat(endpoint, MARK)
    known = hashlib.sha256(template.encode()).hexdigest() if template else "the server's"
    conditions = {"chat_template_sha256": known if chat else "none", **endpoint.conditions()}
    if bare and mode == "chat":
        conditions["chat_frame"] = PLAIN_CHAT
    identity, n_parallel = model_id or endpoint.identity, endpoint.concurrency
    answerer = Answerer(answer, mode, conditions, identity, n_parallel=n_parallel)
    return answerer.score(item_set, folder, options)


# ---- the same questions in this process and through a server, item by item ----


def compare_all(
    model: Model,
    connected: Mapping[str, Endpoint],
    item_sets: Sequence[ItemSet],
    folder: str | Path,
    *,
    model_id: str = "",
    local: Collection[str] = (),
    stopped: dict[str, str] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Score sets in process and through each server, and `explain` where their texts differ.

    Args:
        model_id: the SHA-256 of the model in this process, under which its answers are kept.
        local: the servers that were started with this process's file: ``model_id`` is theirs too.
        stopped: gets the servers that failed for good, with the reason. An `EndpointError`: all did.
        options: ``limit``, ``allow_unsandboxed``, ``fresh``, ``progress`` of ``score_set``.

    Returns:
        A row a server and item: ``server``, ``set``, ``id``, ``family``, ``text_...`` and ``correct_...`` of
        ``process`` and ``server``, ``same_text``; where texts differ also what `explain` gives.
    """
    import pandas as pd

    chosen, place, tables = Options(**options), Path(folder), list[pd.DataFrame]()
    stopped = {} if stopped is None else stopped
    runs = [scores.score_set(model, s, place / "process", chosen, model_id=model_id) for s in item_sets]
    for name, endpoint in connected.items():
        known = model_id if name in local else ""
        try:
            for item_set, run in zip(item_sets, runs, strict=True):
                theirs = score_set(
                    endpoint, item_set, place / name, chosen, model_id=known, model=model
                ).items
                opening = ""  # of a thinking that the template itself writes: llama.cpp's server repeats it
                if item_set.mode == "chat" and model.has_template:
                    opening = "".join(chat_text(model, MARK).rpartition(MARK)[2].partition("<think>")[1:])
                table = run.items[["set", "id", "family"]].assign(server=name)
                table["text_process"] = run.items["completion"]
                table["text_server"] = theirs["completion"].astype(str).str.removeprefix(opening)
                table["same_text"] = table["text_process"] == table["text_server"]
                table["correct_process"], table["correct_server"] = run.items["correct"], theirs["correct"]
                by_id, other = {item.id: item for item in item_set.items}, table[~table["same_text"]]
                pairs = zip(other["id"], other["text_server"], strict=True)
                why = [explain(model, item_set, by_id[id_], text) for id_, text in pairs]
                tables.append(table.join(pd.DataFrame(why, index=other.index)))
        except EndpointError as error:
            stopped[name] = error.what
    if not tables:
        raise EndpointError(f"no server answers: {'; '.join(stopped.values())}", hint="read its log")
    items = pd.concat(tables, ignore_index=True)
    return items[["server", "set", *items.columns.drop(["server", "set"])]]


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
    items = items if "cause" in items else items.assign(cause=None)
    groups = items.groupby(["server", "set"], sort=False)
    return groups.agg(**counts, causes=("cause", counted)).reset_index()


def counted(words: pd.Series) -> str:
    """Words with their number; "none" where there are none."""
    return ", ".join(f"{n} {word}" for word, n in words.value_counts().items()) or "none"
