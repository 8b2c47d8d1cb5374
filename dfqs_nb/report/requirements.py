"""The requirements of DFQS 1.0, each judged by what a run recorded.

``data/spec/requirements.toml`` has them, with the sentences and the stages that each needs: without those, a
requirement is "not tested". One that is about experts is "not applicable" to a dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dfqs_nb.gguf.facts import experts
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.report import reading
from dfqs_nb.report.reading import BOUNDARY, CURVE, SCORES, Command, Run, settings_of, sha256_of
from dfqs_nb.report.template import filled, sentence, spec_table

MET, NOT_MET, NOT_TESTED, NOT_APPLICABLE = "met", "not met", "not tested", "not applicable"
# What people read of an option, which is neither met nor unmet; a report's file has the words above.
OPTION = {MET: "used", NOT_MET: "not used"}
COLUMNS = ("id", "level", "requirement", "verdict", "evidence", "notebook", "how", "source")
LONG_FROM, LONG_TO = 8192, 65536  # the lengths that the paper names for the long-context curve
# Settings that are equal where metrics were measured; n_ctx is not listed, because the curve varies it.
SHARED = "runtime system_info n_batch n_ubatch n_threads n_threads_batch n_gpu_layers seed flash_attn".split()
SHARED += "type_k type_v use_mmap use_extra_bufts swa_full".split()
# What the conditions of metrics are about: without one of each, there is nothing to judge.
MEASURED = {"the curve": (CURVE, BOUNDARY), "the scores": SCORES}
Judgement = tuple[str, str, dict[str, Any]]  # a verdict, the names of its sentences, their values


def judged(verdict: str | bool, names: str = "met", /, **values: Any) -> Judgement:
    """A verdict (as a truth: met or not met), and the sentences that it rests on."""
    met = (MET if verdict else NOT_MET) if isinstance(verdict, bool) else verdict
    return met, names, values


@dataclass(frozen=True)
class Facts:
    """What requirements are judged by: a run, its model's header, its metrics (None for one withheld)."""

    run: Run
    header: GGUFHeader | None
    metrics: Mapping[str, Any]
    declared: int | None  # the context in tokens that the header declares
    command: Command  # how the run was started, for the commands that evidence names


def check_requirements(
    run: Run, header: GGUFHeader | None, metrics: Mapping[str, Any], command: Command = reading.UNKNOWN
) -> pd.DataFrame:
    """Judge every requirement of DFQS 1.0 by the `Facts` of one run: a row each, columns `COLUMNS`."""
    rows, generate, declared = [], run.get("generate", {}), header.arch("context_length") if header else None
    facts = Facts(run, header, metrics, declared, command)
    known = {"file": run.get("merge", {}).get("model"), "at": settings_of(generate)}
    known |= {"declared": declared, "layers": reading.on_gpu(generate), "on_cpu": reading.on_cpu(command)}
    known["answered"] = sentence("answered", generate) or "no prompt got text"
    absent = [what for what, names in MEASURED.items() if all(metrics.get(name) is None for name in names)]
    for row in spec_table("requirements")["requirements"]:
        if missing := [name for name in row["needs"] if name not in run]:
            verdict, evidence = NOT_TESTED, reading.not_run(missing, run, command)
        else:
            check = CHECKS[row["check"]]
            verdict, names, values = check(facts)
            told = known | values
            evidence = "; ".join(filled(row["evidence"][name], told).rstrip(".") for name in names.split())
            if absent and check in CONDITIONS and verdict == MET:
                verdict, evidence = NOT_TESTED, f"not measured: {', '.join(absent)}"
        judgement = verdict, evidence, row["notebook"], row["how"], row["source"]
        rows.append((row["id"], row["level"], row["text"], *judgement))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def answers(facts: Facts) -> Judgement:
    """Met where notebook 03's prompts were answered; open where its time ran out before."""
    given = facts.run["generate"].get("answers", [])
    if any(answer["tokens"] > 0 for answer in given):
        return judged(MET)
    is_late = any(answer.get("finish_reason") == "time" for answer in given)
    return judged(NOT_TESTED if is_late else NOT_MET, "silent")


