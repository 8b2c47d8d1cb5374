"""The DFQS report: five metrics, every requirement, every claim, in one file that can be checked.

``report.json`` has exactly the metrics that DFQS 1.0 asks for, with the types it names, and beside them what
makes them numbers: intervals, counts, conditions, the model's identity, the machine. It is built from a run's
sealed stages only, follows the JSON Schema ``data/spec/report.schema.json``, and carries its own hash.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.core import machine
from dfqs_nb.core.files import canonical_sha256, sha256_of_file, write_json
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.gguf.facts import identity
from dfqs_nb.gguf.header import GGUFHeader, read_header
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.report import claims, envelope
from dfqs_nb.report import requirements as conformance
from dfqs_nb.report.stages import STAGES, ReportError, finite, read_stages

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "dfqs-report/1.0"
FILE = "report.json"
LEVEL = 0.95
PACKAGES = ("dfqs-workbook", "llama-cpp-python", "gguf", "numpy", "pandas")
OF_THE_MODEL = ("model",)  # conditions that name the model: two models are compared under the same rest


def build_report(folder: str | Path, *, ask_llama_cpp: bool = True) -> dict[str, Any]:
    """The report on the run in ``folder``, as JSON takes it; nothing is written.

    A metric whose stage is missing or incomplete is withheld: null, with the reason in ``details``.

    Args:
        ask_llama_cpp: let llama.cpp, in child processes, plan compute buffers and refuse a raw concatenation.

    Raises:
        ReportError: the run cannot be trusted (see `report_files.read_stages`), or its model is gone.
    """
    folder = Path(folder)
    stages = read_stages(folder)
    merged = stages["merge"]["model"]
    header = _header(merged)
    details = {name: measure(stages) for name, measure in METRICS.items()}
    metrics = {name: one["value"] for name, one in details.items()}
    conditions = {
        name: _without(stages[name]["conditions"], OF_THE_MODEL)
        for name in ("scores", "long_context")
        if name in stages
    }
    here = envelope.this_machine(folder)
    judged = conformance.check_requirements(stages, header, machine=here, metrics=metrics)
    checked = claims.check_claims(stages, header, ask_llama_cpp=ask_llama_cpp)
    report = {
        "schema": SCHEMA,
        "specification": "DFQS 1.0",
        "tier": _tier(stages),
        "run": folder.resolve().name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": _model(merged, header),
        "metrics": metrics,
        "details": details,
        "conditions": conditions,
        "conditions_sha256": canonical_sha256(conditions),
        "items": _items(stages),
        "routing": stages.get("routing", {}).get("verdict"),
        "conformance": judged.to_dict("records"),
        "claims": checked.to_dict("records"),
        "hardware_envelope": _envelopes(header, here, merged["path"], stages, ask_llama_cpp),
        "machine": stages.get("scores", {}).get("machine") or machine.describe(),  # that of the speeds
        "versions": _versions(),
        "sources": _sources(folder, stages),
    }
    report = json.loads(json.dumps(report, default=str, allow_nan=False))
    return {**report, "integrity": {"sha256": canonical_sha256(report)}}


def with_figures(report: Mapping[str, Any], folder: str | Path, names: Sequence[str]) -> dict[str, Any]:
    """The report with figures that were drawn from it among its sources, and its hash anew."""
    body = {key: value for key, value in report.items() if key != "integrity"}
    drawn = {name: sha256_of_file(Path(folder) / name) for name in names}
    body["sources"] = dict(sorted({**report["sources"], **drawn}.items()))
    return {**body, "integrity": {"sha256": canonical_sha256(body)}}


def write_report(folder: str | Path, report: Mapping[str, Any]) -> Path:
    """Write ``report.json`` into a run's folder, checked against the schema, and return its path.

    Raises:
        ReportError: it does not follow the schema.
    """
    path = Path(folder) / FILE
    check_report(report, path)
    return write_json(path, report)


def read_report(path: str | Path) -> dict[str, Any]:
    """A report, from its file or from the folder that holds it, checked: schema, then its own hash.

    Raises:
        ReportError: it is missing, not a report, incomplete, or was edited.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(
            "there is no report",
            where=tilde(path),
            hint="run 07_write_dfqs_report.ipynb, or `dfqs-nb report RUN`",
        ) from None
    except (OSError, ValueError) as error:
        raise ReportError(
            f"is not JSON ({error})", where=tilde(path), hint="write the report again"
        ) from error
    check_report(report, path)
    return report


