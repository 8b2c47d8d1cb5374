"""The requirements of DFQS 1.0, each judged by what a run recorded.

``data/spec/requirements.toml`` says what is required, how it is judged and which notebook shows it. A check
reads the stages and the header, and nothing else. Without the stages that it needs, a requirement is "not
tested".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dfqs_nb.core.display import size
from dfqs_nb.core.errors import HeaderError, RegistryError
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import estimate
from dfqs_nb.report.envelope import Machine, this_machine
from dfqs_nb.report.spec import requirements_spec
from dfqs_nb.report.stages import RoutingVerdict, Run, SetConditions, Settings, Stage
from dfqs_nb.stats import clopper_pearson

if TYPE_CHECKING:
    import pandas as pd

MET, NOT_MET, NOT_TESTED = "met", "not met", "not tested"
VERDICTS = (MET, NOT_MET, NOT_TESTED)
COLUMNS = ("id", "level", "requirement", "verdict", "evidence", "notebook", "how", "source")
LONG_FROM, LONG_TO = 8192, 65536  # the lengths that the paper names for the long-context curve
# Equal where metrics were measured; n_ctx is not listed, because the curve varies it.
SHARED = tuple(name for name in Settings.model_fields if name not in ("model", "n_ctx"))
ESTIMATED = ("n_ctx", "n_ubatch", "type_k", "type_v", "swa_full", "use_mmap")  # what memory depends on


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the sentence of evidence that it rests on."""

    verdict: str
    evidence: str


@dataclass(frozen=True)
class Case:
    """What the checks may look at."""

    run: Run
    header: GGUFHeader | None
    machine: Machine
    metrics: Mapping[str, Any]


S = TypeVar("S", bound=Stage)
Check = Callable[[Case], Judgement]
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {}


def check(*needs: str) -> Callable[[Check], Check]:
    """Register a check under its function's name; without the stages it ``needs`` nothing is tested."""

    def register(function: Check) -> Check:
        CHECKS[function.__name__] = function, needs
        return function

    return register


