"""The DFQS report: five metrics, every requirement and every statement, in one file that can be checked.

``report.json`` has the metrics that DFQS 1.0 asks for, with the types it names, and beside them what makes
them numbers: intervals, counts, conditions, the model's identity, the machine. It is built from a run's
sealed stages only, follows the JSON Schema ``data/spec/report.schema.json``, and carries its own hash.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dfqs_nb.core import machine
from dfqs_nb.core.files import canonical_sha256, read_json, sha256_of_file, there_is
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.core.stage import NOTEBOOKS
from dfqs_nb.gguf.facts import identity
from dfqs_nb.gguf.header import GGUFHeader, read_header
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.report.artifact import artifact_match
from dfqs_nb.report.claims import check_claims
from dfqs_nb.report.envelope import (
    CONTEXTS,
    Machine,
    hardware_envelope,
    planned_compute,
    published_envelope,
    this_machine,
)
from dfqs_nb.report.requirements import check_requirements
from dfqs_nb.report.stages import DRAWN_ON, ModelFile, ReportError, Run, SetScore, read_run
from dfqs_nb.stats import LEVEL

SCHEMA = "dfqs-report/1.0"
FILE = "report.json"
FEW_TEXTS = 12  # below, the boundary is provisional
LARGEST = 1e15  # no count, size or speed is larger
PACKAGES = ("dfqs-workbook", "llama-cpp-python", "gguf", "numpy", "pandas")
AGAIN = "write the report again: `dfqs-nb report RUN`"


def build_report(folder: str | Path, *, ask_llama_cpp: bool = True) -> dict[str, Any]:
    """The report on the run in ``folder``, as JSON takes it; nothing is written.

    A metric whose stage is missing or incomplete is withheld: null, with the reason in ``details``. The
    statements and the hardware table of DeepSeek-V4-Flash-IQ1_S-XL are part of a report on that file, and of
    the reference model's as a demonstration; another model's report has none of them.

    Args:
        ask_llama_cpp: let llama.cpp, in child processes, plan compute buffers and refuse a raw concatenation.

    Raises:
        StageError, ReportError: the run cannot be trusted (see `read_run`), or its model is gone.
    """
    folder = Path(folder)
    run = read_run(folder)
    header, here = _header(run), this_machine(folder)
    match = artifact_match(header, run)
    details = {
        "reasoning_score": _score(run, "reasoning_score"),
        "code_score": _score(run, "code_score"),
        "context_stability_curve": _curve(run),
        "cpu_tokens_per_sec": _speed(run),
        "failure_boundary_tokens": _boundary(run),
    }
    metrics = {name: one["value"] for name, one in details.items()}
    conditions = {
        name: {key: value for key, value in stage.conditions.items() if key != "model"}
        for name, stage in (("scores", run.scores), ("long_context", run.long_context))
        if stage is not None
    }
    about = match.level != "another"
    claims = check_claims(run, header, ask_llama_cpp=ask_llama_cpp).to_dict("records") if about else []
    report = {
        "schema": SCHEMA,
        "specification": "DFQS 1.0",
        "tier": run.tier,
        "run": folder.resolve().name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": _model(run, header, match.level),
        "metrics": metrics,
        "details": details,
        "conditions": conditions,
        "conditions_sha256": canonical_sha256(conditions),
        "items": _items(run),
        "routing": run.routing.verdict.model_dump() if run.routing and run.routing.verdict else None,
        "conformance": check_requirements(run, header, machine=here, metrics=metrics).to_dict("records"),
        "claims": claims,
        "hardware_envelope": _envelopes(run, header, here, match.level, ask_llama_cpp),
        "machine": (run.scores.machine if run.scores else None) or machine.describe(),  # that of the speeds
        "versions": _versions(),
        "sources": _sources(folder, run),
    }
    report = json.loads(json.dumps(report, default=str, allow_nan=False))
    return {**report, "integrity": {"sha256": canonical_sha256(report)}}


def with_files(report: Mapping[str, Any], folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The report with files that were drawn from it among its sources, and its hash anew."""
    body = {key: value for key, value in report.items() if key != "integrity"}
    drawn = {name: sha256_of_file(folder / name) for name in names}
    body["sources"] = dict(sorted({**report["sources"], **drawn}.items()))
    return {**body, "integrity": {"sha256": canonical_sha256(body)}}


# ---- reading and checking ----


