"""Figures of served models, in the manner of `plots`: a frame in, the Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.ticker import EngFormatter

from dfqs_nb.plots import PALETTE, _axes, _title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def speed_by_clients(speeds: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Tokens a second of all clients together against their number, a line a server.

    Args:
        speeds: see ``server_checks.speed_of_all``.
    """
    ax = _axes(ax, 3.4)
    names = list(dict.fromkeys(speeds["server"]))
    for number, name in enumerate(names):
        rows = speeds[speeds["server"] == name]
        colour = (PALETTE[0], PALETTE[5], *PALETTE[2:4])[number % 4]
        asked = f"{rows['requests'].min()} to {rows['requests'].max()} requests"
        ax.plot(rows["clients"], rows["tokens_per_sec"], f"{'os^D'[number % 4]}-", color=colour,
                linewidth=1.4, label=f"{name} ({asked})")
    clients = sorted(set(speeds["clients"]))
    ax.set_xscale("log", base=2)
    ax.set_xticks(clients, [str(n) for n in clients])
    ax.minorticks_off()
    ax.set_ylim(0, speeds["tokens_per_sec"].max() * 1.25)
    ax.set_xlabel("clients at once (log scale)")
    ax.set_ylabel("tokens a second, all clients together")
    ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    gains = {name: rows["tokens_per_sec"].iloc[-1] / rows["tokens_per_sec"].iloc[0]
             for name, rows in speeds.groupby("server", sort=False)}
    best = max(gains, key=lambda name: gains[name])
    fewest = "one" if clients[0] == 1 else clients[0]
    _title(ax, f"{clients[-1]} clients get at most {gains[best]:.1f} times the tokens of {fewest} ({best})")
    return ax


def wait_by_clients(speeds: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Seconds to the first piece of an answer against the number of clients: median, and up to the longest.

    Args:
        speeds: see ``server_checks.speed_of_all``.
    """
    ax = _axes(ax, 3.4)
    names = list(dict.fromkeys(speeds["server"]))
    for number, name in enumerate(names):
        rows = speeds[speeds["server"] == name]
        colour = (PALETTE[0], PALETTE[5], *PALETTE[2:4])[number % 4]
        at = rows["clients"] * (1 + 0.04 * (number - (len(names) - 1) / 2))
        above = (rows["first_max"] - rows["first_median"]).clip(lower=0)
        ax.errorbar(at, rows["first_median"], yerr=[above * 0, above], fmt=f"{'os^D'[number % 4]}-",
                    color=colour, capsize=3, linewidth=1, label=name)
    clients = sorted(set(speeds["clients"]))
    ax.set_xscale("log", base=2)
    ax.set_xticks(clients, [str(n) for n in clients])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(EngFormatter(unit="s"))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("clients at once (log scale)")
    ax.set_ylabel("wait for the first piece\n(median, up to the longest)")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    last = speeds[speeds["clients"] == clients[-1]].set_index("server")["first_median"]
    _title(ax, f"{clients[-1]} clients wait {last.min():.2g} to {last.max():.2g} s for the first piece")
    return ax
