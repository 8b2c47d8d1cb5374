"""Figures of this stage: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title  # NEEDS


def speeds(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Every repetition of each speed measurement, with its median.

    Args:
        table: one row a measurement: ``phase`` (``prefill`` or ``decode``), ``depth`` (tokens already in the
            context), ``median`` and ``values`` (tokens a second, one a repetition).
    """
    ax = new_axes(ax, 1.1 + 0.4 * len(table))
    for row, one in enumerate(table.itertuples()):
        colour = PALETTE[0 if one.phase == "prefill" else 5]
        ax.plot(one.values, [row] * len(one.values), "o", color=colour, alpha=0.5, markersize=6)
        ax.plot(one.median, row, "|", color=INK, markersize=16, markeredgewidth=2)
        ax.annotate(
            f"{one.median:,.0f}",
            (one.median, row),
            xytext=(0, 11),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    ax.set_yticks(range(len(table)), [f"{one.phase}, depth {one.depth:,}" for one in table.itertuples()])
    ax.set_ylim(len(table) - 0.5, -0.6)
    ax.set_xlim(left=0)
    ax.set_xlabel(f"tokens a second (n = {len(table['values'].iloc[0])} repetitions; bar: median)")
    middles = table.groupby("phase")["median"].median()
    set_title(ax, f"Prefill runs at {middles['prefill'] / middles['decode']:.1f} times the speed of decode")
    return ax
