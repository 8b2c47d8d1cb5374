"""Plans that fit a time limit: what is cut, in which order, and the sentence about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

SOME = re.compile(r"(?<=[a-z])s\b")  # what one of a thing lacks


@dataclass(frozen=True)
class Fitted:
    """A plan that was cut to a time.

    Attributes:
        values: the plan's numbers.
        seconds, full_seconds: what it takes, and what it would take uncut.
        left_out: a sentence for each number that was cut.
    """

    values: dict[str, int]
    seconds: float
    full_seconds: float
    left_out: tuple[str, ...] = ()


def fit(
    plan: Mapping[str, int],
    cuts: Sequence[Mapping[str, int]],
    cost: Callable[[dict[str, int]], float],
    seconds: float,
    names: Mapping[str, str] | None = None,
) -> Fitted:
    """Make a plan's cuts, in their order, until it costs no more than these seconds; the last may cost more.

    Args:
        plan: its numbers by name.
        cuts: each an upper limit of some numbers.
        cost: seconds that numbers take.
        names: what people call the numbers.

    >>> fit({"n": 8}, [{"n": 4}, {"n": 1}], lambda plan: plan["n"] * 10.0, 45, {"n": "texts"}).left_out
    ('4 texts, not 8',)
    """
    values, names = dict(plan), names or {}
    for cut in ({}, *cuts):
        values |= {name: min(value, values[name]) for name, value in cut.items()}
        if cost(values) <= seconds:
            break
    left_out = tuple(
        f"{counted(value, names.get(name, name))}, not {plan[name]:,}"
        for name, value in values.items()
        if value < plan[name]
    )
    return Fitted(values, cost(values), cost(dict(plan)), left_out)


def counted(n: int, name: str) -> str:
    """A number of things.

    >>> counted(1, "timed repetitions"), counted(4, "texts a length")
    ('1 timed repetition', '4 texts a length')
    """
    return f"{n:,} {re.sub(SOME, '', name, count=1) if n == 1 else name}"


def duration(seconds: float) -> str:
    """Seconds as people read them.

    >>> duration(42.2), duration(2400), duration(31 * 3600)
    ('42 s', '40 min', '31 h')
    """
    if seconds == inf:
        return "no limit"
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} s"