def check_requirements(
    run: Run,
    header: GGUFHeader | None = None,
    *,
    machine: Machine | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Judge every requirement of DFQS 1.0 by the stages of one run.

    Args:
        header: of the model that was run.
        machine: where it was run; this machine when not given.
        metrics: the required metrics by name, None for one that is withheld; from the stages when not given.

    Returns:
        One row a requirement, in the specification's order: the columns `COLUMNS`; ``verdict`` is one of
        `VERDICTS`.

    Raises:
        RegistryError: the table of requirements names a check that does not exist.
    """
    import pandas as pd

    values = metrics if metrics is not None else required_metrics(run)
    case = Case(run, header, machine or this_machine(), values)
    rows = []
    for one in requirements_spec().requirements:
        if one.check not in CHECKS:
            raise RegistryError(
                f"no check is called {one.check!r}",
                where="data/spec/requirements.toml",
                hint=f"use one of {', '.join(CHECKS)}",
            )
        function, needs = CHECKS[one.check]
        missing = [name for name in needs if getattr(run, name) is None]
        judged = (
            Judgement(NOT_TESTED, f"this run has no stage {' and no stage '.join(missing)}")
            if missing
            else function(case)
        )
        rows.append(
            (one.id, one.level, one.text, judged.verdict, judged.evidence, one.notebook, one.how, one.source)
        )
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


def _there(stage: S | None) -> S:
    """A stage that `check` has seen to be there."""
    assert stage is not None
    return stage


# ---- SHALL ----


@check("merge", "generate")
def single_file(case: Case) -> Judgement:
    """One file was made, and that file ran."""
    model, generate = case.run.file, _there(case.run.generate)
    if case.header is not None and case.header.get("split.count", 0) > 1:
        return Judgement(NOT_MET, f"the file is one of {case.header['split.count']} shards")
    if model is None or generate.settings.model != model.sha256:
        return Judgement(NOT_TESTED, "the file that answered is not the file that was made")
    if not generate.answered:
        return Judgement(NOT_MET, f"one file of {model.nbytes:,} bytes, and it gave no token")
    return Judgement(
        MET,
        f"one file of {model.nbytes:,} bytes (SHA-256 {model.sha256[:16]}...), accepted by llama.cpp's "
        f"parser; it answered {generate.answered}",
    )


@check("generate")
def cpu_only(case: Case) -> Judgement:
    """Ran with no layer on a GPU; what it needs, against the machine's memory."""
    generate = _there(case.run.generate)
    at = generate.settings
    if at.n_gpu_layers != 0:
        return Judgement(NOT_TESTED, f"n_gpu_layers was {at.n_gpu_layers}, so a GPU may have helped")
    memory = _memory(case, at)
    if not generate.answered:
        return Judgement(NOT_MET, f"no token was generated on the CPU; {memory}")
    return Judgement(
        MET, f"n_gpu_layers 0: it answered {generate.answered} with {at.n_threads} thread(s); {memory}"
    )


def _memory(case: Case, at: Settings) -> str:
    if case.header is None:
        return "memory not estimated (no header)"
    stated = {name: value for name in ESTIMATED if (value := getattr(at, name)) is not None}
    if at.n_ctx is None:
        return "memory not estimated (no n_ctx)"
    try:
        needs = estimate(case.header, **stated)
    except (HeaderError, ValueError) as error:  # of an unknown type of the cache, or a count of 0
        return f"memory not estimated ({getattr(error, 'what', error)})"
    room = case.machine.memory_bytes
    how = "in memory as a whole" if needs.comfortable_bytes <= room else "weights partly read from the disk"
    return (
        f"weights {size(needs.weights_bytes)} and KV cache {size(needs.kv.total)} at {at.n_ctx:,} "
        f"tokens of context, of {size(room)} of memory: {how}"
    )


@check("routing")
def routing(case: Case) -> Judgement:
    """The verdict of notebook 04 on identical conditions."""
    found = _there(case.run.routing).verdict
    if found is None or not found.n_runs or found.failed_runs:
        failed = "; ".join(found.failed_runs if found else ()) or "none ran"
        return Judgement(
            NOT_MET if found and found.n_differ else NOT_TESTED, f"repetitions that did not run: {failed}"
        )
    return Judgement(MET if found.passed else NOT_MET, routing_sentence(found))


def routing_sentence(found: RoutingVerdict) -> str:
    """What repetitions showed, with both bounds: on choices of this text, and on runs that differ."""
    if not found.routed:
        return (
            f"no routed experts; the logits of {found.logits_equal or 0:.2%} of {found.n_tokens:,} tokens "
            f"were equal bit for bit over {found.n_runs} repetitions"
        )
    bounds = ""
    if not found.n_differ:
        once, runs = (
            clopper_pearson(0, max(n, 1), 0.9)[1] for n in (found.n_choices // found.n_runs, found.n_runs)
        )
        bounds = (
            f"; with 95 % confidence fewer than {once:.2g} of such choices differ, and fewer than {runs:.0%} "
            "of runs"
        )
    return (
        f"{found.n_differ:,} of {found.n_choices:,} expert choices differed under identical conditions "
        f"({found.n_tokens:,} tokens, {found.n_layers} layers that score, {found.n_runs} repetitions{bounds})"
    )


@check("long_context", "scores")
def metrics(case: Case) -> Judgement:
    """Every metric is there, and of its type."""
    wrong = []
    for name, kind in requirements_spec().metrics.items():
        if case.metrics.get(name) is None:
            wrong.append(f"{name} is withheld")
        elif not is_of(case.metrics[name], kind):
            wrong.append(f"{name} is no {kind}")
    if wrong:
        return Judgement(NOT_MET, "; ".join(wrong))
    values = case.metrics
    return Judgement(
        MET,
        f"reasoning_score {values['reasoning_score']:.3f}, code_score {values['code_score']:.3f}, "
        f"context_stability_curve of {len(values['context_stability_curve'])} points, cpu_tokens_per_sec "
        f"{values['cpu_tokens_per_sec']:.4g}, failure_boundary_tokens {values['failure_boundary_tokens']:,}",
    )


def required_metrics(run: Run) -> dict[str, Any]:
    """The five metrics by name from the stages that measured them; None for what is withheld."""
    values: dict[str, Any] = dict.fromkeys(requirements_spec().metrics)
    if run.scores:
        values |= {one.name: one.value for one in run.scores.scores if one.name in values}
        values["cpu_tokens_per_sec"] = run.scores.cpu_tokens_per_sec
    if run.long_context:
        values["context_stability_curve"] = run.long_context.context_stability_curve or None
        values["failure_boundary_tokens"] = run.long_context.failure_boundary_tokens
    return values


def is_of(value: Any, kind: str) -> bool:
    """Whether a value is of a type that the specification names; a bool is no number, and NaN no score.

    >>> is_of(0.5, "float"), is_of([1.0, 0.5], "list[float]"), is_of(True, "int"), is_of(2, "float")
    (True, True, False, False)
    """
    if kind.startswith("list["):
        return isinstance(value, list) and bool(value) and all(is_of(one, kind[5:-1]) for one in value)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, float) and math.isfinite(value)


# ---- SHOULD and MAY ----


@check("generate")
def llama_cpp(case: Case) -> Judgement:
    """llama.cpp opened the file and generated."""
    generate = _there(case.run.generate)
    name = generate.settings.runtime or "not stated"
    if "llama" not in name.lower():
        return Judgement(NOT_TESTED, f"the runtime was {name}")
    answered = generate.answered
    return Judgement(MET if answered else NOT_MET, f"{name} answered {answered or 'no prompt'}")


@check("long_context")
def long_context(case: Case) -> Judgement:
    """An analysis was made; how far it reached is stated."""
    stage = _there(case.run.long_context)
    if not stage.curve or stage.boundary is None:
        return Judgement(NOT_MET, "the curve has no length")
    lengths, one = [row.length for row in stage.curve], stage.boundary
    reach = (
        "no boundary up to there"
        if one.right_censored
        else f"boundary at {one.tokens:,} tokens (cause: {one.cause})"
    )
    named = f"the paper's {LONG_FROM:,} to {LONG_TO:,} tokens"
    longest, tier = max(lengths), stage.tier or "not stated"
    if longest < LONG_FROM:
        extent = f"{named} were not reached in the {tier} tier"
    else:
        part = "" if longest >= LONG_TO else f" up to {longest:,}"
        extent = f"{named} were covered{part} ({tier} tier)"
    return Judgement(
        MET,
        f"{len(lengths)} lengths from {min(lengths):,} to {longest:,} tokens, "
        f"{sum(row.n for row in stage.curve):,} answers, {reach}; {extent}",
    )


@check("generate")
def gpu(case: Case) -> Judgement:
    """An option: whether this run used it."""
    at = _there(case.run.generate)
    layers, offloaded = at.settings.n_gpu_layers, at.conditions.get("offloaded_layers")
    if layers == 0 or offloaded == 0:
        why = "n_gpu_layers 0" if layers == 0 else f"n_gpu_layers {layers}, and no layer was offloaded"
        return Judgement(NOT_TESTED, f"an option that this run did not use ({why})")
    return Judgement(
        MET, "all layers on a GPU (n_gpu_layers -1)" if layers == -1 else f"n_gpu_layers {layers}"
    )


@check()
def beyond_64k(case: Case) -> Judgement:
    """An option: what the header declares, and what was measured."""
    declared = case.header.arch("context_length") if case.header is not None else None
    curve = case.run.long_context.curve if case.run.long_context else []
    measured = max((row.length for row in curve), default=0)
    seen = f"longest context measured: {measured:,} tokens" if measured else "no context was measured"
    if measured > LONG_TO:
        return Judgement(MET, seen)
    if declared is None:
        return Judgement(NOT_TESTED, f"the header declares no context length; {seen}")
    if declared > LONG_TO:
        return Judgement(NOT_TESTED, f"the header declares {declared:,} tokens; {seen}")
    return Judgement(
        NOT_MET,
        f"an option that this model does not offer: its header declares {declared:,} tokens, and 64K is "
        f"{LONG_TO:,}; {seen}",
    )


# ---- MUST, and the evaluation conditions ----


def _measured(case: Case) -> tuple[tuple[str, Stage], tuple[str, Stage]]:
    """The two stages that the metrics come from."""
    return ("curve", _there(case.run.long_context)), ("scores", _there(case.run.scores))


@check("long_context", "scores")
def identical_conditions(case: Case) -> Judgement:
    """The stages that measured ran one model with one runtime and one set of settings."""
    (_, curve), (_, scores) = _measured(case)
    first, second = curve.settings, scores.settings
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in SHARED}
    silent = [name for name, pair in pairs.items() if None in pair]
    differ = [f"{name} ({a} and {b})" for name, (a, b) in pairs.items() if a != b and name not in silent]
    if curve.sha256 != (scores.sha256 or (case.run.file.sha256 if case.run.file else None)):
        differ.append("the model")
    if differ:
        return Judgement(NOT_MET, f"the curve and the scores differ in {', '.join(differ)}")
    if silent:
        return Judgement(NOT_TESTED, f"one of the two stages does not state {', '.join(silent)}")
    return Judgement(
        MET,
        f"the curve and the scores share the model and {len(SHARED)} settings (runtime {first.runtime}, "
        f"{first.n_threads} thread(s), cache {first.type_k}); n_ctx is {first.n_ctx or 0:,} for the curve, "
        f"which varies the length, and {second.n_ctx or 0:,} for the scores",
    )


