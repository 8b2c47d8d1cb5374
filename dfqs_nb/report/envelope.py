"""The hardware envelope of a model: what its header asks for, beside this machine and beside DFQS 1.0.

A graphics card's compute buffer is not the CPU's. It is known for the published shape, which an H100 planned:
a verdict that counts it says so. What others logged with other builds stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dfqs_nb.core.errors import ModelError
from dfqs_nb.gguf import memory
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import card_compute, kv_cache_bytes
from dfqs_nb.report.spec import GB, filled, spec_table

if TYPE_CHECKING:
    from dfqs_nb.llama.settings import OpenSettings

FITS, DOES_NOT_FIT, NOT_KNOWN, AS_PLANNED = "fits", "does not fit", "not known", " as an H100 planned"
CONTEXTS = (8192, 16384, 32768, 131072, 1048576)
SINGLE = "deepseek-v4-flash-iq1_s-xl-single"  # in data/models.toml
SURE = {"upper bound": "at most", "rough": "roughly"}  # how sure a cache's size is
NOTHING: Mapping[int, Any] = {}
Compute = Mapping[int, Mapping[str, int]]  # compute buffer by context: bytes ``plain``, and with ``flash``


def planned_compute(path: str | Path, contexts: Iterable[int], settings: OpenSettings) -> Compute:
    """Compute buffer on the CPU by context, as llama.cpp itself plans it. Nothing is allocated.

    Contexts that llama.cpp refuses are left out.
    """
    from dfqs_nb.llama.build import dry_run

    planned = {}
    for n_ctx in contexts:
        with suppress(ModelError):
            planned[n_ctx] = {
                name: dry_run(path, replace(settings, n_ctx=n_ctx, flash_attn=flash))["compute_bytes"]
                for name, flash in (("plain", False), ("flash", True))
            }
    return planned


def within(header: GGUFHeader) -> list[int]:
    """`CONTEXTS` up to the model's own, that among them; all where the header declares none."""
    own = header.arch("context_length")
    return sorted({n for n in CONTEXTS if not own or n < own} | ({int(own)} if own else set()))


def hardware_envelope(
    header: GGUFHeader,
    memory_bytes: int,
    compute: Compute = NOTHING,
    *,
    flash_attn: bool = False,
    is_artifact: bool = False,
) -> dict[str, Any]:
    """The envelope of the model that a header describes, against this machine's memory, as JSON takes it.

    ``compute`` has compute buffers by context (`planned_compute`); nothing is said to fit without. With
    ``flash_attn`` the smaller one counts. ``is_artifact``: hold it against the table of DFQS 1.0, too.
    """
    facts: dict[str, Any] = {
        "model": header.path.stem,
        "source": "the header of the file",
        "assumptions": [],
        "weights_bytes": memory.weights_bytes(header),
        "routed_bytes": memory.active_bytes(header).routed_total,
        "file_bytes": header.end_offset - header.start,
    }
    if note := (cache := kv_cache_bytes(header, CONTEXTS[0])).note:
        sure = SURE[cache.exactness]
        facts["assumptions"] = [f"The KV cache takes {sure} what the table shows: {note}."]
    rows = [_cache_row(header, n_ctx, compute) for n_ctx in within(header)]
    return _envelope(facts, rows, memory_bytes, flash_attn, is_artifact)


def published_envelope(memory_bytes: int) -> dict[str, Any]:
    """The envelope of DeepSeek-V4-Flash-IQ1_S-XL from what was published of it, without its file.

    As `hardware_envelope`. Its split into experts and the rest is a range, from the assumptions that it
    states. Compute buffers: llama.cpp's plan for these shapes on a CPU and on an H100, and what GPUs logged.
    """
    shape, spec = memory.published_shape(), spec_table("requirements")["envelope"]
    figures = spec_table("claims")["published"]["figures"]
    facts = {
        "model": f"{shape.path}-IQ1_S-XL",
        "source": "the published configuration and file size",
        "assumptions": [filled(form, figures) for form in spec["assumptions"]],
        "weights_bytes": figures["file_bytes"],
        "routed_bytes": figures["fewest_bytes"],
        "file_bytes": figures["file_bytes"],
    }
    known = spec["published_compute"], spec["gpu_compute"]
    rows = [_cache_row(shape, n_ctx, *known) for n_ctx in CONTEXTS]
    return _envelope(facts, rows, memory_bytes, flash_attn=False, is_artifact=True)


