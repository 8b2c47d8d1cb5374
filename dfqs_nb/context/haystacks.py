"""Haystacks with needles, sized by a model's own tokens, from a frozen prompt set.

Two layouts. With one key a haystack (the nano set), each text is made for its length. With many keys (the
standard set), a haystack of length L is the beginning of the same haystack at 2 L, so it is evaluated once
and grown: each octave brings needles at strata of its own, and the questions at a length ask for the needles
nearest to the middles of its strata. Keys that are not asked for are distractors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import log2
from typing import Any

from dfqs_nb.context.prompts import PromptSet
from dfqs_nb.core.errors import PromptError
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import Model

MARK = "HAYSTACK-STANDS-HERE"
JITTER = 0.3  # of a stratum's width
N_STRATA = 5  # of depth, where a haystack has one key
ANSWER_SPARE = 6  # tokens that an answer may take beyond its expected ones


@dataclass(frozen=True)
class Question:
    """One question about a haystack.

    ``prompt`` is what is evaluated after the haystack; ``depth`` where its needle lies, from 0 (the
    beginning) to 1; ``whole``: the answer must be ``expected`` and nothing more, else begin with it.
    """

    name: str
    task: str
    depth: float
    prompt: tuple[int, ...] = field(repr=False)
    expected: str = ""
    whole: bool = False
    max_tokens: int = 16


@dataclass(frozen=True)
class Case:
    """A haystack at one length: ``body`` holds all tokens before the question."""

    haystack: int
    length: int
    planned: bool
    body: tuple[int, ...] = field(repr=False)
    questions: tuple[Question, ...] = ()
    n_needles: int = 1


@dataclass(frozen=True)
class Frame:
    """How a text becomes tokens, and what stands around a haystack: the chat template, cut at the
    haystack.
    """

    head: tuple[int, ...]
    after: str
    tokenize: Callable[..., Sequence[int]] = field(repr=False)

    def text(self, text: str) -> tuple[int, ...]:
        """Tokens of plain text, in which control tokens have no meaning."""
        return tuple(self.tokenize(text, special=False))


def frame_of(model: Model, prompts: PromptSet) -> Frame:
    """The frame of this model: its chat template, or plain text where it has none."""
    if model.header.get("tokenizer.chat_template"):
        before, _, after = chat_text(model, MARK).partition(MARK)
    else:
        before, after = "", "\nAnswer:"
    plain = lru_cache(maxsize=8192)(model.tokenize)
    head = model.with_bos([*model.tokenize(before), *model.tokenize(prompts["intro"], special=False)])
    return Frame(tuple(head), after, plain)


def sentences(prompts: PromptSet, draw: random.Random) -> Iterator[str]:
    """Endless filler: templates of the set with words drawn into their slots.

    >>> from dfqs_nb.context.prompts import load_prompts
    >>> next(sentences(load_prompts("long-context-nano"), random.Random(3)))
    'Rain fell softly on the roof.'
    """
    while True:
        text = draw.choice(prompts["sentences"])
        for slot, words in prompts["slots"].items():
            while f"{{{slot}}}" in text:
                text = text.replace(f"{{{slot}}}", draw.choice(words), 1)
        yield text[0].upper() + text[1:]


class Haystacks:
    """All cases of a prompt set for one model.

    Args:
        frame: see ``frame_of``.
        prompts: the set.
        grid: planned lengths, ascending; with many keys the haystack is laid out for exactly these.

    Raises:
        PromptError: the shortest length cannot hold the needles.
    """

    def __init__(self, frame: Frame, prompts: PromptSet, grid: Sequence[int]) -> None:
        self.frame, self.prompts, self.grid = frame, prompts, tuple(sorted(grid))
        self.many_keys = prompts["needles"] > 1
        self._grown: dict[int, _Grown] = {}
        if self.grid and self.grid[0] < self.shortest():
            raise PromptError(
                f"{self.grid[0]} tokens cannot hold the needles of {prompts.name}",
                hint=f"use lengths from {self.shortest()} tokens on",
            )

    def shortest(self) -> int:
        """Tokens of the shortest context that holds every needle, a question and the chat template."""
        needle = max(len(self.frame.text(" " + one)) for one in self._longest_texts())
        n = self.prompts["needles"]
        # a stratum must hold its needle and a sentence, and the links of the second task lie between them
        return self.overhead() + (n * (needle + 12) + 2 * needle if self.many_keys else needle)

    def overhead(self) -> int:
        """Tokens of everything around the haystack, for the longest question."""
        return len(self.frame.head) + self.question_tokens()

    def question_tokens(self) -> int:
        """Tokens evaluated for the longest question."""
        fields, kinds = self._longest_fields(), ("", "link_") if "link" in self.prompts.content else ("",)
        tails = [
            self._tail(self.prompts[f"{k}question"], self.prompts[f"{k}answer_prefix"], fields) for k in kinds
        ]
        return max(map(len, tails)) + len(self.frame.text(" " + self.prompts["answer"].format(**fields)))

    def case(self, haystack: int, length: int, planned: bool = True, n_questions: int | None = None) -> Case:
        """The haystack of this number at this length, with its questions."""
        if self.many_keys:
            if haystack not in self._grown:
                self._grown = {haystack: _Grown(self, haystack)}  # one at a time: a long one is large
            return self._grown[haystack].case(length, planned, n_questions)
        return self._one_key(haystack, length, planned)

    def random(self, *parts: object) -> random.Random:
        """A generator that depends on the set's seed and these parts only."""
        return random.Random(":".join(map(str, (self.prompts["seed"], self.prompts.name, *parts))))

    def _one_key(self, haystack: int, length: int, planned: bool) -> Case:
        draw, place = self.random(haystack), self.random(haystack, length)
        code = "".join(draw.choices("0123456789", k=self.prompts["code_digits"]))
        tail = self._tail(self.prompts["question"], self.prompts["answer_prefix"], {})
        needle = self.prompts["needle"].format(code=code)
        room = length - len(self.frame.head) - len(tail) - len(self.frame.text(" " + needle))
        room -= self._more_without_blank([*self.prompts["sentences"], needle])
        filler = self._filler(draw, place, room)
        stratum = (haystack + round(4 * log2(length))) % N_STRATA
        at = round((stratum + place.random()) / N_STRATA * len(filler))
        body = self._joined([*filler[:at], needle, *filler[at:]])
        depth = len(self._joined(filler[:at])) / max(1, len(self._joined(filler)))
        expected = self.prompts["answer"].format(code=code)
        question = Question(
            "key",
            self.prompts["tasks"][0],
            depth,
            tail,
            expected,
            self.prompts["whole_answer"],
            len(self.frame.text(expected)) + ANSWER_SPARE,
        )
        return Case(haystack, length, planned, self.frame.head + body, (question,))

    def _filler(self, draw: random.Random, place: random.Random, room: int) -> list[str]:
        """Sentences that fill the room as far as whole sentences can: the last is one that fits."""
        texts: list[str] = []
        for text in sentences(self.prompts, draw):
            size = len(self.frame.text(" " + text))
            if size > room:
                break
            texts.append(text)
            room -= size
        fitting = [
            t for t in self.prompts["sentences"] if len(self.frame.text(" " + t)) <= room and "{" not in t
        ]
        longest = max((len(self.frame.text(" " + text)) for text in fitting), default=0)
        fitting = [text for text in fitting if len(self.frame.text(" " + text)) == longest]
        return texts + ([place.choice(fitting)] if fitting else [])

    def _more_without_blank(self, texts: Sequence[str]) -> int:
        """Tokens by which a text may be longer where it comes first, without the blank before it."""
        return max(0, *(len(self.frame.text(one)) - len(self.frame.text(" " + one)) for one in texts))

    def _joined(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Tokens of sentences, one blank between two of them."""
        return tuple(t for i, one in enumerate(texts) for t in self.frame.text((" " if i else "") + one))

    def _tail(self, question: str, answer_prefix: str, fields: dict[str, str]) -> tuple[int, ...]:
        asked = self.frame.text(self.prompts["joint"] + question.format(**fields))
        after = tuple(self.frame.tokenize(self.frame.after))
        return (*asked, *after, *self.frame.text(answer_prefix.format(**fields)))

    def _longest_fields(self) -> dict[str, str]:
        words = self.prompts["keys"] or [[""], [""]]
        fields = {
            "code": "0" * self.prompts["code_digits"],
            "key": " ".join(max(part, key=len) for part in words),
        }
        return fields | {"name": max(self.prompts.get("guards", [""]), key=len)}

    def _longest_texts(self) -> list[str]:
        fields = self._longest_fields()
        return [self.prompts.get(kind, "").format(**fields) for kind in ("needle", "link")]


@dataclass(frozen=True)
class _Planted:
    """A fact in the haystack: tokens ``start`` to ``stop`` of the body."""

    kind: str
    fields: dict[str, str]
    start: int
    stop: int


class _Grown:
    """One haystack with many keys, laid out up to the longest length of the grid."""

    def __init__(self, parent: Haystacks, haystack: int) -> None:
        self.parent, self.haystack = parent, haystack
        self._draw = parent.random(haystack)
        self._facts = self._new_facts()
        self.tokens: list[int] = []
        self.ends: list[int] = [0]
        self.planted: list[_Planted] = []
        for target, kind in self._targets():
            self._plant(target, kind)
        self._fill(self.room(parent.grid[-1]))

    def room(self, length: int) -> int:
        """Tokens of haystack in a context of this length."""
        return length - self.parent.overhead()

    def _targets(self) -> list[tuple[float, str]]:
        """Where facts shall begin: keys at the middles of each octave's strata, links between two strata."""
        n, targets, done = self.parent.prompts["needles"], [], 0.0
        for number, length in enumerate(self.parent.grid):
            room = self.room(length)
            for i in range(n):
                at = (i + 0.5 + self._draw.uniform(-JITTER, JITTER)) * room / n
                if (i + 0.5) * room / n > done:
                    targets.append((at, "needle"))
            gaps = (1, n - 2) if number == 0 else (n - 2,)
            targets += [((i + 0.9) * room / n, "link") for i in gaps if "link" in self.parent.prompts.content]
            done = room
        return sorted(targets)

    def _new_facts(self) -> dict[str, Iterator[str]]:
        """Keys and guards in an order of this haystack's own; both run out only in absurdly long plans."""
        words = self.parent.prompts["keys"]
        keys = [f"{a} {b}" for a in words[0] for b in words[1]]
        guards = list(self.parent.prompts.get("guards", []))
        self._draw.shuffle(keys)
        self._draw.shuffle(guards)
        return {"key": iter(keys), "name": iter(guards)}

    def _plant(self, target: float, kind: str) -> None:
        unlinked = [one for one in self.planted if one.kind == "needle" and not self._linked(one)]
        if kind == "link" and not unlinked:
            return
        if kind == "needle":
            code = "".join(self._draw.choices("0123456789", k=self.parent.prompts["code_digits"]))
            fields = {"key": next(self._facts["key"]), "code": code}
        else:
            fields = {**self._draw.choice(unlinked).fields, "name": next(self._facts["name"], "")}
            if not fields["name"]:
                return
        text = self.parent.prompts[kind].format(**fields)
        size = len(self.parent.frame.text(" " + text))
        self._fill(min(target, self._next_end(target) - size))
        start = len(self.tokens)
        self._append(text)
        self.planted.append(_Planted(kind, fields, start, len(self.tokens)))

    def _next_end(self, target: float) -> int:
        """Room of the octave that the target lies in."""
        return next((room for one in self.parent.grid if (room := self.room(one)) >= target), int(target))

    def _linked(self, needle: _Planted) -> bool:
        return any(one.kind == "link" and one.fields["key"] == needle.fields["key"] for one in self.planted)

    def _fill(self, target: float) -> None:
        """Sentences as long as they end before the target."""
        for text in sentences(self.parent.prompts, self._draw):
            if len(self.tokens) + len(self.parent.frame.text(" " + text)) > target:
                return
            self._append(text)

    def _append(self, text: str) -> None:
        self.tokens += self.parent.frame.text((" " if self.tokens else "") + text)
        self.ends.append(len(self.tokens))

    def case(self, length: int, planned: bool, n_questions: int | None) -> Case:
        """The beginning of the haystack that fits, and its questions; the second task at planned lengths
        only.
        """
        stop = max(end for end in self.ends if end <= self.room(length))
        inside = [one for one in self.planted if one.stop <= stop]
        needles = [one for one in inside if one.kind == "needle"]
        n = min(n_questions or self.parent.prompts["needles"], len(needles))
        asked = [self._question(one, stop) for one in _nearest(needles, n, stop)]
        links = [one for one in inside if one.kind == "link"][-1:] if planned else []
        asked += [self._question(one, stop) for one in links]
        body = self.parent.frame.head + tuple(self.tokens[:stop])
        return Case(self.haystack, length, planned, body, tuple(asked), len(needles))

    def _question(self, one: _Planted, stop: int) -> Question:
        prompts, prefix = self.parent.prompts, "link_" if one.kind == "link" else ""
        tail = self.parent._tail(prompts[f"{prefix}question"], prompts[f"{prefix}answer_prefix"], one.fields)
        expected = prompts["answer"].format(**one.fields)
        task = prompts["tasks"][one.kind == "link"]
        return Question(
            one.fields["key"] + ("/guard" if prefix else ""),
            task,
            one.start / max(1, stop - (one.stop - one.start)),
            tail,
            expected,
            prompts["whole_answer"],
            len(self.parent.frame.text(" " + expected)) + 1,
        )


def _nearest(planted: Sequence[Any], n: int, stop: int) -> list[Any]:
    """One needle for each of ``n`` strata of depth: the nearest to its middle that is not taken."""
    chosen: list[Any] = []
    for i in range(n):
        middle = (i + 0.5) / n * stop
        chosen.append(
            min((one for one in planted if one not in chosen), key=lambda one: abs(one.start - middle))
        )
    return chosen