@check("long_context", "scores")
def cpu_baseline(case: Case) -> Judgement:
    """No layer on a GPU where metrics were measured. The curve may say otherwise; the CPU's speed may not."""
    (_, curve), (_, scores) = _measured(case)
    if scores.settings.n_gpu_layers:
        return Judgement(
            NOT_MET, f"cpu_tokens_per_sec was measured with n_gpu_layers {scores.settings.n_gpu_layers}"
        )
    if curve.settings.n_gpu_layers:
        return Judgement(
            MET,
            "n_gpu_layers 0 for the scores and the speed; the conditions of the curve state n_gpu_layers "
            f"{curve.settings.n_gpu_layers}",
        )
    return Judgement(MET, "n_gpu_layers 0 for the curve, the scores and the speed")


@check("long_context", "scores")
def runtime(case: Case) -> Judgement:
    """The runtime that the stages recorded is llama.cpp's."""
    names = sorted({stage.settings.runtime or "not stated" for _, stage in _measured(case)})
    return Judgement(MET if all("llama" in name.lower() for name in names) else NOT_MET, ", ".join(names))


@check("long_context", "scores")
def prompt_sets(case: Case) -> Judgement:
    """The curve and each score name a set and its hash."""
    curve, scores = _there(case.run.long_context), _there(case.run.scores)
    recorded = [SetConditions.model_validate(curve.conditions), *scores.sets()]
    named = [one for one in recorded if one.prompt_set_sha256]
    if len(named) < len(recorded):
        return Judgement(
            NOT_MET, f"{len(recorded) - len(named)} of {len(recorded)} sets have no recorded hash"
        )
    sets = ", ".join(f"{one.prompt_set} ({one.prompt_set_sha256[:8]}...)" for one in named)
    return Judgement(MET, f"frozen sets, by SHA-256: {sets}")


@check("routing", "long_context", "scores")
def reproducible(case: Case) -> Judgement:
    """Greedy decoding, one seed, and a repetition that gave the same."""
    scores, routed = _there(case.run.scores), _there(case.run.routing)
    seeds = {stage.settings.seed for stage in (scores, routed, _there(case.run.long_context))}
    hottest = max((one.sampling.temperature for one in scores.sets()), default=0.0)
    found, wrong = routed.verdict, []
    if len(seeds) > 1:
        wrong.append(f"seeds {', '.join(sorted(map(str, seeds)))}")
    if hottest:
        wrong.append(f"a temperature of {hottest}")
    if found is None or not (found.passed and found.same_output and found.logits_equal == 1):
        wrong.append(
            f"repeated runs: {found.logits_equal or 0:.2%} of logits equal, answers "
            f"{'equal' if found.same_output else 'differ'}"
            if found
            else "no repetition ran"
        )
    if wrong or found is None:
        return Judgement(NOT_MET, "; ".join(wrong))
    return Judgement(
        MET,
        f"temperature 0, seed {seeds.pop()}; over {found.n_runs} repetitions the logits of all "
        f"{found.n_tokens:,} tokens and the answers were equal",
    )
