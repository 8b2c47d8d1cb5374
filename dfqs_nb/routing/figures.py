"""Figures of notebook 04: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title, share_axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def routing_agreement(agreement: pd.DataFrame, n_tokens: int, ax: Axes | None = None) -> Axes:
    """Share of different expert sets, of ``n_tokens`` a tile; of `Experiment.agreement`."""
    ax = new_axes(ax, 1.2 + 0.24 * len(agreement))
    differ = 1 - agreement.to_numpy(float)
    most = float(differ.max())
    # the square root shows a share of 1 % beside one of 30 %
    ax.imshow(differ**0.5, cmap="Oranges", aspect="auto", vmin=0, vmax=max(0.5, most**0.5))
    for row, column in zip(*differ.nonzero(), strict=True):
        share = differ[row, column]
        colour = "white" if share > 0.6 * most and most > 0.1 else INK
        ax.text(column, row, f"{share:.1%}", ha="center", va="center", fontsize=7, color=colour)
    ax.set_yticks(range(len(agreement)), agreement.index, fontsize=8)
    ax.set_xticks(range(agreement.shape[1]), [str(layer) for layer in agreement.columns])
    ax.set_xlabel(f"layer (tiles: share of n = {n_tokens:,} expert sets that differ)")
    ax.tick_params(length=0)
    same = int((differ.max(axis=1) == 0).sum())
    set_title(ax, f"In {same} of {len(agreement)} comparisons no expert choice changes")
    return ax


def router_margins(margins: pd.Series, flips: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The router's margins, with the choices that flipped below; of `Experiment.margins` and ``flips``."""
    ax = new_axes(ax)
    values = margins[margins > 0]
    edges = np.geomspace(values.min(), values.max(), 40)
    heights, _ = np.histogram(values, edges)
    ax.stairs(heights, edges, fill=True, color=PALETTE[4], alpha=0.7)
    for row, (kind, group) in enumerate(flips.groupby("kind", sort=False), start=1):
        at, depth = group["margin"], -0.055 * row * heights.max()
        colour, label = PALETTE[5 - row % 6], f"{kind} ({len(at)})"
        ax.plot(at, [depth] * len(at), "|", color=colour, markersize=8, label=label)
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.set_xscale("log")
    ax.set_xlabel("router margin: k-th score minus the next (scores have no unit)")
    ax.set_ylabel(f"choices (n = {len(margins):,})")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yticks([tick for tick in ax.get_yticks() if tick >= 0])
    typical = margins.median()
    title = f"No choice flipped; the median margin is {typical:.2g}"
    if len(flips):
        name = "flips under a change of"
        ax.legend(frameon=False, fontsize=8, title=name, title_fontsize=8, loc="upper left")
        times = typical / flips["margin"].median()
        smaller = f"a median margin {times:,.0f} times smaller than typical"
        title = f"Flipped choices have {smaller if times >= 1 else 'no smaller margins than others'}"
    set_title(ax, title)
    return ax


def usage_by_domain(usage: pd.DataFrame, most: int = 64, ax: Axes | None = None) -> Axes:
    """Which domains use the ``most`` specialized experts: a row a domain; of `Profile.usage`."""
    top = usage[usage["share"] > 0].nlargest(most, "specialization")
    domains = [name for name in usage if name not in ("layer", "expert", "share", "specialization")]
    values = top[domains].to_numpy(float).T
    split = values / values.sum(axis=0)
    ax = new_axes(ax, 1.5 + 0.3 * len(domains))
    image = ax.imshow(split, cmap="Oranges", aspect="auto", vmin=0)
    ax.set_yticks(range(len(domains)), domains)
    names = [f"{row.layer}.{row.expert}" for row in top.itertuples()]
    step = -(-len(names) // 32)
    ax.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=7)
    ax.tick_params(length=0)
    ax.set_xlabel(f"layer.expert: {len(top)} of {len(usage)}, the most specialized first")
    ax.figure.colorbar(image, ax=ax, label="share of the expert's use", pad=0.01)
    best, index = top.iloc[0], int(split[:, 0].argmax())
    where = f"Expert {int(best['expert'])} of layer {int(best['layer'])}"
    set_title(ax, f"{where} gets {split[index, 0]:.0%} of its use from {domains[index]}")
    return ax


def coverage_curves(coverage: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How much of the gate mass the heaviest experts of a layer carry; of `Profile.coverage`."""
    ax = new_axes(ax)
    names = [name for name in coverage if name != "experts"]
    for number, name in enumerate(names):
        colour, width = (INK, 2) if name == "all" else (PALETTE[number % 6], 1)
        ax.plot(coverage["experts"], coverage[name], label=name, color=colour, linewidth=width)
    for level in (0.8, 0.9, 0.95):
        ax.axhline(level, color=INK, linewidth=0.4, linestyle=":")
    ax.set_xscale("log", base=2)
    ticks = [2**i for i in range(int(coverage["experts"].max()).bit_length())]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("experts of a layer, the heaviest first (mean over layers)")
    share_axis(ax.yaxis, "gate mass")
    ax.legend(frameon=False, fontsize=8)
    n = int((coverage["all"] < 0.9).sum()) + 1
    set_title(ax, f"90 % of the gate mass needs {n} of {len(coverage)} experts")
    return ax
