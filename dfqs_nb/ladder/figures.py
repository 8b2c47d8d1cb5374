"""Figures of the quantization ladder: a frame of `tables` in, the Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from dfqs_nb.core.figures import PALETTE, new_axes, set_title, share_axis, token_axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


def divergence_by_bits(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """KL divergence of `tables.table` against bits: filled over the whole file, hollow over its experts."""
    ax, source, rows = new_axes(ax, 4.2), table.iloc[0]["rung"], table.iloc[1:]
    for rung in rows.itertuples():
        colour = PALETTE[5] if rung.expert_bits < rung.bits_per_weight / 1.5 else PALETTE[0]
        bits = rung.bits_per_weight
        _intervals(ax, bits, rung.kld_low, rung.kld, rung.kld_high, color=colour, zorder=3)
        ax.plot(bits, rung.kld_tail, "_", color=colour, markersize=9)
        if rung.expert_bits == rung.expert_bits:  # NaN for a dense model
            ax.plot([bits, rung.expert_bits], [rung.kld] * 2, ":", color=colour, linewidth=0.9)
            ax.plot(rung.expert_bits, rung.kld, "o", color=colour, markerfacecolor="white", zorder=3)
        _label(ax, rung.rung, (bits, rung.kld), xytext=(7, -5), fontsize=8, ha="left", va="top")
    ax.set_yscale("log")
    both = np.concatenate([rows["bits_per_weight"] * 1.1, rows["expert_bits"].dropna()])
    _bit_axis(ax, both, "bits a weight (log scale); filled: the whole file, hollow: its routed experts")
    counts = f"n = {rows['n_tokens'].iloc[0]:,} tokens in {rows['n_chunks'].iloc[0]} chunks"
    kind = f"{_interval_kind(rows['kld_low'])}; dash: 99 % of all lie below"
    ax.set_ylabel(f"KL divergence from {source} (nats a token)\n{kind}\n{counts}", fontsize=9)
    ax.margins(y=0.12)
    far, near = rows.loc[rows["kld"].idxmax()], rows.loc[rows["kld"].idxmin()]
    ratio = f"{far['kld'] / near['kld']:,.0f} times as far as {near['rung']}"
    set_title(ax, f"{far['rung']} diverges most from {source}: {ratio}")
    return ax


def scores_by_bits(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Scores of `tables.table` against bits, with their intervals; the source's as a line across."""
    ax, source, outside = new_axes(ax, 3.8), table.iloc[0], 0
    names = [column.removesuffix("_n") for column in table if column.endswith("_n")]
    for number, name in enumerate(names):
        low, score, high = (table[key].astype(float) for key in (f"{name}_low", name, f"{name}_high"))
        bits = table["bits_per_weight"] * (1 - 0.022 * (number - (len(names) - 1) / 2))
        style = {"color": PALETTE[(0, 5, 2, 3)[number % 4]], "fmt": "os^D"[number % 4]}
        label = f"{name.replace('_', ' ')} (n = {int(source[f'{name}_n'])})"
        _intervals(ax, bits, low, score, high, label=label, **style)
        ax.axhline(source[name], color=style["color"], linewidth=0.8, linestyle=":")
        outside += int((~score[1:].between(low[0], high[0])).sum())
    _label_rungs(ax, table, table[[f"{name}_high" for name in names]].max(axis=1))
    _bit_axis(ax, table["bits_per_weight"])
    share_axis(ax.yaxis, "score (95 % interval)")
    ax.set_ylim(0, 1.3)  # room for names above a score of 100 %
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    n = len(names) * (len(table) - 1)
    what = f"{outside} of {n} scores lie" if outside else "No score of another rung lies"
    set_title(ax, f"{what} outside the 95 % interval of {source['rung']}'s")
    return ax


