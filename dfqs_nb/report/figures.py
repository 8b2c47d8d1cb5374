"""Figures of this stage: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title  # NEEDS


def report_shares(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The shares of a report, one row each with its 95 % interval: the scores, then retrieval by length.

    Args:
        table: columns ``group``, ``label``, ``n``, ``value``, ``low``, ``high``, ``mark`` (guess rate of a
            score, threshold of the failure boundary; NaN for none), in drawing order.
    """
    ax = new_axes(ax, 1.4 + 0.24 * len(table))
    for colour, group in zip(PALETTE, dict.fromkeys(table["group"]), strict=False):
        rows = np.flatnonzero(table["group"] == group)
        part = table.iloc[rows]
        spread = [(part["value"] - part["low"]).clip(lower=0), (part["high"] - part["value"]).clip(lower=0)]
        ax.errorbar(part["value"], rows, xerr=spread, fmt="o", color=colour, capsize=3, label=group)
    marked = np.flatnonzero(table["mark"].notna())
    ax.plot(
        table["mark"].iloc[marked],
        marked,
        "|",
        color=INK,
        markersize=13,
        markeredgewidth=1.5,
        label="guessing, or the threshold of failure",
    )
    names = [f"{one.label} (n = {one.n})" for one in table.itertuples()]
    ax.set_yticks(range(len(table)), names, fontsize=8)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(-0.02, 1.02)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("right answers (95 % interval)")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=3)
    below = int((table["high"] < table["mark"]).sum())
    above = int((table["low"] > table["mark"]).sum())
    set_title(ax, f"{above} of {len(marked)} lie above their mark beyond doubt, {below} below it")
    return ax
