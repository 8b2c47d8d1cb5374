"""Generate with an open model, in its own chat template or from any tokens; greedy by default."""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama.model import PLAIN_CHAT, PLAIN_STOP, Floats, Model

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0: the most likely token, whatever the other fields are."""

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # nor NaN
            raise ModelError(f"temperature is {self.temperature}", hint="use 0 (greedy) or more, such as 0.7")


GREEDY = Sampling()
Choice = Callable[[Floats], Any]  # of a token, from logits
BAR_SECONDS, PROMPT_END = 2.0, 16  # before a progress bar; tokens that hold any mark of thinking


class Completion(NamedTuple):
    """What a model answered."""

    text: str
    token_ids: tuple[int, ...]  # without the ending token, with those of a stop text
    finish_reason: str  # eos (the model ended it), stop (a stop text came), length (no room for more) or time
    n_prompt: int  # tokens

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids)


def generate(
    model: Model,
    prompt: Sequence[int],
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),  # texts that end it, behind the thinking of a model that thinks
    until: float = math.inf,  # a time by `time.monotonic`
) -> Completion:
    """Continue the prompt's tokens from a cleared context. Errors: of `Model.evaluate`."""
    text, reason, tokens, stops = "", "length", list[int](), [*filter(None, stop)]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    end = b"".join(map(model.token_bytes, prompt[-PROMPT_END:])) if stops else b""
    opened = opens_thinking(end.decode("utf-8", "replace"))
    model.clear()
    choose: Choice = np.argmax
    if sampling.temperature > 0:
        model.llama.set_seed(sampling.seed)
        limits = {name: getattr(sampling, name) for name in ("top_k", "top_p", "min_p")}
        sampler = model.llama._init_sampler(temp=sampling.temperature, repeat_penalty=1.0, **limits)
        choose = lambda _: sampler.sample(model.llama._ctx, -1)  # noqa: E731
    most = min(max_tokens, model.settings.n_ctx - len(prompt))
    chosen = next_tokens(model, model.evaluate(prompt), most, choose)
    for token in tqdm(chosen, total=most, desc="answer", unit="token", delay=BAR_SECONDS):
        if model.ends(token):
            reason = "eos"
            break
        tokens.append(token)
        text += decoder.decode(model.token_bytes(token))
        start = answer_start(text, opened) if stops else None
        ends = [at for mark in stops if start is not None and (at := text.find(mark, start)) >= 0]
        if ends:
            return Completion(text[: min(ends)], tuple(tokens), "stop", len(prompt))
        if time.monotonic() > until:
            reason = "time"
            break
    return Completion(text + decoder.decode(b"", final=True), tuple(tokens), reason, len(prompt))


def next_tokens(model: Model, logits: Floats, n: int, choose: Choice = np.argmax) -> Iterator[int]:
    """Up to ``n`` tokens behind these logits, to one that ends it; evaluated when the next is asked for."""
    for left in reversed(range(n)):
        yield (token := int(choose(logits)))
        if not left or model.ends(token):
            return
        logits = model.evaluate([token])


def chat_text(model: Model, prompt: str, **variables: bool) -> str:  # such as ``enable_thinking``
    """A chat in the model's template or `PLAIN_CHAT`, up to its answer. `ModelError`: it drops the prompt."""
    plain = PLAIN_CHAT.replace("{prompt}", prompt)
    return model.template.render(prompt, variables) if model.has_template else plain


def chat_prompt(model: Model, prompt: str) -> list[int]:
    """Token ids of `chat_text`, with at most one BOS."""
    return model.with_bos(model.tokenize(chat_text(model, prompt)))


def chat(
    model: Model, prompt: str, max_tokens: int = 256, sampling: Sampling = GREEDY, until: float = math.inf
) -> Completion:
    """The answer to a chat in the model's own template; options as `generate`."""
    stop = () if model.has_template else (PLAIN_STOP,)
    return generate(model, chat_prompt(model, prompt), max_tokens, sampling, stop, until)


def answer_table(
    model: Model, prompts: Sequence[str], max_tokens: int = 256, until: float = math.inf
) -> pd.DataFrame:
    """Greedy answers, a row each: ``prompt``, ``answer``, ``tokens``, ``finish_reason``; as `generate`."""
    import pandas as pd

    rows = list[tuple[str, str, int, str]]()
    for prompt in tqdm(prompts, desc="answers"):
        # then an answer is cut, and later prompts are not asked (``time``)
        late = bool(rows) and time.monotonic() > until
        answer = Completion("", (), "time", 0) if late else chat(model, prompt, max_tokens, until=until)
        rows.append((prompt, answer.text, answer.n_tokens, answer.finish_reason))
    return pd.DataFrame(rows, columns=["prompt", "answer", "tokens", "finish_reason"])


MARKS = [(f"<{word}>", f"</{word}>") for word in ("think", "thinking", "thought", "reasoning")]
MARKS += [("[THINK]", "[/THINK]")]  # around the thinking that a model writes before its answer


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends with the mark that begins a thinking, as some templates do."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in MARKS))


def answer_start(text: str, opened: bool = False) -> int | None:
    """Where the answer begins: behind the last thinking, which the prompt may have opened; None within it."""
    start = max((at + len(end) for _, end in MARKS if (at := text.rfind(end)) >= 0), default=0)
    inside = any(text.find(opening, start) >= 0 for opening, _ in MARKS)
    return None if inside or (opened and not start) else start
