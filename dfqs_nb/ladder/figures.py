"""The figure of the quantization ladder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.figures import PALETTE, new_axes, set_title, token_axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

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
    label = "bits a weight (log scale); filled: the whole file, hollow: its routed experts"
    token_axis(ax, [tick for tick in TICKS if low < tick < high], label)
    ax.set_xlim(high, low)  # down the ladder is to the right
    counts = f"n = {rows['n_tokens'].iloc[0]:,} tokens in {rows['n_chunks'].iloc[0]} chunks"
    kind = "95 % interval" if rows["kld_low"].notna().any() else "interval unknown"
    tail = "dash: 99 % of all lie below"
    ax.set_ylabel(f"KL divergence from {source} (nats a token)\n{kind}; {tail}\n{counts}", fontsize=9)
    ax.margins(y=0.12)
    far, near = rows.loc[rows["kld"].idxmax()], rows.loc[rows["kld"].idxmin()]
    ratio = f"{far['kld'] / near['kld']:,.0f} times as far as {near['rung']}"
    set_title(ax, f"{far['rung']} diverges most from {source}: {ratio}")
    _name(ax, rows)
    return ax


def _name(ax: Axes, rows: pd.DataFrame) -> None:
    """Write each rung's name below its marks or above them, as near as nothing else stands there."""
    ax.figure.draw_without_rendering()
    taken, inside = [mark.get_window_extent() for mark in ax.lines], ax.bbox
    for rung in rows.itertuples():
        low, high = (
            pick([rung.kld, rung.kld_low, rung.kld_high, rung.kld_tail]) for pick in (np.nanmin, np.nanmax)
        )
        text = ax.annotate(rung.rung, (0, 0), (0, 0), textcoords="offset points", ha="center", fontsize=8)
        for away in [side * (6 + 5 * n) for n in range(4 * len(rows)) for side in (-1, 1)]:
            text.xy = rung.bits_per_weight, high if away > 0 else max(low, ax.get_ylim()[0])
            text.set(position=(0, away), va="bottom" if away > 0 else "top")
            box = text.get_window_extent().padded(1)
            if inside.y0 < box.y0 and box.y1 < inside.y1 and not any(map(box.overlaps, taken)):
                break
        taken.append(box)
