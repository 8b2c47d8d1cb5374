"""What an experiment runs: texts, loads and settings, most important first, and what fits into a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
ESSENTIAL = ("reference", "alone")  # kinds that everything else is compared with


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
class Load:
    """Which texts one batch holds."""

    # alone, together (all are prefilled and decoded at once), mixed (they arrive one after another, so that
    # some decode while others are prefilled) or same text
    kind: str
    n_others: int  # sequences beside each one
    unified: bool  # they share one KV cache
    members: tuple[int, ...]  # text numbers, by the sequence that evaluates them
    arrivals: tuple[int, ...]  # the step in which each comes; of alone unused
    n_sequences: int  # that the context is made for
    n_prefill: int  # tokens of each text
    n_tokens: int  # of each text; those after the prefill are decoded

    @property
    def label(self) -> str:
        """The load for people, without its batch number."""
        if self.kind == "alone":
            return "alone"
        cache = "one cache" if self.unified else "a cache each"
        return f"{self.n_others} other{'s' if self.n_others > 1 else ''}, {self.kind}, {cache}"

    def settings(self, settings: OpenSettings, n_output: int) -> OpenSettings:
        """These settings with room for the sequences and their answers, which one batch can prefill."""
        each, n = -(-(self.n_tokens + n_output) // 256) * 256, self.n_sequences
        return replace(settings, n_ctx=each * n, n_batch=max(settings.n_batch, n * self.n_prefill))


def plan_loads(n_texts: int, n_tokens: int, n_prefill: int, seed: int = 0) -> Iterator[tuple[str, Load]]:
    """Names and loads, most important first; arrivals and company are drawn from the seed.

    >>> [name for name, _ in plan_loads(8, 32, 16)][:3]
    ['alone', '7 others, together, a cache each, batch 1', '7 others, mixed, a cache each, batch 1']
    """
    draw, every, sizes = np.random.default_rng(seed), tuple(range(n_texts)), (n_prefill, n_tokens)
    yield "alone", Load("alone", 0, False, every, (), N_SEQUENCES, *sizes)
    for n_others in (7, 1, 3):
        yield from _batches(draw, n_texts, n_others, False, *sizes)
    for unified in (False, True):
        if unified:
            yield "alone, one cache", Load("alone", 0, True, every, (), N_SEQUENCES, *sizes)
            yield from _batches(draw, n_texts, 7, True, *sizes)
        for text in sorted(draw.permutation(n_texts)[:N_SAME].tolist()):
            members, arrivals = (text,) * N_SEQUENCES, tuple(draw.integers(0, 4, N_SEQUENCES).tolist())
            load = Load("same text", 7, unified, members, arrivals, N_SEQUENCES, *sizes)
            yield f"{load.label}, text {text + 1}", load
    yield "alone, a context for one", Load("alone", 0, False, every, (), 1, *sizes)


def _batches(
    draw: np.random.Generator, n_texts: int, n_others: int, unified: bool, n_prefill: int, n_tokens: int
) -> Iterator[tuple[str, Load]]:
    """Every text in at least one batch of this size, together and mixed."""
    company, size = draw.permutation(n_texts).tolist(), n_others + 1
    company += company[: -len(company) % size]
    steps = np.linspace(0, max(2, n_tokens - n_prefill) - 1, size).astype(int)
    for number, start in enumerate(range(0, len(company), size), start=1):
        late = tuple(draw.permutation(steps).tolist())
        for kind, arrivals in (("together", (0,) * size), ("mixed", late)):
            members = tuple(company[start : start + size])
            load = Load(kind, n_others, unified, members, arrivals, N_SEQUENCES, n_prefill, n_tokens)
            yield f"{load.label}, batch {number}", load


@dataclass(frozen=True)
class Condition:
    """One way to run the text, or one load."""

    name: str
    # what differs: identical, threads, batch, phase, state, attention, cache, context, buffers or weights; or
    # reference, alone, load or profile
    kind: str
    against: str  # the name of the run to compare with; empty: a reference only
    settings: OpenSettings
    schedule: Schedule = Schedule()
    model: str = ""  # another file
    process: str = "main"  # conditions of one process share one load of the weights
    load: Load | None = None  # of runs over the short texts

    @property
    def needs(self) -> str:
        """The run that this one is compared with, and of a load the texts alone."""
        return self.against or ("alone" if self.kind == "load" else "")

    @property
    def judging(self) -> bool:
        """Whether a verdict needs it: a reference, a repetition, or a batch of 8 with a cache each."""
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

    Thread counts are 1, 2, 4, ... up to ``max_threads``; ``others`` are quantizations of the model by name.
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
    for process, words in REPEATS.items():
        for name, schedule in schedules.items():
            yield Condition(f"{name}, {words}", IDENTICAL, name, settings, schedule, process=process)


def _loads(settings: OpenSettings, n_texts: int) -> Iterator[Condition]:
    """The loads, and the texts alone again, in the same process and in a fresh one."""
    for name, load in plan_loads(n_texts, LOAD_TOKENS, LOAD_PREFILL):
        room = load.settings(settings, LOAD_OUTPUT)
        yield Condition(name, "alone" if name == "alone" else "load", "", room, load=load)
        if name == "alone":
            for process, words in REPEATS.items():
                yield Condition(f"alone, {words}", IDENTICAL, name, room, process=process, load=load)


def _thread_counts(settings: OpenSettings, half: int, largest: int) -> Iterator[Condition]:
    """Powers of two up to the largest count, and that."""
    for n in sorted({largest, *(2**i for i in range(largest.bit_length()))} - {settings.n_threads or 1}):
        threads = replace(settings, n_threads=n, n_threads_batch=n)
        flash, against = replace(threads, flash_attn=True), "flash attention, decode"
        label = f"{n} thread{'s' if n > 1 else ''}"
        yield Condition(f"{label}, prefill", "threads", "prefill", threads)
        yield Condition(f"{label}, decode", "threads", "decode", threads, Schedule(half))
        yield Condition(f"{label}, decode, flash attention", "threads", against, flash, Schedule(half))


def _other_settings(settings: OpenSettings, half: int) -> Iterator[Condition]:
    whole, decode, flash = Schedule(), Schedule(half), {"flash_attn": True}
    two_calls, restored = Schedule(half, decode=False), Schedule(half, decode=False, restore=True)
    quantized, f32 = {**flash, "type_k": "q8_0", "type_v": "q8_0"}, {"type_k": "f32", "type_v": "f32"}
    changes: tuple[tuple[str, str, str, Schedule, dict[str, Any]], ...] = (
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
    )
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
            load, first, n_output = each.load, each.schedule.prefill, self.n_output
            if load:
                n, n_output = len(load.members), len(load.members) * LOAD_OUTPUT
                n_prefill, n_decode = n * load.n_prefill, n * (load.n_tokens - load.n_prefill)
            elif each.kind == "profile":
                n_prefill, n_decode, n_output = self.n_profile, 0, 0
            else:
                n_prefill = self.n_tokens if first is None or not each.schedule.decode else first
                n_decode = self.n_tokens - n_prefill
            total += scale * n_prefill * self.prefill_seconds
            total += (scale * n_decode + n_output) * self.decode_seconds
        return total


def fit(planned: Sequence[Condition], costs: Costs, budget_seconds: float) -> tuple[float, list[str]]:
    """How much of every length, and which conditions, fit into the budget.

    The lengths are halved, at most three times, until the runs that a verdict needs most fit. Then conditions
    are taken in the order of the plan, each with those that it needs. The first one is always taken.
    """
    judging = [each for each in planned if each.judging]
    scale = next((scale for scale in SCALES if costs.seconds(judging, scale) <= budget_seconds), SCALES[-1])
    by_name, kept = {each.name: each for each in planned}, list(planned[:1])
    for each in planned:
        if each.kind in ESSENTIAL:
            continue  # worth its time only with a run that is compared with it
        added = [each]
        while (needed := by_name.get(added[-1].needs)) and needed not in kept:
            added.append(needed)
        if costs.seconds([*kept, *added], scale) <= budget_seconds:
            kept += added
    return scale, [each.name for each in planned if each in kept]
