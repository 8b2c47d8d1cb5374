"""Measure a served model: what notebooks 05 and 06 ask of a file, asked of a server, in text.

A server that cuts a long prompt without a word would look like a model that forgets, or is wrong. So the
tokens that the server counts are compared with those that were sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dfqs_nb import context
from dfqs_nb.llama.model import PLAIN_CHAT, PLAIN_STOP, Model
from dfqs_nb.scores import Answerer, ItemSet, Options, SetRun
from dfqs_nb.serve.client import Endpoint, Reply, pick
from dfqs_nb.serve.wire import BusyError, ContextOverflowError, EndpointError

MARK = "MESSAGE-STANDS-HERE"
SAMPLE = "The red key is kept in the old box. " * 8
CUT_SHARE, CUT_TOKENS = 0.02, 8  # by which halves may have more tokens than their whole, which ends in no cut
SHORT = 1_600  # characters that every server reads whole
SAME_LENGTH = 1.2  # texts of one length differ by less in their characters
LARGER = "start the server with a larger context (Ollama: OLLAMA_CONTEXT_LENGTH), or use shorter texts"
DEFAULTS = Options()


def token_counter(endpoint: Endpoint) -> tuple[Callable[[str], int], str]:
    """How to count a text's tokens, and by what: the server's tokenizer, else its characters a token.

    The function raises `BusyError` where the server stops counting: a length is never guessed in silence.
    """
    forms: dict[str, tuple[str, str, dict[str, Any]]] = {
        "llama.cpp": ("/tokenize", "content", {"add_special": False, "parse_special": True}),
        "llama-cpp-python": ("/extras/tokenize", "input", {}),
        "vLLM": ("/tokenize", "prompt", {"model": endpoint.model, "add_special_tokens": False}),
    }
    path, name, options = forms.get(endpoint.facts.name, ("", "", {}))

    def count(text: str) -> int:
        ids = pick(endpoint.post(path, **{name: text}, **options), "tokens", list)
        if ids is None:
            what, hint = (
                "the server stopped counting tokens",
                "read its log; the same call goes on from there",
            )
            raise BusyError(what, where=endpoint.base_url, hint=hint)
        return len(ids)

    if path and (ids := pick(endpoint.post(path, **{name: ""}, **options), "tokens", list)) is not None:
        n_start = len(ids)  # llama-cpp-python puts a BOS in front
        return lambda text: count(text) - n_start, "the server's tokens"
    each = (endpoint.complete(SAMPLE, 1).n_prompt or len(SAMPLE) // 4) / len(SAMPLE)
    return lambda text: max(1, round(len(text) * each)), "estimated tokens"


def _shown_around(endpoint: Endpoint) -> tuple[str, str] | None:
    """What the server's chat template puts before and after a message; None where it does not show that."""
    page = endpoint.post("/apply-template", messages=[{"role": "user", "content": MARK}])
    before, mark, after = (pick(page, "prompt", str) or "").partition(MARK)
    return (before, after) if mark else None


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
        raise ContextOverflowError(what, where=endpoint.base_url, hint=LARGER)


class _Remote:
    """An endpoint in the place of a model, for `measure_long_context`: it frames, holds and asks in text.

    A server takes texts, so a "token" is a piece of text here: a text of n tokens is the text itself and
    n - 1 empty pieces. Pieces have the right number, and joined they are the text again.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        count, self.counted_by = token_counter(endpoint)
        self._count, self.endpoint = lru_cache(maxsize=8192)(count), endpoint
        self.around = _shown_around(endpoint) or ("", "\nAnswer:")
        self.settings = SimpleNamespace(n_ctx=endpoint.facts.n_ctx or 2**31)
        self._body: tuple[Any, ...] = ()
        self._whole = 0.0  # characters of a text that the server is known to read whole

    def tokenize(self, text: str, *, special: bool = True) -> tuple[Any, ...]:
        return (text, *[""] * (self._count(text) - 1)) if text else ()

    def with_bos(self, tokens: Any) -> Any:
        return tokens  # the server puts its BOS in front

    def conditions(self) -> dict[str, Any]:
        return {**self.endpoint.conditions(), "lengths": self.counted_by, "around": list(self.around)}

    def clear(self) -> None:
        pass  # the server is told not to use its cache, or clears it itself

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
    options: dict[str, Any] = {"shortest": shortest, "n_haystacks": n_haystacks, "rounds": 0, "reuse": False}
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
    url, n_ctx = endpoint.base_url, endpoint.facts.n_ctx
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

    def answer(request: Any) -> Reply:
        check_longest()  # unless all answers are there already
        text = request.rendered(bare) if bare else request.text
        stop = (*request.stop, PLAIN_STOP) if bare and request.chat else request.stop
        reply = ask(text, request.max_tokens, sampling=request.sampling, stop=stop)
        used = reply.n_prompt + reply.n_tokens
        if (
            reply.finish_reason == "length"
            and n_ctx
            and used >= n_ctx
            and reply.n_tokens < request.max_tokens
        ):
            what = f"the server's {n_ctx:,} tokens of context were full after {reply.n_tokens} of an answer"
            raise ContextOverflowError(what, where=url, hint=LARGER)
        return reply

    template = endpoint.facts.chat_template
    dated = chat and "strftime_now" in template  # the server's clock is not ours: what it writes counts, too
    written = "".join((_shown_around(endpoint) or ()) if dated else ())
    known = hashlib.sha256((template + written).encode()).hexdigest() if template else "the server's"
    conditions = {"chat_template_sha256": known if chat else "none", **endpoint.conditions()}
    if bare and mode == "chat":
        conditions["chat_frame"] = PLAIN_CHAT
    identity, n_parallel = model_id or endpoint.identity, endpoint.concurrency
    answerer = Answerer(answer, mode, conditions, identity, n_parallel=n_parallel)
    return answerer.score(item_set, folder, options)
