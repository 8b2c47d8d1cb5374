"""Figures from frames. Every function takes a tidy frame and ``ax=None`` and returns the Axes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from dfqs_nb.paths import whole_file

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which people with any colour vision can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
INK, PAPER = "#222222", "#E8E8E8"
ATTENTION_COLOURS = {"sliding window": PALETTE[4], "compressed sparse": PALETTE[0],
                     "heavily compressed": PALETTE[1], "full": PALETTE[2]}
ROUTING_COLOURS = {"hash": PALETTE[3], "scores": PALETTE[2], "dense": PAPER}
_BYTES = EngFormatter(unit="B")


def _axes(ax: Axes | None, height: float = 3.0, width: float = 7.0) -> Axes:
    if ax is None:
        _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=11, color=INK)


def file_map(segments: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Where each file's bytes come from, one bar a file.

    Args:
        segments: columns ``file``, ``part``, ``start`` and ``nbytes`` (bytes), in drawing order.
    """
    files, parts = list(dict.fromkeys(segments["file"])), list(dict.fromkeys(segments["part"]))
    ax = _axes(ax, 0.9 + 0.45 * len(files))
    for colour, part in zip(PALETTE, parts, strict=False):
        rows = segments[segments["part"] == part]
        ax.barh([files.index(file) for file in rows["file"]], rows["nbytes"], left=rows["start"],
                height=0.62, color=colour, label=part, edgecolor="white", linewidth=0.6)
    total = segments.groupby("file", sort=False)["nbytes"].sum()
    headers = segments[segments["part"] == "header"].set_index("file")["nbytes"]
    for row, file in enumerate(files):
        ax.annotate(f"header {headers[file]:,} of {total[file]:,} bytes", (total[file], row), va="center",
                    xytext=(6, 0), textcoords="offset points", fontsize=8)
    ax.set_yticks(range(len(files)), files)
    ax.invert_yaxis()
    ax.set_xlim(right=total.max() * 1.45)
    ax.xaxis.set_major_formatter(_BYTES)
    ax.set_xlabel("position in the file")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.32), ncols=min(len(parts), 5))
    spare = total.iloc[:-1].sum() - total.iloc[-1]
    _title(ax, f"The merged file is {spare:,} bytes smaller than its {len(files) - 1} shards together"
           if len(files) > 2 else "A model in one file needs no merge")
    return ax


