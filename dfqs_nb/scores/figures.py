"""The figure of this stage: a tidy frame in, the Axes out."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.transforms import ScaledTranslation

from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title, share_axis, whiskers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def score_families(table: pd.DataFrame) -> Axes | str:
    """Accuracy of each family with its interval, and guessing beside it; ``table`` as `Results.families`.

    A text comes out where there is nothing to draw, and says why.
    """
    if table.empty:
        return "No figure of families: no question was answered in the time."
    ax = new_axes(1.2 + 0.2 * len(table))
    sets = list(dict.fromkeys(table["set"]))
    for colour, name in zip(PALETTE, sets, strict=False):
        rows = np.flatnonzero(table["set"] == name)
        part = table.iloc[rows]
        n, right = " to ".join(map(str, sorted({part["n"].min(), part["n"].max()}))), part["accuracy"]
        ax.errorbar(right, rows, xerr=whiskers(part, "accuracy"), fmt="none", color=colour, capsize=3)
        ax.plot(right, rows, "o", color=colour, label=f"{name} (n = {n} a family)")
    guess = table["guess_rate"].reset_index(drop=True).loc[lambda rate: rate > 0]
    ax.plot(guess, guess.index, "|", color=INK, markersize=13, markeredgewidth=1.5, label="guessing")
    several = table.groupby(["set", "family"])["length"].transform("nunique") > 1
    names = table["family"] + (", " + table["length"]).where(several, "")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(-0.02, 1.02)
    share_axis(ax.xaxis, "right answers (95 % Wilson interval)")
    # below the label of the x axis, by as many inches in a high figure as in a low one
    below = ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, 0.0), bbox_transform=below)
    # a set that is also asked as multiple choice counts once, and what nobody can guess not at all
    once = table[(table["guess_rate"] > 0) & ~table["set"].isin([f"{name}-choices" for name in sets])]
    if len(once):
        above = int((once["low"] > once["guess_rate"]).sum())
        of = " and ".join(once["set"].unique())
        set_title(ax, textwrap.fill(f"{of}: {above} of {len(once)} families beat guessing", 80))
    return ax
