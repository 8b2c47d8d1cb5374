"""What an experiment runs: texts, loads and settings, most important first, and what fits into a budget."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.prompts import PromptSet, load_prompts
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing.recorded import Schedule

N_SEQUENCES = 8  # of the largest load
N_SAME = 4  # texts that run beside copies of themselves
SUFFIXES = (".txt", ".md", ".py", ".c", ".cpp", ".js", ".java", ".rs", ".go", ".sql", ".tex")
MAX_CHARACTERS = 1 << 16  # read of each text of a folder
EXTRA_BUFFERS = "repacked weights (extra buffers)"
REPEATS = {"fresh": "fresh process", "main": "same process again"}  # by the process of a repetition
IDENTICAL = "identical"  # the kind of a condition that repeats its reference exactly
LOAD_TOKENS, LOAD_PREFILL, LOAD_OUTPUT = 80, 64, 8  # of each text under load, and of its answer
PROFILE_TOKENS = 2048  # of each text, at most
SCALES = (1.0, 0.5, 0.25, 0.125)  # of every length, tried in this order


class Text(BaseModel):
    """A short text of one domain."""

    domain: str
    name: str
    text: str


class RoutingTexts(PromptSet):
    """The frozen texts of the routing experiment."""

    texts: list[Text]


def read_texts(folder: str | Path = "") -> list[Text]:
    """The workbook's 16 texts of five domains, or those of a folder: two or more, a subfolder a domain."""
    if not str(folder):
        return load_prompts("routing-texts", RoutingTexts).texts
    root, texts = Path(folder).expanduser(), list[Text]()
    for path in sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
        if text := path.read_text(encoding="utf-8", errors="replace")[:MAX_CHARACTERS].strip():
            domain = path.parent.name if path.parent != root else path.stem
            # a name is a cluster of the statistics, and has to be unique
            texts.append(Text(domain=domain, name=path.relative_to(root).as_posix(), text=text))
    if len(texts) < 2:
        hint = f"put texts there ({', '.join(SUFFIXES)}), in a subfolder for each domain"
        raise DfqsError(f"{len(texts)} texts, at least 2 are needed", where=folder, hint=hint)
    return texts


@dataclass(frozen=True)
class Condition:
    """One way to run the long text, or one load of short texts."""

    name: str
    # what differs: identical, threads, batch, phase, state, attention, cache, context, buffers or weights; or
    # reference, alone, load or profile
    kind: str
    against: str  # the name of the run to compare with; empty: a reference, or the profile
    settings: OpenSettings
    schedule: Schedule = Schedule()
    model: str = ""  # another file
    process: str = "main"  # conditions of one process share one load of the weights
    texts: tuple[int, ...] = ()  # of a load: text numbers, by the sequence that evaluates them
    arrivals: tuple[int, ...] = ()  # the step in which each comes; without them each is evaluated alone
    n_sequences: int = 1  # that the context is made for
    unified: bool = False  # they share one KV cache

    @property
    def load(self) -> str:
        """The load for people, without the number of its batch or text."""
        return re.sub(r", (batch|text) \d+$", "", self.name)

    def scaled(self, scale: float) -> Condition:
        """The condition with its schedule and arrivals at this scale."""
        cut, arrivals = self.schedule.prefill, tuple(round(step * scale) for step in self.arrivals)
        return replace(
            self, schedule=replace(self.schedule, prefill=cut and round(cut * scale)), arrivals=arrivals
        )


def conditions(
    settings: OpenSettings, n_tokens: int, max_threads: int, others: Mapping[str, str | Path], n_texts: int
) -> list[Condition]:
    """The conditions of the experiment, most important first; ``settings`` are the reference's.

    Thread counts are 1, 2, 4, ... up to ``max_threads``; ``others`` are quantizations of the model by name.
    """
    half = n_tokens // 2
    references = {"prefill": Schedule(), "decode": Schedule(half)}
    planned = [Condition(name, "reference", "", settings, how) for name, how in references.items()]
    for process, words in REPEATS.items():
        for name, how in references.items():
            again = Condition(f"{name}, {words}", IDENTICAL, name, settings, how, process=process)
            planned.append(again)
    planned += [*loads(settings, n_texts), *_changes(settings, half, max_threads)]
    for name, path in others.items():
        other = Condition(f"weights: {name}", "weights", "prefill", settings, model=str(path), process=name)
        planned.append(other)
    return planned


