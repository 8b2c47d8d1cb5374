"""A comparison of reports as tables of texts."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, Any

from dfqs_nb.report.board import boundary_status

if TYPE_CHECKING:
    import pandas as pd

    from dfqs_nb.report.compare import ReportComparison, RunItems

RETRIEVAL, BOUNDARY, SPEED = "retrieval accuracy", "failure_boundary_tokens", "cpu_tokens_per_sec"
FORMS = {BOUNDARY: "{:,.0f}", SPEED: "{:,.1f}"}


def shown(found: ReportComparison) -> pd.DataFrame:
    """One line a metric and model: both values with their intervals, the difference, p, and what it says."""
    import pandas as pd

    first, by_label = found.runs[0], {run.label: run for run in found.runs}
    rows = []
    for metric, group in found.table.groupby("metric", sort=False):
        own = group[group["model"] == first.label].iloc[0]
        for row in group[group["model"] != first.label].to_dict("records"):
            base = value_text(own, first)
            if metric == RETRIEVAL and row["kind"] and row["n"] != own["n"]:
                base = f"{row['value'] - row['difference']:.3f} on these"
            rows.append(
                {
                    "metric": metric,
                    "n": "" if row["n"] != row["n"] else f"{row['n']:,.0f}",
                    f"{first.label} (baseline)": base,
                    "model": row["model"],
                    "value": value_text(row, by_label[row["model"]]),
                    "difference": difference_text(row),
                    "p (Holm)": "" if row["p_holm"] != row["p_holm"] else f"{row['p_holm']:.2g}",
                    "reading": row["reading"],
                }
            )
    return pd.DataFrame(rows)


def value_text(row: Mapping[str, Any], run: RunItems) -> str:
    """A metric's value with its interval, and what qualifies it."""
    if row["value"] != row["value"]:
        return "withheld"
    form = FORMS.get(row["metric"], "{:.3f}")
    low, high = ("open" if row[end] != row[end] else form.format(row[end]) for end in ("low", "high"))
    text = f"{form.format(row['value'])} [{low}, {high}]"
    if row["metric"] == SPEED and run.detail(SPEED).get("contended"):
        return f"{text} (contended)"
    if row["metric"] != BOUNDARY:
        return text
    status = boundary_status(run.detail(BOUNDARY))
    return {"quality": text, "right censored": f"over {text}", "floor": "at chance"}.get(
        status, f"{text} ({status})"
    )


def difference_text(row: Mapping[str, Any]) -> str:
    """A difference (signed) or a ratio (x) with its interval.

    >>> row = {"kind": "ratio", "difference": 1.5, "difference_low": 1.2, "difference_high": float("inf")}
    >>> difference_text(row)
    'x 1.50 [1.20, open]'
    """
    if not row["kind"]:
        return ""
    form, lead = ("{:.2f}", "x ") if row["kind"] == "ratio" else ("{:+.3f}", "")
    low, high = (
        "open" if row[end] in (0.0, inf) and row["kind"] == "ratio" else form.format(row[end])
        for end in ("difference_low", "difference_high")
    )
    value = "unknown" if row["difference"] != row["difference"] else lead + form.format(row["difference"])
    return f"{value} [{low}, {high}]"


def by_length(found: ReportComparison) -> pd.DataFrame:
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
        for row in found.lengths.itertuples()
    ]
    return pd.DataFrame(rows)
