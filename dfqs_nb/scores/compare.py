"""Two runs of the same questions, compared item by item.

Two scores may look apart and not be, or look alike and hide that they fail on different items. Paired by
item, only the items on which the two disagree carry evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.errors import ComparisonError
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.stats import LEVEL, N_BOOT, holm, mcnemar, paired_bootstrap

if TYPE_CHECKING:
    from dfqs_nb.scores.results import SetRun


@dataclass(frozen=True)
class Comparison:
    """One metric of two runs, a and b.

    Attributes:
        difference: the score of b minus that of a, with its 95 % interval ``low`` to ``high``.
        only_a, only_b: items that one alone got right.
        p: exact McNemar test: the chance of a split at least as uneven, were the two equally able.
        p_holm: the same after Holm's correction for the number of metrics compared.
    """

    metric: str
    n: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p: float
    p_holm: float

    @property
    def sentence(self) -> str:
        """The comparison in words.

        >>> Comparison("code_score", 64, 0.5, 0.6, 0.1, -0.01, 0.2, 3, 9, 0.146, 0.29).sentence
        'code_score: 0.500 -> 0.600, difference +0.100 (95 % interval -0.010 to +0.200), 3 items only in
        the first,
        9 only in the second, p = 0.29 (Holm): no evidence of a difference'
        """
        verdict = "a difference" if self.p_holm < 1 - LEVEL else "no evidence of a difference"
        return (
            f"{self.metric}: {self.a:.3f} -> {self.b:.3f}, difference {self.difference:+.3f} (95 % interval "
            f"{self.low:+.3f} to {self.high:+.3f}), {self.only_a} items only in the first, {self.only_b} "
            f"only in the second, p = {self.p_holm:.2g} (Holm): {verdict}"
        )


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Refuse two runs that were not made under the same conditions.

    Raises:
        ComparisonError: the message names every field that differs.

    >>> check_comparable({"n_ctx": 1024}, {"n_ctx": 4096})
    Traceback (most recent call last):
    dfqs_nb.core.errors.ComparisonError: the conditions differ in n_ctx (1024 and 4096); run both again under
    the same conditions
    """
    differing = differing_fields(a, b)
    if differing:
        named = ", ".join(f"{key} ({mine} and {theirs})" for key, (mine, theirs) in differing.items())
        raise ComparisonError(
            f"the conditions differ in {named}", hint="run both again under the same conditions"
        )


def compare_runs(
    first: Sequence[SetRun], second: Sequence[SetRun], n_boot: int = N_BOOT, seed: int = 0
) -> list[Comparison]:
    """Two runs of the same sets under the same conditions, metric by metric.

    Raises:
        ComparisonError: conditions differ, sets are missing, or items lack results.
    """
    others = {run.name: run for run in second}
    names = {run.name for run in first}
    if names != set(others):
        odd = ", ".join(sorted(names ^ set(others)))
        raise ComparisonError(f"only one of the two runs has {odd}", hint="score the same sets with both")
    rows = [_compared(run, others[run.name], n_boot, seed) for run in first]
    adjusted = holm([row["p"] for row in rows])
    return [Comparison(**row, p_holm=p) for row, p in zip(rows, adjusted, strict=True)]


def _compared(a: SetRun, b: SetRun, n_boot: int, seed: int) -> dict[str, Any]:
    check_comparable(a.conditions, b.conditions)
    for run in (a, b):
        if run.score.value is None:
            raise ComparisonError(
                f"{run.score.n_missing} items of {run.name} lack a result",
                hint="let the run finish: it continues where it stopped",
            )
    keys = ["id", "sample"]
    both = a.items[[*keys, "family", "correct"]].merge(
        b.items[[*keys, "correct"]], on=keys, suffixes=("_a", "_b")
    )
    if len(both) != len(a.items) or len(both) != len(b.items):
        raise ComparisonError("the two runs did not answer the same items", hint="score both with --fresh")
    # an item sampled several times counts once, as right where most of its samples are
    items = both.groupby("id", sort=False).agg({"family": "first", "correct_a": "mean", "correct_b": "mean"})
    change = (items["correct_b"] - items["correct_a"]).to_numpy()
    groups = items["family"].to_numpy() if a.kind == "reasoning" else None
    low, high = paired_bootstrap(change, groups, n_boot, seed)
    right_a, right_b = items["correct_a"] > 0.5, items["correct_b"] > 0.5
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    assert a.score.value is not None and b.score.value is not None
    return {
        "metric": f"{a.score.name} ({a.name})",
        "n": len(items),
        "a": a.score.value,
        "b": b.score.value,
        "difference": b.score.value - a.score.value,
        "low": low,
        "high": high,
        "only_a": only_a,
        "only_b": only_b,
        "p": mcnemar(only_a, only_b),
    }
