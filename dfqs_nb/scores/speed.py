"""How fast a model can run: a token of decode reads every active weight, so bandwidth sets a roof."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.errors import StageError
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.core.stage import read_stage
from dfqs_nb.gguf.facts import parameters
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.timing import METRIC_DEPTH

if TYPE_CHECKING:
    import pandas as pd

CLEARLY = 1.1  # times as fast as the fastest repetition
CACHE_BYTES = 32e6  # that a processor's cache can hold, or most of it


def with_roof(speeds: pd.DataFrame, model: Model, bandwidth: float) -> pd.DataFrame:
    """Speeds by `llama.timing.measure_speed`, with ``roof`` (tokens a second) and ``utilisation`` of decode.

    ``bandwidth``: bytes a second that the model's threads read from memory together. Both are NaN where all
    weights fit in the cache (`CACHE_BYTES`), because memory then sets no roof.
    """
    weights = parameters(model.header, in_bytes=True)
    timed = speeds.assign(roof=bandwidth / weights.active)
    timed["roof"] = timed["roof"].where((timed["phase"] == "decode") & (weights.total >= CACHE_BYTES))
    return timed.assign(utilisation=timed["median"] / timed["roof"])


def metric_row(speeds: pd.DataFrame) -> pd.Series:
    """The row of decode that gives ``cpu_tokens_per_sec``: depth 512, else the deepest that was timed."""
    decode = speeds[speeds["phase"] == "decode"].set_index("depth", drop=False)
    return decode.loc[METRIC_DEPTH if METRIC_DEPTH in decode.index else decode.index[-1]]


def beside_notebook_03(speeds: pd.DataFrame, folder: Path, conditions: Mapping[str, Any]) -> pd.DataFrame:
    """Speeds, all ``contended`` if notebook 03 of this run timed the same decode clearly faster.

    A host that slows its machine shows there as no work of others; only another time of measurement tells.
    The metric's row then holds that speed as ``notebook_03``. ``conditions``: of the model, with its hash.
    """
    row = metric_row(speeds)
    with suppress(StageError):  # notebook 06 may run alone
        before = read_stage(folder, "generate")
        if differing_fields(before["conditions"], conditions).keys() - {"n_ctx", "seed"}:
            return speeds
        for other in before["speed"]:
            same = other["phase"] == "decode" and other["depth"] == row["depth"]
            if same and other["min"] > CLEARLY * row["max"]:
                at = (speeds["phase"] == "decode") & (speeds["depth"] == row["depth"])
                faster = at.map({True: other["median"]})
                return speeds.assign(contended=True, notebook_03=faster)
    return speeds
