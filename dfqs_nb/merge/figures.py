"""Figures of this stage: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
from dfqs_nb.core.figures import BYTES, PALETTE, new_axes, set_title  # NEEDS


def file_map(segments: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Where each file's bytes come from, one bar a file.

    Args:
        segments: columns ``file``, ``part``, ``start`` and ``nbytes`` (bytes), in drawing order.
    """
    files, parts = list(dict.fromkeys(segments["file"])), list(dict.fromkeys(segments["part"]))
    ax = new_axes(ax, 0.9 + 0.45 * len(files))
    for colour, part in zip(PALETTE, parts, strict=False):
        rows = segments[segments["part"] == part]
        ax.barh(
            [files.index(file) for file in rows["file"]],
            rows["nbytes"],
            left=rows["start"],
            height=0.62,
            color=colour,
            label=part,
            edgecolor="white",
            linewidth=0.6,
        )
    total = segments.groupby("file", sort=False)["nbytes"].sum()
    headers = segments[segments["part"] == "header"].set_index("file")["nbytes"]
    for row, file in enumerate(files):
        ax.annotate(
            f"header {headers[file]:,} of {total[file]:,} bytes",
            (total[file], row),
            va="center",
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=8,
        )
    ax.set_yticks(range(len(files)), files)
    ax.invert_yaxis()
    ax.set_xlim(right=total.max() * 1.45)
    ax.xaxis.set_major_formatter(BYTES)
    ax.set_xlabel("position in the file")
    ax.legend(
        frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.32), ncols=min(len(parts), 5)
    )
    spare = total.iloc[:-1].sum() - total.iloc[-1]
    set_title(
        ax,
        f"The merged file is {spare:,} bytes smaller than its {len(files) - 1} shards together"
        if len(files) > 2
        else "A model in one file needs no merge",
    )
    return ax
