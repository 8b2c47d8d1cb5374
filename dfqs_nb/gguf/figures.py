"""Figures of notebook 02: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.ticker import MaxNLocator

from dfqs_nb.core.figures import BYTES, PALETTE, PAPER, new_axes, set_title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ATTENTION_COLOURS = {
    "sliding window": PALETTE[4],
    "compressed sparse": PALETTE[0],
    "heavily compressed": PALETTE[1],
    "full": PALETTE[2],
    "window or full": PALETTE[5],
}
ROUTING_COLOURS = {"hash": PALETTE[3], "scores": PALETTE[2], "dense": PAPER}


def class_sizes(sizes: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Bytes by tensor class (columns ``class``, ``bytes``, ``bits_per_weight``, largest first)."""
    ax = new_axes(ax, 0.8 + 0.27 * len(sizes))
    bars = ax.barh(sizes["class"], sizes["bytes"], color=PALETTE[0], height=0.7)
    ax.bar_label(bars, [f"{bits:.2f} bits" for bits in sizes["bits_per_weight"]], padding=4, fontsize=8)
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(BYTES)
    ax.margins(x=0.14)
    ax.set_xlabel("size; labels give bits a weight")
    share = sizes["bytes"].iloc[0] / sizes["bytes"].sum()
    name, bits = sizes["class"].iloc[0].capitalize(), sizes["bits_per_weight"].iloc[0]
    set_title(ax, f"{name} hold {share:.0%} of the bytes at {bits:.2f} bits a weight")
    return ax


def quantization_mix(mix: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Bytes of each layer (index ``layer``), stacked by tensor type (a column each)."""
    ax = new_axes(ax)
    bottom = 0
    for colour, kind in zip(PALETTE, mix.columns, strict=False):
        ax.bar(mix.index, mix[kind], bottom=bottom, color=colour, label=kind, width=0.8)
        bottom = bottom + mix[kind]
    ax.yaxis.set_major_formatter(BYTES)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.set_ylabel("size")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    n_mixes = len({tuple(row > 0) for row in mix.to_numpy()})
    same = f"All {len(mix)} layers use the same tensor types"
    set_title(ax, same if n_mixes < 2 else f"{len(mix)} layers, {n_mixes} different mixes of tensor types")
    return ax


def attention_layout(layers: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Two strips, one tile a layer (``layer``, ``kind``, ``ratio``, ``routing``): attention, and routing."""
    ax = new_axes(ax, 1.9)
    for row, (column, colours) in enumerate((("kind", ATTENTION_COLOURS), ("routing", ROUTING_COLOURS))):
        for kind, group in layers.groupby(column, sort=False):
            label = f"{'attention' if column == 'kind' else 'experts by'}: {kind}"
            colour = colours.get(kind, PALETTE[7])
            ax.bar(group["layer"], 0.86, bottom=row + 0.07, width=0.94, color=colour, label=label)
    ax.set_yticks([0.5, 1.5], ["attention", "experts"])
    ax.set_ylim(2, 0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.05))
    compressed = int((layers["ratio"] > 1).sum())
    set_title(ax, f"{compressed} of {len(layers)} layers compress their attention cache")
    return ax
