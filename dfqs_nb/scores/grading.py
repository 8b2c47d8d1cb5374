"""Grade answers without partial credit, turn grades into scores with intervals, and compare runs by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.errors import ComparisonError
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.llama.thinking import answer_start
from dfqs_nb.scores.answers import normalised
from dfqs_nb.stats import N_BOOT, mcnemar, paired_bootstrap, wilson

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = "set id sample family length guess prompt completion expected grade reason correct truncated"
COLUMNS += " tokens seconds"
GRADES = ("correct", "wrong", "no_answer", "truncated")


def grade(text: str, finish_reason: str, answer: str, how: str, opened: bool = False) -> tuple[str, str]:
    """The grade of a completion (see ``GRADES``) and the answer in it.

    ``truncated``: the thinking did not end, or the token limit came before an answer was complete. ``how``:
    the answer is what the last ``<answer>`` encloses (``answer tag``; the stop text may be its end) or the
    ``last line``. ``opened``: the prompt has begun the thinking.

    >>> grade("Let me see", "length", "12", "answer tag")
    ('truncated', '')
    """
    start = answer_start(text, opened)
    if start is None:
        return "truncated", ""
    if how == "last line":
        given = "".join(text[start:].strip().splitlines()[-1:]).strip()
    else:
        _, opening, after = text[start:].rpartition("<answer>")
        given, closing, _ = after.partition("</answer>")
        given = given.strip() if opening and (closing or finish_reason == "stop") else ""
    if finish_reason == "length" and (not given or how == "last line"):
        return "truncated", ""
    if not given:
        return "no_answer", ""
    return ("correct" if normalised(given) == normalised(answer) else "wrong"), given


@dataclass(frozen=True)
class Score:
    """A score with its 95 % interval: Wilson's, at the effective number of items."""

    name: str
    set: str
    value: float | None  # None while an item lacks its result; no part of a set stands for the whole
    low: float
    high: float
    n: int
    n_missing: int  # items without a result
    guess_rate: float  # what guessing would score
    counts: dict[str, int]  # items by grade, or samples by outcome
    truncated: int = 0  # answers that the token limit cut off and that are not right

    @classmethod
    def of(cls, name: str, set: str, value: float, worth: float, n_missing: int, **facts: Any) -> Score:
        """A score with its interval at ``worth`` items; it is withheld where items are missing."""
        low, high = map(float, wilson(value * worth, worth))
        held = None if n_missing else value
        return cls(name, set, held, low, high, n_missing=n_missing, **facts)

    @property
    def sentence(self) -> str:
        """The score as people read it."""
        if self.value is None:
            done = self.n - self.n_missing
            return f"{self.name} withheld: {done} of {self.n} items have a result ({self.set})"
        return (
            f"{self.name} {self.value:.3f} (95 % interval {self.low:.3f} to {self.high:.3f}, n = {self.n}, "
            f"guess rate {self.guess_rate:.3f}, truncated {self.truncated}; {self.set})"
        )


def reasoning_score(items: pd.DataFrame, name: str, n_expected: int) -> Score:
    """The macro mean over families of strict matches.

    ``items`` has columns ``family``, ``guess`` and ``grade``, one row an item; with several samples of an
    item also ``id``, by which their mean is taken. ``n_expected``: items of the whole set.

    The interval is Wilson's at the number of items that is worth as much: 1 / sum(w^2 / n), w = 1 / families.
    """
    right = items.assign(correct=(items["grade"] == "correct").astype(float))
    if "id" in right:
        right = right.groupby("id", sort=False).agg({"family": "first", "guess": "first", "correct": "mean"})
    groups = right.groupby("family", sort=False)
    share, n, guess = groups["correct"].mean(), groups.size(), groups["guess"].mean()
    n_families, missing = max(len(n), 1), n_expected - len(right)
    worth = n_families**2 / float((1 / n).sum()) if len(n) else 0.0
    counts = {grade: int((items["grade"] == grade).sum()) for grade in GRADES}
    facts: dict[str, Any] = {"n": n_expected, "counts": counts, "truncated": counts["truncated"]}
    facts["guess_rate"] = float(guess.sum()) / n_families
    return Score.of("reasoning_score", name, float(share.sum()) / n_families, worth, missing, **facts)


