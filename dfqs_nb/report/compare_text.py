"""A comparison of reports as tables of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from dfqs_nb.report.board import boundary_status, with_interval
from dfqs_nb.report.items import RunItems
from dfqs_nb.report.metrics import BOUNDARY, SPEED
from dfqs_nb.report.text import render

if TYPE_CHECKING:
    import pandas as pd

RETRIEVAL = "retrieval accuracy"
FORMS = {BOUNDARY: "{:,.0f}", SPEED: "{:,.1f}"}


def markdown(
    runs: Sequence[RunItems], accepted: Mapping[str, Any], table: pd.DataFrame, lengths: pd.DataFrame
) -> str:
    """The comparison as Markdown; see `ReportComparison` for its parts."""
    rows = {"shown": shown(runs, table), "by_length": by_length(lengths)}
    return render("comparison.md", runs=runs, accepted=accepted, table=table, **rows)


def shown(runs: Sequence[RunItems], table: pd.DataFrame) -> pd.DataFrame:
    """One line a metric and model: both values with their intervals, the difference, p, and what it says."""
    import pandas as pd

    first, by_label, lines = runs[0], {run.label: run for run in runs}, []
    for metric, group in table.groupby("metric", sort=False):
        own, *others = group.to_dict("records")
        for row in others:
            base = value_text(own, first)
            if metric == RETRIEVAL and row["kind"] and row["n"] != own["n"]:
                base = f"{row['value'] - row['difference']:.3f} on these"
            line = {
                "metric": metric,
                "n": _or_empty(row["n"], "{:,.0f}"),
                f"{first.label} (baseline)": base,
                "model": row["model"],
                "value": value_text(row, by_label[row["model"]]),
                "difference": difference_text(row),
                "p (Holm)": _or_empty(row["p_holm"], "{:.2g}"),
                "reading": row["reading"],
            }
            lines.append(line)
    return pd.DataFrame(lines)


def _or_empty(value: float, form: str) -> str:
    return "" if value != value else form.format(value)


def value_text(row: Mapping[str, Any], run: RunItems) -> str:
    """A metric's value with its interval, and what qualifies it."""
    parts = {"value": row["value"], "value_low": row["low"], "value_high": row["high"]}
    text = with_interval(parts, "value", FORMS.get(row["metric"], "{:.3f}"))
    if text == "withheld":
        return text
    if row["metric"] == SPEED and run.detail(SPEED).get("contended"):
        return f"{text} (contended)"
    status = boundary_status(run.detail(BOUNDARY)) if row["metric"] == BOUNDARY else "quality"
    known = {"quality": text, "right censored": f"over {text}", "floor": "at chance"}
    return known.get(status, f"{text} ({status})")


def difference_text(row: Mapping[str, Any]) -> str:
    """A difference (signed) or a ratio (x) with its interval.

    >>> row = {"kind": "ratio", "difference": 1.5, "difference_low": 1.2, "difference_high": float("inf")}
    >>> difference_text(row)
    'x 1.50 [1.20, open]'
    """
    if not row["kind"]:
        return ""
    is_ratio = row["kind"] == "ratio"
    form, lead, ends = ("{:.2f}", "x ", (0.0, inf)) if is_ratio else ("{:+.3f}", "", ())
    parts = [row[f"difference{end}"] for end in ("_low", "_high")]
    low, high = ("open" if part in ends else form.format(part) for part in parts)
    value = (
        f"{lead}{_or_empty(row['difference'], form)}" if row["difference"] == row["difference"] else "unknown"
    )
    return f"{value} [{low}, {high}]"


def by_length(lengths: pd.DataFrame) -> pd.DataFrame:
    """Retrieval by length, on the questions that both were asked."""
    import pandas as pd

    rows = [
        {
            "context (tokens)": f"{row.length:,}",
            "n": f"{row.n}",
            "baseline": f"{row.baseline:.2f}",
            "model": row.model,
            "accuracy": f"{row.accuracy:.2f}",
            "difference": f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}]",
        }
        for row in lengths.itertuples()
    ]
    return pd.DataFrame(rows)
