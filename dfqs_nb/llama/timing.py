"""Time a model: a short probe for plans, prefill and decode by depth, and many settings side by side.

`bench` has the columns of llama.cpp's llama-bench. Each of its rounds times every setting once, so other work
on the machine slows all of them alike. A gain is the ratio within a round.
"""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.budget import duration, fit
from dfqs_nb.core.display import quoted, tqdm
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.machine import watched_load
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings, llama_version

if TYPE_CHECKING:
    import pandas as pd

PROBE_PROMPT, PROBE_ANSWER, PROBE_SECONDS = 16, 4, 10.0  # of the probe, and of every warm-up
PROMPT_TOKENS = 32  # of a short question in its template
METRIC_DEPTH = 512  # of ``cpu_tokens_per_sec``
NAMES = {"n_answers": "answers", "max_tokens": "tokens of an answer", "depths": "timed depths"}
NAMES |= {"n_tokens": "timed tokens", "repetitions": "timed repetitions"}
# what a plan that exceeds its budget gives up, in this order
CUTS = [{"repetitions": 3}, {"n_tokens": 32}, {"max_tokens": 32}, {"depths": 2}, {"n_tokens": 8}]
CUTS += [{"max_tokens": 8}, {"repetitions": 1}, {"depths": 1}, {"max_tokens": 2}, {"n_answers": 3}]
CUTS += [{"n_answers": 1}]
PARAMETERS = ["n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_gpu_layers", "flash_attn"]
SPREAD = {"avg": "mean", "stddev": "std"}
RAPL = Path("/sys/class/powercap")  # counters of energy, of Intel and AMD processors


@dataclass(frozen=True)
class Pace:
    """Seconds that a token of prompt and a token of answer take at a short context."""

    prefill: float
    decode: float

    def seconds(self, n_prompt: float, n_answer: float) -> float:
        """Seconds of a prompt and an answer of so many tokens."""
        return n_prompt * self.prefill + n_answer * self.decode


def seconds_of(model: Model, batches: Iterable[Sequence[int]]) -> float:
    """Seconds until all batches of tokens are computed, one after another."""
    started = time.perf_counter()
    for batch in batches:
        model.decode(batch)
    return time.perf_counter() - started


def time_once(model: Model, prompt: Sequence[int], forced: Sequence[int]) -> tuple[float, float]:
    """Seconds of a prefill from a cleared context, and of the decode of all forced tokens behind it."""
    model.clear()
    return seconds_of(model, [prompt]), seconds_of(model, ([token] for token in forced))


def rounds(n: int, seconds: float = inf) -> Iterator[int]:
    """Count up to ``n`` rounds while another one should end within these seconds; the first always runs."""
    began = time.monotonic()
    for done in tqdm(range(n), desc="timing", leave=False):
        if done and (time.monotonic() - began) * (done + 1) / done > seconds:
            break
        yield done


def probe(model: Model) -> Pace:
    """Time a few tokens: three times, unless the first took long; the fastest counts.

    The first time reads weights from the disk, which later tokens find in memory.
    """
    tokens = random_tokens(model, PROBE_PROMPT + PROBE_ANSWER)
    times = [time_once(model, tokens[:PROBE_PROMPT], tokens[PROBE_PROMPT:]) for _ in rounds(3, PROBE_SECONDS)]
    model.clear()
    prefill, decode = (min(seconds) for seconds in zip(*times, strict=True))
    return Pace(prefill / PROBE_PROMPT, decode / PROBE_ANSWER)


def random_tokens(model: Model, n: int, seed: int = 42) -> list[int]:
    """Seeded tokens of the vocabulary."""
    tokens: list[int] = np.random.default_rng(seed).integers(0, model.n_vocab, n).tolist()
    return tokens


def measure_speed(
    model: Model,
    depths: Iterable[int] = (METRIC_DEPTH,),
    n_tokens: int = 128,
    repetitions: int = 5,
    seed: int = 42,
    seconds: float = inf,
) -> pd.DataFrame:
    """Time prefill of as many seeded random tokens as each depth, then decode of ``n_tokens`` one by one.

    No token is sampled, and each repetition starts from a cleared context, after a warm-up. A depth has fewer
    repetitions if they do not fit in its share of the ``seconds``. Its tokens must fit in ``n_ctx``.

    A row a depth and ``phase`` (prefill, decode): ``depth``, ``n_threads``, ``repetitions``, ``tokens``;
    tokens a second as ``median``, ``min``, ``max`` and ``values`` in order; ``other_cores`` that other
    programs used, and whether that was enough to slow it (``contended``).
    """
    import pandas as pd

    rows, depths = [], list(depths)
    for depth in depths:
        tokens = random_tokens(model, depth + n_tokens, seed)
        prompt, forced = tokens[:depth], tokens[depth:]
        model.clear()
        model.check_room(tokens)
        time_once(model, prompt[:PROBE_PROMPT], forced[:PROBE_ANSWER])
        with watched_load() as load:
            times = [time_once(model, prompt, forced) for _ in rounds(repetitions, seconds / len(depths))]
        prefill, decode = zip(*times, strict=True)
        for phase, n, taken in (("prefill", depth, prefill), ("decode", n_tokens, decode)):
            row = {"phase": phase, "depth": depth, "n_threads": model.settings.n_threads}
            speeds = tuple(n / each for each in taken)
            row |= {"repetitions": len(speeds), "tokens": n, "median": np.median(speeds)}
            row |= {"min": min(speeds), "max": max(speeds), "values": speeds}
            rows.append(row | {"other_cores": load.other_cores, "contended": load.contended})
    model.clear()
    return pd.DataFrame(rows)


