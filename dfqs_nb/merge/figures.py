"""Figures of notebook 01: a tidy frame and ``ax=None`` in, the Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from dfqs_nb.core.figures import BYTES, PALETTE, new_axes, set_title
from dfqs_nb.gguf.shards import ShardSet
from dfqs_nb.merge.plan import plan_merge

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def segments(shards: ShardSet) -> pd.DataFrame:
    """Where the bytes of shards and result lie, one row a piece, for `file_map`.

    Columns ``file`` (``shard N`` or ``merged``), ``part`` (``header`` or ``data of shard N``), ``start`` and
    ``nbytes``.
    """
    position = len(plan_merge(shards).header)
    rows, merged = [], [("merged", "header", 0, position)]
    for number, header in enumerate(shards.headers, 1):
        file, part, size = f"shard {number}", f"data of shard {number}", header.data_offset - header.start
        rows += [(file, "header", 0, size), (file, part, size, header.data_nbytes)]
        merged.append(("merged", part, position, header.data_nbytes))
        position += header.data_nbytes
    return pd.DataFrame(rows + merged, columns=["file", "part", "start", "nbytes"])


def file_map(segments: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Where each file's bytes come from, one bar a file; ``segments`` as of `segments`, in drawing order."""
    files, parts = list(dict.fromkeys(segments["file"])), list(dict.fromkeys(segments["part"]))
    ax = new_axes(ax, 1.1 + 0.45 * len(files))
    style: dict[str, Any] = {"height": 0.62, "edgecolor": "white", "linewidth": 0.6}
    for colour, part in zip(PALETTE, parts, strict=False):
        rows = segments[segments["part"] == part]
        places = [files.index(file) for file in rows["file"]]
        ax.barh(places, rows["nbytes"], left=rows["start"], label=part, color=colour, **style)
    total = segments.groupby("file", sort=False)["nbytes"].sum()
    headers = segments[segments["part"] == "header"].set_index("file")["nbytes"]
    place: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
    for row, file in enumerate(files):
        label = f"header {headers[file]:,} of {total[file]:,} bytes"
        ax.annotate(label, (total[file], row), **place)
    ax.set_yticks(range(len(files)), files)
    ax.invert_yaxis()
    ax.set_xlim(right=total.max() * 1.45)
    ax.xaxis.set_major_formatter(BYTES)
    ax.set_xlabel("position in the file")
    columns = min(len(parts), 5)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.32), ncols=columns)
    spare = total.iloc[:-1].sum() - total.iloc[-1]
    title = f"The merged file is {spare:,} bytes smaller than its {len(files) - 1} shards together"
    set_title(ax, title if len(files) > 2 else "A model in one file needs no merge")
    return ax
