"""Run texts under many conditions and loads, with one load of the weights a process, and compare choices.

If llama.cpp refuses a condition, or dies of it, the experiment reports that and goes on. A trace that an
earlier run made under the same conditions is used again.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tqdm.std

from dfqs_nb.core import child, display
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import canonical_sha256, write_table
from dfqs_nb.core.journal import remembered
from dfqs_nb.core.machine import has_amx, usable_cores
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.shards import Files, open_shards
from dfqs_nb.llama.settings import OpenSettings, llama_version
from dfqs_nb.routing import verdict
from dfqs_nb.routing.plan import IDENTICAL, LEFT_OUT, Condition, conditions, fit, read_texts
from dfqs_nb.routing.trace import Trace, differences, load_trace

FORMAT = 7  # of a kept trace; a new number makes old ones be recorded again
NOT_IN_NAMES = re.compile(r"[^\w.]+")


@dataclass
class Experiment:
    """What every condition gave, and what it means.

    ``verdict``, ``under_load``: do identical conditions give identical choices, and others in the batch other
    ones? ``load_table``, ``sensitivities``, ``advice``: see `verdict`.
    """

    settings: OpenSettings  # the reference's
    traces: Mapping[str, Trace] = field(repr=False)  # by the condition's name
    rows: pd.DataFrame = field(repr=False)  # see `verdict.compared`
    left_out: list[str]  # conditions that do not fit into the budget
    n_made: int  # traces recorded now; the others are kept from earlier

    def __post_init__(self) -> None:
        """Judge; the run that all others are compared with, directly or through another, is ``reference``."""
        self.reference = self.traces["prefill"]
        self.load_table = verdict.load_table(self.rows)
        self.sensitivities = verdict.sensitivities(self.rows)
        self.verdict = verdict.judge(self.rows)
        self.under_load = verdict.judge_loads(self.rows, self.verdict)
        self.advice = verdict.advice(self.sensitivities)

    def _pairs(self, rows: pd.DataFrame) -> list[tuple[Any, Trace, Trace]]:
        """Rows of `rows` with their two traces, the reference first."""
        return [(row, self.traces[row.against], self.traces[row.condition]) for row in rows.itertuples()]

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the SHALL: repetitions are equal, and no load changed a choice."""
        load = self.under_load
        return bool(self.verdict.passed) and load.passed is not False and not load.facts["failed"]

    def judged(self) -> dict[str, Any]:
        """Both verdicts for the stage file: on repetitions, and on loads, by which the SHALL is judged."""
        loads = {"load_passed": self.under_load.passed, "load_sentence": self.under_load.text}
        return {**self.verdict.facts, **loads}

    def conclusions(self) -> list[str]:
        """What this experiment showed, in sentences made from its counts."""
        n, routed = len(self.sensitivities), self.reference.routed
        n_moved = int((self.sensitivities["n_differ" if routed else "logit_drift"] > 0).sum())
        what = "an expert choice" if routed else "a logit"
        moved = f"{n_moved} of {display.counted(n, 'changes of settings')} changed {what}."
        moved = moved if n else "No setting was changed."
        lines = [self.under_load.text, self.verdict.text, moved]
        if names := self.left_out:
            lines.append(f"Left out to fit into the budget: {len(names)} runs ({'; '.join(names[:8])}).")
        return lines

    def claims(self) -> pd.DataFrame:
        """The card's statements on routing: ``claim``, ``status`` and ``evidence``, in its order."""
        return verdict.claims(self.verdict, self.sensitivities)

    def agreement(self) -> pd.DataFrame:
        """Share of identical sets: a row a condition, as ranked, a column a layer, hash layers included."""
        repeats = self.rows[(self.rows["status"] == "done") & (self.rows["kind"] == IDENTICAL)]
        rows = pd.concat([repeats[repeats["text"] == ""], self.sensitivities[::-1]])
        shares = {row.condition: 1 - differences(a, b).mean(axis=0) for row, a, b in self._pairs(rows)}
        return pd.DataFrame(shares, index=self.reference.layers).T

    def flips(self) -> pd.DataFrame:
        """Flips under changes of settings: ``condition``, ``kind``, ``token``, ``layer``, ``margin``.

        ``first``: no earlier layer of the same or an earlier token flipped in the run, which would have
        changed what the router sees.
        """
        parts = [pd.DataFrame(columns=["condition", "kind", "token", "layer", "margin", "first"])]
        for row, a, b in self._pairs(self.sensitivities):
            tokens, columns = np.nonzero(differ := differences(a, b))
            before = np.logical_or.accumulate(np.logical_or.accumulate(differ), axis=1)
            places = {"token": tokens, "layer": a.layers[columns], "margin": a.margin[tokens, columns]}
            places["first"] = ~np.pad(before, ((0, 0), (1, 0)))[tokens, columns]
            parts.append(pd.DataFrame({"condition": row.condition, "kind": row.kind, **places}))
        return pd.concat(parts[1:] or parts, ignore_index=True)

    def margins(self) -> pd.Series:
        """The margin of every choice of the reference that has one."""
        return pd.Series(self.reference.margin[np.isfinite(self.reference.margin)])

    @property
    def profile(self) -> Trace | None:
        """The trace of all texts, each alone; None for a dense model, or where it did not run."""
        trace = self.traces.get("profile")
        return trace if trace and trace.routed else None

    def write_tables(self, folder: str | Path) -> list[Path]:
        """Write the tables ``routing_*.csv``."""
        tables = {"conditions": self.rows, "loads": self.load_table, "flips": self.flips()}
        tables["layers"] = self.agreement().rename_axis("condition").reset_index()
        if self.profile:
            tables["coverage"] = verdict.experts_needed(self.profile).reset_index()
        named = [(Path(folder) / f"routing_{name}.csv", it) for name, it in tables.items() if len(it.columns)]
        return [write_table(path, table, index=False) for path, table in named]


