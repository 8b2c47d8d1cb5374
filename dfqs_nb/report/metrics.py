"""The DFQS report of a run, from its sealed stages only: metrics, requirements, statements, envelope."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dfqs_nb import __version__
from dfqs_nb.core import machine
from dfqs_nb.core.display import size
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.files import canonical_sha256, sha256_of_file, there_is
from dfqs_nb.core.paths import tilde
from dfqs_nb.core.stage import NOTEBOOKS
from dfqs_nb.gguf.facts import identity, parameters
from dfqs_nb.gguf.header import GGUFHeader, read_header
from dfqs_nb.gguf.memory import KvCacheBytes, kv_cache_bytes
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.report import reading
from dfqs_nb.report.claims import check_claims, relation
from dfqs_nb.report.reading import BOUNDARY, CURVE, SPEED, Command, Run, settings_of
from dfqs_nb.report.requirements import check_requirements
from dfqs_nb.report.template import FEW_TEXTS, GB, spec_table
from dfqs_nb.stats import LEVEL

VERSIONS = ("Python", *machine.PACKAGES)
DIGITS = 10  # of every float in report.json: more than any measurement has
# The files with one row an answer, from which scores and curve are counted again.
ITEMS = dict.fromkeys(("reasoning", "code", "choices"), reading.SCORE_ITEMS)
ITEMS["long_context"] = reading.CONTEXT_ITEMS
FITS, PAGED, DOES_NOT_FIT, NOT_KNOWN = "fits", "fits, paged", "does not fit", "not known"
CONTEXTS = (8192, 16384, 32768, 131072, 1048576)
Detail = dict[str, Any]


def build_report(folder: str | Path, *, ask_llama_cpp: bool = True) -> dict[str, Any]:
    """The report on the run in ``folder``, as JSON takes it; nothing is written.

    A metric whose stage is missing or incomplete is withheld: null, with the reason in ``details``. The
    artifact's statements are part of its report, and of the reference model's as a demonstration.
    ``ask_llama_cpp``: let it plan buffers, in child processes. A DfqsError says that the run
    cannot be trusted (see `read_run`), or that its model is gone.
    """
    folder = Path(folder)
    run = reading.read_run(folder)
    command, header = reading.command_of(folder, run), _header(run)
    drawn = {stage: run[stage] for stage in reading.DRAWN_ON if stage in run}
    level, details = relation(header, run), details_of(run, command)
    metrics, known = {metric: detail["value"] for metric, detail in details.items()}, machine.describe()
    conditions = {name: dict(run[name]["conditions"]) for name in ("scores", "long_context") if name in run}
    for own in conditions.values():
        own.pop("model", None)
    sources = {f"{stage}.json": sha256_of_file(folder / f"{stage}.json") for stage in drawn}
    sources |= {file: digest for stage in drawn.values() for file, digest in stage["files"].items()}
    tiers = [stage["tier"] for stage in run.values() if stage.get("tier")]
    report = {
        "schema": "dfqs-report/1.0",
        "specification": "DFQS 1.0",
        "tier": (tiers or ["nano" if level == "reference" else "standard"])[0],
        "run": command["run"],
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": _model(run, header, level),
        "metrics": metrics,
        "details": details,
        "conditions": conditions,
        "conditions_sha256": canonical_sha256(_rounded(conditions)),  # as they will stand in the file
        "items": {
            kind: [{"file": file, "sha256": sources[file]}] if file in sources else []
            for kind, file in ITEMS.items()
        },
        "routing": run.get("routing", {}).get("verdict"),
        "conformance": check_requirements(run, header, metrics, command).to_dict("records"),
        "claims": [] if level == "another" else check_claims(run, header, level).to_dict("records"),
        "hardware_envelope": _envelope(run, header, level, ask_llama_cpp),
        "machine": _machine(run, known),
        "versions": {key: str(known[key]) for key in VERSIONS} | {"dfqs-workbook": __version__},
        "sources": dict(sorted(sources.items())),
    }
    return reading.sealed(_rounded(report))


def _rounded(value: Any) -> Any:
    """A value as JSON takes it, whose floats have at most `DIGITS` digits."""
    text = json.dumps(value, default=str, allow_nan=False)
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.{DIGITS}g}"))


def details_of(run: Run, command: Command = reading.UNKNOWN) -> dict[str, Detail]:
    """Each metric with all that stands beside it; one that cannot be given has the reason."""
    details, generate = {}, run.get("generate", {})
    layers = reading.on_gpu(run.get("scores") or generate)
    for name, (stage, unit, _, measured) in METRICS.items():
        empty = dict.fromkeys(("value", "low", "high", "guess_rate", "withheld"))
        empty |= {"n": 0, "level": LEVEL, "unit": unit, "source": f"{stage}.json"}
        missing = {"withheld": reading.not_run([stage], run, command)}
        found = measured(run[stage], name) if stage in run else missing
        if name == SPEED and layers:  # it is of the CPU by definition
            found = {"withheld": f"{layers} were on a GPU; {reading.on_cpu(command)}"}
        details[name] = empty | found
    speed = details[SPEED]
    speed.setdefault("contended", None)
    for row in generate.get("speed", []):
        is_better = speed["withheld"] or speed["contended"] and not row.get("contended")
        if row["phase"] == "decode" and (is_better or not row.get("contended")):
            name = "notebook_03" if is_better else "also_notebook_03"
            speed[name] = _speed_of(row) | {"n_gpu_layers": settings_of(generate)["n_gpu_layers"]}
    return details


def _score(stage: Mapping[str, Any], name: str) -> Detail:
    """A score: of the tier's own set."""
    kind = name.removesuffix("_score")
    own = f"{stage.get('tier')}-{kind}"
    names = (own, f"{own}-hard")  # what the nano tier asks, as its model knows nearly all of the first
    score = next((it for it in stage["scores"] if it["name"] == name and it["set"] in names), None)
    chosen = {}
    by_likelihood = [it for it in stage["scores"] if it["name"] == "choice_score" and it["value"] is not None]
    if kind == "reasoning" and by_likelihood:  # no answer is written; the first is the tier's own
        keys = ("set", "value", "low", "high", "n", "guess_rate")
        chosen = {"choices": {key: by_likelihood[0][key] for key in keys}}
    if score is None:
        unsafe = kind == "code" and stage.get("sandbox") in (None, "", "none")
        why = ": without a sandbox no generated code is run" if unsafe else ""
        for row in stage.get("left_out") or ():
            if row["what"] == f"the set {own}" and not unsafe:
                why = f": it needs {row['needs']}" if row["needs"] else ": the budget left it out"
        return {"withheld": f"the set {own} was not answered{why}", **chosen}
    detail = {key: value for key, value in score.items() if key not in ("name", "n_missing")} | chosen
    if score["value"] is None:
        detail |= {"low": None, "high": None}
        part = stage["conditions"].get(score["set"], {}).get("part")  # counts all questions of the set
        missing = f"{score['n_missing']} of {score['n']} questions lack a result"
        detail["withheld"] = f"only {part} answered" if part else missing
    return detail


