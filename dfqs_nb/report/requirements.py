"""The requirements of DFQS 1.0, each judged by what a run recorded.

``data/spec/requirements.toml`` has them, with the sentences. Without the stages that a check needs, a
requirement is "not tested".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import pandas as pd

from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.report.spec import Requirement, filled, requirements_spec
from dfqs_nb.report.stages import Run, Settings

MET, NOT_MET, NOT_TESTED = "met", "not met", "not tested"
VERDICTS = (MET, NOT_MET, NOT_TESTED)
COLUMNS = ("id", "level", "requirement", "verdict", "evidence", "notebook", "how", "source")
LONG_FROM, LONG_TO = 8192, 65536  # the lengths that the paper names for the long-context curve
# Equal where metrics were measured; n_ctx is not listed, because the curve varies it.
SHARED = tuple(name for name in Settings.model_fields if name not in ("model", "n_ctx"))


@dataclass(frozen=True)
class Case:
    """What a check may look at. It calls `judged` with its verdict and the name of a sentence of evidence."""

    requirement: Requirement
    run: Run
    header: GGUFHeader | None
    metrics: Mapping[str, Any]

    def text(self, sentence: str, /, **values: Any) -> str:
        """The sentence of that name of this requirement, with its values."""
        at = self.run.generate.settings if self.run.generate else None
        known = {"run": self.run, "file": self.run.file, "at": at, **values}
        return filled(self.requirement.evidence[sentence], known)

    def judged(self, verdict: str | bool, sentence: str = "met", /, **values: Any) -> tuple[str, str]:
        """A verdict (as a truth: met or not met), and the sentence that it rests on."""
        met = (MET if verdict else NOT_MET) if isinstance(verdict, bool) else verdict
        return met, self.text(sentence, **values)

    def answered(self) -> tuple[str, str]:
        """Met where notebook 03's prompts were answered."""
        done = bool(self.run.generate and self.run.generate.answered)
        return self.judged(done, "met" if done else "silent")


def check_requirements(run: Run, header: GGUFHeader | None, metrics: Mapping[str, Any]) -> pd.DataFrame:
    """Judge every requirement of DFQS 1.0 by the stages of one run: a row each, columns `COLUMNS`.

    ``header`` is of the model that was run; ``metrics`` are the required ones by name, None for one withheld.
    """
    rows = []
    for row in requirements_spec().requirements:
        _, *needs = signature(CHECKS[row.check]).parameters
        given = {name: getattr(run, name) for name in needs}
        missing = [name for name, stage in given.items() if stage is None]
        verdict, evidence = (
            (NOT_TESTED, f"this run has no stage {' and no stage '.join(missing)}")
            if missing
            else CHECKS[row.check](Case(row, run, header, metrics), **given)
        )
        rows.append((row.id, row.level, row.text, verdict, evidence, row.notebook, row.how, row.source))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def counts(table: pd.DataFrame) -> str:
    """How many requirements of each level were met, in one sentence.

    >>> import pandas as pd
    >>> counts(pd.DataFrame({"level": ["SHALL", "SHALL", "MAY"], "verdict": ["met", "not tested", "met"]}))
    'SHALL: 1 of 2 met, 1 not tested; MAY: 1 of 1 met'
    """
    parts = []
    for level, rows in table.groupby("level", sort=False):
        seen = rows["verdict"].value_counts()
        others = "".join(f", {seen[word]} {word}" for word in (NOT_MET, NOT_TESTED) if word in seen)
        parts.append(f"{level}: {seen.get(MET, 0)} of {len(rows)} met{others}")
    return "; ".join(parts)


def single_file(case: Case, merge: Any, generate: Any) -> tuple[str, str]:
    """One file was made, and that file ran."""
    n_shards = case.header.get("split.count", 0) if case.header is not None else 0
    if n_shards > 1:
        return case.judged(NOT_MET, "shard", n_shards=n_shards)
    if case.run.file is None or generate.settings.model != case.run.file.sha256:
        return case.judged(NOT_TESTED, "other")
    return case.answered()


