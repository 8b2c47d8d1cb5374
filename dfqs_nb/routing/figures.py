"""Figures of notebook 04: a tidy frame in, the Axes out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dfqs_nb.core.display import counted, per_cent
from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title
from dfqs_nb.routing.trace import Trace


def routing_agreement(agreement: pd.DataFrame, n_repeats: int, reference: Trace) -> Axes:
    """Share of different expert sets in each tile; of `Experiment.agreement`, first the repetitions' rows.

    Rows without a difference are left out, if there are others.
    """
    changed = (agreement < 1).any(axis=1).to_numpy()
    again, n = int(changed[:n_repeats].sum()), len(agreement) - n_repeats
    settings = f"{changed[n_repeats:].sum()} of {counted(n, 'changes')} of a setting change a choice"
    agreement = agreement[changed] if changed.any() else agreement
    ax = new_axes(1.4 + 0.24 * len(agreement))
    differ = 1 - agreement.to_numpy(float)
    most = float(differ.max())
    # the square root shows a share of 1 % beside one of 30 %
    ax.imshow(differ**0.5, cmap="Oranges", aspect="auto", vmin=0, vmax=max(0.5, most**0.5))
    for row, column in zip(*differ.nonzero(), strict=True):
        share = differ[row, column]
        colour = "white" if share > 0.6 * most and most > 0.1 else INK
        ax.text(column, row, per_cent(share), ha="center", va="center", fontsize=7, color=colour)
    ax.set_yticks(range(len(agreement)), agreement.index, fontsize=8)
    pairs = zip(agreement.columns, reference.hashed.tolist(), strict=True)
    ax.set_xticks(range(agreement.shape[1]), [f"{layer}{' (hash)' * by_table}" for layer, by_table in pairs])
    ax.set_xlabel(f"layer (tiles: share of n = {reference.n_tokens:,} expert sets that differ)")
    ax.tick_params(length=0)
    set_title(ax, f"{settings}; {again or 'no'} repetition{'s do' if again > 1 else ' does'}")
    return ax


def router_margins(margins: pd.Series, flips: pd.DataFrame) -> Axes:
    """The router's margins, with the choices that flipped below; of `Experiment.margins` and ``flips``.

    Independent flips are dark: no earlier flip can have caused them. The title counts each choice once.
    """
    ax = new_axes()
    values = margins[margins > 0]
    edges = np.geomspace(values.min(), values.max(), 40)
    heights, _ = np.histogram(values, edges)
    ax.stairs(heights, edges, fill=True, color=PALETTE[4], alpha=0.7)
    for row, (kind, group) in enumerate(flips.groupby("kind", sort=False), start=1):
        depth, label = -0.055 * row * heights.max(), f"{kind} ({group['first'].sum()} of {len(group)})"
        for is_first, at in group.groupby("first")["margin"]:
            colour, name = (PALETTE[5 - row % 6], label) if is_first else ("0.8", None)
            ax.plot(at, [depth] * len(at), "|", markersize=8, color=colour, label=name)
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.set_xscale("log")
    ax.set_xlabel("router margin: k-th score minus the next (scores have no unit)")
    ax.set_ylabel(f"choices (n = {len(margins):,})")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yticks([tick for tick in ax.get_yticks() if tick >= 0])
    typical = margins.median()
    title = f"No choice flipped; the median margin is {typical:.2g}"
    if len(flips):
        heading = "flips under a change of\n(coloured: independent)"
        ax.legend(frameon=False, fontsize=8, title=heading, title_fontsize=8, loc="upper left")
        first = flips[flips["first"]].drop_duplicates(["token", "layer"])
        times = typical / first["margin"].median()
        smaller = f"a {times:,.0f} times smaller median margin"
        smaller = smaller if times >= 1 else "no smaller margins than others"
        title = f"Choices that flip independently have {smaller} (n = {len(first)})"
    set_title(ax, title)
    return ax
