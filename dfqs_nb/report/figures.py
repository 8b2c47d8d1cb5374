"""Figures of this stage: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from dfqs_nb.core.figures import INK, PALETTE, PAPER, new_axes, set_title, token_axis
from dfqs_nb.report.items import SCORES
from dfqs_nb.stats import LEVEL

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dfqs_nb.report.compare import ReportComparison, RunItems


def shares(report: Mapping[str, Any]) -> pd.DataFrame:
    """Scores, and retrieval by length, as `report_shares` draws them; withheld ones are left out."""
    import pandas as pd

    details, nan = report["details"], float("nan")
    curve, boundary = details["context_stability_curve"], details["failure_boundary_tokens"]
    rows = [
        (
            "scores",
            name.removesuffix("_score"),
            one["n"],
            one["value"],
            one["low"],
            one["high"],
            one["guess_rate"] or nan,
        )
        for name in ("reasoning_score", "code_score")
        if not (one := details[name])["withheld"]
    ]
    for row in [] if curve["withheld"] else curve.get("points", []):
        values = (row["n"], row["accuracy"], row["low"], row["high"], boundary.get("threshold", nan))
        rows.append(("retrieval by length", f"{row['length']:,} tokens", *values))
    return pd.DataFrame(rows, columns=["group", "label", "n", "value", "low", "high", "mark"])


def report_shares(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The shares of a report, one row each with its 95 % interval: the scores, then retrieval by length.

    Args:
        table: columns ``group``, ``label``, ``n``, ``value``, ``low``, ``high``, ``mark`` (guess rate of a
            score, threshold of the failure boundary; NaN for none), in drawing order.
    """
    ax = new_axes(ax, 1.4 + 0.24 * max(len(table), 3))
    for colour, group in zip(PALETTE, dict.fromkeys(table["group"]), strict=False):
        rows = np.flatnonzero(table["group"] == group)
        part = table.iloc[rows]
        spread = [(part["value"] - part["low"]).clip(lower=0), (part["high"] - part["value"]).clip(lower=0)]
        ax.errorbar(part["value"], rows, xerr=spread, fmt="o", color=colour, capsize=3, label=group)
    marked = np.flatnonzero(table["mark"].notna())
    marks = "guessing (scores), threshold of failure (retrieval)"
    ax.plot(
        table["mark"].iloc[marked], marked, "|", color=INK, markersize=13, markeredgewidth=1.5, label=marks
    )
    names = [f"{row.label} (n = {row.n})" for row in table.itertuples()]
    ax.set_yticks(range(len(table)), names, fontsize=8)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(-0.02, 1.02)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("right answers (95 % interval)")
    below = -0.6 / (
        0.5 + 0.24 * max(len(table), 3)
    )  # 0.6 inches: under the axis label, however high the axes are
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, below), ncols=3)
    set_title(ax, _finding(table))
    return ax


def _finding(table: pd.DataFrame) -> str:
    """What the intervals show against the marks, in words."""
    scores, lengths = table[table["group"] == "scores"], table[table["group"] == "retrieval by length"]
    parts = []
    better = scores[scores["low"] > scores["mark"].fillna(0)]
    if len(scores):
        names = " and ".join(better["label"])
        parts.append(
            f"{names.capitalize()} beat{'s' if len(better) == 1 else ''} guessing"
            if names
            else "No score beats guessing"
        )
    if len(lengths):
        below = lengths[lengths["high"] < lengths["mark"]]
        where = (
            f"drops below the threshold at {below['label'].iloc[0]}"
            if len(below)
            else "stays near the threshold or above"
        )
        parts.append(f"retrieval {where}")
    return ";\n".join(parts) or "Nothing was measured"


# ---- reports side by side ----


def comparison(found: ReportComparison) -> Figure:
    """Curves above, scores below."""
    import matplotlib.pyplot as plt

    n_scores = _scores(found)["metric"].nunique()
    below = 0.7 + 0.24 * n_scores * len(found.runs)
    drawn, axes = plt.subplots(
        2, 1, figsize=(7, 4.2 + below), height_ratios=[4.2, below], layout="constrained"
    )
    curves_overlaid(found, axes[0])
    scores_overlaid(found, axes[1])
    return drawn


