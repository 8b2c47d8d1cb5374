"""Plan a long-context measurement, and know its cost before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, nan
from typing import TYPE_CHECKING, Any

from dfqs_nb.context.cost import SPARE_TOKENS, PrefillSpeed, measure_prefill
from dfqs_nb.context.haystacks import Haystacks, Probe, StandIn, frame_of, probe_of
from dfqs_nb.context.search import octaves
from dfqs_nb.core.budget import Fitted, counted, duration, fit
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.stage import Stage
from dfqs_nb.llama.model import Model

if TYPE_CHECKING:
    import pandas as pd

LOGIT_SECONDS = 3e-8  # that a logit takes to become a probability, measured on one core
PROTOCOL = "fixed keys, fresh texts for each length"  # answers under another one are not comparable


@dataclass(frozen=True)
class Plan:
    """What will be measured.

    Attributes:
        probe: the prompt set; it fixes the number of keys.
        grid: planned lengths in tokens of context, ascending; the answer begins at about that depth.
        n_haystacks: texts for each length, and twice as many for the shortest, which a_0 comes from.
        question_tokens: tokens evaluated for a question.
        reuse: ask every question of a text from its saved state.
        rounds, in_a_row: see `search_lengths`.
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
    in_a_row: int = 2
    budget_seconds: float = inf
    speed: PrefillSpeed | None = None
    left_out: tuple[str, ...] = ()

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
        sizes = {length: length + more if self.reuse else n * length for length in self.grid}
        return sum(self.n_texts(length) * size for length, size in sizes.items())

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
        rows = [(plan.longest, plan.tokens(), plan.seconds) for plan in plans]
        table = pd.DataFrame(rows, columns=["longest", "evaluated_tokens", "seconds"])
        return table.assign(within_budget=table["seconds"] <= self.budget_seconds)

    def within_budget(self) -> Plan:
        """The plan cut until its budget holds it: texts a length first, then the longest lengths.

        The order: 6 and 4 texts, lengths down to four of them, 2 texts, the other lengths, one text. What is
        left then is measured even where it takes longer.
        """
        n = len(self.grid)
        cuts = [{"texts": 6}, {"texts": 4}, *({"lengths": k} for k in range(n - 1, 3, -1))]
        cuts += [{"texts": 2}, *({"lengths": k} for k in range(min(n, 4), 0, -1)), {"texts": 1}]

        def made(cut: dict[str, int]) -> Plan:
            return replace(self, n_haystacks=cut["texts"], grid=self.grid[: cut["lengths"]])

        if self.budget_seconds == inf:
            return self
        whole = {"texts": self.n_haystacks, "lengths": n}
        plan = made(fit(whole, cuts, lambda cut: made(cut).seconds, self.budget_seconds).values)
        left_out = []
        if plan.n_haystacks < self.n_haystacks:
            left_out.append(f"{counted(plan.n_haystacks, 'texts a length')}, not {self.n_haystacks}")
        if plan.longest < self.longest:
            left_out.append(f"lengths above {plan.longest:,} tokens, of up to {self.longest:,}")
        return replace(plan, left_out=tuple(left_out))

    def kept(self, stage: Stage, model_sha256: str, *, fresh: bool = False) -> Plan:
        """The plan within its budget, or as an earlier run of the stage cut it; the stage notes the cuts."""

        def make() -> dict[str, Any]:
            cut = self.within_budget()
            return {"grid": cut.grid, "n_haystacks": cut.n_haystacks, "left_out": cut.left_out}

        made = stage.plan({**self.conditions(), "model": model_sha256}, make, fresh=fresh)
        stage.leave_out(made["left_out"])
        grid, left_out = tuple(made["grid"]), tuple(made["left_out"])
        return replace(self, grid=grid, n_haystacks=made["n_haystacks"], left_out=left_out)

    def held_out(self, n_texts: int, n_vocab: int, seconds: float) -> Fitted:
        """How many held-out texts (``texts``), of how many ``tokens``, these seconds hold; at least two.

        Args:
            n_vocab: a logit for each is turned into a probability.
        """
        speed, halves = self.speed, [self.longest >> k for k in range(1, 20) if self.longest >> k >= 256]
        if speed is None:
            return Fitted({"texts": n_texts, "tokens": self.longest}, nan, nan)
        cuts = [{"texts": 4}, *({"tokens": n} for n in halves), {"texts": 2}]

        def cost(plan: dict[str, int]) -> float:
            return plan["texts"] * (speed.seconds(plan["tokens"]) + plan["tokens"] * n_vocab * LOGIT_SECONDS)

        names = {"texts": "held-out texts", "tokens": "tokens of a held-out text"}
        return fit({"texts": n_texts, "tokens": self.longest}, cuts, cost, seconds, names)

    def filled(self, load_seconds: float, seconds: float) -> tuple[list[int], int, list[str]]:
        """Lengths whose memory is measured, the tokens that fill each, and what these seconds leave out."""
        lengths = [n for n in self.grid if n >= 256] or list(self.grid)
        wanted, fill = list(lengths), 4096
        while len(lengths) > 1 and len(lengths) * load_seconds > seconds / 2:
            lengths.pop(0)
        while fill > 256 and self.speed and len(lengths) * self.speed.seconds(fill) > seconds / 2:
            fill //= 2
        kept = f"memory of {counted(len(lengths), 'lengths')}, not {len(wanted)}"
        return lengths, fill, [kept] if lengths != wanted else []

    @property
    def cost_sentence(self) -> str:
        """The cost of the whole plan, and of a shorter one, as a sentence; and what the budget took away."""
        text = f"the curve to {self.longest:,} tokens will take about {duration(self.seconds)}"
        shorter = [self.up_to(length) for length in self.grid if length <= self.longest / 4][-1:]
        for plan in shorter:
            text += f"; the curve to {plan.longest:,} tokens {duration(plan.seconds)}"
        return text + (f". Cut to keep to the budget: {'; '.join(self.left_out)}" if self.left_out else "")

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
    in_a_row: int = 2,
    reuse: bool = True,
    budget_seconds: float = inf,
    timed: bool = False,
) -> Plan:
    """Plan lengths ``shortest * 2^k`` to ``longest``.

    Args:
        model: open, or what is asked in its place.
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
    probe = probe_of(prompt_set)
    frame = frame_of(model, probe)
    if not shortest:
        least, shortest = Haystacks(frame, probe).least_tokens(), 256 if probe.needles > 1 else 64
        while shortest < least:
            shortest *= 2
    longest = longest or model.settings.n_ctx - SPARE_TOKENS
    grid = tuple(octaves(shortest, longest))
    if not grid:
        raise DfqsError(f"no length up to {longest:,} tokens", hint=f"the shortest is {shortest}")
    n = Haystacks(frame, probe, shortest).question_tokens()
    many = reuse and probe.needles > 1
    speed = None
    if isinstance(model, Model) and (timed or budget_seconds < inf):
        speed = measure_prefill(model, longest)
    return Plan(probe, grid, n_haystacks, n, many, rounds, in_a_row, budget_seconds, speed)
