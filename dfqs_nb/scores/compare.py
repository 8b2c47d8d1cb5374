"""Two runs of the same questions, compared item by item.

Two scores may look apart and not be, or look alike and hide that they fail on different items. Paired by
item, only the items on which the two disagree carry evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.stats import LEVEL, N_BOOT

if TYPE_CHECKING:
    import pandas as pd

    from dfqs_nb.scores.run import SetRun
from dfqs_nb.stats import holm, mcnemar  # MOVED


class ComparisonError(DfqsError):
    """Two runs that cannot be compared."""


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


def differing_fields(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Every field of nested conditions in which the two differ, with both values.

    >>> differing_fields({"n_ctx": 1, "sampling": {"seed": 1}}, {"n_ctx": 1, "sampling": {"seed": 2}})
    {'sampling.seed': (1, 2)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*a, *b}):
        one, other = a.get(key, "absent"), b.get(key, "absent")
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= differing_fields(one, other, f"{prefix}{key}.")
        elif one != other:
            found[f"{prefix}{key}"] = (one, other)
    return found


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Refuse two runs that were not made under the same conditions.

    Raises:
        ComparisonError: the message names every field that differs.

    >>> check_comparable({"n_ctx": 1024}, {"n_ctx": 4096})
    Traceback (most recent call last):
    dfqs_nb.scores.compare.ComparisonError: the conditions differ in n_ctx (1024 and 4096); run both again under
    the same conditions
    """
    found = differing_fields(a, b)
    if found:
        named = ", ".join(f"{key} ({one} and {other})" for key, (one, other) in found.items())
        raise ComparisonError(
            f"the conditions differ in {named}", hint="run both again under the same conditions"
        )


def compare(
    first: Sequence[SetRun], second: Sequence[SetRun], n_boot: int = N_BOOT, seed: int = 0
) -> list[Comparison]:
    """Two runs of the same sets under the same conditions, metric by metric.

    Raises:
        ComparisonError: conditions differ, sets are missing, or items lack results.
    """
    pairs = _pairs(first, second)
    rows = []
    for a, b in pairs:
        check_comparable(a.conditions, b.conditions)
        rows.append(_one(a, b, n_boot, seed))
    adjusted = holm([row["p"] for row in rows])
    return [Comparison(**row, p_holm=p) for row, p in zip(rows, adjusted, strict=True)]


def _pairs(first: Sequence[SetRun], second: Sequence[SetRun]) -> list[tuple[SetRun, SetRun]]:
    others = {run.item_set.name: run for run in second}
    names = [run.item_set.name for run in first]
    if set(names) != set(others):
        odd = ", ".join(sorted(set(names) ^ set(others)))
        raise ComparisonError(f"only one of the two runs has {odd}", hint="score the same sets with both")
    for run in (*first, *second):
        if run.score.value is None:
            raise ComparisonError(
                f"{run.score.n_missing} items of {run.item_set.name} lack a result",
                hint="let the run finish: it continues where it stopped",
            )
    return [(run, others[run.item_set.name]) for run in first]


def _one(a: SetRun, b: SetRun, n_boot: int, seed: int) -> dict[str, Any]:
    keys = ["id", "sample"]
    both = a.items[[*keys, "family", "correct"]].merge(
        b.items[[*keys, "correct"]], on=keys, suffixes=("_a", "_b")
    )
    if len(both) != len(a.items) or len(both) != len(b.items):
        raise ComparisonError("the two runs did not answer the same items", hint="score both with --fresh")
    # a task sampled several times is one item, counted as right where most of its samples are
    tasks = both.groupby("id", sort=False).agg(
        family=("family", "first"), correct_a=("correct_a", "mean"), correct_b=("correct_b", "mean")
    )
    macro = a.item_set.kind == "reasoning"
    low, high = paired_bootstrap(tasks, macro, n_boot, seed)
    right_a, right_b = tasks["correct_a"] > 0.5, tasks["correct_b"] > 0.5
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return {
        "metric": f"{a.score.name} ({a.item_set.name})",
        "n": len(tasks),
        "a": a.score.value,
        "b": b.score.value,
        "difference": b.score.value - a.score.value,
        "low": low,
        "high": high,
        "only_a": only_a,
        "only_b": only_b,
        "p": mcnemar(only_a, only_b),
    }


def paired_bootstrap(
    tasks: pd.DataFrame, macro: bool, n_boot: int = N_BOOT, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the difference b - a, drawing items anew within each family (``macro``) or
    over all.

    ``tasks`` has columns ``family``, ``correct_a`` and ``correct_b``, one row an item.
    """
    draw = np.random.default_rng(seed)
    change = (tasks["correct_b"].astype(float) - tasks["correct_a"].astype(float)).to_numpy()
    groups = (
        [np.flatnonzero(tasks["family"] == one) for one in tasks["family"].unique()]
        if macro
        else [np.arange(len(tasks))]
    )
    means = [change[group[draw.integers(0, len(group), (n_boot, len(group)))]].mean(1) for group in groups]
    low, high = np.quantile(np.mean(means, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def comparison_table(compared: Sequence[Comparison]) -> pd.DataFrame:
    """One row a metric, with the fields of ``Comparison``."""
    import pandas as pd

    columns = list(Comparison.__dataclass_fields__)
    return pd.DataFrame([[getattr(one, name) for name in columns] for one in compared], columns=columns)
