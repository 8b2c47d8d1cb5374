"""Figures of notebook 05: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.ticker import PercentFormatter

from dfqs_nb.context.boundary import interval_words
from dfqs_nb.core import figures as core
from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title, token_axis, whiskers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from dfqs_nb.context.tasks import TaskRun

LINE: dict[str, Any] = {"fmt": "o-", "color": PALETTE[0], "capsize": 3, "linewidth": 1}


def _nothing(what: str, ax: Axes | None) -> Axes:
    """In the place of a figure whose table has no rows."""
    ax = new_axes(ax, 0.6)
    ax.set_axis_off()
    set_title(ax, f"{what}: not measured")
    return ax


def context_curve(curve: pd.DataFrame, boundary: dict[str, Any], ax: Axes | None = None) -> Axes:
    """Accuracy by context length with its intervals, the non-increasing fit, the threshold and the boundary.

    Lengths that were not planned are drawn hollow.

    Args:
        curve: see `Counts.curve`. boundary: ``Boundary.as_dict()``.
    """
    if curve.empty:
        return _nothing("Retrieval by length", ax)
    ax = new_axes(ax, 3.6)
    for planned, part in curve.groupby("planned"):
        style = {**LINE, "fmt": "o", "zorder": 3, "markerfacecolor": PALETTE[0] if planned else "white"}
        ax.errorbar(part["length"], part["accuracy"], yerr=whiskers(part, "accuracy"), **style)
    ax.plot(curve["length"], curve["fit"], color=PALETTE[0], linewidth=1, alpha=0.7)
    shortest = curve["length"].min()
    for name in ("threshold", "guess_rate"):
        _level(ax, boundary[name], shortest, f"{name.replace('_', ' ')} {boundary[name]:.2f}")
    if boundary["status"] == "measured":
        right = boundary["high"] or curve["length"].max()
        ax.axvspan(boundary["low"] or shortest, right, color=PALETTE[0], alpha=0.13, linewidth=0)
        ax.axvline(boundary["tokens"], color=PALETTE[0], linewidth=1.2, linestyle="--")
    token_axis(ax, curve.loc[curve["planned"], "length"], "context (tokens)")
    ax.set_ylim(-0.03, 1.05)
    least, most = curve["n"].min(), curve["n"].max()
    n = f"{least}" if least == most else f"{least} to {most}"
    core.share_axis(ax.yaxis, f"right answers (n = {n} a length)")
    set_title(ax, _boundary_title(boundary))
    return ax


def _level(ax: Axes, value: float, at: float, note: str) -> None:
    ax.axhline(value, color=INK, linewidth=0.8, linestyle=":")
    ax.annotate(note, (at, value), (0, -3), textcoords="offset points", fontsize=8, va="top")


def _right_axis(ax: Axes, label: str, values: pd.Series, colour: str) -> Axes:
    right = ax.twinx()
    right.set_ylim(0, 1.15 * values.max())
    right.set_ylabel(label, color=colour)
    right.spines["top"].set_visible(False)
    return right


def _boundary_title(boundary: dict[str, Any]) -> str:
    if boundary["status"] == "floor":
        return "Retrieval is no better than chance at any length"
    if boundary["right_censored"]:
        return f"Retrieval holds to the longest context measured, {boundary['tokens']:,} tokens"
    is_quality = boundary["cause"] == "quality"
    what = "Retrieval loses 15 % of its ability" if is_quality else f"The context ends ({boundary['cause']})"
    interval = interval_words(boundary["low"], boundary["high"])
    provisional = "; provisional: few texts" if boundary["provisional"] else ""
    return f"{what} at {boundary['tokens']:,} tokens\n(95 % interval {interval}{provisional})"


def depth_by_length(tiles: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """A tile for each length and depth: the share of right answers, with its count (see `depth_tiles`)."""
    if tiles.empty:
        return _nothing("Retrieval by depth (fewer than 10 questions a length)", ax)
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


def tasks_by_length(run: TaskRun, ax: Axes | None = None) -> Axes:
    """A tile for each task and length: the share of right answers, with its count; empty where not asked."""
    if run.items.empty:
        return _nothing("Tasks by length", ax)
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


def loss_by_position(losses: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Loss along held-out texts, with the entropy of their source; see `HeldOut.loss_by_position`."""
    if losses.empty:
        return _nothing("Loss by position", ax)
    ax = new_axes(ax)
    middle = (losses["start"] * losses["end"]) ** 0.5
    ax.errorbar(middle, losses["loss"], yerr=whiskers(losses, "loss"), **LINE)
    _level(ax, losses["source"].iloc[0], middle.iloc[0], "entropy of the texts' source")
    label = f"position in the context (tokens); n = {losses['texts'].iloc[0]} texts"
    token_axis(ax, [*losses["start"], losses["end"].iloc[-1]], label)
    ax.set_ylabel("loss (nats a token, 95 % interval)")
    ax.margins(y=0.2)
    set_title(ax, _loss_title(losses))
    return ax


