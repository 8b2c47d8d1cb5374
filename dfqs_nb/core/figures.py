"""What all figures share: colours, axes, titles, and how a figure is saved and shown.

Every figure of a stage is a function that takes a tidy frame and ``ax=None`` and returns the Axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogFormatter, PercentFormatter

from dfqs_nb.core.files import whole_file

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Image
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito's palette, which people with any colour vision can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
INK, PAPER = "#222222", "#E8E8E8"
BYTES = EngFormatter(unit="B")
WIDTH = 7.0  # inches


def new_axes(ax: Axes | None, height: float = 3.0) -> Axes:
    """The axes given, or those of a new figure of that height in inches; without a box around them."""
    if ax is None:
        _, ax = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def set_title(ax: Axes, finding: str) -> None:
    """The figure's title: its finding, in words that need no caption."""
    ax.set_title(finding, loc="left", fontsize=11, color=INK)


def token_axis(ax: Axes, ticks: pd.Series | Sequence[int], label: str) -> None:
    """Contexts on a log2 axis, each tick a number of tokens."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(label)


def share_axis(axis: Axis, label: str) -> None:
    """An axis of shares, in per cent."""
    axis.set_major_formatter(PercentFormatter(1.0))
    axis.set_label_text(label)


def whiskers(table: pd.DataFrame, value: str) -> list[pd.Series]:
    """How far ``low`` and ``high`` lie from a column's values, for error bars."""
    return [(table[value] - table["low"]).clip(lower=0), (table["high"] - table[value]).clip(lower=0)]


def save(ax: Axes, path: str | Path) -> None:
    """Save the figure of ``ax``, whole or not at all: as SVG by that suffix, else as PNG at 150 dots an inch.

    The same figure gives the same bytes.
    """
    kind = "svg" if Path(path).suffix == ".svg" else "png"
    nothing = {"Date": None} if kind == "svg" else {"Software": None}
    with whole_file(path, "wb") as file, plt.rc_context({"svg.hashsalt": "dfqs"}):
        _figure(ax).savefig(file, format=kind, dpi=150, metadata=nothing)


def compact(ax: Axes) -> Image:
    """The figure of ``ax`` for display in a notebook, as a PNG of 128 colours; the figure is closed.

    It takes less than half of the bytes that a notebook stores otherwise.
    """
    import PIL.Image
    from IPython.display import Image

    drawn, packed = BytesIO(), BytesIO()
    _figure(ax).savefig(drawn, format="png", dpi=100)
    PIL.Image.open(drawn).convert("RGB").quantize(128).save(packed, "png", optimize=True)
    plt.close(_figure(ax))
    return Image(packed.getvalue())


def _figure(ax: Axes) -> Figure:
    """The whole figure; a ``$`` in its texts, such as a model's name, begins no formula."""
    figure: Figure = ax.figure.canvas.figure  # of a subfigure, too, and in every version
    axes = [axis for part in figure.axes for axis in (part.xaxis, part.yaxis)]
    logs = [axis for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)]
    ticks = {label for axis in logs for label in axis.get_ticklabels(which="both")}
    for text in set(figure.findobj(Text)) - ticks:
        text.set_parse_math(False)
    return figure
