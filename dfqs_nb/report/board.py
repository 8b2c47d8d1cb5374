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
from dfqs_nb.core.files import read_json, write_table, write_text
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.core.paths import tilde
from dfqs_nb.report.metrics import SCORES, boundary_flags
from dfqs_nb.report.reading import FILE, missing_items, read_items, read_report
from dfqs_nb.report.template import render
from dfqs_nb.report.text import page_of

NUMBERS = (*SCORES, "failure_boundary_tokens", "cpu_tokens_per_sec")
ROW_FILE = "sweep_row.json"  # the sweep writes it into each of its runs' folders
COLUMNS = "tier conditions place run model size_bytes bits_per_weight active_parameters".split()
COLUMNS += [f"{name}{part}" for name in NUMBERS for part in ("", "_low", "_high")]
COLUMNS += "boundary_status longest curve_at_longest contended withheld checked report problem".split()


@dataclass(frozen=True)
class Leaderboard:
    """Reports of a folder, ranked: ``table`` has one row a report, columns `COLUMNS`.

    Sections have equal ``tier`` and ``conditions`` (12 digits of their SHA-256, the keys of ``conditions``).
    Within one by reasoning score, then code score; equal scores share a ``place``. Reports whose score is
    withheld, or whose answers are not here (``checked``), come last without a place. ``contended``: the speed
    was taken on a busy machine or beside other rows of a sweep. ``problem``: why a file does not count.
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
        shown = {"size": size, "number": with_interval, "boundary": boundary_text, "empty": _empty}
        return render("leaderboard.md", sections=sections, bad=bad, **shown)

    def write(self) -> list[Path]:
        """Write ``leaderboard.csv``, ``.md`` and ``.html`` into the folder, each whole or not at all."""
        rounded = self.table.map(lambda cell: float(f"{cell:.6g}") if isinstance(cell, float) else cell)
        return [
            write_table(self.folder / "leaderboard.csv", rounded, index=False),
            write_text(self.folder / "leaderboard.md", str(self)),
            write_text(self.folder / "leaderboard.html", page_of(str(self))),
        ]


def find_reports(folder: str | Path) -> list[Path]:
    """Every ``report.json`` and ``*.report.json`` under a folder; hidden folders and linked ones apart."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DfqsError("no such folder", where=tilde(folder), hint="give a folder that holds reports")
    paths = {*folder.rglob(FILE), *folder.rglob(f"*.{FILE}")}
    hidden = (any(part.startswith(".") for part in path.relative_to(folder).parts) for path in paths)
    return sorted(path for path, is_hidden in zip(paths, hidden, strict=True) if not is_hidden)


def leaderboard(folder: str | Path) -> Leaderboard:
    """Rank the reports under a folder; each is checked, and its scores are counted again from its answers."""
    folder, rows = Path(folder), []
    seen: dict[str, str] = {}
    conditions: dict[str, Mapping[str, Any]] = {}
    for path in find_reports(folder):
        name = plain(path.relative_to(folder).as_posix())
        try:
            report = read_report(path)
            identity = report["integrity"]["sha256"]
            if identity in seen:
                raise DfqsError(f"the same report as {seen[identity]}")
            checked = not missing_items(report, path.parent)
            if checked:
                read_items(report, path)
            row = _row(report, path) | {"checked": checked}
            seen[identity], conditions[row["conditions"]] = name, report["conditions"]
        except DfqsError as error:
            row = {"problem": plain(f"{error.what}; {error.hint}" if error.hint else error.what)}
        rows.append({**row, "report": name})
    return Leaderboard(folder, _placed(pd.DataFrame(rows, columns=COLUMNS)), conditions)