def single_file(facts: Facts) -> Judgement:
    """One file was made, and that file ran."""
    n_shards = facts.header.get("split.count", 0) if facts.header is not None else 0
    if n_shards > 1:
        return judged(NOT_MET, "shard", n_shards=n_shards)
    is_same = sha256_of(facts.run["generate"]) == sha256_of(facts.run["merge"])
    return answers(facts) if is_same else judged(NOT_TESTED, "other")


def cpu_only(facts: Facts) -> Judgement:
    """Ran with no layer on a GPU."""
    return judged(NOT_TESTED, "gpu") if reading.on_gpu(facts.run["generate"]) else answers(facts)


def routing(facts: Facts) -> Judgement:
    """The verdict of notebook 04. Only loads can meet the demand; a difference without any fails it."""
    it = facts.run.get("routing", {}).get("verdict")
    is_whole = it and it["n_runs"] and not it["failed_runs"]
    is_dense = facts.header is not None and not experts(facts.header).moe_layers
    if is_dense or (is_whole and not it["routed"]):
        name = "dense moved" if is_whole and it.get("load_sentence") else "dense"
        return judged(NOT_APPLICABLE, name, it=it)
    if "routing" not in facts.run:
        return judged(NOT_TESTED, "absent", absent=reading.not_run(["routing"], facts.run, facts.command))
    if not is_whole:
        failed = "; ".join(it["failed_runs"] if it else ())
        mark = NOT_MET if it and it["n_differ"] else NOT_TESTED
        return judged(mark, "broken" if failed else "none", failed=failed)
    if (load := it.get("load_passed")) is not None:
        return judged(it["passed"] and load, "loads", it=it)
    return judged(NOT_TESTED if it["passed"] else NOT_MET, "alone", it=it)


def metrics(facts: Facts) -> Judgement:
    """Every metric is there. Its type is that of the specification, or it would be withheld."""
    given = facts.metrics
    if missing := [name for name in spec_table("requirements")["metrics"] if given.get(name) is None]:
        return judged(NOT_MET, "missing", missing=", ".join(missing))
    boundary = sentence("reached", facts.run["long_context"]["boundary"])
    return judged(MET, n_points=len(given[CURVE]), boundary=boundary, **given)


def llama_cpp(facts: Facts) -> Judgement:
    """llama.cpp opened the file and generated."""
    name = settings_of(facts.run["generate"])["runtime"] or "not stated"
    return answers(facts) if "llama" in name.lower() else judged(NOT_TESTED, "other", name=name)


def long_context(facts: Facts) -> Judgement:
    """An analysis from the lengths on that the paper names, or of the whole context that the model has."""
    stage = facts.run["long_context"]
    if why := stage.get("not_measured"):
        return judged(NOT_TESTED, "missing", why=why)
    rows, boundary = [*stage["curve"], *stage.get("refined", [])], stage.get("boundary")
    if not stage["curve"] or boundary is None:
        return judged(NOT_MET, "empty")
    lengths = [row["length"] for row in rows]
    values = {"start": LONG_FROM, "end": LONG_TO, "longest": max(lengths), "least": min(lengths)}
    values |= {"n": len(lengths), "answers": sum(row["n"] for row in rows)}
    is_long = max(lengths) >= min(LONG_FROM, facts.declared or LONG_FROM)
    verdict, name = (MET, "met") if is_long else (NOT_TESTED, "short")
    return judged(verdict, name, reach=sentence("boundary", boundary), **values)


def gpu(facts: Facts) -> Judgement:
    """An option: whether this run used it."""
    return judged(MET) if reading.on_gpu(facts.run["generate"]) else judged(NOT_MET, "unused")


def beyond_64k(facts: Facts) -> Judgement:
    """An option: what the header declares, and what was measured."""
    curve = facts.run.get("long_context", {}).get("curve", [])
    longest = max((row["length"] for row in curve), default=0)
    verdict = NOT_MET if 0 < (facts.declared or 0) <= LONG_TO else NOT_TESTED
    return judged(MET if longest > LONG_TO else verdict, longest=longest)


