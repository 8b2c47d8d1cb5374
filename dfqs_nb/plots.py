"""Figures from frames. Every function takes a tidy frame and ``ax=None`` and returns the Axes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator

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
