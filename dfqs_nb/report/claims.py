"""The statements of the documents about the artifact, each held against a fact or a measurement.

``data/spec/claims.toml`` has them, and the public record. Where the model of a run is the artifact,
DeepSeek-V4-Flash-IQ1_S-XL, its header and measurements are facts, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import pandas as pd

from dfqs_nb.gguf.facts import bits_per_weight, parameters, types_by_bytes
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import CACHE_TYPES, kv_cache_bytes, published, published_shape
from dfqs_nb.gguf.models import Model, registered
from dfqs_nb.report.reading import Run, on_gpu
from dfqs_nb.report.template import GB, filled, sentence, spec_table

SINGLE = "deepseek-v4-flash-iq1_s-xl-single"  # in data/models.toml
SHARDS = "deepseek-v4-flash-iq1_s-xl"  # in data/models.toml
QUANTIZATION = "IQ1_S"  # of most bytes of the artifact
SIZE_MARGIN = 0.03  # within this share of its size, a file of its shapes and types is taken for the artifact
CONFIRMED, IN_PART, CONTRADICTED = "confirmed", "confirmed in part", "contradicted"
CONTRADICTS_ITSELF = "contradicts itself"
NOT_TESTABLE, NOT_CHECKABLE = "not testable here", "not checkable"
CLAIM_VERDICTS = (CONFIRMED, IN_PART, CONTRADICTED, CONTRADICTS_ITSELF, NOT_TESTABLE, NOT_CHECKABLE)
GIB = 2**30
Claim = Mapping[str, Any]  # an entry of claims.toml
COLUMNS = ("number", "id", "document", "section", "claim", "how", "found", "verdict", "evidence", "source")
SUDDEN = 0.5  # of the ability above guessing, lost within one doubling of the context


def check_claims(
    run: Run, header: GGUFHeader | None = None, level: str = "", *, claims: Sequence[Claim] | None = None
) -> pd.DataFrame:
    """Check every statement about the artifact with what this run and the public record have: a row each.

    An empty ``run`` checks against the record alone. ``header`` is of the model that was run, ``level`` its
    `relation`, where that is known. ``claims``: other statements than those of ``data/spec/claims.toml``.
    """
    known, rows = facts(run, header, level), []
    for claim in spec_table("claims")["claims"] if claims is None else claims:
        fact: Mapping[str, str] = spec_table("claims")["facts"][claim["fact"]]
        value: Any = known.get(claim["fact"])
        found, evidence, verdict = "not measured", "{why}", claim["verdict"] or NOT_TESTABLE
        if value is not None:
            found, evidence = (claim[name] or fact[name] for name in ("found", "evidence"))
            verdict = claim["verdict"] or TESTS[claim["test"]](claim, value, known)
        if verdict == CONTRADICTED and claim["unit"] == "GB" and not claim["verdict"]:
            in_gib = [number * GB / GIB for number in (value if isinstance(value, list) else [value])]
            if TESTS[claim["test"]](claim, in_gib, known) != CONTRADICTED:
                evidence, verdict = evidence + spec_table("claims")["as_gib"], CONTRADICTS_ITSELF
        known["figure"] = figure(claim["value"], claim["unit"])
        stated = (claim[name] for name in ("number", "id", "document", "section", "text"))
        judged = (filled(found, known), verdict, filled(evidence, known))
        rows.append((*stated, fact["how"], *judged, claim["source"]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def agrees(claim: Claim, measured: float) -> bool:
    """Whether a number agrees with a figure: within its tolerance, or one unit of its last digit.

    >>> [agrees({"value": 61.6, "tolerance": None}, measured) for measured in (61.54, 61.4)]
    [True, False]
    """
    value, tolerance = claim["value"], claim["tolerance"]
    if tolerance is not None:
        return bool(abs(measured - value) <= tolerance * value)
    return bool(abs(measured - value) < 10.0 ** int(Decimal(str(value)).as_tuple().exponent))


def figure(value: Any, unit: str = "") -> str:
    """A figure as people read it.

    >>> figure(1048576, "tokens"), figure([0.2, 0.5], "tokens/s"), figure(68, "%")
    ('1,048,576 tokens', '0.2 to 0.5 tokens/s', '68 %')
    """
    ends = value if isinstance(value, list) else [value]
    shown = [f"{end:,}" if isinstance(end, int | float) else str(end) for end in ends]
    return f"{' to '.join(shown)} {unit}".strip()


def _at_most(claim: Claim, value: Any, known: Mapping[str, Any]) -> str:
    """The fact is at most the limit, or the figure; of several facts, some may be."""
    limit = claim["value"] if claim["limit"] is None else claim["limit"]
    within = [number <= limit for number in (value if isinstance(value, list) else [value])]
    verdict: str = claim["yes"] if all(within) else IN_PART if any(within) else claim["no"]
    return verdict


def _equals(claim: Claim, value: Any, known: Mapping[str, Any]) -> str:
    """The figure is the fact; of a list, one of it."""
    if isinstance(value, str) or isinstance(claim["value"], bool):
        is_so = value == claim["value"]
    else:
        is_so = any(agrees(claim, it) for it in (value if isinstance(value, list) else [value]))
    return str(claim["yes"] if is_so else claim["no"])


def _speed(claim: Claim, value: float, known: Mapping[str, Any]) -> str:
    """A range of speeds against the bound of that machine; on a CPU, against what was measured too."""
    if claim["value"][0] > value:
        return CONTRADICTED
    measured = known["cpu_tokens_per_sec"] if claim["fact"] == "bound_cpu" else None
    if measured is None:
        return NOT_TESTABLE
    return CONFIRMED if claim["value"][0] <= measured <= claim["value"][-1] else CONTRADICTED


def _reaches(claim: Claim, value: Any, known: Mapping[str, Any]) -> str:
    """Retrieval carries to the context named, and that far was measured."""
    if value["right_censored"]:
        return CONFIRMED if (known["longest"] or 0) >= claim["value"] else NOT_TESTABLE
    return CONTRADICTED if value["tokens"] < claim["value"] else CONFIRMED


def _gradual(claim: Claim, value: Mapping[str, float], known: Mapping[str, Any]) -> str:
    """The largest fall per octave, by its interval, is some and less than sudden."""
    if value["low"] > SUDDEN:
        return CONTRADICTED
    return CONFIRMED if value["low"] > 0 and value["high"] < SUDDEN else NOT_TESTABLE


TESTS: dict[str, Callable[[Claim, Any, Mapping[str, Any]], str]] = {
    "equals": _equals,
    "at most": _at_most,
    "speed": _speed,
    "interval": lambda claim, it, _: CONFIRMED if it[1] <= claim["value"] <= it[2] else CONTRADICTED,
    "status": lambda claim, value, known: value,  # a notebook has judged it already
    "reaches": _reaches,
    "gradual": _gradual,
}


def relation(header: GGUFHeader | None, run: Run) -> str:
    """How the model of a run is related to the artifact: by SHA-256, or by architecture, types and size.

    ``artifact`` (this file, merged or not), ``model`` (DeepSeek-V4-Flash in another quantization),
    ``reference`` (the model that the workbook ships) or ``another``. No quantity that a statement is about
    decides it, so that a header can contradict a statement.
    """
    digest, known = run["merge"]["model"]["sha256"] if run else None, registered()
    if any(digest in hashes(it) for it in known.values() if it.source.startswith("data/")):
        return "reference"
    if header is None or header.get("split.count", 0) > 1 or header.architecture != "deepseek4":
        return "another"
    for key, value in published()["keys"].items():
        wanted = value if isinstance(value, list) else [value]
        if header.counts(key)[: len(wanted)] != wanted:  # a next-token layer may follow
            return "another"
    size, most = known[SINGLE].size_bytes, next(iter(types_by_bytes(header.tensors)), "")
    is_alike = most == QUANTIZATION and abs(header.file_size - size) <= SIZE_MARGIN * size
    return "artifact" if is_alike or digest in {*hashes(known[SHARDS]), *hashes(known[SINGLE])} else "model"


def hashes(model: Model) -> set[str]:
    """SHA-256 of the files of a registered model, and of their merge."""
    return {sha for sha in (model.merged_sha256, *(file.sha256 for file in model.files)) if sha}


def facts(run: Run, header: GGUFHeader | None, level: str = "") -> dict[str, Any]:
    """Every fact by its name; None for one that nobody knows here. ``why`` says so in a sentence.

    What the run's own header has, of the artifact or (for shapes) of its model, goes before the record.
    """
    level = level or relation(header, run)
    own = header if level in ("artifact", "model") else None
    file = header if level == "artifact" else None
    bases = {"artifact": "the file's own header"}
    bases["model"] = "the header of the same model in another quantization"
    name = run["merge"]["model"]["name"] if run else ""
    measured = f"this run measured {name}, not the artifact" if run else "the artifact was not run"
    return {
        **spec_table("claims")["published"]["figures"],
        "stated": True,
        "basis": bases.get(level, "the published configuration"),
        "why": "this run did not measure it" if file else measured,
        **_shape(own),
        **_bytes(file),
        **_measurements(run if file else {}, run),
    }


def _shape(own: GGUFHeader | None) -> dict[str, Any]:
    """What follows from shapes: counts of weights, and the cache in every type, without and with swa_full."""
    record, shape = spec_table("claims")["published"], own or published_shape()
    total, active, routed = (record[f"{name}parameters"] for name in ("", "active_", "routed_"))
    if own and (count := parameters(own)):
        total, active, routed = count.total, count.active, count.routed
    known = {key: own.arch(key) if own else value for key, value in record["keys"].items()}
    used, number = known["expert_used_count"], known["expert_count"]
    known |= {"parameters": total, "parameters_b": total / 1e9}
    known |= {"active_parameters": active, "active_b": active / 1e9, "active_with_2_b": None}
    if used and number:
        known["active_with_2_b"] = (active + routed * (2 - used) / number) / 1e9
    for n in (8192, 1048576):
        kinds = [(kind, full) for kind in CACHE_TYPES for full in (False, True)]
        sizes = {it: kv_cache_bytes(shape, n, 512, it[0], it[0], it[1]).total / GB for it in kinds}
        known |= {f"kv_{n}": list(sizes.values()), f"kv_{n}_gb": sizes["f16", False]}
        known[f"kv_{n}_full_gb"] = sizes["f16", True]
    return known


def _bytes(file: GGUFHeader | None) -> dict[str, Any]:
    """What the tensor table of the artifact's own file has; types are known from there alone."""
    if file is None:
        return dict.fromkeys(("mean_bits", "main_type", "type_shares"))
    types, weights = types_by_bytes(file.tensors), parameters(file, in_bytes=True)
    shares = [f"{name} {nbytes / weights.total:.1%}" for name, nbytes in types.items()]
    known = {"mean_bits": bits_per_weight(file.tensors), "main_type": next(iter(types), None)}
    known |= {"type_shares": ", ".join(shares[:4]), "all_tensors": len(file.tensors)}
    known |= {"weights_gb": weights.total / GB, "weights_gib": weights.total / GIB}
    return {**known, "experts_gb": weights.routed / GB, "layers_43_gb": weights.routed / GB}


