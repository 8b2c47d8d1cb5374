"""Grade answers, and turn grades into scores with their uncertainty.

Strict: an answer counts when it is the expected one after normalisation, and a program when its tests run to
their end. Nothing is given for being close.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from math import comb, sqrt
from typing import TYPE_CHECKING, Any

from dfqs_nb.stats import wilson

if TYPE_CHECKING:
    import pandas as pd

GRADES = ("correct", "wrong", "no_answer", "truncated")


def normalised(text: str) -> str:
    """An answer without what does not change it: case, spacing, enclosing marks, a final stop, how a number
    is written.

    >>> normalised(" **1,234.50.** "), normalised("The box  is Red."), normalised("$37/67$")
    ('1234.5', 'the box is red', '37/67')
    """
    text = " ".join(unicodedata.normalize("NFKC", text).replace("−", "-").split())
    before = None
    while text != before:
        before = text
        text = re.sub(r"^([*`\"'$]+)(.*)\1$", r"\2", text).strip().rstrip(".").strip()
    plain = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text).removeprefix("$")
    try:
        number = Decimal(plain)
    except InvalidOperation:
        return text.casefold()
    return format(number.normalize() + 0, "f") if number.is_finite() else text.casefold()


def after_thought(text: str) -> str:
    """What a model says after its thinking, all of it where it does not think.

    >>> after_thought("<think>12 or 13?</think>It is 12."), after_thought("It is 12.")
    ('It is 12.', 'It is 12.')
    """
    return text.rpartition("</think>")[2]


def extract(text: str, how: str, finish_reason: str = "eos") -> str | None:
    """The answer in a completion, or None where it has none; what is thought before it is no answer.

    ``answer tag``: what the last ``<answer>`` encloses (the closing tag may be the stop text that ended it).
    ``last line``: the last line that says anything.

    >>> extract("So it is <answer>12</answer>.", "answer tag"), extract("first\\n12\\n", "last line")
    ('12', '12')
    """
    text = after_thought(text)
    if how == "last line":
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1].strip() if lines else None
    opened = text.rfind("<answer>")
    if opened < 0:
        return None
    inner, closed, _ = text[opened + len("<answer>") :].partition("</answer>")
    return (inner.strip() or None) if closed or finish_reason == "stop" else None


def grade(text: str, finish_reason: str, answer: str, how: str) -> tuple[str, str]:
    """The grade of a completion (see ``GRADES``) and the answer found in it.

    ``truncated``: the token limit came before an answer was complete, which says nothing about the answer.

    >>> grade("It is <answer>12</answer>", "eos", "12.0", "answer tag")
    ('correct', '12')
    >>> grade("Let me see", "length", "12", "answer tag")
    ('truncated', '')
    """
    given = extract(text, how, finish_reason)
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
        items: columns ``family``, ``guess`` and ``grade``, one row an item.
        name: of the set.
        n_expected: items of the whole set.

    The standard error is stratified: sqrt(sum of p(1 - p) / (n - 1)) / families. The interval is Wilson's at
    the number of items that is worth as much, 1 / sum(w^2 / n) with w = 1 / families.
    """
    groups = items.assign(correct=items["grade"] == "correct").groupby("family", sort=False)
    share, n, guess = groups["correct"].mean(), groups.size(), groups["guess"].mean()
    weight = 1 / max(len(n), 1)
    value = float(share.mean()) if len(n) else 0.0
    error = weight * sqrt(float((share * (1 - share) / (n - 1).clip(lower=1)).sum()))
    worth = 1 / float((weight**2 / n).sum()) if len(n) else 0.0
    counts = {grade: int((items["grade"] == grade).sum()) for grade in GRADES}
    return _score("reasoning_score", name, value, error, worth, n_expected, len(items), guess.mean(), counts)


def code_score(samples: pd.DataFrame, name: str, n_expected: int, k: int = 1) -> Score:
    """The mean over tasks of the unbiased pass@k.

    Args:
        samples: columns ``id`` (of the task) and ``outcome`` (of the sandbox), one row a sample.
        name: of the set.
        n_expected: tasks of the whole set.

    Raises:
        ValueError: a task has fewer samples than ``k``.
    """
    passed = samples.assign(passed=samples["outcome"] == "passed").groupby("id", sort=False)["passed"]
    table = passed.agg(["count", "sum"])
    values = [pass_at_k(int(n), int(right), k) for n, right in zip(table["count"], table["sum"], strict=True)]
    n_tasks = len(values)
    value = sum(values) / n_tasks if n_tasks else 0.0
    spread = sum((one - value) ** 2 for one in values) / max(n_tasks - 1, 1)
    error = sqrt(spread / max(n_tasks, 1))
    label = "code_score" if k == 1 else f"pass@{k}"
    counts = {str(key): int(value) for key, value in samples["outcome"].value_counts().items()}
    return _score(label, name, value, error, n_tasks, n_expected, n_tasks, 0.0, counts)


def _score(
    label: str,
    name: str,
    value: float,
    error: float,
    worth: float,
    n_expected: int,
    n_done: int,
    guess: float,
    counts: dict[str, int],
) -> Score:
    low, high = wilson(value * worth, worth)
    missing = n_expected - n_done
    return Score(
        label,
        name,
        None if missing else value,
        float(low),
        float(high),
        error,
        n_expected,
        missing,
        float(guess) if n_done else 0.0,
        counts,
    )


def family_table(items: pd.DataFrame) -> pd.DataFrame:
    """One row a family and length: counts, accuracy with Wilson's interval, guess rate, and how it failed.

    ``items`` has columns ``set``, ``family``, ``length``, ``guess``, ``grade`` (of code: the outcome),
    ``correct`` and ``truncated``.
    """
    import pandas as pd

    rows = []
    for (name, family, length), group in items.groupby(["set", "family", "length"], sort=False):
        low, high = wilson(group["correct"].sum(), len(group))
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


def failures(items: pd.DataFrame, n: int = 3) -> pd.DataFrame:
    """Failed items to read, ``n`` a set, spread over its families: prompt's end, answer, expected, reason."""
    failed = items[~items["correct"]]
    turn = failed.groupby(["set", "family"], sort=False).cumcount()
    chosen = failed.assign(turn=turn).sort_values("turn", kind="stable").groupby("set", sort=False).head(n)
    chosen = chosen.sort_index()
    return chosen[["family", "prompt", "completion", "expected", "reason"]].reset_index(drop=True)
