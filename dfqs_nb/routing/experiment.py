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
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tqdm.auto

from dfqs_nb.core import child, display
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.files import canonical_sha256, write_table
from dfqs_nb.core.journal import remembered
from dfqs_nb.core.machine import has_amx, usable_cores
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.facts import experts
from dfqs_nb.gguf.models import resolve
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.settings import OpenSettings, llama_version
from dfqs_nb.routing import verdict
from dfqs_nb.routing.plan import IDENTICAL, Condition, Costs, conditions, fit, read_texts
from dfqs_nb.routing.profile import Profile, expert_bytes, profile_of
from dfqs_nb.routing.recorder import RoutingError
from dfqs_nb.routing.trace import Trace, export, load_trace, require_csv
from dfqs_nb.stats import clopper_pearson

PASSAGE = "prompts/routing_passage.txt"
EXTREME_TOKENS = 8192  # DFQS calls a context long from here on, and "extreme token pressure" is not below
FORMAT = 5  # of a kept trace; a new number makes old ones be recorded again
CHILD = "dfqs_nb.routing.record_child"
LEFT_OUT = "left out: it does not fit into budget_minutes"


@dataclass
class Experiment:
    """What every condition gave, and what it means.

    ``verdict``, ``under_load``: whether identical conditions gave identical choices, and whether others in
    the batch change them. ``load_table``, ``sensitivities``, ``advice``: see `verdict`. ``left_out``: what
    does not fit into the budget.
    """

    path: Path
    settings: OpenSettings  # the reference's
    traces: Mapping[str, Trace] = field(repr=False)  # by the condition's name
    status: Mapping[str, str] = field(repr=False)  # how each condition ended
    rows: pd.DataFrame = field(repr=False)  # see `verdict.compared`
    n_made: int  # traces recorded now; the others are kept from earlier
    plan: str  # what was run, in a sentence

    def __post_init__(self) -> None:
        """Judge; the run that all others are compared with, directly or through another, is ``reference``."""
        self.reference = self.traces["prefill"]
        self.load_table = verdict.load_table(self.rows)
        self.sensitivities = verdict.sensitivities(self.rows)
        self.verdict = verdict.judge(self.rows)
        unknown = not self.verdict.passed and not self.verdict.n_runs_differ
        self.under_load = verdict.judge_loads(self.rows, None if unknown else self.verdict.passed)
        self.advice = verdict.advice(self.sensitivities)
        self.left_out = [name for name, how in self.status.items() if how.startswith("left out")]
        # the changes of settings: the row, its two traces, and which choices differ
        self._runtime = self.sensitivities[self.sensitivities["kind"] != "weights"]
        pairs = [(row, *self._two(row)) for row in self._runtime.itertuples()]
        self._pairs = [(row, a, b, verdict.differences(a, b)) for row, a, b in pairs]

    def _two(self, row: Any) -> tuple[Trace, Trace]:
        return self.traces[row.against], self.traces[row.condition]

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the SHALL: repetitions are equal, and no load changed a choice."""
        return self.verdict.passed and not self.under_load.changed_at and not self.under_load.failed

    def judged(self) -> dict[str, Any]:
        """The verdict for the stage file: on repetitions, and on the loads, by which the SHALL is judged."""
        load = self.under_load
        under_load = {name: value for name, value in vars(load).items() if name != "counts"} | {**load.counts}
        return {
            **vars(self.verdict),
            "load_passed": None if load.level == "not judged" else load.passed,
            "load_sentence": load.sentence,
            "under_load": under_load,
            "loads": self.load_table.to_dict("records"),
            "left_out": self.left_out,
        }

    def conclusions(self) -> list[str]:
        """What this experiment showed, in sentences made from its counts."""
        runtime, routed = self._runtime, self.reference.routed
        n_moved = int((runtime["n_differ" if routed else "logit_drift"] > 0).sum())
        what = "an expert choice" if routed else "a logit"
        moved = f"{n_moved} of {len(runtime)} changes of settings changed {what}."
        lines = [self.under_load.sentence, self.verdict.text]
        lines.append(moved if len(runtime) else "No change of settings was tried.")
        if n := len(self.left_out):
            names = "; ".join(self.left_out[:8])
            lines.append(f"Left out to fit into the budget: {n} runs ({names}{'; ...' if n > 8 else ''}).")
        return lines

    def claims(self) -> pd.DataFrame:
        """The card's statements on routing: ``claim``, ``status`` and ``evidence``, in its order."""
        rows = [
            ("routing stable", *verdict.stable(self.sensitivities)),
            ("deterministic execution", *verdict.deterministic(self.verdict)),
            ("routing variance grows under extreme token pressure", *self._pressure()),
        ]
        return pd.DataFrame(rows, columns=["claim", "status", "evidence"])

    def _pressure(self) -> tuple[str, str]:
        """Flips in the last against the first quarter of the text, pooled over the changes of settings."""
        n, scored, at = self.reference.n_tokens, ~self.reference.hashed, self.flips()["token"]
        size = round(n / 4) * int(scored.sum()) * len(self._pairs)
        if not size:
            why = "no change of settings was tried" if self.reference.routed else "no routed experts"
            return "not testable here", why
        early, late = int((at < round(n / 4)).sum()), int((at >= n - round(n / 4)).sum())
        seen = (
            f"{early:,} of {size:,} choices flip in the first quarter, {late:,} of {size:,} in the last, "
            f"over {n:,} tokens"
        )
        if n < EXTREME_TOKENS:
            return "not testable here", f"{seen}; extreme begins at {EXTREME_TOKENS:,} tokens"
        low, high = clopper_pearson(late, size)[0], clopper_pearson(early, size)[1]
        return ("confirmed" if low > high else "contradicted"), seen

    def agreement(self) -> pd.DataFrame:
        """Share of identical sets: a row a condition, as ranked, a column a layer, hash layers included."""
        done = self.rows[(self.rows["status"] == "done") & (self.rows["kind"] == IDENTICAL)]
        rows = pd.concat([done[done["against"] != "alone"], self.sensitivities[::-1]])  # "alone": other texts
        shares = {
            row.condition: 1 - verdict.differences(*self._two(row)).mean(axis=0) for row in rows.itertuples()
        }
        return pd.DataFrame(shares, index=self.reference.layers).T

    def flips(self) -> pd.DataFrame:
        """Flips under changes of settings: ``condition``, ``kind``, ``token``, ``layer``, ``margin``."""
        parts = [pd.DataFrame(columns=["condition", "kind", "token", "layer", "margin"])]
        for row, a, _, differ in self._pairs:
            tokens, columns = np.nonzero(differ)
            places = {"token": tokens, "layer": a.layers[columns], "margin": a.margin[tokens, columns]}
            parts.append(pd.DataFrame({"condition": row.condition, "kind": row.kind, **places}))
        return pd.concat(parts[1:] or parts, ignore_index=True)

    def moved(self) -> str:
        """How far logits move where a token's experts changed, and where they did not, in a sentence."""
        drifts = [verdict.drifts(a, b) for _, a, b, _ in self._pairs]
        flips = [differ[:, ~a.hashed].any(axis=1) for _, a, _, differ in self._pairs]
        drift, flipped = np.concatenate([[], *drifts]), np.concatenate([np.zeros(0, bool), *flips])
        still, moved = drift[(drift > 0) & ~flipped], drift[(drift > 0) & flipped]
        if not len(still) or not len(moved):
            return "No token changed its experts, or all did: there is nothing to compare."
        times = np.median(moved) / np.median(still)
        return (
            f"Tokens with a changed expert: logits move {times:.2g} times as far as others that move "
            f"(medians {np.median(moved):.2g} of n = {len(moved):,} and {np.median(still):.2g} of n = "
            f"{len(still):,})."
        )

    def margins(self) -> pd.DataFrame:
        """The margin of every choice of the reference that has one: ``token``, ``layer``, ``margin``."""
        margins = self.reference.margin
        tokens, columns = np.nonzero(np.isfinite(margins))
        layers = self.reference.layers[columns]
        return pd.DataFrame({"token": tokens, "layer": layers, "margin": margins[tokens, columns]})

    @cached_property
    def profile(self) -> Profile | None:
        """What the routers prefer, over the short texts; None for a dense model, or where it did not run."""
        trace = self.traces.get("profile")
        if trace is None or not trace.routed:
            return None
        return profile_of(trace, expert_bytes(self.path, trace.layers))

    def across(self) -> tuple[pd.DataFrame, str]:
        """Another quantization by layer, and whether changed experts predict changed predictions."""
        for row in self.sensitivities[self.sensitivities["kind"] == "weights"].itertuples():
            if self.reference.routed:
                a, b = self._two(row)
                return verdict.across(a, b).assign(condition=row.condition), verdict.divergence(a, b)
        return pd.DataFrame(), ""

    def export(self, path: str | Path) -> Path:
        """Write the traces of text, profile and loads as one CSV; see `trace.export`."""
        loads = self.rows.loc[self.rows["kind"] == "load", "condition"].unique()
        names = ("prefill", "profile", "alone", *loads)
        return export((self.traces[name] for name in names if name in self.traces), path)

    def write_tables(self, folder: str | Path) -> list[Path]:
        """Write the tables ``routing_*.csv``, and the profile as JSON."""
        folder, written = Path(folder), list[Path]()
        tables = {
            "conditions": self.rows,
            "loads": self.load_table,
            "claims": self.claims(),
            "layers": self.agreement().rename_axis("condition").reset_index(),
            "flips": self.flips(),
            "across": self.across()[0],
        }
        if profile := self.profile:
            tables |= {
                "placement": profile.placement(),
                "domains": profile.usage(),
                "specialization": profile.specialization(),
                "pairs": profile.pairs(),
                "drift": profile.drift(),
                "coverage": profile.coverage(),
                "balance": profile.layers(),
                "experts_needed": profile.experts_needed().reset_index(),
                "cross_coverage": profile.cross_coverage().reset_index(),
            }
            written = [profile.write(folder / "routing_profile.json")]
        return written + [
            write_table(folder / f"routing_{name}.csv", table, index=False)
            for name, table in tables.items()
            if len(table.columns)
        ]


# ---- running it ----


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
    rows = verdict.compared(planned, traces, recording.status, given)
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
