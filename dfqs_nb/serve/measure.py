"""Measure a served model: what notebooks 05 and 06 ask of a file, asked of a server, in text.

A server that cuts a long prompt without a word would look like a model that forgets, or is wrong. So the
tokens that the server counts are compared with those that were sent.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dfqs_nb import context
from dfqs_nb.llama.generate import Completion
from dfqs_nb.scores import Answerer, ItemSet, Options, SetRun
from dfqs_nb.serve.client import Endpoint, Reply, pick
from dfqs_nb.serve.wire import BusyError, ContextOverflowError, EndpointError

MARK = "MESSAGE-STANDS-HERE"
SAMPLE = "The red key is kept in the old box. " * 8
MOST_CHARACTERS = 12  # a token, on the average of a text
CUT_SHARE, CUT_TOKENS = 0.02, 8  # by which halves may have more tokens than their whole, which ends in no cut
LEAST_SHARE = 0.95  # of the tokens that a text should have, below which its halves are asked for
LEAST_SHARE_OF_ITEMS = 0.6  # questions of one set differ in their characters a token
COUNTED_ITEMS = 8  # the longest of a set, whose tokens are counted before the first is asked
DEFAULTS = Options()


def tokenizer(endpoint: Endpoint) -> Callable[[str], list[int]] | None:
    """Token ids of a text as the server sees them, control tokens included, without a BOS.

    None where it shows none; llama.cpp, llama-cpp-python and vLLM do. The function raises ``BusyError`` where
    the server stops counting: a length is never guessed in silence.
    """
    forms: dict[str, tuple[str, str, dict[str, Any]]] = {
        "llama.cpp": ("/tokenize", "content", {"add_special": False, "parse_special": True}),
        "llama-cpp-python": ("/extras/tokenize", "input", {}),
        "vLLM": ("/tokenize", "prompt", {"model": endpoint.model, "add_special_tokens": False}),
    }
    if endpoint.facts.name not in forms:
        return None
    path, name, options = forms[endpoint.facts.name]

    def ids(text: str) -> list[int] | None:
        return pick(endpoint.post(path, **{name: text}, **options), "tokens", list)

    start = ids("")  # llama-cpp-python puts a BOS in front
    if start is None:
        return None

    def tokens(text: str) -> list[int]:
        counted = ids(text)
        if counted is None:
            what = "the server counted tokens and stopped doing so"
            hint = "read the server's log; the same call goes on from there"
            raise BusyError(what, where=endpoint.base_url, hint=hint)
        return counted[len(start) :]

    return tokens


def token_counter(endpoint: Endpoint) -> tuple[Callable[[str], int], str]:
    """How to count a text's tokens, and by what: the server's tokenizer, else its usual characters a token.

    Raises:
        EndpointError: the server has to be asked, and fails.
    """
    tokens = tokenizer(endpoint)
    if tokens is not None:
        return lambda text: len(tokens(text)), "the server's tokens"
    n_tokens = endpoint.complete(SAMPLE, 1).n_prompt or len(SAMPLE) // 4
    return lambda text: max(1, round(len(text) * n_tokens / len(SAMPLE))), "estimated tokens"


def shown_around(endpoint: Endpoint) -> tuple[str, str] | None:
    """What the server's chat template puts before and after a message; None where it does not show that."""
    page = endpoint.post("/apply-template", messages=[{"role": "user", "content": MARK}])
    before, mark, after = (pick(page, "prompt", str) or "").partition(MARK)
    return (before, after) if mark else None


