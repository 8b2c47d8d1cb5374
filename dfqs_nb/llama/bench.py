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
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings, llama_version
from dfqs_nb.llama.timing import time_once

if TYPE_CHECKING:
    import pandas as pd

RAPL = Path("/sys/class/powercap")
PARAMETERS = ("n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_gpu_layers", "flash_attn")
WARM_UP = 16


@dataclass(frozen=True)
class Case:
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


@dataclass(frozen=True)
class Bench:
    """Seconds and joules of each case, by its number and round; ``failed``: why llama.cpp refused a case."""

    cases: Sequence[Case]
    seconds: Mapping[int, Sequence[float]]
    joules: Mapping[int, Sequence[float]]
    facts: Mapping[str, Any]
    failed: Mapping[int, str]

    def table(self) -> pd.DataFrame:
        """A row a timed case, in llama-bench's columns, and ``joules_per_token`` (NaN: not readable)."""
        import pandas as pd

        rows = []
        for number, seconds in sorted(self.seconds.items()):
            case = self.cases[number]
            sizes = {name: getattr(case, name) for name in ("n_prompt", "n_gen", "n_depth")}
            row = {**self.facts, **{name: getattr(case.settings, name) for name in PARAMETERS}, **sizes}
            n = case.n_prompt or case.n_gen
            speeds = [n / second for second in seconds]
            for unit, values in (("ns", [1e9 * second for second in seconds]), ("ts", speeds)):
                row[f"avg_{unit}"] = mean(values)
                row[f"stddev_{unit}"] = stdev(values) if len(values) > 1 else 0.0
            rows.append(row | {"joules_per_token": median(self.joules[number]) / n})
        return pd.DataFrame(rows)

    def advice(self) -> list[str]:
        """For each test, the fastest setting beside the first one, with the range of the rounds' ratios."""
        lines = []
        for name in dict.fromkeys(case.name for case in self.cases):
            numbers = [at for at in sorted(self.seconds) if self.cases[at].name == name]
            if len(numbers) < 2:
                continue
            first = self.seconds[numbers[0]]
            gains = {at: [a / b for a, b in zip(first, self.seconds[at], strict=True)] for at in numbers}
            faster = [at for at in numbers if min(gains[at]) > 1]
            if not faster:
                lines.append(f"{name}: no setting is faster than the first in every round")
                continue
            best = min(faster, key=lambda at: median(self.seconds[at]))
            before, after = (self.cases[at].settings.as_dict() for at in (numbers[0], best))
            changed = ", ".join(f"{key}={after[key]}" for key in PARAMETERS if after[key] != before[key])
            spread = f"{min(gains[best]):.2f} to {max(gains[best]):.2f} in {len(gains[best])} rounds"
            lines.append(f"{name}: {changed} is {median(gains[best]):.2f} x as fast as the first ({spread})")
        return lines


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


def run(path: str | Path, cases: Sequence[Case], rounds: int = 5, budget_minutes: float = 10.0) -> Bench:
    """Time all cases, round after round, until the budget is used; the first round is always finished.

    The model is opened anew for each setting and round. If none opens it, `open_model`'s error is raised.
    """
    seconds: dict[int, list[float]] = {}
    joules: dict[int, list[float]] = {}
    failed: dict[int, str] = {}
    facts: dict[str, Any] = {}
    began = time.monotonic()
    for turn in tqdm(range(rounds), desc="rounds", leave=False):
        if turn and (time.monotonic() - began) * (turn + 1) / turn > 60 * budget_minutes:
            break
        to_time = [pair for pair in enumerate(cases) if pair[0] not in failed]
        for settings, group in itertools.groupby(to_time, key=lambda pair: pair[1].settings):
            same = dict(group)
            try:
                with open_model(path, settings, trial=turn == 0) as model:
                    facts = facts or _facts(model)
                    for number, case in same.items():
                        before = _counters()
                        seconds.setdefault(number, []).append(_time(model, case))
                        joules.setdefault(number, []).append(_joules_since(before))
            except DfqsError as error:
                failed |= dict.fromkeys(same, str(error))
                if len(failed) == len(cases):
                    raise
    timed = {number: values for number, values in seconds.items() if number not in failed}
    return Bench(cases, timed, joules, facts, failed)


def _facts(model: Model) -> dict[str, Any]:
    """The model and the build, in llama-bench's columns."""
    return {
        "build_commit": f"llama-cpp-python {llama_version()}",
        "cpu_info": platform.processor() or platform.machine(),
        "model_filename": model.path.name,
        "model_type": model.header.architecture,
        "model_size": model.memory.weights_bytes,
        "model_n_params": sum(tensor.n_elements for tensor in model.header.tensors),
    }


def _time(model: Model, case: Case) -> float:
    """Seconds of the test alone, on seeded random tokens, after a short warm-up."""
    tokens = np.random.default_rng(42).integers(0, model.n_vocab, model.settings.n_ctx).tolist()
    time_once(model, tokens[:WARM_UP], tokens[:4])
    prefix, timed = tokens[: case.n_depth], tokens[case.n_depth :]
    model.clear()
    if prefix:
        model.decode(prefix)
        model.synchronize()
    started = time.perf_counter()
    for part in [timed[: case.n_prompt]] if case.n_prompt else [[token] for token in timed[: case.n_gen]]:
        model.decode(part)
        model.synchronize()
    return time.perf_counter() - started


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