def _row(report: Mapping[str, Any], path: Path) -> dict[str, Any]:
    model, details = report["model"], report["details"]
    curve, boundary = details["context_stability_curve"], details["failure_boundary_tokens"]
    held = [f"{name}: {detail['withheld']}" for name, detail in details.items() if detail["withheld"]]
    row = {
        "tier": report["tier"],
        "conditions": report["conditions_sha256"][:12],
        "run": plain(report["run"]),
        "model": plain(model["name"]),
        **{key: model.get(key) for key in ("size_bytes", "bits_per_weight", "active_parameters")},
        "boundary_status": boundary_status(boundary),
        "longest": (curve.get("lengths") or [None])[-1],
        "curve_at_longest": (curve["value"] or [None])[-1],
        "contended": is_contended(report, path),
        "withheld": plain("; ".join(held)),
        "problem": "",
    }
    parts = {"": "value", "_low": "low", "_high": "high"}
    row |= {f"{name}{part}": details[name][key] for name in NUMBERS for part, key in parts.items()}
    return row


def boundary_status(boundary: Mapping[str, Any]) -> str:
    """How the boundary is to be read: ``quality``, another cause, ``right censored``, ``floor``; with flags.

    >>> boundary_status({"status": "right_censored", "right_censored": True, "cause": None})
    'right censored'
    """
    status = str(boundary.get("status") or "")
    status = str(boundary.get("cause") or "") if status == "measured" else status.replace("_", " ")
    return ", ".join([status, *(flag.partition(":")[0] for flag in boundary_flags(boundary))])


def is_contended(report: Mapping[str, Any], path: Path) -> bool:
    """Whether a report's speed was measured on a busy machine, or in a sweep beside other rows."""
    return bool(report["details"]["cpu_tokens_per_sec"].get("contended")) or bool(run_beside(path))


def run_beside(path: str | Path) -> list[str]:
    """The rows of a sweep that ran beside the run which a report lies in."""
    try:
        row = read_json(Path(path).parent / ROW_FILE)
    except (OSError, ValueError):
        return []  # no row of a sweep
    beside = row.get("beside") if isinstance(row, dict) else None
    return [plain(name) for name in beside] if isinstance(beside, list) else []


def _placed(table: pd.DataFrame) -> pd.DataFrame:
    """Standard before nano, sections with most reports first, rows by score, problems last."""
    table, section = table.assign(problem=table["problem"].fillna("")), ["tier", "conditions"]
    good, bad = table[table["problem"] == ""].copy(), table[table["problem"] != ""].sort_values("report")
    good[list(NUMBERS)] = good[list(NUMBERS)].astype(float)
    keys = {
        "nano": good["tier"] == "nano",
        "size": -good.groupby(section)["run"].transform("size"),
        "open": ~good["checked"].astype(bool),
    }
    order = ["nano", "size", "conditions", "open", *SCORES, "run"]
    good = good.assign(**keys).sort_values(
        order, ascending=[name not in SCORES for name in order], na_position="last", kind="stable"
    )
    row = good.groupby(section).cumcount() + 1.0
    counts = good["reasoning_score"].notna() & ~good["open"]
    place = row.groupby([good[name] for name in (*section, *SCORES)], dropna=False).transform("min")
    good["place"] = place.where(counts)
    return pd.concat([good[COLUMNS].astype(object), bad.astype(object)], ignore_index=True)


def with_interval(row: Mapping[str, Any], name: str, form: str) -> str:
    """A value and its interval as text.

    >>> with_interval({"s": 0.5, "s_low": 0.25, "s_high": None}, "s", "{:.2f}")
    '0.50 [0.25, open]'
    """
    if _empty(row[name]):
        return "withheld"
    ends = (row[f"{name}_{end}"] for end in ("low", "high"))
    low, high = ("open" if _empty(end) else form.format(end) for end in ends)
    return form.format(row[name]) + ("" if low == high == "open" else f" [{low}, {high}]")


def boundary_text(row: Mapping[str, Any]) -> str:
    """The failure boundary as text: a lower bound where it was not reached, and what qualifies it."""
    text, status = with_interval(row, "failure_boundary_tokens", "{:,.0f}"), row["boundary_status"]
    if text == "withheld":
        return text
    if status.startswith("right censored"):
        text, status = f"over {row['failure_boundary_tokens']:,.0f}", status.removeprefix("right censored")
    status = status.removeprefix("quality").strip(", ")
    return f"{text} ({status})" if status else text


def _empty(value: Any) -> bool:
    return value is None or value == "" or value != value
