"""Grade answers, and turn grades into scores with their uncertainty.

Strict: an answer counts when it is the expected one after normalisation, and a program when its tests run to
their end. Nothing is given for being close.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import comb, sqrt
from typing import TYPE_CHECKING, Any

from dfqs_nb.llama.thinking import answer_start
from dfqs_nb.scores.answers import extract, normalised
from dfqs_nb.stats import wilson

if TYPE_CHECKING:
    import pandas as pd

GRADES = ("correct", "wrong", "no_answer", "truncated")


def grade(text: str, finish_reason: str, answer: str, how: str, opened: bool = False) -> tuple[str, str]:
    """The grade of a completion (see ``GRADES``) and the answer found in it.

    ``truncated``: the thinking did not end, or the token limit came before an answer was complete. Neither
    says anything about the answer.

    Args:
        how: where the answer is, see `answers.extract`.
        opened: the prompt has begun the thinking.

    >>> grade("Let me see", "length", "12", "answer tag")
    ('truncated', '')
    """
    start = answer_start(text, opened)
    if start is None:
        return "truncated", ""
    given = extract(text[start:], how, finish_reason == "stop")
    if finish_reason == "length" and (given is None or how == "last line"):
        return "truncated", ""
    if given is None:
        return "no_answer", ""
    return ("correct" if normalised(given) == normalised(answer) else "wrong"), given


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of pass@k from ``n`` samples (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    >>> pass_at_k(1, 1, 1), round(pass_at_k(10, 3, 5), 4)
    (1.0, 0.9167)

    Raises:
        ValueError: fewer samples than ``k``.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples, {correct} correct")
    return 1.0 - comb(n - correct, k) / comb(n, k)


@dataclass(frozen=True)
class Score:
    """A score with its uncertainty.

    Attributes:
        value: None while an item lacks its result; no part of a set stands for the whole.
        low, high: 95 % interval: Wilson's, at the effective number of items.
        standard_error: stratified over families (reasoning) or over tasks (code).
        n, n_missing: items, and those without a result.
        guess_rate: what guessing would score.
        counts: items by grade, or samples by outcome.
    """

    name: str
    set: str
    value: float | None
    low: float
    high: float
    standard_error: float
    n: int
    n_missing: int
    guess_rate: float
    counts: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a stage file."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """The score as people read it.

        >>> Score("code_score", "s", 0.5, 0.4, 0.6, 0.05, 100, 0, 0.0, {}).sentence
        'code_score 0.500 (95 % interval 0.400 to 0.600, n = 100, guess rate 0.000; s)'
        """
        if self.value is None:
            done = self.n - self.n_missing
            return f"{self.name} withheld: {done} of {self.n} items have a result ({self.set})"
        return (
            f"{self.name} {self.value:.3f} (95 % interval {self.low:.3f} to {self.high:.3f}, n = {self.n}, "
            f"guess rate {self.guess_rate:.3f}; {self.set})"
        )


def reasoning_score(items: pd.DataFrame, name: str, n_expected: int) -> Score:
    """The macro mean over families of strict matches.

    Args:
        items: columns ``family``, ``guess`` and ``grade``, one row an item; with several samples of an item
            also ``id``, by which their mean is taken.
        name: of the set.
        n_expected: items of the whole set.

    The standard error is stratified: sqrt(sum of p(1 - p) / (n - 1)) / families. The interval is Wilson's at
    the number of items that is worth as much, 1 / sum(w^2 / n) with w = 1 / families.
    """
    right = items.assign(correct=(items["grade"] == "correct").astype(float))
    if "id" in right:
        right = right.groupby("id", sort=False).agg({"family": "first", "guess": "first", "correct": "mean"})
    groups = right.groupby("family", sort=False)
    share, n, guess = groups["correct"].mean(), groups.size(), groups["guess"].mean()
    weight = 1 / max(len(n), 1)
    counts = {grade: int((items["grade"] == grade).sum()) for grade in GRADES}
    return _score(
        "reasoning_score",
        name,
        value=float(share.mean()) if len(n) else 0.0,
        error=weight * sqrt(float((share * (1 - share) / (n - 1).clip(lower=1)).sum())),
        worth=1 / float((weight**2 / n).sum()) if len(n) else 0.0,
        n=(n_expected, len(right)),
        guess=guess.mean(),
        counts=counts,
    )


def code_score(samples: pd.DataFrame, name: str, n_expected: int, k: int = 1) -> Score:
    """The mean over tasks of the unbiased pass@k.

    Args:
        samples: columns ``id`` (of the task) and ``grade`` (the sandbox's outcome), one row a sample.
        name: of the set.
        n_expected: tasks of the whole set.

    Raises:
        ValueError: a task has fewer samples than ``k``.
    """
    passed = samples.assign(passed=samples["grade"] == "passed").groupby("id", sort=False)["passed"]
    table = passed.agg(["count", "sum"])
    values = [pass_at_k(int(n), int(right), k) for n, right in zip(table["count"], table["sum"], strict=True)]
    n_tasks = len(values)
    mean = sum(values) / n_tasks if n_tasks else 0.0
    spread = sum((value - mean) ** 2 for value in values) / max(n_tasks - 1, 1)
    counts = {str(grade): int(count) for grade, count in samples["grade"].value_counts().items()}
    return _score(
        "code_score" if k == 1 else f"pass@{k}",
        name,
        value=mean,
        error=sqrt(spread / max(n_tasks, 1)),
        worth=n_tasks,
        n=(n_expected, n_tasks),
        guess=0.0,
        counts=counts,
    )


def _score(
    label: str,
    name: str,
    *,
    value: float,
    error: float,
    worth: float,
    n: tuple[int, int],
    guess: float,
    counts: dict[str, int],
) -> Score:
    """``n``: items of the set, and those with a result; ``worth``: the items that the interval stands on."""
    low, high = wilson(value * worth, worth)
    missing = n[0] - n[1]
    return Score(
        label,
        name,
        None if missing else value,
        float(low),
        float(high),
        error,
        n[0],
        missing,
        float(guess) if n[1] else 0.0,
        counts,
    )


def family_table(items: pd.DataFrame) -> pd.DataFrame:
    """One row a family and length: counts, accuracy with Wilson's interval, guess rate, and how it failed.

    ``items`` has columns ``set``, ``id``, ``family``, ``length``, ``guess``, ``grade`` (of code: the
    outcome), ``correct`` and ``truncated``.
    """
    import pandas as pd

    rows = []
    for (name, family, length), group in items.groupby(["set", "family", "length"], sort=False):
        n_items = group["id"].nunique()  # samples of one item are no evidence of their own
        low, high = wilson(group["correct"].mean() * n_items, n_items)
        rows.append(
            {
                "set": name,
                "family": family,
                "length": length,
                "n": len(group),
                "correct": int(group["correct"].sum()),
                "accuracy": group["correct"].mean(),
                "low": float(low),
                "high": float(high),
                "guess_rate": group["guess"].mean(),
                "truncated": int(group["truncated"].sum()),
                "no_answer": int((group["grade"] == "no_answer").sum()),
            }
        )
    return pd.DataFrame(rows)
