"""A table over a folder of reports: one section for each tier and conditions, none ranked across two.

What cannot be read or counted again is listed with its reason, without a place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dfqs_nb.core.display import plain, size
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import write_table, write_text
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.core.paths import tilde
from dfqs_nb.report.metrics import CURVE, METRICS, SCORES, SPEED
from dfqs_nb.report.reading import FILE, read_answers
from dfqs_nb.report.template import render, sentence

NUMBERS = [name for name in METRICS if name != CURVE]
COLUMNS = [*"tier conditions place run model size_bytes".split(), *NUMBERS]
COLUMNS += [*(f"{name}_shown" for name in METRICS), "contended", "withheld", "report", "problem"]


@dataclass(frozen=True)
class Leaderboard:
    """Reports of a folder, ranked: ``table`` has one row a report, columns `COLUMNS`.

    Sections have equal ``tier`` and ``conditions`` (12 digits of their SHA-256, the keys of ``conditions``).
    Within one by reasoning score, then code score; equal scores share a ``place``, a withheld one has none.
    ``contended``: the speed was taken on a busy machine. ``problem``: why a file does not count.
    """

    folder: Path
    table: pd.DataFrame
    conditions: Mapping[str, Mapping[str, Any]]

    @property
    def n_problems(self) -> int:
        """Files that are no reports that count."""
        return int((self.table["problem"] != "").sum())

    def __str__(self) -> str:
        """The leaderboard as Markdown: a section for each tier and conditions, then what does not count."""
        good, sections = self.table[self.table["problem"] == ""], []
        first: Mapping[str, Any] = {}
        for (tier, conditions), group in good.groupby(["tier", "conditions"], sort=False):
            own = self.conditions[conditions]
            first = first or own
            sections.append((tier, conditions, differing_fields(first, own), group.to_dict("records")))
        bad = [(row.report, row.problem) for row in self.table.itertuples() if row.problem]
        return render("leaderboard.md", sections=sections, bad=bad, size=size, metrics=list(METRICS))

    def write(self) -> list[Path]:
        """Write ``leaderboard.csv`` and ``leaderboard.md`` into the folder, each whole or not at all."""
        rounded = self.table.map(lambda cell: float(f"{cell:.6g}") if isinstance(cell, float) else cell)
        table = write_table(self.folder / "leaderboard.csv", rounded, index=False)
        return [table, write_text(self.folder / "leaderboard.md", str(self))]


def leaderboard(folder: str | Path) -> Leaderboard:
    """Rank the reports under a folder; each is checked, and its scores are counted again from its answers.

    Hidden folders and linked ones are left out.
    """
    folder, rows = Path(folder), []
    if not folder.is_dir():
        raise DfqsError("no such folder", where=tilde(folder), hint="give a folder that holds reports")
    seen, conditions = dict[str, str](), dict[str, Mapping[str, Any]]()
    for path in sorted(folder.rglob(FILE)):
        within = path.relative_to(folder)
        if any(part.startswith(".") for part in within.parts):
            continue
        name = plain(within.as_posix())
        try:
            report = read_answers(path).report
            if (other := seen.setdefault(report["integrity"]["sha256"], name)) != name:
                raise DfqsError(f"the same report as {other}")
            row = _row(report)
            conditions[row["conditions"]] = report["conditions"]
        except DfqsError as error:
            row = {"problem": plain(f"{error.what}; {error.hint}" if error.hint else error.what)}
        rows.append({**row, "report": name})
    return Leaderboard(folder, _placed(pd.DataFrame(rows, columns=COLUMNS)), conditions)


def _row(report: Mapping[str, Any]) -> dict[str, Any]:
    details = report["details"]
    held = [f"{name}: {detail['withheld']}" for name, detail in details.items() if detail["withheld"]]
    return {
        "tier": report["tier"],
        "conditions": report["conditions_sha256"][:12],
        "run": plain(report["run"]),
        "model": plain(report["model"]["name"]),
        "size_bytes": report["model"]["size_bytes"],
        **{name: report["metrics"][name] for name in NUMBERS},
        **{f"{name}_shown": sentence("cell", name, details[name]) for name in METRICS},
        "contended": bool(details[SPEED].get("contended")),
        "withheld": plain("; ".join(held)),
        "problem": "",
    }


def _placed(table: pd.DataFrame) -> pd.DataFrame:
    """Standard before nano, sections with most reports first, rows by score, problems last."""
    table, section = table.assign(problem=table["problem"].fillna("")), ["tier", "conditions"]
    good, bad = table[table["problem"] == ""].copy(), table[table["problem"] != ""].sort_values("report")
    good[NUMBERS] = good[NUMBERS].astype(float)
    good["nano"], good["size"] = good["tier"] == "nano", -good.groupby(section)["run"].transform("size")
    order = ["nano", "size", "conditions", *SCORES, "run"]
    ascending = [name not in SCORES for name in order]
    good = good.sort_values(order, ascending=ascending, na_position="last", kind="stable")
    row = good.groupby(section).cumcount() + 1.0
    place = row.groupby([good[name] for name in (*section, *SCORES)], dropna=False).transform("min")
    good["place"] = place.where(good["reasoning_score"].notna())
    return pd.concat([good[COLUMNS].astype(object), bad.astype(object)], ignore_index=True)
