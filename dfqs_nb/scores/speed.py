"""How fast a model can run: a token of decode reads every active weight, so bandwidth sets a roof."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfqs_nb.gguf.facts import parameters
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.timing import METRIC_DEPTH

if TYPE_CHECKING:
    import pandas as pd


def with_roof(speeds: pd.DataFrame, model: Model, bandwidth: float) -> pd.DataFrame:
    """Speeds by `llama.timing.measure_speed`, with ``roof`` (tokens a second) and ``utilisation`` of decode.

    ``bandwidth``: bytes a second that all cores read from memory together. The cache is not counted.
    """
    timed = speeds.assign(roof=bandwidth / parameters(model.header, in_bytes=True).active)
    timed["roof"] = timed["roof"].where(timed["phase"] == "decode")
    return timed.assign(utilisation=timed["median"] / timed["roof"])


def metric_row(speeds: pd.DataFrame) -> pd.Series:
    """The row of decode that gives ``cpu_tokens_per_sec``: depth 512, else the deepest that was timed."""
    decode = speeds[speeds["phase"] == "decode"].set_index("depth", drop=False)
    return decode.loc[METRIC_DEPTH if METRIC_DEPTH in decode.index else decode.index[-1]]
