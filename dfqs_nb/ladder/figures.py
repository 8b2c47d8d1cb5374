"""The figure of the quantization ladder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from dfqs_nb.core.figures import PALETTE, new_axes, set_title, token_axis

TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


def divergence_by_bits(table: pd.DataFrame) -> Axes:
    """KL divergence of `tables.table` against bits: filled over the whole file, hollow over its experts."""
    ax, source, rows = new_axes(4.2), table.iloc[0]["rung"], table.iloc[1:]
    for rung in rows.itertuples():
        bits, kld = rung.bits_per_weight, rung.kld
        style: dict[str, Any] = {"color": PALETTE[5] if rung.expert_bits < bits / 1.5 else PALETTE[0]}
        ax.plot(bits, kld, "o", zorder=3, **style)
        if rung.kld_low == rung.kld_low:  # NaN for few chunks
            ax.plot([bits] * 2, [rung.kld_low, rung.kld_high], "-_", linewidth=1, markersize=5, **style)
        ax.plot(bits, rung.kld_tail, "_", markersize=9, **style)
        if rung.expert_bits == rung.expert_bits:  # NaN for a dense model
            ax.plot([bits, rung.expert_bits], [kld] * 2, ":", linewidth=0.9, **style)
            ax.plot(rung.expert_bits, kld, "o", markerfacecolor="white", zorder=3, **style)
    ax.set_yscale("log")
    both = np.concatenate([rows["bits_per_weight"] * 1.1, rows["expert_bits"].dropna()])
    low, high = both.min() / 1.2, both.max() * 1.2
    label = "bits a weight (log scale); filled: the whole file, hollow: its routed experts\n"
    label += f"n = {rows['n_tokens'].iloc[0]:,} tokens in {rows['n_chunks'].iloc[0]} chunks"
    token_axis(ax, [tick for tick in TICKS if low < tick < high], label)
    ax.set_xlim(high, low)  # down the ladder is to the right
    kind = "95 % interval" if rows["kld_low"].notna().any() else "interval unknown"
    tail = "dash: 99 % of all lie below"
    ax.set_ylabel(f"KL divergence from {source} (nats a token)\n{kind}; {tail}", fontsize=9)
    ax.margins(y=0.12)
    ends = rows.sort_values("kld").iloc[[0, -1]].drop_duplicates("rung")
    moved = " to ".join(f"{row.kld:.2g} nats ({row.rung})" for row in ends.itertuples())
    set_title(ax, f"Predictions move by {moved}")
    _name(ax, rows)
    return ax


def _name(ax: Axes, rows: pd.DataFrame) -> None:
    """Write each rung's name over or under its interval: as near as nothing else stands there."""
    ax.figure.canvas.figure.draw_without_rendering()
    taken, heights = [mark.get_window_extent() for mark in ax.lines], np.linspace(0.02, 0.98, 97)
    style: Any = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "center", "fontsize": 8}
    for rung in rows.itertuples():
        values = [rung.kld, *([rung.kld_low, rung.kld_high] if rung.kld_low >= 0 else [])]
        marks = ax.transData.transform([(rung.bits_per_weight, value) for value in values])
        away = np.abs(heights[:, None] - ax.transAxes.inverted().transform(marks)[:, 1]).min(axis=1)
        text = ax.text(rung.bits_per_weight, 0, rung.rung, **style)
        for height in heights[away.argsort(kind="stable")]:
            text.set_y(height)
            box = text.get_window_extent().padded(2)
            if not any(map(box.overlaps, taken)):
                break
        taken.append(box)
