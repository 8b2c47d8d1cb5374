"""Haystacks with a fixed number of keys, sized by a model's own tokens, from a frozen prompt set.

A text of any length hides the same number of keys K (RULER's multi-key rule, Hsieh et al. 2024,
arXiv:2404.06654), spread over its whole depth. It is drawn fresh for its length, and every key is asked for.
So accuracy changes with the length alone, not with the number of distractors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, product
from typing import NamedTuple

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.prompts import PromptSet, load_prompts
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import Model

# The long-context probe of each tier.
PROBES = {"nano": "long-context-nano-keys", "standard": "long-context-standard"}
MARK = "HAYSTACK-STANDS-HERE"
N_STRATA = 5  # of depth; a text with fewer keys takes the next strata with each further text
DRAWS = 20  # sentences that may be too long in a row before a text counts as full


class Probe(PromptSet):
    """The wording of a long-context probe: templates with ``{key}``, ``{code}``, ``{name}`` and other slots.

    ``needles`` is K, the keys in a text of any length. ``keys``: two lists of words that make their names, or
    none for a single key. ``joint`` stands between text and question.
    """

    seed: int
    tasks: tuple[str, ...]
    intro: str
    joint: str
    sentences: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]
    needle: str
    question: str
    answer_prefix: str
    answer: str
    code_digits: int
    keys: tuple[tuple[str, ...], ...]
    needles: int

    def key_names(self, draw: random.Random, n: int) -> list[str]:
        """Names of keys, no two alike."""
        return draw.sample([" ".join(words) for words in product(*self.keys)], n)

    def codes(self, draw: random.Random, n: int) -> list[str]:
        """Codes, no two alike."""
        return [f"{code:0{self.code_digits}}" for code in draw.sample(range(10**self.code_digits), n)]


@dataclass(frozen=True)
class Question:
    """A question about a haystack; ``name`` is unique in its text. Answers come stripped of blanks.

    ``depth``: where its fact begins, 0 to 1. ``prompt``: the tokens after the haystack. ``others``: the right
    answers for the text's other keys.
    """

    name: str
    task: str
    depth: float
    prompt: tuple[int, ...] = field(repr=False)
    expected: str = ""
    others: tuple[str, ...] = field(repr=False, default=())
    max_tokens: int = 16

    def is_right(self, text: str) -> bool:
        """Whether an answer begins with the right one."""
        return text.startswith(self.expected)

    def is_another(self, text: str) -> bool:
        """Whether an answer is right for another key of the text."""
        return text.startswith(self.others)


@dataclass(frozen=True)
class Case:
    """One haystack: ``body`` holds all tokens before the question."""

    haystack: int
    length: int
    body: tuple[int, ...] = field(repr=False)
    questions: tuple[Question, ...]


def around(model: Model) -> tuple[str, str]:
    """What the chat template puts before and after a message; plain text without one."""
    if not model.header.get("tokenizer.chat_template"):
        return "", "\nAnswer:"
    before, _, after = chat_text(model, MARK).partition(MARK)
    return before, after


def probe_of(name: str) -> Probe:
    """A probe by its name or tier; a `DfqsError` says that there is none."""
    return load_prompts(PROBES.get(name, name), Probe)


def sentences(probe: Probe, draw: random.Random) -> Iterator[str]:
    """Endless filler: templates of the set with words drawn into their slots.

    >>> next(sentences(probe_of("long-context-nano"), random.Random(3)))
    'Rain fell softly on the roof.'
    """
    while True:
        text = draw.choice(probe.sentences)
        for slot, words in probe.slots.items():
            while f"{{{slot}}}" in text:
                text = text.replace(f"{{{slot}}}", draw.choice(words), 1)
        yield text[0].upper() + text[1:]


class _Fact(NamedTuple):
    """A sentence to be found: where it should begin (0 to 1), and the words in it."""

    target: float
    words: dict[str, str]
    text: str


class Haystacks:
    """All texts of a probe for one model; a `DfqsError`: ``shortest`` tokens cannot hold the keys."""

    def __init__(self, model: Model, probe: Probe, shortest: int | None = None) -> None:
        before, after = around(model)
        head = model.with_bos([*model.tokenize(before), *model.tokenize(probe.intro, special=False)])
        self.probe, self._head, self._after = probe, tuple(head), tuple(model.tokenize(after))
        self._tokenize = lru_cache(maxsize=8192)(model.tokenize)
        words = {"key": " ".join(max(part, key=len) for part in probe.keys), "code": "0" * probe.code_digits}
        # evaluated for the longest question and its answer
        self.question_tokens = len(self._tail(words)) + self._size(probe.answer.format(**words))
        facts = probe.needles * self._size(probe.needle.format(**words))
        beside = 12 * probe.needles if probe.needles > 1 else 0
        # of the shortest context that holds every fact, and sentences beside them
        self.least_tokens = len(self._head) + self.question_tokens + facts + beside
        if shortest is not None and shortest < self.least_tokens:
            what = f"{shortest} tokens cannot hold the keys of {probe.name}"
            raise DfqsError(what, hint=f"use lengths from {self.least_tokens} tokens on")

    def case(self, number: int, length: int) -> Case:
        """The text of this number at this length, with a question for every key."""
        probe, draw = self.probe, random.Random(f"{self.probe.seed}:{self.probe.name}:{length}:{number}")
        facts = self._facts(number, draw)
        # at the very beginning, without the blank before it, a sentence may take more tokens
        texts = [*probe.sentences, *(fact.text for fact in facts)]
        first = max(0, *(len(self._plain(text)) - self._size(text) for text in texts))
        room = length - len(self._head) - self.question_tokens - first
        filler, drawn = list[str](), sentences(probe, draw)
        left = room - sum(self._size(fact.text) for fact in facts)
        while text := next((text for text in islice(drawn, DRAWS) if self._size(text) <= left), ""):
            filler.append(text)
            left -= self._size(text)
        tokens, starts = self._laid_out(facts, filler, room)
        answers, questions = [probe.answer.format(**fact.words) for fact in facts], []
        for fact, expected in zip(facts, answers, strict=True):
            depth, others = starts[fact.text] / max(1, len(tokens)), tuple(sorted({*answers} - {expected}))
            about = depth, self._tail(fact.words), expected, others, self._size(expected) + 1
            questions.append(Question(fact.words["key"] or "key", probe.tasks[0], *about))
        return Case(number, length, self._head + tuple(tokens), tuple(questions))

    def _facts(self, number: int, draw: random.Random) -> list[_Fact]:
        """The keys of a text, in strata of depth."""
        probe, n_strata = self.probe, max(self.probe.needles, N_STRATA)
        codes, facts = probe.codes(draw, probe.needles), []
        for i, (key, code) in enumerate(zip(probe.key_names(draw, probe.needles), codes, strict=True)):
            words, stratum = {"key": key, "code": code}, (number * probe.needles + i) % n_strata
            target = (stratum + draw.random()) / n_strata
            facts.append(_Fact(target, words, probe.needle.format(**words)))
        return sorted(facts, key=lambda fact: fact.target)

    def _laid_out(
        self, facts: Sequence[_Fact], filler: Sequence[str], room: int
    ) -> tuple[list[int], dict[str, int]]:
        """Tokens of facts among filler, each at the sentence's end nearest its target; where each begins."""
        tokens, starts, waiting = list[int](), dict[str, int](), list(facts)
        for text in [*filler, None]:
            half = self._size(text) / 2 if text else room
            while waiting and waiting[0].target * room <= len(tokens) + half:
                fact = waiting.pop(0)
                starts[fact.text] = len(tokens)
                tokens += self._plain((" " if tokens else "") + fact.text)
            tokens += self._plain((" " if tokens else "") + text) if text else ()
        return tokens, starts

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenize(text, special=False))

    def _size(self, text: str) -> int:
        return len(self._plain(" " + text))

    def _tail(self, words: dict[str, str]) -> tuple[int, ...]:
        """Tokens of a question, and of what its answer begins with."""
        question, prefix = (it.format(**words) for it in (self.probe.question, self.probe.answer_prefix))
        return (*self._plain(self.probe.joint + question), *self._after, *self._plain(prefix))
