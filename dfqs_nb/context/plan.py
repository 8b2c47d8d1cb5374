"""Plan a long-context measurement, and know its cost before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import ceil, inf, nan
from typing import TYPE_CHECKING, Any

from dfqs_nb.context.boundary import octaves
from dfqs_nb.context.cost import SPARE_TOKENS, PrefillSpeed, measure_prefill
from dfqs_nb.context.haystacks import Haystacks, Probe, StandIn, frame_of, probe_of
from dfqs_nb.core.budget import counted, duration, fit
from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.stage import Stage
from dfqs_nb.llama.model import Model

if TYPE_CHECKING:
    import pandas as pd

CURVE_SHARE = 0.6  # of the budget that the curve takes while notebook 05's other parts have a share
ALONE_SHARE = 0.9  # that it takes at most; the rest is for tables, figures and files
CHECK_TOKENS = 64  # of the text that the check of reuse reads, where only one text is asked about
PROTOCOL = "fixed keys, fresh texts for each length"  # answers under another one are not comparable


@dataclass(frozen=True)
class Plan:
    """What will be measured.

    Attributes:
        probe: the prompt set; it fixes the number of keys.
        grid: planned lengths in tokens of context, ascending; the answer begins at about that depth.
        n_haystacks: texts for each length, and twice as many for the shortest, which a_0 comes from. 1: one
            for the shortest, too; 0: nothing is asked, because the budget does not hold the least plan.
        question_tokens: tokens evaluated for a question.
        reuse: ask every question of a text from its saved state.
        rounds: see `search_lengths`.
        budget_seconds: no text is begun that is not expected to end in time; what is not measured is
            censored, not failed.
        speed: measured prefill speed, which costs are made of; None: not timed.
        left_out: sentences about what the budget took away.
    """

    probe: Probe
    grid: tuple[int, ...]
    n_haystacks: int
    question_tokens: int
    reuse: bool
    rounds: int = 1
    budget_seconds: float = inf
    speed: PrefillSpeed | None = None
    left_out: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """The longest planned length."""
        return self.grid[-1]

    def n_texts(self, length: int) -> int:
        """Texts asked about at a length."""
        return self.n_haystacks * (2 if length == self.grid[0] and self.n_haystacks > 1 else 1)

    @property
    def n_questions(self) -> int:
        """Questions about a text of a planned length; the two-hop one is asked at these only."""
        return self.probe.needles + bool(self.probe.link)

    def up_to(self, longest: int) -> Plan:
        """The plan without the lengths beyond this one."""
        return replace(self, grid=tuple(length for length in self.grid if length <= longest))

    def tokens(self) -> int:
        """Tokens evaluated at all planned lengths, if none is left out early."""
        n, more = self.n_questions, (self.n_questions - 1) * self.question_tokens
        return sum(self.n_texts(size) * (size + more if self.reuse else n * size) for size in self.grid)

    @property
    def seconds(self) -> float:
        """Seconds that the planned lengths take, with the check of reuse; NaN if the plan is not timed."""
        return self.check_seconds + sum(self.n_texts(n) * self.text_seconds(n) for n in self.grid)

    def text_seconds(self, length: int) -> float:
        """Seconds that a text of this length takes with its questions."""
        if self.speed is None:
            return nan
        n, text = self.n_questions, self.speed.seconds(length)
        return (
            text + (n - 1) * self.question_tokens / self.speed.tokens_per_sec(length)
            if self.reuse
            else n * text
        )

    @property
    def check(self) -> tuple[int, int]:
        """Tokens and questions of the text on which `measure` checks that reuse changes nothing."""
        return (self.grid[0], 2) if self.n_haystacks > 1 else (min(CHECK_TOKENS, self.grid[0]), 1)

    @property
    def check_seconds(self) -> float:
        """Seconds that this check takes; 0 without one, or where the plan is not timed."""
        if not self.reuse or self.speed is None:
            return 0.0
        size, n = self.check
        return (n + 1) * self.speed.seconds(size) + 2 * n * self.question_tokens * self.speed.base

    def cost_table(self) -> pd.DataFrame:
        """The curve to each length: ``longest``, ``evaluated_tokens``, ``seconds``, ``within_budget``."""
        import pandas as pd

        plans = [self.up_to(length) for length in self.grid]
        rows = [(plan.longest, plan.tokens(), plan.seconds) for plan in plans]
        table = pd.DataFrame(rows, columns=["longest", "evaluated_tokens", "seconds"])
        return table.assign(within_budget=table["seconds"] <= CURVE_SHARE * self.budget_seconds)

    def within_budget(self) -> Plan:
        """The plan cut until the budget holds it.

        The order: 6 and 4 texts a length, lengths down to four of them; then the other parts of notebook 05
        lose their share; 2 texts, the other lengths, one text; then nothing is asked.
        """
        n, budget = len(self.grid), self.budget_seconds
        if budget == inf or self.speed is None:
            return self
        cuts = [{"texts": 6}, {"texts": 4}, *({"lengths": k} for k in range(n - 1, 3, -1)), {"others": 0}]
        cuts += [{"texts": 2}, *({"lengths": k} for k in range(min(n, 4), 0, -1)), {"texts": 1}, {"texts": 0}]

        def made(cut: dict[str, int]) -> Plan:
            return replace(self, n_haystacks=cut["texts"], grid=self.grid[: cut["lengths"]])

        def cost(cut: dict[str, int]) -> float:
            beside = 1 - (CURVE_SHARE if cut["others"] else ALONE_SHARE)
            return beside * budget + (made(cut).seconds if cut["texts"] else 0)

        plan = made(fit({"texts": self.n_haystacks, "lengths": n, "others": 1}, cuts, cost, budget).values)
        left_out = []
        if 0 < plan.n_haystacks < self.n_haystacks:
            left_out.append(f"{counted(plan.n_haystacks, 'texts a length')}, not {self.n_haystacks}")
        if plan.n_haystacks and plan.longest < self.longest:
            left_out.append(f"lengths above {plan.longest:,} tokens, of up to {self.longest:,}")
        return replace(plan, left_out=tuple(left_out))

    def kept(self, stage: Stage, model_sha256: str, *, fresh: bool = False) -> Plan:
        """The plan within its budget, or as an earlier run of the stage cut it; the stage notes the cuts.

        Its budget is the curve's own. A plan that asks nothing is made anew each time.
        """

        def make() -> dict[str, Any]:
            cut = self.within_budget()
            return {"grid": cut.grid, "n_haystacks": cut.n_haystacks, "left_out": cut.left_out}

        conditions = {**self.conditions(), "model": model_sha256}
        made = stage.plan(conditions, make, fresh=fresh)
        made = made if made["n_haystacks"] else stage.plan(conditions, make, fresh=True)
        plan = replace(self, grid=tuple(made["grid"]), n_haystacks=made["n_haystacks"])
        left_out = tuple(made["left_out"]) if plan.n_haystacks else (self._missing(stage),)
        stage.leave_out(left_out)
        share = CURVE_SHARE if plan.seconds <= CURVE_SHARE * self.budget_seconds else ALONE_SHARE
        return replace(plan, left_out=left_out, budget_seconds=share * self.budget_seconds)

    def _missing(self, stage: Stage) -> str:
        """That nothing is measured, what the least plan takes, and the command that measures it."""
        least = replace(self, n_haystacks=1, grid=self.grid[:1]).seconds
        minutes = ceil((least / ALONE_SHARE + stage.budget_seconds - stage.seconds_left) * 1.2 / 60)
        command = f"dfqs-nb run 05 07 --run {quoted(stage.folder.name)} -p budget_minutes={minutes}"
        return f"the curve and the boundary: not measured (the least takes {duration(least)}; `{command}`)"

    @property
    def cost_sentence(self) -> str:
        """What the plan costs, and what the budget took away."""
        if not self.n_haystacks:
            return "; ".join(self.left_out)
        cut = f". Cut to keep to the budget: {'; '.join(self.left_out)}" if self.left_out else ""
        return f"the curve to {self.longest:,} tokens will take about {duration(self.seconds)}{cut}"

    def conditions(self) -> dict[str, Any]:
        """What the answers depend on, beside the model."""
        texts = {"grid": list(self.grid), "n_haystacks": self.n_haystacks, "reuse": self.reuse}
        return {**self.probe.identity(), "protocol": PROTOCOL, "keys": self.probe.needles, **texts}


def make_plan(
    model: Model | StandIn,
    prompt_set: str,
    longest: int,
    *,
    shortest: int | None = None,
    n_haystacks: int = 12,
    rounds: int = 1,
    reuse: bool = True,
    budget_seconds: float = inf,
    timed: bool = False,
) -> Plan:
    """Plan lengths ``shortest * 2^k`` to ``longest``.

    Args:
        prompt_set: the name of a probe, or a tier.
        longest: 0: all that the open model's context holds.
        shortest: by default 256 tokens, or 64 for a probe of a single key; doubled until it holds the keys,
            for tokenizers of short tokens.
        reuse: False evaluates every question afresh.
        timed: measure the prefill speed, for the costs; always done where there is a budget.

    Raises:
        PromptError: there is no such probe, or the shortest length cannot hold its keys.
        DfqsError: ``longest`` is below ``shortest``.
    """
    probe, speed = probe_of(prompt_set), None
    frame = frame_of(model, probe)
    if not shortest:
        least, shortest = Haystacks(frame, probe).least_tokens(), 256 if probe.needles > 1 else 64
        while shortest < least:
            shortest *= 2
    longest = longest or model.settings.n_ctx - SPARE_TOKENS
    grid = tuple(octaves(shortest, longest))
    if not grid:
        raise DfqsError(f"no length up to {longest:,} tokens", hint=f"the shortest is {shortest}")
    n, many = Haystacks(frame, probe, shortest).question_tokens(), reuse and probe.needles > 1
    if isinstance(model, Model) and (timed or budget_seconds < inf):
        began = time.monotonic()
        speed = measure_prefill(model, longest, budget_seconds)
        budget_seconds -= time.monotonic() - began
    return Plan(probe, grid, n_haystacks, n, many, rounds, budget_seconds, speed)
