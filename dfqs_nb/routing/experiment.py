"""Run texts under many conditions and loads, with one load of the weights a process, and compare choices.

If llama.cpp refuses a condition, or dies of it, the experiment reports that and goes on. A trace that an
earlier run made under the same conditions is used again.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tqdm.auto

from dfqs_nb.core import child, display
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.files import canonical_sha256
from dfqs_nb.core.journal import remembered
from dfqs_nb.core.machine import has_amx, usable_cores
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.facts import experts
from dfqs_nb.gguf.models import resolve
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.settings import OpenSettings, llama_version
from dfqs_nb.routing.plan import Condition, Costs, conditions, fit, read_texts
from dfqs_nb.routing.recorder import RoutingError
from dfqs_nb.routing.results import Experiment
from dfqs_nb.routing.trace import Trace, load_trace, require_csv
from dfqs_nb.routing.verdict import compared

PASSAGE = "prompts/routing_passage.txt"
FORMAT = 5  # of a kept trace; a new number makes old ones be recorded again
CHILD = "dfqs_nb.routing.record_child"
LEFT_OUT = "left out: it does not fit into budget_minutes"


def quantizations(path: str | Path, other: str = "") -> dict[str, Path]:
    """The file to compare with, by name: ``other`` (a registered name or a file), or the reference's Q8_0."""
    if not other and open_shards(path).headers[0].get("general.name") == "DFQS-Nano":
        other = "dfqs-nano-q8_0"
    return {Path(other).stem: resolve(other)[0]} if other else {}


