"""Figures from frames. Every function takes a tidy frame and ``ax=None`` and returns the Axes."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from dfqs_nb.paths import whole_file

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Image
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
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.32),
              ncols=min(len(parts), 5))
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


def compact(ax: Axes) -> Image:
    """The figure of ``ax`` for display in a notebook, as a PNG of 256 colours; the figure is closed.

    That takes half of the bytes that a notebook stores otherwise.
    """
    import PIL.Image
    from IPython.display import Image

    drawn, packed = BytesIO(), BytesIO()
    ax.figure.savefig(drawn, format="png", dpi=100)
    PIL.Image.open(drawn).convert("RGB").quantize(256).save(packed, "png", optimize=True)
    plt.close(ax.figure)
    return Image(packed.getvalue())


def routing_agreement(agreement: pd.DataFrame, n_tokens: int, ax: Axes | None = None) -> Axes:
    """Share of identical expert sets, one tile for each condition and layer.

    Args:
        agreement: index condition, one column a layer, values 0 to 1.
        n_tokens: expert sets a tile.
    """
    ax = _axes(ax, 1.2 + 0.24 * len(agreement))
    differ = 1 - agreement.to_numpy(float)
    ax.imshow(differ ** 0.5, cmap="Oranges", aspect="auto", vmin=0, vmax=max(0.5, float(differ.max()) ** 0.5))
    for row, column in zip(*differ.nonzero(), strict=True):
        dark = differ[row, column] > 0.6 * differ.max() and differ.max() > 0.1
        ax.text(column, row, f"{differ[row, column]:.1%}", ha="center", va="center", fontsize=7,
                color="white" if dark else INK)
    ax.set_yticks(range(len(agreement)), agreement.index, fontsize=8)
    ax.set_xticks(range(agreement.shape[1]), [str(layer) for layer in agreement.columns])
    ax.set_xlabel(f"layer (tiles: share of n = {n_tokens:,} sets that differ)")
    ax.tick_params(length=0)
    same = int((differ.max(axis=1) == 0).sum())
    _title(ax, f"{same} of {len(agreement)} comparisons leave every expert set as it was")
    return ax


def router_margins(margins: pd.DataFrame, flips: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How close the router's calls are, with the choices that flipped marked below.

    Args:
        margins: column ``margin``, one row a choice.
        flips: columns ``margin`` and ``kind``, one row a choice that differed under a change of settings.
    """
    ax = _axes(ax)
    values = margins["margin"][margins["margin"] > 0]
    edges = np.geomspace(values.min(), values.max(), 40)
    heights, _, _ = ax.hist(values, bins=edges, color=PALETTE[4], alpha=0.7)
    kinds = list(dict.fromkeys(flips["kind"]))
    for row, (colour, kind) in enumerate(zip(PALETTE[5::-1], kinds, strict=False), start=1):
        at = flips.loc[flips["kind"] == kind, "margin"]
        ax.plot(at, [-0.055 * row * heights.max()] * len(at), "|", color=colour, markersize=8,
                label=f"{kind} ({len(at)})")
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.set_xscale("log")
    ax.set_xlabel("router margin: k-th score minus the next (scores have no unit)")
    ax.set_ylabel(f"choices (n = {len(margins):,})")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yticks([tick for tick in ax.get_yticks() if tick >= 0])
    if not len(flips):
        _title(ax, f"No choice flipped; half of the margins lie below {values.median():.2g}")
        return ax
    ax.legend(frameon=False, fontsize=8, title="flips under a change of", title_fontsize=8, loc="upper left")
    largest = flips["margin"].max()
    _title(ax, f"All {len(flips)} flips lie at margins up to {largest:.2g}, as do "
               f"{(margins['margin'] <= largest).mean():.0%} of all choices")
    return ax