def read_report(path: str | Path) -> dict[str, Any]:
    """A report, from its file or from the folder that holds it, checked: schema, hashes, contradictions.

    Raises:
        ReportError: it is missing, not a report, incomplete, contradicts itself, or was edited.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        report = read_json(path)
    except FileNotFoundError:
        raise ReportError(
            "there is no report",
            where=tilde(path),
            hint=f"run {NOTEBOOKS['dfqs_report']}, or `dfqs-nb report RUN`",
        ) from None
    except (OSError, ValueError) as error:
        raise ReportError(f"is not JSON ({error})", where=tilde(path), hint=AGAIN) from error
    check_report(report, path)
    checked: dict[str, Any] = report
    return checked


def check_report(report: Any, path: str | Path) -> None:
    """Check a report against the schema, its own hashes and itself.

    Raises:
        ReportError: the first thing that is wrong, and where in the file.
    """
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema())
    fault = jsonschema.exceptions.best_match(validator.iter_errors(report))
    if fault is not None:
        what = f"does not follow the schema at {fault.json_path}: {fault.message[:200]}"
        raise ReportError(what, where=tilde(path), hint=AGAIN)
    body = {key: value for key, value in report.items() if key != "integrity"}
    if canonical_sha256(body) != report["integrity"]["sha256"]:
        raise ReportError("was edited after it was written", where=tilde(path), hint=AGAIN)
    if canonical_sha256(report["conditions"]) != report["conditions_sha256"]:
        raise ReportError("its conditions do not have the hash that it states", where=tilde(path), hint=AGAIN)
    if wrong := contradictions(report):
        raise ReportError(f"contradicts itself: {'; '.join(wrong)}", where=tilde(path), hint=AGAIN)


def contradictions(report: Mapping[str, Any]) -> list[str]:
    """What two places of a report say differently, each in a clause; a schema cannot see it."""
    wrong = []
    for name, value in report["metrics"].items():
        detail = report["details"][name]
        low, high, n = detail["low"], detail["high"], detail["n"]
        values = value if isinstance(value, list) else [] if value is None else [value]
        if value != detail["value"]:
            wrong.append(f"{name} is {value} and {detail['value']}")
        elif any(not math.isfinite(one) or abs(one) > LARGEST for one in (*values, low or 0, high or 0, n)):
            wrong.append(f"{name} has a number that no measurement gives")
        elif value is not None and n < 1:
            wrong.append(f"{name} has a value from no answers")
        elif len(values) == 1 and not isinstance(value, list):
            floor = detail.get("status") == "floor"
            if not floor and (
                (low is not None and low > value + 1e-9) or (high is not None and value > high + 1e-9)
            ):
                wrong.append(f"{name} {value} lies outside its interval, {low} to {high}")
    if wrong:  # the schema types the metrics: their details are of the same types only where they are equal
        return wrong
    curve, boundary = (
        report["details"]["context_stability_curve"],
        report["details"]["failure_boundary_tokens"],
    )
    if curve["value"] is not None and len(curve["value"]) != len(curve.get("lengths", ())):
        wrong.append("the curve has another number of points than of lengths")
    if boundary["value"] is not None and boundary.get("tokens", boundary["value"]) != boundary["value"]:
        wrong.append(f"the boundary is {boundary['value']} and {boundary['tokens']} tokens")
    for name in ("reasoning_score", "code_score"):
        detail = report["details"][name]
        total = sum(detail.get("counts", {}).values())
        if detail["value"] is not None and total and total < detail["n"]:
            wrong.append(f"{name} counts {total} answers of {detail['n']}")
    return wrong


def schema() -> Any:
    """The published JSON Schema (draft 2020-12) of ``report.json``."""
    return read_json(data_dir() / "spec" / "report.schema.json")


# ---- the five metrics, each from its stage ----


def _withheld(why: str, stage: str, unit: str, **more: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("value", "low", "high", "guess_rate"))
    return {**empty, "n": 0, "level": LEVEL, "unit": unit, "withheld": why, "source": f"{stage}.json", **more}


def _no_stage(stage: str, unit: str, **more: Any) -> dict[str, Any]:
    return _withheld(f"this run has no stage {stage}: run {NOTEBOOKS[stage]}", stage, unit, **more)


def _score(run: Run, name: str) -> dict[str, Any]:
    """A score: of the tier's own set, with the other sets beside it."""
    stage, kind = run.scores, name.removesuffix("_score")
    if stage is None:
        return _no_stage("scores", "share")
    own = f"{stage.tier}-{kind}"
    sets = {one.set: one for one in stage.scores if one.name == name}
    others = [one.model_dump() for key, one in sets.items() if key != own]
    if own not in sets:
        why = f"the set {own} was not answered"
        if kind == "code" and stage.sandbox in (None, "", "none"):
            why += ": without a sandbox no generated code is run"
        return _withheld(why, "scores", "share", others=others)
    one: SetScore = sets[own]
    detail = one.model_dump(exclude={"name", "n_missing"})
    detail |= {"level": LEVEL, "unit": "share", "source": "scores.json", "others": others, "withheld": None}
    if one.value is None:
        why = f"{one.n_missing} of {one.n} items lack a result"
        return {**detail, "low": None, "high": None, "withheld": why}
    return detail


