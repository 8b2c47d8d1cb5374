"""Read answers, grade them without partial credit, turn grades into scores, and compare runs by item."""

from __future__ import annotations

import re
import textwrap
import unicodedata
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from symtable import SymbolTable, symtable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.llama.generate import answer_start
from dfqs_nb.stats import detectable, mcnemar, paired_bootstrap, wilson

COLUMNS = "set id family length guess prompt completion expected grade reason truncated tokens seconds"
RIGHT = ("correct", "passed")  # grades of questions, outcomes of code
CUT = "cut"  # by the budget
# A fence opens anywhere in a line (models glue it behind words), and closes with the same marks or never.
# Marks are taken as a whole: a model that writes nothing else must not cost a quadratic time.
FENCED = re.compile(r"((?<!`)`{3,}+|(?<!~)~{3,}+)[^`~\n]*\n(.*?)(?:\1|\Z)", re.DOTALL)
CODE_LINE = re.compile(
    r"[ \t]*(def \w+\(|async def |class \w+[:(]|from \S+ import |import \w+$|@\w|\w+[ \t]*=[^=])"
)
LONGEST = 2000  # characters of an answer from which marks are taken; more would take minutes
MOST_DIGITS = 1000  # of a number that is compared as a number
MOST_TRIES = 400  # lines behind plain code that may be no code


def grade(text: str, finish_reason: str, answer: str, how: str, opened: bool = False) -> tuple[str, str]:
    """The grade of a completion (correct, wrong, no_answer or truncated), and why it is not correct.

    ``truncated``: the thinking did not end, or the token limit came before an answer was complete. ``how``:
    the answer is what the last ``<answer>`` encloses (``answer tag``; the stop text may be its end) or the
    ``last line``. ``opened``: the prompt has begun the thinking.

    >>> grade("Let me see", "length", "12", "answer tag")
    ('truncated', 'cut off')
    """
    start = answer_start(text, opened)
    if start is None:
        return "truncated", "cut off in its thinking"
    if how == "last line":
        given = "".join(text[start:].strip().splitlines()[-1:]).strip()
    else:
        _, opening, after = text[start:].rpartition("<answer>")
        given, closing, _ = after.partition("</answer>")
        given = given.strip() if opening and (closing or finish_reason == "stop") else ""
    if finish_reason == "length" and (not given or how == "last line"):
        return "truncated", "cut off"
    if not given:
        return "no_answer", f"no answer in its {how}"
    return ("correct", "") if normalised(given) == normalised(answer) else ("wrong", f"answered {given!r}")


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
    counts: dict[str, int]  # items by grade, of code by the sandbox's outcome
    truncated: int = 0  # answers that the token limit cut off and that are not right

    @property
    def sentence(self) -> str:
        """The score as people read it."""
        if self.value is None:
            done = self.n - self.n_missing
            return f"{self.name} withheld: {done} of {self.n} items have a result ({self.set})"
        ends = f"95 % interval {self.low:.3f} to {self.high:.3f}, n = {self.n}"
        more = f"guess rate {self.guess_rate:.3f}, truncated {self.truncated}; {self.set}"
        return f"{self.name} {self.value:.3f} ({ends}, {more})"


def score_of(kind: str, items: pd.DataFrame, name: str, n_expected: int) -> Score:
    """Of a reasoning set, the macro mean over families of strict matches; else the share that is right.

    ``items`` has a row an item, with ``family``, ``guess``, ``grade`` and perhaps ``truncated``.
    ``n_expected``: items of the whole set. An answer that the budget cut off is no result.

    The interval is Wilson's at the number of items that is worth as much: 1 / sum(w^2 / n), w = 1 / families.
    """
    given = items[items["grade"] != CUT].assign(right=lambda rows: rows["grade"].isin(RIGHT))
    groups = given.groupby(given["family"] if kind == "reasoning" else lambda _: kind, sort=False)
    share, n, guess = groups["right"].mean(), groups.size(), groups["guess"].mean()
    n_families, n_missing = max(len(n), 1), n_expected - len(given)
    value = float(share.sum()) / n_families
    worth = n_families**2 / float((1 / n).sum()) if len(n) else 0.0
    low, high = map(float, wilson(value * worth, worth))
    counts = {str(grade): int(count) for grade, count in given["grade"].value_counts().items()}
    truncated = int(given["truncated"].sum()) if "truncated" in given else 0
    facts = (n_missing, float(guess.sum()) / n_families, counts, truncated)
    return Score(f"{kind}_score", name, None if n_missing else value, low, high, n_expected, *facts)


