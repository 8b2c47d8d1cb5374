"""Figures of notebook 04: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title, token_axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def routing_agreement(agreement: pd.DataFrame, n_tokens: int, ax: Axes | None = None) -> Axes:
    """Share of identical expert sets, one tile for each condition and layer.

    Args:
        agreement: index condition, one column a layer, values 0 to 1.
        n_tokens: expert sets a tile.
    """
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


def router_margins(margins: pd.DataFrame, flips: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The router's margins, with the choices that flipped marked below.

    Args:
        margins: column ``margin``, one row a choice.
        flips: columns ``margin`` and ``kind``, one row a choice that differed under a change of settings.
    """
    ax = new_axes(ax)
    values = margins["margin"][margins["margin"] > 0]
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
    if len(flips):
        ax.legend(
            frameon=False, fontsize=8, title="flips under a change of", title_fontsize=8, loc="upper left"
        )
    set_title(ax, _margin_title(margins["margin"].median(), flips["margin"]))
    return ax


def _margin_title(typical: float, flipped: pd.Series) -> str:
    if not len(flipped):
        return f"No choice flipped; the median margin is {typical:.2g}"
    times = typical / flipped.median()
    if times < 1:
        return "Flipped choices have no smaller margins than others"
    return f"Flipped choices have a median margin {times:,.0f} times smaller than typical"


def expert_usage(usage: pd.DataFrame, loads: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How often each expert was chosen, layer by layer, with the entropy of the load.

    Args:
        usage: columns ``layer``, ``expert`` and ``share`` (of the layer's choices).
        loads: columns ``layer``, ``entropy`` (bits) and ``share_of_even``.
    """
    table = usage.pivot(index="layer", columns="expert", values="share")
    n_experts = table.shape[1]
    ax = new_axes(ax, 1.3 + 0.3 * len(table))
    image = ax.imshow(table * n_experts, cmap="viridis", aspect="auto", vmin=0)
    ax.set_yticks(range(len(table)), [str(layer) for layer in table.index])
    for row, load in enumerate(loads["entropy"]):
        ax.text(n_experts - 0.3, row, f"{load:.2f} bits", va="center", fontsize=8, color=INK)
    ax.figure.colorbar(image, ax=ax, label="load (1: even)", pad=0.12)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(f"expert (right: entropy of the load; an even load has {math.log2(n_experts):.2f} bits)")
    ax.set_ylabel("layer")
    least = loads.loc[loads["share_of_even"].idxmin()]
    idle = int((usage["share"] == 0).sum())
    used = f"{idle} experts are never used" if idle else "Every expert is used"
    set_title(ax, f"{used}; layer {int(least['layer'])} has the least even load")
    return ax


def flips_by_position(positions: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The rate of flips, and the router's margin, along the context.

    Args:
        positions: columns ``start``, ``end`` (tokens), ``n``, ``rate``, ``rate_low``, ``rate_high`` (95 %
            interval), ``margin_p5`` and ``margin_median``.
    """
    ax = new_axes(ax)
    ends, rates = positions["end"], positions["rate"]
    middle = np.sqrt(ends * positions["start"].clip(lower=ends.min() / 2))
    spread = [rates - positions["rate_low"], positions["rate_high"] - rates]
    ax.errorbar(middle, rates, yerr=spread, fmt="o-", color=PALETTE[5], capsize=3, linewidth=1, zorder=3)
    right = ax.twinx()
    right.plot(middle, positions["margin_p5"], "s--", color=PALETTE[0], linewidth=1)
    right.set_ylabel("router margin (5th percentile)", color=PALETTE[0])
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)
    n = positions["n"]
    token_axis(ax, ends, f"position in the context (tokens); n = {n.min():,} to {n.max():,} choices a point")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("choices that flip (95 % interval)", color=PALETTE[5])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    first, last = positions.iloc[0], positions.iloc[-1]
    apart = last["rate_low"] > first["rate_high"] or last["rate_high"] < first["rate_low"]
    change = f"{first['rate']:.2%} of choices flip at the start, {last['rate']:.2%} at the end"
    set_title(ax, change if apart else f"{change} (intervals overlap)")
    return ax


def drift_by_flips(tokens: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How far a token's logits move, by the number of layers in which its experts changed.

    Args:
        tokens: columns ``drift`` (largest change of a logit, above 0) and ``flips`` (layers).
    """
    groups = [(flips, group["drift"]) for flips, group in tokens.groupby("flips")]
    ax = new_axes(ax, 1.2 + 0.45 * len(groups))
    for row, (_, drift) in enumerate(groups):
        height = row + 0.28 * np.sin(np.arange(len(drift)) * 2.399963)  # spread, the same every time
        ax.plot(drift, height, ".", color=PALETTE[0 if row == 0 else 5], markersize=3, alpha=0.35)
        ax.plot([drift.median()] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=2)
    ax.set_xscale("log")
    ax.set_yticks(range(len(groups)), [f"{flips} (n = {len(drift):,})" for flips, drift in groups])
    ax.set_ylabel("layers with another expert set")
    ax.set_xlabel("largest change of a token's logits (bar: median)")
    still, moved = tokens.loc[tokens["flips"] == 0, "drift"], tokens.loc[tokens["flips"] > 0, "drift"]
    if len(still) and len(moved):
        times = moved.median() / still.median()
        set_title(ax, f"Tokens with a changed expert: logits move {times:.2g} times as far as others")
    else:
        set_title(ax, f"Changed settings move a token's logits by {tokens['drift'].median():.2g} (median)")
    return ax