def code_score(samples: pd.DataFrame, name: str, n_expected: int) -> Score:
    """pass@1: the mean over tasks of the share of samples that pass (Chen et al. 2021, arXiv:2107.03374).

    ``samples`` has columns ``id`` (of the task) and ``grade`` (the sandbox's outcome), one row a sample.
    ``n_expected``: tasks of the whole set.
    """
    values = (samples["grade"] == "passed").groupby(samples["id"], sort=False).mean()
    n = len(values)
    counts = {str(grade): int(count) for grade, count in samples["grade"].value_counts().items()}
    cut = int(samples["truncated"].sum()) if "truncated" in samples else 0
    facts: dict[str, Any] = {"guess_rate": 0.0, "counts": counts, "truncated": cut}
    value = float(values.mean()) if n else 0.0
    return Score.of("code_score", name, value, n, n_expected - n, n=n_expected, **facts)


@dataclass(frozen=True)
class SetRun:
    """A set, answered and judged."""

    kind: str
    name: str
    items: pd.DataFrame = field(repr=False)  # one row a sample, with the columns ``COLUMNS``
    score: Score
    conditions: Mapping[str, Any] = field(default_factory=dict, repr=False)  # that the score depends on
    model: str = ""  # its SHA-256, or a name
    n_resumed: int = 0  # samples whose answer an earlier run had written

    @classmethod
    def of(cls, kind: str, name: str, items: Any, *, n_items: int | None = None, **facts: Any) -> SetRun:
        """A run from its judged items (a frame or rows); the whole set has ``n_items``, by default these."""
        import pandas as pd

        table = pd.DataFrame(items, columns=COLUMNS.split()) if isinstance(items, list) else items
        scored = reasoning_score if kind == "reasoning" else code_score
        n = table["id"].nunique() if n_items is None else n_items
        return cls(kind, name, table, scored(table, name, n), **facts)


@dataclass(frozen=True)
class Results:
    """Several sets, answered by one model."""

    runs: Sequence[SetRun]

    @property
    def items(self) -> pd.DataFrame:
        """The items of all sets; columns as `SetRun.items`."""
        import pandas as pd

        return pd.concat([run.items for run in self.runs], ignore_index=True)

    def table(self) -> pd.DataFrame:
        """One row a set: the metric, its value and interval, the guess rate, and how items failed."""
        import pandas as pd

        rows = []
        for run in self.runs:
            fields = {"set": run.name} | vars(run.score)
            no_answer = fields.pop("counts").get("no_answer", 0)
            rows.append({**fields, "truncated": int(run.items["truncated"].sum()), "no_answer": no_answer})
        return pd.DataFrame(rows)

    def families(self) -> pd.DataFrame:
        """One row a family and length: counts, accuracy with Wilson's interval, guess rate, how it failed."""
        items = self.items.assign(no_answer=lambda table: table["grade"] == "no_answer")
        groups = items.groupby(["set", "family", "length"], sort=False)
        accuracy, n_items = groups["correct"].mean(), groups["id"].nunique()
        low, high = wilson(accuracy * n_items, n_items)  # samples of one item are no evidence of their own
        sums = groups[["correct", "truncated", "no_answer"]].sum()
        table = groups.size().to_frame("n").assign(correct=sums.pop("correct"), accuracy=accuracy)
        table = table.assign(low=low, high=high, guess_rate=groups["guess"].mean())
        return table.join(sums).reset_index()

    def failures(self, n: int = 3) -> pd.DataFrame:
        """Failed items to read, ``n`` a set, spread over its families: what was asked, answered, expected."""
        failed = self.items[~self.items["correct"].astype(bool)]
        turn = failed.groupby(["set", "family"], sort=False).cumcount()
        chosen = failed.loc[turn.sort_values(kind="stable").index].groupby("set").head(n).sort_index()
        return chosen[["family", "prompt", "completion", "expected", "reason"]].reset_index(drop=True)


@dataclass(frozen=True)
class Comparison:
    """The score of one set in two runs, paired by item: only items on which the runs differ are evidence."""

    n: int
    a: float
    b: float
    difference: float  # b minus a, with its 95 % interval
    low: float
    high: float
    only_a: int  # items that only the first run got right
    only_b: int
    p: float  # exact McNemar test of equal ability


def compare_runs(a: SetRun, b: SetRun, n_boot: int = N_BOOT, seed: int = 0) -> Comparison:
    """Two runs of a set; a `ComparisonError` names conditions that differ, or items without results."""
    if differing := differing_fields(a.conditions, b.conditions):
        named = ", ".join(f"{key} ({mine} and {theirs})" for key, (mine, theirs) in differing.items())
        what = f"the conditions differ in {named}"
        raise ComparisonError(what, hint="run both again under the same conditions")
    first, second = a.score.value, b.score.value
    if first is None or second is None:
        run = a if first is None else b
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
    p = mcnemar(only_a, only_b)
    return Comparison(len(items), first, second, second - first, low, high, only_a, only_b, p)