@dataclass(frozen=True)
class SetRun:
    """A set, answered and judged."""

    kind: str
    name: str
    items: pd.DataFrame = field(repr=False)  # one row an item, with the columns ``COLUMNS`` and ``correct``
    score: Score
    conditions: Mapping[str, Any] = field(default_factory=dict, repr=False)  # that the score depends on
    model: str = ""  # its SHA-256, or a name
    n_resumed: int = 0  # answers that an earlier run had written

    @property
    def answered(self) -> pd.DataFrame:
        """The items without those that the budget cut off."""
        return self.items[self.items["grade"] != CUT]

    def only(self, ids: Collection[str]) -> SetRun:
        """The part of these questions."""
        return SetRun.of(self.kind, self.name, self.items[self.items["id"].isin(ids)], n_items=len(ids))

    @classmethod
    def of(cls, kind: str, name: str, items: Any, *, n_items: int, **facts: Any) -> SetRun:
        """A run from its judged items (a frame or rows); the whole set has ``n_items``."""
        table = pd.DataFrame(items, columns=COLUMNS.split()) if isinstance(items, list) else items
        table = table.assign(correct=table["grade"].isin(RIGHT))
        return cls(kind, name, table, score_of(kind, table, name, n_items), **facts)


@dataclass(frozen=True)
class Results:
    """Several sets, answered by one model."""

    runs: Sequence[SetRun]

    @property
    def items(self) -> pd.DataFrame:
        """The items of all sets; columns as `SetRun.items`."""
        return pd.concat([run.items for run in self.runs], ignore_index=True)

    def table(self) -> pd.DataFrame:
        """One row a set: the metric, its value and interval, the guess rate, and how items failed."""
        return pd.DataFrame([{"set": run.name} | vars(run.score) for run in self.runs]).drop(columns="counts")

    def families(self) -> pd.DataFrame:
        """By set, family and length: ``n``, ``correct``, ``accuracy``, its interval and ``guess_rate``."""
        items = self.items
        groups = items[items["grade"] != CUT].groupby(["set", "family", "length"], sort=False)
        shares = {"accuracy": ("correct", "mean"), "guess_rate": ("guess", "mean")}
        table = groups.agg(n=("id", "size"), correct=("correct", "sum"), **shares)
        low, high = wilson(table["correct"], table["n"])
        return table.assign(low=low, high=high).reset_index()

    def failures(self, n: int) -> pd.DataFrame:
        """Failed items to read, ``n`` a set, spread over its families, those that failed before last."""
        items = self.items
        failed = items[~items["correct"]]
        failed = failed.loc[failed["id"].duplicated().sort_values(kind="stable").index]
        turn = failed.groupby(["set", "family"], sort=False).cumcount()
        chosen = failed.loc[turn.sort_values(kind="stable").index].groupby("set").head(n).sort_index()
        return chosen[["set", "family", "prompt", "completion", "expected", "reason"]].reset_index(drop=True)

    @property
    def resolution(self) -> str:
        """The smallest difference to another model that these questions can show."""
        least = {run.name: 100 * detectable(len(run.answered)) for run in self.runs}
        found = [f"{it:.0f} points in {name}" if it else f"none in {name}" for name, it in least.items()]
        return f"Smallest difference to another model that these questions can show: {', '.join(found)}"


