"""What a model is asked: one question of a set, and how a set is answered."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from dfqs_nb.core.errors import PromptError
from dfqs_nb.llama.generate import GREEDY, Sampling, chat_text
from dfqs_nb.llama.model import Model

THINKING = ("template", "on", "off")


@dataclass(frozen=True)
class Options:
    """How a set is answered."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = GREEDY.top_p
    seed: int = GREEDY.seed
    thinking: str = "template"  # ``template`` leaves it to the chat template, ``on`` and ``off`` tell it
    thinking_tokens: int = 0  # on top of the set's own limit for the answer
    limit: int = 0  # questions of a set, evenly from its families; 0: all
    allow_unsandboxed: bool = False
    fresh: bool = False
    progress: bool = True
    until: float = inf  # `time.monotonic` at which asking ends, within an answer, too; 0: none is asked

    def __post_init__(self) -> None:
        if self.thinking not in THINKING:
            hint = f"use one of {', '.join(THINKING)}"
            raise PromptError(f"thinking is {self.thinking!r}", hint=hint)

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


DEFAULTS = Options()


@dataclass(frozen=True)
class Request:
    """One question as it goes to a model: a chat's message, or text to continue or to choose an end of."""

    text: str
    chat: bool
    max_tokens: int
    stop: tuple[str, ...] = ()
    options: Options = DEFAULTS
    choices: tuple[str, ...] = ()  # with what stands between the text and them

    def rendered(self, model: Model) -> str:
        """The text that this model gets; templates have two names for the switch of a thinking."""
        told = () if self.options.thinking == "template" else ("enable_thinking", "thinking")
        variables = dict.fromkeys(told, self.options.thinking == "on")
        return chat_text(model, self.text, **variables) if self.chat else self.text

    def tokens(self, model: Model) -> list[int]:
        """Token ids of the prompt that this model gets."""
        return model.with_bos(model.tokenize(self.rendered(model), special=self.chat))
