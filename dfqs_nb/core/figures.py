"""Figures from frames. Every function takes a tidy frame and ``ax=None`` and returns the Axes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

from dfqs_nb.core.files import whole_file

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Image
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which people with any colour vision can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
INK, PAPER = "#222222", "#E8E8E8"
ATTENTION_COLOURS = {
    "sliding window": PALETTE[4],
    "compressed sparse": PALETTE[0],
    "heavily compressed": PALETTE[1],
    "full": PALETTE[2],
}
ROUTING_COLOURS = {"hash": PALETTE[3], "scores": PALETTE[2], "dense": PAPER}
_BYTES = EngFormatter(unit="B")


def _axes(ax: Axes | None, height: float = 3.0, width: float = 7.0) -> Axes:
    if ax is None:
        _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=11, color=INK)


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


# ---- long contexts ----


def _token_axis(ax: Axes, ticks: pd.Series | list[int], label: str) -> None:
    """Contexts on a log2 axis, each tick a number of tokens."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(label)
