"""The statements of the documents about the artifact, each held against a fact or a measurement.

``data/spec/claims.toml`` has them. Where the model of a run is the artifact, DeepSeek-V4-Flash-IQ1_S-XL, its
header and measurements are the facts (`facts`); where it is another one, the public record is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from dfqs_nb import scores
from dfqs_nb.gguf.facts import bits_per_weight, class_of, layer_of, parameters, types_by_bytes
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import (
    CACHE_TYPES,
    FLASH,
    active_bytes,
    card_compute,
    kv_cache_bytes,
    published,
    published_shape,
    weights_bytes,
)
from dfqs_nb.gguf.models import registered
from dfqs_nb.merge import methods_table
from dfqs_nb.report import spec as tables
from dfqs_nb.report.envelope import CONTEXTS, SINGLE, iq1_s_experts_bytes
from dfqs_nb.report.spec import CONFIRMED, CONTRADICTED, GB, GIB, IN_PART, NOT_TESTABLE, Claim, filled
from dfqs_nb.report.stages import Run, is_file_of

SHARDS = "deepseek-v4-flash-iq1_s-xl"  # in data/models.toml
QUANTIZATION = "IQ1_S"  # of most bytes of the artifact
SIZE_MARGIN = 0.03  # within this share of its size, a file of its shapes and types is taken for the artifact
OFFLOADED = 35  # n_gpu_layers of the documents
MACHINES = {"cpu": "CPU", "3090": "RTX 3090", "2x3090": "2 x RTX 3090", "h100": "H100"}  # of the card's table
COLUMNS = ("number", "id", "document", "section", "claim", "how", "found", "verdict", "evidence", "source")
SUDDEN = 0.5  # of the ability above guessing, lost within one doubling of the context


def check_claims(
    run: Run, header: GGUFHeader | None = None, *, claims: Sequence[Claim] | None = None
) -> pd.DataFrame:
    """Check every statement about the artifact with what this run and the public record have: a row each.

    An empty ``run`` checks against the public record alone. ``header`` is of the model that was run.
    ``claims`` are other statements than those of ``data/spec/claims.toml``.
    """
    known, spec, rows = facts(run, header), tables.claims_spec(), []
    for claim in spec["claims"] if claims is None else claims:
        fact: Mapping[str, str] = spec["facts"][claim["fact"]]
        value: Any = known.get(claim["fact"])
        found, evidence, verdict = "not measured", "{why}", claim["verdict"] or NOT_TESTABLE
        if value is not None:
            found, evidence = (claim[name] or fact[name] for name in ("found", "evidence"))
            verdict = claim["verdict"] or TESTS[claim["test"]](claim, value, known)
        if verdict == CONTRADICTED and claim["unit"] == "GB" and not claim["verdict"]:
            in_gib = [number * GB / GIB for number in (value if isinstance(value, list) else [value])]
            if TESTS[claim["test"]](claim, in_gib, known) != CONTRADICTED:
                evidence, verdict = evidence + spec["as_gib"], tables.CONTRADICTS_ITSELF
        known["figure"] = tables.figure(claim["value"], claim["unit"])
        stated = (claim[name] for name in ("number", "id", "document", "section", "text"))
        judged = (filled(found, known), verdict, filled(evidence, known))
        rows.append((*stated, fact["how"], *judged, claim["source"]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


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
        is_so = any(tables.agrees(claim, it) for it in (value if isinstance(value, list) else [value]))
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
    digest, shape = run["merge"]["model"]["sha256"] if run else None, published_shape()
    if is_file_of(digest):
        return "reference"
    if header is None or header.get("split.count", 0) > 1 or header.architecture != shape.architecture:
        return "another"
    for key, value in published()["keys"].items():
        own = header.arch(key)
        if isinstance(value, list) and isinstance(own, list):
            own = own[: len(value)]  # a next-token layer may follow in the file
        if own != value:
            return "another"
    size, most = registered()[SINGLE].size_bytes, next(iter(types_by_bytes(header.tensors)), "")
    is_alike = most == QUANTIZATION and abs(header.file_size - size) <= SIZE_MARGIN * size
    return "artifact" if is_alike or is_file_of(digest, (SHARDS, SINGLE)) else "model"


def facts(run: Run, header: GGUFHeader | None) -> dict[str, Any]:
    """Every fact by its name; None for one that nobody knows here. ``why`` says so in a sentence."""
    level = relation(header, run)
    own = header if level in ("artifact", "model") else None
    file = header if level == "artifact" else None
    another = "the header of the same model in another quantization"
    basis = {"artifact": "the file's own header", "model": another}
    name = run["merge"]["model"]["name"] if run else ""
    measured = f"this run measured {name}, not the artifact" if run else "the artifact was not run"
    return {
        "stated": True,
        "basis": basis.get(level, "the published configuration"),
        "why": "this run did not measure it" if file else measured,
        **_sizes(file),
        **_shape(own, file),
        **_identity(run if file else {}),
        **_memory(own, file),
        **_measurements(run if file else {}, run),
    }


def _sizes(file: GGUFHeader | None) -> dict[str, Any]:
    published, known = tables.claims_spec()["published"], registered()
    nbytes, shards, native = known[SINGLE].size_bytes, known[SHARDS], published["native_bytes"]
    weights, active = (weights_bytes(file), active_bytes(file)) if file else (FLASH.weights, FLASH)
    extra = methods_table(nbytes, 0, {})["extra disk (bytes)"]
    table = scores.speed.card_table(active).set_index("machine")["bound"]
    bounds = {f"bound_{key}": float(table.filter(regex=f"^{name}").iloc[0]) for key, name in MACHINES.items()}
    return {
        "file_bytes": nbytes,
        "file_gb": nbytes / GB,
        "file_gib": nbytes / GIB,
        "two_files_gb": 2 * nbytes / GB,
        "consuming_gb": extra["merge --consume, repair --in-place"] / GB,
        "shards_sum": " + ".join(f"{shard.size_bytes:,}" for shard in shards.files)
        + f" = {shards.size_bytes:,}",
        "merged": False if shards.size_bytes == nbytes else None,
        "weights_gb": weights / GB,
        "weights_gib": weights / GIB,
        "experts_gb": active.routed_total / GB,
        "rest_gb": (nbytes - active.routed_total) / GB,
        "most_rest_gb": (nbytes - iq1_s_experts_bytes()) / GB,
        "token_gb": active.total / GB,
        "native_gb": native / GB,
        "native_bits": 8 * native / published["parameters"],
        "ratio": native / nbytes,
        "saved": 100 * (1 - nbytes / native),
        **_offloaded(file, active.routed_total),
        **bounds,
        "dram_share": 100 * 0.5 / bounds["bound_cpu"],
    }


def _offloaded(file: GGUFHeader | None, experts_bytes: int) -> dict[str, Any]:
    """Bytes that n_gpu_layers puts on a GPU. llama.cpp counts the output layer as the last of the layers.

    Source: ``i_gpu_start`` in src/llama-model.cpp. Without the file, the routed experts alone are known;
    those of the last layers are IQ1_S.
    """
    n_layers = int(published_shape().arch("block_count"))
    n = OFFLOADED - 1
    known = {"n_layers": n_layers, "n_offloaded": n, "layers_are": "their routed experts alone"}
    if file is None:
        some = round(iq1_s_experts_bytes() * n / n_layers)
        return known | {"layers_35_gb": some / GB, "layers_43_gb": experts_bytes / GB}
    sizes = [0] * n_layers
    output = 0
    for tensor in file.tensors:
        layer = layer_of(tensor.name)
        if layer is not None and layer < n_layers:
            sizes[layer] += tensor.nbytes
        elif layer is None and class_of(tensor.name) != "embedding":
            output += tensor.nbytes
    known["layers_are"] = "all their tensors"
    return known | {"layers_35_gb": (sum(sizes[-n:]) + output) / GB, "layers_43_gb": sum(sizes) / GB}


def _shape(own: GGUFHeader | None, file: GGUFHeader | None) -> dict[str, Any]:
    published, count = tables.claims_spec()["published"], parameters(own) if own else None
    total, active, routed = (published[f"{name}parameters"] for name in ("", "active_", "routed_"))
    if count:
        total, active, routed = count.total, count.active, count.routed
    keys = {key: own.arch(key) if own else value for key, value in published["keys"].items()}
    used, number = keys["expert_used_count"], keys["expert_count"]
    sizes = types_by_bytes(file.tensors) if file else {}
    shares = [f"{name} {nbytes / sum(sizes.values()):.1%}" for name, nbytes in sizes.items()]
    return {
        **keys,
        "parameters": total,
        "parameters_b": total / 1e9,
        "active_parameters": active,
        "active_b": active / 1e9,
        "active_with_2_b": (active + routed * (2 - used) / number) / 1e9 if used and number else None,
        "mean_bits": bits_per_weight(file.tensors) if file else 8 * registered()[SINGLE].size_bytes / total,
        "main_type": next(iter(sizes), None),
        "type_shares": ", ".join(shares[:4]),
        "family": "i-quant" if QUANTIZATION.startswith("IQ") else "k-quant",
    }


def _identity(own: Run) -> dict[str, Any]:
    published, size = tables.claims_spec()["published"], registered()[SINGLE].size_bytes
    is_whole = bool(own) and own["merge"]["model"].get("nbytes") == size
    whose = "this run's file has" if is_whole else "an independent download of it is recorded with"
    return {
        "sha256": own["merge"]["model"]["sha256"] if is_whole else published["independent_sha256"],
        "whose_sha256": whose,
        "loads": False if registered()[SHARDS].size_bytes == size else None,
        "shown_tensors": published["independent_tensors"],
        "all_tensors": published["all_tensors"],
    }


def _memory(own: GGUFHeader | None, file: GGUFHeader | None) -> dict[str, Any]:
    shape: Any = own or published_shape()
    weights = weights_bytes(file) if file else FLASH.weights
    spec, known = tables.requirements_spec()["envelope"], dict[str, Any]()
    cards = published()["card_compute"]
    for n_ctx in CONTEXTS:
        sizes = {
            (name, full): kv_cache_bytes(shape, n_ctx, type_k=name, type_v=name, swa_full=full).total / GB
            for name in CACHE_TYPES
            for full in (False, True)
        }
        compute = {name: nbytes / GB for name, nbytes in spec["published_compute"][n_ctx].items()}
        least = weights / GB + sizes["f16", False]
        known |= {
            f"kv_{n_ctx}": list(sizes.values()),
            f"kv_{n_ctx}_gb": sizes["f16", False],
            f"kv_{n_ctx}_full_gb": sizes["f16", True],
            f"compute_{n_ctx}_gb": compute["plain"],
            f"least_{n_ctx}_gb": least,
            f"least_{n_ctx}_gib": least * GB / GIB,
            f"need_{n_ctx}_gb": least + compute["plain"],
            f"flash_{n_ctx}_gb": least + compute["flash"],
            f"on_card_{n_ctx}_gb": (cards["weights"] + (card_compute(published_shape(), n_ctx) or 0)) / GB
            + sizes["f16", False],
        }
    n_gpu, *logs = (spec["gpu_logs"][name] for name in ("context", "least", "most"))
    experts = FLASH.routed_total, iq1_s_experts_bytes()
    on_gpu = [(weights - held + log) / GB for held, log in zip(experts, logs, strict=True)]
    planned = card_compute(published_shape(), n_gpu, "experts_in_memory") or 0
    last = CONTEXTS[-1]
    return known | {
        "needs_gb": [*(known[f"need_{n_ctx}_gb"] for n_ctx in CONTEXTS), known[f"flash_{last}_gb"]],
        "gpu_context": n_gpu,
        "gpu_least_gb": logs[0] / GB,
        "gpu_most_gb": logs[1] / GB,
        "gpu_kv_gb": known[f"kv_{n_gpu}_gb"],
        "card_8192_gb": cards["all"]["8192"] / GB,
        "card_plain_gb": cards["all_without_flash"]["8192"] / GB,
        "card_experts_gb": planned / GB,
        "card_decode": cards["decode_tokens_per_sec"],
        "processor_decode": cards["processor_decode_tokens_per_sec"],
        "offloaded_gb": [total + known[f"kv_{n_gpu}_gb"] for total in on_gpu],
        "planned_gb": [(weights - held + planned) / GB + known[f"kv_{n_gpu}_gb"] for held in experts],
    }


def _measurements(own: Run, run: Run) -> dict[str, Any]:
    """What only a run of the artifact shows, and what notebook 04 says of this run's own model."""
    scored, context = own.get("scores", {}), own.get("long_context", {})
    code = [score for score in scored.get("scores", []) if score["set"] == "standard-code"]
    shares: list[Any] = [code[0][name] for name in ("value", "low", "high")] if code else [None]
    known: dict[str, Any] = {
        "cpu_tokens_per_sec": scored.get("cpu_tokens_per_sec"),
        "humaneval": None if None in shares or code[0]["n_missing"] else [100 * it for it in shares],
        "humaneval_n": code[0]["n"] if code else None,
        "boundary": context.get("boundary"),
        "longest": max((row["length"] for row in context.get("curve", [])), default=None),
        "largest_fall": context.get("largest_fall") or None,
    }
    for claim in run.get("routing", {}).get("claims", []):
        key = "_".join(claim["claim"].split()[:2])
        known |= {key: claim["status"] if own else None, f"{key}_evidence": claim["evidence"]}
    return known