def class_sizes(sizes: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Bytes by tensor class, each bar marked with its bits a weight.

    Args:
        sizes: columns ``class``, ``bytes`` and ``bits_per_weight``, largest first.
    """
    ax = _axes(ax, 0.8 + 0.27 * len(sizes))
    bars = ax.barh(sizes["class"], sizes["bytes"], color=PALETTE[0], height=0.7)
    ax.bar_label(bars, [f"{bits:.2f} bits" for bits in sizes["bits_per_weight"]], padding=4, fontsize=8)
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(_BYTES)
    ax.margins(x=0.14)
    ax.set_xlabel("size; labels give bits a weight")
    share = sizes["bytes"].iloc[0] / sizes["bytes"].sum()
    _title(ax, f"{sizes['class'].iloc[0].capitalize()} take {share:.0%} of the bytes "
               f"at {sizes['bits_per_weight'].iloc[0]:.2f} bits a weight")
    return ax


def quantization_mix(mix: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Bytes of each layer, stacked by tensor type.

    Args:
        mix: index ``layer``, one column a tensor type, values in bytes.
    """
    ax = _axes(ax)
    bottom = 0
    for colour, kind in zip(PALETTE, mix.columns, strict=False):
        ax.bar(mix.index, mix[kind], bottom=bottom, color=colour, label=kind, width=0.8)
        bottom = bottom + mix[kind]
    ax.yaxis.set_major_formatter(_BYTES)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.set_ylabel("size")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    patterns = len({tuple(row > 0) for row in mix.to_numpy()})
    _title(ax, f"{len(mix)} layers use {mix.shape[1]} tensor types in {patterns} "
               f"mix{'es' if patterns > 1 else ''}")
    return ax


def attention_layout(layers: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Two strips of tiles, one tile a layer: the kind of attention, and how experts are chosen.

    Args:
        layers: columns ``layer``, ``kind``, ``ratio`` and ``routing``.
    """
    ax = _axes(ax, 1.9)
    for row, (column, colours) in enumerate((("kind", ATTENTION_COLOURS), ("routing", ROUTING_COLOURS))):
        for kind, group in layers.groupby(column, sort=False):
            ax.bar(group["layer"], 0.86, bottom=row + 0.07, width=0.94, color=colours.get(kind, PALETTE[7]),
                   label=f"{'attention' if column == 'kind' else 'experts by'}: {kind}")
    ax.set_yticks([0.5, 1.5], ["attention", "experts"])
    ax.set_ylim(2, 0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.05))
    compressed = int((layers["ratio"] > 1).sum())
    _title(ax, f"{compressed} of {len(layers)} layers keep a compressed cache")
    return ax


def speeds(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Every repetition of each speed measurement, with its median.

    Args:
        table: one row a measurement: ``phase`` (``prefill`` or ``decode``), ``depth`` (tokens already in the
            context), ``median`` and ``values`` (tokens a second, one a repetition).
    """
    ax = _axes(ax, 1.1 + 0.4 * len(table))
    for row, one in enumerate(table.itertuples()):
        colour = PALETTE[0 if one.phase == "prefill" else 5]
        ax.plot(one.values, [row] * len(one.values), "o", color=colour, alpha=0.5, markersize=6)
        ax.plot(one.median, row, "|", color=INK, markersize=16, markeredgewidth=2)
        ax.annotate(f"{one.median:,.0f}", (one.median, row), xytext=(0, 11), textcoords="offset points",
                    ha="center", fontsize=8)
    ax.set_yticks(range(len(table)), [f"{one.phase}, depth {one.depth:,}" for one in table.itertuples()])
    ax.set_ylim(len(table) - 0.5, -0.6)
    ax.set_xlim(left=0)
    ax.set_xlabel(f"tokens a second (n = {len(table['values'].iloc[0])} repetitions; bar: median)")
    middles = table.groupby("phase")["median"].median()
    _title(ax, f"Prefill runs at {middles['prefill'] / middles['decode']:.1f} times the speed of decode")
    return ax


def save(ax: Axes, path: str | Path) -> None:
    """Save the figure of ``ax`` as PNG at 150 dots an inch, whole or not at all."""
    with whole_file(path, "wb") as file:
        ax.figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def routing_agreement(agreement: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of identical expert sets, one tile for each condition and layer.

    Args:
        agreement: index condition, one column a layer, values 0 to 1.
    """
    ax = _axes(ax, 1.2 + 0.24 * len(agreement))
    differ = 1 - agreement.to_numpy(float)
    ax.imshow(differ ** 0.5, cmap="Oranges", aspect="auto", vmin=0, vmax=max(0.5, float(differ.max()) ** 0.5))
    for row, column in zip(*differ.nonzero(), strict=True):
        dark = differ[row, column] > 0.6 * differ.max() and differ.max() > 0.1
        ax.text(column, row, f"{differ[row, column]:.1%}", ha="center", va="center", fontsize=7,
                color="white" if dark else INK)
    ax.set_yticks(range(len(agreement)), agreement.index, fontsize=8)
    ax.set_xticks(range(agreement.shape[1]), [str(layer) for layer in agreement.columns])
    ax.set_xlabel("layer (tiles give the share of expert sets that differ; blank: none)")
    ax.tick_params(length=0)
    same = int((differ.max(axis=1) == 0).sum())
    _title(ax, f"{same} of {len(agreement)} comparisons leave every expert set as it was")
    return ax


def router_margins(margins: pd.DataFrame, flips: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How close the router's calls are, with the choices that flipped marked below.

    Args:
        margins: column ``margin``, one row a choice.
        flips: columns ``margin`` and ``kind``, one row a choice that differed under a change of settings.
    """
    ax = _axes(ax)
    values = margins["margin"][margins["margin"] > 0]
    edges = np.geomspace(values.min(), values.max(), 40)
    heights, _, _ = ax.hist(values, bins=edges, color=PALETTE[4], alpha=0.7)
    kinds = list(dict.fromkeys(flips["kind"]))
    for row, (colour, kind) in enumerate(zip(PALETTE[5::-1], kinds, strict=False), start=1):
        at = flips.loc[flips["kind"] == kind, "margin"]
        ax.plot(at, [-0.055 * row * heights.max()] * len(at), "|", color=colour, markersize=8,
                label=f"{kind} ({len(at)})")
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.set_xscale("log")
    ax.set_xlabel("router margin: k-th score minus the next (scores have no unit)")
    ax.set_ylabel(f"choices (n = {len(margins):,})")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yticks([tick for tick in ax.get_yticks() if tick >= 0])
    if not len(flips):
        _title(ax, f"No choice flipped; half of the margins lie below {values.median():.2g}")
        return ax
    ax.legend(frameon=False, fontsize=8, title="flips under a change of", title_fontsize=8, loc="upper left")
    largest = flips["margin"].max()
    _title(ax, f"All {len(flips)} flips lie at margins up to {largest:.2g}, as do "
               f"{(margins['margin'] <= largest).mean():.0%} of all choices")
    return ax


def expert_usage(usage: pd.DataFrame, loads: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How often each expert was chosen, layer by layer, with the entropy of the load.

    Args:
        usage: columns ``layer``, ``expert`` and ``share`` (of the layer's choices).
        loads: columns ``layer``, ``entropy`` (bits) and ``share_of_even``.
    """
    table = usage.pivot(index="layer", columns="expert", values="share")
    ax = _axes(ax, 1.3 + 0.3 * len(table))
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
    _title(ax, f"{used}; the least even layer, {int(least['layer'])}, keeps {least['share_of_even']:.0%} "
               "of the even load's entropy")
    return ax


def flips_by_position(positions: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The rate of flips, and the router's margin, along the context.

    Args:
        positions: columns ``start``, ``end`` (tokens), ``n``, ``rate``, ``rate_low``, ``rate_high`` (95 %
            interval), ``margin_p5`` and ``margin_median``.
    """
    ax = _axes(ax)
    middle = np.sqrt(positions["end"] * positions["start"].clip(lower=positions["end"].min() / 2))
    spread = [positions["rate"] - positions["rate_low"], positions["rate_high"] - positions["rate"]]
    ax.errorbar(middle, positions["rate"], yerr=spread, fmt="o-", color=PALETTE[5], capsize=3, linewidth=1,
                zorder=3)
    right = ax.twinx()
    right.plot(middle, positions["margin_p5"], "s--", color=PALETTE[0], linewidth=1)
    right.set_ylabel("router margin (5th percentile)", color=PALETTE[0])
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)
    ax.set_xscale("log", base=2)
    ax.set_xticks(positions["end"], [f"{end:,}" for end in positions["end"]])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"position in the context (tokens); n = {positions['n'].min():,} to "
                  f"{positions['n'].max():,} choices a point")
    ax.set_ylabel("choices that flip (95 % interval)", color=PALETTE[5])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    first, last = positions.iloc[0], positions.iloc[-1]
    apart = last["rate_low"] > first["rate_high"] or last["rate_high"] < first["rate_low"]
    _title(ax, f"Flips go from {first['rate']:.2%} at the start to {last['rate']:.2%} at the end"
               f"{'' if apart else ': the intervals overlap'}")
    return ax


def drift_by_flips(tokens: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How far a token's logits move, by the number of layers in which its experts changed.

    Args:
        tokens: columns ``drift`` (largest change of a logit, above 0) and ``flips`` (layers).
    """
    groups = [(int(flips), group["drift"]) for flips, group in tokens.groupby("flips")]
    ax = _axes(ax, 1.2 + 0.45 * len(groups))
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
        _title(ax, f"A token whose experts change moves its logits {times:.1f} times as far")
    else:
        _title(ax, f"No expert changed; logits moved by {tokens['drift'].median():.2g} (median)")
    return ax
