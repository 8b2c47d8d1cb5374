"""Haystacks with a fixed number of keys, sized by a model's own tokens, from a frozen prompt set.

A text of any length hides the same number of keys K (RULER's multi-key rule, Hsieh et al. 2024,
arXiv:2404.06654), spread over its whole depth. It is drawn fresh for its length, and every key is asked for.
So accuracy changes with the length alone, not with the number of distractors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, product
from typing import Any, Protocol

from dfqs_nb.core.errors import PromptError
from dfqs_nb.core.prompts import PromptSet, load_prompts
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import Model

# The long-context probe of each tier.
PROBES = {"nano": "long-context-nano-keys", "standard": "long-context-standard"}
MARK = "HAYSTACK-STANDS-HERE"
N_STRATA = 5  # of depth; a text with fewer keys takes the next strata with each further text
ANSWER_SPARE = 6  # tokens that an answer may take beyond its expected ones
DRAWS = 20  # sentences that may be too long in a row before a text counts as full


class Probe(PromptSet):
    """The wording of a long-context probe.

    Attributes:
        seed: of everything that is drawn.
        tasks: names of the questions for a key, and of those that take two hops.
        intro, joint: text before the haystack, and between it and a question.
        sentences, slots: filler, and the words drawn into its ``{slots}``.
        needle, question, answer_prefix, answer: templates with ``{key}`` and ``{code}``.
        link, link_question, link_answer_prefix: the two-hop task; a ``{name}`` leads to a ``{key}``.
        keys: two lists of words that make the names of the keys; none for a single nameless key.
        guards: names for the two-hop task.
        needles: K, the keys in a text of any length.
        whole_answer: the answer must be exactly the expected one; else it must begin with it.
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
    link: str = ""
    link_question: str = ""
    link_answer_prefix: str = ""
    code_digits: int
    keys: tuple[tuple[str, ...], ...]
    guards: tuple[str, ...] = ()
    needles: int
    whole_answer: bool


# ---- texts and questions ----


@dataclass(frozen=True)
class Question:
    """A question about a haystack.

    Attributes:
        name: unique in its text.
        depth: where its fact begins, from 0 (the beginning of the haystack) to 1.
        prompt: the tokens that are evaluated after the haystack.
        expected, others: the right answer, and those for the text's other keys.
        whole: the answer must be ``expected`` and nothing more; else it must begin with it.
    """

    name: str
    task: str
    depth: float
    prompt: tuple[int, ...] = field(repr=False)
    expected: str = ""
    others: tuple[str, ...] = field(repr=False, default=())
    whole: bool = False
    max_tokens: int = 16

    def is_right(self, text: str) -> bool:
        """Whether an answer is the right one."""
        return self._is(text, self.expected)

    def is_another(self, text: str) -> bool:
        """Whether an answer is right for another key of the text."""
        return any(self._is(text, answer) for answer in self.others)

    def is_decided(self, text: str) -> bool:
        """Whether more of the answer could change neither of these."""
        text = text.lstrip()
        answers = (self.expected, *self.others)
        if self.whole:
            return not any(answer.startswith(text.rstrip()) for answer in answers)
        complete = any(text.startswith(answer) for answer in answers)
        return complete or not any(answer.startswith(text) for answer in answers)

    def _is(self, text: str, answer: str) -> bool:
        return text.strip() == answer or (not self.whole and text.strip().startswith(answer))


@dataclass(frozen=True)
class Case:
    """One haystack: ``body`` holds all tokens before the question."""

    haystack: int
    length: int
    body: tuple[int, ...] = field(repr=False)
    questions: tuple[Question, ...] = ()
    n_needles: int = 1


@dataclass(frozen=True)
class Frame:
    """How a text becomes tokens, and what stands around a haystack: the chat template, cut there."""

    head: tuple[int, ...]
    after: str
    tokenize: Callable[..., Sequence[int]] = field(repr=False)

    def text(self, text: str) -> tuple[int, ...]:
        """Tokens of plain text, in which control tokens have no meaning."""
        return tuple(self.tokenize(text, special=False))


