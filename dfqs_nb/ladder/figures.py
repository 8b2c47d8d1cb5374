"""Figures of the quantization ladder, in the manner of `plots`: a frame in, the Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title, token_axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BITS = "bits a weight, over the whole file (log scale)"


def _bit_axis(ax: Axes, bits: pd.Series | np.ndarray, label: str = BITS) -> None:
    """Bits on a log2 axis with round ticks, most on the left: down the ladder is to the right."""
    ax.set_xscale("log", base=2)
    low, high = bits.min() / 1.2, bits.max() * 1.2
    ticks = [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32) if low < tick < high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlim(high, low)
    ax.set_xlabel(label)


def _spread(table: pd.DataFrame, name: str) -> list[np.ndarray]:
    low, value, high = (table[key].astype(float) for key in (f"{name}_low", name, f"{name}_high"))
    return [(value - low).clip(lower=0).to_numpy(), (high - value).clip(lower=0).to_numpy()]


def _interval_kind(low: pd.Series) -> str:
    return "95 % interval" if low.notna().any() else "interval unknown"


def divergence_by_bits(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """KL divergence from the source against bits: filled over the whole file, hollow over its experts.

    Args:
        table: see ``ladder.table``; the first row is the source, which has no divergence from itself.
    """
    ax, source, rows = new_axes(ax, 4.2), table.iloc[0]["rung"], table.iloc[1:]
    for one in rows.itertuples():
        colour = PALETTE[5] if one.expert_bits < one.bits_per_weight / 1.5 else PALETTE[0]
        ax.errorbar(
            one.bits_per_weight,
            one.kld,
            yerr=[[one.kld - one.kld_low], [one.kld_high - one.kld]],
            fmt="o",
            color=colour,
            capsize=3,
            linewidth=1,
            zorder=3,
        )
        if one.expert_bits == one.expert_bits:  # NaN for a dense model
            ax.plot([one.bits_per_weight, one.expert_bits], [one.kld] * 2, ":", color=colour, linewidth=0.9)
            ax.plot(one.expert_bits, one.kld, "o", color=colour, markerfacecolor="white", zorder=3)
        ax.annotate(
            one.rung,
            (one.bits_per_weight, one.kld),
            xytext=(-7, 0),
            textcoords="offset points",
            fontsize=8,
            ha="right",
            va="center",
        )
    ax.set_yscale("log")
    both = np.concatenate([rows["bits_per_weight"] * 1.1, rows["expert_bits"].dropna()])
    _bit_axis(ax, both, "bits a weight (log scale); filled: over the whole file, hollow: the routed experts")
    n, n_chunks = rows["n_tokens"].iloc[0], rows["n_chunks"].iloc[0]
    ax.set_ylabel(
        f"KL divergence from {source} (nats a token)\n{_interval_kind(rows['kld_low'])}, n = {n:,} "
        f"tokens in {n_chunks} chunks",
        fontsize=9,
    )
    ax.margins(y=0.12)
    far, near = rows.loc[rows["kld"].idxmax()], rows.loc[rows["kld"].idxmin()]
    set_title(
        ax,
        f"{far['rung']} is furthest from {source}: {far['kld'] / near['kld']:,.0f} times as far as "
        f"{near['rung']}",
    )
    return ax


def scores_by_bits(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Scores against bits, with their intervals; the source's as a line across.

    Args:
        table: see ``ladder.table``; every column ``<score>_n`` names a score.
    """
    ax = new_axes(ax, 3.8)
    names = [column.removesuffix("_n") for column in table if column.endswith("_n")]
    for number, name in enumerate(names):
        colour, form = (PALETTE[0], PALETTE[5], *PALETTE[2:4])[number % 4], "os^D"[number % 4]
        n, shift = int(table[f"{name}_n"].iloc[0]), 1 - 0.022 * (number - (len(names) - 1) / 2)
        ax.errorbar(
            table["bits_per_weight"] * shift,
            table[name],
            yerr=_spread(table, name),
            fmt=form,
            color=colour,
            capsize=3,
            linewidth=1,
            label=f"{name.replace('_', ' ')} (n = {n})",
        )
        ax.axhline(table[name].iloc[0], color=colour, linewidth=0.8, linestyle=":")
    _label_rungs(ax, table, [f"{name}_high" for name in names])
    _bit_axis(ax, table["bits_per_weight"])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylim(0, 1.3)  # room for names above a score of 100 %
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.set_ylabel("score (95 % interval)")
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    inside = sum(
        bool(
            (
                (table[name] >= table[f"{name}_low"].iloc[0]) & (table[name] <= table[f"{name}_high"].iloc[0])
            ).all()
        )
        for name in names
    )
    what = "All scores" if inside == len(names) else f"{inside} of {len(names)} scores"
    set_title(ax, f"{what} stay within the interval of {table['rung'].iloc[0]}'s at every rung")
    return ax