def _measurements(own: Run, run: Run) -> dict[str, Any]:
    """What only a run of the artifact shows, and what notebook 04 says of this run's own model."""
    scored, context = own.get("scores", {}), own.get("long_context", {})
    boundary = context.get("boundary")
    code = next((score for score in scored.get("scores", []) if score["set"] == "standard-code"), None)
    is_whole = bool(own) and own["merge"]["model"].get("nbytes") == registered()[SINGLE].size_bytes
    recorded = spec_table("claims")["published"]["independent_sha256"]
    known: dict[str, Any] = {
        "sha256": own["merge"]["model"]["sha256"] if is_whole else recorded,
        "whose_sha256": "this run's file has" if is_whole else "an independent download is recorded with",
        "cpu_tokens_per_sec": None if on_gpu(scored) else scored.get("cpu_tokens_per_sec"),
        "humaneval": None,
        "boundary": boundary and {**boundary, "found": sentence("reached", boundary, " tokens")},
        "longest": max((row["length"] for row in context.get("curve", [])), default=None),
        "largest_fall": context.get("largest_fall") or None,
    }
    shares: list[Any] = [code[name] for name in ("value", "low", "high")] if code else [None]
    if code and not code["n_missing"] and None not in shares:
        known |= {"humaneval": [100 * share for share in shares], "humaneval_n": code["n"]}
    traced = own.get("routing", {}).get("verdict") or {}
    load, known["routing_loads"] = traced.get("load_passed"), None
    if load is not None:
        known["routing_loads"] = CONFIRMED if load and traced["passed"] else CONTRADICTED
        known["routing_loads_evidence"] = traced["load_sentence"]
    for claim in run.get("routing", {}).get("claims", []):
        key = "_".join(claim["claim"].split()[:2])
        known |= {key: claim["status"] if own else None, f"{key}_evidence": claim["evidence"]}
    return known