def run_experiment(
    path: str | Path,
    folder: str | Path,
    *,
    n_tokens: int = 512,
    n_output: int = 16,
    n_threads: int = 0,
    n_gpu_layers: int = 0,
    other: str = "",
    texts: str | Path = "",
    budget_minutes: float = 0.0,
    fresh: bool = False,
    export: str | Path = "",
) -> Experiment:
    """Run all conditions and loads, and compare.

    Args:
        path: the GGUF file, or any shard of it.
        folder: keeps the traces; made if missing.
        n_tokens, n_output: of the text, and of the greedy answer.
        n_threads, n_gpu_layers: of the reference; 0 threads: as many as suit the model.
        other: another quantization to compare with, a registered name or a file.
        texts: a folder of texts for loads and profile, a subfolder a domain; empty: the workbook's own.
        budget_minutes: lengths are halved and runs left out until it fits, as in `plan.fit`; 0: no bound.
        fresh: record again what an earlier run left.
        export: also write the traces there, as CSV.

    Raises:
        DfqsError: the reference cannot run, or a parameter is wrong.
    """
    if str(export):
        require_csv(export)
        if not experts(open_shards(path).as_one).moe_layers:
            hint = "leave --export out: only the determinism of its logits can be measured"
            raise ModelError("no routed experts here: a dense model", where=path, hint=hint)
    given, n_ctx = read_texts(texts), -(-(n_tokens + n_output) // 256) * 256
    fitting = OpenSettings.of(path, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
    settings, threads = replace(fitting, n_ctx=n_ctx), max(usable_cores(), fitting.n_threads or 1)
    planned = conditions(settings, n_tokens, threads, quantizations(path, other), len(given))
    passage = (data_dir() / PASSAGE).read_text(encoding="utf-8")
    shared: dict[str, Any] = {"passage": passage, "texts": [text.model_dump() for text in given]}
    shared |= {"n_tokens": n_tokens, "n_output": n_output}
    recording = _Recording(Path(path), Path(folder), planned, shared, 60 * budget_minutes, fresh)
    plan, traces = recording.run(), recording.traces
    rows = compared(planned, traces, recording.status, given)
    experiment = Experiment(Path(path), settings, traces, recording.status, rows, recording.n_made, plan)
    if str(export):
        experiment.export(export)
    return experiment


@dataclass
class _Recording:
    """The traces recorded now or earlier, and how each condition ended."""

    path: Path
    folder: Path
    planned: list[Condition]
    shared: dict[str, Any]  # texts and lengths, of every child's job
    budget_seconds: float
    fresh: bool
    traces: dict[str, Trace] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)
    n_made: int = 0

    def run(self) -> str:
        """Record or reuse every trace; conditions of a process share a child. The plan, in a sentence."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started, about = time.monotonic(), [FORMAT, llama_version(), self.shared, _identity(self.path)]
        self.keys = {
            each.name: canonical_sha256(
                [*about, asdict(replace(each, model="")), _identity(Path(each.model or self.path))]
            )
            for each in self.planned
        }
        processes = list(dict.fromkeys(each.process for each in self.planned))
        ordered = sorted(self.planned, key=lambda each: processes.index(each.process))
        with child.Worker(CHILD) as worker:
            plan = self._plan(worker, len(processes))
            tqdm.auto.tqdm.write(plan["sentence"])
            process = processes[0]
            for each in display.tqdm(ordered, desc="routing"):
                if each.process != process:
                    worker.close()  # the next job starts another
                process = each.process
                fits = each.name in plan["kept"]
                self.status[each.name] = self._record(worker, each, plan["scale"]) if fits else LEFT_OUT
        return str(plan["sentence"])

    def _plan(self, worker: child.Worker, n_processes: int) -> dict[str, Any]:
        """Everything without a budget, or where all was recorded; an earlier plan; else what fits."""
        names, n_minutes = list(self.keys), self.budget_seconds / 60
        if not self.budget_seconds or all(self._kept(name, 1.0) for name in names):
            sentence = f"{len(names)} runs in {n_processes} processes, each of which loads once."
            return {"scale": 1.0, "kept": names, "sentence": sentence}

        def make() -> dict[str, Any]:
            costs = Costs(*worker.run(self._job(self.planned[0], 1.0, ""), where=self.path)["costs"])
            scale, kept = fit(self.planned, costs, self.budget_seconds)
            sentence = (
                f"Budget {n_minutes:g} minutes: {len(kept)} of {len(names)} runs, at {scale:g} of each "
                f"length. Loading takes {costs.load_seconds:.1f} s, a token {costs.prefill_seconds:.2g} s in "
                f"prefill and {costs.decode_seconds:.2g} s in decode."
            )
            return {"scale": scale, "kept": kept, "sentence": sentence}

        about = {"keys": self.keys, "budget_seconds": self.budget_seconds}
        return remembered(self.folder / "plan.json", about, make, fresh=self.fresh)

    def _record(self, worker: child.Worker, each: Condition, scale: float) -> str:
        """Record a condition, unless an earlier run left its trace; how it ended."""
        if (trace := self._kept(each.name, scale)) is None:
            if each.settings.use_extra_bufts and has_amx():
                return "not tried: extra buffers crash on CPUs with AMX (ggml-org/llama.cpp#20824)"
            # other processes have the runs that a verdict needs most: something is left for them
            share, used = 0.8 if each.process == "main" else 1.0, time.monotonic() - self.started
            if self.traces and self.budget_seconds and used > share * self.budget_seconds:
                return LEFT_OUT  # the machine is slower than it was when its speed was measured
            file = self._file(each.name)
            try:
                worker.run(self._job(each, scale, str(file)), where=self.path)
            except DfqsError as error:
                if not self.traces:
                    raise  # nothing to compare with
                return f"failed: {error.what}"
            trace, self.n_made = load_trace(file), self.n_made + 1
        self.traces[each.name] = trace
        return "done"

    def _job(self, each: Condition, scale: float, file: str) -> dict[str, Any]:
        path, about = Path(each.model or self.path), {"condition": each.name, "key": self.keys[each.name]}
        job = {"path": str(path.resolve()), "condition": asdict(each.scaled(scale)), "file": file}
        return {**self.shared, **job, "about": {**about, "scale": scale}}

    def _kept(self, name: str, scale: float) -> Trace | None:
        """The trace that an earlier run made under the same conditions."""
        with contextlib.suppress(RoutingError):
            trace = load_trace(self._file(name))
            made = trace.conditions.get("key"), trace.conditions.get("scale")
            if not self.fresh and made == (self.keys[name], scale):
                return trace
        return None

    def _file(self, name: str) -> Path:
        word = re.sub(r"[^\w.]+", "-", name).strip("-")
        return (self.folder / f"{word}.npz").resolve()


def _identity(path: Path) -> list[Any]:
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in open_shards(path).paths]