class StandIn(Protocol):
    """A stand-in for an open `Model`, such as a server; shared attributes mean the same.

    ``around``: what its chat template puts before and after a message. ``settings`` has its ``n_ctx``.
    """

    around: tuple[str, str]
    settings: Any

    def tokenize(self, text: str, *, special: bool = True) -> Sequence[int]: ...  # noqa: D102
    def with_bos(self, tokens: Sequence[int]) -> Sequence[int]: ...  # noqa: D102
    def conditions(self) -> dict[str, Any]: ...  # noqa: D102
    def clear(self) -> None: ...  # noqa: D102

    def hold(self, body: tuple[int, ...]) -> int:
        """Take a text; the number of tokens evaluated for it."""

    def ask(self, question: Question) -> tuple[str, int]:
        """The greedy answer to a question about that text, and the tokens evaluated for it."""


def frame_of(model: Model | StandIn, probe: Probe) -> Frame:
    """The frame of this model: its chat template, or plain text where it has none."""
    before, after = around(model) if isinstance(model, Model) else model.around
    head = model.with_bos([*model.tokenize(before), *model.tokenize(probe.intro, special=False)])
    return Frame(tuple(head), after, lru_cache(maxsize=8192)(model.tokenize))


def around(model: Model) -> tuple[str, str]:
    """What the chat template puts before and after a message; plain text without one."""
    if not model.header.get("tokenizer.chat_template"):
        return "", "\nAnswer:"
    before, _, after = chat_text(model, MARK).partition(MARK)
    return before, after


def probe_of(name: str) -> Probe:
    """A probe by its name, or by its tier (``"nano"``, ``"standard"``).

    Raises:
        PromptError: there is no such probe.
    """
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


@dataclass(frozen=True)
class _Fact:
    """A sentence to be found: where it should begin (0 to 1), and the words in it."""

    target: float
    kind: str
    words: dict[str, str]
    text: str


