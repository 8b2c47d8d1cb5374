"""Run one text under many conditions, each in a process of its own, and compare what the routers chose.

Every condition is held against one other run that differs in one thing. A condition that llama.cpp refuses,
or dies of, is reported as such and does not end the experiment. Traces are kept as ``.npz``; a trace that is
there and was made under the same conditions is not made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.child import died, ending
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.machine import CPUINFO, usable_cores
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.models import resolve
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model, open_model, threads_for
from dfqs_nb.llama.settings import OpenSettings, llama_version
from dfqs_nb.routing.compare import compare
from dfqs_nb.routing.trace import RoutingError, Schedule, Trace, load_trace, open_recorded, record

if TYPE_CHECKING:
    import pandas as pd

PASSAGE = "prompts/routing_passage.txt"
QUESTION = "What is the capital of France?"
BATCHES = (1, 7, 64)  # beside the default of 512
IDENTICAL = "identical"  # the kind of a condition that repeats its reference exactly
FORMAT = 1  # of a kept trace; a new number makes old ones be recorded again


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
    others: dict[str, str | Path] | None = None,
) -> list[Condition]:
    """The conditions of the experiment, references first.

    Args:
        settings: the reference.
        max_threads: thread counts are 1, 2, 4, ... up to this; by default the reference's count.
        others: quantizations of the same model by name, compared with it.
    """
    half, change = n_tokens // 2, dataclasses.replace
    decode, split = Schedule(half), Schedule(half, decode=False)
    flash = change(settings, flash_attn=True)
    found = [
        Condition("prefill", "reference", "", settings),
        Condition("prefill, same process again", IDENTICAL, "prefill", settings, again="prefill"),
        Condition("prefill, fresh process", IDENTICAL, "prefill", settings),
        Condition("decode", "reference", "", settings, decode),
        Condition("decode, same process again", IDENTICAL, "decode", settings, decode, again="decode"),
        Condition("decode, fresh process", IDENTICAL, "decode", settings, decode),
        Condition("prefill in two calls", "batch", "prefill", settings, split),
        Condition(
            "saved state restored", "state", "prefill in two calls", settings, change(split, restore=True)
        ),
        Condition("all by decode", "phase", "prefill", settings, Schedule(0)),
    ]
    for n in _threads(max_threads or settings.n_threads or 1, settings.n_threads or 1):
        threads = change(settings, n_threads=n, n_threads_batch=n)
        label = f"{n} thread{'s' if n > 1 else ''}"
        found += [
            Condition(f"{label}, prefill", "threads", "prefill", threads),
            Condition(f"{label}, decode", "threads", "decode", threads, decode),
            Condition(
                f"{label}, decode, flash attention",
                "threads",
                "flash attention, decode",
                change(threads, flash_attn=True),
                decode,
            ),
        ]
    found += [
        Condition(f"n_batch {n}", "batch", "prefill", change(settings, n_batch=n, n_ubatch=n))
        for n in BATCHES
        if n != settings.n_batch
    ]
    found += [
        Condition("n_ubatch 7 in n_batch 512", "batch", "prefill", change(settings, n_ubatch=7)),
        Condition("n_ctx doubled", "context", "prefill", change(settings, n_ctx=2 * settings.n_ctx)),
        Condition("flash attention, prefill", "attention", "prefill", flash),
        Condition("flash attention, decode", "attention", "decode", flash, decode),
        Condition("KV cache f32", "cache", "prefill", change(settings, type_k="f32", type_v="f32")),
        Condition(
            "KV cache q8_0", "cache", "flash attention, prefill", change(flash, type_k="q8_0", type_v="q8_0")
        ),
        Condition(
            "repacked weights (extra buffers)", "buffers", "prefill", change(settings, use_extra_bufts=True)
        ),
    ]
    found += [
        Condition(f"weights: {name}", "weights", "prefill", settings, model=str(path))
        for name, path in (others or {}).items()
    ]
    return found


def _threads(largest: int, reference: int) -> list[int]:
    counts = {1, largest} | {2**i for i in range(largest.bit_length()) if 2**i <= largest}
    return sorted(counts - {reference})


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
    """The text of the experiment in this model's tokens: the stored passage, again and again as needed, and
    at the end a question in the model's chat template, so that the greedy continuation is an answer.

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