def compare_runs(a: SetRun, b: SetRun) -> SimpleNamespace:
    """Two runs of a set, paired by item: only items on which the runs differ are evidence.

    Returns ``n``, the scores ``a`` and ``b``, their ``difference`` (b minus a) with its 95 % interval ``low``
    to ``high``, the items that one run alone got right (``only_a``, ``only_b``), and ``p`` of the exact
    McNemar test. A `DfqsError` names conditions that differ, or items without results.
    """
    if differing := differing_fields(a.conditions, b.conditions):
        named = ", ".join(f"{key} ({mine} and {theirs})" for key, (mine, theirs) in differing.items())
        hint = "run both again under the same conditions"
        raise DfqsError(f"the conditions differ in {named}", hint=hint)
    values = []
    for run in (a, b):
        if run.score.value is None:
            what = f"{run.score.n_missing} items of {run.name} lack a result"
            raise DfqsError(what, hint="let the run finish: it continues where it stopped")
        values.append(run.score.value)
    both = a.answered[["id", "family", "correct"]].merge(b.answered[["id", "correct"]], on="id")
    if not len(a.answered) == len(b.answered) == len(both):
        raise DfqsError("the two runs did not answer the same items", hint="score both with --fresh")
    right_a, right_b = both["correct_x"].to_numpy(bool), both["correct_y"].to_numpy(bool)
    families = both["family"].to_numpy() if a.kind == "reasoning" else None
    low, high = paired_bootstrap(right_b.astype(float) - right_a, families)
    only = {"only_a": int(np.sum(right_a & ~right_b)), "only_b": int(np.sum(right_b & ~right_a))}
    scores = {"n": len(both), "a": values[0], "b": values[1], "difference": values[1] - values[0]}
    return SimpleNamespace(**scores, low=low, high=high, **only, p=mcnemar(*only.values()))


# ---- what an answer says: in a form that can be compared, and the code in it ----


def normalised(text: str) -> str:
    """An answer without what does not change it: case, spacing, marks around it, how a number is written.

    >>> normalised(" **1,234.50.** "), normalised("The box  is Red."), normalised("$37/67$")
    ('1234.5', 'the box is red', '37/67')
    """
    text = " ".join(unicodedata.normalize("NFKC", text).replace("−", "-").split())
    if len(text) > LONGEST:
        return text.casefold()
    before = None
    while text != before:
        before, text = text, re.sub(r"^([*`\"'$]+)(.*)\1$", r"\2", text).strip().rstrip(".").strip()
    plain = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text).removeprefix("$")
    with suppress(InvalidOperation):  # it is no number
        number = Decimal(plain)
        if number.is_finite() and abs(number.adjusted()) <= MOST_DIGITS:
            written = format(number, "f")  # exact: arithmetic would round to 28 digits, and overflow
            return (written.rstrip("0").rstrip(".") if "." in written else written) if number else "0"
    return text.casefold()


def code_in(answer: str, name: str) -> str | None:
    r"""The code in a chat's answer that defines ``name``: the last code block that does, else plain text.

    A block may be indented, unclosed, glued to words, or fenced by tildes. None where there is no code.

    >>> code_in("Here:\n~~~python\ndef f(x):\n    return x", "f")
    'def f(x):\n    return x'
    """
    answer = re.sub("\r\n?|[\u2028\u2029]", "\n", answer)
    blocks = [textwrap.dedent(block).strip("\n") for _, block in FENCED.findall(answer)][::-1]
    head = re.compile(rf"^(async )?def {re.escape(name)}\b", re.MULTILINE)
    codes = blocks or [_plain_code(answer)]
    defining = (code for code in codes if name in names_in(code))
    return next(defining, None) or next(filter(head.search, codes), None)  # a fault is seen when it runs


def parsed(code: str) -> tuple[SymbolTable | None, int]:
    """The names of a module, or None with the line of the first fault."""
    with warnings.catch_warnings(action="ignore"):  # of the model's code, such as invalid escapes
        try:
            return symtable(code, "<answer>", "exec"), 0
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return None, getattr(error, "lineno", None) or 1


def names_in(code: str) -> set[str]:
    """What the code defines, if it is Python."""
    table = parsed(code)[0]
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_local()} if table else set()


def _plain_code(answer: str) -> str:
    """Code without fences: from the first line that looks like code, as far as it is Python."""
    lines = answer.split("\n")
    lines = lines[next((i for i, line in enumerate(lines) if CODE_LINE.match(line)), len(lines)) :]
    for _ in range(MOST_TRIES):
        code = textwrap.dedent("\n".join(lines))
        table, fault = parsed(code)
        if table is not None:
            return code
        lines = lines[: min(fault, len(lines)) - 1]  # without the line that is no Python
    return ""