def check_report(report: Any, path: str | Path) -> None:
    """Check a report against the schema and its own hashes.

    Raises:
        ReportError: the first thing that is wrong, and where in the file.
    """
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema())
    fault = jsonschema.exceptions.best_match(validator.iter_errors(report))
    again = "write the report again: `dfqs-nb report RUN`"
    if fault is not None:
        raise ReportError(
            f"does not follow the schema at {fault.json_path}: {fault.message[:200]}",
            where=tilde(path),
            hint=again,
        )
    body = {key: value for key, value in report.items() if key != "integrity"}
    if canonical_sha256(body) != report["integrity"]["sha256"]:
        raise ReportError("was edited after it was written", where=tilde(path), hint=again)
    if canonical_sha256(report["conditions"]) != report["conditions_sha256"]:
        raise ReportError("its conditions do not have the hash that it states", where=tilde(path), hint=again)


def check_sources(report: Mapping[str, Any], folder: str | Path) -> None:
    """Check that every file a report draws on is as it was.

    Raises:
        ReportError: which is missing or was changed.
    """
    for name, then in report["sources"].items():
        file = Path(folder) / name
        if not file.is_file() or sha256_of_file(file) != then:
            what = "was changed since the report was written" if file.is_file() else "is missing"
            raise ReportError(
                what, where=tilde(file), hint="run the notebook that writes it, then write the report again"
            )


def schema() -> dict[str, Any]:
    """The published JSON Schema (draft 2020-12) of ``report.json``."""
    return json.loads((data_dir() / "spec" / "report.schema.json").read_text(encoding="utf-8"))


def sentences(report: Mapping[str, Any]) -> list[str]:
    """The five metrics as people read them, a line each."""
    return [f"{name}: {_sentence(name, report['details'][name])}" for name in report["metrics"]]


def _sentence(name: str, one: Mapping[str, Any]) -> str:
    if one["withheld"]:
        return f"withheld ({one['withheld']})"
    if name == "context_stability_curve":
        points = zip(one["lengths"], one["value"], strict=True)
        return ", ".join(f"{value:.2f} at {length:,}" for length, value in points)
    if name == "failure_boundary_tokens":
        return one["sentence"]
    if name == "cpu_tokens_per_sec":
        busy = "; the machine was busy" if one["contended"] else ""
        spread = f"{one['low']:,.1f} to {one['high']:,.1f}"
        return f"{one['value']:,.1f} at depth {one['depth']} ({spread}, n = {one['n']}{busy})"
    return (
        f"{one['value']:.3f} (95 % interval {one['low']:.3f} to {one['high']:.3f}, n = {one['n']}, "
        f"guess rate {one['guess_rate']:.3f}; {one['set']})"
    )


def shares(report: Mapping[str, Any]) -> pd.DataFrame:
    """Scores, and retrieval by length, as ``plots.report_shares`` draws them; withheld ones are left out."""
    import pandas as pd

    details, nan = report["details"], float("nan")
    rows = [
        (
            "scores",
            name.removesuffix("_score"),
            one["n"],
            one["value"],
            one["low"],
            one["high"],
            one["guess_rate"] or nan,
        )
        for name in ("reasoning_score", "code_score")
        if not (one := details[name])["withheld"]
    ]
    curve, boundary = details["context_stability_curve"], details["failure_boundary_tokens"]
    if not curve["withheld"]:
        rows += [
            (
                "retrieval by length",
                f"{row['length']:,} tokens",
                row["n"],
                row["accuracy"],
                row["low"],
                row["high"],
                boundary.get("threshold", nan),
            )
            for row in curve["points"]
        ]
    return pd.DataFrame(rows, columns=["group", "label", "n", "value", "low", "high", "mark"])


