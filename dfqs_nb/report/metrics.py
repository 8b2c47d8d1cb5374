"""The DFQS report of a run, from its sealed stages only: metrics, requirements, statements, envelope."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dfqs_nb.core import machine
from dfqs_nb.core.files import canonical_sha256, sha256_of_file, there_is
from dfqs_nb.core.paths import tilde
from dfqs_nb.core.stage import NOTEBOOKS
from dfqs_nb.gguf.facts import identity
from dfqs_nb.gguf.header import GGUFHeader, read_header
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.report import envelope
from dfqs_nb.report.claims import artifact_match, check_claims
from dfqs_nb.report.requirements import check_requirements
from dfqs_nb.report.stages import DRAWN_ON, LongContext, ReportError, Run, Scores, read_run
from dfqs_nb.stats import LEVEL

SCORES = ("reasoning_score", "code_score")
CURVE, BOUNDARY, SPEED = "context_stability_curve", "failure_boundary_tokens", "cpu_tokens_per_sec"
FEW_TEXTS = 12  # below, the boundary is provisional
DIGITS = 10  # of every float in report.json: more than any measurement has


def build_report(folder: str | Path, *, ask_llama_cpp: bool = True) -> dict[str, Any]:
    """The report on the run in ``folder``, as JSON takes it; nothing is written.

    A metric whose stage is missing or incomplete is withheld: null, with the reason in ``details``. The
    artifact's statements and hardware table are part of its report, and of the reference model's as a
    demonstration. ``ask_llama_cpp``: let it plan buffers, in child processes.
    Raises a StageError or ReportError where the run cannot be trusted (see `read_run`), or its model is gone.
    """
    folder = Path(folder)
    run = read_run(folder)
    header = _header(run)
    level, details = artifact_match(header, run).level, details_of(run)
    metrics = {name: detail["value"] for name, detail in details.items()}
    drawn = {name: stage for name, stage in run.stages.items() if name in DRAWN_ON}
    conditions = {
        name: {key: value for key, value in drawn[name].conditions.items() if key != "model"}
        for name in ("scores", "long_context")
        if name in drawn
    }
    sources = {f"{name}.json": sha256_of_file(folder / f"{name}.json") for name in drawn}
    sources |= {name: digest for stage in drawn.values() for name, digest in stage.files.items()}
    verdict = run.routing.verdict if run.routing else None
    claims = None if level == "another" else check_claims(run, header)
    report = {
        "schema": "dfqs-report/1.0",
        "specification": "DFQS 1.0",
        "tier": run.tier,
        "run": folder.resolve().name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": _model(run, header, level),
        "metrics": metrics,
        "details": details,
        "conditions": conditions,
        "conditions_sha256": canonical_sha256(_rounded(conditions)),  # as they will stand in the file
        "items": _items(run),
        "routing": asdict(verdict) if verdict else None,
        "conformance": check_requirements(run, header, metrics).to_dict("records"),
        "claims": [] if claims is None else claims.to_dict("records"),
        "hardware_envelope": _envelopes(run, header, level, ask_llama_cpp),
        "machine": (run.scores.machine if run.scores else None) or machine.describe(),  # that of the speeds
        "versions": _versions(),
        "sources": dict(sorted(sources.items())),
    }
    return sealed(_rounded(json.loads(json.dumps(report, default=str, allow_nan=False))))


def sealed(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with the hash of its content."""
    body = {key: value for key, value in report.items() if key != "integrity"}
    return {**body, "integrity": {"sha256": canonical_sha256(body)}}