def _curve(stage: Mapping[str, Any], name: str) -> Detail:
    planned, value = stage["curve"], stage.get(name)
    detail = {
        "longest": stage.get("longest") or 0,
        "lengths": [row["length"] for row in planned],
        "points": sorted(planned + stage.get("refined", []), key=lambda row: row["length"]),
    }
    if boundary := stage.get("boundary"):
        detail |= {"n": sum(row["n"] for row in planned), "n_keys": stage.get("guess", {}).get("keys")}
        detail |= {key: boundary[key] for key in ("guess_rate", "n_haystacks")}
    if not value or any(number is None or not math.isfinite(number) for number in value):
        why = "the accuracy at short contexts is that of guessing, or no length was finished"
        return {**detail, "withheld": stage.get("not_measured") or why}
    return {**detail, "value": value}


def _boundary(stage: Mapping[str, Any], name: str) -> Detail:
    boundary, value = stage.get("boundary"), stage.get(name)
    if boundary is None or value is None:
        return {"withheld": stage.get("not_measured") or "no length was finished"}
    return {
        **boundary,
        "provisional": bool(boundary.get("provisional")) or boundary["n_haystacks"] < FEW_TEXTS,
        "value": value,
        "n": boundary["n_items"],
        "n_lengths": len(stage["curve"]) + len(stage.get("refined", [])),
    }


def _speed(stage: Mapping[str, Any], name: str) -> Detail:
    decode = [row for row in stage.get("speeds", []) if row["phase"] == "decode"]
    row = next((row for row in decode if row["median"] == stage.get(name)), None)
    if row is None:
        return {"withheld": "decode was not timed"}
    return _speed_of(row) | {"level": None, "utilisation": row.get("utilisation")}


def _speed_of(row: Mapping[str, Any]) -> Detail:
    """A row of speeds as a metric's details have it."""
    rates = {"value": row["median"], "low": row["min"], "high": row["max"], "n": row["repetitions"]}
    rates["contended"] = row.get("contended", False)
    return rates | {name: row[name] for name in ("depth", "n_threads", "tokens", "values") if name in row}


# Stage, unit, type in the hub's model-index (which takes no curve), and the function that gives the details.
METRICS: dict[str, tuple[str, str, str, Callable[[Any, str], Detail]]] = {
    "reasoning_score": ("scores", "share", "accuracy", _score),
    "code_score": ("scores", "share", "pass@1", _score),
    CURVE: ("long_context", "share of the short-context accuracy above guessing", "", _curve),
    SPEED: ("scores", "tokens a second", "tokens_per_second", _speed),
    BOUNDARY: ("long_context", "tokens", "tokens", _boundary),
}