# ---- the five metrics, each from its stage ----


def _withheld(why: str, stage: str, **more: Any) -> dict[str, Any]:
    return {
        "value": None,
        "n": 0,
        "low": None,
        "high": None,
        "level": LEVEL,
        "guess_rate": None,
        "withheld": why,
        "source": f"{stage}.json",
        **more,
    }


def _missing(stage: str, **more: Any) -> dict[str, Any]:
    return _withheld(f"this run has no stage {stage}: run {STAGES[stage]}", stage, **more)


def _score(name: str) -> Any:
    """The measure of a score: of the tier's own set, with the other sets beside it."""
    kind = name.removesuffix("_score")

    def measure(stages: Mapping[str, Any]) -> dict[str, Any]:
        if "scores" not in stages:
            return _missing("scores", unit="share")
        stage = stages["scores"]
        found = {one["set"]: one for one in stage["scores"] if one["name"] == name}
        own = f"{stage['tier']}-{kind}"
        if own not in found:
            why = f"the set {own} was not answered"
            if kind == "code" and stage.get("sandbox") in (None, "", "none"):
                why += ": without a sandbox no generated code is run"
            return _withheld(why, "scores", unit="share", others=list(found.values()))
        one = found.pop(own)
        facts = {
            "n": one["n"],
            "low": one["low"],
            "high": one["high"],
            "level": LEVEL,
            "guess_rate": one["guess_rate"],
            "unit": "share",
            "set": own,
            "counts": one["counts"],
            "standard_error": one["standard_error"],
            "source": "scores.json",
            "others": list(found.values()),
        }
        if not finite(one["value"]):
            why = f"{one['n_missing']} of {one['n']} items lack a result"
            return {**facts, "value": None, "low": None, "high": None, "withheld": why}
        return {**facts, "value": float(one["value"]), "withheld": None}

    return measure


def _curve(stages: Mapping[str, Any]) -> dict[str, Any]:
    if "long_context" not in stages:
        return _missing("long_context", unit="share of the short-context accuracy above guessing")
    stage = stages["long_context"]
    rows, boundary = stage["curve"], stage["boundary"]
    facts = {
        "n": boundary["n_items"],
        "low": None,
        "high": None,
        "level": LEVEL,
        "guess_rate": boundary["guess_rate"],
        "unit": "share of the short-context accuracy above guessing",
        "lengths": [row["length"] for row in rows],
        "points": rows,
        "n_haystacks": boundary["n_haystacks"],
        "source": "long_context.json",
    }
    value = stage["context_stability_curve"]
    if not finite(value):
        return {
            **facts,
            "value": None,
            "withheld": "the accuracy at short contexts is that of guessing, or no length was finished",
        }
    return {**facts, "value": [float(one) for one in value], "withheld": None}


def _boundary(stages: Mapping[str, Any]) -> dict[str, Any]:
    from dfqs_nb.context.boundary import Boundary

    if "long_context" not in stages:
        return _missing("long_context", unit="tokens")
    stage = stages["long_context"]
    one = stage["boundary"]
    facts = {
        **one,
        "n": one["n_items"],
        "level": LEVEL,
        "unit": "tokens",
        "source": "long_context.json",
        "sentence": Boundary(**one).sentence,
        "runtime_failure": stage.get("runtime_failure"),
    }
    if not finite(stage["failure_boundary_tokens"]):
        return {**facts, "value": None, "low": None, "high": None, "withheld": "no length was finished"}
    return {**facts, "value": int(stage["failure_boundary_tokens"]), "withheld": None}


