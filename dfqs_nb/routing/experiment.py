"""Run one text under many conditions, each in a process of its own, and compare what the routers chose.

Every condition is compared with one other run that differs in one thing. A condition that llama.cpp refuses,
or dies of, is reported as such and does not end the experiment. Traces are kept as ``.npz``; a trace that is
there and was made under the same conditions is not made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core import child
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.journal import remembered
from dfqs_nb.core.machine import has_amx, usable_cores
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.models import resolve
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings, llama_version, threads_for
from dfqs_nb.routing.compare import compare
from dfqs_nb.routing.recorder import RoutingError
from dfqs_nb.routing.trace import Schedule, Trace, load_trace
from dfqs_nb.routing.verdict import IDENTICAL, Experiment

if TYPE_CHECKING:
    import pandas as pd

PASSAGE = "prompts/routing_passage.txt"
QUESTION = "What is the capital of France?"
BATCHES = (1, 7, 64)  # beside the default of 512
FORMAT = 2  # of a kept trace; a new number makes old ones be recorded again


@dataclass(frozen=True)
class Condition:
    """One way to run the text.

    Args:
        name: what people read.
        kind: what differs: ``identical``, ``threads``, ``batch``, ``phase``, ``state``, ``attention``,
            ``cache``, ``context``, ``buffers`` or ``weights``.
        against: the name of the run to compare with; empty for the runs that only serve as reference.
        settings: how the model is opened.
        schedule: how the text is evaluated.
        model: another file; empty for the model itself.
        again: a second run in the process of the condition of this name.
    """

    name: str
    kind: str
    against: str
    settings: OpenSettings
    schedule: Schedule = Schedule()
    model: str = ""
    again: str = ""


def conditions(
    settings: OpenSettings,
    n_tokens: int,
    *,
    max_threads: int = 0,
    others: Mapping[str, str | Path] | None = None,
) -> list[Condition]:
    """The conditions of the experiment, references first.

    Args:
        settings: the reference.
        max_threads: thread counts are 1, 2, 4, ... up to this; by default the reference's count.
        others: quantizations of the same model by name, compared with it.
    """
    n_threads = settings.n_threads or 1
    return [
        *_repetitions(settings, n_tokens // 2),
        *_thread_counts(settings, n_tokens // 2, _powers_of_two(max_threads or n_threads) - {n_threads}),
        *_other_settings(settings, n_tokens // 2),
        *(
            Condition(f"weights: {name}", "weights", "prefill", settings, model=str(path))
            for name, path in (others or {}).items()
        ),
    ]


def _repetitions(settings: OpenSettings, half: int) -> Iterator[Condition]:
    """The two references, each repeated in the same process and in a fresh one."""
    for name, schedule in (("prefill", Schedule()), ("decode", Schedule(half))):
        yield Condition(name, "reference", "", settings, schedule)
        yield Condition(f"{name}, same process again", IDENTICAL, name, settings, schedule, again=name)
        yield Condition(f"{name}, fresh process", IDENTICAL, name, settings, schedule)


def _thread_counts(settings: OpenSettings, half: int, counts: set[int]) -> Iterator[Condition]:
    for n in sorted(counts):
        threads = replace(settings, n_threads=n, n_threads_batch=n)
        flash = replace(threads, flash_attn=True)
        label, decode = f"{n} thread{'s' if n > 1 else ''}", Schedule(half)
        yield Condition(f"{label}, prefill", "threads", "prefill", threads)
        yield Condition(f"{label}, decode", "threads", "decode", threads, decode)
        yield Condition(
            f"{label}, decode, flash attention", "threads", "flash attention, decode", flash, decode
        )


def _powers_of_two(largest: int) -> set[int]:
    return {largest} | {2**i for i in range(largest.bit_length())}


def _other_settings(settings: OpenSettings, half: int) -> Iterator[Condition]:
    two_calls, flash = Schedule(half, decode=False), {"flash_attn": True}
    yield Condition("prefill in two calls", "batch", "prefill", settings, two_calls)
    restored = replace(two_calls, restore=True)
    yield Condition("saved state restored", "state", "prefill in two calls", settings, restored)
    yield Condition("all by decode", "phase", "prefill", settings, Schedule(0))
    changes: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        *((f"n_batch {n}", "batch", "prefill", {"n_batch": n, "n_ubatch": n}) for n in BATCHES),
        ("n_ubatch 7 in n_batch 512", "batch", "prefill", {"n_ubatch": 7}),
        ("n_ctx doubled", "context", "prefill", {"n_ctx": 2 * settings.n_ctx}),
        ("flash attention, prefill", "attention", "prefill", flash),
        ("KV cache f32", "cache", "prefill", {"type_k": "f32", "type_v": "f32"}),
        (
            "KV cache q8_0",
            "cache",
            "flash attention, prefill",
            {**flash, "type_k": "q8_0", "type_v": "q8_0"},
        ),
        ("repacked weights (extra buffers)", "buffers", "prefill", {"use_extra_bufts": True}),
    )
    for name, kind, against, changed in changes:
        if changed.get("n_batch") != settings.n_batch:
            yield Condition(name, kind, against, replace(settings, **changed))
    flashed = replace(settings, flash_attn=True)
    yield Condition("flash attention, decode", "attention", "decode", flashed, Schedule(half))


def default_settings(path: str | Path, n_tokens: int, n_output: int = 16, n_threads: int = 0) -> OpenSettings:
    """The reference's settings: a context that holds text and answer; 0 threads: what suits the model."""
    n_ctx = -(-(n_tokens + n_output) // 256) * 256
    return OpenSettings(n_ctx=n_ctx, n_threads=n_threads or threads_for(path))


def quantizations(path: str | Path, other: str = "") -> dict[str, Path]:
    """The files to compare the model's routing with, by name: ``other``, or for the reference model its Q8_0.

    Args:
        other: a registered name, a file, or empty.

    Raises:
        RegistryError: there is no such model.
    """
    if not other and open_shards(path).headers[0].get("general.name") == "DFQS-Nano":
        other = "dfqs-nano-q8_0"
    return {Path(other).stem: resolve(other)[0]} if other else {}


def passage_tokens(model: Model, n_tokens: int) -> list[int]:
    """The text of the experiment in this model's tokens.

    It is the stored passage, again and again as needed, and at the end a question in the model's chat
    template, so that the greedy continuation is an answer.

    Raises:
        ModelError: ``n_tokens`` does not hold the question.
    """
    has_template = bool(model.header.get("tokenizer.chat_template"))
    question = chat_prompt(model, QUESTION) if has_template else model.tokenize(QUESTION, special=False)
    passage = model.tokenize((data_dir() / PASSAGE).read_text(encoding="utf-8"), special=False)
    left = n_tokens - len(question)
    if left < 1 or not passage:
        raise ModelError(
            f"{n_tokens} tokens do not hold the question ({len(question)})",
            where=model.path,
            hint="raise n_tokens",
        )
    body = (passage * (left // len(passage) + 1))[:left]
    return model.with_bos(body)[:left] + question


# ---- running ----


def run_experiment(
    path: str | Path,
    folder: str | Path,
    *,
    settings: OpenSettings | None = None,
    n_tokens: int = 512,
    n_output: int = 16,
    n_threads: int = 0,
    max_threads: int = 0,
    other: str = "",
    others: Mapping[str, str | Path] | None = None,
    fresh: bool = False,
    chosen: Sequence[str] = (),
) -> Experiment:
    """Run all conditions (or those named, with their references), and compare.

    Args:
        path: the GGUF file, or any shard of it.
        folder: keeps the traces; made if missing.
        settings: the reference's; by default a context that holds text and answer.
        n_tokens: length of the text.
        n_output: tokens of the greedy answer.
        n_threads: of the reference, where ``settings`` does not say; 0: what suits the model.
        max_threads: the largest count of threads; by default the usable cores.
        other: another quantization to compare with, as in `quantizations`.
        others: such files by name, in place of ``other``.
        fresh: record again what an earlier run left.
        chosen: names of conditions; all by default.

    Raises:
        DfqsError: the model cannot be opened under the reference's settings.
    """
    settings = settings or default_settings(path, n_tokens, n_output, n_threads)
    with open_model(path, settings) as model:
        tokens = passage_tokens(model, n_tokens)
    threads = max_threads or max(usable_cores(), settings.n_threads or 1)
    others = quantizations(path, other) if others is None else others
    planned = _with_references(conditions(settings, len(tokens), max_threads=threads, others=others), chosen)
    recording = _Recording(Path(path), Path(folder), tokens, n_output, fresh)
    recording.folder.mkdir(parents=True, exist_ok=True)
    for group in tqdm(_processes(planned), desc="conditions", leave=False):
        recording.run(group)
    traces = recording.traces
    if "prefill" not in traces:
        why = recording.status["prefill"]
        raise ModelError(f"the reference run failed: {why}", where=path, hint="lower n_ctx")
    table = comparison_table(planned, traces, recording.status)
    n_made = recording.n_made
    return Experiment(np.asarray(tokens, np.int32), table, traces, settings, n_made, len(traces) - n_made)


def _with_references(planned: list[Condition], chosen: Sequence[str]) -> list[Condition]:
    if not chosen:
        return planned
    by_name = {condition.name: condition for condition in planned}
    unknown = [name for name in chosen if name not in by_name]
    if unknown:
        raise DfqsError(f"no condition is called {unknown[0]!r}", hint=f"there are {', '.join(by_name)}")
    names, queue = {"prefill"}, list(chosen)
    while queue:
        condition = by_name[queue.pop()]
        names.add(condition.name)
        queue += [name for name in (condition.against, condition.again) if name and name not in names]
    return [condition for condition in planned if condition.name in names]


def _processes(planned: list[Condition]) -> list[list[Condition]]:
    """Conditions that share a process: a condition, and its repetitions."""
    groups = {condition.name: [condition] for condition in planned if not condition.again}
    for condition in planned:
        if condition.again:
            groups[condition.again].append(condition)
    return list(groups.values())


def comparison_table(
    planned: Sequence[Condition], traces: Mapping[str, Trace], status: Mapping[str, str]
) -> pd.DataFrame:
    """One row a condition that has a reference; its numbers are missing where its run failed."""
    import pandas as pd

    rows = []
    for condition in planned:
        if condition.against:
            row = {"condition": condition.name, "kind": condition.kind, "against": condition.against}
            row["status"] = status[condition.name]
            if condition.name in traces and condition.against in traces:
                row |= _compared(traces[condition.against], traces[condition.name])
            rows.append(row)
    table = pd.DataFrame(rows)
    counts = [name for name in table if str(name).startswith(("n_", "first_"))]
    return table.astype(dict.fromkeys(counts, "Int64"))


def _compared(a: Trace, b: Trace) -> dict[str, Any]:
    try:
        return asdict(compare(a, b))
    except RoutingError as error:  # another model than the reference, not another quantization of it
        return {"status": f"not comparable: {error.what}"}


@dataclass
class _Recording:
    """The traces of one text so far: what was recorded now or earlier, and how each condition ended."""

    path: Path
    folder: Path
    tokens: list[int]
    n_output: int
    fresh: bool

    def __post_init__(self) -> None:
        self.traces: dict[str, Trace] = {}
        self.status: dict[str, str] = {}
        self.n_made = 0

    def run(self, group: list[Condition]) -> None:
        """Have one process's traces, and note how it ended."""
        why = ""
        if group[0].settings.use_extra_bufts and has_amx():
            why = "not tried: extra buffers crash on CPUs with AMX (ggml-org/llama.cpp#20824)"
        else:
            try:
                self.traces |= self._traces(group)
            except DfqsError as error:
                why = f"failed: {error.what}"
        self.status |= {condition.name: why or "done" for condition in group}

    def _traces(self, group: list[Condition]) -> dict[str, Trace]:
        first = group[0]
        path = Path(first.model) if first.model else self.path
        files = {condition.name: self.folder / f"{_file_name(condition.name)}.npz" for condition in group}
        job = {
            "format": FORMAT,
            "model": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in open_shards(path).paths],
            "runtime": llama_version(),
            "settings": first.settings.as_dict(),
            "schedule": vars(first.schedule),
            "tokens": self.tokens,
            "n_output": self.n_output,
            "names": list(files),
        }
        note = files[first.name].with_suffix(".json")

        def make() -> dict[str, Any]:
            note.unlink(missing_ok=True)  # it would vouch for traces that are replaced from here on
            where = {"path": str(path.resolve()), "files": [str(f.resolve()) for f in files.values()]}
            child.run("dfqs_nb.routing.record_child", {**job, **where}, where=path)
            self.n_made += len(group)
            return {"traces": [file.name for file in files.values()]}

        remembered(note, job, make, fresh=self.fresh)
        try:
            return {name: load_trace(file) for name, file in files.items()}
        except RoutingError:  # a disk may lose what the note vouches for
            remembered(note, job, make, fresh=True)
            return {name: load_trace(file) for name, file in files.items()}


def _file_name(name: str) -> str:
    """A condition's name as a file name.

    >>> _file_name("KV cache q8_0"), _file_name("prefill, fresh process")
    ('KV-cache-q8_0', 'prefill-fresh-process')
    """
    return "-".join("".join(c if c.isalnum() or c in "_." else " " for c in name).split())
