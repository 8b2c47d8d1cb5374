"""Figures of served models: a frame of ``checks.speed_of_all`` in, the Axes out."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import EngFormatter

from dfqs_nb.core.figures import PALETTE, new_axes, set_title, token_axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

STYLES = tuple(zip((PALETTE[0], PALETTE[5], *PALETTE[2:4]), "os^D", strict=True))  # colour and marker


def speed_by_clients(speeds: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Tokens a second of all clients together against their number, a line a server."""
    ax = new_axes(ax, 3.4)
    for rows, style in _by_server(speeds):
        style["label"] += f" ({rows['requests'].min()} to {rows['requests'].max()} requests)"
        ax.plot(rows["clients"], rows["tokens_per_sec"], linewidth=1.4, **style)
    fewest, most = _client_axis(ax, speeds)
    ax.set_ylim(0, speeds["tokens_per_sec"].max() * 1.25)
    ax.set_ylabel("tokens per second, all clients together")
    ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    by_server = speeds.groupby("server", sort=False)["tokens_per_sec"]
    gains = by_server.last() / by_server.first()
    than = "one client" if fewest == 1 else f"{fewest} clients"
    set_title(ax, f"{most} clients get up to {gains.max():.1f} times the tokens of {than} ({gains.idxmax()})")
    return ax


def wait_by_clients(speeds: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Seconds to the first piece of an answer against the number of clients: median, up to the longest."""
    ax, servers = new_axes(ax, 3.4), _by_server(speeds)
    for number, (rows, style) in enumerate(servers):
        at = rows["clients"] * (1 + 0.04 * (number - (len(servers) - 1) / 2))
        above = (rows["first_max"] - rows["first_median"]).clip(lower=0)
        ax.errorbar(at, rows["first_median"], yerr=[above * 0, above], capsize=3, linewidth=1, **style)
    _, most = _client_axis(ax, speeds)
    ax.yaxis.set_major_formatter(EngFormatter(unit="s"))
    ax.set_ylim(bottom=0)
    ax.set_ylabel("time to first token\n(median, up to the longest)")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    last = speeds[speeds["clients"] == most].set_index("server")["first_median"]
    waits = " to ".join(f"{last[name]:.2g} s ({name})" for name in (last.idxmin(), last.idxmax()))
    set_title(ax, f"Time to first token with {most} clients:\n{waits}")
    return ax


def _by_server(speeds: pd.DataFrame) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """Rows and line style of each server, in the frame's order."""
    groups = zip(speeds.groupby("server", sort=False), itertools.cycle(STYLES), strict=False)
    return [
        (rows, {"color": colour, "marker": marker, "linestyle": "-", "label": name})
        for (name, rows), (colour, marker) in groups
    ]


def _client_axis(ax: Axes, speeds: pd.DataFrame) -> tuple[int, int]:
    """Clients on a log2 axis; the fewest and the most of them."""
    clients = sorted(set(speeds["clients"]))
    token_axis(ax, clients, "clients at once (log scale)")
    return clients[0], clients[-1]
