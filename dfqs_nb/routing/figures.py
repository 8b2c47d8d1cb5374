"""Figures of this stage: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title  # NEEDS


def routing_agreement(agreement: pd.DataFrame, n_tokens: int, ax: Axes | None = None) -> Axes:
    """Share of identical expert sets, one tile for each condition and layer.

    Args:
        agreement: index condition, one column a layer, values 0 to 1.
        n_tokens: expert sets a tile.
    """
    ax = new_axes(ax, 1.2 + 0.24 * len(agreement))
    differ = 1 - agreement.to_numpy(float)
    ax.imshow(differ**0.5, cmap="Oranges", aspect="auto", vmin=0, vmax=max(0.5, float(differ.max()) ** 0.5))
    for row, column in zip(*differ.nonzero(), strict=True):
        dark = differ[row, column] > 0.6 * differ.max() and differ.max() > 0.1
        ax.text(
            column,
            row,
            f"{differ[row, column]:.1%}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else INK,
        )
    ax.set_yticks(range(len(agreement)), agreement.index, fontsize=8)
    ax.set_xticks(range(agreement.shape[1]), [str(layer) for layer in agreement.columns])
    ax.set_xlabel(f"layer (tiles: share of n = {n_tokens:,} sets that differ)")
    ax.tick_params(length=0)
    same = int((differ.max(axis=1) == 0).sum())
    set_title(ax, f"{same} of {len(agreement)} comparisons leave every expert set as it was")
    return ax


def router_margins(margins: pd.DataFrame, flips: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How close the router's calls are, with the choices that flipped marked below.

    Args:
        margins: column ``margin``, one row a choice.
        flips: columns ``margin`` and ``kind``, one row a choice that differed under a change of settings.
    """
    ax = new_axes(ax)
    values = margins["margin"][margins["margin"] > 0]
    edges = np.geomspace(values.min(), values.max(), 40)
    heights, _, _ = ax.hist(values, bins=edges, color=PALETTE[4], alpha=0.7)
    kinds = list(dict.fromkeys(flips["kind"]))
    for row, (colour, kind) in enumerate(zip(PALETTE[5::-1], kinds, strict=False), start=1):
        at = flips.loc[flips["kind"] == kind, "margin"]
        ax.plot(
            at,
            [-0.055 * row * heights.max()] * len(at),
            "|",
            color=colour,
            markersize=8,
            label=f"{kind} ({len(at)})",
        )
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.set_xscale("log")
    ax.set_xlabel("router margin: k-th score minus the next (scores have no unit)")
    ax.set_ylabel(f"choices (n = {len(margins):,})")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yticks([tick for tick in ax.get_yticks() if tick >= 0])
    if not len(flips):
        set_title(ax, f"No choice flipped; half of the margins lie below {values.median():.2g}")
        return ax
    ax.legend(frameon=False, fontsize=8, title="flips under a change of", title_fontsize=8, loc="upper left")
    largest = flips["margin"].max()
    set_title(
        ax,
        f"All {len(flips)} flips lie at margins up to {largest:.2g}, as do "
        f"{(margins['margin'] <= largest).mean():.0%} of all choices",
    )
    return ax


def expert_usage(usage: pd.DataFrame, loads: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How often each expert was chosen, layer by layer, with the entropy of the load.

    Args:
        usage: columns ``layer``, ``expert`` and ``share`` (of the layer's choices).
        loads: columns ``layer``, ``entropy`` (bits) and ``share_of_even``.
    """
    table = usage.pivot(index="layer", columns="expert", values="share")
    ax = new_axes(ax, 1.3 + 0.3 * len(table))
    image = ax.imshow(table * table.shape[1], cmap="viridis", aspect="auto", vmin=0)
    ax.set_yticks(range(len(table)), [str(layer) for layer in table.index])
    for row, load in enumerate(loads.itertuples()):
        ax.text(table.shape[1] - 0.3, row, f"{load.entropy:.2f} bits", va="center", fontsize=8, color=INK)
    ax.figure.colorbar(image, ax=ax, label="load (1: even)", pad=0.12)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(f"expert (labels give the load's entropy; even: {math.log2(table.shape[1]):.2f} bits)")
    ax.set_ylabel("layer")
    least = loads.loc[loads["share_of_even"].idxmin()]
    idle = int((usage["share"] == 0).sum())
    used = f"{idle} experts are never used" if idle else "Every expert is used"
    set_title(
        ax,
        f"{used}; the least even layer, {int(least['layer'])}, keeps {least['share_of_even']:.0%} "
        "of the even load's entropy",
    )
    return ax


def flips_by_position(positions: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The rate of flips, and the router's margin, along the context.

    Args:
        positions: columns ``start``, ``end`` (tokens), ``n``, ``rate``, ``rate_low``, ``rate_high`` (95 %
            interval), ``margin_p5`` and ``margin_median``.
    """
    ax = new_axes(ax)
    middle = np.sqrt(positions["end"] * positions["start"].clip(lower=positions["end"].min() / 2))
    spread = [positions["rate"] - positions["rate_low"], positions["rate_high"] - positions["rate"]]
    ax.errorbar(
        middle, positions["rate"], yerr=spread, fmt="o-", color=PALETTE[5], capsize=3, linewidth=1, zorder=3
    )
    right = ax.twinx()
    right.plot(middle, positions["margin_p5"], "s--", color=PALETTE[0], linewidth=1)
    right.set_ylabel("router margin (5th percentile)", color=PALETTE[0])
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)
    ax.set_xscale("log", base=2)
    ax.set_xticks(positions["end"], [f"{end:,}" for end in positions["end"]])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel(
        f"position in the context (tokens); n = {positions['n'].min():,} to "
        f"{positions['n'].max():,} choices a point"
    )
    ax.set_ylabel("choices that flip (95 % interval)", color=PALETTE[5])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    first, last = positions.iloc[0], positions.iloc[-1]
    apart = last["rate_low"] > first["rate_high"] or last["rate_high"] < first["rate_low"]
    set_title(
        ax,
        f"Flips go from {first['rate']:.2%} at the start to {last['rate']:.2%} at the end"
        f"{'' if apart else ': the intervals overlap'}",
    )
    return ax


def drift_by_flips(tokens: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How far a token's logits move, by the number of layers in which its experts changed.

    Args:
        tokens: columns ``drift`` (largest change of a logit, above 0) and ``flips`` (layers).
    """
    groups = [(int(flips), group["drift"]) for flips, group in tokens.groupby("flips")]
    ax = new_axes(ax, 1.2 + 0.45 * len(groups))
    for row, (_, drift) in enumerate(groups):
        height = row + 0.28 * np.sin(np.arange(len(drift)) * 2.399963)  # spread, the same every time
        ax.plot(drift, height, ".", color=PALETTE[0 if row == 0 else 5], markersize=3, alpha=0.35)
        ax.plot([drift.median()] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=2)
    ax.set_xscale("log")
    ax.set_yticks(range(len(groups)), [f"{flips} (n = {len(drift):,})" for flips, drift in groups])
    ax.set_ylabel("layers that flipped")
    ax.set_xlabel("largest change of a token's logits (bar: median)")
    still, moved = tokens.loc[tokens["flips"] == 0, "drift"], tokens.loc[tokens["flips"] > 0, "drift"]
    if len(still) and len(moved):
        times = moved.median() / still.median()
        set_title(ax, f"A token whose experts change moves its logits {times:.1f} times as far")
    else:
        set_title(ax, f"No expert changed; logits moved by {tokens['drift'].median():.2g} (median)")
    return ax
