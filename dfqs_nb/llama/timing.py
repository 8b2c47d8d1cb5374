"""Time a model: a short probe for plans, speed by depth, and what a file larger than memory costs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from math import inf, isnan, nan
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dfqs_nb.core.display import duration, per_cent, quoted, size, tqdm
from dfqs_nb.core.machine import Disk, Load, available_memory, disk_bandwidth, read_bytes, watched_load
from dfqs_nb.core.stage import fit
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import Layout
from dfqs_nb.llama.build import HERE
from dfqs_nb.llama.model import Model

PROBE_PROMPT, PROBE_ANSWER, PROBE_SECONDS = 16, 4, 10.0  # of the probe, and of every warm-up
PROMPT_TOKENS, METRIC_DEPTH = 32, 512  # of a short question in its template; of ``cpu_tokens_per_sec``
NAMES = {"n_answers": "answers", "max_tokens": "tokens of an answer", "depths": "timed depths"}
NAMES |= {"n_tokens": "timed tokens", "repetitions": "timed repetitions"}
CUTS = [{"repetitions": 3}, {"n_tokens": 32}, {"max_tokens": 32}, {"depths": 2}, {"n_tokens": 8}]
CUTS += [{"max_tokens": 8}, {"repetitions": 1}, {"depths": 1}, {"max_tokens": 2}, {"n_answers": 3}]
CUTS += [{"n_answers": 1}]  # what a plan that exceeds its budget gives up, in this order
NOT_MEASURED = "not measured"


class Pace(NamedTuple):
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


def probe(model: Model) -> Pace:
    """Time a few tokens after a warm-up, twice unless that takes long; the faster time counts."""
    return Pace(*(1 / measure_speed(model, [PROBE_PROMPT], PROBE_ANSWER, 2, seconds=PROBE_SECONDS)["max"]))


def random_tokens(model: Model, n: int, seed: int = 42) -> list[int]:
    """Seeded tokens of the vocabulary."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, model.n_vocab, n)]


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

    def time_once(prompt: Sequence[int], forced: Sequence[int]) -> tuple[float, float]:
        model.clear()
        return seconds_of(model, [prompt]), seconds_of(model, ([token] for token in forced))

    rows, depths = [], list(depths)
    for depth in depths:
        model.clear()
        model.check_room(tokens := random_tokens(model, depth + n_tokens, seed))
        prompt, forced = tokens[:depth], tokens[depth:]
        time_once(prompt[:PROBE_PROMPT], forced[:PROBE_ANSWER])
        began, times = time.monotonic(), list[tuple[float, float]]()
        with watched_load() as load:
            for done in tqdm(range(1, repetitions + 1), desc="timing"):
                times.append(time_once(prompt, forced))
                if (time.monotonic() - began) * (done + 1) / done > seconds / len(depths):
                    break
        prefill, decode = zip(*times, strict=True)
        for phase, n, taken in (("prefill", depth, prefill), ("decode", n_tokens, decode)):
            row, speeds = {"phase": phase, "depth": depth}, tuple(n / each for each in taken)
            row |= {"n_threads": model.settings.n_threads, "repetitions": len(speeds), "tokens": n}
            row |= {"median": np.median(speeds), "min": min(speeds), "max": max(speeds), "values": speeds}
            rows.append(row | {"other_cores": load.other_cores, "contended": load.contended})
    model.clear()
    return pd.DataFrame(rows)


def spread(row: Mapping[str, Any]) -> str:
    """The range of a row of speeds, and the number of its repetitions."""
    return "({min:,.1f} to {max:,.1f}, n = {repetitions})".format(**row)