@dataclass(frozen=True)
class Experiment:
    """What every condition gave.

    Attributes:
        tokens: the text, int32 ``(n,)``.
        table: one row a comparison: ``condition``, ``kind``, ``against``, ``status`` (``done``, or why not),
            and the fields of `routing_compare.Comparison`.
        traces: by the condition's name.
        settings: the reference's settings.
        n_made, n_reused: traces recorded now, and found.
    """

    tokens: np.ndarray = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    traces: dict[str, Trace] = field(repr=False)
    settings: OpenSettings
    n_made: int
    n_reused: int


def run_experiment(
    path: str | Path,
    folder: str | Path,
    *,
    settings: OpenSettings | None = None,
    n_tokens: int = 512,
    n_output: int = 16,
    max_threads: int = 0,
    others: dict[str, str | Path] | None = None,
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
        max_threads: the largest count of threads; by default the usable cores.
        others: as in `conditions`.
        fresh: record again what an earlier run left.
        chosen: names of conditions; all by default.

    Raises:
        DfqsError: the model cannot be opened under the reference's settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings or default_settings(path, n_tokens, n_output)
    with open_model(path, settings) as model:
        tokens = passage_tokens(model, n_tokens)
    threads = max_threads or max(usable_cores(), settings.n_threads)
    planned = conditions(settings, len(tokens), max_threads=threads, others=others)
    wanted = _with_references(planned, chosen)
    traces: dict[str, Trace] = {}
    status: dict[str, str] = {}
    made = 0
    for group in tqdm(_processes(wanted), desc="conditions", leave=False):
        found, why, new = _run_group(group, Path(path), folder, tokens, n_output, fresh)
        traces.update(found)
        status.update({one.name: why for one in group})
        made += new
    if "prefill" not in traces:
        raise ModelError(f"the reference run failed: {status['prefill']}", where=path, hint="lower n_ctx")
    table = comparison_table(wanted, traces, status)
    return Experiment(np.asarray(tokens, np.int32), table, traces, settings, made, len(traces) - made)


def _with_references(planned: list[Condition], chosen: Sequence[str]) -> list[Condition]:
    if not chosen:
        return planned
    by_name = {one.name: one for one in planned}
    unknown = [name for name in chosen if name not in by_name]
    if unknown:
        raise DfqsError(f"no condition is called {unknown[0]!r}", hint=f"there are {', '.join(by_name)}")
    names, queue = {"prefill"}, list(chosen)
    while queue:
        one = by_name[queue.pop()]
        names.add(one.name)
        queue += [name for name in (one.against, one.again) if name and name not in names]
    return [one for one in planned if one.name in names]


def _processes(planned: list[Condition]) -> list[list[Condition]]:
    """Conditions that share a process: one, and its repetitions."""
    groups = {one.name: [one] for one in planned if not one.again}
    for one in planned:
        if one.again:
            groups[one.again].append(one)
    return list(groups.values())


def comparison_table(
    planned: Sequence[Condition], traces: dict[str, Trace], status: dict[str, str]
) -> pd.DataFrame:
    """One row a condition that has a reference; its numbers are missing where its run failed."""
    import pandas as pd

    rows = []
    for one in planned:
        if one.against:
            found = {"condition": one.name, "kind": one.kind, "against": one.against}
            found["status"] = status[one.name]
            if one.name in traces and one.against in traces:
                found |= _compared(traces[one.against], traces[one.name])
            rows.append(found)
    table = pd.DataFrame(rows)
    counts = [name for name in table if name.startswith(("n_", "first_"))]
    return table.astype(dict.fromkeys(counts, "Int64"))


def _compared(a: Trace, b: Trace) -> dict[str, Any]:
    try:
        return asdict(compare(a, b))
    except RoutingError as error:  # another model than the reference, not another quantization of it
        return {"status": f"not comparable: {error.what}"}


def _run_group(
    group: list[Condition], path: Path, folder: Path, tokens: list[int], n_output: int, fresh: bool
) -> tuple[dict[str, Trace], str, int]:
    """The traces of one process, ``"done"`` or why there are none, and how many were recorded now."""
    first = group[0]
    path = Path(first.model) if first.model else path
    why = _unsafe(first.settings)
    if why:
        return {}, why, 0
    job = {
        "format": FORMAT,
        "path": str(path.resolve()),
        "model": _fingerprint(path),
        "runtime": llama_version(),
        "settings": first.settings.as_dict(),
        "schedule": vars(first.schedule),
        "tokens": tokens,
        "n_output": n_output,
        "names": [one.name for one in group],
    }
    key = hashlib.sha256(json.dumps(job | {"path": ""}, sort_keys=True).encode()).hexdigest()
    files = [folder / f"{_file_name(one.name)}.npz" for one in group]
    if not fresh and all(_key_of(file) == key for file in files):
        return _load(group, files), "done", 0
    why = _run_child(job | {"key": key, "files": [str(file.resolve()) for file in files]})
    return ({}, why, 0) if why else (_load(group, files), "done", len(group))


def _load(group: list[Condition], files: list[Path]) -> dict[str, Trace]:
    return {one.name: load_trace(file) for one, file in zip(group, files, strict=True)}


def _file_name(name: str) -> str:
    """A condition's name as a file name.

    >>> _file_name("KV cache q8_0"), _file_name("prefill, fresh process")
    ('KV-cache-q8_0', 'prefill-fresh-process')
    """
    return "-".join("".join(c if c.isalnum() or c in "_." else " " for c in name).split())


def _key_of(file: Path) -> str:
    """The key under which a kept trace was made; empty if it is missing or damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return stored["key"].tobytes().decode()
    except Exception:  # whatever is wrong with it, it is recorded again
        return ""


def _fingerprint(path: Path) -> list[list[Any]]:
    """Tells a changed model from the same one without reading its weights."""
    shards = open_shards(path)
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in shards.paths]


def _unsafe(settings: OpenSettings) -> str:
    """Why these settings are not tried on this processor; empty if they are."""
    flags = CPUINFO.read_text() if CPUINFO.exists() else ""
    if settings.use_extra_bufts and "amx_tile" in flags:
        return "not tried: extra buffers crash on CPUs with AMX (ggml-org/llama.cpp#20824)"
    return ""


def _run_child(job: dict[str, Any]) -> str:
    """Record in a child process; empty if it went well, else what went wrong."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "GGML_NO_BACKTRACE": "1",
        "PYTHONIOENCODING": "utf-8",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin for each other crawl on a busy machine
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "dfqs_nb.routing.experiment"]
    child = subprocess.run(
        command, input=json.dumps(job).encode(), capture_output=True, env=environment, check=False
    )
    said = child.stdout.decode("utf-8", "replace").strip().splitlines()
    answer = json.loads(said[-1]) if said else {}
    if answer.get("done"):
        return ""
    if "failed" in answer:
        return f"failed: {answer['failed']}"
    log = child.stderr.decode("utf-8", "replace").splitlines()
    return f"failed: {died(ending(child.returncode), job['path'], [], log, 'while loading it').what}"


# ---- the child process ----


def main() -> int:
    """Read a job from standard input, record it, write the traces, and say how it went."""
    job = json.loads(sys.stdin.read())
    settings, schedule = OpenSettings(**job["settings"]), Schedule(**job["schedule"])
    try:
        with open_recorded(job["path"], settings, probe=False) as recorded:
            for name, file in zip(job["names"], job["files"], strict=True):
                trace = record(recorded, job["tokens"], schedule, n_output=job["n_output"])
                trace.conditions["condition"] = name
                trace.save(file, key=job["key"])
        answer: dict[str, Any] = {"done": True}
    except DfqsError as error:
        answer = {"failed": error.what}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