def _rounded(value: Any) -> Any:
    """A JSON value whose floats have at most `DIGITS` digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


# ---- the five metrics, with what must stand beside each ----


def details_of(run: Run) -> dict[str, dict[str, Any]]:
    """Each metric with all that stands beside it; one that cannot be given has the reason."""
    details = {}
    for name, (stage, unit, measured) in METRICS.items():
        source = getattr(run, stage)
        empty = dict.fromkeys(("value", "low", "high", "guess_rate", "withheld"))
        empty |= {"n": 0, "level": LEVEL, "unit": unit, "source": f"{stage}.json"}
        missing = {"withheld": f"notebook {NOTEBOOKS[stage][:2]} did not run"}
        details[name] = empty | (missing if source is None else measured(source, name))
    details[SPEED].setdefault("contended", None)
    return details


def _score(stage: Scores, name: str) -> dict[str, Any]:
    """A score: of the tier's own set."""
    kind = name.removesuffix("_score")
    own, sets = f"{stage.tier}-{kind}", {score.set: score for score in stage.scores if score.name == name}
    if own not in sets:
        unsafe = kind == "code" and stage.sandbox in (None, "", "none")
        why = ": without a sandbox no generated code is run" if unsafe else ""
        return {"withheld": f"the set {own} was not answered{why}"}
    score = sets[own]
    detail = score.model_dump(exclude={"name", "n_missing"})
    if score.value is None:
        detail |= {"low": None, "high": None}
        detail["withheld"] = f"{score.n_missing} of {score.n} items lack a result"
    return detail


def _curve(stage: LongContext, name: str) -> dict[str, Any]:
    planned, value = [row.model_dump() for row in stage.curve], stage.context_stability_curve
    points = sorted(planned + [row.model_dump() for row in stage.refined], key=lambda row: row["length"])
    detail = {
        "lengths": [row["length"] for row in planned],
        "points": points,
        "tasks": stage.tasks,
        "wrong": stage.guess.get("wrong"),
        "another_key": stage.guess.get("another_key"),
    }
    if stage.boundary is not None:
        detail |= {
            "n": sum(row["n"] for row in planned),
            "guess_rate": stage.boundary.guess_rate,
            "n_haystacks": stage.boundary.n_haystacks,
            "n_keys": stage.guess.get("keys"),
        }
    if not value or any(number is None or not math.isfinite(number) for number in value):
        why = "the accuracy at short contexts is that of guessing, or no length was finished"
        return {**detail, "withheld": stage.not_measured or why}
    return {**detail, "value": value}


def _boundary(stage: LongContext, name: str) -> dict[str, Any]:
    if stage.boundary is None or stage.failure_boundary_tokens is None:
        return {"withheld": stage.not_measured or "no length was finished"}
    return stage.boundary.model_dump() | {
        "provisional": stage.boundary.provisional or stage.boundary.n_haystacks < FEW_TEXTS,
        "value": stage.failure_boundary_tokens,
        "n": stage.boundary.n_items,
        "n_lengths": len(stage.curve) + len(stage.refined),
        "runtime_failure": stage.runtime_failure,
        "largest_fall": stage.largest_fall or None,
    }


def _speed(stage: Scores, name: str) -> dict[str, Any]:
    value = stage.cpu_tokens_per_sec
    row = next((speed for speed in stage.speeds if speed.phase == "decode" and speed.median == value), None)
    if row is None or value is None:
        return {"withheld": "decode was not timed"}
    if stage.settings.n_gpu_layers:
        return {"withheld": "layers were on a GPU"}
    return {
        "value": value,
        "n": row.repetitions,
        "low": row.min,
        "high": row.max,
        "level": None,
        **row.model_dump(include={"depth", "n_threads", "contended", "utilisation"}),
    }


METRICS: dict[str, tuple[str, str, Callable[[Any, str], dict[str, Any]]]] = {
    "reasoning_score": ("scores", "share", _score),
    "code_score": ("scores", "share", _score),
    CURVE: ("long_context", "share of the short-context accuracy above guessing", _curve),
    SPEED: ("scores", "tokens a second", _speed),
    BOUNDARY: ("long_context", "tokens", _boundary),
}


