"""Figures of this stage: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dfqs_nb.core.figures import INK, PALETTE, PAPER, new_axes, set_title, share_axis, token_axis, whiskers
from dfqs_nb.report.metrics import BOUNDARY, CURVE, SCORES
from dfqs_nb.report.reading import RETRIEVAL, RunItems
from dfqs_nb.stats import LEVEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LENGTHS = "retrieval by length"


def shares(report: Mapping[str, Any]) -> pd.DataFrame:
    """Scores, and retrieval by length, as `report_shares` draws them; withheld ones are left out."""
    details, rows = report["details"], []
    for name in SCORES:
        if not (it := details[name])["withheld"]:
            values = it["n"], it["value"], it["low"], it["high"], it["guess_rate"] or nan
            rows.append(("scores", name.removesuffix("_score"), *values))
    curve, mark = details[CURVE], details[BOUNDARY].get("threshold", nan)
    for it in [] if curve["withheld"] else curve.get("points", []):
        values = it["n"], it["accuracy"], it["low"], it["high"], mark
        rows.append((LENGTHS, f"{it['length']:,} tokens", *values))
    return pd.DataFrame(rows, columns=["group", "label", "n", "value", "low", "high", "mark"])


def report_shares(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The shares of a report, one row each with its 95 % interval: the scores, then retrieval by length.

    Args:
        table: columns ``group``, ``label``, ``n``, ``value``, ``low``, ``high``, ``mark`` (guess rate of a
            score, threshold of the failure boundary; NaN for none), in drawing order.
    """
    inches = 0.24 * max(len(table), 3)
    ax = new_axes(ax, 1.4 + inches)
    for colour, group in zip(PALETTE, dict.fromkeys(table["group"]), strict=False):
        rows = np.flatnonzero(table["group"] == group)
        part = table.iloc[rows]
        spread = whiskers(part, "value")
        ax.errorbar(part["value"], rows, xerr=spread, fmt="o", color=colour, capsize=3, label=group)
    label = "guessing (scores), threshold of failure (retrieval)"
    marked = np.flatnonzero(table["mark"].notna())
    style: dict[str, Any] = {"color": INK, "markersize": 13, "markeredgewidth": 1.5, "label": label}
    ax.plot(table["mark"].iloc[marked], marked, "|", **style)
    ax.set_yticks(range(len(table)), [f"{row.label} (n = {row.n})" for row in table.itertuples()], fontsize=8)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(-0.02, 1.02)
    share_axis(ax.xaxis, "right answers (95 % interval)")
    below = -0.6 / (0.5 + inches)  # 0.6 inches: under the axis label, however high the axes are
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, below), ncols=3)
    set_title(ax, _finding(table))
    return ax


def _finding(table: pd.DataFrame) -> str:
    """What the intervals show against the marks, in words."""
    scores, lengths = table[table["group"] == "scores"], table[table["group"] == LENGTHS]
    parts = []
    if len(scores):
        better = scores.loc[scores["low"] > scores["mark"].fillna(0), "label"]
        beat = f"{' and '.join(better).capitalize()} beat{'s' if len(better) == 1 else ''} guessing"
        parts.append(beat if len(better) else "No score beats guessing")
    if len(lengths):
        below = lengths.loc[lengths["high"] < lengths["mark"], "label"]
        drops = f"drops below the threshold at {below.iloc[0]}" if len(below) else ""
        parts.append(f"retrieval {drops or 'is at no length clearly below the threshold'}")
    return ";\n".join(parts) or "Nothing was measured"


def comparison(runs: Sequence[RunItems], table: pd.DataFrame) -> Figure:
    """Curves above, scores below; see `ReportComparison` for the table."""
    import matplotlib.pyplot as plt

    below = 0.7 + 0.24 * int(table["metric"].isin(SCORES).sum())
    drawn = plt.figure(figsize=(7, 4.2 + below), layout="constrained")
    axes = drawn.subplots(2, 1, height_ratios=[4.2, below])
    curves_overlaid(runs, table, axes[0])
    scores_overlaid(runs, table, axes[1])
    return drawn


