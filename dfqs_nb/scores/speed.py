"""How fast a model can run: a token of decode reads every active weight, so bandwidth sets a roof."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from dfqs_nb.core.errors import StageError
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.core.stage import read_stage
from dfqs_nb.gguf.facts import parameters
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.timing import METRIC_DEPTH, spread
from dfqs_nb.stats import LEVEL

CLEARLY = 1.1  # times as fast
CACHE_BYTES = 32e6  # that a processor's cache can hold, or most of it


def with_roof(speeds: pd.DataFrame, model: Model, bandwidth: float) -> pd.DataFrame:
    """Speeds by `llama.timing.measure_speed`, with ``roof`` (tokens a second) and ``utilisation`` of decode.

    ``bandwidth``: bytes a second that the model's threads read from memory together. Both are NaN where all
    weights fit in the cache (`CACHE_BYTES`) or layers lie on a GPU, because memory then sets no roof.
    """
    weights = parameters(model.header, in_bytes=True)
    from_memory = weights.total >= CACHE_BYTES and not model.loaded.get("offloaded_layers")
    timed = speeds.assign(roof=bandwidth / weights.active)
    timed["roof"] = timed["roof"].where((timed["phase"] == "decode") & from_memory)
    return timed.assign(utilisation=timed["median"] / timed["roof"])


def metric_row(speeds: pd.DataFrame) -> pd.Series:
    """The row of decode that gives ``cpu_tokens_per_sec``: depth 512, else the deepest that was timed."""
    decode = speeds[speeds["phase"] == "decode"].set_index("depth", drop=False)
    return decode.loc[METRIC_DEPTH if METRIC_DEPTH in decode.index else decode.index[-1]]


def beside_notebook_03(speeds: pd.DataFrame, folder: Path, conditions: Mapping[str, Any]) -> pd.DataFrame:
    """Speeds, with ``notebook_03`` in the metric's row: the same decode as notebook 03 of this run timed it.

    All are ``contended`` where that was clearly faster: its median by more than 10 %, and its repetitions by
    Mann and Whitney's exact rank test (one-sided, 5 %), which single ones never pass. A host that slows its
    machine shows there as no work of others. ``conditions``: of the model, with its hash.
    """
    from scipy.stats import mannwhitneyu

    row = metric_row(speeds)
    with suppress(StageError):  # notebook 06 may run alone
        before = read_stage(folder, "generate")
        if differing_fields(before["conditions"], conditions).keys() - {"n_ctx", "seed"}:
            return speeds
        for other in before["speed"]:
            if all(other[key] == row[key] for key in ("phase", "depth", "tokens")):
                rank = mannwhitneyu(other["values"], row["values"], alternative="greater", method="exact")
                slowed = rank.pvalue <= 1 - LEVEL and other["median"] > CLEARLY * row["median"]
                at = (speeds["phase"] == "decode") & (speeds["depth"] == row["depth"])
                beside = at.map({True: f"{other['median']:,.1f} {spread(other)}"})
                return speeds.assign(notebook_03=beside, contended=speeds["contended"] | slowed)
    return speeds
