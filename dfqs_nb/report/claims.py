"""The statements of the documents about the artifact, each held against a fact or a measurement.

``data/spec/claims.toml`` has them. Where the model of a run is the artifact, DeepSeek-V4-Flash-IQ1_S-XL, its
header and measurements are the facts (`facts`); where it is another one, the public record is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd

from dfqs_nb import scores
from dfqs_nb.gguf.facts import bits_per_weight, layer_of, parameters, types_by_bytes
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import CACHE_TYPES, kv_cache_bytes, weights_bytes
from dfqs_nb.gguf.models import registered
from dfqs_nb.gguf.published import published, published_shape
from dfqs_nb.gguf.reading import FLASH, active_bytes
from dfqs_nb.merge import methods_table
from dfqs_nb.report.envelope import CONTEXTS, IQ1_S_BITS, SINGLE
from dfqs_nb.report.spec import (
    CLAIM_VERDICTS,
    CONFIRMED,
    CONTRADICTED,
    CONTRADICTS_ITSELF,
    GB,
    GIB,
    IN_PART,
    NOT_TESTABLE,
    Claim,
    claims_spec,
    figure,
    filled,
    requirements_spec,
)
from dfqs_nb.report.stages import Run, is_file_of

SHARDS = "deepseek-v4-flash-iq1_s-xl"  # in data/models.toml
QUANTIZATION = "IQ1_S"  # of most bytes of the artifact
SIZE_MARGIN = 0.03  # within this share of its size, a file of its shapes and types is taken for the artifact
OFFLOADED = (35, 43)  # layers that the documents put on GPUs
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
    known, spec = facts(run, header), claims_spec()
    rows = []
    for claim in claims if claims is not None else spec.numbered():
        fact, value = spec.facts[claim.fact], known.get(claim.fact)
        texts, verdict = ("not measured", "{why}"), claim.verdict or NOT_TESTABLE
        if value is not None:
            texts = claim.found or fact.found, claim.evidence or fact.evidence
            verdict = claim.verdict or TESTS[claim.test](claim, value, known)
        if verdict == CONTRADICTED and _holds_in_gib(claim, value, known):
            texts, verdict = (texts[0], texts[1] + spec.as_gib), CONTRADICTS_ITSELF
        known["figure"] = figure(claim.value, claim.unit)
        found, evidence = (filled(text, known) for text in texts)
        stated = (claim.number, claim.id, claim.document, claim.section, claim.text)
        rows.append((*stated, fact.how, found, verdict, evidence, claim.source))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def counts(table: pd.DataFrame) -> str:
    """How many statements got each verdict, in one sentence.

    >>> import pandas as pd
    >>> counts(pd.DataFrame({"verdict": ["confirmed", "contradicted", "confirmed"]}))
    '3 statements: 2 confirmed, 1 contradicted'
    """
    seen = table["verdict"].value_counts()
    parts = ", ".join(f"{seen[word]} {word}" for word in CLAIM_VERDICTS if word in seen)
    return f"{len(table)} statements: {parts}"


def _holds_in_gib(claim: Claim, value: Any, known: Mapping[str, Any]) -> bool:
    """Whether a figure in GB is contradicted as such, and would not be if GiB were meant."""
    if claim.unit != "GB" or claim.verdict:
        return False
    numbers = [number * GB / GIB for number in (value if isinstance(value, list) else [value])]
    fact = numbers if isinstance(value, list) else numbers[0]
    return TESTS[claim.test](claim, fact, known) != CONTRADICTED


def _at_most(claim: Claim, value: Any, known: Mapping[str, Any]) -> str:
    """The fact is at most the limit, or the figure; of several facts, some may be."""
    limit = claim.value if claim.limit is None else claim.limit
    within = [number <= limit for number in (value if isinstance(value, list) else [value])]
    return claim.yes if all(within) else IN_PART if any(within) else claim.no


def _equals(claim: Claim, value: Any, known: Mapping[str, Any]) -> str:
    """The figure is the fact; of a list, one of it."""
    if isinstance(value, str) or isinstance(claim.value, bool):
        return claim.yes if value == claim.value else claim.no
    values = value if isinstance(value, list) else [value]
    return claim.yes if any(claim.agrees(number) for number in values) else claim.no


def _speed(claim: Claim, value: float, known: Mapping[str, Any]) -> str:
    """A range of speeds against the bound of that machine; on a CPU, against what was measured too."""
    if claim.value[0] > value:
        return CONTRADICTED
    measured = known["cpu_tokens_per_sec"] if claim.fact == "bound_cpu" else None
    if measured is None:
        return NOT_TESTABLE
    return CONFIRMED if claim.value[0] <= measured <= claim.value[-1] else CONTRADICTED


def _reaches(claim: Claim, value: Any, known: Mapping[str, Any]) -> str:
    """Retrieval carries to the context named, and that far was measured."""
    if value.right_censored:
        return CONFIRMED if (known["longest"] or 0) >= claim.value else NOT_TESTABLE
    return CONTRADICTED if value.tokens < claim.value else CONFIRMED


def _gradual(claim: Claim, value: Mapping[str, float], known: Mapping[str, Any]) -> str:
    """The largest fall per octave, by its interval, is some and less than sudden."""
    if value["low"] > SUDDEN:
        return CONTRADICTED
    return CONFIRMED if value["low"] > 0 and value["high"] < SUDDEN else NOT_TESTABLE


TESTS: dict[str, Callable[[Claim, Any, Mapping[str, Any]], str]] = {
    "equals": _equals,
    "is": lambda claim, value, known: claim.yes if value == claim.value else claim.no,
    "at most": _at_most,
    "speed": _speed,
    "interval": lambda claim, value, _: CONFIRMED if value[1] <= claim.value <= value[2] else CONTRADICTED,
    "status": lambda claim, value, known: value,  # a notebook has judged it already
    "reaches": _reaches,
    "gradual": _gradual,
}


class Match(NamedTuple):
    """How the model of a run, of that name, is related to the artifact, and what that rests on.

    ``level``: ``artifact`` (this file, merged or not), ``model`` (DeepSeek-V4-Flash in another quantization),
    ``reference`` (the model that the workbook ships) or ``another``.
    """

    level: Literal["artifact", "model", "reference", "another"]
    name: str
    reason: str


def artifact_match(header: GGUFHeader | None, run: Run) -> Match:
    """Whether the model of a run is the artifact: by SHA-256, or by architecture, types and size.

    No quantity that a statement is about decides it, so that a header can contradict a statement.
    """
    name = run.file.name if run.file else header.path.stem if header else "no model"
    digest = run.file.sha256 if run.file else None
    if is_file_of(digest):
        return Match("reference", name, "the model that the workbook ships")
    if header is None:
        return Match("another", name, "no header was given")
    if header.get("split.count", 0) > 1:
        return Match("another", name, "its header lists the tensors of one shard")
    shape = published_shape()

    def own(key: str, like: Any) -> Any:
        """As the published shape writes it: a list as long (a next-token layer may follow in the file)."""
        value = header.arch(key)
        return value[: len(like)] if isinstance(like, list) and isinstance(value, list) else value

    differs = [key for key, value in published()["keys"].items() if own(key, value) != value]
    if header.architecture != shape.architecture or differs:
        why = differs[0] if header.architecture == shape.architecture else f"it is {header.architecture}"
        return Match("another", name, f"not the shape of {shape.path} ({why})")
    if is_file_of(digest, (SHARDS, SINGLE)):
        return Match("artifact", name, "SHA-256 of the file")
    most = next(iter(types_by_bytes(header.tensors)), "no tensors")
    size = registered()[SINGLE].size_bytes
    if most == QUANTIZATION and abs(header.file_size - size) <= SIZE_MARGIN * size:
        return Match("artifact", name, f"shape, types and size ({header.file_size:,} bytes)")
    return Match("model", name, f"shape of {shape.path}; {most}, {header.file_size:,} bytes")


def facts(run: Run, header: GGUFHeader | None) -> dict[str, Any]:
    """Every fact by its name; None for one that nobody knows here. ``why`` says so in a sentence."""
    match = artifact_match(header, run)
    own = header if match.level in ("artifact", "model") else None
    file = header if match.level == "artifact" else None
    another = "the header of the same model in another quantization"
    basis = {"artifact": "the file's own header", "model": another}
    measured = f"this run measured {match.name}, not the artifact" if run.file else "the artifact was not run"
    return {
        "stated": True,
        "basis": basis.get(match.level, "the published configuration"),
        "why": "this run did not measure it" if file else measured,
        **_sizes(file),
        **_shape(own, file),
        **_identity(run, file),
        **_memory(own, file),
        **_measurements(run if file else None, run),
    }


def _sizes(file: GGUFHeader | None) -> dict[str, Any]:
    published, nbytes, shards = claims_spec().published, registered()[SINGLE].size_bytes, registered()[SHARDS]
    weights, active = (weights_bytes(file), active_bytes(file)) if file else (FLASH.weights, FLASH)
    n_layers = int(published_shape().arch("block_count"))
    iq1_s = round(published.routed_parameters * IQ1_S_BITS / 8)  # n_gpu_layers takes the last layers: no Q2_K
    layers = {n: active.routed_total if n == n_layers else round(iq1_s * n / n_layers) for n in OFFLOADED}
    if file:
        of = [(layer_of(tensor.name), tensor.nbytes) for tensor in file.tensors]
        layers = {n: sum(size for at, size in of if at in range(n_layers - n, n_layers)) for n in OFFLOADED}
    extra = methods_table(nbytes, 0, {})["extra disk (bytes)"]
    rest = nbytes - active.routed_total
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
        "rest_gb": rest / GB,
        "most_rest_gb": (nbytes - iq1_s) / GB,
        "token_gb": active.total / GB,
        "native_gb": published.native_bytes / GB,
        "native_bits": 8 * published.native_bytes / published.parameters,
        "ratio": published.native_bytes / nbytes,
        "saved": 100 * (1 - nbytes / published.native_bytes),
        "layers_are": "all their tensors" if file else "their routed experts alone",
        **{f"layers_{n}_gb": total / GB for n, total in layers.items()},
        **bounds,
        "dram_share": 100 * 0.5 / bounds["bound_cpu"],
    }


def _shape(own: GGUFHeader | None, file: GGUFHeader | None) -> dict[str, Any]:
    published, count = claims_spec().published, parameters(own) if own else None
    total, active, routed = published.parameters, published.active_parameters, published.routed_parameters
    if count:
        total, active, routed = count.total, count.active, count.routed
    keys = {key: own.arch(key) if own else value for key, value in published.keys.items()}
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


def _identity(run: Run, file: GGUFHeader | None) -> dict[str, Any]:
    published = claims_spec().published
    own = run.file if file and run.file and run.file.nbytes == registered()[SINGLE].size_bytes else None
    glued = registered()[SHARDS].size_bytes == registered()[SINGLE].size_bytes
    return {
        "sha256": own.sha256 if own else published.independent_sha256,
        "whose_sha256": "this run's file has" if own else "an independent download of it is recorded with",
        "loads": False if glued else None,
        "shown_tensors": published.independent_tensors,
        "all_tensors": published.all_tensors,
    }


def _memory(own: GGUFHeader | None, file: GGUFHeader | None) -> dict[str, Any]:
    shape: Any = own or published_shape()
    weights = weights_bytes(file) if file else FLASH.weights
    spec = requirements_spec().envelope
    known: dict[str, Any] = {}
    for n_ctx in CONTEXTS:
        sizes = {
            (name, full): kv_cache_bytes(shape, n_ctx, type_k=name, type_v=name, swa_full=full).total / GB
            for name in CACHE_TYPES
            for full in (False, True)
        }
        least, compute = weights / GB + sizes["f16", False], spec.published_compute[n_ctx].plain / GB
        known |= {
            f"kv_{n_ctx}": list(sizes.values()),
            f"kv_{n_ctx}_gb": sizes["f16", False],
            f"kv_{n_ctx}_full_gb": sizes["f16", True],
            f"compute_{n_ctx}_gb": compute,
            f"least_{n_ctx}_gb": least,
            f"least_{n_ctx}_gib": least * GB / GIB,
            f"need_{n_ctx}_gb": least + compute,
            f"flash_{n_ctx}_gb": least + spec.published_compute[n_ctx].flash / GB,
        }
    n_gpu, *logs = (spec.gpu_logs[name] for name in ("context", "least", "most"))
    experts = FLASH.routed_total, round(claims_spec().published.routed_parameters * IQ1_S_BITS / 8)
    on_gpu = [(weights - held + log) / GB for held, log in zip(experts, logs, strict=True)]
    last = CONTEXTS[-1]
    return known | {
        "needs_gb": [*(known[f"need_{n_ctx}_gb"] for n_ctx in CONTEXTS), known[f"flash_{last}_gb"]],
        "gpu_context": n_gpu,
        "gpu_least_gb": logs[0] / GB,
        "gpu_most_gb": logs[1] / GB,
        "gpu_kv_gb": known[f"kv_{n_gpu}_gb"],
        "offloaded_gb": [total + known[f"kv_{n_gpu}_gb"] for total in on_gpu],
    }


def _measurements(own: Run | None, run: Run) -> dict[str, Any]:
    """What only a run of the artifact shows, and what notebook 04 says of this run's own model."""
    scored, context = own.scores if own else None, own.long_context if own else None
    human = next((score for score in scored.scores if score.set == "standard-code"), None) if scored else None
    share = (human.value, human.low, human.high) if human and not human.n_missing else (None,)
    known: dict[str, Any] = {
        "cpu_tokens_per_sec": scored.cpu_tokens_per_sec if scored else None,
        "humaneval": None if None in share else tuple(100 * (part or 0.0) for part in share),
        "humaneval_n": human.n if human else None,
        "boundary": context.boundary if context else None,
        "longest": max((row.length for row in context.curve), default=None) if context else None,
        "largest_fall": (context.largest_fall or None) if context else None,
    }
    for claim in run.routing.claims if run.routing else []:
        key = "_".join(claim.claim.split()[:2])
        known |= {key: claim.status if own else None, f"{key}_evidence": claim.evidence}
    return known
