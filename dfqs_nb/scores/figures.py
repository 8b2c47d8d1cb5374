"""Figures of this stage: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title, share_axis, whiskers
from dfqs_nb.scores.speed import metric_row

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def score_families(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy of each family with its interval, and what guessing would give.

    Args:
        table: columns ``set``, ``family``, ``length``, ``n``, ``accuracy``, ``low``, ``high`` (95 %
            interval) and ``guess_rate``, in drawing order.
    """
    ax = new_axes(ax, 1.2 + 0.2 * len(table))
    sets = list(dict.fromkeys(table["set"]))
    for colour, name in zip(PALETTE, sets, strict=False):
        rows = np.flatnonzero(table["set"] == name)
        part = table.iloc[rows]
        spread = whiskers(part, "accuracy")
        ax.errorbar(part["accuracy"], rows, xerr=spread, fmt="o", color=colour, capsize=3, label=name)
    guessed = np.flatnonzero(table["guess_rate"] > 0)
    bar: dict[str, Any] = {"marker": "|", "linestyle": "", "color": INK}
    bar |= {"markersize": 13, "markeredgewidth": 1.5}
    ax.plot(table["guess_rate"].iloc[guessed], guessed, **bar, label="guessing")
    _name_rows(ax, [f"{row.family}, {row.length} (n = {row.n})" for row in table.itertuples()])
    ax.set_xlim(-0.02, 1.02)
    share_axis(ax.xaxis, "right answers (95 % Wilson interval)")
    below = (0.0, -0.24 if len(table) < 14 else -0.12)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=below, ncols=len(sets) + 1)
    above = int(((table["low"] > table["guess_rate"]) & (table["correct"] > 0)).sum())
    set_title(ax, f"{above} of {len(table)} families are answered better than by guessing")
    return ax


def choice_margins(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """By how much the right choice is likelier than the best wrong one, a row a family.

    Args:
        table: `likelihood.Answers.families`.
    """
    ax = new_axes(ax, 1.0 + 0.2 * len(table))
    rows, known = np.arange(len(table)), table["margin_low"].notna().all()
    spread = (
        [table["margin"] - table["margin_low"], table["margin_high"] - table["margin"]] if known else None
    )
    ax.errorbar(table["margin"], rows, xerr=spread, fmt="o", color=PALETTE[0], capsize=3)
    ax.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    _name_rows(ax, [f"{row.family} (n = {row.n})" for row in table.itertuples()])
    ax.set_xlabel("log-likelihood of the right choice minus the best wrong one (nats)")
    above = int((table["margin_low" if known else "margin"] > 0).sum())
    clearly = "clearly the likeliest" if known else "the likeliest, without intervals,"
    set_title(ax, f"The right choice is {clearly} in {above} of {len(table)} families")
    return ax


def decode_roofline(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Decode speed by depth, every repetition, below the roof that reading the weights sets.

    Args:
        table: columns ``phase``, ``depth`` (tokens), ``median``, ``values`` (tokens a second), ``roof``,
            ``utilisation`` and ``contended``.
    """
    ax, decode = new_axes(ax), table[table["phase"] == "decode"]
    ax.plot(decode["depth"], decode["roof"], "--", color=INK, label="roof: memory bandwidth / bytes a token")
    for row in decode.itertuples():
        ax.plot([row.depth] * len(row.values), row.values, "o", color=PALETTE[5], alpha=0.4, markersize=5)
    line: dict[str, Any] = {"color": PALETTE[5], "markersize": 16, "markeredgewidth": 2}
    label = f"decode, median of {len(decode['values'].iloc[0])}"
    ax.plot(decode["depth"], decode["median"], "_-", **line, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(decode["depth"], [f"{depth:,}" for depth in decode["depth"]])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(_speed)
    ax.set_ylim(decode["median"].min() / 3, decode["roof"].max() * 2)
    ax.set_xlabel("tokens in the context")
    ax.set_ylabel("tokens a second")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0.4, 0.5))
    busy = " (the machine was busy)" if decode["contended"].any() else ""
    at = metric_row(table)
    set_title(ax, f"Decode at depth {at['depth']:,} reaches {at['utilisation']:.1%} of the roof{busy}")
    return ax


def card_bounds(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The card's speeds beside the bound that reading sets, a row a machine.

    Args:
        table: columns ``machine``, ``claimed_low``, ``claimed_high``, ``bound`` (tokens a second).
    """
    ax = new_axes(ax, 1.0 + 0.24 * len(table))
    rows = np.arange(len(table))
    claim: dict[str, Any] = {"color": PALETTE[1], "linewidth": 6, "label": "the card"}
    ax.hlines(rows, table["claimed_low"], table["claimed_high"], **claim)
    ax.plot(table["bound"], rows, "D", color=PALETTE[0], label="bound by reading")
    for row, bound in zip(rows, table["bound"], strict=True):
        text = f"{bound:,.2g}" if bound < 10 else f"{bound:,.0f}"
        ax.annotate(text, (bound, row), xytext=(7, 0), textcoords="offset points", fontsize=8, va="center")
    _name_rows(ax, table["machine"])
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(_speed)
    ax.margins(x=0.12)
    ax.set_xlabel("tokens a second")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    cpu = table.iloc[0]
    set_title(ax, f"The card's CPU speed is at most {cpu['reached']:.0%} of what its memory allows")
    return ax


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)


def _speed(value: float, _: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
