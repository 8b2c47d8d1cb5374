"""The figure of this stage: a tidy frame in, the Axes out."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title, share_axis, whiskers

CHOICES = "-choices"  # ends the name of a set that is asked as multiple choice


def score_families(table: pd.DataFrame) -> Axes | str:
    """Accuracy of each family (`Results.families`) with its interval, and guessing; or why there is none."""
    if table.empty:
        return "No figure of families: no question was answered in the time."
    sets = list(dict.fromkeys(table["set"]))
    # a set that is also asked as multiple choice: both in one row
    of = {name: name.removesuffix(CHOICES) for name in sets if name.removesuffix(CHOICES) in sets}
    table = table.assign(of=table["set"].replace(of))
    families = table.groupby(["of", "family", "length"], sort=False)
    ax = new_axes(1.2 + 0.24 * families.ngroups)
    for colour, name in zip(PALETTE, sets, strict=False):
        chosen = table["set"] == name
        part, apart = table[chosen], 0.18 * (list(of.values()).count(of.get(name, name)) > 1)
        rows = families.ngroup()[chosen] + (-apart if name.endswith(CHOICES) else apart)
        n, right = " to ".join(map(str, sorted({part["n"].min(), part["n"].max()}))), part["accuracy"]
        ax.errorbar(right, rows, xerr=whiskers(part, "accuracy"), fmt="none", color=colour, capsize=2)
        ax.plot(right, rows, "o", color=colour, markersize=5, label=f"{name} (n = {n} a family)")
        guess = part["guess_rate"].where(part["guess_rate"] > 0)
        ax.plot(guess, rows, "|", color=INK, markersize=8, markeredgewidth=1.5)
    ax.plot([], [], "|", color=INK, markersize=8, markeredgewidth=1.5, label="guessing")
    named = families.first().reset_index()
    several = named.groupby(["of", "family"])["length"].transform("nunique") > 1
    names = named["family"] + (", " + named["length"]).where(several, "")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.4, -0.6))
    share_axis(ax.xaxis, "right answers (95 % Wilson interval)")
    # below the label of the x axis, by as many inches in a high figure as in a low one
    below = ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, 0.0), bbox_transform=below)
    some = table[table["guess_rate"] > 0]  # what nobody can guess is not counted
    above = (some["low"] > some["guess_rate"]).groupby(some["set"], sort=False)
    if beaten := [f"{name}: {it.sum()} of {len(it)} families beat guessing" for name, it in above]:
        set_title(ax, "\n".join(beaten))
    return ax