def _curve(run: Run) -> dict[str, Any]:
    stage, unit = run.long_context, "share of the short-context accuracy above guessing"
    if stage is None:
        return _no_stage("long_context", unit)
    planned, boundary = [row.model_dump() for row in stage.curve], stage.boundary
    points = [*planned, *(row.model_dump() for row in stage.refined)]
    detail = _withheld(
        "the accuracy at short contexts is that of guessing, or no length was finished",
        "long_context",
        unit,
        lengths=[row["length"] for row in planned],
        points=sorted(points, key=lambda row: row["length"]),
        tasks=stage.tasks,
        wrong=stage.guess.get("wrong"),
        another_key=stage.guess.get("another_key"),
    )
    if boundary is not None:
        detail |= {
            "n": boundary.n_items,
            "guess_rate": boundary.guess_rate,
            "n_haystacks": boundary.n_haystacks,
            "n_keys": stage.guess.get("keys"),
        }
    value = stage.context_stability_curve
    if not value or any(one is None or not math.isfinite(one) for one in value):
        return detail
    return {**detail, "value": value, "withheld": None}


def _boundary(run: Run) -> dict[str, Any]:
    stage = run.long_context
    if stage is None:
        return _no_stage("long_context", "tokens")
    if stage.boundary is None or stage.failure_boundary_tokens is None:
        return _withheld("no length was finished", "long_context", "tokens")
    one = stage.boundary.model_dump()
    detail = {
        **one,
        "provisional": bool(one.get("provisional")) or stage.boundary.n_haystacks < FEW_TEXTS,
        "value": stage.failure_boundary_tokens,
        "n": stage.boundary.n_items,
        "level": LEVEL,
        "unit": "tokens",
        "withheld": None,
        "source": "long_context.json",
        "runtime_failure": stage.runtime_failure,
        "largest_fall": stage.largest_fall or None,
    }
    return {**detail, "sentence": boundary_sentence(detail)}


def _speed(run: Run) -> dict[str, Any]:
    stage, unit = run.scores, "tokens a second"
    if stage is None:
        return _no_stage("scores", unit, contended=None)
    value = stage.cpu_tokens_per_sec
    row = next((one for one in stage.speeds if one.phase == "decode" and one.median == value), None)
    if row is None or value is None:
        return _withheld("decode was not timed", "scores", unit, contended=None)
    if stage.settings.n_gpu_layers:
        return _withheld("layers were on a GPU", "scores", unit, contended=None)
    return {
        "value": value,
        "n": row.repetitions,
        "low": row.min,
        "high": row.max,
        "level": None,
        "spread": "least and most of the repetitions",
        "guess_rate": None,
        "unit": unit,
        **row.model_dump(include={"depth", "n_threads", "contended", "utilisation"}),
        "by_depth": [one.model_dump() for one in stage.speeds],
        "withheld": None,
        "source": "scores.json",
    }


def boundary_sentence(one: Mapping[str, Any]) -> str:
    """The failure boundary in words, with everything that must stand beside the number.

    >>> boundary_sentence({"status": "measured", "cause": "quality", "tokens": 404, "low": 350, "high": None})
    'falls below 85 % of the short-context score at 404 tokens (95 % interval 350 to open)'
    """
    if one.get("status") == "floor":
        return f"no better than guessing at every length (a_0 = {one['a_0']:.2f})"
    ends = ("open" if end is None else f"{end:,}" for end in (one.get("low"), one.get("high")))
    interval = f"95 % interval {' to '.join(ends)}"
    if one.get("right_censored"):
        text = f"carries to the longest length measured, {one['tokens']:,} tokens or more ({interval})"
    elif one.get("cause") not in ("quality", None):
        text = f"stops at {one['tokens']:,} tokens (cause: {one['cause']})"
    else:
        text = f"falls below 85 % of the short-context score at {one['tokens']:,} tokens ({interval})"
    return "; ".join([text, *boundary_flags(one)])


def boundary_flags(one: Mapping[str, Any]) -> list[str]:
    """What else a reader of the boundary must know: few texts, or a dip with recovery."""
    flags = []
    if one.get("provisional"):
        flags.append(f"provisional: {one['n_haystacks']} texts, fewer than {FEW_TEXTS}")
    if one.get("not_monotone"):
        first = one.get("first_crossing")
        at = f" (first crossing at {first:,} tokens)" if isinstance(first, int) else ""
        flags.append(f"not monotone: the accuracy dips and recovers{at}")
    return flags