def _cache_row(shape: GGUFHeader, n_ctx: int, compute: Compute, gpu: Any = NOTHING) -> dict[str, Any]:
    window, planned = kv_cache_bytes(shape, n_ctx), compute.get(n_ctx, {})
    return {
        "n_ctx": n_ctx,
        "kv_bytes": window.total,
        "kv_swa_full_bytes": kv_cache_bytes(shape, n_ctx, swa_full=True).total,
        "exactness": window.exactness,
        "compute_bytes": planned.get("plain"),
        "compute_flash_bytes": planned.get("flash"),
        "compute_card_bytes": card_compute(shape, n_ctx),
        "compute_card_experts_bytes": card_compute(shape, n_ctx, "experts_in_memory"),
        "compute_gpu_bytes": gpu.get(n_ctx),
    }


def _envelope(
    facts: dict[str, Any], cache: list[dict[str, Any]], memory_bytes: int, flash_attn: bool, is_artifact: bool
) -> dict[str, Any]:
    """What fits where, beside the facts: a row for each context and limit."""
    spec, limits = spec_table("requirements")["envelope"], [("RAM", "this machine", memory_bytes)]
    for resource in ("RAM", "VRAM") if is_artifact else ():
        sizes = spec[resource.lower()]
        limits += [(resource, f"DFQS 1.0 {level}", sizes[level] * GB) for level in ("minimum", "recommended")]
    fits = [_fit(facts, row, flash_attn, *limit) for row in cache for limit in limits]
    return {**facts, "cache": cache, "fits": fits}


def _fit(
    facts: Mapping[str, Any], row: Mapping[str, Any], flash_attn: bool, resource: str, name: str, limit: float
) -> dict[str, Any]:
    """One context against one limit: everything in that memory, and the least that must lie there."""
    cpu, kv, exactness = resource == "RAM", row["kv_bytes"], row["exactness"]
    compute = row["compute_flash_bytes" if flash_attn else "compute_bytes"] if cpu else None
    cards = (None, None) if cpu else (row["compute_card_bytes"], row["compute_card_experts_bytes"])
    unsure = 0 if exactness == "exact" else kv  # a cache that may be smaller
    is_bounded = compute is not None and exactness != "rough"
    beside = kv + (compute or 0)
    need = facts["weights_bytes"] + beside
    least = beside if cpu else need - facts["routed_bytes"]
    planned = f", compute buffer as planned for the CPU {'with' if flash_attn else 'without'} flash attention"
    buffer = planned * is_bounded if cpu else ", compute buffer as planned on an H100" * (None not in cards)

    def judged(n_bytes: int, card: int | None) -> str:
        if n_bytes - unsure > limit:
            return DOES_NOT_FIT
        if card is not None:
            return (FITS if n_bytes + card <= limit else DOES_NOT_FIT) + AS_PLANNED
        return FITS if is_bounded and n_bytes <= limit else NOT_KNOWN

    return {
        "resource": resource,
        "limit": name,
        "limit_bytes": limit,
        "n_ctx": row["n_ctx"],
        "need_bytes": need,
        "counted": f"weights, KV cache{f' ({SURE[exactness]})' if unsure else ''}{buffer}",
        "verdict": judged(need, cards[0]),
        "least_bytes": least,
        "least_verdict": judged(least, cards[1]),
        "least": "weights paged from the disk" if cpu else "routed experts left in RAM",
    }


def envelope_tables(envelope: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """``cache`` by context, in GB or (of a small model) MB; ``fits``: a row a limit, a column a context.

    A limit has one row for everything in that memory, and one for the least.
    """
    unit, scale = ("GB", GB) if envelope["file_bytes"] >= GB else ("MB", 10**6)
    cache, names = pd.DataFrame(envelope["cache"]), dict(spec_table("requirements")["envelope"]["buffers"])
    if sure := SURE.get(envelope["cache"][0].get("exactness")):
        names["kv_bytes"] += f", {sure}"
    if (cache["kv_swa_full_bytes"] == cache["kv_bytes"]).all() and not sure:
        del names["kv_swa_full_bytes"]  # no layer has a sliding window
    sizes = {
        f"{new} ({unit})": cache[old].astype(float) / scale for old, new in names.items() if old in cache
    }
    fits = pd.DataFrame(envelope["fits"]).assign(what="everything")
    limits = (fits["limit_bytes"].astype(float) / GB).map(" ({:.4g} GB)".format, na_action="ignore")
    fits["limit"] += limits.fillna("")
    least = fits.assign(what=fits["least"], verdict=fits["least_verdict"])
    rows = pd.concat([fits, least]).sort_values("resource", kind="stable")
    index: Any = ["resource", "what", "limit"]
    wide = rows.pivot_table(index=index, columns="n_ctx", values="verdict", aggfunc="first", sort=False)
    return {
        "cache": pd.DataFrame(sizes).set_index(cache["n_ctx"]).dropna(axis="columns", how="all"),
        "fits": wide.rename(columns="{:,} tokens".format).rename_axis(columns=None),
    }
