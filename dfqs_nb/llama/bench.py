"""Time one model under many settings, in turn, and say which is the fastest and by how much.

The columns are those of llama.cpp's llama-bench. Every round times each setting once, so what else runs on
the machine slows all of them alike, and a gain is the ratio within a round.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings, llama_version
from dfqs_nb.llama.timing import time_once

if TYPE_CHECKING:
    import pandas as pd

RAPL = Path("/sys/class/powercap")
PARAMETERS = (
    "n_batch",
    "n_ubatch",
    "n_threads",
    "type_k",
    "type_v",
    "n_gpu_layers",
    "flash_attn",
)
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
    """What was timed: ``seconds`` of each case by round, ``joules`` where they can be read."""

    model: Path
    cases: Sequence[Case]
    seconds: Mapping[int, Sequence[float]]
    joules: Mapping[int, Sequence[float]]
    facts: Mapping[str, Any] = field(repr=False)
    failed: Mapping[int, str] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """A row a case, in llama-bench's columns, and ``joules_per_token`` (NaN: not readable)."""
        import pandas as pd

        rows = []
        for number, case in enumerate(self.cases):
            if number not in self.seconds:
                continue
            n, seconds = case.n_prompt or case.n_gen, self.seconds[number]
            speeds, nanos = [n / second for second in seconds], [1e9 * second for second in seconds]
            joules = self.joules.get(number, ())
            rows.append(
                {
                    **self.facts,
                    **{name: getattr(case.settings, name) for name in PARAMETERS},
                    "n_prompt": case.n_prompt,
                    "n_gen": case.n_gen,
                    "n_depth": case.n_depth,
                    "avg_ns": round(mean(nanos)),
                    "stddev_ns": round(stdev(nanos)) if len(nanos) > 1 else 0,
                    "avg_ts": mean(speeds),
                    "stddev_ts": stdev(speeds) if len(speeds) > 1 else 0.0,
                    "joules_per_token": median(joules) / n if joules else float("nan"),
                }
            )
        return pd.DataFrame(rows)

    def advice(self) -> list[str]:
        """For each test, the fastest setting beside the first one, with the range of the rounds' ratios."""
        lines = []
        for name in dict.fromkeys(case.name for case in self.cases):
            own = [at for at, case in enumerate(self.cases) if case.name == name and at in self.seconds]
            if len(own) < 2:
                continue
            first = own[0]
            gains = {
                at: [a / b for a, b in zip(self.seconds[first], self.seconds[at], strict=True)] for at in own
            }
            faster = [at for at in own if min(gains[at]) > 1]
            if not faster:
                lines.append(f"{name}: no setting is faster than the first in every round")
                continue
            best = min(faster, key=lambda at: median(self.seconds[at]))
            ratios = gains[best]
            before, after = (self.cases[at].settings.as_dict() for at in (first, best))
            changed = ", ".join(f"{key}={after[key]}" for key in PARAMETERS if after[key] != before[key])
            spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds"
            lines.append(f"{name}: {changed} is {median(ratios):.2f} x as fast as the first ({spread})")
        return lines


def grid(
    base: OpenSettings, axes: Mapping[str, Sequence[Any]], n_prompt: int, n_gen: int, depths: Sequence[int]
) -> list[Case]:
    """Every combination of values, each with its prefill and its decode test at every depth.

    Args:
        axes: values by field of the settings; ``cache_type`` is both ``type_k`` and ``type_v``.

    >>> [case.name for case in grid(OpenSettings(n_threads=1), {}, 512, 128, [0, 1024])]
    ['pp512', 'tg128', 'pp512 @ d1024', 'tg128 @ d1024']

    Raises:
        ModelError: a value that no setting can have.
    """
    if min(depths, default=0) < 0 or not (n_prompt or n_gen):
        raise ModelError("there is nothing to time", hint="give a depth of 0 or more, and --prompt or --gen")
    cases = []
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        if cache := fields.pop("cache_type", None):
            fields |= {"type_k": cache, "type_v": cache}
        settings = replace(base, **fields)
        for depth in depths:
            room = replace(settings, n_ctx=max(depth + max(n_prompt, n_gen), WARM_UP + 4))
            cases += [Case(room, n_prompt, 0, depth)] if n_prompt else []
            cases += [Case(room, 0, n_gen, depth)] if n_gen else []
    return cases


