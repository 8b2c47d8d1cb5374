"""Generate with an open model: chats in its own template, plain completions, and streams.

Greedy decoding from a cleared context is the default, so that the same prompt gives the same tokens.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama.model import Model

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


GREEDY = Sampling()


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    ``finish_reason``: ``"eos"`` (the model ended it), ``"stop"`` (a stop text came) or ``"length"``
    (``max_tokens`` or the context was used up). ``token_ids`` excludes the ending token but includes those
    of a stop text. ``decode_seconds`` covers ``n_decoded`` evaluations, one token each.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    n_prompt: int
    prefill_seconds: float
    decode_seconds: float
    n_decoded: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids)

    @property
    def prefill_tokens_per_sec(self) -> float:
        """Prompt tokens a second."""
        return self.n_prompt / self.prefill_seconds if self.prefill_seconds else float("nan")

    @property
    def decode_tokens_per_sec(self) -> float:
        """Evaluated answer tokens a second; NaN when the answer was one token."""
        return self.n_decoded / self.decode_seconds if self.n_decoded else float("nan")


class TextStream:
    """Pieces of text as they come; after the last one, ``completion`` holds the whole.

    A piece never ends inside a character, and never holds the start of a stop text.
    """

    def __init__(
        self, model: Model, prompt: Sequence[int], max_tokens: int, sampling: Sampling, stop: Sequence[str]
    ) -> None:
        self._model, self._prompt, self._sampling = model, list(prompt), sampling
        self._max_tokens, self._stop = max_tokens, tuple(stop)
        self._tokens: list[int] = []
        self._seconds = [0.0, 0.0]
        self._n_decoded = 0
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
        text, shown, reason = "", 0, "length"
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in self._generate():
            if self._model.ends(token):
                reason = "eos"
                break
            self._tokens.append(token)
            text += decoder.decode(self._model.token_bytes(token))
            cut = _first_stop(text, self._stop)
            if cut is not None:
                text, reason = text[:cut], "stop"
                break
            safe = len(text) - _held_back(text, self._stop)
            if safe > shown:
                yield text[shown:safe]
                shown = safe
        text += "" if reason == "stop" else decoder.decode(b"", final=True)
        if len(text) > shown:
            yield text[shown:]
        self._completion = Completion(
            text, tuple(self._tokens), reason, len(self._prompt), *self._seconds, self._n_decoded
        )

    def _generate(self) -> Iterator[int]:
        """Chosen tokens: prefill from a cleared context, then one evaluation for each but the first."""
        self._model.clear()
        logits = self._timed(self._prompt, 0)
        choose = _chooser(self._model, self._sampling)
        limit = min(self._max_tokens, self._model.settings.n_ctx - len(self._prompt))
        for left in range(limit - 1, -1, -1):
            token = choose(logits)
            yield token
            if left:
                logits = self._timed([token], 1)
                self._n_decoded += 1

    def _timed(self, tokens: Sequence[int], phase: int) -> np.ndarray:
        started = time.perf_counter()
        logits = self._model.evaluate(tokens)
        self._seconds[phase] += time.perf_counter() - started
        return logits


def _chooser(model: Model, sampling: Sampling) -> Any:
    if sampling.temperature <= 0:
        return lambda logits: int(np.argmax(logits))
    model.llama.set_seed(sampling.seed)
    sampler = model.llama._init_sampler(
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        temp=sampling.temperature,
        repeat_penalty=1.0,
    )
    return lambda _logits: int(sampler.sample(model.llama._ctx, -1))


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop text begins, or None."""
    found = [at for at in (text.find(one) for one in stop if one) if at >= 0]
    return min(found, default=None)


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may turn out to begin a stop text.

    >>> _held_back("def f():\\n", ["\\n\\n", "\\nclass"])
    1
    """
    lengths = (n for one in stop for n in range(min(len(one), len(text)), 0, -1) if one.startswith(text[-n:]))
    return max(lengths, default=0)


def chat_prompt(model: Model, prompt: str | Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a chat in the model's own template, up to where the answer begins, with at most one BOS.

    Args:
        prompt: the user's message, or messages with ``role`` and ``content``.

    Raises:
        ModelError: the header has no chat template, or the template refuses the messages.
    """
    return model.with_bos(model.tokenize(chat_text(model, prompt)))


def chat_text(model: Model, prompt: str | Sequence[dict[str, str]]) -> str:
    """The text of a chat in the model's own template, up to where the answer begins.

    Raises:
        ModelError: the header has no chat template, or the template refuses the messages.
    """
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = model.header.get("tokenizer.chat_template")
    if not template:
        raise ModelError(
            "its header has no chat template", where=model.path, hint="use complete() with plain text"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    llama = model._open()
    bos, eos = (_token_text(llama, token) for token in (llama.token_bos(), llama.token_eos()))
    try:
        return Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)(messages=messages).prompt
    except Exception as error:  # a template is code of the file's author, and may raise anything
        raise ModelError(
            f"its chat template fails ({error})", where=model.path, hint="use complete() with plain text"
        ) from error


def _token_text(llama: Any, token: int) -> str:
    return llama._model.token_get_text(token) if token >= 0 else ""


def stream_tokens(
    model: Model,
    prompt: Sequence[int],
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
) -> TextStream:
    """Stream the continuation of these tokens, from a cleared context.

    Raises (when the stream is read):
        ContextFullError: the prompt alone exceeds ``n_ctx``.
        NanLogitsError, DecodeError: as ``Model.evaluate``.
    """
    return TextStream(model, prompt, max_tokens, sampling, stop)


def stream_chat(
    model: Model,
    prompt: str | Sequence[dict[str, str]],
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
) -> TextStream:
    """Stream the answer to a chat, piece by piece; ``.completion`` of the result is the whole."""
    return stream_tokens(model, chat_prompt(model, prompt), max_tokens, sampling, stop)


def chat(
    model: Model,
    prompt: str | Sequence[dict[str, str]],
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
    return stream_tokens(
        model, model.with_bos(model.tokenize(text, special=False)), max_tokens, sampling, stop
    ).completion


def answer_table(model: Model, prompts: Sequence[str], max_tokens: int = 256) -> pd.DataFrame:
    """Greedy answers to several prompts, each from a cleared context.

    One row a prompt: ``prompt``, ``answer``, ``tokens``, ``finish_reason`` (see ``Completion``).
    """
    import pandas as pd

    answers = [chat(model, prompt, max_tokens) for prompt in prompts]
    rows = [
        (prompt, one.text, len(one.token_ids), one.finish_reason)
        for prompt, one in zip(prompts, answers, strict=True)
    ]
    return pd.DataFrame(rows, columns=["prompt", "answer", "tokens", "finish_reason"])


@dataclass(frozen=True)
class Repeat:
    """The same prompt answered twice; ``first_difference`` is the index of the first token that differs."""

    first: Completion
    second: Completion
    first_difference: int | None

    @property
    def same(self) -> bool:
        """Whether the tokens are the same."""
        return self.first_difference is None


def same_tokens_twice(model: Model, prompt: str, max_tokens: int = 64) -> Repeat:
    """Answer ``prompt`` twice greedily, each time from a cleared context, and compare token by token."""
    first, second = (chat(model, prompt, max_tokens) for _ in range(2))
    a, b = first.token_ids, second.token_ids
    differs = (i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1])
    return Repeat(first, second, next(differs, None))
