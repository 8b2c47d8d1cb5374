"""Figures of this stage: a tidy frame and ``ax=None`` in, the Axes out.

A text comes out where there is nothing to draw, and says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import LogLocator
from matplotlib.transforms import ScaledTranslation

from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title, share_axis, whiskers
from dfqs_nb.scores.speed import metric_row

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def score_families(table: pd.DataFrame, ax: Axes | None = None) -> Axes | str:
    """Accuracy of each family with its interval, and guessing beside it; ``table`` as `family_table`."""
    if table.empty:
        return "No figure of families: no question was answered in the time."
    ax = new_axes(ax, 1.2 + 0.2 * len(table))
    sets = list(dict.fromkeys(table["set"]))
    for colour, name in zip(PALETTE, sets, strict=False):
        rows = np.flatnonzero(table["set"] == name)
        part = table.iloc[rows]
        spread = whiskers(part, "accuracy")
        ax.errorbar(part["accuracy"], rows, xerr=spread, fmt="o", color=colour, capsize=3, label=name)
    guessed = np.flatnonzero(table["guess_rate"] > 0)
    guess = table["guess_rate"].iloc[guessed]
    ax.plot(guess, guessed, "|", color=INK, markersize=13, markeredgewidth=1.5, label="guessing")
    names = [f"{row.family}, {row.length} (n = {row.n})" for row in table.itertuples()]
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(-0.02, 1.02)
    share_axis(ax.xaxis, "right answers (95 % Wilson interval)")
    _legend_below(ax, len(sets) + 1)
    above = int(((table["low"] > table["guess_rate"]) & (table["correct"] > 0)).sum())
    set_title(ax, f"{above} of {len(table)} families are answered better than by guessing")
    return ax


def decode_roofline(table: pd.DataFrame, ax: Axes | None = None) -> Axes | str:
    """Decode speed by depth, every repetition, below its roof; ``table`` as `speed.with_roof`."""
    decode, row = table[table["phase"] == "decode"], metric_row(table)
    if len(decode) < 2:
        share = f"decode there reaches {row['utilisation']:.1%} of the roof"
        return f"No figure of decode by depth: only depth {row['depth']:,} was timed; {share}."
    ax = new_axes(ax)
    ax.plot(decode["depth"], decode["roof"], "--", color=INK, label="roof: memory bandwidth / bytes a token")
    for at in decode.itertuples():
        ax.plot([at.depth] * len(at.values), at.values, "o", color=PALETTE[5], alpha=0.4, markersize=5)
    label = f"decode, median of {len(decode['values'].iloc[0])}"
    ax.plot(
        decode["depth"],
        decode["median"],
        "_-",
        color=PALETTE[5],
        markersize=16,
        markeredgewidth=2,
        label=label,
    )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(decode["depth"], [f"{depth:,}" for depth in decode["depth"]])
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    ax.set_ylim(decode["median"].min() / 3, decode["roof"].max() * 2)
    ax.set_xlabel("tokens in the context")
    ax.set_ylabel("tokens a second")
    _legend_below(ax, 2)
    busy = " (the machine was busy)" if decode["contended"].any() else ""
    set_title(ax, f"Decode at depth {row['depth']:,} reaches {row['utilisation']:.1%} of the roof{busy}")
    return ax


def _legend_below(ax: Axes, columns: int) -> None:
    """Put the legend below the label of the x axis: as far below in a high figure as in a low one."""
    down = ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)  # inches
    place: dict[str, Any] = {
        "bbox_to_anchor": (0.0, 0.0),
        "bbox_transform": ax.transAxes + down,
        "loc": "upper left",
    }
    ax.legend(frameon=False, fontsize=8, ncols=columns, **place)