def identical_conditions(facts: Facts) -> Judgement:
    """The stages that measured ran one model with one runtime and one set of settings."""
    context, scores = facts.run["long_context"], facts.run["scores"]
    first, second = settings_of(context), settings_of(scores)
    pairs = {name: (first[name], second[name]) for name in SHARED}
    silent = [name for name, pair in pairs.items() if None in pair]
    differ = [f"{name} ({a} and {b})" for name, (a, b) in pairs.items() if a != b and name not in silent]
    if any(speed["n_threads"] != second["n_threads"] for speed in scores.get("speeds", [])):
        differ.append("n_threads of the speed")
    if sha256_of(context) != (sha256_of(scores) or sha256_of(facts.run.get("merge", {}))):
        differ.append("the model")
    if differ or silent:
        verdict, name = (NOT_MET, "differ") if differ else (NOT_TESTED, "unstated")
        return judged(verdict, name, names=", ".join(differ or silent))
    return judged(MET, n=len(SHARED), names=", ".join(SHARED), curve=first, scores=second)


def cpu_baseline(facts: Facts) -> Judgement:
    """No layer on a GPU, or it is stated. The CPU's speed allows no other: then it was not measured."""
    context, scores = facts.run["long_context"], facts.run["scores"]
    at = {"curve": settings_of(context), "scores": settings_of(scores)}
    if layers := reading.on_gpu(scores):
        return judged(NOT_TESTED, "scores", layers=layers, **at)
    return judged(MET, "curve" if reading.on_gpu(context) else "met", **at)


def runtime(facts: Facts) -> Judgement:
    """The runtime that the stages recorded is llama.cpp's."""
    runtimes = (settings_of(facts.run[name])["runtime"] for name in ("long_context", "scores"))
    names = sorted({runtime or "not stated" for runtime in runtimes})
    return judged(all("llama" in name.lower() for name in names), "judged", names=", ".join(names))


def prompt_sets(facts: Facts) -> Judgement:
    """The curve and each score name a set and its hash."""
    recorded = sets_of(facts.run)
    named = [it for it in recorded if it.get("prompt_set_sha256")]
    if n := len(recorded) - len(named):
        return judged(NOT_MET, "unknown", n=n, total=len(recorded))
    sets = ", ".join(f"{it.get('prompt_set')} ({it['prompt_set_sha256']:.8}...)" for it in named)
    return judged(MET, sets=sets)


def reproducible(facts: Facts) -> Judgement:
    """Greedy decoding, one seed, and a repetition that gave the same."""
    asked = ("scores", "routing", "long_context")
    seeds = sorted({str(settings_of(facts.run[name])["seed"]) for name in asked})
    hottest = max(it.get("sampling", {}).get("temperature", 0.0) for it in sets_of(facts.run))
    it = facts.run["routing"].get("verdict") or {"n_runs": 0}
    wrong, verdict = ["seeds"] * (len(seeds) > 1) + ["hot"] * bool(hottest), NOT_MET
    if not it["n_runs"]:
        verdict, wrong = NOT_MET if wrong else NOT_TESTED, [*wrong, "alone"]
    elif not (it["passed"] and it["same_output"] and it["logits_equal"] == 1):
        wrong.append("repeats")
    values = {"it": it, "answers": "equal" if it.get("same_output") else "differ", "temperature": hottest}
    return judged(verdict if wrong else MET, " ".join(wrong) or "met", seeds=", ".join(seeds), **values)


def sets_of(run: Run) -> list[Mapping[str, Any]]:
    """The frozen sets that were asked, and how: the curve's, and every set that was scored."""
    scored = run["scores"]["conditions"]
    own = (scored.get(score["set"]) for score in run["scores"]["scores"])
    return [run["long_context"]["conditions"], *(it if isinstance(it, dict) else {} for it in own)]


CONDITIONS = (identical_conditions, cpu_baseline, runtime, prompt_sets, reproducible)
PROPERTIES = (single_file, cpu_only, routing, metrics, llama_cpp, long_context, gpu, beyond_64k)
CHECKS: dict[str, Callable[[Facts], Judgement]] = {it.__name__: it for it in (*PROPERTIES, *CONDITIONS)}