class PromptGuard:
    """Notices a server that cuts long prompts and answers from the rest.

    It compares ``usage.prompt_tokens`` with what the text should have. Where that is too few, it asks for
    the tokens of both halves of the text: if they have more than the whole, the whole was cut.

    Args:
        ask: sends a text for an answer of one token.
        share: see `LEAST_SHARE`.
    """

    def __init__(self, url: str, ask: Callable[[str], Reply], share: float = LEAST_SHARE) -> None:
        self._url, self._ask, self._share = url, ask, share
        self._per_character, self._numbers = 0.0, itertools.count(1)

    def check(self, text: str, reply: Reply, expected: int = 0) -> None:
        """Check one reply.

        Args:
            expected: tokens that the text has by a count of ours; 0: by the server's replies so far.

        Raises:
            ContextOverflowError: the server read a part of the text only.
        """
        if not reply.n_prompt or len(text) < len(SAMPLE):
            return  # this server counts nothing, or the text is too short to be cut
        usual = self._per_character * len(text)
        least = max(min(filter(None, (expected, usual)), default=0), len(text) / MOST_CHARACTERS)
        if reply.n_prompt >= self._share * least:
            self._per_character = usual / len(text) or (0 if expected else reply.n_prompt / len(text))
            return
        middle = text.find(" ", len(text) // 2)
        whole, first, second = (self._count(part) for part in (text, text[:middle], text[middle:]))
        if first + second > whole * (1 + CUT_SHARE) + CUT_TOKENS:
            raise ContextOverflowError(
                f"the server cut the prompt: it read {whole:,} of at least {first + second:,} tokens",
                where=self._url,
                hint="start the server with a larger context (Ollama: OLLAMA_CONTEXT_LENGTH), "
                "or ask for shorter texts",
            )
        self._per_character = whole / len(text)

    def _count(self, text: str) -> int:
        """Tokens of a text that no cache of the server begins with."""
        return self._ask(f"{next(self._numbers)}. {text}").n_prompt


class Remote:
    """An endpoint in the place of a model, for `measure_long_context`: it frames, holds and asks in text.

    A server takes texts and not tokens. So a "token" is a piece of text here: a text of n tokens is the text
    itself and n - 1 empty pieces. Pieces have the right number, and joined they are the text again.
    """

    def __init__(self, endpoint: Endpoint, around: tuple[str, str] | None = None) -> None:
        count, self.counted_by = token_counter(endpoint)
        self._count = lru_cache(maxsize=8192)(count)
        self.endpoint = endpoint
        self.around = around or shown_around(endpoint) or ("", "\nAnswer:")
        self.settings = SimpleNamespace(n_ctx=endpoint.facts.n_ctx or 2**31)
        self._guard = PromptGuard(endpoint.base_url, lambda text: endpoint.complete(text, 1))
        self._body: tuple[Any, ...] = ()

    def tokenize(self, text: str, *, special: bool = True) -> tuple[Any, ...]:
        """As many pieces as the text has tokens."""
        return (text, *[""] * (self._count(text) - 1)) if text else ()

    def with_bos(self, tokens: Any) -> Any:
        """The pieces as they are: the server puts its BOS in front."""
        return tokens

    def conditions(self) -> dict[str, Any]:
        """Those of the endpoint, and how lengths are counted."""
        return {**self.endpoint.conditions(), "lengths": self.counted_by, "around": list(self.around)}

    def clear(self) -> None:
        """Nothing: the server is told not to use its cache, or clears it itself."""

    def hold(self, body: tuple[Any, ...]) -> int:
        """Remember the haystack; it is sent with each question."""
        self._body = body
        return 0

    def ask(self, question: Any) -> tuple[str, int]:
        """The greedy answer to a question about the haystack that is held, and the tokens evaluated.

        Raises:
            ContextOverflowError: the server has no room for it, or cuts it.
        """
        sent = (*self._body, *question.prompt)
        text = "".join(map(str, sent))
        reply = self.endpoint.complete(text, question.max_tokens)
        self._guard.check(text, reply, len(sent))
        return reply.text.strip(), (reply.n_prompt or len(sent)) + reply.n_tokens


def measure_long_context(
    endpoint: Endpoint,
    folder: str | Path,
    *,
    prompt_set: str = "long-context-nano",
    longest: int = 1024,
    shortest: int | None = None,
    n_haystacks: int = 4,
    around: tuple[str, str] | None = None,
    model_id: str = "",
    fresh: bool = False,
) -> Any:
    """Notebook 05's retrieval at growing lengths, asked in text through ``/v1/completions``.

    Lengths are the server's tokens where it shows its tokenizer, else an estimate (``conditions`` tell
    which). A length that the server has no room for, or whose prompts it cuts, ends the curve as a failure
    of the runtime.

    Args:
        longest, shortest: see ``make_plan`` of the context stage.
        around: text before and after a chat's message, where the server does not show its template.

    Raises:
        PromptError: the shortest length cannot hold the needles.
        EndpointError: the server failed for good; a second call goes on from there.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    remote: Any = Remote(endpoint, around)  # in the place of a model
    plan = context.make_plan(
        remote,
        prompt_set,
        longest,
        shortest=shortest,
        n_haystacks=n_haystacks,
        rounds=0,
        reuse=False,
    )
    return context.measure(remote, plan, folder, model_sha256=model_id or endpoint.identity, fresh=fresh)


# ---- scores ----


def answerer(endpoint: Endpoint, item_set: ItemSet, model_id: str = "") -> Answerer:
    """How an endpoint answers the items of this set; the template is the server's, as far as it shows it.

    It raises ``ContextOverflowError`` for a server that cuts a prompt and answers from the rest.
    """
    chat = item_set.mode == "chat"
    ask = endpoint.chat if chat else endpoint.complete
    guard = PromptGuard(endpoint.base_url, lambda text: ask(text, 1), LEAST_SHARE_OF_ITEMS)

    def answer(request: Any) -> Completion:
        reply = ask(request.text, request.max_tokens, sampling=request.sampling, stop=request.stop)
        guard.check(request.text, reply)
        return reply

    template = endpoint.facts.chat_template
    dated = chat and "strftime_now" in template  # the server's clock is not ours: what it writes counts, too
    written = "".join((shown_around(endpoint) or ()) if dated else ())
    known = hashlib.sha256((template + written).encode()).hexdigest() if template else "the server's"
    conditions = {"chat_template_sha256": known if chat else "none", **endpoint.conditions()}
    identity = model_id or endpoint.identity
    return Answerer(answer, item_set.mode, conditions, identity, n_parallel=endpoint.concurrency)


def check_context(endpoint: Endpoint, item_set: ItemSet) -> int:
    """The context in tokens that the longest items need at least.

    0 where the server does not report its context or shows no tokenizer. A server that lacks the room may cut
    answers off without a word.

    Raises:
        ContextOverflowError: it is more than the server has.
    """
    n_ctx = endpoint.facts.n_ctx
    tokens = tokenizer(endpoint) if n_ctx else None
    if tokens is None or n_ctx is None:
        return 0
    chat = item_set.mode == "chat"
    before, after = (shown_around(endpoint) or ("", "")) if chat else ("", "")
    prompts = (item.asked(item_set.instruction) if chat else item.prompt for item in item_set.items)
    longest = sorted((before + prompt + after for prompt in prompts), key=len)[-COUNTED_ITEMS:]
    needed = max(len(tokens(text)) for text in longest) + item_set.max_tokens
    if needed > n_ctx:
        raise ContextOverflowError(
            f"the set {item_set.name} needs {needed:,} tokens of context, and the server has {n_ctx:,}",
            where=endpoint.base_url,
            hint="start the server with a larger context for each request",
        )
    return needed


def score_set(
    endpoint: Endpoint,
    item_set: ItemSet,
    folder: str | Path,
    options: Options = DEFAULTS,
    *,
    model_id: str = "",
) -> SetRun:
    """``score_set`` of the scores stage over an endpoint: what is answered stays, whatever fails later.

    Args:
        model_id: the model's SHA-256, where it is known; else ``Endpoint.identity``.

    Raises:
        SandboxError: the set is code and there is no sandbox; nothing has been asked yet.
        ContextOverflowError: an item does not fit into the server's context, or the server cuts it.
        EndpointError: the server failed at an item for good; a second call goes on from there.
    """
    if options.thinking != "template":
        raise EndpointError(
            "a server decides about thinking when it starts",
            where=endpoint.base_url,
            hint="start it with thinking on or off, and leave --thinking out",
        )
    check_context(endpoint, item_set)
    return answerer(endpoint, item_set, model_id).score(item_set, folder, options)
