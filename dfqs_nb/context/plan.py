"""Plan a long-context measurement, and know its cost before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, nan
from typing import TYPE_CHECKING, Any

from dfqs_nb.context.cost import PrefillSpeed, duration, measure_prefill
from dfqs_nb.context.haystacks import Haystacks, Probe, StandIn, frame_of, probe_of
from dfqs_nb.context.search import octaves
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.llama.model import Model

if TYPE_CHECKING:
    import pandas as pd

PROTOCOL = "fixed keys, fresh texts for each length"  # answers under another one are not comparable


class BudgetError(DfqsError):
    """A time budget holds not even the shortest length."""


@dataclass(frozen=True)
class Plan:
    """What will be measured.

    Attributes:
        probe: the prompt set; it fixes the number of keys.
        grid: planned lengths in tokens of context, ascending; the answer begins at about that depth.
        n_haystacks: texts for each length, and twice as many for the shortest, which a_0 comes from.
        question_tokens: tokens evaluated for a question.
        reuse: ask every question of a text from its saved state.
        rounds: how often the interval of the crossing is halved.
        in_a_row: lengths that must clearly fail before longer ones are left out.
        budget_seconds: no text is begun that is not expected to end in time; what is not measured is
            censored, not failed.
        speed: measured prefill speed, which costs are made of; None: not timed.
    """

    probe: Probe
    grid: tuple[int, ...]
    n_haystacks: int
    question_tokens: int
    reuse: bool
    rounds: int = 1
    in_a_row: int = 2
    budget_seconds: float = inf
    speed: PrefillSpeed | None = None

    @property
    def longest(self) -> int:
        """The longest planned length."""
        return self.grid[-1]

    def n_texts(self, length: int) -> int:
        """Texts asked about at a length."""
        return self.n_haystacks * (2 if length == self.grid[0] else 1)

    def n_questions(self, planned: bool = True) -> int:
        """Questions about a text; the two-hop one is asked at planned lengths only."""
        return self.probe.needles + (planned and bool(self.probe.link))

    def up_to(self, longest: int) -> Plan:
        """The plan without the lengths beyond this one."""
        return replace(self, grid=tuple(length for length in self.grid if length <= longest))

    def tokens(self) -> int:
        """Tokens evaluated at all planned lengths, if none is left out early."""
        n = self.n_questions()
        more = (n - 1) * self.question_tokens
        return sum(
            self.n_texts(length) * (length + more if self.reuse else n * length) for length in self.grid
        )

    @property
    def seconds(self) -> float:
        """Seconds that the planned lengths take; NaN if the plan is not timed."""
        return sum(self.n_texts(length) * self.text_seconds(length) for length in self.grid)

    def text_seconds(self, length: int) -> float:
        """Seconds that a text of this length takes with its questions."""
        if self.speed is None:
            return nan
        n, text = self.n_questions(), self.speed.seconds(length)
        if not self.reuse:
            return n * text
        return text + (n - 1) * self.question_tokens / self.speed.tokens_per_sec(length)

    def ratio(self) -> float:
        """Planned tokens in units of longest length x texts; near 2 for long contexts."""
        return self.tokens() / (self.longest * self.n_haystacks)

    def cost_table(self) -> pd.DataFrame:
        """What the curve to each longest length will take.

        Columns ``longest``, ``evaluated_tokens``, ``seconds`` and ``within_budget``.
        """
        import pandas as pd

        plans = [self.up_to(length) for length in self.grid]
        table = pd.DataFrame(
            {
                "longest": self.grid,
                "evaluated_tokens": [plan.tokens() for plan in plans],
                "seconds": [plan.seconds for plan in plans],
            }
        )
        return table.assign(within_budget=table["seconds"] <= self.budget_seconds)

    def within_budget(self) -> Plan:
        """The plan cut to the lengths that its budget holds.

        Raises:
            BudgetError: it holds none.
        """
        if self.budget_seconds == inf:
            return self
        kept = [length for length in self.grid if self.up_to(length).seconds <= self.budget_seconds]
        if not kept:
            first = duration(self.up_to(self.grid[0]).seconds)
            raise BudgetError(
                f"{duration(self.budget_seconds)} hold no length: {self.grid[0]} take {first}",
                hint="raise the budget, or take fewer texts",
            )
        return self.up_to(kept[-1])

    @property
    def cost_sentence(self) -> str:
        """The cost of the whole plan, and of a shorter one, as a sentence."""
        text = f"the curve to {self.longest:,} tokens will take about {duration(self.seconds)}"
        shorter = [self.up_to(length) for length in self.grid if length <= self.longest / 4][-1:]
        for plan in shorter:
            text += f"; the curve to {plan.longest:,} tokens {duration(plan.seconds)}"
        return text

    def conditions(self) -> dict[str, Any]:
        """What the answers depend on, beside the model."""
        return {
            **self.probe.identity(),
            "protocol": PROTOCOL,
            "keys": self.probe.needles,
            "grid": list(self.grid),
            "n_haystacks": self.n_haystacks,
            "reuse": self.reuse,
        }


def make_plan(
    model: Model | StandIn,
    prompt_set: str,
    longest: int,
    *,
    shortest: int | None = None,
    n_haystacks: int = 12,
    rounds: int = 1,
    in_a_row: int = 2,
    reuse: bool = True,
    budget_seconds: float = inf,
    timed: bool = False,
) -> Plan:
    """Plan lengths ``shortest * 2^k`` to ``longest``.

    Args:
        model: open, or what is asked in its place.
        prompt_set: the name of a probe, or a tier.
        shortest: by default 256 tokens, or 64 for a probe of a single key.
        reuse: False evaluates every question afresh.
        timed: measure the prefill speed, for the costs; always done where there is a budget.

    Raises:
        PromptError: there is no such probe, or the shortest length cannot hold its keys.
        DfqsError: ``longest`` is below ``shortest``.
    """
    probe = probe_of(prompt_set)
    shortest = shortest or (256 if probe.needles > 1 else 64)
    grid = tuple(octaves(shortest, longest))
    if not grid:
        raise DfqsError(f"no length up to {longest:,} tokens", hint=f"the shortest is {shortest}")
    n = Haystacks(frame_of(model, probe), probe, shortest).question_tokens()
    many = reuse and probe.needles > 1
    speed = None
    if isinstance(model, Model) and (timed or budget_seconds < inf):
        speed = measure_prefill(model, longest)
    return Plan(probe, grid, n_haystacks, n, many, rounds, in_a_row, budget_seconds, speed)
