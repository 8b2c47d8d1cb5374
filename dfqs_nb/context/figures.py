"""The figure of notebook 05: a tidy frame in, the Axes out, or a text that says why not."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from dfqs_nb.core.figures import INK, PALETTE, new_axes, set_title, share_axis, token_axis, whiskers


def context_curve(curve: pd.DataFrame, boundary: dict[str, Any]) -> Axes | str:
    """Accuracy by context length with its intervals, the non-increasing fit, the threshold and the boundary.

    See `Counts.curve` and ``Boundary.as_dict()``.
    """
    if len(curve) < 2:
        at = f"at {curve['length'].iloc[0]:,} tokens only" if len(curve) else "at no length"
        return f"No figure of the curve: retrieval was measured {at}."
    ax = new_axes(3.6)
    style: dict[str, Any] = {"fmt": "o", "capsize": 3, "zorder": 3, "label": "measured, 95 % interval"}
    ax.errorbar(curve["length"], curve["accuracy"], whiskers(curve, "accuracy"), color=PALETTE[0], **style)
    ax.plot(curve["length"], curve["fit"], color=PALETTE[0], linewidth=1, alpha=0.7, label="isotonic fit")
    levels = sorted((boundary[name], name.replace("_", " ")) for name in ("threshold", "guess_rate"))
    beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    for (level, name), side in zip(levels, ("top", "bottom"), strict=True):  # beside the axes, not over data
        ax.axhline(level, color=INK, linewidth=0.8, linestyle=":")
        ax.annotate(f"{name} {level:.2f}", (1, level), (4, 0), fontsize=8, va=side, **beside)
    if boundary["status"] == "measured":
        right = boundary["high"] or curve["length"].max()
        style = {"color": PALETTE[0], "alpha": 0.13, "linewidth": 0, "label": "its 95 % interval"}
        ax.axvline(boundary["tokens"], color=PALETTE[0], linewidth=1.2, linestyle="--", label="boundary")
        ax.axvspan(boundary["low"] or curve["length"].min(), right, **style)
    n, texts = (" to ".join(map(str, sorted({min(it), max(it)}))) for it in (curve["n"], curve["texts"]))
    asked = f"context (tokens); a length: {n} answers in {texts} texts"
    token_axis(ax, curve.loc[curve["planned"], "length"], asked)
    ax.set_ylim(-0.03, 1.05)
    share_axis(ax.yaxis, "right answers")
    ax.legend(frameon=False, fontsize=8, loc="best")
    set_title(ax, f"Retrieval {boundary['sentence'].partition(' (')[0]}")
    return ax
