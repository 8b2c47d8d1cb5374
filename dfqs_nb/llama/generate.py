"""Generate with an open model: chats in its own template, plain completions, and streams.

Greedy decoding from a cleared context is the default, so that the same prompt gives the same tokens.
"""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama.model import PLAIN_CHAT, PLAIN_STOP, Model
from dfqs_nb.llama.template import Message
from dfqs_nb.llama.thinking import answer_start, opens_thinking

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy: the most likely token, and the lowest id of equals.

    ``top_k``, ``top_p``, ``min_p`` and ``seed`` count only above temperature 0; there is no repeat penalty.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # nor NaN
            raise ModelError(f"temperature is {self.temperature}", hint="use 0 (greedy) or more, such as 0.7")


GREEDY = Sampling()
BAR_SECONDS = 2.0  # an answer that takes longer gets a progress bar
PROMPT_END = 16  # tokens, which hold any mark that begins a thinking


@dataclass(frozen=True)
class Completion:
    """What a model answered."""

    text: str
    token_ids: tuple[int, ...]  # without the ending token, with those of a stop text
    finish_reason: str  # eos (the model ended it), stop (a stop text came), length (no room for more) or time
    n_prompt: int  # tokens

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids)


class TextStream:
    """Pieces of text as they come; after the last one, ``completion`` holds the whole.

    The prompt's tokens are continued from a cleared context. A piece never ends inside a character, and never
    holds the start of a stop text. A stop text counts only behind the thinking of a model that thinks.

    ``until``: the time by `time.monotonic` behind which no further token is generated.

    Reading it raises what `Model.evaluate` raises.
    """

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        until: float = math.inf,
    ) -> None:
        self._model, self._prompt, self._sampling = model, list(prompt), sampling
        self._until = until
        self._max_tokens, self._stop = max_tokens, tuple(text for text in stop if text)
        self._pieces = self._run()
        self._completion: Completion | None = None

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def completion(self) -> Completion:
        """The completion; text that was not yet read from the stream is generated first."""
        for _ in self._pieces:
            pass
        if self._completion is None:
            raise ModelError("the stream was cut off by an error", where=self._model.path, hint="ask again")
        return self._completion

    def _run(self) -> Iterator[str]:
        text, shown, reason, tokens = "", 0, "length", list[int]()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        end = b"".join(map(self._model.token_bytes, self._prompt[-PROMPT_END:])) if self._stop else b""
        opened = opens_thinking(end.decode("utf-8", "replace"))
        for token in self._generate():
            if self._model.ends(token):
                reason = "eos"
                break
            tokens.append(token)
            text += decoder.decode(self._model.token_bytes(token))
            start = answer_start(text, opened) if self._stop else None
            stops = [at for mark in self._stop if start is not None and (at := text.find(mark, start)) >= 0]
            if stops:
                text, reason = text[: min(stops)], "stop"
                break
            if time.monotonic() > self._until:
                reason = "time"
                break
            safe = len(text) - _held_back(text, self._stop)
            if safe > shown:
                yield text[shown:safe]
                shown = safe
        text += "" if reason == "stop" else decoder.decode(b"", final=True)
        if len(text) > shown:
            yield text[shown:]
        self._completion = Completion(text, tuple(tokens), reason, len(self._prompt))

    def _generate(self) -> Iterator[int]:
        """Chosen tokens: prefill from a cleared context, then one evaluation for each but the first."""
        model, how, sampler = self._model, self._sampling, None
        model.clear()
        logits = model.evaluate(self._prompt)
        if how.temperature > 0:
            model.llama.set_seed(how.seed)
            limits = {name: getattr(how, name) for name in ("top_k", "top_p", "min_p")}
            sampler = model.llama._init_sampler(temp=how.temperature, repeat_penalty=1.0, **limits)
        most = min(self._max_tokens, model.settings.n_ctx - len(self._prompt))
        begun, bar = time.monotonic(), None
        with ExitStack() as stack:
            for done in range(1, most + 1):
                token = int(sampler.sample(model.llama._ctx, -1) if sampler else np.argmax(logits))
                yield token
                if done < most:
                    logits = model.evaluate([token])
                if bar:
                    bar.update()
                elif time.monotonic() - begun > BAR_SECONDS:  # a bar for each short answer would take longer
                    bar = stack.enter_context(tqdm(total=most, initial=done, desc="answer", unit="token"))


def _held_back(text: str, stop: Sequence[str]) -> int:
    r"""Characters at the end that may turn out to begin a stop text.

    >>> _held_back("def f():\n", ["\n\n", "\nclass"])
    1
    """
    sizes = {mark: min(len(mark), len(text)) for mark in stop}
    held = (n for mark, most in sizes.items() for n in range(1, most + 1) if mark.startswith(text[-n:]))
    return max(held, default=0)


def chat_prompt(model: Model, prompt: str | Sequence[Message], **variables: bool) -> list[int]:
    """Token ids of `chat_text`, with at most one BOS."""
    return model.with_bos(model.tokenize(chat_text(model, prompt, **variables)))


def chat_text(model: Model, prompt: str | Sequence[Message], **variables: bool) -> str:
    """The text of a chat in the model's own template, up to where the answer begins.

    A file without a template, as a base model's, gets the messages in `PLAIN_CHAT`. A template may ask for
    ``variables``, such as ``enable_thinking``. Raises `ModelError` when it fails, refuses the messages or
    leaves the question out.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not model.has_template:
        return PLAIN_CHAT.replace("{prompt}", "\n".join(str(message["content"]) for message in messages))
    return model.template.render(messages, variables)


def stream_chat(
    model: Model,
    prompt: str | Sequence[Message],
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    until: float = math.inf,
) -> TextStream:
    """Stream the answer to a chat, piece by piece; ``.completion`` of the result is the whole."""
    stop = stop if model.has_template else (*stop, PLAIN_STOP)
    return TextStream(model, chat_prompt(model, prompt), max_tokens, sampling, stop, until)


def chat(
    model: Model,
    prompt: str | Sequence[Message],
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
) -> Completion:
    """The answer to a chat in the model's own template, greedy by default."""
    return stream_chat(model, prompt, max_tokens, sampling, stop).completion


def complete(
    model: Model, text: str, max_tokens: int = 256, sampling: Sampling = GREEDY, stop: Sequence[str] = ()
) -> Completion:
    """The continuation of plain text, such as code: no template, and control tokens have no meaning."""
    tokens = model.with_bos(model.tokenize(text, special=False))
    return TextStream(model, tokens, max_tokens, sampling, stop).completion


def answer_table(
    model: Model, prompts: Sequence[str], max_tokens: int = 256, seconds: float = math.inf
) -> pd.DataFrame:
    """Greedy answers, one row a prompt: ``prompt``, ``answer``, ``tokens`` and ``finish_reason``.

    When the ``seconds`` are over, the answer that is being written is cut, behind its first token at the
    earliest, and later prompts are not asked: their ``finish_reason`` is ``time``.
    """
    import pandas as pd

    rows, until = list[tuple[str, str, int, str]](), time.monotonic() + seconds
    for prompt in tqdm(prompts, desc="answers", leave=False):
        if rows and time.monotonic() > until:
            rows.append((prompt, "", 0, "time"))
            continue
        answer = stream_chat(model, prompt, max_tokens, until=until).completion
        rows.append((prompt, answer.text, answer.n_tokens, answer.finish_reason))
    return pd.DataFrame(rows, columns=["prompt", "answer", "tokens", "finish_reason"])
