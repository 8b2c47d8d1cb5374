"""Two runs of the same questions, compared item by item.

Two different scores may differ by chance, and two equal scores may hide different failures. So items are
paired: only the items on which the two runs disagree carry evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfqs_nb.core.errors import ComparisonError
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.stats import N_BOOT, mcnemar, paired_bootstrap

if TYPE_CHECKING:
    from dfqs_nb.scores.grading import SetRun


@dataclass(frozen=True)
class Comparison:
    """The score of one set in two runs, a and b.

    ``difference``: of b to a, with its 95 % interval ``low`` to ``high``; ``only_a``, ``only_b``: items that
    one alone got right; ``p``: exact McNemar test, the chance of a split at least as uneven, were the two
    equally able.
    """

    n: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p: float


def compare_runs(
    first: Sequence[SetRun], second: Sequence[SetRun], n_boot: int = N_BOOT, seed: int = 0
) -> list[Comparison]:
    """Two runs of the same sets under the same conditions, set by set.

    A `ComparisonError` names differing conditions, missing sets, or items without results.
    """
    others = {run.name: run for run in second}
    odd = {run.name for run in first} ^ set(others)
    if odd:
        what = f"only one of the two runs has {', '.join(sorted(odd))}"
        raise ComparisonError(what, hint="score the same sets with both")
    return [_compared(run, others[run.name], n_boot, seed) for run in first]


def _compared(a: SetRun, b: SetRun, n_boot: int, seed: int) -> Comparison:
    if differing := differing_fields(a.conditions, b.conditions):
        named = ", ".join(f"{key} ({mine} and {theirs})" for key, (mine, theirs) in differing.items())
        what = f"the conditions differ in {named}"
        raise ComparisonError(what, hint="run both again under the same conditions")
    for run in (a, b):
        if run.score.value is None:
            what = f"{run.score.n_missing} items of {run.name} lack a result"
            raise ComparisonError(what, hint="let the run finish: it continues where it stopped")
    keys = ["id", "sample"]
    both = a.items[[*keys, "family", "correct"]].merge(b.items[[*keys, "correct"]], on=keys)
    if not len(a.items) == len(b.items) == len(both):
        raise ComparisonError("the two runs did not answer the same items", hint="score both with --fresh")
    # an item sampled several times counts once, as right where most of its samples are
    items = both.groupby("id", sort=False).agg({"family": "first", "correct_x": "mean", "correct_y": "mean"})
    change = (items["correct_y"] - items["correct_x"]).to_numpy()
    groups = items["family"].to_numpy() if a.kind == "reasoning" else None
    low, high = paired_bootstrap(change, groups, n_boot, seed)
    right_a, right_b = items["correct_x"] > 0.5, items["correct_y"] > 0.5
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    assert a.score.value is not None and b.score.value is not None
    first, second = a.score.value, b.score.value
    p = mcnemar(only_a, only_b)
    return Comparison(len(items), first, second, second - first, low, high, only_a, only_b, p)