def cpu_only(case: Case, generate: Any) -> tuple[str, str]:
    """Ran with no layer on a GPU."""
    if generate.settings.n_gpu_layers != 0:
        return case.judged(NOT_TESTED, "gpu")
    return case.answered()


def routing(case: Case, routing: Any) -> tuple[str, str]:
    """The verdict of notebook 04: on the loads where they were judged, else on identical conditions alone."""
    it = routing.verdict
    if it is None or not it.n_runs or it.failed_runs:
        failed = "; ".join(it.failed_runs if it else ())
        mark = NOT_MET if it and it.n_differ else NOT_TESTED
        return case.judged(mark, "broken" if failed else "none", failed=failed)
    if it.load_passed is not None:
        return case.judged(it.passed and it.load_passed, "loads", it=it)
    return case.judged(it.passed, "judged" if it.routed else "dense", it=it)


def metrics(case: Case, long_context: Any, scores: Any) -> tuple[str, str]:
    """Every metric is there, and of its type."""
    values = case.metrics
    wrong = [
        f"{name} is {'withheld' if values.get(name) is None else f'no {kind}'}"
        for name, kind in requirements_spec().metrics.items()
        if not is_of(values.get(name), kind)
    ]
    if wrong:
        return case.judged(NOT_MET, "wrong", wrong="; ".join(wrong))
    return case.judged(MET, n_points=len(values["context_stability_curve"]), **values)


def is_of(value: Any, kind: str) -> bool:
    """Whether a value is of a type that the specification names; a bool is no number, and NaN no score.

    >>> is_of(0.5, "float"), is_of([1.0, 0.5], "list[float]"), is_of(True, "int"), is_of(2, "float")
    (True, True, False, False)
    """
    if kind.startswith("list["):
        return isinstance(value, list) and bool(value) and all(is_of(item, kind[5:-1]) for item in value)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, float) and math.isfinite(value)


def llama_cpp(case: Case, generate: Any) -> tuple[str, str]:
    """llama.cpp opened the file and generated."""
    name = generate.settings.runtime or "not stated"
    if "llama" not in name.lower():
        return case.judged(NOT_TESTED, "other", name=name)
    return case.answered()


def long_context(case: Case, long_context: Any) -> tuple[str, str]:
    """An analysis was made; how far it reached is stated."""
    if long_context.not_measured:
        return case.judged(NOT_TESTED, "missing", why=long_context.not_measured)
    if not long_context.curve or long_context.boundary is None:
        return case.judged(NOT_MET, "empty")
    lengths = [row.length for row in long_context.curve]
    longest, boundary = max(lengths), long_context.boundary
    name = "short" if longest < LONG_FROM else "part" if longest < LONG_TO else "covered"
    ends = "floor" if boundary.status == "floor" else "censored" if boundary.right_censored else "crossed"
    known = {"longest": longest, "least": min(lengths), "n": len(lengths), "boundary": boundary}
    known |= {"start": LONG_FROM, "end": LONG_TO, "tier": long_context.tier or "not stated"}
    added, more = long_context.refined, ""
    if added:
        at = ", ".join(f"{row.length:,}" for row in added)
        more = case.text("added", at=at, answers=sum(row.n for row in added))
    known |= {"answers": sum(row.n for row in long_context.curve), "reach": case.text(ends, **known)}
    known |= {"more": more}
    return case.judged(MET, extent=case.text(name, **known), **known)


def gpu(case: Case, generate: Any) -> tuple[str, str]:
    """An option: whether this run used it."""
    layers = generate.settings.n_gpu_layers
    if layers == 0 or generate.conditions.get("offloaded_layers") == 0:
        return case.judged(NOT_TESTED, "unused" if layers == 0 else "idle")
    return case.judged(MET, "all" if layers == -1 else "some")


