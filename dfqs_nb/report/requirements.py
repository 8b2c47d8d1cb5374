"""The requirements of DFQS 1.0, each judged by what a run recorded.

The requirements are data: ``data/spec/requirements.toml`` says what is required, how it is judged and which
notebook shows it. A check reads the stages' files and the header, and nothing else; a stage that was not run
leaves its requirements "not tested".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.errors import DfqsError, HeaderError
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import estimate
from dfqs_nb.report.envelope import GB, Machine, read_spec, this_machine

if TYPE_CHECKING:
    import pandas as pd

MET, NOT_MET, NOT_TESTED = "met", "not met", "not tested"
VERDICTS = (MET, NOT_MET, NOT_TESTED)
COLUMNS = ("id", "level", "requirement", "verdict", "evidence", "notebook", "how", "source")
LONG_FROM, LONG_TO = 8192, 65536  # the lengths that the paper names for the long-context curve
MEASURED = ("long_context", "scores")  # the stages that the metrics come from
# What must be equal between them. n_ctx is not listed: its length is what the curve varies.
SETTINGS = (
    "runtime",
    "system_info",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "n_threads_batch",
    "n_gpu_layers",
    "seed",
    "flash_attn",
    "type_k",
    "type_v",
    "use_mmap",
    "use_extra_bufts",
    "swa_full",
)
ESTIMATED = ("n_ctx", "n_ubatch", "type_k", "type_v", "swa_full", "use_mmap")  # what memory depends on


@dataclass(frozen=True)
class Run:
    """What the checks may look at: the stages by name, the header, and the machine."""

    stages: Mapping[str, Mapping[str, Any]]
    header: GGUFHeader | None = None
    machine: Machine | None = None
    metrics: Mapping[str, Any] | None = None

    def conditions(self, stage: str) -> Mapping[str, Any]:
        """The conditions that a stage recorded."""
        return self.stages[stage].get("conditions", {})


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the sentence of evidence that it rests on."""

    verdict: str
    evidence: str


Check = Callable[[Run], Judgement]
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {}


def check(*needs: str) -> Callable[[Check], Check]:
    """Register a check under its function's name; without the stages it ``needs`` it is not tested."""

    def register(function: Check) -> Check:
        CHECKS[function.__name__.strip("_")] = (function, needs)
        return function

    return register