def curves_overlaid(runs: Sequence[RunItems], table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy by length of every model with intervals and fits; boundaries, with intervals, below."""
    ax = new_axes(ax, 4.2)
    curves = [(run, run.counts.curve()) for run in runs if run.counts is not None]
    dots: dict[str, Any] = {"fmt": "o", "markersize": 4, "capsize": 2, "linewidth": 0.8, "zorder": 3}
    for place, (run, curve) in enumerate(curves):
        colour, shift = PALETTE[place % 8], 2 ** (0.04 * (place - (len(curves) - 1) / 2))
        x, spread = curve["length"] * shift, whiskers(curve, "accuracy")
        ax.errorbar(x, curve["accuracy"], yerr=spread, color=colour, label=run.label, **dots)
        ax.plot(curve["length"], curve["fit"], color=colour, linewidth=1.4, alpha=0.8)
        _mark_boundary(ax, run, colour, -0.07 - 0.07 * place)
    ax.axhline(0, color=PAPER, linewidth=1)
    lengths = {int(n) for _, curve in curves for n in curve["length"] if float(np.log2(n)).is_integer()}
    token_axis(ax, sorted(lengths), "context (tokens); diamonds: failure boundary with its 95 % interval")
    ax.set_ylim(-0.1 - 0.07 * len(curves), 1.05)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    n = sorted({int(count) for _, curve in curves for count in curve["n"]})
    each = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}" if n else ""
    share_axis(ax.yaxis, f"right answers ({each} a length, 95 % interval)")
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    set_title(ax, _retrieval_finding(runs, table))
    return ax


def _mark_boundary(ax: Axes, run: RunItems, colour: str, y: float) -> None:
    detail, tokens, counts = run.detail(BOUNDARY), run.value(BOUNDARY), run.counts
    if tokens is None or counts is None or detail.get("status") == "floor":
        return
    ends = detail.get("low") or counts.lengths[0], detail.get("high") or counts.lengths[-1]
    ax.plot(ends, [y, y], color=colour, linewidth=2, solid_capstyle="butt", clip_on=False)
    marks = [(tokens, ">" if detail.get("right_censored") else "D")]
    for x, mark in marks + [(ends[1], ">")] * (detail.get("high") is None):
        ax.plot([x], [y], mark, color=colour, markersize=6, clip_on=False)


def _retrieval_finding(runs: Sequence[RunItems], table: pd.DataFrame) -> str:
    rows = table[(table["metric"] == RETRIEVAL) & table["p_holm"].notna()]
    if len(runs) > 2:
        n_apart = int((rows["p_holm"] < 1 - LEVEL).sum())
        return f"Retrieval of {n_apart} of {len(rows)} models differs from {runs[0].label}'s"
    if not len(rows):
        return "Retrieval is not compared"
    row = rows.iloc[0]
    apart = "" if row["p_holm"] < 1 - LEVEL else ": no evidence of a difference"
    points = f"{100 * row['difference']:+.1f} percentage points"
    return f"Retrieval moves by {points} (p = {row['p_holm']:.2g}){apart}"


def scores_overlaid(runs: Sequence[RunItems], table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Every model's scores with their intervals, metric by metric."""
    table = table[table["metric"].isin(SCORES) & table["value"].notna()]
    labels = [run.label for run in runs]
    metrics, step = list(dict.fromkeys(table["metric"])), len(labels) + 0.6
    ax = new_axes(ax, 0.7 + 0.24 * len(table))
    for row in table.to_dict("records"):
        place = labels.index(row["model"])
        spread = [[max(0, row["value"] - row["low"])], [max(0, row["high"] - row["value"])]]
        at, colour = metrics.index(row["metric"]) * step + place, PALETTE[place % 8]
        ax.errorbar([row["value"]], [at], xerr=spread, fmt="o", markersize=5, color=colour, capsize=3)
    middle = (len(labels) - 1) / 2
    ax.set_yticks([number * step + middle for number in range(len(metrics))], metrics, fontsize=9)
    ax.set_ylim(max(1, len(metrics)) * step - 1, -1)
    ax.set_xlim(-0.02, 1.02)
    share_axis(ax.xaxis, "score (95 % interval); colours as above")
    tests = table["p_holm"].dropna()
    set_title(ax, f"{(tests < 1 - LEVEL).sum()} of {len(tests)} scores differ (paired by item, Holm)")
    return ax
