"""Haystacks with a fixed number of keys, sized by a model's own tokens, from a frozen prompt set.

A text of any length hides the same number of keys K (RULER's multi-key rule, Hsieh et al. 2024,
arXiv:2404.06654), spread over its whole depth. It is drawn fresh for its length, and every key is asked for.
So accuracy changes with the length alone, not with the number of distractors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice, product
from typing import Any, NamedTuple

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
    """The wording of a long-context probe: templates with ``{key}``, ``{code}``, ``{name}`` and other slots.

    ``needles`` is K, the keys in a text of any length. ``keys``: two lists of words that make their names, or
    none for a single key. ``link``: the two-hop task, in which a name of ``guards`` leads to a key. ``joint``
    stands between text and question. Without ``whole_answer``, an answer need only begin with the right one.
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

    def key_names(self, draw: random.Random, n: int) -> list[str]:
        """Names of keys, no two alike."""
        return draw.sample([" ".join(words) for words in product(*self.keys)], n)

    def codes(self, draw: random.Random, n: int) -> list[str]:
        """Codes, no two alike."""
        digits = self.code_digits
        return [f"{code:0{digits}}" for code in draw.sample(range(10**digits), n)]


@dataclass(frozen=True)
class Question:
    """A question about a haystack; ``name`` is unique in its text. Answers come stripped of blanks.

    ``depth``: where its fact begins, 0 to 1. ``prompt``: the tokens after the haystack. ``others``: the right
    answers for the text's other keys. ``whole``: see `Probe`.
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
        return text == self.expected or (not self.whole and text.startswith(self.expected))

    def is_another(self, text: str) -> bool:
        """Whether an answer is right for another key of the text."""
        return any(replace(self, expected=answer).is_right(text) for answer in self.others)

    def is_decided(self, text: str) -> bool:
        """Whether more of the answer could change neither of these."""
        text, answers = text.lstrip(), (self.expected, *self.others)
        if self.whole:
            return not any(answer.startswith(text.rstrip()) for answer in answers)
        complete = any(text.startswith(answer) for answer in answers)
        return complete or not any(answer.startswith(text) for answer in answers)


@dataclass(frozen=True)
class Case:
    """One haystack: ``body`` holds all tokens before the question."""

    haystack: int
    length: int
    body: tuple[int, ...] = field(repr=False)
    questions: tuple[Question, ...]
    n_needles: int


# What is asked in the place of an open `Model`, such as a server. It has a model's `tokenize`, `with_bos`,
# `conditions`, `clear` and `settings.n_ctx`, what `around` gives, and `hold` and `ask` as `curve.Asker`.
StandIn = Any


def around(model: Model) -> tuple[str, str]:
    """What the chat template puts before and after a message; plain text without one."""
    if not model.header.get("tokenizer.chat_template"):
        return "", "\nAnswer:"
    before, _, after = chat_text(model, MARK).partition(MARK)
    return before, after


def probe_of(name: str) -> Probe:
    """A probe by its name or tier; a `PromptError` says that there is none."""
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
    """A sentence to be found: where it should begin (0 to 1), the words in it, and whether it is a link."""

    target: float
    words: dict[str, str]
    text: str
    link: bool = False


class Haystacks:
    """All texts of a probe for one model; a `PromptError`: ``shortest`` tokens cannot hold the keys."""

    def __init__(self, model: Model | StandIn, probe: Probe, shortest: int | None = None) -> None:
        before, after = around(model) if isinstance(model, Model) else model.around
        head = model.with_bos([*model.tokenize(before), *model.tokenize(probe.intro, special=False)])
        self.probe, self._head, self._after = probe, tuple(head), tuple(model.tokenize(after))
        self._tokenize = lru_cache(maxsize=8192)(model.tokenize)
        words = {"key": " ".join(max(part, key=len) for part in probe.keys), "code": "0" * probe.code_digits}
        words["name"] = max(probe.guards, key=len, default="")  # the longest
        tails = [self._tail(link, words) for link in ((False, True) if probe.link else (False,))]
        # evaluated for the longest question and its answer
        self.question_tokens = max(map(len, tails)) + self._size(probe.answer.format(**words))
        facts = probe.needles * self._size(probe.needle.format(**words))
        facts += self._size(probe.link.format(**words)) if probe.link else 0
        beside = 12 * probe.needles if probe.needles > 1 else 0
        # of the shortest context that holds every fact, and sentences beside them
        self.least_tokens = len(self._head) + self.question_tokens + facts + beside
        if shortest is not None and shortest < self.least_tokens:
            what = f"{shortest} tokens cannot hold the keys of {probe.name}"
            raise PromptError(what, hint=f"use lengths from {self.least_tokens} tokens on")

    def case(self, number: int, length: int, links: bool = True) -> Case:
        """The text of this number at this length, with its questions; ``links``: the two-hop one too."""
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
        answers, questions = {probe.answer.format(**fact.words) for fact in facts}, []
        for fact in facts:
            if fact.link and not links:
                continue
            expected, key = probe.answer.format(**fact.words), fact.words["key"]
            name = f"{key}/guard" if fact.link else key or "key"
            depth, most = starts[fact.text] / max(1, len(tokens)), self._size(expected)
            most += ANSWER_SPARE if probe.whole_answer else 1
            others, prompt = tuple(sorted(answers - {expected})), self._tail(fact.link, fact.words)
            about = depth, prompt, expected, others, probe.whole_answer, most
            questions.append(Question(name, probe.tasks[fact.link], *about))
        return Case(number, length, self._head + tuple(tokens), tuple(questions), probe.needles)

    def _facts(self, number: int, draw: random.Random) -> list[_Fact]:
        """The keys of a text in strata of depth, and the link of its two-hop question."""
        probe, n_strata = self.probe, max(self.probe.needles, N_STRATA)
        codes, facts = probe.codes(draw, probe.needles), []
        for i, (key, code) in enumerate(zip(probe.key_names(draw, probe.needles), codes, strict=True)):
            words, stratum = {"key": key, "code": code}, (number * probe.needles + i) % n_strata
            target = (stratum + draw.random()) / n_strata
            facts.append(_Fact(target, words, probe.needle.format(**words)))
        if probe.link:
            words = {**draw.choice(facts).words, "name": draw.choice(probe.guards)}
            facts.append(_Fact(draw.random(), words, probe.link.format(**words), link=True))
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

    def _tail(self, link: bool, words: dict[str, str]) -> tuple[int, ...]:
        """Tokens of a question, and of what its answer begins with."""
        probe = self.probe
        question = probe.joint + (probe.link_question if link else probe.question).format(**words)
        prefix = (probe.link_answer_prefix if link else probe.answer_prefix).format(**words)
        return (*self._plain(question), *self._after, *self._plain(prefix))