def boundary_sentence(detail: Mapping[str, Any]) -> str:
    """The failure boundary in words, with everything that must stand beside the number.

    >>> boundary_sentence({"status": "measured", "cause": "quality", "tokens": 404, "low": 350, "high": None})
    'loses 15 % of its short-context ability at 404 tokens (95 % interval from 350, open above)'
    """
    if detail.get("status") == "floor":
        return f"no better than guessing at every length (a_0 = {detail['a_0']:.2f})"
    interval, tokens = _token_interval(detail.get("low"), detail.get("high")), f"{detail['tokens']:,} tokens"
    if detail.get("right_censored"):
        text = f"carries to the longest length measured, {tokens} or more ({interval})"
    elif detail.get("cause") not in ("quality", None):
        text = f"stops at {tokens} (cause: {detail['cause']})"
    else:
        text = f"loses 15 % of its short-context ability at {tokens} ({interval})"
    return "; ".join([text, *boundary_flags(detail)])


def _token_interval(low: int | None, high: int | None) -> str:
    """An interval of lengths; an end beyond the lengths measured is open."""
    if low is None:
        return f"95 % interval {'open at both ends' if high is None else f'up to {high:,}, open below'}"
    return f"95 % interval from {low:,}, open above" if high is None else f"95 % interval {low:,} to {high:,}"


def boundary_flags(detail: Mapping[str, Any]) -> list[str]:
    """What else a reader of the boundary must know: few texts, or a dip with recovery."""
    flags = []
    if detail.get("provisional"):
        flags.append(f"provisional: {detail['n_haystacks']} texts, fewer than {FEW_TEXTS}")
    if detail.get("not_monotone"):
        first = detail.get("first_crossing")
        at = f" (first crossing at {first:,} tokens)" if isinstance(first, int) else ""
        flags.append(f"not monotone: the accuracy dips and recovers{at}")
    return flags


def metric_sentence(name: str, detail: Mapping[str, Any]) -> str:
    """A metric as people read it, with its interval and what qualifies it."""
    if detail["withheld"]:
        return f"withheld ({detail['withheld']})"
    value, low, high, n = (detail[key] for key in ("value", "low", "high", "n"))
    if name == BOUNDARY:
        lengths = f" at {detail['n_lengths']} lengths" if detail.get("n_lengths") else ""
        return f"{boundary_sentence(detail)}; n = {n}{lengths}"
    if name == CURVE:
        keys = f", {detail['n_keys']} keys at every length" if detail.get("n_keys") else ""
        asked = f"n = {n} at {len(value)} planned lengths{keys}"
        guess = f"guess rate of retrieval {detail['guess_rate']:.3f}"
        return f"{', '.join(_curve_points(detail))} ({asked}, {guess})"
    if name == SPEED:
        busy = ", contended: the machine was busy" if detail["contended"] else ""
        spread = (
            f"median; lowest to highest of {n} repetitions: {low:,.1f} to {high:,.1f}"
            if n > 1
            else "1 repetition"
        )
        return f"{value:,.1f} tokens/s at depth {detail['depth']} ({spread}{busy})"
    cut = f", truncated {detail['truncated']} of {n}" if detail.get("truncated") is not None else ""
    asked = f"n = {n}, guess rate of {detail['set']} {detail['guess_rate']:.3f}"
    return f"{value:.3f} (95 % interval {low:.3f} to {high:.3f}, {asked}{cut})"


def bracketed(value: float | None, low: float | None, high: float | None, form: str) -> str:
    """A value with its interval, as tables have it; NaN and None are not known.

    >>> bracketed(0.5, 0.25, None, "{:.2f}"), bracketed(None, None, None, "{:.2f}")
    ('0.50 [0.25, open]', 'withheld')
    """
    shown = ["" if it is None or it != it else form.format(it) for it in (value, low, high)]
    ends = f" [{shown[1] or 'open'}, {shown[2] or 'open'}]" if shown[1] or shown[2] else ""
    return shown[0] + ends if shown[0] else "withheld"


