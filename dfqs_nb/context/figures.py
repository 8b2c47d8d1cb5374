"""Figures of this stage: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
from dfqs_nb.core.figures import BYTES, INK, PALETTE, new_axes, set_title, token_axis  # NEEDS


def context_curve(
    curve: pd.DataFrame, boundary: dict[str, Any], ax: Axes | None = None, label: str = ""
) -> Axes:
    """Accuracy by context length with its intervals, the isotonic fit, the threshold and the boundary.

    Args:
        curve: columns ``length`` (tokens), ``n``, ``accuracy``, ``low``, ``high`` and ``fit``.
        boundary: ``Boundary.as_dict()``.
        label: of the model, where several share the axes.
    """
    first = ax is None or not ax.lines
    ax = new_axes(ax, 3.6)
    colour = PALETTE[0] if first else PALETTE[5]
    spread = [curve["accuracy"] - curve["low"], curve["high"] - curve["accuracy"]]
    ax.errorbar(
        curve["length"],
        curve["accuracy"],
        yerr=[one.clip(lower=0) for one in spread],
        fmt="o",
        color=colour,
        capsize=3,
        linewidth=1,
        zorder=3,
        label=label or "accuracy, 95 % interval",
    )
    ax.plot(curve["length"], curve["fit"], color=colour, linewidth=1, alpha=0.7)
    ax.axhline(boundary["threshold"], color=INK, linewidth=0.8, linestyle=":")
    ax.annotate(
        f"threshold {boundary['threshold']:.2f}",
        (curve["length"].min(), boundary["threshold"]),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        va="bottom",
    )
    right = boundary["high"] or curve["length"].max()
    if boundary["status"] == "measured":
        ax.axvspan(boundary["low"] or curve["length"].min(), right, color=colour, alpha=0.13, linewidth=0)
        ax.axvline(boundary["tokens"], color=colour, linewidth=1.2, linestyle="--")
    planned = curve.loc[curve["length"].map(lambda n: math.log2(n).is_integer()), "length"]
    token_axis(ax, planned, "context (tokens)")
    ax.set_ylim(-0.03, 1.05)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylabel(
        f"right answers (n = {curve['n'].min()} to {curve['n'].max()} a length)"
        if curve["n"].nunique() > 1
        else f"right answers (n = {curve['n'].iloc[0]} a length)"
    )
    if label:
        ax.legend(frameon=False, fontsize=8, loc="lower left")
    if first:
        set_title(ax, _boundary_title(boundary))
    return ax


def _boundary_title(boundary: dict[str, Any]) -> str:
    if boundary["status"] == "floor":
        return "No better than chance at every length"
    if boundary["right_censored"]:
        return f"Retrieval holds to the longest context measured, {boundary['tokens']:,} tokens"
    high = "open" if boundary["high"] is None else f"{boundary['high']:,}"
    what = "Retrieval fails" if boundary["cause"] == "quality" else f"The context ends ({boundary['cause']})"
    return f"{what} at {boundary['tokens']:,} tokens (95 % interval {boundary['low'] or 0:,} to {high})"


def depth_by_length(tiles: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """A tile for each length and depth: the share of right answers, with its count.

    Args:
        tiles: columns ``length``, ``depth`` and ``depth_end`` (edges, 0 to 1), ``correct`` and ``n``.
    """
    counts = tiles.pivot(index="depth", columns="length", values="n")
    share = tiles.pivot(index="depth", columns="length", values="correct") / counts
    ax = new_axes(ax, 1.4 + 0.34 * len(share))
    image = ax.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*share.notna().to_numpy().nonzero(), strict=True):
        ax.text(
            column,
            row,
            f"{int(counts.iat[row, column])}",
            ha="center",
            va="center",
            fontsize=7,
            color=INK if share.iat[row, column] > 0.6 else "white",
        )
    ends = tiles.groupby("depth")["depth_end"].first()
    strata = {depth: f"{depth:.0%} to {end:.0%}" for depth, end in ends.items()}
    ax.set_yticks(range(len(share)), [strata[depth] for depth in share.index], fontsize=8)
    ax.set_xticks(range(share.shape[1]), [f"{length:,}" for length in share.columns], fontsize=8)
    ax.set_xlabel("context (tokens); tiles give the number of questions")
    ax.set_ylabel("depth of the key")
    ax.tick_params(length=0)
    bar = ax.figure.colorbar(image, ax=ax, label="right answers")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    at = tiles.groupby("depth")[["correct", "n"]].sum()
    at = at["correct"] / at["n"]
    set_title(
        ax,
        f"Found best {strata[at.idxmax()]} deep ({at.max():.0%}), worst {strata[at.idxmin()]} deep "
        f"({at.min():.0%})",
    )
    return ax


def loss_by_position(losses: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Loss along held-out texts, with the entropy of their source.

    Args:
        losses: columns ``start``, ``end`` (tokens), ``texts``, ``loss`` (nats a token), ``low``, ``high`` and
            ``source``.
    """
    ax = new_axes(ax)
    middle = (losses["start"] * losses["end"]) ** 0.5
    spread = [losses["loss"] - losses["low"], losses["high"] - losses["loss"]]
    ax.errorbar(middle, losses["loss"], yerr=spread, fmt="o-", color=PALETTE[0], capsize=3, linewidth=1)
    ax.axhline(losses["source"].iloc[0], color=INK, linestyle=":", linewidth=0.8)
    ax.annotate(
        "entropy of the texts' source",
        (middle.iloc[0], losses["source"].iloc[0]),
        xytext=(0, -4),
        textcoords="offset points",
        fontsize=8,
        va="top",
    )
    token_axis(
        ax,
        [*losses["start"], losses["end"].iloc[-1]],
        f"position in the context (tokens); {losses['texts'].iloc[0]} texts",
    )
    ax.set_ylabel("loss (nats a token, 95 % interval)")
    ax.margins(y=0.2)
    known = losses["high"].notna().all()
    best, last = losses.loc[losses["high" if known else "loss"].idxmin()], losses.iloc[-1]
    apart = " (intervals overlap)" if known else " (too few texts for intervals)"
    apart = "" if last["low"] > best["high"] else apart
    set_title(
        ax,
        f"Loss is {best['loss']:.3f} at {best['start']:,.0f} to {best['end']:,.0f} tokens and "
        f"{last['loss']:.3f} beyond {last['start']:,.0f}{apart}",
    )
    return ax


