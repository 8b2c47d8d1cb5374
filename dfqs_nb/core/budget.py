"""Plans that fit a time limit: what is cut, in which order, and a sentence about each cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Fitted:
    """A plan cut to a time limit: its numbers, its seconds and those uncut, a sentence for each cut."""

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
    """Cut a plan step by step until it takes at most these seconds; after the last cut it may take more.

    ``cuts``, in order: each holds upper limits of some numbers. ``cost``: the seconds that such numbers take.
    ``names``: of the numbers, for people.
    """
    values, names = dict(plan), names or {}
    for cut in ({}, *cuts):
        values |= {name: min(value, values[name]) for name, value in cut.items()}
        if cost(values) <= seconds:
            break
    left_out = tuple(
        f"{counted(value, names.get(name, name))} in place of {plan[name]:,}"
        for name, value in values.items()
        if value < plan[name]
    )
    return Fitted(values, cost(values), cost(dict(plan)), left_out)


def counted(n: int, name: str) -> str:
    """A number and its noun, singular for 1."""
    if n == 1:
        name = re.sub(r"(?<=[a-z])s\b", "", name, count=1)
    return f"{n:,} {name}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds == inf:
        return "no limit"
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} s"
