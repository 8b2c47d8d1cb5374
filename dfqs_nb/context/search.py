"""Which lengths to measure: up the plan until the model clearly fails, then closer where it crosses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, log2

from dfqs_nb.context.boundary import Counts, bracket
from dfqs_nb.stats import wilson


def octaves(shortest: int, longest: int) -> list[int]:
    """Lengths ``shortest * 2^k`` up to ``longest``.

    >>> octaves(256, 2000)
    [256, 512, 1024]
    """
    return [shortest * 2**k for k in range(int(log2(longest / shortest)) + 1)] if longest >= shortest else []


def clearly_below(counts: Counts, in_a_row: int = 2) -> bool:
    """Whether the last ``in_a_row`` planned lengths lie below the threshold by their whole interval."""
    high = wilson(counts.right, counts.n)[1][counts.planned]
    return len(high) > in_a_row and bool((high[-in_a_row:] < counts.threshold).all())


def refined_lengths(counts: Counts, resolution: float = 0.3) -> list[int]:
    """The middles (in log2) of the intervals where the fit, and the accuracies themselves, first cross.

    Intervals of ``resolution`` octaves or less are left as they are.
    """
    middles = set()
    for values in (counts.fit, counts.accuracy):
        low, high = (float(edge) for edge in bracket(counts.lengths, values, counts.threshold))
        if high != inf and high > low and log2(high / low) > resolution:
            middles.add(round((low * high) ** 0.5))
    return sorted(middles - set(counts.lengths.tolist()))


def search_lengths(
    measure: Callable[[int, bool], Counts | None],
    grid: Sequence[int],
    *,
    rounds: int = 1,
    in_a_row: int = 2,
) -> Counts | None:
    """Measure the grid upwards until it clearly fails, then between its lengths where the accuracy crosses.

    Args:
        measure: measures one length (its second argument: whether it is of the grid) and returns all counts
            so far, or None when it could not run; then the search ends.
        grid: lengths, ascending.
        rounds: how often the interval of the crossing is halved.
        in_a_row: grid lengths that must clearly fail before longer ones are left out.

    Returns:
        The last counts. What to measure depends on the counts alone, so a resumed search repeats itself.
    """
    counts = None
    for length in grid:
        if (done := measure(length, True)) is None:
            return counts
        counts = done
        if clearly_below(counts, in_a_row):
            break
    for _ in range(rounds):
        for length in refined_lengths(counts) if counts else ():
            if (done := measure(length, False)) is None:
                return counts
            counts = done
    return counts
