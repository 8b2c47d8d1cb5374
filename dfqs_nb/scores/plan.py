"""Which questions a budget holds, and the speeds beside them: planned before the first is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dfqs_nb.core.budget import Fitted, duration, fit
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.timing import Pace, probe
from dfqs_nb.scores.grading import Results
from dfqs_nb.scores.item_sets import ItemSet
from dfqs_nb.scores.run import Options, score_set

if TYPE_CHECKING:
    from dfqs_nb.scores.likelihood import Answers

DIVISORS = (1, 2, 4, 8, 16, 32, 64)  # a part asks 1 of so many questions of each family, at least one
LEAST_ITEMS = 12  # of a set, while others are asked beside it
SPEED_CUTS: tuple[dict[str, int], ...] = (
    {"repetitions": 3},
    {"n_tokens": 32},
    {"depths": 2},
    {"repetitions": 1},
    {"n_tokens": 8},
    {"depths": 1},
)
SPEED_NAMES = {"repetitions": "timed repetitions", "n_tokens": "timed tokens", "depths": "timed depths"}


@dataclass(frozen=True)
class QuestionPlan:
    """The sets, cut to what fits.

    Attributes:
        chosen: the whole sets; parts: those or even parts of them that will be asked, the last sets go first.
        seconds, full_seconds: of these and of all questions, if every answer has its full length.
        budget_seconds: where answers are shorter, larger parts are asked as long as this holds them.
    """

    model: Model = field(repr=False)
    chosen: tuple[ItemSet, ...]
    parts: tuple[ItemSet, ...]
    seconds: float
    full_seconds: float
    budget_seconds: float
    pace: Pace
    options: Options

    @property
    def sentence(self) -> str:
        """The plan for people."""
        n, most = (sum(len(each.items) for each in sets) for sets in (self.parts, self.chosen))
        text = f"{n:,} of {most:,} questions, at most {duration(self.seconds)}"
        if self.parts == self.chosen:
            return text
        return f"{text} (all: up to {duration(self.full_seconds)}); more, if answers turn out shorter"

    def ask(self, folder: str | Path, *, model_id: str = "") -> tuple[Results, list[str]]:
        """Ask ever larger parts while the budget holds the next one; results, and what was left out.

        The least part comes first, so a machine that gets busy costs questions, not time. Larger parts keep
        the answers of the smaller ones.
        """
        sizes, started = self._sizes(), time.perf_counter()
        parts = next(sizes)
        results = self._asked(parts, folder, model_id)
        for larger in sizes:
            planned = _seconds(parts, self.pace, self.options)
            slower = float(results.items["seconds"].sum()) / planned  # answers of an earlier run count, too
            more = 1.2 * slower * (_seconds(larger, self.pace, self.options) - planned)
            if time.perf_counter() - started + more > self.budget_seconds:
                break
            parts = larger
            results = self._asked(parts, folder, model_id)
        return results, left_out(self.chosen, parts)

    def choose(self, folder: str | Path, seconds: float, *, model_id: str = "", most: int = 96) -> Answers:
        """Multiple choice by likelihood, from the first set: an even part that these seconds hold."""
        from dfqs_nb.scores.likelihood import ChoiceSet, answer

        questions = ChoiceSet.made_of(self.chosen[0])
        texts = [item.query + "".join(item.choices) for item in questions.items]
        cost = self.pace.seconds(sum(map(len, texts)) / 4 / len(texts) + 16, len(questions.items[0].choices))
        most = min(most, len(texts), self.options.limit or most)
        n = max(1, int(min(most, seconds / cost)))
        items, whole = (questions.items[:: -(-len(texts) // count)] for count in (n, most))
        part, cut = replace(questions, items=items), len(items) < len(whole)
        answers = answer(self.model, part, folder, model_id=model_id, fresh=self.options.fresh)
        left_out = f"only {len(items)} of {len(whole)} questions of {questions.head.set} asked"
        return replace(answers, left_out=(left_out,) * cut)

    def _sizes(self) -> Iterator[tuple[ItemSet, ...]]:
        """Parts from the least on, each larger than the one before; all at once where all fit easily."""
        n_before = 0
        easy = 4 * self.full_seconds < self.budget_seconds
        for parts in [self.chosen] if easy else reversed(_candidates(self.chosen)):
            if (n := sum(len(each.items) for each in parts)) > n_before:
                yield parts
                n_before = n

    def _asked(self, parts: Sequence[ItemSet], folder: str | Path, model_id: str) -> Results:
        return Results(
            [score_set(self.model, each, folder, self.options, model_id=model_id) for each in parts]
        )


def plan_questions(
    model: Model, item_sets: Sequence[ItemSet], options: Options, seconds: float
) -> QuestionPlan:
    """Time a few tokens, and cut the sets to what these seconds hold (see `_candidates`).

    The least that is asked is one question of the first set.
    """
    chosen, pace = tuple(item_sets), probe(model)
    full = _seconds(chosen, pace, options)
    parts, cost = chosen, full
    for candidate in _candidates(chosen):
        parts, cost = candidate, _seconds(candidate, pace, options)
        if cost <= seconds:
            break
    return QuestionPlan(model, chosen, parts, cost, full, seconds, pace, options)


def _candidates(chosen: tuple[ItemSet, ...]) -> list[tuple[ItemSet, ...]]:
    """Parts of all sets, the largest first; then fewer sets; then less of the first, to a single question.

    The last set goes before any shrinks below ``LEAST_ITEMS``: a dozen answers to a single set say more than
    four to each of three. A set that is as small from the start stays whole.
    """
    first, even = chosen[0], []
    for divisor in DIVISORS:
        parts = [each if len(each.items) <= LEAST_ITEMS else each.part(divisor) for each in chosen]
        if divisor == 1 or all(len(part.items) >= LEAST_ITEMS or part in chosen for part in parts):
            even.append(tuple(parts))
    fewer = [even[-1][:n] for n in range(len(chosen) - 1, 0, -1)]
    less = [first.part(divisor) for divisor in DIVISORS]
    less = [part for part in less if len(part.items) < len(even[-1][0].items)]
    less += [first.part(DIVISORS[-1], n) for n in range(len(first.families()) - 1, 0, -1)]
    return [*even, *fewer, *((part,) for part in less)]


def _seconds(item_sets: Sequence[ItemSet], pace: Pace, options: Options) -> float:
    """Seconds of all answers at their full length; prompts are counted by four characters a token."""
    thinking = options.thinking_tokens
    return options.n_samples * sum(
        pace.seconds(len(item.asked(each.instruction)) / 4 + 16, each.max_tokens + thinking)
        for each in item_sets
        for item in each.items[: options.limit]
    )


def left_out(chosen: Sequence[ItemSet], parts: Sequence[ItemSet]) -> list[str]:
    """What the parts lack, in sentences."""
    asked = {each.name: len(each.items) for each in parts}
    shares = {each.name: each.share for each in parts}
    return [
        f"only {asked[each.name]} of {len(each.items)} questions of {each.name} asked ({shares[each.name]})"
        if each.name in asked
        else f"the set {each.name}"
        for each in chosen
        if asked.get(each.name) != len(each.items)
    ]


def plan_speeds(depths: Sequence[int], pace: Pace, seconds: float) -> tuple[list[int], Fitted]:
    """Depths to time and ``repetitions`` and ``n_tokens`` of each, cut to these seconds; depth 512 stays."""
    order = sorted(depths, key=lambda depth: (depth != 512, depth))

    def cost(plan: dict[str, int]) -> float:
        timed = order[: plan["depths"]]
        return (plan["repetitions"] + 0.3) * sum(pace.seconds(depth, plan["n_tokens"]) for depth in timed)

    plan = {"repetitions": 5, "n_tokens": 128, "depths": len(order)}
    fitted = fit(plan, SPEED_CUTS, cost, seconds, SPEED_NAMES)
    return sorted(order[: fitted.values["depths"]]), fitted
