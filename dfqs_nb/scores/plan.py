"""Which questions a budget holds, and the speeds beside them: planned before the first is asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
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

Sets = tuple[ItemSet, ...]
SIZES = (10**9, 768, 384, 192, 96, 48, 24, 12)  # questions of a set, while others are asked beside it
MOST_CHOICES = 96  # questions of multiple choice
SPEED_CUTS: list[dict[str, int]] = [{"repetitions": 3}, {"n_tokens": 32}, {"depths": 2}]
SPEED_CUTS += [{"repetitions": 1}, {"n_tokens": 8}, {"depths": 1}]
SPEED_NAMES = {"repetitions": "timed repetitions", "n_tokens": "timed tokens", "depths": "timed depths"}


@dataclass(frozen=True)
class QuestionPlan:
    """The sets, cut to what fits if every answer has its full length; seconds of the parts and of all."""

    model: Model = field(repr=False)
    chosen: Sets
    parts: Sets  # of the chosen sets, as many questions as fit
    seconds: float
    full_seconds: float
    budget_seconds: float  # where answers are shorter, larger parts are asked as long as this holds them
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
        """Ask ever larger parts while the budget holds the next; the results, and what was left out.

        The smallest part comes first, so a machine that gets busy costs questions, not time. Larger parts
        keep the answers of the smaller ones. An answer that is not complete when the budget ends is cut: its
        question has no result, and the same command asks it again.
        """
        started, easy = time.monotonic(), 4 * self.full_seconds < self.budget_seconds
        options = replace(self.options, until=started + self.budget_seconds)

        def asked(parts: Sets) -> Results:
            return Results(
                [score_set(self.model, each, folder, options, model_id=model_id) for each in parts]
            )

        parts, *rest = [self.chosen] if easy else _candidates(self.chosen)[::-1]
        results = asked(parts)
        for larger in rest:
            planned = _seconds(parts, self.pace, self.options)
            slower = float(results.items["seconds"].sum()) / planned  # answers of an earlier run count, too
            more = 1.2 * slower * (_seconds(larger, self.pace, self.options) - planned)
            if time.monotonic() - started + more > self.budget_seconds:
                break
            parts, results = larger, asked(larger)
        cut = [
            f"{run.score.n_missing} of {run.score.n} questions of {run.name}, for which no time was left"
            for run in results.runs
            if run.score.n_missing
        ]
        return results, [*left_out(self.chosen, parts), *cut]

    def choose(self, folder: str | Path, seconds: float, *, model_id: str = "") -> Answers:
        """Multiple choice by likelihood, from the first set: an even part that these seconds hold."""
        from dfqs_nb.scores.likelihood import answer, choices_of

        questions = choices_of(self.chosen[0])
        n_tokens = [len(item.prompt + "".join(item.choices)) / 4 + 16 for item in questions.items]
        cost = self.pace.seconds(sum(n_tokens) / len(n_tokens), len(questions.items[0].choices))
        whole = questions.part(min(MOST_CHOICES, self.options.limit or MOST_CHOICES))
        part = whole.part(max(1, int(min(MOST_CHOICES, seconds / cost))))
        answers = answer(self.model, part, folder, model_id=model_id, fresh=self.options.fresh)
        return replace(answers, left_out=tuple(left_out([whole], [part])))


def plan_questions(
    model: Model, item_sets: Sequence[ItemSet], options: Options, seconds: float
) -> QuestionPlan:
    """Time a few tokens, and cut the sets to what these seconds hold, at least one question of the first."""
    chosen, pace = tuple(item_sets), probe(model)
    for parts in _candidates(chosen):
        cost = _seconds(parts, pace, options)
        if cost <= seconds:
            break
    return QuestionPlan(model, chosen, parts, cost, _seconds(chosen, pace, options), seconds, pace, options)


def _candidates(chosen: Sets) -> list[Sets]:
    """Parts of all sets, the largest first; then fewer sets; then less of the first, to a single question.

    A dozen answers to one set say more than four to each of three.
    """
    sizes = [(size, len(chosen)) for size in SIZES]
    sizes += [(SIZES[-1], n_sets) for n_sets in range(len(chosen) - 1, 0, -1)] + [(6, 1), (3, 1), (1, 1)]
    parts = (tuple(each.part(size) for each in chosen[:n_sets]) for size, n_sets in sizes)
    return list(dict.fromkeys(parts))


def _seconds(item_sets: Sequence[ItemSet], pace: Pace, options: Options) -> float:
    """Seconds of all answers at their full length; prompts are counted by four characters a token."""
    return options.n_samples * sum(
        pace.seconds(len(item.asked(each.instruction)) / 4 + 16, each.max_tokens + options.thinking_tokens)
        for each in item_sets
        for item in each.items[: options.limit]
    )


def left_out(chosen: Sequence[ItemSet], parts: Sequence[ItemSet]) -> list[str]:
    """What the parts lack, in sentences."""
    asked = {each.name: len(each.items) for each in parts}
    return [
        f"only {asked[each.name]} of {len(each.items)} questions of {each.name} asked"
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