def routing_by_bits(layers: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of expert sets that are the source's, by layer that chooses by score (`tables.routing_table`)."""
    ax, scored = new_axes(ax, 3.8), layers[~layers["hashed"]].sort_values("bits_per_weight", ascending=False)
    if scored.empty:
        set_title(ax, "No layer chooses experts by score")
        return ax
    deep = sorted(scored["layer"].unique())
    for number, layer in enumerate(deep):
        rows = scored[scored["layer"] == layer]
        bits = rows["bits_per_weight"] * (1 - 0.012 * (number - (len(deep) - 1) / 2) * min(1, 4 / len(deep)))
        colour = plt.get_cmap("viridis")(0.1 + 0.75 * number / max(len(deep) - 1, 1))
        values = rows["low"], rows["identical"], rows["high"]
        _intervals(ax, bits, *values, color=colour, markersize=4, label=f"layer {layer}")
    high, low = (scored[end].fillna(scored["identical"]) for end in ("high", "low"))
    _label_rungs(ax, scored.drop_duplicates("rung"), high.groupby(scored["rung"], sort=False).max())
    _bit_axis(ax, scored["bits_per_weight"])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylim(max(0.0, low.min() - 0.06), 1.0 + 0.28 * (1 - low.min()))
    ax.set_yticks([tick for tick in ax.get_yticks() if tick <= 1])
    kind, n = _interval_kind(scored["low"]), scored["n"].iloc[0]
    ax.set_ylabel(f"same experts as the source\n({kind}, n = {n:,} a layer)")
    ax.legend(frameon=False, fontsize=8, loc="lower left", ncols=-(-len(deep) // 6))
    mean = scored.groupby("rung", sort=False)["identical"].mean()
    most, fewest = mean.idxmax(), mean.idxmin()
    what = f"{most} chooses the source's experts in {mean[most]:.0%} of cases"
    set_title(ax, f"{what}, {fewest} in {mean[fewest]:.0%}")
    return ax


def divergence_by_position(positions: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """KL divergence from the source by the depth of a token, a line a rung (`tables.position_table`)."""
    ax, rungs = new_axes(ax, 3.8), positions.groupby("rung", sort=False)
    for number, (rung, rows) in enumerate(rungs):
        colour = plt.get_cmap("plasma")(0.05 + 0.83 * number / max(len(rungs) - 1, 1))
        at = (rows["start"] + rows["end"]) / 2 * (1 + 0.02 * (number - len(rungs) / 2))
        bounds = (rows[name].clip(lower=1e-7) for name in ("kld_low", "kld", "kld_high"))
        _intervals(ax, at, *bounds, color=colour, fmt="o-", markersize=4, label=rung)
    token_axis(ax, sorted({*positions["start"], *positions["end"]} - {0}), "tokens before (bands)")
    ax.set_yscale("log")
    n, chunks = positions["n"], positions["chunks"].iloc[0]
    counts = f"n = {n.min():,} to {n.max():,} tokens a band in {chunks} chunks"
    kind = _interval_kind(positions["kld_low"])
    ax.set_ylabel(f"KL divergence (nats a token)\n{kind}\n{counts}", fontsize=9)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    known = bool(positions["kld_low"].notna().all())
    low, high, more = (
        ("kld_low", "kld_high", "clearly more") if known else ("kld", "kld", "more, without intervals,")
    )
    apart = int((rungs[low].last() > rungs[high].first()).sum())
    set_title(ax, f"{apart} of {len(rungs)} rungs diverge {more} in the last band than in the first")
    return ax


def _intervals(ax: Axes, bits: Any, low: Any, value: Any, high: Any, **style: Any) -> None:
    """Points with their intervals."""
    spread = np.clip([np.atleast_1d(value - low), np.atleast_1d(high - value)], 0, None)
    ax.errorbar(bits, value, yerr=spread, **{"fmt": "o", "capsize": 2.5, "linewidth": 1, **style})


def _bit_axis(ax: Axes, bits: Any, label: str = "bits a weight (log scale)") -> None:
    """Bits on a log2 axis with round ticks, most on the left: down the ladder is to the right."""
    low, high = bits.min() / 1.2, bits.max() * 1.2
    ticks = [tick for tick in TICKS if low < tick < high]
    token_axis(ax, ticks, label)
    ax.set_xlim(high, low)


def _label_rungs(ax: Axes, table: pd.DataFrame, heights: pd.Series) -> None:
    """The rungs' names, upright, above the highest of their marks."""
    for name, bits, height in zip(table["rung"], table["bits_per_weight"], heights, strict=True):
        _label(ax, name, (bits, height), xytext=(0, 5), fontsize=7, rotation=90, ha="center", va="bottom")


def _label(ax: Axes, text: str, place: tuple[float, float], **style: Any) -> None:
    ax.annotate(text, place, textcoords="offset points", **style)


def _interval_kind(low: pd.Series) -> str:
    return "95 % interval" if low.notna().any() else "interval unknown"