def loads(settings: OpenSettings, n_texts: int, seed: int = 0) -> Iterator[Condition]:
    """The short texts alone and beside others; company and arrivals are drawn from the seed.

    Up to the profile they are what a verdict needs most.
    """
    draw, each = np.random.default_rng(seed), -(-(LOAD_TOKENS + LOAD_OUTPUT) // 256) * 256
    n_batch = max(settings.n_batch, N_SEQUENCES * LOAD_PREFILL)  # all are prefilled at once
    room = replace(settings, n_ctx=each * N_SEQUENCES, n_batch=n_batch)
    alone = Condition("alone", "alone", "", room, Schedule(LOAD_PREFILL), n_sequences=N_SEQUENCES)
    alone = replace(alone, texts=tuple(range(n_texts)))
    compared = replace(alone, kind="load", against="alone")
    one_cache = replace(compared, name="alone, one cache", unified=True)
    yield alone
    yield from _batches(draw, alone, 7)
    for process, words in REPEATS.items():
        yield replace(compared, name=f"alone, {words}", kind=IDENTICAL, process=process)
    yield Condition("profile", "profile", "", replace(settings, n_ctx=PROFILE_TOKENS))
    for n_others in (1, 3):
        yield from _batches(draw, alone, n_others)
    yield from _same_text(draw, alone)
    yield one_cache
    yield from _batches(draw, one_cache, 7)
    yield from _same_text(draw, one_cache)
    single = replace(settings, n_ctx=each)
    yield replace(compared, name="alone, a context for one", settings=single, n_sequences=1)


def _batches(draw: np.random.Generator, alone: Condition, n_others: int) -> Iterator[Condition]:
    """Every text in at least one batch of this size: all at once, and arriving while others decode."""
    company, size = draw.permutation(len(alone.texts)).tolist(), n_others + 1
    company += company[: -len(company) % size]
    steps = np.linspace(0, LOAD_TOKENS - LOAD_PREFILL - 1, size).astype(int)
    for number, start in enumerate(range(0, len(company), size), start=1):
        texts, late = company[start : start + size], draw.permutation(steps).tolist()
        yield _beside(alone, "together", f"batch {number}", texts, [0] * size)
        yield _beside(alone, "mixed", f"batch {number}", texts, late)


def _same_text(draw: np.random.Generator, alone: Condition) -> Iterator[Condition]:
    """Some texts beside copies of themselves."""
    for text in sorted(draw.permutation(len(alone.texts))[:N_SAME].tolist()):
        arrivals = draw.integers(0, 4, N_SEQUENCES).tolist()
        yield _beside(alone, "same text", f"text {text + 1}", [text] * N_SEQUENCES, arrivals)


def _beside(alone: Condition, kind: str, number: str, texts: list[int], arrivals: list[int]) -> Condition:
    """The texts in one batch, to compare with the run in which each is alone."""
    others, cache = len(texts) - 1, "one cache" if alone.unified else "a cache each"
    name = f"{others} other{'s' if others > 1 else ''}, {kind}, {cache}, {number}"
    run = replace(alone, name=name, kind="load", against=alone.name)
    return replace(run, texts=tuple(texts), arrivals=tuple(arrivals))


def _changes(settings: OpenSettings, half: int, max_threads: int) -> Iterator[Condition]:
    """The long text with one setting changed at a time."""
    whole, decode, flash = Schedule(), Schedule(half), {"flash_attn": True}
    two_calls, restored = Schedule(half, decode=False), Schedule(half, decode=False, restore=True)
    quantized, f32 = {**flash, "type_k": "q8_0", "type_v": "q8_0"}, {"type_k": "f32", "type_v": "f32"}
    changes: list[tuple[str, str, str, Schedule, dict[str, Any]]] = [
        ("prefill in two calls", "batch", "prefill", two_calls, {}),
        ("saved state restored", "state", "prefill in two calls", restored, {}),
        ("all by decode", "phase", "prefill", Schedule(0), {}),
        *((f"n_batch {n}", "batch", "prefill", whole, {"n_batch": n, "n_ubatch": n}) for n in (1, 7, 64)),
        ("n_ubatch 7 in n_batch 512", "batch", "prefill", whole, {"n_ubatch": 7}),
        ("n_ctx doubled", "context", "prefill", whole, {"n_ctx": 2 * settings.n_ctx}),
        ("flash attention, prefill", "attention", "prefill", whole, flash),
        ("KV cache f32", "cache", "prefill", whole, f32),
        ("KV cache q8_0", "cache", "flash attention, prefill", whole, quantized),
        ("flash attention, decode", "attention", "decode", decode, flash),
        (EXTRA_BUFFERS, "buffers", "prefill", whole, {"use_extra_bufts": True}),
    ]
    counts = {max_threads, *(2**i for i in range(max_threads.bit_length()))} - {settings.n_threads or 1}
    for n in sorted(counts):
        threads, label = {"n_threads": n, "n_threads_batch": n}, f"{n} thread{'s' if n > 1 else ''}"
        both, against = {**threads, **flash}, "flash attention, decode"
        changes += [
            (f"{label}, prefill", "threads", "prefill", whole, threads),
            (f"{label}, decode", "threads", "decode", decode, threads),
            (f"{label}, decode, flash attention", "threads", against, decode, both),
        ]
    for name, kind, against, schedule, changed in changes:
        process = "extra buffers" if name == EXTRA_BUFFERS else "main"
        yield Condition(name, kind, against, replace(settings, **changed), schedule, process=process)


@dataclass(frozen=True)
class Costs:
    """What runs cost, as measured on this machine."""

    load_seconds: float
    prefill_seconds: float  # a token
    decode_seconds: float
    n_tokens: int  # of the text
    n_output: int  # of its answer
    n_profile: int  # of all texts of the profile

    def seconds(self, planned: Sequence[Condition], scale: float = 1.0) -> float:
        """What these conditions take; each process loads the model once, and answers are not scaled."""
        total = self.load_seconds * len({each.process for each in planned})
        for each in planned:
            n, n_output = self.n_tokens, self.n_output
            if each.texts:
                n, n_output = LOAD_TOKENS, LOAD_OUTPUT
            elif each.kind == "profile":
                n, n_output = self.n_profile, 0
            first = each.schedule.prefill
            n_prefill = n if first is None or not each.schedule.decode else first
            text = scale * (n_prefill * self.prefill_seconds + (n - n_prefill) * self.decode_seconds)
            total += max(1, len(each.texts)) * (text + n_output * self.decode_seconds)
        return total


def fit(planned: Sequence[Condition], costs: Costs, budget_seconds: float) -> tuple[float, list[str]]:
    """How much of every length, and which conditions, fit into the budget.

    The lengths are halved, at most three times, until what comes before the profile fits. Then conditions are
    taken in the order of the plan, each with those that it is compared with. The first is always taken.
    """
    judging = list(takewhile(lambda each: each.kind != "profile", planned))
    scale = next((scale for scale in SCALES if costs.seconds(judging, scale) <= budget_seconds), SCALES[-1])
    by_name, kept = {each.name: each for each in planned}, list(planned[:1])
    for each in planned:
        if each.kind in ("reference", "alone"):
            continue  # worth its time only with a run that is compared with it
        added = [each]
        while (needed := by_name.get(added[-1].against)) and needed not in kept:
            added.append(needed)
        if costs.seconds([*kept, *added], scale) <= budget_seconds:
            kept += added
    return scale, [each.name for each in planned if each in kept]