class Haystacks:
    """All texts of a probe for one model.

    Raises:
        PromptError: a context of ``shortest`` tokens cannot hold the keys.
    """

    def __init__(self, frame: Frame, probe: Probe, shortest: int | None = None) -> None:
        self.frame, self.probe = frame, probe
        if shortest is not None and shortest < self.least_tokens():
            hint = f"use lengths from {self.least_tokens()} tokens on"
            raise PromptError(f"{shortest} tokens cannot hold the keys of {probe.name}", hint=hint)

    def case(self, number: int, length: int, links: bool = True) -> Case:
        """The text of this number at this length, with its questions; ``links``: the two-hop one too."""
        draw = self.generator(length, number)
        facts = self._facts(number, draw)
        room = length - len(self.frame.head) - self.question_tokens() - self._extra_first(facts)
        filler = self._filler(draw, room - sum(map(self._size, (fact.text for fact in facts))))
        tokens, starts = self._laid_out(facts, filler, room)
        asked = [fact for fact in facts if links or fact.kind == "needle"]
        questions = [self._question(fact, starts[fact.text] / max(1, len(tokens)), facts) for fact in asked]
        body = self.frame.head + tuple(tokens)
        return Case(number, length, body, tuple(questions), self.probe.needles)

    def generator(self, *parts: object) -> random.Random:
        """A generator that depends on the set's seed and these parts only."""
        return random.Random(":".join(map(str, (self.probe.seed, self.probe.name, *parts))))

    def question_tokens(self) -> int:
        """Tokens evaluated for the longest question and its answer."""
        words, probe = self._longest_words(), self.probe
        tails = [self._tail(probe.question, probe.answer_prefix, words)]
        if probe.link:
            tails.append(self._tail(probe.link_question, probe.link_answer_prefix, words))
        return max(map(len, tails)) + self._size(probe.answer.format(**words))

    def least_tokens(self) -> int:
        """Tokens of the shortest context that holds every fact, a sentence beside each, and a question."""
        words, probe = self._longest_words(), self.probe
        facts = probe.needles * self._size(probe.needle.format(**words))
        facts += self._size(probe.link.format(**words)) if probe.link else 0
        beside = 12 * probe.needles if probe.needles > 1 else 0
        return len(self.frame.head) + self.question_tokens() + facts + beside

    # -- what is hidden --

    def _facts(self, number: int, draw: random.Random) -> list[_Fact]:
        """The keys of a text in strata of depth, and the link of its two-hop question."""
        probe, n_strata = self.probe, max(self.probe.needles, N_STRATA)
        names = [" ".join(words) for words in product(*probe.keys)]
        codes = draw.sample(range(10**probe.code_digits), probe.needles)
        facts = []
        for i, (key, code) in enumerate(zip(draw.sample(names, probe.needles), codes, strict=True)):
            words = {"key": key, "code": f"{code:0{probe.code_digits}}"}
            stratum = (number * probe.needles + i) % n_strata
            target = (stratum + draw.random()) / n_strata
            facts.append(_Fact(target, "needle", words, probe.needle.format(**words)))
        if probe.link:
            words = {**draw.choice(facts).words, "name": draw.choice(probe.guards)}
            facts.append(_Fact(draw.random(), "link", words, probe.link.format(**words)))
        return sorted(facts, key=lambda fact: fact.target)

    def _filler(self, draw: random.Random, room: int) -> list[str]:
        """Sentences that fill the room as far as whole sentences can."""
        texts: list[str] = []
        drawn = sentences(self.probe, draw)
        while fitting := next((t for t in islice(drawn, DRAWS) if self._size(t) <= room), ""):
            texts.append(fitting)
            room -= self._size(fitting)
        return texts

    def _laid_out(
        self, facts: Sequence[_Fact], filler: Sequence[str], room: int
    ) -> tuple[list[int], dict[str, int]]:
        """Tokens of facts among filler, each at the sentence's end nearest its target; where each begins."""
        tokens: list[int] = []
        starts: dict[str, int] = {}
        waiting = list(facts)
        for text in [*filler, None]:
            half = self._size(text) / 2 if text else room
            while waiting and waiting[0].target * room <= len(tokens) + half:
                fact = waiting.pop(0)
                starts[fact.text] = len(tokens)
                tokens += self._joined(fact.text, tokens)
            tokens += self._joined(text, tokens) if text else ()
        return tokens, starts

    def _question(self, fact: _Fact, depth: float, facts: Sequence[_Fact]) -> Question:
        probe, link = self.probe, fact.kind == "link"
        wording = probe.link_question if link else probe.question
        prefix = probe.link_answer_prefix if link else probe.answer_prefix
        expected = probe.answer.format(**fact.words)
        answers = {probe.answer.format(**other.words) for other in facts} - {expected}
        return Question(
            name=fact.words["key"] + "/guard" if link else fact.words["key"] or "key",
            task=probe.tasks[link],
            depth=depth,
            prompt=self._tail(wording, prefix, fact.words),
            expected=expected,
            others=tuple(sorted(answers)),
            whole=probe.whole_answer,
            max_tokens=self._size(expected) + (ANSWER_SPARE if probe.whole_answer else 1),
        )

    # -- tokens --

    def _size(self, text: str) -> int:
        return len(self.frame.text(" " + text))

    def _joined(self, text: str, before: Sequence[int]) -> tuple[int, ...]:
        """Tokens of a sentence after others: a blank between two."""
        return self.frame.text((" " if before else "") + text)

    def _extra_first(self, facts: Sequence[_Fact]) -> int:
        """Tokens that a sentence may take more at the very beginning, without the blank before it."""
        texts = [*self.probe.sentences, *(fact.text for fact in facts)]
        return max(0, *(len(self.frame.text(text)) - self._size(text) for text in texts))

    def _tail(self, question: str, answer_prefix: str, words: dict[str, str]) -> tuple[int, ...]:
        asked = self.frame.text(self.probe.joint + question.format(**words))
        after = tuple(self.frame.tokenize(self.frame.after))
        return (*asked, *after, *self.frame.text(answer_prefix.format(**words)))

    def _longest_words(self) -> dict[str, str]:
        key = " ".join(max(part, key=len) for part in self.probe.keys)
        name = max(self.probe.guards, key=len, default="")
        return {"code": "0" * self.probe.code_digits, "key": key, "name": name}