def check_requirements(
    stages: Mapping[str, Mapping[str, Any]],
    header: GGUFHeader | None = None,
    *,
    machine: Machine | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Judge every requirement of DFQS 1.0 by the stages of one run.

    Args:
        stages: what each notebook handed on, by stage: ``merge``, ``generate``, ``routing``, ...
        header: of the model that was run.
        machine: where it was run; this machine when not given.
        metrics: the required metrics by name, None for one that is withheld; from the stages when not given.

    Returns:
        One row a requirement, in the specification's order: the columns `COLUMNS`; ``verdict`` is one of
        `VERDICTS`.

    Raises:
        DfqsError: the table of requirements names a check that does not exist.
    """
    import pandas as pd

    run = Run(stages, header, machine or this_machine(), metrics)
    rows = []
    for one in read_spec("requirements")["requirements"]:
        found = _judge(one, run)
        rows.append(
            (
                one["id"],
                one["level"],
                one["text"],
                found.verdict,
                found.evidence,
                one["notebook"],
                one["how"],
                one["source"],
            )
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _judge(requirement: Mapping[str, Any], run: Run) -> Judgement:
    if requirement["check"] not in CHECKS:
        raise DfqsError(
            f"no check is called {requirement['check']!r}",
            where="data/spec/requirements.toml",
            hint=f"use one of {', '.join(CHECKS)}",
        )
    function, needs = CHECKS[requirement["check"]]
    missing = [stage for stage in needs if stage not in run.stages]
    if missing:
        return Judgement(NOT_TESTED, f"this run has no stage {' and no stage '.join(missing)}")
    try:
        return function(run)
    except (KeyError, TypeError, AttributeError) as error:
        return Judgement(NOT_TESTED, f"what a stage recorded lacks {error}")


def counts(table: pd.DataFrame) -> str:
    """How many requirements of each level were met, in one sentence.

    >>> import pandas as pd
    >>> counts(pd.DataFrame({"level": ["SHALL", "SHALL", "MAY"], "verdict": ["met", "not tested", "met"]}))
    'SHALL: 1 of 2 met, 1 not tested; MAY: 1 of 1 met'
    """
    parts = []
    for level, rows in table.groupby("level", sort=False):
        found = rows["verdict"].value_counts()
        others = "".join(f", {found[word]} {word}" for word in (NOT_MET, NOT_TESTED) if word in found)
        parts.append(f"{level}: {found.get(MET, 0)} of {len(rows)} met{others}")
    return "; ".join(parts)


# ---- SHALL ----


@check("merge", "generate")
def single_file(run: Run) -> Judgement:
    """One file was made, and that file ran."""
    model, ran = run.stages["merge"]["model"], run.conditions("generate").get("model")
    if run.header is not None and run.header.get("split.count", 0) > 1:
        return Judgement(NOT_MET, f"the file is one of {run.header['split.count']} shards")
    if ran != model["sha256"]:
        return Judgement(NOT_TESTED, "the file that answered is not the file that was made")
    answered = _answered(run)
    if not answered:
        return Judgement(NOT_MET, f"one file of {model['nbytes']:,} bytes, and it gave no token")
    return Judgement(
        MET,
        f"one file of {model['nbytes']:,} bytes (SHA-256 {model['sha256'][:16]}...), accepted by "
        f"llama.cpp's parser; it answered {answered}",
    )


def _answered(run: Run) -> str:
    """How many prompts got tokens, or nothing."""
    answers = run.stages["generate"].get("answers", [])
    with_tokens = sum(answer["tokens"] > 0 for answer in answers)
    return f"{with_tokens} of {len(answers)} prompts" if with_tokens else ""


@check("generate")
def cpu_only(run: Run) -> Judgement:
    """Ran with no layer on a GPU; what it needs, against the machine's memory."""
    layers = run.conditions("generate")["n_gpu_layers"]
    if layers != 0:
        return Judgement(NOT_TESTED, f"n_gpu_layers was {layers}, so a GPU may have helped")
    answered = _answered(run)
    memory = _memory(run)
    if not answered:
        return Judgement(NOT_MET, f"no token was generated on the CPU; {memory}")
    return Judgement(
        MET,
        f"n_gpu_layers 0: it answered {answered} with {run.conditions('generate')['n_threads']} thread(s); "
        f"{memory}",
    )


def _memory(run: Run) -> str:
    if run.header is None or run.machine is None:
        return "memory not estimated (no header)"
    at = run.conditions("generate")
    try:
        needs = estimate(run.header, **{name: at[name] for name in ESTIMATED})
    except HeaderError as error:
        return f"memory not estimated ({error.what})"
    room = run.machine.memory_bytes
    how = "in memory as a whole" if needs.comfortable_bytes <= room else "weights partly read from the disk"
    return (
        f"weights {_size(needs.weights_bytes)} and KV cache {_size(needs.kv.total)} at {at['n_ctx']:,} "
        f"tokens of context, of {_size(room)} of memory: {how}"
    )


def _size(nbytes: float) -> str:
    """Bytes in GB, or in MB below one.

    >>> _size(61_540_805_344), _size(5_752_864)
    ('61.54 GB', '5.75 MB')
    """
    return f"{nbytes / GB:,.2f} GB" if nbytes >= GB else f"{nbytes / 1e6:,.2f} MB"


@check("routing")
def routing(run: Run) -> Judgement:
    """The verdict of notebook 04 on identical conditions."""
    found = run.stages["routing"]["verdict"]
    if not found["n_runs"] or found.get("failed_runs"):
        failed = "; ".join(found.get("failed_runs", ())) or "none ran"
        word = NOT_MET if found["n_differ"] else NOT_TESTED
        return Judgement(word, f"repetitions that did not run: {failed}")
    what = (
        f"{found['n_differ']:,} of {found['n_choices']:,} expert choices differed under identical conditions "
        f"({found['n_tokens']:,} tokens, {found['n_layers']} layers that score, {found['n_runs']} "
        f"repetitions; with 95 % confidence fewer than {found['upper_bound']:.2g} of all choices do)"
        if found["routed"]
        else f"no routed experts; the logits of {found['logits_equal']:.2%} of {found['n_tokens']:,} tokens "
        f"were equal bit for bit over {found['n_runs']} repetitions"
    )
    return Judgement(MET if found["passed"] else NOT_MET, what)


# ---- SHOULD ----


@check("generate")
def llama_cpp(run: Run) -> Judgement:
    """llama.cpp opened the file and generated."""
    at, answered = run.conditions("generate"), _answered(run)
    name = at["runtime"]
    if "llama" not in name.lower():
        return Judgement(NOT_TESTED, f"the runtime was {name}")
    return Judgement(MET if answered else NOT_MET, f"{name} answered {answered or 'no prompt'}")


@check("long_context")
def long_context(run: Run) -> Judgement:
    """An analysis was made; how far it reached is stated."""
    stage = run.stages["long_context"]
    curve, boundary = stage["curve"], stage["boundary"]
    lengths = [row["length"] for row in curve]
    if not lengths:
        return Judgement(NOT_MET, "the curve has no length")
    n = sum(row["n"] for row in curve)
    ends = (
        "no boundary up to there"
        if boundary.get("right_censored")
        else (f"boundary at {boundary['tokens']:,} tokens (cause: {boundary['cause']})")
    )
    return Judgement(
        MET,
        f"{len(lengths)} lengths from {min(lengths):,} to {max(lengths):,} tokens, {n:,} answers, {ends}; "
        f"{_extent(lengths, stage.get('tier', 'not stated'))}",
    )


def _extent(lengths: list[int], tier: str) -> str:
    """How the measured lengths lie to those that the paper names.

    >>> _extent([64, 1024], "nano")
    "the paper's 8,192 to 65,536 tokens were not reached in the nano tier"
    """
    named = f"the paper's {LONG_FROM:,} to {LONG_TO:,} tokens"
    if max(lengths) < LONG_FROM:
        return f"{named} were not reached in the {tier} tier"
    if max(lengths) < LONG_TO:
        return f"{named} were covered up to {max(lengths):,} ({tier} tier)"
    return f"{named} were covered ({tier} tier)"


# ---- MAY ----


@check("generate")
def gpu(run: Run) -> Judgement:
    """An option: whether this run used it."""
    layers = run.conditions("generate")["n_gpu_layers"]
    if layers == 0:
        return Judgement(NOT_TESTED, "an option that this run did not use (n_gpu_layers 0)")
    return Judgement(MET, f"n_gpu_layers {layers}" if layers > 0 else "all layers on a GPU (n_gpu_layers -1)")


@check()
def beyond_64k(run: Run) -> Judgement:
    """An option: what the header declares, and what was measured."""
    declared = run.header.arch("context_length") if run.header is not None else None
    measured = max((row["length"] for row in run.stages.get("long_context", {}).get("curve", ())), default=0)
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


# ---- MUST ----


@check(*MEASURED)
def metrics(run: Run) -> Judgement:
    """Every metric is there, and of its type."""
    found = run.metrics if run.metrics is not None else required_metrics(run.stages)
    wrong = []
    for name, kind in read_spec("requirements")["metrics"].items():
        if found.get(name) is None:
            wrong.append(f"{name} is withheld")
        elif not _is_of(found[name], kind):
            wrong.append(f"{name} is no {kind}")
    if wrong:
        return Judgement(NOT_MET, "; ".join(wrong))
    curve = found["context_stability_curve"]
    return Judgement(
        MET,
        f"reasoning_score {found['reasoning_score']:.3f}, code_score {found['code_score']:.3f}, "
        f"context_stability_curve of {len(curve)} points, cpu_tokens_per_sec "
        f"{found['cpu_tokens_per_sec']:.4g}, failure_boundary_tokens {found['failure_boundary_tokens']:,}",
    )


def required_metrics(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The five metrics by name from the stages that measured them; None for what is withheld."""
    scored = stages.get("scores", {})
    values: dict[str, Any] = {one["name"]: one["value"] for one in scored.get("scores", ())}
    values["cpu_tokens_per_sec"] = scored.get("cpu_tokens_per_sec")
    for name in ("context_stability_curve", "failure_boundary_tokens"):
        values[name] = stages.get("long_context", {}).get(name)
    return {name: values.get(name) for name in read_spec("requirements")["metrics"]}


def _is_of(value: Any, kind: str) -> bool:
    """Whether a value is of a type that the specification names; a bool is no number, and NaN no score.

    >>> _is_of(0.5, "float"), _is_of([1.0, 0.5], "list[float]"), _is_of(True, "int"), _is_of(2, "float")
    (True, True, False, False)
    """
    if kind.startswith("list["):
        return isinstance(value, list) and bool(value) and all(_is_of(one, kind[5:-1]) for one in value)
    wanted = {"float": float, "int": int}[kind]
    return isinstance(value, wanted) and not isinstance(value, bool) and math.isfinite(value)


@check(*MEASURED)
def identical_conditions(run: Run) -> Judgement:
    """The stages that measured ran one model with one runtime and one set of settings."""
    at = {stage: _settings(run, stage) for stage in MEASURED}
    first, second = (at[stage] for stage in MEASURED)
    differ = [f"{name} ({first[name]} and {second[name]})" for name in first if first[name] != second[name]]
    if differ:
        return Judgement(NOT_MET, f"the curve and the scores differ in {', '.join(differ)}")
    lengths = [run.conditions(stage).get("n_ctx") for stage in MEASURED]
    return Judgement(
        MET,
        f"the curve and the scores share the model and {len(SETTINGS)} settings (runtime "
        f"{first['runtime']}, {first['n_threads']} thread(s), cache {first['type_k']}); n_ctx is "
        f"{lengths[0]:,} for the curve, which varies the length, and {lengths[1]:,} for the scores",
    )


def _settings(run: Run, stage: str) -> dict[str, Any]:
    at = run.conditions(stage)
    model = at.get("model") or run.stages[stage]["model"]["sha256"]
    return {name: at[name] for name in SETTINGS} | {"model": model}


@check(*MEASURED)
def cpu_baseline(run: Run) -> Judgement:
    """No layer on a GPU where metrics were measured. The curve may say otherwise; the CPU's speed may not."""
    layers = {stage: run.conditions(stage)["n_gpu_layers"] for stage in MEASURED}
    if layers["scores"]:
        return Judgement(NOT_MET, f"cpu_tokens_per_sec was measured with n_gpu_layers {layers['scores']}")
    if layers["long_context"]:
        return Judgement(
            MET,
            "n_gpu_layers 0 for the scores and the speed; the conditions of the curve state n_gpu_layers "
            f"{layers['long_context']}",
        )
    return Judgement(MET, "n_gpu_layers 0 for the curve, the scores and the speed")


@check(*MEASURED)
def runtime(run: Run) -> Judgement:
    """The runtime that the stages recorded is llama.cpp's."""
    names = sorted({run.conditions(stage)["runtime"] for stage in MEASURED})
    right = all("llama" in name.lower() for name in names)
    return Judgement(MET if right else NOT_MET, ", ".join(names))


@check(*MEASURED)
def prompt_sets(run: Run) -> Judgement:
    """The curve and each score name a set and its hash."""
    recorded = [run.conditions("long_context")]
    scored = run.conditions("scores")
    recorded += [scored.get(one["set"], {}) for one in run.stages["scores"]["scores"]]
    names = [
        f"{one['prompt_set']} ({one['prompt_set_sha256'][:8]}...)"
        for one in recorded
        if one.get("prompt_set_sha256")
    ]
    if len(names) < len(recorded):
        return Judgement(
            NOT_MET, f"{len(recorded) - len(names)} of {len(recorded)} sets have no recorded hash"
        )
    return Judgement(MET, f"frozen sets, by SHA-256: {', '.join(names)}")


@check("routing", *MEASURED)
def reproducible(run: Run) -> Judgement:
    """Greedy decoding, one seed, and a repetition that gave the same."""
    stages = ("routing", *MEASURED)
    seeds = {run.conditions(stage)["seed"] for stage in stages}
    sampling = [
        one["sampling"]["temperature"]
        for one in run.conditions("scores").values()
        if isinstance(one, Mapping) and "sampling" in one
    ]
    found = run.stages["routing"]["verdict"]
    wrong = []
    if len(seeds) > 1:
        wrong.append(f"seeds {', '.join(map(str, sorted(seeds)))}")
    if any(sampling):
        wrong.append(f"a temperature of {max(sampling)}")
    if not (found["passed"] and found["same_output"] and found["logits_equal"] == 1):
        wrong.append(
            f"repeated runs: {found['logits_equal']:.2%} of logits equal, answers "
            f"{'equal' if found['same_output'] else 'differ'}"
        )
    if wrong:
        return Judgement(NOT_MET, "; ".join(wrong))
    return Judgement(
        MET,
        f"temperature 0, seed {seeds.pop()}; over {found['n_runs']} repetitions the logits of all "
        f"{found['n_tokens']:,} tokens and the answers were equal",
    )