def expert_usage(usage: pd.DataFrame, loads: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How often each expert was chosen, layer by layer, with the entropy of the load.

    Args:
        usage: columns ``layer``, ``expert`` and ``share`` (of the layer's choices).
        loads: columns ``layer``, ``entropy`` (bits) and ``share_of_even``.
    """
    table = usage.pivot(index="layer", columns="expert", values="share")
    ax = _axes(ax, 1.3 + 0.3 * len(table))
    image = ax.imshow(table * table.shape[1], cmap="viridis", aspect="auto", vmin=0)
    ax.set_yticks(range(len(table)), [str(layer) for layer in table.index])
    for row, load in enumerate(loads.itertuples()):
        ax.text(table.shape[1] - 0.3, row, f"{load.entropy:.2f} bits", va="center", fontsize=8, color=INK)
    ax.figure.colorbar(image, ax=ax, label="load (1: even)", pad=0.12)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(f"expert (labels give the load's entropy; even: {math.log2(table.shape[1]):.2f} bits)")
    ax.set_ylabel("layer")
    least = loads.loc[loads["share_of_even"].idxmin()]
    idle = int((usage["share"] == 0).sum())
    used = f"{idle} experts are never used" if idle else "Every expert is used"
    _title(ax, f"{used}; the least even layer, {int(least['layer'])}, keeps {least['share_of_even']:.0%} "
               "of the even load's entropy")
    return ax


def flips_by_position(positions: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The rate of flips, and the router's margin, along the context.

    Args:
        positions: columns ``start``, ``end`` (tokens), ``n``, ``rate``, ``rate_low``, ``rate_high`` (95 %
            interval), ``margin_p5`` and ``margin_median``.
    """
    ax = _axes(ax)
    middle = np.sqrt(positions["end"] * positions["start"].clip(lower=positions["end"].min() / 2))
    spread = [positions["rate"] - positions["rate_low"], positions["rate_high"] - positions["rate"]]
    ax.errorbar(middle, positions["rate"], yerr=spread, fmt="o-", color=PALETTE[5], capsize=3, linewidth=1,
                zorder=3)
    right = ax.twinx()
    right.plot(middle, positions["margin_p5"], "s--", color=PALETTE[0], linewidth=1)
    right.set_ylabel("router margin (5th percentile)", color=PALETTE[0])
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)
    ax.set_xscale("log", base=2)
    ax.set_xticks(positions["end"], [f"{end:,}" for end in positions["end"]])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"position in the context (tokens); n = {positions['n'].min():,} to "
                  f"{positions['n'].max():,} choices a point")
    ax.set_ylabel("choices that flip (95 % interval)", color=PALETTE[5])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    first, last = positions.iloc[0], positions.iloc[-1]
    apart = last["rate_low"] > first["rate_high"] or last["rate_high"] < first["rate_low"]
    _title(ax, f"Flips go from {first['rate']:.2%} at the start to {last['rate']:.2%} at the end"
               f"{'' if apart else ': the intervals overlap'}")
    return ax


def drift_by_flips(tokens: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How far a token's logits move, by the number of layers in which its experts changed.

    Args:
        tokens: columns ``drift`` (largest change of a logit, above 0) and ``flips`` (layers).
    """
    groups = [(int(flips), group["drift"]) for flips, group in tokens.groupby("flips")]
    ax = _axes(ax, 1.2 + 0.45 * len(groups))
    for row, (_, drift) in enumerate(groups):
        height = row + 0.28 * np.sin(np.arange(len(drift)) * 2.399963)  # spread, the same every time
        ax.plot(drift, height, ".", color=PALETTE[0 if row == 0 else 5], markersize=3, alpha=0.35)
        ax.plot([drift.median()] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=2)
    ax.set_xscale("log")
    ax.set_yticks(range(len(groups)), [f"{flips} (n = {len(drift):,})" for flips, drift in groups])
    ax.set_ylabel("layers that flipped")
    ax.set_xlabel("largest change of a token's logits (bar: median)")
    still, moved = tokens.loc[tokens["flips"] == 0, "drift"], tokens.loc[tokens["flips"] > 0, "drift"]
    if len(still) and len(moved):
        times = moved.median() / still.median()
        _title(ax, f"A token whose experts change moves its logits {times:.1f} times as far")
    else:
        _title(ax, f"No expert changed; logits moved by {tokens['drift'].median():.2g} (median)")
    return ax


# ---- long contexts ----


def _token_axis(ax: Axes, ticks: pd.Series | list[int], label: str) -> None:
    """Contexts on a log2 axis, each tick a number of tokens."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(label)


def context_curve(curve: pd.DataFrame, boundary: dict[str, Any], ax: Axes | None = None,
                  label: str = "") -> Axes:
    """Accuracy by context length with its intervals, the isotonic fit, the threshold and the boundary.

    Args:
        curve: columns ``length`` (tokens), ``n``, ``accuracy``, ``low``, ``high`` and ``fit``.
        boundary: ``Boundary.as_dict()``.
        label: of the model, where several share the axes.
    """
    first = ax is None or not ax.lines
    ax = _axes(ax, 3.6)
    colour = PALETTE[0] if first else PALETTE[5]
    spread = [curve["accuracy"] - curve["low"], curve["high"] - curve["accuracy"]]
    ax.errorbar(curve["length"], curve["accuracy"], yerr=[one.clip(lower=0) for one in spread], fmt="o",
                color=colour, capsize=3, linewidth=1, zorder=3, label=label or "accuracy, 95 % interval")
    ax.plot(curve["length"], curve["fit"], color=colour, linewidth=1, alpha=0.7)
    ax.axhline(boundary["threshold"], color=INK, linewidth=0.8, linestyle=":")
    ax.annotate(f"threshold {boundary['threshold']:.2f}", (curve["length"].min(), boundary["threshold"]),
                xytext=(0, 3), textcoords="offset points", fontsize=8, va="bottom")
    right = boundary["high"] or curve["length"].max()
    if boundary["status"] == "measured":
        ax.axvspan(boundary["low"] or curve["length"].min(), right, color=colour, alpha=0.13, linewidth=0)
        ax.axvline(boundary["tokens"], color=colour, linewidth=1.2, linestyle="--")
    planned = curve.loc[curve["length"].map(lambda n: math.log2(n).is_integer()), "length"]
    _token_axis(ax, planned, "context (tokens)")
    ax.set_ylim(-0.03, 1.05)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylabel(f"right answers (n = {curve['n'].min()} to {curve['n'].max()} a length)"
                  if curve["n"].nunique() > 1 else f"right answers (n = {curve['n'].iloc[0]} a length)")
    if label:
        ax.legend(frameon=False, fontsize=8, loc="lower left")
    if first:
        _title(ax, _boundary_title(boundary))
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
    ax = _axes(ax, 1.4 + 0.34 * len(share))
    image = ax.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*share.notna().to_numpy().nonzero(), strict=True):
        ax.text(column, row, f"{int(counts.iat[row, column])}", ha="center", va="center", fontsize=7,
                color=INK if share.iat[row, column] > 0.6 else "white")
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
    _title(ax, f"Found best {strata[at.idxmax()]} deep ({at.max():.0%}), worst {strata[at.idxmin()]} deep "
               f"({at.min():.0%})")
    return ax