def sentence(row: pd.Series, notebook: str, run: str) -> str:
    """A row of decode in words; where it was contended, with the command that measures this run again."""
    spread = f"({row['min']:,.1f} to {row['max']:,.1f}, n = {row['repetitions']})"
    text = f"decode {row['median']:,.1f} tokens/s at depth {row['depth']} {spread}"
    again = " ".join(["dfqs-nb run", notebook, "--run", quoted(run)])
    busy = f", contended: other programs were busy. Repeat it on a quiet machine: `{again}`"
    return text + busy * bool(row["contended"])


def plan_cost(
    pace: Pace,
    depths: Sequence[int],
    seconds: float,
    n_tokens: int = 128,
    repetitions: int = 5,
    n_answers: int = 0,
    max_tokens: int = 0,
) -> SimpleNamespace:
    """Plan answers of full length and `measure_speed`, cut (by `CUTS`) to these seconds; depth 512 stays.

    The result has the numbers given and the ``depths``, as cut, the fields of `budget.Fitted`, ``until`` (the
    time by `time.monotonic` at which answering stops, so that timing has its time) and a ``sentence``.
    """
    order = sorted(depths, key=lambda depth: (depth != METRIC_DEPTH, depth))

    def timing(plan: dict[str, int]) -> float:
        warm_up, timed = pace.seconds(PROBE_PROMPT, PROBE_ANSWER), order[: plan["depths"]]
        repeated = plan["repetitions"] * sum(pace.seconds(depth, plan["n_tokens"]) for depth in timed)
        return repeated + warm_up * len(timed)

    def total(plan: dict[str, int]) -> float:
        return plan["n_answers"] * pace.seconds(PROMPT_TOKENS, plan["max_tokens"]) + timing(plan)

    plan = {"n_answers": n_answers, "max_tokens": max_tokens, "depths": len(order)}
    fitted = fit(plan | {"n_tokens": n_tokens, "repetitions": repetitions}, CUTS, total, seconds, NAMES)
    left = max(0.0, seconds - timing(fitted.values))
    cost = SimpleNamespace(**(vars(fitted) | fitted.values), until=time.monotonic() + left)
    cost.depths = sorted(order[: cost.depths])
    at = " and ".join(f"{depth:,}" for depth in cost.depths)
    cost.sentence = (
        f"about {duration(cost.seconds)}: answers of up to {cost.max_tokens} tokens, then "
        f"{cost.repetitions} x {cost.n_tokens} timed tokens at depth {at}"
    )
    if cost.left_out:
        cost.sentence += f" (cut to fit the budget; {duration(cost.full_seconds)} in full)"
    if left < inf:
        cost.sentence += f"; answering stops after {duration(left)}, also inside a question"
    return cost


# ---- many settings ----


def bench(
    path: str | Path,
    axes: Mapping[str, Sequence[Any]],
    n_prompt: int = 512,
    n_gen: int = 128,
    depths: Sequence[int] = (0,),
    n_rounds: int = 5,
    budget_minutes: float = 10.0,
) -> tuple[pd.DataFrame, list[str]]:
    """Time every combination of settings, round after round in the budget; the first round always ends.

    ``axes``: values by field of `OpenSettings`; ``type_v`` is ``type_k``. At each depth ``n_prompt`` tokens
    are evaluated at once, and from it again ``n_gen`` one by one; 0: not at all.

    Returns a row a setting (its number), round and test, in llama-bench's columns, with ``seconds`` and
    ``joules`` (NaN: not readable), and why settings were refused; if all are, it raises `open_model`'s error.
    """
    import pandas as pd

    tests = [test for depth in depths for test in ((n_prompt, 0, depth), (0, n_gen, depth)) if any(test[:2])]
    if min(depths, default=0) < 0 or not tests:
        raise ModelError("there is nothing to time", hint="give a depth of 0 or more, and --prompt or --gen")
    n_ctx, rows, refused = max(PROBE_PROMPT + PROBE_ANSWER, *map(sum, tests)), dict[OpenSettings, Any](), []
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        rows[OpenSettings(n_ctx=n_ctx, type_v=fields.get("type_k", "f16"), **fields)] = []
    for turn in rounds(n_rounds, 60 * budget_minutes):
        for settings, own in list(rows.items()):
            try:
                with open_model(path, settings, trial=turn == 0) as model:
                    own += [{"round": turn} | _timed(model, *test) for test in tests]
            except DfqsError as error:
                refused.append(str(error))
                del rows[settings]
                if not rows:
                    raise
    timed = [{"setting": number} | row for number, own in enumerate(rows.values()) for row in own]
    return pd.DataFrame(timed), refused


