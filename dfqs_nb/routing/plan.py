"""What an experiment runs, most important first, and what of it fits into a budget of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing.loads import Load, load_settings, plan_loads
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

    def as_run(self, n_tokens: int, n_output: int, texts: Sequence[int]) -> dict[str, Any]:
        """The condition as plain values, for the child, with the tokens that it prefills and decodes.

        The text has ``n_tokens``, and each of the short ones as ``texts`` says.
        """
        if self.load is not None:
            n, load = len(self.load.members), self.load
            tokens = n * load.n_prefill, n * (load.n_tokens - load.n_prefill + LOAD_OUTPUT)
        elif self.kind == "profile":
            tokens = sum(min(n, self.settings.n_ctx) for n in texts), 0
        else:
            first = n_tokens if self.schedule.prefill is None else self.schedule.prefill
            rest = n_tokens - first
            tokens = (first, rest + n_output) if self.schedule.decode else (n_tokens, n_output)
        plain = asdict(self)
        return {
            **{name: plain[name] for name in ("name", "kind", "process", "settings", "schedule", "load")},
            "keep_scores": self.name == "prefill" or self.kind == "weights",
            "n_prefill": tokens[0],
            "n_decode": tokens[1],
            "needs": self.against or ("alone" if self.kind == "load" else ""),
            "n_output": len(self.load.members) * LOAD_OUTPUT if self.load else min(n_output, tokens[1]),
            "scale": 1.0,
        }


def conditions(
    settings: OpenSettings,
    n_tokens: int,
    *,
    max_threads: int = 0,
    others: Mapping[str, str | Path] | None = None,
    n_texts: int = 0,
) -> list[Condition]:
    """The conditions of the experiment, most important first; ``settings`` are the reference's.

    Args:
        max_threads: thread counts are 1, 2, 4, ... up to this; by default the reference's count.
        others: quantizations of the same model by name, compared with it.
        n_texts: short texts for the loads and the profile.
    """
    n_threads, half = settings.n_threads or 1, n_tokens // 2
    loads = list(_loads(settings, n_texts)) if n_texts else []
    most = [
        c for c in loads if c.name == "alone" or (c.load and not c.load.unified and _full(asdict(c.load)))
    ]
    longest = replace(settings, n_ctx=PROFILE_TOKENS)
    return [
        *_repetitions(settings, half),
        *most,
        *(Condition("profile", "profile", "", longest) for _ in range(min(n_texts, 1))),
        *(c for c in loads if c not in most),
        *_other_settings(settings, half),
        *_thread_counts(settings, half, max_threads or n_threads),
        *(
            Condition(name, "weights", "prefill", settings, model=str(path), process=name)
            for name, path in ((f"weights: {name}", path) for name, path in (others or {}).items())
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
        room = load_settings(settings, load.n_sequences, load.n_tokens + LOAD_OUTPUT, load.n_prefill)
        yield Condition(name, "alone" if name == "alone" else "load", "", room, load=load)
        if name == "alone":
            for process, words in (("fresh", "fresh process"), ("main", "same process again")):
                yield Condition(f"alone, {words}", IDENTICAL, name, room, process=process, load=load)


def _thread_counts(settings: OpenSettings, half: int, largest: int) -> Iterator[Condition]:
    """Powers of two up to the largest count, and that."""
    for n in sorted({largest, *(2**i for i in range(largest.bit_length()))} - {settings.n_threads or 1}):
        threads = replace(settings, n_threads=n, n_threads_batch=n)
        flash = replace(threads, flash_attn=True)
        label, decode = f"{n} thread{'s' if n > 1 else ''}", Schedule(half)
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
        if changed.get("n_batch") != settings.n_batch:
            yield Condition(name, kind, against, replace(settings, **changed))
    flashed, repacked = replace(settings, flash_attn=True), replace(settings, use_extra_bufts=True)
    yield Condition("flash attention, decode", "attention", "decode", flashed, Schedule(half))
    name, process = "repacked weights (extra buffers)", "extra buffers"
    yield Condition(name, "buffers", "prefill", repacked, process=process)


def with_references(planned: list[Condition], chosen: Sequence[str]) -> list[Condition]:
    """The chosen conditions with those that they are compared with; all if none is chosen.

    Raises:
        DfqsError: there is no condition of such a name.
    """
    if not chosen:
        return planned
    by_name = {condition.name: condition for condition in planned}
    unknown = [name for name in chosen if name not in by_name]
    if unknown:
        raise DfqsError(f"no condition is called {unknown[0]!r}", hint=f"there are {', '.join(by_name)}")
    names, queue = {"prefill"}, list(chosen)
    while queue:
        name = queue.pop()
        names.add(name)
        queue += {by_name[name].against} - {"", *names}
    return [condition for condition in planned if condition.name in names]


# ---- a budget ----


@dataclass(frozen=True)
class Costs:
    """Seconds to load the model, and for a token of prefill and of decode, as measured."""

    load_seconds: float
    prefill_seconds: float
    decode_seconds: float

    def seconds(self, run: Mapping[str, Any], scale: float = 1.0) -> float:
        """Of one run, without loading."""
        output = run.get("n_output", 0)  # answers keep their length
        text = run["n_prefill"] * self.prefill_seconds + (run["n_decode"] - output) * self.decode_seconds
        return float(scale * text + output * self.decode_seconds)


def fit(runs: Sequence[Mapping[str, Any]], costs: Costs, budget_seconds: float) -> tuple[float, list[str]]:
    """How much of every length, and which runs, fit into the budget (0: no bound).

    The lengths are halved, at most three times, until the runs that all others are compared with, the
    repetitions, and the loads of 8 sequences fit. Then runs are taken in the order of the plan, each with
    those that it is compared with. The first one is always taken.

    >>> runs = [{"name": n, "kind": k, "process": "main", "n_prefill": 100, "n_decode": 0, "load": None}
    ...         for n, k in (("prefill", "reference"), ("again", "identical"), ("n_batch 7", "batch"))]
    >>> fit(runs, Costs(10, 0.1, 1), 32)
    (1.0, ['prefill', 'again'])
    """
    if not budget_seconds:
        return SCALES[0], [run["name"] for run in runs]
    judging = [run for run in runs if run["kind"] in (*ESSENTIAL, IDENTICAL) or _full(run["load"])]
    scale = next((s for s in SCALES if _total(judging, costs, s) <= budget_seconds), SCALES[-1])
    by_name, kept = {run["name"]: run for run in runs}, list(runs[:1])
    for run in runs:
        added, name = list[Mapping[str, Any]](), run["name"]
        while name in by_name and by_name[name] not in kept:
            added.append(by_name[name])
            name = by_name[name].get("needs")
        if run["kind"] not in ESSENTIAL and _total([*kept, *added], costs, scale) <= budget_seconds:
            kept += added
    return scale, [run["name"] for run in runs if run in kept]


def _full(load: Mapping[str, Any] | None) -> bool:
    """Whether it is one of the largest loads, which a verdict needs most."""
    return load is not None and load["n_others"] == 7 and load["kind"] in ("together", "mixed")


def _total(runs: Sequence[Mapping[str, Any]], costs: Costs, scale: float) -> float:
    n_loads = len({run["process"] for run in runs})
    return n_loads * costs.load_seconds + sum(costs.seconds(run, scale) for run in runs)


def scaled(run: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The run with all its lengths, and its schedule, at this scale."""
    changed: dict[str, Any] = {**run, "scale": scale}
    if run["load"]:
        sizes = {name: max(2, round(run["load"][name] * scale)) for name in ("n_prefill", "n_tokens")}
        arrivals = [round(step * scale) for step in run["load"]["arrivals"]]
        changed["load"] = {**run["load"], **sizes, "arrivals": arrivals}
    if run["schedule"]["prefill"]:
        changed["schedule"] = {**run["schedule"], "prefill": round(run["schedule"]["prefill"] * scale)}
    return changed
