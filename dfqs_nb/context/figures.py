"""Figures of notebook 05: a tidy frame and ``ax=None`` in, the Axes out.

A text comes out where there is nothing to draw, and says why.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import PercentFormatter

from dfqs_nb.core import figures as core
from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title, token_axis, whiskers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from dfqs_nb.context.tasks import TaskRun


def context_curve(curve: pd.DataFrame, boundary: dict[str, Any], ax: Axes | None = None) -> Axes | str:
    """Accuracy by context length with its intervals, the non-increasing fit, the threshold and the boundary.

    Lengths that were not planned are drawn hollow. See `Counts.curve` and ``Boundary.as_dict()``.
    """
    if len(curve) < 2:
        at = f"at {curve['length'].iloc[0]:,} tokens only" if len(curve) else "at no length"
        return f"No figure of the curve: retrieval was measured {at}."
    ax = new_axes(ax, 3.6)
    for planned, part in curve.groupby("planned"):
        style: dict[str, Any] = {"fmt": "o", "capsize": 3, "zorder": 3, "color": PALETTE[0]}
        style["markerfacecolor"] = PALETTE[0] if planned else "white"
        ax.errorbar(part["length"], part["accuracy"], yerr=whiskers(part, "accuracy"), **style)
    ax.plot(curve["length"], curve["fit"], color=PALETTE[0], linewidth=1, alpha=0.7)
    shortest = curve["length"].min()
    levels = sorted((boundary[name], name.replace("_", " ")) for name in ("threshold", "guess_rate"))
    for (level, name), side in zip(
        levels, ("top", "bottom"), strict=True
    ):  # beside the axes, never over data
        ax.axhline(level, color=INK, linewidth=0.8, linestyle=":")
        beside: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "textcoords": "offset points",
            "va": side,
        }
        ax.annotate(f"{name} {level:.2f}", (1, level), (4, 0), fontsize=8, **beside)
    if boundary["status"] == "measured":
        right = boundary["high"] or curve["length"].max()
        ax.axvspan(boundary["low"] or shortest, right, color=PALETTE[0], alpha=0.13, linewidth=0)
        ax.axvline(boundary["tokens"], color=PALETTE[0], linewidth=1.2, linestyle="--")
    token_axis(ax, curve.loc[curve["planned"], "length"], "context (tokens)")
    ax.set_ylim(-0.03, 1.05)
    least, most = curve["n"].min(), curve["n"].max()
    n = f"{least}" if least == most else f"{least} to {most}"
    core.share_axis(ax.yaxis, f"right answers (n = {n} a length)")
    set_title(ax, textwrap.fill(f"Retrieval {boundary['sentence']}", 80))
    return ax


def depth_by_length(tiles: pd.DataFrame, ax: Axes | None = None) -> Axes | str:
    """A tile for each length and depth: the share of right answers, with its count (see `depth_tiles`)."""
    if tiles.empty:
        return "No figure of depths: no cell has 10 questions."
    strata = [f"{a:.0%} to {b:.0%}" for a, b in zip(tiles["depth"], tiles["depth_end"], strict=True)]
    tiles = tiles.assign(row=strata).sort_values("depth")
    ax = _tiles(tiles, "correct", ax)
    ax.set_xlabel("context (tokens); cells with fewer than 10 questions are left out")
    ax.set_ylabel("depth of the key")
    shares = tiles.groupby("row")[["correct", "n"]].sum().eval("correct / n")
    best, worst = shares.idxmax(), shares.idxmin()
    found = f"{best} deep are found best ({shares[best]:.0%}), {worst} worst ({shares[worst]:.0%})"
    set_title(ax, f"Keys {found}")
    return ax


def tasks_by_length(run: TaskRun, ax: Axes | None = None) -> Axes | str:
    """A tile for each task and length: the share of right answers, with its count; empty where not asked."""
    if run.items.empty:
        return "No figure of tasks: none was asked."
    effective = run.effective()
    ax = _tiles(run.table().rename(columns={"task": "row"}), "right", ax)
    ax.set_xlabel("text, question and answer (tokens); empty: not asked")
    able, lengths = effective[effective["effective"] > 0], run.items["length"]
    holding = int((able["effective"] == lengths.max()).sum())
    first = f"{len(able)} of {len(effective)} tasks beat guessing at {lengths.min():,} tokens"
    set_title(ax, f"{first}; {holding} hold{'s' * (holding == 1)} to {lengths.max():,}")
    return ax


def _tiles(table: pd.DataFrame, right: str, ax: Axes | None) -> Axes:
    """A tile for each ``row`` and ``length``, in the table's order, from its counts ``right`` and ``n``."""
    counts = table.pivot(index="row", columns="length", values="n").reindex(table["row"].unique())
    share = table.pivot(index="row", columns="length", values=right).reindex(counts.index) / counts
    ax = new_axes(ax, 1.4 + 0.34 * len(share))
    image = ax.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*share.notna().to_numpy().nonzero(), strict=True):
        value = float(share.iat[row, column])
        text = f"{value:.0%} (n = {int(counts.iat[row, column])})"
        colour = INK if value > 0.6 else "white"
        ax.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    ax.set_yticks(range(len(share)), list(share.index), fontsize=8)
    ax.set_xticks(range(share.shape[1]), [f"{length:,}" for length in share.columns], fontsize=8)
    ax.tick_params(length=0)
    bar = ax.figure.colorbar(image, ax=ax, label="right answers")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    return ax
