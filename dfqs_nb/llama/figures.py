"""Figures of notebook 03: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLOURS = {"prefill": PALETTE[0], "decode": PALETTE[5]}


def speeds(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Every repetition of each speed measurement, with its median.

    Args:
        table: one row a measurement: ``phase`` (``prefill`` or ``decode``), ``depth`` (tokens already in the
            context), ``median`` and ``values`` (tokens a second, one a repetition).
    """
    ax = new_axes(ax, 1.1 + 0.4 * len(table))
    label: dict[str, Any] = {"xytext": (0, 11), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    columns = (table[name] for name in ("phase", "values", "median"))
    for row, (phase, values, middle) in enumerate(zip(*columns, strict=True)):
        ax.plot(values, [row] * len(values), "o", color=COLOURS[phase], alpha=0.5, markersize=6)
        ax.plot(middle, row, "|", color=INK, markersize=16, markeredgewidth=2)
        ax.annotate(f"{middle:,.0f}" if middle >= 10 else f"{middle:.2f}", (middle, row), **label)
    names = zip(table["phase"], table["depth"], strict=True)
    labels = [f"{phase}, depth {depth:,}" for phase, depth in names]
    ax.set_yticks(range(len(table)), labels)
    ax.set_ylim(len(table) - 0.5, -0.6)
    ax.set_xlim(left=0)
    ax.set_xlabel(f"tokens a second (n = {len(table['values'].iloc[0])} repetitions; bar: median)")
    middles = table.groupby("phase")["median"].median()
    set_title(ax, f"Prefill is {middles['prefill'] / middles['decode']:.1f} times as fast as decode")
    return ax
