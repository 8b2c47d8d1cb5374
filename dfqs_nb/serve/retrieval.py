"""Long context through a server: notebook 05's retrieval, asked in text, with its lengths in tokens.

A server that cuts a long prompt without a word would look like a model that forgets. So the tokens that the
server counts are compared with those that were sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dfqs_nb import context
from dfqs_nb.serve.client import Endpoint, Reply
from dfqs_nb.serve.errors import BusyError, ContextOverflowError
from dfqs_nb.serve.facts import Text, read

MARK = "MESSAGE-STANDS-HERE"
SAMPLE = "The red key is kept in the old box. " * 8
MOST_CHARACTERS = 12  # a token, on the average of a text
CUT_SHARE, CUT_TOKENS = 0.02, 8  # by which halves may have more tokens than their whole, which ends in no cut


class _Tokens(BaseModel):
    tokens: list[int]


class _Applied(BaseModel):
    prompt: Text


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
        page = read(_Tokens, endpoint.post(path, **{name: text}, **options))
        return page.tokens if page else None

    start = ids("")  # llama-cpp-python puts a BOS in front
    if start is None:
        return None
    n_start = len(start)

    def tokens(text: str) -> list[int]:
        counted = ids(text)
        if counted is None:
            what = "the server counted tokens and stopped doing so"
            hint = "read the server's log; the same call goes on from there"
            raise BusyError(what, where=endpoint.base_url, hint=hint)
        return counted[n_start:]

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
    page = read(_Applied, endpoint.post("/apply-template", messages=[{"role": "user", "content": MARK}]))
    if page is None or MARK not in page.prompt:
        return None
    before, _, after = page.prompt.partition(MARK)
    return before, after


class PromptGuard:
    """Notices a server that cuts long prompts and answers from the rest.

    It compares ``usage.prompt_tokens`` with what the text should have. Where that is too few, it asks for
    the tokens of both halves of the text: if they have more than the whole, the whole was cut.

    Args:
        ask: sends a text for an answer of one token.
        share: of the tokens that a text should have, below which the halves are asked for.
    """

    def __init__(self, url: str, ask: Callable[[str], Reply], share: float = 0.95) -> None:
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


@dataclass(frozen=True)
class _Room:
    n_ctx: int


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
        self.settings = _Room(endpoint.facts.n_ctx or 2**31)
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
