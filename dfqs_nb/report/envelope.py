"""The hardware envelope: the memory that a model asks for by context, beside this machine and DFQS 1.0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dfqs_nb.core.display import size
from dfqs_nb.core.errors import ModelError
from dfqs_nb.gguf.facts import parameters
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import KvCacheBytes, kv_cache_bytes
from dfqs_nb.report.spec import GB, spec_table

if TYPE_CHECKING:
    from dfqs_nb.llama.settings import OpenSettings

FITS, PAGED, DOES_NOT_FIT, NOT_KNOWN = "fits", "fits, paged", "does not fit", "not known"
CONTEXTS = (8192, 16384, 32768, 131072, 1048576)
SINGLE = "deepseek-v4-flash-iq1_s-xl-single"  # in data/models.toml
COLUMNS = {"kv_bytes": "KV cache", "compute_bytes": "compute buffer", "need_bytes": "with all weights"}


def planned_compute(path: str | Path, contexts: Sequence[int], settings: OpenSettings) -> dict[int, int]:
    """Bytes of the compute buffer by context, as llama.cpp plans it in a child; empty where it refuses."""
    from dfqs_nb.llama.check import plan_memory

    try:
        plans = plan_memory(path, [replace(settings, n_ctx=n_ctx) for n_ctx in contexts])
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


def needs_table(envelope: Mapping[str, Any]) -> pd.DataFrame:
    """A row a context: sizes in GB or (of a small model) MB, then what holds them."""
    rows = pd.DataFrame(envelope["rows"]).set_index("n_ctx")
    unit, scale = ("GB", GB) if rows["need_bytes"].min() >= GB else ("MB", 10**6)
    sizes = (rows[list(COLUMNS)].astype(float) / scale).rename(columns=COLUMNS).add_suffix(f" ({unit})")
    return sizes.dropna(axis="columns", how="all").join(pd.DataFrame(rows["fits"].to_dict()).T)