def _header(run: Run) -> GGUFHeader:
    file, again = run["merge"]["model"], f"put it back, or run {NOTEBOOKS['merge']} again"
    path = Path(file.get("path", ""))
    if not there_is(path) or not path.is_file():
        raise DfqsError("the model of this run is gone", where=tilde(path), hint=again)
    if (nbytes := path.stat().st_size) != file.get("nbytes"):
        what = f"is not the model of this run: it has {nbytes:,} bytes, not {file.get('nbytes', 0):,}"
        raise DfqsError(what, where=tilde(path), hint=again)
    return read_header(path)


def _model(run: Run, header: GGUFHeader, level: str) -> dict[str, Any]:
    facts, file = identity(header), run["merge"]["model"]
    return {
        "name": file["name"],
        "name_in_header": facts["name"],
        "licence": facts["licence"],
        "sha256": file["sha256"],
        "size_bytes": file["nbytes"],
        "header_fingerprint": hashlib.sha256(header.raw).hexdigest(),
        "architecture": header.architecture,
        "parameters": facts["parameters"],
        "active_parameters": facts["active parameters a token"],
        "bits_per_weight": facts["bits a weight"],
        "tensor_types": facts["tensor types"],
        "chat_template": bool(header.text("tokenizer.chat_template")),
        "context_length": header.arch("context_length"),
        "relation_to_artifact": level,
    }


def _machine(run: Run, here: Mapping[str, Any]) -> dict[str, Any]:
    """Where the model was timed, as a notebook recorded it; else what writes this report."""
    timed = [name for name in ("scores", "generate") if name in run]
    by = next((name for name in timed if run[name].get("machine")), "dfqs_report")
    layers = {"on a GPU": reading.on_gpu(run[timed[0]]) or "no layer"} if timed else {}
    facts = run[by]["machine"] if by in run else here
    return {**facts, **layers, "recorded by": f"notebook {NOTEBOOKS[by][:2]}"}


def _envelope(run: Run, header: GGUFHeader, level: str, ask_llama_cpp: bool) -> dict[str, Any]:
    """What the run's model needs of a machine, and what notebook 03 saw a token read from the disk."""
    generate, memory = run.get("generate", {}), machine.available_memory().total_bytes
    at, contexts = settings_of(generate), within(header)
    known = [field.name for field in fields(OpenSettings) if at[field.name] is not None]
    settings = OpenSettings(**{name: at[name] for name in known})
    compute = planned_compute(header.path, contexts, settings) if ask_llama_cpp else {}
    own = hardware_envelope(header, memory, compute, is_artifact=level == "artifact")
    return {**own, "paging": generate.get("paging", {})}


def planned_compute(path: str | Path, contexts: Sequence[int], settings: OpenSettings) -> dict[int, int]:
    """Bytes of the compute buffer by context, with all layers in memory; empty where llama.cpp refuses."""
    from dfqs_nb.llama.check import plan_memory

    try:
        plans = plan_memory(path, [replace(settings, n_ctx=n, n_gpu_layers=0) for n in contexts])
    except ModelError:
        return {}
    return {n_ctx: plan["compute_bytes"] for n_ctx, plan in zip(contexts, plans, strict=True)}


def within(header: GGUFHeader) -> list[int]:
    """`CONTEXTS` up to the model's own, that among them; all where the header declares none."""
    own = header.arch("context_length")
    return sorted({n for n in CONTEXTS if not own or n < own} | ({int(own)} if own else set()))


def hardware_envelope(
    header: GGUFHeader, memory_bytes: int, compute: Mapping[int, int], *, is_artifact: bool = False
) -> dict[str, Any]:
    """The envelope of the model that a header describes, against this machine's memory, as JSON takes it.

    ``compute``: buffers by context (`planned_compute`); nothing is said to fit without. ``is_artifact``: hold
    it against the table of DFQS 1.0, too.
    """
    weights, rows, note = parameters(header, in_bytes=True).total, [], ""
    limits = {f"this machine ({size(memory_bytes)})": memory_bytes}
    if is_artifact:
        ram = spec_table("requirements")["envelope"]["ram"]
        limits |= {f"DFQS 1.0 {level} ({gb} GB)": gb * GB for level, gb in ram.items()}
    for n_ctx in within(header):
        cache, planned = kv_cache_bytes(header, n_ctx), compute.get(n_ctx)
        row = {"n_ctx": n_ctx, "kv_bytes": cache.total, "compute_bytes": planned}
        row["need_bytes"] = weights + cache.total + (planned or 0)
        rows.append(row | {"fits": {name: _fit(limit, cache, row) for name, limit in limits.items()}})
        note = cache.note and f"Of the KV cache the table shows the {cache.exactness} size: {cache.note}."
    return {"model": header.path.stem, "note": note, "rows": rows}


def _fit(limit: int, cache: KvCacheBytes, row: Mapping[str, Any]) -> str:
    """Whether a memory holds all; or cache and buffer alone, with weights paged from the disk."""
    compute = row["compute_bytes"]
    if (compute or 0) + cache.total * (cache.exactness == "exact") > limit:
        return DOES_NOT_FIT
    if compute is None or cache.exactness == "rough" or compute + cache.total > limit:
        return NOT_KNOWN
    return FITS if row["need_bytes"] <= limit else PAGED
