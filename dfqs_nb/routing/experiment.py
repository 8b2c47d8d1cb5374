"""Run texts under many conditions and loads, with one load of the weights a process, and compare choices.

If llama.cpp refuses a condition, or dies of it, the experiment reports that and goes on. A trace that an
earlier run made under the same conditions is used again.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import tqdm.auto

from dfqs_nb.core import child, display
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.files import canonical_sha256, read_json, write_json
from dfqs_nb.core.machine import has_amx, usable_cores
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.facts import experts
from dfqs_nb.gguf.models import resolve
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.settings import OpenSettings, llama_version
from dfqs_nb.routing.plan import Condition, conditions, read_texts
from dfqs_nb.routing.recorder import RoutingError
from dfqs_nb.routing.results import Experiment
from dfqs_nb.routing.trace import Trace, load_trace, require_csv
from dfqs_nb.routing.verdict import comparison_table

PASSAGE = "prompts/routing_passage.txt"
FORMAT = 4  # of a kept trace; a new number makes old ones be recorded again
CHILD = "dfqs_nb.routing.record_child"


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
    recording.run_all()
    traces, status = recording.traces, recording.status
    if "prefill" not in traces:
        raise ModelError(f"the reference run failed: {status['prefill']}", where=path, hint="lower n_ctx")
    loads = {each.name: each.load for each in planned if each.load and each.kind in ("alone", "load")}
    table = comparison_table(planned, traces, status)
    about = recording.n_made, recording.sentence
    experiment = Experiment(Path(path), settings, loads, traces, status, table, given, *about)
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

    def run_all(self) -> None:
        """Record or reuse every trace; each process is one child, which loads the weights once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started, about = time.monotonic(), [FORMAT, llama_version(), self.shared, _identity(self.path)]
        self.keys = {
            each.name: canonical_sha256(
                [*about, asdict(replace(each, model="")), _identity(Path(each.model or self.path))]
            )
            for each in self.planned
        }
        self.plan_note = self.folder / f"plan-{self.budget_seconds:g}-s.json"
        self.plan = self._plan_so_far()
        processes = dict.fromkeys(each.process for each in self.planned)
        self.sentence = f"{len(self.keys)} runs in {len(processes)} processes, each of which loads once."
        if not self.budget_seconds:
            tqdm.auto.tqdm.write(self.sentence)
        with display.tqdm(total=len(self.keys), desc="routing", leave=False) as bar:
            for process in processes:
                self._run_process([each for each in self.planned if each.process == process], bar.update)

    def _plan_so_far(self) -> dict[str, Any]:
        """Everything without a budget, or where all was recorded; an earlier plan; else nothing yet."""
        self.plan = everything = {"scale": 1.0, "kept": list(self.keys)}
        with contextlib.suppress(OSError, ValueError):
            plan = read_json(self.plan_note)
            if isinstance(plan, dict) and plan.get("keys") == self.keys and not self.fresh:
                return plan
        if not self.budget_seconds or all(map(self._known, self.keys)):
            return everything
        self.traces.clear()  # of full length: the plan may shorten all
        self.status.clear()
        return {}

    def _run_process(self, group: list[Condition], progress: Callable[[int], object]) -> None:
        if group[0].settings.use_extra_bufts and has_amx():
            why = "not tried: extra buffers crash on CPUs with AMX (ggml-org/llama.cpp#20824)"
            self.status |= {condition.name: why for condition in group}
            return
        waiting = [condition for condition in group if not self._known(condition.name)]
        progress(len(group) - len(waiting))
        while waiting := [condition for condition in waiting if condition.name not in self.status]:
            if self.plan and not set(self.plan["kept"]) & {condition.name for condition in waiting}:
                break
            if self._left_seconds() < 0 and "prefill" in self.traces:
                break
            self.begun, hear = "", partial(self._hear, progress)
            try:
                child.run(CHILD, self._job(waiting), where=self.path, on_message=hear)
                break
            except DfqsError as error:  # the run that it died of fails, and a new child takes the others
                if "prefill" not in {*self.traces, *self.status} and self.begun in ("", "prefill"):
                    raise  # nothing to compare with
                died = self.begun and self.begun not in self.status
                lost = [self.begun] if died else [condition.name for condition in waiting]
                self.status |= {name: f"failed: {error.what}" for name in lost if name not in self.status}
        for condition in group:
            self.status.setdefault(condition.name, "left out: it does not fit into budget_minutes")

    def _job(self, waiting: list[Condition]) -> dict[str, Any]:
        first, kept = waiting[0], set(self.plan.get("kept", self.keys))
        return {
            **self.shared,
            "path": str(Path(first.model or self.path).resolve()),
            "runs": {each.name: str(self._file(each.name)) for each in waiting if each.name in kept},
            "planned": list(map(asdict, self.planned)),
            "keys": self.keys,
            "budget_seconds": self.budget_seconds,
            # other processes have the runs that a verdict needs most: something is left for them
            "left_seconds": self._left_seconds() * (0.8 if first.process == "main" else 1.0),
            "scale": self.plan.get("scale", 0),
        }

    def _left_seconds(self) -> float:
        return self.budget_seconds and self.started + self.budget_seconds - time.monotonic()

    def _hear(self, progress: Callable[[int], object], message: dict[str, Any]) -> None:
        self.begun = message.get("begun", self.begun)
        if plan := message.get("plan"):
            self.plan = plan
            write_json(self.plan_note, {"keys": self.keys, **plan})
            self.sentence = (
                f"Budget {self.budget_seconds / 60:g} minutes: {len(plan['kept'])} of {len(self.keys)} runs, "
                f"at {plan['scale']:g} of each length. Loading takes {plan['load_seconds']:.1f} s, a token "
                f"{plan['prefill_seconds']:.2g} s in prefill and {plan['decode_seconds']:.2g} s in decode."
            )
            tqdm.auto.tqdm.write(self.sentence)
        if name := message.get("done"):
            self.status[name] = f"failed: {message['why']}" if message["why"] else "done"
            if not message["why"]:
                self.traces[name], self.n_made = load_trace(self._file(name)), self.n_made + 1
            progress(1)

    def _known(self, name: str) -> bool:
        """Whether an earlier run left this trace, made under the same conditions."""
        if self.fresh or not self.plan:
            return False
        try:
            trace = load_trace(self._file(name))
        except RoutingError:
            return False
        made = trace.conditions.get("key"), trace.conditions.get("scale")
        if made != (self.keys[name], self.plan["scale"]):
            return False
        self.traces[name], self.status[name] = trace, "done"
        return True

    def _file(self, name: str) -> Path:
        word = re.sub(r"[^\w.]+", "-", name).strip("-")
        return (self.folder / f"{word}.npz").resolve()


def _identity(path: Path) -> list[Any]:
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in open_shards(path).paths]