def metric_sentence(name: str, one: Mapping[str, Any]) -> str:
    """A metric as people read it, with its interval and what qualifies it; ``one``: its details."""
    if one["withheld"]:
        return f"withheld ({one['withheld']})"
    if name == "context_stability_curve":
        points = zip(one["lengths"], one["value"], strict=True)
        keys = f", {one['n_keys']} keys at every length" if one.get("n_keys") else ""
        return (
            ", ".join(f"{value:.2f} at {length:,}" for length, value in points) + f" (n = {one['n']}{keys})"
        )
    if name == "failure_boundary_tokens":
        return boundary_sentence(one)
    if name == "cpu_tokens_per_sec":
        busy = ", contended: the machine was busy" if one["contended"] else ""
        return (
            f"{one['value']:,.1f} tokens/s at depth {one['depth']} ({one['low']:,.1f} to {one['high']:,.1f}, "
            f"n = {one['n']}{busy})"
        )
    counts = one.get("counts", {})
    cut = f", truncated {counts['truncated']} of {one['n']}" if "truncated" in counts else ""
    return (
        f"{one['value']:.3f} (95 % interval {one['low']:.3f} to {one['high']:.3f}, n = {one['n']}, "
        f"guess rate {one['guess_rate']:.3f}{cut}; {one['set']})"
    )


# ---- what stands beside them ----


def _file(run: Run) -> ModelFile:
    if run.file is None:
        raise ReportError("merge.json names no model", hint=f"run {NOTEBOOKS['merge']} again")
    return run.file


def _header(run: Run) -> GGUFHeader:
    merged = _file(run)
    path = Path(merged.path)
    again = f"put it back, or run {NOTEBOOKS['merge']} again"
    if not there_is(path) or not path.is_file():
        raise ReportError("the model of this run is gone", where=tilde(path), hint=again)
    if path.stat().st_size != merged.nbytes:
        what = f"is not the model of this run: it has {path.stat().st_size:,} bytes, not {merged.nbytes:,}"
        raise ReportError(what, where=tilde(path), hint=again)
    return read_header(path)


def _model(run: Run, header: GGUFHeader, level: str) -> dict[str, Any]:
    facts, merged = identity(header), _file(run)
    return {
        "name": merged.name,
        "sha256": merged.sha256,
        "size_bytes": merged.nbytes,
        "header_fingerprint": hashlib.sha256(header.raw).hexdigest(),
        "architecture": header.architecture,
        "parameters": facts["parameters"],
        "active_parameters": facts["active parameters a token"],
        "bits_per_weight": facts["bits a weight"],
        "tensor_types": facts["tensor types"],
        "relation_to_artifact": level,
    }


def _items(run: Run) -> dict[str, list[dict[str, str]]]:
    """The files with one row an answer, from which scores and curve are counted again."""

    def named(stage: Any, end: str) -> list[dict[str, str]]:
        files = stage.files if stage is not None else {}
        return [{"file": name, "sha256": digest} for name, digest in files.items() if name.endswith(end)]

    scored = [one for one in named(run.scores, ".csv") if one["file"] == "score_items.csv"]
    context = [one for one in named(run.long_context, ".jsonl") if one["file"].startswith("long_context")]
    return {"reasoning": scored, "code": scored, "long_context": context}


def _sources(folder: Path, run: Run) -> dict[str, str]:
    """SHA-256 of the stage files that the report draws on, and of every file that they stand on."""
    found: dict[str, str] = {}
    for name, stage in run:
        if name in DRAWN_ON:
            found |= {f"{name}.json": sha256_of_file(folder / f"{name}.json"), **stage.files}
    return dict(sorted(found.items()))


def _envelopes(
    run: Run, header: GGUFHeader, here: Machine, level: str, ask_llama_cpp: bool
) -> dict[str, Any]:
    """The hardware envelope of this model, and of the published artifact where the report is about it."""
    given = run.generate.conditions if run.generate else {}
    names = {one.name for one in fields(OpenSettings)}
    settings = OpenSettings(
        **{key: value for key, value in given.items() if key in names and value is not None}
    )
    contexts = sorted({*CONTEXTS, header.arch("context_length") or CONTEXTS[0]})
    compute = planned_compute(_file(run).path, contexts, settings) if ask_llama_cpp else {}
    own = hardware_envelope(
        header, here, compute=compute, flash_attn=settings.flash_attn, is_artifact=level == "artifact"
    )
    demonstrated = published_envelope(here) if level in ("reference", "model") else None
    return {"model": own, "artifact": demonstrated, "machine": asdict(here)}


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout, without an install
            found[name] = "not installed"
    return found