def _timed(model: Model, n_prompt: int, n_gen: int, n_depth: int) -> dict[str, Any]:
    """A test, after a short warm-up, in llama-bench's columns, with its seconds and joules."""
    tokens = random_tokens(model, model.settings.n_ctx)
    time_once(model, tokens[:PROBE_PROMPT], tokens[:PROBE_ANSWER])
    prefix, timed = tokens[:n_depth], tokens[n_depth:]
    model.clear()
    seconds_of(model, [prefix] if prefix else [])
    name, before = f"pp{n_prompt}" if n_prompt else f"tg{n_gen}", energy()
    seconds = seconds_of(model, [timed[:n_prompt]] if n_prompt else [[token] for token in timed[:n_gen]])
    joules = joules_between(before, energy())
    return {
        "build_commit": f"llama-cpp-python {llama_version()}",
        "cpu_info": platform.processor() or platform.machine(),
        "model_filename": model.path.name,
        "model_type": model.header.architecture,
        "model_size": model.memory.weights_bytes,
        "model_n_params": sum(tensor.n_elements for tensor in model.header.tensors),
        **{name: getattr(model.settings, name) for name in PARAMETERS},
        **{"n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth},
        "test": f"{name} @ d{n_depth}" if n_depth else name,
        "seconds": seconds,
        "joules": joules,
    }


def energy() -> list[tuple[int, int]]:
    """Microjoules so far of each package, and where its counter begins anew; empty: not readable."""
    names, folders = ("energy_uj", "max_energy_range_uj"), sorted(RAPL.glob("intel-rapl:[0-9]"))
    with suppress(OSError, ValueError):
        read = [[int((folder / name).read_text()) for name in names] for folder in folders]
        return [(used, most + 1) for used, most in read]
    return []


def joules_between(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> float:
    """What all packages used together; NaN: not readable."""
    used = sum((now - then) % span for (then, span), (now, _) in zip(before, after, strict=False))
    return used / 1e6 or nan


def bench_table(timed: pd.DataFrame) -> pd.DataFrame:
    """The rows of `bench`, one a setting and test, in llama-bench's columns, and ``joules_per_token``."""
    n, measured = timed["n_prompt"] + timed["n_gen"], ["round", "seconds", "joules"]
    each = timed.assign(ns=1e9 * timed["seconds"], ts=n / timed["seconds"], joules=timed["joules"] / n)
    groups = each.groupby([name for name in timed if name not in measured], sort=False)
    columns = {f"{how}_{unit}": (unit, call) for unit in ("ns", "ts") for how, call in SPREAD.items()}
    table = groups.agg(**columns, joules_per_token=("joules", "median"))
    return table.fillna({"stddev_ns": 0.0, "stddev_ts": 0.0}).reset_index().drop(columns="setting")


def advice(timed: pd.DataFrame) -> list[str]:
    """For each test of `bench`, the fastest setting beside the first, with the range of the ratios."""
    lines = []
    for name, rows in timed.groupby("test", sort=False):
        seconds = rows.pivot(index="round", columns="setting", values="seconds")
        gains = seconds.rdiv(seconds.iloc[:, 0], axis=0)
        faster = gains.columns[gains.min() > 1]
        if len(faster):
            best = seconds[faster].median().idxmin()
            before, after = (rows[rows["setting"] == at].iloc[0] for at in (seconds.columns[0], best))
            changed = ", ".join(f"{key}={after[key]}" for key in PARAMETERS if after[key] != before[key])
            spread = f"{gains[best].min():.2f} to {gains[best].max():.2f} in {len(gains)} rounds"
            lines.append(f"{name}: {changed} is {gains[best].median():.2f} x as fast as the first ({spread})")
        elif seconds.shape[1] > 1:
            lines.append(f"{name}: no setting is faster than the first in every round")
    return lines