def run(path: str | Path, cases: Sequence[Case], rounds: int = 5, budget_minutes: float = 10.0) -> Bench:
    """Time all cases, round after round, until the budget is used; the first round is always finished.

    The model is opened anew for each setting and round. A setting under which llama.cpp refuses the model is
    named in ``failed`` and left out.

    Raises:
        HeaderError, ShardError, ModelError: the file is no sound model, or nothing opens it.
    """
    seconds: dict[int, list[float]] = {}
    joules: dict[int, list[float]] = {}
    failed: dict[int, str] = {}
    facts: dict[str, Any] = {}
    began = time.monotonic()
    for turn in tqdm(range(rounds), desc="rounds", leave=False):
        if turn and (time.monotonic() - began) * (turn + 1) / turn > 60 * budget_minutes:
            break
        for settings, group in itertools.groupby(enumerate(cases), key=lambda pair: pair[1].settings):
            chosen = [pair for pair in group if pair[0] not in failed]
            if not chosen:
                continue
            try:
                with open_model(path, settings, trial=turn == 0) as model:
                    facts = facts or describe(model)
                    for number, case in chosen:
                        with _energy(joules.setdefault(number, [])):
                            seconds.setdefault(number, []).append(_time(model, case))
            except DfqsError as error:
                if len(failed) + len(chosen) == len(cases):
                    raise
                failed |= {number: str(error) for number, _ in chosen}
                for number, _ in chosen:
                    seconds.pop(number, None)
    return Bench(Path(path), cases, seconds, joules, facts, failed)


def describe(model: Model) -> dict[str, Any]:
    """The model and the build, in llama-bench's columns."""
    import platform

    headers = open_shards(model.path).as_one
    return {
        "build_commit": f"llama-cpp-python {llama_version()}",
        "cpu_info": platform.processor() or platform.machine(),
        "model_filename": model.path.name,
        "model_type": model.header.architecture,
        "model_size": model.memory.weights_bytes,
        "model_n_params": sum(tensor.n_elements for tensor in headers.tensors),
    }


def _time(model: Model, case: Case) -> float:
    """Seconds of the test alone, on seeded random tokens, after a short warm-up."""
    tokens = np.random.default_rng(42).integers(0, model.n_vocab, model.settings.n_ctx).tolist()
    time_once(model, tokens[:WARM_UP], tokens[:4])
    prompt, rest = tokens[: case.n_depth], tokens[case.n_depth :]
    if case.n_prompt:
        model.clear()
        if prompt:
            model.decode(prompt)
            model.synchronize()
        started = time.perf_counter()
        model.decode(rest[: case.n_prompt])
        model.synchronize()
        return time.perf_counter() - started
    return time_once(model, prompt or tokens[:1], rest[: case.n_gen])[1]


@contextmanager
def _energy(kept: list[float]) -> Iterator[None]:
    """Append the joules that the processor's packages took in the block, where they can be read."""
    before = dict(_counters())
    yield
    after = dict(_counters())
    if before and after.keys() == before.keys():
        kept.append(sum((after[name][0] - start) % span for name, (start, span) in before.items()) / 1e6)


def _counters() -> Iterator[tuple[str, tuple[int, int]]]:
    """Microjoules so far, and where the counter begins anew, of each package."""
    for folder in sorted(RAPL.glob("intel-rapl:[0-9]")):
        with suppress(OSError, ValueError):
            span = int((folder / "max_energy_range_uj").read_text())
            yield folder.name, (int((folder / "energy_uj").read_text()), span + 1)