def beyond_64k(case: Case) -> tuple[str, str]:
    """An option: what the header declares, and what was measured."""
    declared = case.header.arch("context_length") if case.header is not None else None
    curve = case.run.long_context.curve if case.run.long_context else []
    measured = max((row.length for row in curve), default=0)
    seen = case.text("longest" if measured else "nothing", measured=measured)
    if measured > LONG_TO:
        return case.judged(MET, "measured", seen=seen)
    if declared is None:
        return case.judged(NOT_TESTED, "unknown", seen=seen)
    verdict, name = (NOT_TESTED, "declared") if declared > LONG_TO else (NOT_MET, "less")
    return case.judged(verdict, name, declared=declared, seen=seen)


def identical_conditions(case: Case, long_context: Any, scores: Any) -> tuple[str, str]:
    """The stages that measured ran one model with one runtime and one set of settings."""
    first, second = long_context.settings, scores.settings
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in SHARED}
    silent = [name for name, pair in pairs.items() if None in pair]
    differ = [f"{name} ({a} and {b})" for name, (a, b) in pairs.items() if a != b and name not in silent]
    if any(speed.n_threads != second.n_threads for speed in scores.speeds):
        differ.append("n_threads of the speed")
    if long_context.sha256 != (scores.sha256 or (case.run.file.sha256 if case.run.file else None)):
        differ.append("the model")
    if differ:
        return case.judged(NOT_MET, "differ", names=", ".join(differ))
    if silent:
        return case.judged(NOT_TESTED, "unstated", names=", ".join(silent))
    return case.judged(MET, n=len(SHARED), names=", ".join(SHARED), curve=first, scores=second)


def cpu_baseline(case: Case, long_context: Any, scores: Any) -> tuple[str, str]:
    """No layer on a GPU where metrics were measured. The curve may say otherwise; the CPU's speed may not."""
    at = {"curve": long_context.settings, "scores": scores.settings}
    if at["scores"].n_gpu_layers:
        return case.judged(NOT_MET, "scores", **at)
    return case.judged(MET, "curve" if at["curve"].n_gpu_layers else "met", **at)


def runtime(case: Case, long_context: Any, scores: Any) -> tuple[str, str]:
    """The runtime that the stages recorded is llama.cpp's."""
    names = sorted({stage.settings.runtime or "not stated" for stage in (long_context, scores)})
    return case.judged(all("llama" in name.lower() for name in names), "judged", names=", ".join(names))


def prompt_sets(case: Case, long_context: Any, scores: Any) -> tuple[str, str]:
    """The curve and each score name a set and its hash."""
    recorded = [*long_context.sets, *scores.sets]
    named = [f"{it.prompt_set} ({it.prompt_set_sha256:.8}...)" for it in recorded if it.prompt_set_sha256]
    if n := len(recorded) - len(named):
        return case.judged(NOT_MET, "unknown", n=n, total=len(recorded))
    return case.judged(MET, sets=", ".join(named))


def reproducible(case: Case, routing: Any, long_context: Any, scores: Any) -> tuple[str, str]:
    """Greedy decoding, one seed, and a repetition that gave the same."""
    seeds = {stage.settings.seed for stage in (scores, routing, long_context)}
    hottest = max(it.sampling.get("temperature", 0.0) for it in (*scores.sets, *long_context.sets))
    it, wrong = routing.verdict, []
    if len(seeds) > 1:
        wrong.append(case.text("seeds", seeds=", ".join(sorted(map(str, seeds)))))
    if hottest:
        wrong.append(case.text("hot", temperature=hottest))
    if it is None or not it.n_runs:
        wrong.append(case.text("alone"))
    elif not (it.passed and it.same_output and it.logits_equal == 1):
        answers = "equal" if it.same_output else "differ"
        wrong.append(case.text("repeats", it=it, answers=answers))
    if wrong:
        return case.judged(NOT_MET, "wrong", wrong="; ".join(wrong))
    return case.judged(MET, seed=seeds.pop(), it=it)


CHECKS: dict[str, Callable[..., tuple[str, str]]] = {  # each is given the stages that its parameters name
    check.__name__: check
    for check in (single_file, cpu_only, routing, metrics, llama_cpp, long_context, gpu, beyond_64k)
    + (identical_conditions, cpu_baseline, runtime, prompt_sets, reproducible)
}