def _speed(stages: Mapping[str, Any]) -> dict[str, Any]:
    if "scores" not in stages:
        return _missing("scores", unit="tokens a second", contended=None)
    stage = stages["scores"]
    value = stage.get("cpu_tokens_per_sec")
    rows = [row for row in stage["speeds"] if row["phase"] == "decode" and row["median"] == value]
    if not rows or not finite(value):
        return _withheld("decode was not timed", "scores", unit="tokens a second", contended=None)
    if stage["conditions"].get("n_gpu_layers"):
        return _withheld("layers were on a GPU", "scores", unit="tokens a second", contended=None)
    row = rows[0]
    return {
        "value": float(value),
        "n": row["repetitions"],
        "low": row["min"],
        "high": row["max"],
        "level": None,
        "spread": "least and most of the repetitions",
        "guess_rate": None,
        "unit": "tokens a second",
        "depth": row["depth"],
        "n_threads": row["n_threads"],
        "contended": row["contended"],
        "utilisation": row["utilisation"],
        "by_depth": stage["speeds"],
        "withheld": None,
        "source": "scores.json",
    }


METRICS = {
    "reasoning_score": _score("reasoning_score"),
    "code_score": _score("code_score"),
    "context_stability_curve": _curve,
    "cpu_tokens_per_sec": _speed,
    "failure_boundary_tokens": _boundary,
}


# ---- what stands beside them ----


def _header(merged: Mapping[str, Any]) -> GGUFHeader:
    path = Path(merged["path"])
    if not path.is_file():
        raise ReportError(
            "the model of this run is gone",
            where=tilde(path),
            hint=f"put it back, or run {STAGES['merge']} again",
        )
    if path.stat().st_size != merged["nbytes"]:
        raise ReportError(
            f"is not the model of this run: it has {path.stat().st_size:,} bytes, not {merged['nbytes']:,}",
            where=tilde(path),
            hint=f"run {STAGES['merge']} again",
        )
    return read_header(path)


def _model(merged: Mapping[str, Any], header: GGUFHeader) -> dict[str, Any]:
    facts = identity(header)
    return {
        "name": merged["name"],
        "sha256": merged["sha256"],
        "size_bytes": merged["nbytes"],
        "header_fingerprint": hashlib.sha256(header.raw).hexdigest(),
        "architecture": header.architecture,
        "parameters": facts["parameters"],
        "active_parameters": facts["active parameters a token"],
        "bits_per_weight": facts["bits a weight"],
        "tensor_types": facts["tensor types"],
    }


def _tier(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The tier of the stages that have one; `report_files` has checked that they agree."""
    return next((stage["tier"] for stage in stages.values() if "tier" in stage), "nano")


def _without(conditions: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in conditions.items() if key not in names}


def _items(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """The files with one row an item, which a paired comparison of two reports reads."""
    files = {name: stage["files"] for name, stage in stages.items()}
    scored = [
        {"file": name, "sha256": digest}
        for name, digest in files.get("scores", {}).items()
        if name == "score_items.csv"
    ]
    context = [
        {"file": name, "sha256": digest}
        for name, digest in files.get("long_context", {}).items()
        if name.endswith(".jsonl")
    ]
    return {"reasoning": scored, "code": scored, "long_context": context}


def _sources(folder: Path, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """SHA-256 of the stage files and of every file that they stand on."""
    found = {f"{name}.json": sha256_of_file(folder / f"{name}.json") for name in stages}
    for stage in stages.values():
        found |= stage["files"]
    return dict(sorted(found.items()))


def _envelopes(
    header: GGUFHeader, here: envelope.Machine, path: str, stages: Mapping[str, Any], ask_llama_cpp: bool
) -> dict[str, Any]:
    """The hardware envelope of this model, and the published artifact's beside it."""
    given = stages.get("generate", {}).get("conditions", {})
    names = OpenSettings.__dataclass_fields__
    settings = OpenSettings(**{key: given[key] for key in names if key in given})
    contexts = sorted({*envelope.CONTEXTS, header.arch("context_length") or envelope.CONTEXTS[0]})
    compute = envelope.planned_compute(path, contexts, settings) if ask_llama_cpp else {}
    return {
        "model": envelope.hardware_envelope(header, here, compute=compute, flash_attn=settings.flash_attn),
        "artifact": envelope.published_envelope(here),
        "machine": asdict(here),
    }


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout, without an install
            found[name] = "not installed"
    return found