def _loss_title(losses: pd.DataFrame) -> str:
    known = losses["high"].notna().all()
    best, last = losses.loc[losses["high" if known else "loss"].idxmin()], losses.iloc[-1]
    if last["start"] == best["start"]:
        return f"Loss is lowest at the end of the context, {last['loss']:.2f} nats a token"
    ends = (
        f"{best['loss']:.2f} at {best['start']:,.0f} tokens to {last['loss']:.2f} beyond {last['start']:,.0f}"
    )
    text = f"Loss rises from {ends}"
    if not known:
        return f"{text} (too few texts for intervals)"
    return text if last["low"] > best["high"] else f"{text} (intervals overlap)"


def cost_by_length(memory: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Memory by context length, with the prefill speed at that depth; see `memory_table`."""
    ax = new_axes(ax, 3.2)
    for column, form, colour, name in (
        ("anonymous_bytes", "o-", PALETTE[5], "measured, all of the process"),
        ("predicted_bytes", "s--", PALETTE[0], "predicted, cache and buffer"),
        ("kv_bytes", "^:", PALETTE[2], "predicted, cache alone"),
    ):
        ax.plot(memory["n_ctx"], memory[column], form, color=colour, label=name)
    ax.yaxis.set_major_formatter(core.BYTES)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("memory beside the weights")
    right = _right_axis(ax, "prefill (tokens a second)", memory["tokens_per_second"], "#666666")
    speed: dict[str, Any] = {"color": PALETTE[7], "linewidth": 2, "label": "prefill speed"}
    right.plot(memory["n_ctx"], memory["tokens_per_second"], **speed)
    token_axis(ax, memory["n_ctx"], "context, or depth (tokens)")
    lines, below = [*ax.get_lines(), *right.get_lines()], (0.5, -0.2)
    labels = [str(line.get_label()) for line in lines]
    ax.legend(lines, labels, frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=below)
    seen = memory.dropna(subset=["anonymous_bytes"])
    if len(seen) < 2:
        set_title(ax, "Predicted memory of a context; the growth was not measured")
        return ax
    grown = seen[["anonymous_bytes", "predicted_bytes"]].iloc[-1] - seen.iloc[0]
    times = seen["n_ctx"].iloc[-1] / seen["n_ctx"].iloc[0]
    more, predicted = (f"{grown[name] / 1e6:,.1f} MB" for name in ("anonymous_bytes", "predicted_bytes"))
    set_title(ax, f"{times:,.0f} times the context takes {more} more memory (predicted: {predicted})")
    return ax


def routing_by_position(positions: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Overlap of expert usage with the beginning of the context, and the router's margin.

    Args:
        positions: see `usage_by_position`.
    """
    if positions.empty:
        return _nothing("Routing by position (of a model with routed experts)", ax)
    ax = new_axes(ax)
    middle = (positions["start"] * positions["end"]) ** 0.5
    overlap, chance, margin = positions["overlap"], positions["chance"], positions["margin_median"]
    ax.errorbar(middle, overlap, yerr=whiskers(positions, "overlap"), label="with the first band", **LINE)
    ax.plot(middle, chance, ":", color=INK, linewidth=1, label="chance: same band, other texts")
    ax.set_ylabel("overlap of expert usage", color=PALETTE[0])
    if margin.max() < float("inf"):  # not where all experts are used
        right = _right_axis(ax, "router margin (median)", margin, PALETTE[5])
        right.plot(middle, margin, "s--", color=PALETTE[5], linewidth=1)
    least, most = positions["choices"].min(), positions["choices"].max()
    label = f"position in the context (tokens); n = {least:,} to {most:,} choices a band"
    token_axis(ax, [*positions["start"], positions["end"].iloc[-1]], label)
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    ax.set_ylim(max(0, overlap.min() - 0.15), min(1.02, overlap.max() + 0.08))
    last = positions.iloc[-1]
    what = f"expert usage overlaps the start's by {last['overlap']:.0%} (by chance: {last['chance']:.0%})"
    set_title(ax, f"Beyond {last['start']:,.0f} tokens, {what}")
    return ax