def run_experiment(
    model: Files,
    folder: str | Path,
    *,
    n_tokens: int = 512,
    n_output: int = 16,
    n_threads: int = 0,
    n_gpu_layers: int = 0,
    texts: str | Path = "",
    budget_minutes: float = 0.0,
    fresh: bool = False,
) -> Experiment:
    """Run all conditions and loads on a GGUF file, and compare; ``folder`` keeps the traces.

    ``n_tokens`` and ``n_output`` are of the text and of its greedy answer; 0 threads: as many as suit the
    model. ``texts``: as `plan.read_texts`. ``budget_minutes``: as `plan.fit`; 0: no bound. ``fresh``: record
    again what an earlier run left. A `DfqsError` if the reference cannot run, or a parameter is wrong.
    """
    shards = open_shards(model)
    given, n_ctx = read_texts(texts), -(-(n_tokens + n_output) // 256) * 256
    fitting = OpenSettings.of(shards, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
    settings, threads = replace(fitting, n_ctx=n_ctx), max(usable_cores(), fitting.n_threads or 1)
    planned = conditions(settings, n_tokens, threads, len(given))
    passage = (data_dir() / "prompts" / "routing_passage.txt").read_text(encoding="utf-8")
    job: dict[str, Any] = {"path": str(shards.paths[0].absolute()), "passage": passage, "n_tokens": n_tokens}
    job |= {"texts": [text.model_dump() for text in given], "n_output": n_output}
    runs = _Runs(Path(folder), shards.stamps(), planned, job, 60 * budget_minutes, fresh)
    runs.record()
    rows = verdict.compared(planned, runs.traces, runs.status, given)
    left_out = [name for name, how in runs.status.items() if how == LEFT_OUT]
    return Experiment(settings, runs.traces, rows, left_out, runs.n_made)


@dataclass
class _Runs:
    """The traces recorded now or earlier, and how each condition ended."""

    folder: Path
    files: list[list[Any]]  # of the model: `ShardSet.stamps`
    planned: list[Condition]
    job: dict[str, Any]  # model, texts and lengths, of every child's job
    budget_seconds: float
    fresh: bool
    traces: dict[str, Trace] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)
    n_made: int = 0

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        asked = {name: value for name, value in self.job.items() if name != "path"}  # not where the file lies
        self._about = [FORMAT, llama_version(), asked, self.files]  # what a kept trace must have in common

    def record(self) -> None:
        """Record or reuse every trace; conditions of a process share a child."""
        self.folder.mkdir(parents=True, exist_ok=True)
        processes = list(dict.fromkeys(each.process for each in self.planned))
        ordered = sorted(self.planned, key=lambda each: processes.index(each.process))
        with child.Worker("dfqs_nb.routing.record_child") as worker:
            (scale, kept), process = self._plan(worker), processes[0]
            for each in display.tqdm(ordered, desc="routing"):
                if each.process != process:
                    worker.close()  # the next job starts another
                process = each.process
                self.status[each.name] = self._run(worker, each.scaled(scale), each.name in kept)

    def _plan(self, worker: child.Worker) -> tuple[float, list[str]]:
        """Tell the scale of lengths, and the runs that fit into the budget or are there already."""
        names, tell = [each.name for each in self.planned], tqdm.std.tqdm.write
        if not self.budget_seconds or all(map(self._is_there, self.planned)):
            n = len({each.process for each in self.planned})
            tell(f"{len(names)} runs in {n} processes, each of which loads the model once.")
            return 1.0, names
        probe = partial(self._child, worker, self.planned[0], "")
        about = {"reference": self._file(self.planned[0]).name}
        costs = remembered(self.folder / "costs.json", about, probe, fresh=self.fresh)
        scale, kept = fit(self.planned, costs, self.budget_seconds, self._is_there)
        length = "full length" if scale == 1 else f"{scale:g} of each length"
        runs = f"{len(kept)} of {len(names)} runs, at {length}. Loading takes {costs['load']:.1f} s"
        speed = f"a token {costs['prefill']:.2g} s in prefill and {costs['decode']:.2g} s in decode"
        tell(f"Budget {self.budget_seconds / 60:g} min: {runs}, {speed}.")
        return scale, kept

    def _is_there(self, each: Condition) -> bool:
        """Whether an earlier run left the trace."""
        return not self.fresh and self._file(each).exists()

    def _run(self, worker: child.Worker, each: Condition, fits: bool) -> str:
        """Record a condition, unless an earlier run left its trace; how it ended."""
        base = each.against
        if base and base not in self.traces:
            # a run is no failure where the budget has left out what it is compared with
            return LEFT_OUT if self.status[base] == LEFT_OUT else f"not comparable: {base!r} did not run"
        trace, file = None, self._file(each)
        if not self.fresh:
            with contextlib.suppress(DfqsError):  # there is none, or it is damaged
                trace = load_trace(file)
        if trace is None:
            if each.settings.use_extra_bufts and has_amx():
                return "not tried: extra buffers crash on CPUs with AMX (ggml-org/llama.cpp#20824)"
            # other processes have the runs that a verdict needs most: something is left for them
            share, used = 0.8 if each.process == "main" else 1.0, time.monotonic() - self._started
            late = self.budget_seconds and used > share * self.budget_seconds  # slower than when it was timed
            if not fits or (late and self.traces):
                return LEFT_OUT
            try:
                self._child(worker, each, str(file))
            except DfqsError as error:
                if not self.traces:
                    raise  # nothing to compare with
                return f"failed: {error.what}"
            trace, self.n_made = load_trace(file), self.n_made + 1
        self.traces[each.name] = trace
        return "done"

    def _child(self, worker: child.Worker, each: Condition, file: str) -> dict[str, Any]:
        job = {**self.job, "condition": asdict(each), "file": file}
        return worker.run(job, where=self.job["path"])

    def _file(self, each: Condition) -> Path:
        """The trace's file, whose name tells runs apart by all that decides them."""
        key = canonical_sha256([*self._about, asdict(each)])
        return (self.folder / f"{NOT_IN_NAMES.sub('-', each.name)}.{key[:12]}.npz").resolve()
