"""What the sets gave: a set's answers with their score, and the tables and texts made from several sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfqs_nb.scores.grading import Score, code_score, family_table, reasoning_score

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = "set id sample family length guess prompt completion expected grade reason correct truncated"
COLUMNS += " tokens seconds"


@dataclass(frozen=True)
class SetRun:
    """A set, answered and judged.

    Attributes:
        kind, name: of the set.
        items: one row a sample: ``set``, ``id``, ``sample``, ``family``, ``length``, ``guess``, ``prompt``,
            ``completion``, ``expected``, ``grade`` (of code: the outcome), ``reason``, ``correct``,
            ``truncated``, ``tokens``, ``seconds``.
        score: of the whole set; its value is None while items lack a result.
        pass_at: for code with several samples: the score at each k asked for.
        conditions: all that the score depends on, the model's SHA-256 apart.
        model: the model's SHA-256 (or a name, where none is known).
        n_resumed: samples whose answer an earlier run had written.
    """

    kind: str
    name: str
    items: pd.DataFrame = field(repr=False)
    score: Score
    pass_at: dict[int, Score]
    conditions: Mapping[str, Any] = field(repr=False)
    model: str
    n_resumed: int

    @classmethod
    def of(
        cls,
        kind: str,
        name: str,
        items: pd.DataFrame | list[dict[str, Any]],
        *,
        n_items: int | None = None,
        ks: Sequence[int] = (),
        conditions: Mapping[str, Any] | None = None,
        model: str = "",
        n_resumed: int = 0,
    ) -> SetRun:
        """A run from its judged items: the one place where items become a score.

        Args:
            n_items: of the whole set; by default those that are here.
        """
        import pandas as pd

        table = pd.DataFrame(items, columns=COLUMNS.split()) if isinstance(items, list) else items
        n = table["id"].nunique() if n_items is None else n_items
        if kind == "reasoning":
            score, pass_at = reasoning_score(table, name, n), {}
        else:
            score = code_score(table, name, n)
            pass_at = {k: code_score(table, name, n, k) for k in ks}
        return cls(kind, name, table, score, pass_at, conditions or {}, model, n_resumed)


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
            fields = run.score.as_dict()
            counts = fields.pop("counts")
            failed = {"truncated": int(run.items["truncated"].sum()), "no_answer": counts.get("no_answer", 0)}
            rows.append({"set": fields.pop("set"), **fields, **failed})
        return pd.DataFrame(rows)

    def families(self) -> pd.DataFrame:
        """One row a family; see `grading.family_table`."""
        return family_table(self.items)

    def failures(self, n: int = 3) -> pd.DataFrame:
        """Failed items to read, ``n`` a set, spread over its families: what was asked, said and expected."""
        items = self.items
        failed = items[~items["correct"]]
        turn = failed.groupby(["set", "family"], sort=False).cumcount()
        chosen = (
            failed.assign(turn=turn).sort_values("turn", kind="stable").groupby("set", sort=False).head(n)
        )
        chosen = chosen.sort_index()
        return chosen[["family", "prompt", "completion", "expected", "reason"]].reset_index(drop=True)

    def sentences(self) -> list[str]:
        """The score of each set in words."""
        return [run.score.sentence for run in self.runs]
