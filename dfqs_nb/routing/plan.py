"""What an experiment runs, most important first, and what of it fits into a budget of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing.loads import Load, plan_loads
from dfqs_nb.routing.recorded import Schedule

IDENTICAL = "identical"  # the kind of a condition that repeats its reference exactly
LOAD_TOKENS, LOAD_PREFILL, LOAD_OUTPUT = 80, 64, 8  # of each text under load, and of its answer
PROFILE_TOKENS = 2048  # of each text, at most
SCALES = (1.0, 0.5, 0.25, 0.125)  # of every length, tried in this order
ESSENTIAL = ("reference", "alone")  # kinds that everything else is compared with


@dataclass(frozen=True)
class Condition:
    """One way to run the text, or one load.

    Args:
        name, against: what people read, and the name of the run to compare with; empty: a reference only.
        kind: what differs: ``identical``, ``threads``, ``batch``, ``phase``, ``state``, ``attention``,
            ``cache``, ``context``, ``buffers`` or ``weights``; or ``reference``, ``alone``, ``load``, or
            ``profile``.
        settings, schedule: how the model is opened, and the text evaluated.
        model, process: another file, or empty; conditions of one process share one load of the weights.
        load: what one batch holds, of runs over the short texts.
    """

    name: str
    kind: str
    against: str
    settings: OpenSettings
    schedule: Schedule = Schedule()
    model: str = ""
    process: str = "main"
    load: Load | None = None

    @property
    def needs(self) -> str:
        """The run without which this one is worth nothing."""
        return self.against or ("alone" if self.kind == "load" else "")

    @property
    def judging(self) -> bool:
        """Whether a verdict needs it most: a reference, a repetition, or a batch of 8 with a cache each."""
        load, kinds = self.load, (*ESSENTIAL, IDENTICAL)
        full = load and load.n_others == 7 and load.kind != "same text" and not load.unified
        return self.kind in kinds or bool(full)

    def scaled(self, scale: float) -> Condition:
        """The condition with all its lengths, and its schedule, at this scale."""
        load, cut = self.load, self.schedule.prefill
        if load:
            sizes = {name: max(2, round(getattr(load, name) * scale)) for name in ("n_prefill", "n_tokens")}
            load = replace(load, **sizes, arrivals=tuple(round(step * scale) for step in load.arrivals))
        return replace(self, load=load, schedule=replace(self.schedule, prefill=cut and round(cut * scale)))


def conditions(
    settings: OpenSettings, n_tokens: int, max_threads: int, others: Mapping[str, str | Path], n_texts: int
) -> list[Condition]:
    """The conditions of the experiment, most important first; ``settings`` are the reference's.

    Args:
        max_threads: thread counts are 1, 2, 4, ... up to this.
        others: quantizations of the same model by name, compared with it.
        n_texts: short texts for the loads and the profile.
    """
    half, loads = n_tokens // 2, list(_loads(settings, n_texts))
    return [
        *_repetitions(settings, half),
        *(load for load in loads if load.judging and load.kind != IDENTICAL),
        Condition("profile", "profile", "", replace(settings, n_ctx=PROFILE_TOKENS)),
        *(load for load in loads if not load.judging or load.kind == IDENTICAL),
        *_other_settings(settings, half),
        *_thread_counts(settings, half, max_threads),
        *(
            Condition(f"weights: {name}", "weights", "prefill", settings, model=str(path), process=name)
            for name, path in others.items()
        ),
    ]


def _repetitions(settings: OpenSettings, half: int) -> Iterator[Condition]:
    """The two references, each repeated in the same process and in a fresh one."""
    schedules = {"prefill": Schedule(), "decode": Schedule(half)}
    for name, schedule in schedules.items():
        yield Condition(name, "reference", "", settings, schedule)
    for process, words in (("fresh", "fresh process"), ("main", "same process again")):
        for name, schedule in schedules.items():
            yield Condition(f"{name}, {words}", IDENTICAL, name, settings, schedule, process=process)


def _loads(settings: OpenSettings, n_texts: int) -> Iterator[Condition]:
    """The loads, and the texts alone again, in the same process and in a fresh one."""
    for name, load in plan_loads(n_texts, LOAD_TOKENS, LOAD_PREFILL):
        room = load.settings(settings, LOAD_OUTPUT)
        yield Condition(name, "alone" if name == "alone" else "load", "", room, load=load)
        if name == "alone":
            for process, words in (("fresh", "fresh process"), ("main", "same process again")):
                yield Condition(f"alone, {words}", IDENTICAL, name, room, process=process, load=load)


def _thread_counts(settings: OpenSettings, half: int, largest: int) -> Iterator[Condition]:
    """Powers of two up to the largest count, and that."""
    for n in sorted({largest, *(2**i for i in range(largest.bit_length()))} - {settings.n_threads or 1}):
        threads = replace(settings, n_threads=n, n_threads_batch=n)
        flash, decode = replace(threads, flash_attn=True), Schedule(half)
        label = f"{n} thread{'s' if n > 1 else ''}"
        yield Condition(f"{label}, prefill", "threads", "prefill", threads)
        yield Condition(f"{label}, decode", "threads", "decode", threads, decode)
        against = "flash attention, decode"
        yield Condition(f"{label}, decode, flash attention", "threads", against, flash, decode)


def _other_settings(settings: OpenSettings, half: int) -> Iterator[Condition]:
    two_calls, flash = Schedule(half, decode=False), {"flash_attn": True}
    yield Condition("prefill in two calls", "batch", "prefill", settings, two_calls)
    restored = replace(two_calls, restore=True)
    yield Condition("saved state restored", "state", "prefill in two calls", settings, restored)
    yield Condition("all by decode", "phase", "prefill", settings, Schedule(0))
    quantized = {**flash, "type_k": "q8_0", "type_v": "q8_0"}
    changes: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        *((f"n_batch {n}", "batch", "prefill", {"n_batch": n, "n_ubatch": n}) for n in (1, 7, 64)),
        ("n_ubatch 7 in n_batch 512", "batch", "prefill", {"n_ubatch": 7}),
        ("n_ctx doubled", "context", "prefill", {"n_ctx": 2 * settings.n_ctx}),
        ("flash attention, prefill", "attention", "prefill", flash),
        ("KV cache f32", "cache", "prefill", {"type_k": "f32", "type_v": "f32"}),
        ("KV cache q8_0", "cache", "flash attention, prefill", quantized),
    )
    for name, kind, against, changed in changes:
        yield Condition(name, kind, against, replace(settings, **changed))
    flashed, repacked = replace(settings, flash_attn=True), replace(settings, use_extra_bufts=True)
    yield Condition("flash attention, decode", "attention", "decode", flashed, Schedule(half))
    name, process = "repacked weights (extra buffers)", "extra buffers"
    yield Condition(name, "buffers", "prefill", repacked, process=process)


# ---- a budget ----


@dataclass(frozen=True)
class Costs:
    """Seconds to load the model, and for a token of prefill and of decode, as measured."""

    load_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Lengths:
    """Tokens of the text, of its answer, and of all texts of the profile together."""

    n_tokens: int
    n_output: int
    n_profile: int

    def of(self, condition: Condition) -> tuple[int, int, int]:
        """Tokens that a condition prefills, decodes, and answers with."""
        load, cut = condition.load, condition.schedule.prefill
        if load:
            n = len(load.members)
            return n * load.n_prefill, n * (load.n_tokens - load.n_prefill), n * LOAD_OUTPUT
        if condition.kind == "profile":
            return self.n_profile, 0, 0
        cut = self.n_tokens if cut is None or not condition.schedule.decode else cut
        return cut, self.n_tokens - cut, self.n_output


def seconds(conditions: Sequence[Condition], costs: Costs, lengths: Lengths, scale: float = 1.0) -> float:
    """What these conditions take; each of their processes loads the model once, and answers are not scaled."""
    n_prefill, n_decode, n_output = np.sum([lengths.of(each) for each in conditions], axis=0)
    loads = costs.load_seconds * len({each.process for each in conditions})
    text = n_prefill * costs.prefill_seconds + n_decode * costs.decode_seconds
    return float(loads + scale * text + n_output * costs.decode_seconds)


def fit(
    planned: Sequence[Condition], costs: Costs, lengths: Lengths, budget_seconds: float
) -> tuple[float, list[str]]:
    """How much of every length, and which conditions, fit into the budget.

    The lengths are halved, at most three times, until the runs that a verdict needs most fit. Then conditions
    are taken in the order of the plan, each with those that it needs. The first one is always taken.
    """
    judging = [each for each in planned if each.judging]
    scale = next((s for s in SCALES if seconds(judging, costs, lengths, s) <= budget_seconds), SCALES[-1])
    by_name, kept = {each.name: each for each in planned}, list(planned[:1])
    for each in planned:
        if each.kind in ESSENTIAL:
            continue  # worth its time only with a run that is compared with it
        added = [each]
        while (needed := by_name.get(added[-1].needs)) and needed not in kept:
            added.append(needed)
        if seconds([*kept, *added], costs, lengths, scale) <= budget_seconds:
            kept += added
    return scale, [each.name for each in planned if each in kept]