def _label_rungs(ax: Axes, table: pd.DataFrame, above: list[str]) -> None:
    """The rungs' names, upright, above the highest of their marks."""
    for _, row in table.iterrows():
        ax.annotate(
            row["rung"],
            (row["bits_per_weight"], max(row[name] for name in above)),
            xytext=(0, 5),
            textcoords="offset points",
            fontsize=7,
            rotation=90,
            ha="center",
            va="bottom",
        )


def routing_by_bits(layers: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of expert sets that are the source's, a line a layer; layers that choose by hash are left out.

    Args:
        layers: see ``ladder.routing_table``.
    """
    ax, scored = new_axes(ax, 3.8), layers[~layers["hashed"]].sort_values("bits_per_weight", ascending=False)
    if scored.empty:
        set_title(ax, "No layer chooses experts by score")
        return ax
    deep = scored["layer"].unique()
    shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(deep)))
    for number, (colour, layer) in enumerate(zip(shades, sorted(deep), strict=True)):
        rows = scored[scored["layer"] == layer]
        shift = 1 - 0.012 * (number - (len(deep) - 1) / 2) * min(1, 4 / len(deep))
        spread = [rows["identical"] - rows["low"], rows["high"] - rows["identical"]]
        ax.errorbar(
            rows["bits_per_weight"] * shift,
            rows["identical"],
            yerr=[one.clip(lower=0) for one in spread],
            fmt="o",
            color=colour,
            capsize=2,
            linewidth=1,
            markersize=4,
            label=f"layer {layer}",
        )
    held = scored.assign(
        low=scored["low"].fillna(scored["identical"]), high=scored["high"].fillna(scored["identical"])
    )
    tops = (
        held.groupby("rung", sort=False)
        .agg(bits_per_weight=("bits_per_weight", "first"), top=("high", "max"))
        .reset_index()
    )
    _label_rungs(ax, tops, ["top"])
    _bit_axis(ax, scored["bits_per_weight"])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylim(max(0.0, held["low"].min() - 0.06), 1.0 + 0.28 * (1 - held["low"].min()))
    ax.set_yticks([tick for tick in ax.get_yticks() if tick <= 1])
    ax.set_ylabel(
        f"same experts as the source\n({_interval_kind(scored['low'])}, n = {scored['n'].iloc[0]:,} a layer)"
    )
    ax.legend(frameon=False, fontsize=8, loc="lower left", ncols=-(-len(deep) // 6))
    mean = scored.groupby("rung", sort=False)["identical"].mean()
    set_title(
        ax,
        f"Choices of the source's experts: from {mean.max():.0%} ({mean.idxmax()}) down to "
        f"{mean.min():.0%} ({mean.idxmin()})",
    )
    return ax


def curves(curve: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Stability curves over each other: the source with its interval in black, the rungs by their bits.

    Args:
        curve: see ``ladder.curve_table``; the first rung in it is the source.
    """
    ax, rungs = new_axes(ax, 3.8), list(dict.fromkeys(curve["rung"]))
    shades = plt.get_cmap("plasma")(np.linspace(0.05, 0.88, max(1, len(rungs) - 1)))
    first = curve[curve["rung"] == rungs[0]]
    ax.fill_between(first["length"], first["low"], first["high"], color=INK, alpha=0.08, linewidth=0)
    for number, rung in enumerate(rungs):
        rows = curve[curve["rung"] == rung]
        colour, width = (INK, 2.2) if number == 0 else (shades[number - 1], 1.2)
        at = rows["length"] * (1 + 0.009 * (number - len(rungs) / 2))
        ax.plot(at, rows["fit"], "-", color=colour, linewidth=width, alpha=0.9, label=rung)
        ax.plot(at, rows["accuracy"], "o", color=colour, markersize=3.5, alpha=0.7)
    shared = curve.groupby("length")["rung"].nunique()
    token_axis(
        ax,
        shared[shared == len(rungs)].index.tolist(),
        "context (tokens); points: measured, lines: isotonic fit",
    )
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylim(-0.03, 1.06)
    ax.set_ylabel(
        f"right answers (n = {curve['n'].min()} to {curve['n'].max()} a length)"
        if curve["n"].nunique() > 1
        else f"right answers (n = {curve['n'].iloc[0]} a length)"
    )
    ax.legend(
        frameon=False,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        title=f"band: 95 % of {rungs[0]}",
        title_fontsize=8,
    )
    others = curve[curve["rung"] != rungs[0]].merge(
        first[["length", "low", "high"]], on="length", suffixes=("", "_first")
    )
    inside = others["accuracy"].between(others["low_first"], others["high_first"])
    out = int((~inside).sum())
    set_title(ax, f"{out} of {len(others)} points of other rungs leave the interval of {rungs[0]}")
    return ax
