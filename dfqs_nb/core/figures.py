"""Colours, axes and titles of all figures, and how a figure is saved and shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, PercentFormatter

from dfqs_nb.core.files import whole_file

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito's palette, which people with any colour vision can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
INK = "#222222"
WIDTH = 7.0  # inches


def new_axes(height: float = 3.0) -> Axes:
    """The axes of a new figure (``height`` in inches), without a box around them."""
    _, ax = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def set_title(ax: Axes, finding: str) -> None:
    """Set the title: the figure's finding, in words that need no caption."""
    ax.set_title(finding, loc="left", fontsize=11, color=INK)


def token_axis(ax: Axes, ticks: pd.Series | Sequence[int], label: str) -> None:
    """Make the x axis one of contexts: log2, each tick a number of tokens."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(label)


def share_axis(axis: Axis, label: str) -> None:
    """Make an axis one of shares, in per cent."""
    axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axis.set_label_text(label)


def whiskers(table: pd.DataFrame, value: str) -> list[pd.Series]:
    """Distances of ``low`` and ``high`` from a column's values, for error bars."""
    return [(table[value] - table["low"]).clip(lower=0), (table["high"] - table[value]).clip(lower=0)]


def save(ax: Axes, path: str | Path) -> None:
    """Save the figure of ``ax`` as SVG or PNG (100 dpi); the same figure gives the same bytes.

    No ``$`` in its texts, such as a model's name, begins a formula.
    """
    figure: Figure = ax.figure.canvas.figure  # works for a subfigure, too, in every version
    axes = [axis for part in figure.axes for axis in (part.xaxis, part.yaxis)]
    logs = [axis for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)]
    ticks = {label for axis in logs for label in axis.get_ticklabels(which="both")}
    for text in set(figure.findobj(Text)) - ticks:
        text.set_parse_math(False)
    kind, stamp = ("svg", "Date") if Path(path).suffix == ".svg" else ("png", "Software")
    with whole_file(path, "wb") as file, plt.rc_context({"svg.hashsalt": "dfqs"}):
        figure.savefig(file, format=kind, dpi=100, metadata={stamp: None})