def curves_overlaid(found: ReportComparison, ax: Axes | None = None) -> Axes:
    """Accuracy by length of every model with intervals and fits; boundaries, with intervals, below."""
    ax = new_axes(ax, 4.2)
    curves = [(run, run.counts.curve()) for run in found.runs if run.counts is not None]
    for place, (run, curve) in enumerate(curves):
        colour, shift = PALETTE[place % 8], 2 ** (0.04 * (place - (len(curves) - 1) / 2))
        spread = [
            (curve["accuracy"] - curve["low"]).clip(lower=0),
            (curve["high"] - curve["accuracy"]).clip(lower=0),
        ]
        ax.errorbar(
            curve["length"] * shift,
            curve["accuracy"],
            yerr=spread,
            fmt="o",
            markersize=4,
            color=colour,
            capsize=2,
            linewidth=0.8,
            zorder=3,
            label=run.label,
        )
        ax.plot(curve["length"], curve["fit"], color=colour, linewidth=1.4, alpha=0.8)
        _mark_boundary(ax, run, colour, -0.07 - 0.07 * place)
    ax.axhline(0, color=PAPER, linewidth=1)
    lengths = {int(n) for _, curve in curves for n in curve["length"] if float(np.log2(n)).is_integer()}
    token_axis(ax, sorted(lengths), "context (tokens); diamonds: failure boundary with its 95 % interval")
    ax.set_ylim(-0.1 - 0.07 * len(curves), 1.05)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    n = sorted({int(one) for _, curve in curves for one in curve["n"]})
    each = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}" if n else ""
    ax.set_ylabel(f"right answers ({each} a length, 95 % interval)")
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    set_title(ax, _retrieval_finding(found))
    return ax


def _mark_boundary(ax: Axes, run: RunItems, colour: str, y: float) -> None:
    detail, counts = run.detail("failure_boundary_tokens"), run.counts
    tokens = run.value("failure_boundary_tokens")
    if tokens is None or counts is None or detail.get("status") == "floor":
        return
    ends = detail.get("low") or counts.lengths[0], detail.get("high") or counts.lengths[-1]
    ax.plot(ends, [y, y], color=colour, linewidth=2, solid_capstyle="butt", clip_on=False)
    ax.plot(
        [tokens], [y], ">" if detail.get("right_censored") else "D", color=colour, markersize=6, clip_on=False
    )
    if detail.get("high") is None:
        ax.plot([ends[1]], [y], ">", color=colour, markersize=6, clip_on=False)


def _retrieval_finding(found: ReportComparison) -> str:
    rows = found.table[(found.table["metric"] == "retrieval accuracy") & found.table["p_holm"].notna()]
    if len(found.runs) > 2:
        n_apart = int((rows["p_holm"] < 1 - LEVEL).sum())
        return f"Retrieval of {n_apart} of {len(rows)} models differs from {found.runs[0].label}'s"
    if not len(rows):
        return "Retrieval is not compared"
    row = rows.iloc[0]
    apart = "" if row["p_holm"] < 1 - LEVEL else ": no evidence of a difference"
    points = f"{100 * row['difference']:+.1f} percentage points"
    return f"Retrieval moves by {points} (p = {row['p_holm']:.2g}){apart}"


def _scores(found: ReportComparison) -> pd.DataFrame:
    rows = found.table[found.table["metric"].isin(SCORES)]
    return rows[rows["value"].notna()]


def scores_overlaid(found: ReportComparison, ax: Axes | None = None) -> Axes:
    """Every model's scores with their intervals, metric by metric."""
    table, labels = _scores(found), [run.label for run in found.runs]
    metrics = list(dict.fromkeys(table["metric"]))
    ax = new_axes(ax, 0.7 + 0.24 * len(table))
    step = len(labels) + 0.6
    for row in table.to_dict("records"):
        place = labels.index(row["model"])
        spread = [[max(0, row["value"] - row["low"])], [max(0, row["high"] - row["value"])]]
        at, colour = metrics.index(row["metric"]) * step + place, PALETTE[place % 8]
        ax.errorbar([row["value"]], [at], xerr=spread, fmt="o", markersize=5, color=colour, capsize=3)
    ax.set_yticks(
        [number * step + (len(labels) - 1) / 2 for number in range(len(metrics))], metrics, fontsize=9
    )
    ax.set_ylim(max(1, len(metrics)) * step - 1, -1)
    ax.set_xlim(-0.02, 1.02)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("score (95 % interval); colours as above")
    tests = table["p_holm"].dropna()
    n_apart = int((tests < 1 - LEVEL).sum())
    set_title(ax, f"{n_apart} of {len(tests)} scores differ (paired by item, Holm)")
    return ax
