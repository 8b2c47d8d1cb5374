"""Figures of notebook 02: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from matplotlib.ticker import MaxNLocator

from dfqs_nb.core.figures import BYTES, PALETTE, new_axes, set_title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


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


def quantization_mix(tensors: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Bytes of each layer, stacked by tensor type (``layer``, ``type``, ``bytes``, a row a tensor)."""
    ax, bottom, blocks = new_axes(ax), 0, tensors[tensors["layer"] >= 0]
    mix = blocks.pivot_table(index="layer", columns="type", values="bytes", aggfunc="sum", fill_value=0)
    mix = mix[mix.sum().sort_values(ascending=False).index]
    for colour, kind in zip(cycle(PALETTE), mix.columns):
        ax.bar(mix.index, mix[kind], bottom=bottom, color=colour, label=kind, width=0.8)
        bottom = bottom + mix[kind]
    ax.set_ylim(0, 1.05 * float(mix.sum(axis=1).max()) if len(mix) else 1)
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
    strips = ("kind", "attention", PALETTE), ("routing", "experts by", PALETTE[::-1])
    for row, (column, what, colours) in enumerate(strips):
        for colour, (kind, group) in zip(cycle(colours), layers.groupby(column, sort=False)):
            label = f"{what}: {kind}"
            ax.bar(group["layer"], 0.86, bottom=row + 0.07, width=0.94, color=colour, label=label)
    ax.set_yticks([0.5, 1.5], ["attention", "experts"])
    ax.set_ylim(2, 0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.05))
    compressed, kinds = int((layers["ratio"] > 1).sum()), set(layers["kind"])
    finding = f"{compressed} of {len(layers)} layers compress their attention cache"
    if kinds == {"full"}:
        finding = f"All {len(layers)} layers attend to the whole context"
    elif kinds == {"window or full"}:
        finding = "The header has a sliding window, and does not say which layers use it"
    set_title(ax, finding)
    return ax