def sentence(row: pd.Series, notebook: str, run: str) -> str:
    """A row of decode in words; where it was contended, with the command that measures this run again."""
    text = f"decode {row['median']:,.1f} tokens/s at depth {row['depth']} {spread(row)}"
    why = "other programs were busy"
    if isinstance(before := row.get("notebook_03"), str):  # see `scores.speed`
        text += f"; notebook 03 of this run: {before}"
        if not Load(row["other_cores"]).contended:
            why, notebook = "notebook 03 was clearly faster, so the machine was slowed", f"03 {notebook}"
    again = " ".join(["dfqs-nb run", notebook, "--run", quoted(run)])
    return text + f"; contended: {why}. Repeat it on a quiet machine: `{again}`" * bool(row["contended"])


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

    The result has the numbers as cut, the fields of `stage.Fitted`, a ``sentence``, and ``until``, the time
    by `time.monotonic` at which answering stops, so that timing has its time.
    """
    order = sorted(depths, key=lambda depth: (depth != METRIC_DEPTH, depth))

    def timing(plan: dict[str, int]) -> float:
        once = sum(pace.seconds(depth, plan["n_tokens"]) for depth in order[: plan["depths"]])
        return plan["repetitions"] * once + plan["depths"] * pace.seconds(PROBE_PROMPT, PROBE_ANSWER)

    def total(plan: dict[str, int]) -> float:
        return plan["n_answers"] * pace.seconds(PROMPT_TOKENS, plan["max_tokens"]) + timing(plan)

    plan = {"n_answers": n_answers, "max_tokens": max_tokens, "depths": len(order)}
    fitted = fit(plan | {"n_tokens": n_tokens, "repetitions": repetitions}, CUTS, total, seconds, NAMES)
    left = max(0.0, seconds - timing(fitted.values))
    cost = SimpleNamespace(**(vars(fitted) | fitted.values), until=time.monotonic() + left)
    cost.depths = sorted(order[: cost.depths])
    at = " and ".join(f"{depth:,}" for depth in cost.depths)
    cut = f" (cut to fit the budget; {duration(cost.full_seconds)} in full)" if cost.left_out else ""
    late = f"; answering stops after {duration(left)}, even in the middle of an answer" if left < inf else ""
    timed = f"{cost.repetitions} x {cost.n_tokens} timed tokens at depth {at}{cut}{late}"
    answers = f"answers of up to {cost.max_tokens} tokens"
    cost.sentence = f"about {duration(cost.seconds)}: {answers}, then {timed}"
    return cost


class Forecast(NamedTuple):
    """What a token of decode will read. Experts are taken to be chosen evenly: bytes are upper bounds."""

    helped: int  # bytes from the disk with the paging help
    disk: Disk
    speed: float | None  # of the disk, bytes a second; None: not measured
    rows: dict[str, str]  # all of it, for people


def forecast(
    headers: Sequence[GGUFHeader],
    memory_bytes: int,
    disk_speed: float = nan,
    source: str = "while this model was loaded",
) -> Forecast:
    """What a token will read, from the headers of all shards, with so much memory for weights.

    Seconds hold while the disk is as fast as ``disk_speed`` (bytes a second), or as now for a second.
    """
    # Without help the kernel reads a window before and behind each missing page. llama.cpp doubles the read-
    # ahead (``POSIX_FADV_SEQUENTIAL``), so a slice of S bytes costs about S + 2 x read-ahead.
    layout = Layout.of(headers)
    parts = [part for layer in layout.experts.values() for part in layer]
    total, token = layout.expert_bytes, layout.token_bytes
    piece = sum(part.slice_bytes for part in parts) // len(parts) if parts else 1 << 20
    room, disk = memory_bytes - layout.dense_bytes, Disk.under(headers[0].path)
    cached = min(1.0, max(0.0, room / total)) if total else 1.0
    again, missing = min(max(0, -room), layout.dense_bytes), round(token * (1 - cached))
    windows = min(total, missing * (1 + 2 * (disk.read_ahead_bytes or 0) / piece))  # of no more than there is
    reads = {"with help": missing + again, "without help": round(max(missing, windows)) + again}
    helped, how = missing + again, NOT_MEASURED
    speed: float | None = None
    if not helped:
        how += ": no token reads from it"
    elif not isnan(disk_speed):
        speed, how = disk_speed, f"{size(disk_speed)}/s {source}"
    else:
        speed, why = disk_bandwidth(headers[0].path, piece)
        at = time.strftime("%H:%M")
        how = f"{size(speed)}/s in pieces of {size(piece)}, at {at}" if speed else f"{how}: {why}"
    ahead = "not known" if disk.read_ahead_bytes is None else size(disk.read_ahead_bytes)
    rows = {
        "a token uses": f"{size(layout.dense_bytes)} of dense weights, {size(token)} of experts",
        **({"experts that stay in memory": per_cent(cached, 0)} if total else {}),
        "the disk": f"{disk.device or 'no block device'}, read-ahead {ahead}",
        "its speed": how,
    }
    for way, n in reads.items():
        seconds = f", {n / speed:.2f} s at that speed" if n and speed else ""
        rows[f"forecast: read from disk a token, {way}"] = f"{size(n)}{seconds}"
    return Forecast(helped, disk, speed, rows)


def diagnose(model: Model, n_tokens: int = 4) -> tuple[str, dict[str, str]]:
    """What bounds a token, and rows for people: a forecast, and ``n_tokens`` of decode, measured."""
    pinned = model.paging.pinned_bytes if model.paging else 0
    on_cards = sum(sizes["weights"] for place, sizes in model.buffers.items() if place != HERE)
    free = available_memory().available_bytes + pinned + on_cards - model.buffers[HERE]["compute buffers"]
    expected = forecast(model.shards.headers, free, model.loading_speed)
    batches = [[token] for token in random_tokens(model, n_tokens + 2)]
    model.clear()
    seconds_of(model, batches[:2])
    before = read_bytes()
    seconds = seconds_of(model, batches[2:]) / n_tokens
    read = (read_bytes() - before) / n_tokens
    model.clear()
    times = f", {read / expected.helped:.1f} x what is needed" if expected.helped else ""
    rows = {**expected.rows, "measured: seconds a token": f"{seconds:.3g} s"}
    rows["measured: read from disk a token"] = NOT_MEASURED if isnan(read) else f"{size(round(read))}{times}"
    return bound(expected, seconds, read), rows


def bound(expected: Forecast, seconds: float, nbytes: float) -> str:
    """Whether the disk bounds a token of these seconds and bytes read, and what would make it faster."""
    if not expected.helped:
        return "The disk is not the bottleneck: the model fits in memory."
    if isnan(nbytes) or not expected.speed:
        return f"Whether the disk is the bottleneck was {NOT_MEASURED} in this run."
    if nbytes / expected.speed < seconds / 2:
        return "The disk is not the bottleneck: reading takes less than half of the time."
    lower = f", or as root `{command}`" if (command := expected.disk.command) else ""
    return f"The disk is the bottleneck: a faster disk or more free memory helps, paging='on'{lower}."