def cost_by_length(costs: pd.DataFrame, memory: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Prefill speed by depth and memory by context length, side by side in one figure.

    Args:
        costs: columns ``depth`` (tokens) and ``tokens_per_second``.
        memory: columns ``n_ctx``, ``kv_bytes``, ``predicted_bytes`` and ``anonymous_bytes`` (measured).
    """
    ax = new_axes(ax, 3.2)
    for column, form, colour, name in (
        ("anonymous_bytes", "o-", PALETTE[5], "measured, all of the process"),
        ("predicted_bytes", "s--", PALETTE[0], "predicted, cache and buffer"),
        ("kv_bytes", "^:", PALETTE[2], "predicted, cache alone"),
    ):
        ax.plot(memory["n_ctx"], memory[column], form, color=colour, label=name)
    ax.yaxis.set_major_formatter(BYTES)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("memory beside the weights")
    right = ax.twinx()
    right.plot(
        costs["depth"], costs["tokens_per_second"], color=PALETTE[7], linewidth=2, label="prefill speed"
    )
    right.set_ylim(0, 1.15 * costs["tokens_per_second"].max())
    right.set_ylabel("prefill (tokens a second)", color="#666666")
    right.spines["top"].set_visible(False)
    token_axis(ax, memory["n_ctx"], "context, or depth (tokens)")
    handles = [*ax.get_lines(), *right.get_lines()]
    ax.legend(
        handles,
        [one.get_label() for one in handles],
        frameon=False,
        fontsize=8,
        ncols=2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
    )
    growth = memory["anonymous_bytes"].iloc[-1] - memory["anonymous_bytes"].iloc[0]
    times = memory["n_ctx"].iloc[-1] / memory["n_ctx"].iloc[0]
    set_title(ax, f"A context {times:,.0f} times as long takes {growth / 1e6:,.1f} MB more")
    return ax


def flash_cache(cache: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The cache of the real model with and without the window, beside its card.

    Args:
        cache: columns ``n_ctx``, ``swa_window``, ``swa_full`` and ``card`` (bytes, NaN where silent).
    """
    ax = new_axes(ax)
    ax.plot(cache["n_ctx"], cache["swa_window"], "o-", color=PALETTE[0], label="swa_full=False")
    ax.plot(
        cache["n_ctx"], cache["swa_full"], "s--", color=PALETTE[5], label="swa_full=True, llama.cpp's default"
    )
    ax.plot(cache["n_ctx"], cache["card"], "D", color=INK, markersize=6, label="the card")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(BYTES)
    ax.set_ylabel("KV cache (f16)")
    token_axis(ax, cache["n_ctx"], "context (tokens)")
    ax.legend(frameon=False, fontsize=8)
    last = cache.iloc[-1]
    set_title(
        ax,
        f"At {last['n_ctx']:,.0f} tokens the setting swa_full multiplies the cache by "
        f"{last['swa_full'] / last['swa_window']:.1f}",
    )
    return ax


def routing_by_position(positions: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Overlap of expert usage with the beginning of the context, and the router's margin.

    Args:
        positions: columns ``start``, ``end`` (tokens), ``choices``, ``overlap``, ``low``, ``high``
            (range over halves of the texts), ``chance`` and ``margin_median``.
    """
    ax = new_axes(ax)
    middle = (positions["start"] * positions["end"]) ** 0.5
    spread = [
        (positions["overlap"] - positions["low"]).clip(lower=0),
        (positions["high"] - positions["overlap"]).clip(lower=0),
    ]
    ax.errorbar(
        middle,
        positions["overlap"],
        yerr=spread,
        fmt="o-",
        color=PALETTE[0],
        capsize=3,
        linewidth=1,
        label="with the first band",
    )
    ax.plot(middle, positions["chance"], ":", color=INK, linewidth=1, label="chance: same band, other texts")
    ax.set_ylabel("overlap of expert usage", color=PALETTE[0])
    right = ax.twinx()
    right.plot(middle, positions["margin_median"], "s--", color=PALETTE[5], linewidth=1)
    right.set_ylabel("router margin (median)", color=PALETTE[5])
    right.set_ylim(0, 1.15 * positions["margin_median"].max())
    right.spines["top"].set_visible(False)
    token_axis(
        ax,
        [*positions["start"], positions["end"].iloc[-1]],
        f"position in the context (tokens); n = {positions['choices'].min():,} to "
        f"{positions['choices'].max():,} choices a band",
    )
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    last = positions.iloc[-1]
    low, high = positions["overlap"].min(), positions["overlap"].max()
    ax.set_ylim(max(0, low - 0.15), min(1.02, high + 0.08))
    set_title(
        ax,
        f"Beyond {last['start']:,.0f} tokens usage overlaps the start's by {last['overlap']:.0%} "
        f"(chance: {last['chance']:.0%})",
    )
    return ax
