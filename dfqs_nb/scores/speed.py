"""How fast a model can run: a token of decode reads every active weight, so bandwidth sets a roof."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from math import nan
from typing import TYPE_CHECKING

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.memory import FLASH, ActiveBytes, active_bytes
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.timing import METRIC_DEPTH

if TYPE_CHECKING:
    import pandas as pd

# What weights are read from: its name, bytes of them that it holds, bytes a second.
Place = tuple[str, float, float]


def with_roof(speeds: pd.DataFrame, model: Model, bandwidth: float) -> pd.DataFrame:
    """Speeds by `llama.timing.measure_speed`, with ``roof`` (tokens a second) and ``utilisation`` of decode.

    ``bandwidth``: bytes a second that all cores read from memory together. The cache is not counted.
    """
    timed = speeds.assign(roof=bandwidth / active_bytes(model.header).total)
    timed["roof"] = timed["roof"].where(timed["phase"] == "decode")
    return timed.assign(utilisation=timed["median"] / timed["roof"])


def metric_row(speeds: pd.DataFrame) -> pd.Series:
    """The row of decode that gives ``cpu_tokens_per_sec``: depth 512, else the deepest that was timed."""
    decode = speeds[speeds["phase"] == "decode"].set_index("depth", drop=False)
    return decode.loc[METRIC_DEPTH if METRIC_DEPTH in decode.index else decode.index[-1]]


def speed_bound(weights: ActiveBytes, places: Sequence[Place]) -> tuple[float, dict[str, float]]:
    """The most tokens a second that reading allows, and what part of a token's bytes comes from each place.

    ``places`` in order of preference: what every token uses lies in the first, as a cache would have it;
    experts fill what is left, and are chosen evenly. The parts of a token are read one after another.

    >>> weights = ActiveBytes(dense=4, routed=1, routed_total=10, weights=14)
    >>> speed_bound(weights, [("memory", 9, 9.0), ("disk", 99, 1.0)])
    (1.0, {'memory': 0.9, 'disk': 0.1})
    """
    experts = weights.weights - weights.dense
    dense, routed, seconds, shares = float(weights.dense), float(experts), 0.0, {}
    for name, capacity_bytes, bytes_per_sec in places:
        here = min(dense, capacity_bytes)
        there = min(routed, capacity_bytes - here)
        dense, routed = dense - here, routed - there
        read = here + weights.routed * (there / max(experts, 1))
        seconds += read / bytes_per_sec
        shares[name] = read / weights.total
    if dense + routed > 1:
        raise DfqsError(f"no place holds {(dense + routed) / 1e9:,.1f} GB of the weights", hint="add a disk")
    return 1 / seconds, shares


def card_table(weights: ActiveBytes = FLASH) -> pd.DataFrame:
    """What the card claims beside what reading allows.

    Columns: ``machine``, ``claimed_low``, ``claimed_high``, ``bound`` (tokens a second), ``from_disk`` (share
    of a token's bytes), ``reached`` (the claim's upper end / the bound; NaN where nothing is claimed).
    ``weights``: bytes a token, by default those of DeepSeek-V4-Flash-IQ1_S-XL.
    """
    import pandas as pd

    card = tomllib.loads((data_dir() / "spec" / "card_speeds.toml").read_text(encoding="utf-8"))["machine"]
    rows = []
    for machine in card:
        low, high = machine.get("claimed", (nan, nan))
        bound, shares = speed_bound(weights, [tuple(place) for place in machine["places"]])
        rows.append((machine["name"], low, high, bound, shares.get("disk", 0.0), high / bound))
    names = ["machine", "claimed_low", "claimed_high", "bound", "from_disk", "reached"]
    return pd.DataFrame(rows, columns=names)
