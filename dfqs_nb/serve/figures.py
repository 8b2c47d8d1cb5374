"""The figure of served models: a frame of ``checks.speed_of_all`` in, the Axes out."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from dfqs_nb.core.figures import PALETTE, new_axes, set_title, token_axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def speed_by_clients(speeds: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Tokens a second of all clients together against their number, a line a server."""
    ax, clients = new_axes(ax, 3.4), sorted(set(speeds["clients"]))
    styles = itertools.cycle(zip((PALETTE[0], PALETTE[5], *PALETTE[2:4]), "os^D", strict=True))
    by_server = speeds.groupby("server", sort=False)
    for (name, rows), (colour, marker) in zip(by_server, styles, strict=False):
        label = f"{name} ({rows['requests'].min()} to {rows['requests'].max()} requests)"
        at, speed = rows["clients"], rows["tokens_per_sec"]
        ax.plot(at, speed, color=colour, marker=marker, linewidth=1.4, label=label)
    token_axis(ax, clients, "clients at once (log scale)")
    ax.set_ylim(0, speeds["tokens_per_sec"].max() * 1.25)
    ax.set_ylabel("tokens per second, all clients together")
    ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    gains = by_server["tokens_per_sec"].last() / by_server["tokens_per_sec"].first()
    than = "one client" if clients[0] == 1 else f"{clients[0]} clients"
    gain = f"{gains.max():.1f} times the tokens of {than} ({gains.idxmax()})"
    set_title(ax, f"{clients[-1]} clients get up to {gain}")
    return ax