def metric_cell(name: str, detail: Mapping[str, Any]) -> str:
    """A metric in a cell of a table: its value, its interval, and in short what qualifies it."""
    if detail["withheld"]:
        return "withheld"
    value, low, high, notes = detail["value"], detail["low"], detail["high"], list[str]()
    if name == CURVE:
        return f"{value[-1]:.2f} at {detail['lengths'][-1]:,}"
    text = bracketed(value, low, high, {BOUNDARY: "{:,.0f}", SPEED: "{:,.1f}"}.get(name, "{:.3f}"))
    if name == BOUNDARY:
        text = f"over {value:,}" if detail.get("right_censored") else text
        notes += ["at chance"] * (detail["status"] == "floor")
        notes += [detail["cause"]] if detail.get("cause") not in (None, "quality") else []
        notes += [flag.partition(":")[0] for flag in boundary_flags(detail)]
    notes += ["contended"] * (name == SPEED and bool(detail["contended"]))
    return f"{text} ({', '.join(notes)})" if notes else text


def _curve_points(detail: Mapping[str, Any]) -> list[str]:
    """Each planned length with its value, and the interval of its accuracy on the same scale."""
    rows = {row["length"]: row for row in detail["points"]}
    guess, lengths = detail["guess_rate"], detail["lengths"]
    above = rows[lengths[0]]["accuracy"] - guess if lengths[0] in rows else 0.0
    texts = []
    for length, value in zip(lengths, detail["value"], strict=True):
        text = f"{value:.2f} at {length:,}"
        if length in rows and above > 0:
            ends = (min(1.0, max(0.0, (rows[length][end] - guess) / above)) for end in ("low", "high"))
            text += " [{:.2f} to {:.2f}]".format(*ends)
        texts.append(text)
    return texts


# ---- what else a report holds ----


def _header(run: Run) -> GGUFHeader:
    if run.file is None:
        raise ReportError("merge.json names no model", hint=f"run {NOTEBOOKS['merge']} again")
    path, again = Path(run.file.path), f"put it back, or run {NOTEBOOKS['merge']} again"
    if not there_is(path) or not path.is_file():
        raise ReportError("the model of this run is gone", where=tilde(path), hint=again)
    if (nbytes := path.stat().st_size) != run.file.nbytes:
        what = f"is not the model of this run: it has {nbytes:,} bytes, not {run.file.nbytes:,}"
        raise ReportError(what, where=tilde(path), hint=again)
    return read_header(path)


def _model(run: Run, header: GGUFHeader, level: str) -> dict[str, Any]:
    facts, file = identity(header), run.file.model_dump() if run.file else {}
    return {
        "name": file["name"],
        "sha256": file["sha256"],
        "size_bytes": file["nbytes"],
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
    stages = [stage for stage in (run.scores, run.long_context) if stage]
    files = {name: digest for stage in stages for name, digest in stage.files.items()}
    named = {"reasoning": "score_items.csv", "code": "score_items.csv", "long_context": "long_context*.jsonl"}
    return {
        kind: [{"file": name, "sha256": digest} for name, digest in files.items() if fnmatch(name, form)]
        for kind, form in named.items()
    }


def _envelopes(run: Run, header: GGUFHeader, level: str, ask_llama_cpp: bool) -> dict[str, Any]:
    """The hardware envelope of this model, and of the published artifact where the report is about it."""
    given = run.generate.conditions if run.generate else {}
    known = {field.name for field in fields(OpenSettings)} & {*given}
    settings = OpenSettings(**{key: given[key] for key in known if given[key] is not None})
    compute = envelope.planned_compute(
        header.path, envelope.within(header) if ask_llama_cpp else [], settings
    )
    memory = machine.available_memory().total_bytes
    own = envelope.hardware_envelope(
        header, memory, compute, flash_attn=settings.flash_attn, is_artifact=level == "artifact"
    )
    demonstrated = envelope.published_envelope(memory) if level in ("reference", "model") else None
    paging = run.generate.paging if run.generate else {}
    return {"model": own, "artifact": demonstrated, "memory_bytes": memory, "paging": paging}


def _versions() -> dict[str, str]:
    """What the report was written with; the machine has what was measured with."""
    known = {name: str(value) for name, value in machine.describe().items()}
    own = "not installed"
    with suppress(PackageNotFoundError):  # run from a checkout, without an install
        own = version("dfqs-workbook")
    return {name: known[name] for name in ("Python", *machine.PACKAGES)} | {"dfqs-workbook": own}
