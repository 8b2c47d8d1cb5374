"""Time one model under many settings, in turn, and name the fastest.

The columns are those of llama.cpp's llama-bench. Every round times each setting once, so other work on the
machine slows all of them alike. A gain is the ratio within a round.
"""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings, llama_version
from dfqs_nb.llama.timing import time_once

RAPL = Path("/sys/class/powercap")
PARAMETERS = ("n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_gpu_layers", "flash_attn")
WARM_UP = 16


class Case(NamedTuple):
    """A setting, and what is timed: ``n_prompt`` tokens at once, or ``n_gen`` one by one, at a depth."""

    settings: OpenSettings
    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def name(self) -> str:
        """The test as llama-bench calls it."""
        what = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{what} @ d{self.n_depth}" if self.n_depth else what


def grid(
    base: OpenSettings, axes: Mapping[str, Sequence[Any]], n_prompt: int, n_gen: int, depths: Sequence[int]
) -> list[Case]:
    """Every combination of values, each with its prefill and its decode test at every depth.

    ``axes``: values by field of the settings; ``cache_type`` is both ``type_k`` and ``type_v``.

    >>> [case.name for case in grid(OpenSettings(n_threads=1), {}, 512, 128, [0, 1024])]
    ['pp512', 'tg128', 'pp512 @ d1024', 'tg128 @ d1024']
    """
    if min(depths, default=0) < 0 or not (n_prompt or n_gen):
        raise ModelError("there is nothing to time", hint="give a depth of 0 or more, and --prompt or --gen")
    cases = []
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        if cache := fields.pop("cache_type", None):
            fields |= {"type_k": cache, "type_v": cache}
        for depth in depths:
            n_ctx = max(depth + max(n_prompt, n_gen), WARM_UP + 4)
            settings = replace(base, n_ctx=n_ctx, **fields)
            cases += [Case(settings, n_prompt, 0, depth)] if n_prompt else []
            cases += [Case(settings, 0, n_gen, depth)] if n_gen else []
    return cases


def run(
    path: str | Path, cases: Sequence[Case], rounds: int = 5, budget_minutes: float = 10.0
) -> tuple[pd.DataFrame, list[str]]:
    """Time all cases, round after round, until the budget is used; the first round is always finished.

    The model is opened anew for each setting and round. If none opens it, `open_model`'s error is raised.

    Returns:
        A row a timed case and round: llama-bench's columns of model, setting and test, ``case`` (its number),
        ``name``, ``round``, ``seconds`` and ``joules`` (NaN: not readable); and why settings were refused.
    """
    rows, failed, began = list[dict[str, Any]](), dict[OpenSettings, str](), time.monotonic()
    for turn in tqdm(range(rounds), desc="rounds", leave=False):
        if turn and (time.monotonic() - began) * (turn + 1) / turn > 60 * budget_minutes:
            break
        for settings, same in itertools.groupby(enumerate(cases), key=lambda pair: pair[1].settings):
            if settings in failed:
                continue
            try:
                with open_model(path, settings, trial=turn == 0) as model:
                    for number, case in same:
                        about = {"case": number, "name": case.name, "round": turn}
                        rows.append(about | _facts(model, case) | _timed(model, case))
            except DfqsError as error:
                failed[settings] = str(error)
                if len(failed) == len({case.settings for case in cases}):
                    raise
    kept = [row for row in rows if cases[row["case"]].settings not in failed]
    return pd.DataFrame(kept), list(failed.values())


def _facts(model: Model, case: Case) -> dict[str, Any]:
    """Model, build, setting and test, in llama-bench's columns."""
    return {
        "build_commit": f"llama-cpp-python {llama_version()}",
        "cpu_info": platform.processor() or platform.machine(),
        "model_filename": model.path.name,
        "model_type": model.header.architecture,
        "model_size": model.memory.weights_bytes,
        "model_n_params": sum(tensor.n_elements for tensor in model.header.tensors),
        **{name: getattr(case.settings, name) for name in PARAMETERS},
        **{name: getattr(case, name) for name in ("n_prompt", "n_gen", "n_depth")},
    }


def _timed(model: Model, case: Case) -> dict[str, float]:
    """Seconds and joules of the test alone, on seeded random tokens, after a short warm-up."""
    tokens = np.random.default_rng(42).integers(0, model.n_vocab, model.settings.n_ctx).tolist()
    time_once(model, tokens[:WARM_UP], tokens[:4])
    prefix, timed = tokens[: case.n_depth], tokens[case.n_depth :]
    model.clear()
    if prefix:
        model.decode(prefix)
        model.synchronize()
    before, started = _counters(), time.perf_counter()
    for part in [timed[: case.n_prompt]] if case.n_prompt else [[token] for token in timed[: case.n_gen]]:
        model.decode(part)
        model.synchronize()
    return {"seconds": time.perf_counter() - started, "joules": _joules_since(before)}


def table(timed: pd.DataFrame) -> pd.DataFrame:
    """One row a case, in llama-bench's columns, and ``joules_per_token``, from the rows of `run`."""
    n = timed["n_prompt"] + timed["n_gen"]
    times, speeds, joules = 1e9 * timed["seconds"], n / timed["seconds"], timed["joules"] / n
    groups = timed.assign(ns=times, ts=speeds, joules_per_token=joules).groupby("case")
    made = groups.first().drop(columns=["name", "round", "seconds", "joules", "ns", "ts"])
    for unit in ("ns", "ts"):
        made[f"avg_{unit}"] = groups[unit].mean()
        made[f"stddev_{unit}"] = groups[unit].std().fillna(0.0)
    return made.assign(joules_per_token=groups["joules_per_token"].median())


def advice(timed: pd.DataFrame) -> list[str]:
    """For each test, the fastest setting beside the first one, with the range of the rounds' ratios."""
    lines = []
    for name, rows in timed.groupby("name", sort=False):
        seconds = rows.pivot(index="round", columns="case", values="seconds")
        gains = seconds.rdiv(seconds.iloc[:, 0], axis=0)
        faster = gains.columns[gains.min() > 1]
        if len(faster):
            best = seconds[faster].median().idxmin()
            before, after = (rows[rows["case"] == case].iloc[0] for case in (seconds.columns[0], best))
            changed = ", ".join(f"{key}={after[key]}" for key in PARAMETERS if after[key] != before[key])
            spread = f"{gains[best].min():.2f} to {gains[best].max():.2f} in {len(gains)} rounds"
            lines.append(f"{name}: {changed} is {gains[best].median():.2f} x as fast as the first ({spread})")
        elif seconds.shape[1] > 1:
            lines.append(f"{name}: no setting is faster than the first in every round")
    return lines


def _counters() -> dict[str, tuple[int, int]]:
    """Microjoules so far of each package, and where its counter begins anew; empty: not readable."""
    with suppress(OSError, ValueError):
        names = ("energy_uj", "max_energy_range_uj")
        folders = sorted(RAPL.glob("intel-rapl:[0-9]"))
        read = {folder.name: [int((folder / name).read_text()) for name in names] for folder in folders}
        return {package: (used, most + 1) for package, (used, most) in read.items()}
    return {}


def _joules_since(before: dict[str, tuple[int, int]]) -> float:
    after = _counters()
    if not before or after.keys() != before.keys():
        return nan
    return sum((after[package][0] - used) % span for package, (used, span) in before.items()) / 1e6