def loss_by_position(losses: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Loss along held-out texts, with the entropy of their source.

    Args:
        losses: columns ``start``, ``end`` (tokens), ``texts``, ``loss`` (nats a token), ``low``, ``high`` and
            ``source``.
    """
    ax = _axes(ax)
    middle = (losses["start"] * losses["end"]) ** 0.5
    spread = [losses["loss"] - losses["low"], losses["high"] - losses["loss"]]
    ax.errorbar(middle, losses["loss"], yerr=spread, fmt="o-", color=PALETTE[0], capsize=3, linewidth=1)
    ax.axhline(losses["source"].iloc[0], color=INK, linestyle=":", linewidth=0.8)
    ax.annotate("entropy of the texts' source", (middle.iloc[0], losses["source"].iloc[0]), xytext=(0, -4),
                textcoords="offset points", fontsize=8, va="top")
    _token_axis(ax, [*losses["start"], losses["end"].iloc[-1]],
                f"position in the context (tokens); {losses['texts'].iloc[0]} texts")
    ax.set_ylabel("loss (nats a token, 95 % interval)")
    ax.margins(y=0.2)
    known = losses["high"].notna().all()
    best, last = losses.loc[losses["high" if known else "loss"].idxmin()], losses.iloc[-1]
    apart = " (intervals overlap)" if known else " (too few texts for intervals)"
    apart = "" if last["low"] > best["high"] else apart
    _title(ax, f"Loss is {best['loss']:.3f} at {best['start']:,.0f} to {best['end']:,.0f} tokens and "
               f"{last['loss']:.3f} beyond {last['start']:,.0f}{apart}")
    return ax


def cost_by_length(costs: pd.DataFrame, memory: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Prefill speed by depth and memory by context length, side by side in one figure.

    Args:
        costs: columns ``depth`` (tokens) and ``tokens_per_second``.
        memory: columns ``n_ctx``, ``kv_bytes``, ``predicted_bytes`` and ``anonymous_bytes`` (measured).
    """
    ax = _axes(ax, 3.2)
    for column, form, colour, name in (
        ("anonymous_bytes", "o-", PALETTE[5], "measured, all of the process"),
        ("predicted_bytes", "s--", PALETTE[0], "predicted, cache and buffer"),
        ("kv_bytes", "^:", PALETTE[2], "predicted, cache alone"),
    ):
        ax.plot(memory["n_ctx"], memory[column], form, color=colour, label=name)
    ax.yaxis.set_major_formatter(_BYTES)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("memory beside the weights")
    right = ax.twinx()
    right.plot(costs["depth"], costs["tokens_per_second"], color=PALETTE[7], linewidth=2,
               label="prefill speed")
    right.set_ylim(0, 1.15 * costs["tokens_per_second"].max())
    right.set_ylabel("prefill (tokens a second)", color="#666666")
    right.spines["top"].set_visible(False)
    _token_axis(ax, memory["n_ctx"], "context, or depth (tokens)")
    handles = [*ax.get_lines(), *right.get_lines()]
    ax.legend(handles, [one.get_label() for one in handles], frameon=False, fontsize=8, ncols=2,
              loc="upper center", bbox_to_anchor=(0.5, -0.2))
    growth = memory["anonymous_bytes"].iloc[-1] - memory["anonymous_bytes"].iloc[0]
    times = memory["n_ctx"].iloc[-1] / memory["n_ctx"].iloc[0]
    _title(ax, f"A context {times:,.0f} times as long takes {growth / 1e6:,.1f} MB more")
    return ax


def flash_cache(cache: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The cache of the real model with and without the window, beside its card.

    Args:
        cache: columns ``n_ctx``, ``swa_window``, ``swa_full`` and ``card`` (bytes, NaN where silent).
    """
    ax = _axes(ax)
    ax.plot(cache["n_ctx"], cache["swa_window"], "o-", color=PALETTE[0], label="swa_full=False")
    ax.plot(cache["n_ctx"], cache["swa_full"], "s--", color=PALETTE[5],
            label="swa_full=True, llama.cpp's default")
    ax.plot(cache["n_ctx"], cache["card"], "D", color=INK, markersize=6, label="the card")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(_BYTES)
    ax.set_ylabel("KV cache (f16)")
    _token_axis(ax, cache["n_ctx"], "context (tokens)")
    ax.legend(frameon=False, fontsize=8)
    last = cache.iloc[-1]
    _title(ax, f"At {last['n_ctx']:,.0f} tokens the setting swa_full multiplies the cache by "
               f"{last['swa_full'] / last['swa_window']:.1f}")
    return ax


def routing_by_position(positions: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Overlap of expert usage with the beginning of the context, and the router's margin.

    Args:
        positions: columns ``start``, ``end`` (tokens), ``choices``, ``overlap``, ``low``, ``high``
            (range over halves of the texts), ``chance`` and ``margin_median``.
    """
    ax = _axes(ax)
    middle = (positions["start"] * positions["end"]) ** 0.5
    spread = [(positions["overlap"] - positions["low"]).clip(lower=0),
              (positions["high"] - positions["overlap"]).clip(lower=0)]
    ax.errorbar(middle, positions["overlap"], yerr=spread, fmt="o-", color=PALETTE[0], capsize=3, linewidth=1,
                label="with the first band")
    ax.plot(middle, positions["chance"], ":", color=INK, linewidth=1, label="chance: same band, other texts")
    ax.set_ylabel("overlap of expert usage", color=PALETTE[0])
    right = ax.twinx()
    right.plot(middle, positions["margin_median"], "s--", color=PALETTE[5], linewidth=1)
    right.set_ylabel("router margin (median)", color=PALETTE[5])
    right.set_ylim(0, 1.15 * positions["margin_median"].max())
    right.spines["top"].set_visible(False)
    _token_axis(ax, [*positions["start"], positions["end"].iloc[-1]],
                f"position in the context (tokens); n = {positions['choices'].min():,} to "
                f"{positions['choices'].max():,} choices a band")
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    last = positions.iloc[-1]
    low, high = positions["overlap"].min(), positions["overlap"].max()
    ax.set_ylim(max(0, low - 0.15), min(1.02, high + 0.08))
    _title(ax, f"Beyond {last['start']:,.0f} tokens usage overlaps the start's by {last['overlap']:.0%} "
               f"(chance: {last['chance']:.0%})")
    return ax


def score_families(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy of each family with its interval, and what guessing would give.

    Args:
        table: columns ``set``, ``family``, ``length``, ``n``, ``accuracy``, ``low``, ``high`` (95 %
            interval) and ``guess_rate``, in drawing order.
    """
    ax = _axes(ax, 1.2 + 0.2 * len(table))
    sets = list(dict.fromkeys(table["set"]))
    for colour, name in zip(PALETTE, sets, strict=False):
        rows = np.flatnonzero(table["set"] == name)
        part = table.iloc[rows]
        spread = [part["accuracy"] - part["low"], part["high"] - part["accuracy"]]
        ax.errorbar(part["accuracy"], rows, xerr=spread, fmt="o", color=colour, capsize=3, label=name)
    guessed = np.flatnonzero(table["guess_rate"] > 0)
    ax.plot(table["guess_rate"].iloc[guessed], guessed, "|", color=INK, markersize=13, markeredgewidth=1.5,
            label="guessing")
    names = [f"{one.family}, {one.length} (n = {one.n})" for one in table.itertuples()]
    ax.set_yticks(range(len(table)), names, fontsize=8)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(-0.02, 1.02)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("right answers (95 % Wilson interval)")
    below = (0.0, -0.24 if len(table) < 14 else -0.12)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=below, ncols=len(sets) + 1)
    above = int(((table["low"] > table["guess_rate"]) & (table["correct"] > 0)).sum())
    _title(ax, f"{above} of {len(table)} families lie above guessing beyond doubt")
    return ax


def decode_roofline(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Decode speed by depth, every repetition, below the roof that reading the weights sets.

    Args:
        table: columns ``phase``, ``depth`` (tokens), ``median``, ``values`` (tokens a second), ``roof``,
            ``utilisation`` and ``contended``.
    """
    ax, decode = _axes(ax), table[table["phase"] == "decode"]
    ax.plot(decode["depth"], decode["roof"], "--", color=INK, label="roof: memory bandwidth / bytes a token")
    for one in decode.itertuples():
        ax.plot([one.depth] * len(one.values), one.values, "o", color=PALETTE[5], alpha=0.4, markersize=5)
    ax.plot(decode["depth"], decode["median"], "_-", color=PALETTE[5], markersize=16, markeredgewidth=2,
            label=f"decode, median of {len(decode['values'].iloc[0])}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(decode["depth"], [f"{depth:,}" for depth in decode["depth"]])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    ax.set_ylim(decode["median"].min() / 3, decode["roof"].max() * 2)
    ax.set_xlabel("tokens in the context")
    ax.set_ylabel("tokens a second")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0.4, 0.5))
    busy = " (the machine was busy)" if decode["contended"].any() else ""
    _title(ax, f"Decode reaches {decode['utilisation'].max():.1%} of what memory allows{busy}")
    return ax


def card_bounds(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The card's speeds beside the bound that reading sets, a row a machine.

    Args:
        table: columns ``machine``, ``claimed_low``, ``claimed_high``, ``bound`` (tokens a second).
    """
    ax = _axes(ax, 1.0 + 0.22 * len(table))
    rows = np.arange(len(table))
    claimed = table["claimed_low"], table["claimed_high"]
    ax.hlines(rows, *claimed, color=PALETTE[1], linewidth=6, label="the card")
    ax.plot(table["bound"], rows, "D", color=PALETTE[0], label="bound by reading")
    for row, bound in zip(rows, table["bound"], strict=True):
        text = f"{bound:,.2g}" if bound < 10 else f"{bound:,.0f}"
        ax.annotate(text, (bound, row), xytext=(7, 0), textcoords="offset points", fontsize=8, va="center")
    ax.set_yticks(rows, table["machine"], fontsize=8)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xscale("log")
    ax.margins(x=0.12)
    ax.set_xlabel("tokens a second")
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    near = table.loc[table["reached"].idxmax()]
    _title(ax, f"Nearest to its bound: the card's {near['machine']}")
    return ax


def report_shares(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The shares of a report, one row each with its 95 % interval: the scores, then retrieval by length.

    Args:
        table: columns ``group``, ``label``, ``n``, ``value``, ``low``, ``high``, ``mark`` (guess rate of a
            score, threshold of the failure boundary; NaN for none), in drawing order.
    """
    ax = _axes(ax, 1.4 + 0.24 * len(table))
    for colour, group in zip(PALETTE, dict.fromkeys(table["group"]), strict=False):
        rows = np.flatnonzero(table["group"] == group)
        part = table.iloc[rows]
        spread = [(part["value"] - part["low"]).clip(lower=0), (part["high"] - part["value"]).clip(lower=0)]
        ax.errorbar(part["value"], rows, xerr=spread, fmt="o", color=colour, capsize=3, label=group)
    marked = np.flatnonzero(table["mark"].notna())
    ax.plot(table["mark"].iloc[marked], marked, "|", color=INK, markersize=13, markeredgewidth=1.5,
            label="guessing, or the threshold of failure")
    names = [f"{one.label} (n = {one.n})" for one in table.itertuples()]
    ax.set_yticks(range(len(table)), names, fontsize=8)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(-0.02, 1.02)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("right answers (95 % interval)")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=3)
    below = int((table["high"] < table["mark"]).sum())
    above = int((table["low"] > table["mark"]).sum())
    _title(ax, f"{above} of {len(marked)} lie above their mark beyond doubt, {below} below it")
    return ax
