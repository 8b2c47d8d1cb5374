"""Generate with an open model: chats in its own template, plain completions, and streams.

Greedy decoding from a cleared context is the default, so that the same prompt gives the same tokens.
"""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama.model import PLAIN_CHAT, PLAIN_STOP, Model
from dfqs_nb.llama.template import answer_start, opens_thinking

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


@dataclass(eq=False)
class TextStream:
    """Pieces of text as they come; after the last one, ``completion`` holds the whole.

    The prompt's tokens are continued from a cleared context. A piece never ends inside a character, and never
    holds the start of a stop text. Reading it raises what `Model.evaluate` raises.
    """

    model: Model
    prompt: Sequence[int]
    max_tokens: int = 256
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()  # texts, which count only behind the thinking of a model that thinks
    until: float = math.inf  # the time by `time.monotonic` behind which no further token is generated

    def __post_init__(self) -> None:
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
            raise ModelError("the stream was cut off by an error", where=self.model.path, hint="ask again")
        return self._completion

    def _run(self) -> Iterator[str]:
        text, shown, reason, tokens = "", 0, "length", list[int]()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        stops = [mark for mark in self.stop if mark]
        held = max(map(len, stops), default=1) - 1  # characters at the end that may begin a stop text
        end = b"".join(map(self.model.token_bytes, self.prompt[-PROMPT_END:])) if stops else b""
        opened = opens_thinking(end.decode("utf-8", "replace"))
        for token in self._generate():
            if self.model.ends(token):
                reason = "eos"
                break
            tokens.append(token)
            text += decoder.decode(self.model.token_bytes(token))
            start = answer_start(text, opened) if stops else None
            ends = [at for mark in stops if start is not None and (at := text.find(mark, start)) >= 0]
            if ends:
                text, reason = text[: min(ends)], "stop"
                break
            if time.monotonic() > self.until:
                reason = "time"
                break
            if len(text) - held > shown:
                yield text[shown : len(text) - held]
                shown = len(text) - held
        text += "" if reason == "stop" else decoder.decode(b"", final=True)
        if len(text) > shown:
            yield text[shown:]
        self._completion = Completion(text, tuple(tokens), reason, len(self.prompt))

    def _generate(self) -> Iterator[int]:
        """Chosen tokens: prefill from a cleared context, then one evaluation for each but the first."""
        model, how, sampler = self.model, self.sampling, None
        model.clear()
        logits = model.evaluate(self.prompt)
        if how.temperature > 0:
            model.llama.set_seed(how.seed)
            limits = {name: getattr(how, name) for name in ("top_k", "top_p", "min_p")}
            sampler = model.llama._init_sampler(temp=how.temperature, repeat_penalty=1.0, **limits)
        most = min(self.max_tokens, model.settings.n_ctx - len(self.prompt))
        for done in tqdm(range(1, most + 1), desc="answer", unit="token", delay=BAR_SECONDS):
            token = int(sampler.sample(model.llama._ctx, -1) if sampler else np.argmax(logits))
            yield token
            if done < most:
                logits = model.evaluate([token])


def chat_prompt(model: Model, prompt: str, **variables: bool) -> list[int]:
    """Token ids of `chat_text`, with at most one BOS."""
    return model.with_bos(model.tokenize(chat_text(model, prompt, **variables)))


def chat_text(model: Model, prompt: str, **variables: bool) -> str:
    """The text of a chat in the model's own template, up to where the answer begins.

    A file without a template, as a base model's, gets the prompt in `PLAIN_CHAT`. A template may ask for
    ``variables``, such as ``enable_thinking``. Raises `ModelError` when it fails, or leaves the prompt out.
    """
    if not model.has_template:
        return PLAIN_CHAT.replace("{prompt}", prompt)
    return model.template.render(prompt, variables)


def stream_chat(
    model: Model, prompt: str, max_tokens: int = 256, sampling: Sampling = GREEDY, until: float = math.inf
) -> TextStream:
    """Stream the answer to a chat, piece by piece; ``.completion`` of the result is the whole."""
    stop = () if model.has_template else (PLAIN_STOP,)
    return TextStream(model, chat_prompt(model, prompt), max_tokens, sampling, stop, until)


def chat(model: Model, prompt: str, *options: Any, **named: Any) -> Completion:
    """The answer to a chat in the model's own template, greedy by default; options as `stream_chat`."""
    return stream_chat(model, prompt, *options, **named).completion


def complete(model: Model, text: str, max_tokens: int = 256, **options: Any) -> Completion:
    """The continuation of plain text, such as code: no template, and control tokens have no meaning.

    Options as `TextStream`.
    """
    tokens = model.with_bos(model.tokenize(text, special=False))
    return TextStream(model, tokens, max_tokens, **options).completion


def answer_table(
    model: Model, prompts: Sequence[str], max_tokens: int = 256, until: float = math.inf
) -> pd.DataFrame:
    """Greedy answers, one row a prompt: ``prompt``, ``answer``, ``tokens`` and ``finish_reason``.

    At the time ``until`` (`time.monotonic`) the answer that is being written is cut, behind its first token
    at the earliest, and later prompts are not asked: their ``finish_reason`` is ``time``.
    """
    import pandas as pd

    rows = list[tuple[str, str, int, str]]()
    for prompt in tqdm(prompts, desc="answers"):
        if rows and time.monotonic() > until:
            rows.append((prompt, "", 0, "time"))
            continue
        answer = stream_chat(model, prompt, max_tokens, until=until).completion
        rows.append((prompt, answer.text, answer.n_tokens, answer.finish_reason))
    return pd.DataFrame(rows, columns=["prompt", "answer", "tokens", "finish_reason"])
