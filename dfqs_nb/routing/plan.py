"""What an experiment runs: texts, loads and settings, most important first, and what fits into a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from dfqs_nb.core.display import counted
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.prompts import PromptSet, load_prompts
from dfqs_nb.llama.settings import OpenSettings

N_SEQUENCES = 8  # of the largest load
SUFFIXES = (".txt", ".md", ".py", ".c", ".cpp", ".js", ".java", ".rs", ".go", ".sql", ".tex")
MAX_CHARACTERS = 1 << 16  # read of each text of a folder
REPEATS = {"fresh": "fresh process", "main": "same process again"}  # by the process of a repetition
IDENTICAL = "identical"  # the kind of a condition that repeats its reference exactly
LOAD_TOKENS, LOAD_PREFILL, LOAD_OUTPUT = 80, 64, 8  # of each text under load, and of its answer
PROFILE_TOKENS = 2048  # of each text, at most
SCALES = (1.0, 0.5, 0.25, 0.125)  # of every length, tried in this order
LEFT_OUT = "left out: it does not fit into budget_minutes"


class Text(BaseModel):
    """A short text of one domain."""

    domain: str
    name: str
    text: str


class RoutingTexts(PromptSet):
    """The frozen texts of the routing experiment."""

    texts: list[Text]


def read_texts(folder: str | Path = "") -> list[Text]:
    """The workbook's 16 texts of five domains, or those of a folder: two or more, a subfolder a domain.

    Equal texts count once: they are no independent evidence.
    """
    if not str(folder):
        return load_prompts("routing-texts", RoutingTexts).texts
    root, texts = Path(folder).expanduser(), list[Text]()
    if not root.is_dir():
        raise DfqsError("there is no such folder", where=folder, hint="give a folder of texts")
    for path in sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
        text = path.read_text(encoding="utf-8", errors="replace")[:MAX_CHARACTERS].strip()
        if text and all(text != other.text for other in texts):
            domain = path.parent.name if path.parent != root else path.stem
            # a name is a cluster of the statistics, and has to be unique
            texts.append(Text(domain=domain, name=path.relative_to(root).as_posix(), text=text))
    if len(texts) < 2:
        hint = f"put texts there ({', '.join(SUFFIXES)}), in a subfolder for each domain"
        what = f"{counted(len(texts), 'different texts')}, and 2 are needed"
        raise DfqsError(what, where=folder, hint=hint)
    return texts


@dataclass(frozen=True)
class Condition:
    """One way to run the long text, or one load of short texts."""

    name: str
    kind: str  # the setting that differs, or IDENTICAL; or reference, alone, load or profile
    against: str  # the name of the run to compare with; empty: a reference, or the profile
    settings: OpenSettings
    n_prefill: int | None = None  # tokens evaluated in batches, the others one by one; None: all
    restored: bool = False  # between the calls the state is saved, the context cleared, the state put back
    process: str = "main"  # conditions of one process share one load of the weights
    texts: tuple[int, ...] = ()  # of a load: text numbers, by the sequence that evaluates them
    arrivals: tuple[int, ...] = ()  # the step in which each comes; without them each is evaluated alone
    unified: bool = False  # they share one KV cache
    scale: float = 1.0  # of every length

    def scaled(self, scale: float) -> Condition:
        """The condition with texts, prefill and arrivals at this scale."""
        n_prefill = self.n_prefill and round(self.n_prefill * scale)
        arrivals = tuple(round(step * scale) for step in self.arrivals)
        return replace(self, n_prefill=n_prefill, arrivals=arrivals, scale=scale)


def conditions(settings: OpenSettings, n_tokens: int, max_threads: int, n_texts: int) -> list[Condition]:
    """The conditions of the experiment, most important first; ``settings`` are the reference's.

    Thread counts are 1, 2, 4, ... up to ``max_threads``.
    """
    prefill = Condition("prefill", "reference", "", settings)
    decode = replace(prefill, name="decode", n_prefill=n_tokens // 2)
    planned: list[Condition] = []
    for base in (prefill, decode):
        again = replace(base, kind=IDENTICAL, against=base.name)
        repeats = (replace(again, name=f"{base.name}, {words}", process=it) for it, words in REPEATS.items())
        planned += [base, *repeats]
    return [*planned, *loads(settings, n_texts), *_changes(prefill, decode, max_threads)]


def loads(settings: OpenSettings, n_texts: int, seed: int = 0) -> Iterator[Condition]:
    """The short texts alone and beside others; company and arrivals are drawn from the seed.

    Up to the profile they are what a verdict needs most.
    """
    draw, each = np.random.default_rng(seed), -(-(LOAD_TOKENS + LOAD_OUTPUT) // 256) * 256
    n_batch = max(settings.n_batch, N_SEQUENCES * LOAD_PREFILL)  # all are prefilled at once
    room = replace(settings, n_ctx=each * N_SEQUENCES, n_batch=n_batch)
    alone = Condition("alone", "alone", "", room, LOAD_PREFILL, texts=tuple(range(n_texts)))
    compared = replace(alone, kind="load", against="alone")
    one_cache = replace(compared, name="alone, one cache", unified=True)
    yield alone
    yield from _batches(draw, alone, 7)
    for process, words in REPEATS.items():
        yield replace(compared, name=f"alone, {words}", kind=IDENTICAL, process=process)
    yield Condition("profile", "profile", "", replace(settings, n_ctx=PROFILE_TOKENS))
    for n_others in (1, 3):
        yield from _batches(draw, alone, n_others)
    yield one_cache
    yield from _batches(draw, one_cache, 7)


def _batches(draw: np.random.Generator, alone: Condition, n_others: int) -> Iterator[Condition]:
    """Every text in at least one batch of this size: all at once, and arriving while others decode."""
    n, size = len(alone.texts), n_others + 1
    company = np.resize(draw.permutation(n), -(-n // size) * size).tolist()  # the last batch begins again
    steps = np.linspace(0, LOAD_TOKENS - LOAD_PREFILL - 1, size).astype(int)
    cache = "one cache" if alone.unified else "a cache each"
    for number, start in enumerate(range(0, len(company), size), start=1):
        batch = replace(alone, kind="load", against=alone.name, texts=tuple(company[start : start + size]))
        for how, arrivals in (("together", [0] * size), ("mixed", draw.permutation(steps).tolist())):
            name = f"{counted(n_others, 'others')}, {how}, {cache}, batch {number}"
            yield replace(batch, name=name, arrivals=tuple(arrivals))


def _changes(prefill: Condition, decode: Condition, max_threads: int) -> Iterator[Condition]:
    """The long text with one setting changed at a time; the kind names the setting."""
    made, flash = {"prefill": prefill, "decode": decode}, {"flash_attn": True}
    yield replace(prefill, name="all by decode", kind="prefill length", against="prefill", n_prefill=0)
    changes: list[tuple[str, str, dict[str, Any]]] = [
        *((f"n_batch {n}", "prefill", {"n_batch": n, "n_ubatch": n}) for n in (1, 7, 64)),
        ("n_ctx doubled", "prefill", {"n_ctx": 2 * prefill.settings.n_ctx}),
        ("flash attention, prefill", "prefill", flash),
        ("KV cache f32", "prefill", {"type_k": "f32", "type_v": "f32"}),
        ("KV cache q8_0", "flash attention, prefill", {"type_k": "q8_0", "type_v": "q8_0"}),
        ("flash attention, decode", "decode", flash),
        ("repacked weights (extra buffers)", "prefill", {"use_extra_bufts": True}),
    ]
    counts = {max_threads, *(2**i for i in range(max_threads.bit_length()))} - {prefill.settings.n_threads}
    for n in sorted(filter(None, counts)):
        threads, label = {"n_threads": n, "n_threads_batch": n}, counted(n, "threads")
        changes += [(f"{label}, {name}", name, threads) for name in ("prefill", "decode")]
        changes.append((f"{label}, decode, flash attention", "flash attention, decode", threads))
    for name, against, changed in changes:
        base, process = made[against], "extra buffers" if "use_extra_bufts" in changed else "main"
        made[name] = replace(base, name=name, kind=" and ".join(changed), against=against, process=process)
        made[name] = replace(made[name], settings=replace(base.settings, **changed))
        yield made[name]
    # the same calls with and without it: the text needs several
    batches = replace(made["n_batch 64"], kind="saved state", against="n_batch 64")
    yield replace(batches, name="saved state restored", restored=True)


def seconds(planned: Iterable[Condition], costs: Mapping[str, float]) -> float:
    """What these conditions take; each process loads the model once, and answers are not scaled.

    ``costs``: seconds to ``load``, and of a token in ``prefill`` and ``decode``; tokens of the long ``text``,
    of its ``answer``, and of all texts of the ``profile``.
    """
    total, processes = 0.0, set()
    for each in planned:
        processes.add(each.process)
        n, n_output = (LOAD_TOKENS, LOAD_OUTPUT) if each.texts else (costs["text"], costs["answer"])
        if each.kind == "profile":
            n, n_output = costs["profile"], 0
        n, first = n * each.scale, each.n_prefill
        n_prefill = n if first is None else first
        text = n_prefill * costs["prefill"] + (n - n_prefill + n_output) * costs["decode"]
        total += max(1, len(each.texts)) * text
    return total + costs["load"] * len(processes)


def fit(
    planned: Sequence[Condition],
    costs: Mapping[str, float],
    budget_seconds: float,
    is_there: Callable[[Condition], bool] = lambda each: False,
) -> tuple[float, list[str]]:
    """How much of every length, and which conditions, fit into the budget.

    ``is_there``: whether a condition is recorded already, which costs nothing. The lengths are halved, at
    most three times and not below a recorded reference, until what comes before the profile fits. Then
    conditions are taken in the order of the plan, if they fit and what they are compared with was taken. A
    reference that nothing is compared with is left out again, but the first is always taken.
    """

    def cost(chosen: Iterable[Condition]) -> float:
        return seconds((each for each in chosen if not is_there(each)), costs)

    judging = list(takewhile(lambda each: each.kind != "profile", planned))
    for scale in SCALES:
        fits = cost(each.scaled(scale) for each in judging) <= budget_seconds
        if fits or is_there(planned[0].scaled(scale)):
            break
    kept = {planned[0].name: planned[0].scaled(scale)}
    for each in (each.scaled(scale) for each in planned[1:]):
        fits = is_there(each) or cost([*kept.values(), each]) <= budget_seconds
        if fits and each.against in {"", *kept}:
            kept[each.name] = each
    idle = {name for name, each in kept.items() if each.kind in ("reference", "alone")}
    idle -= {planned[0].name, *(each.against for each in kept.values())}
    return scale, [name for name in kept if name not in idle]
