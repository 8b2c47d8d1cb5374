"""The hardware envelope of a model: what its header asks for, beside this machine and beside DFQS 1.0.

Of a graphics card only a lower bound is planned here: its compute buffer is not the CPU's. Where somebody
logged that buffer, a verdict says "as logged".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dfqs_nb.core.errors import ModelError
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import kv_cache_bytes, weights_bytes
from dfqs_nb.gguf.models import registered
from dfqs_nb.gguf.published import published_shape
from dfqs_nb.gguf.reading import FLASH, active_bytes
from dfqs_nb.report.spec import GB, Compute, claims_spec, filled, requirements_spec

if TYPE_CHECKING:
    from dfqs_nb.llama.settings import OpenSettings

FITS, DOES_NOT_FIT, NOT_KNOWN, AS_LOGGED = "fits", "does not fit", "not known", " as logged"
CONTEXTS = (8192, 16384, 32768, 131072, 1048576)
SINGLE = "deepseek-v4-flash-iq1_s-xl-single"  # in data/models.toml
IQ1_S_BITS, Q8_0_BITS = 1.5625, 8.5  # a weight, scales included: 50 bytes for 256, 34 for 32
Limit = tuple[str, str, float]  # resource, whose limit, bytes


def planned_compute(path: str | Path, contexts: Iterable[int], settings: OpenSettings) -> dict[int, Compute]:
    """Compute buffer on the CPU by context, as llama.cpp itself plans it. Nothing is allocated.

    Contexts that llama.cpp refuses are left out.
    """
    from dfqs_nb.llama.check import dry_run

    planned = {}
    for n_ctx in contexts:
        with suppress(ModelError):
            plain, flash = (
                dry_run(path, replace(settings, n_ctx=n_ctx, flash_attn=flash))["compute_bytes"]
                for flash in (False, True)
            )
            planned[n_ctx] = Compute(plain=plain, flash=flash)
    return planned


def hardware_envelope(
    header: GGUFHeader,
    memory_bytes: int,
    compute: Mapping[int, Compute] = {},
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
        "weights_bytes": weights_bytes(header),
        "routed_bytes": active_bytes(header).routed_total,
        "file_bytes": header.end_offset - header.start,
    }
    cache = [_cache_row(header, n_ctx, compute) for n_ctx in within(header)]
    return _envelope(facts, cache, memory_bytes, flash_attn, is_artifact)


def within(header: GGUFHeader) -> list[int]:
    """`CONTEXTS` up to the model's own, that among them; all where the header declares none."""
    own = header.arch("context_length")
    return sorted({n for n in CONTEXTS if not own or n < own} | ({int(own)} if own else set()))


def published_envelope(memory_bytes: int) -> dict[str, Any]:
    """The envelope of DeepSeek-V4-Flash-IQ1_S-XL from what was published of it, without its file.

    As `hardware_envelope`. Its split into experts and the rest is a range, from the assumptions that it
    states. Compute buffer: llama.cpp's plan for a file of these shapes on a CPU, and what a GPU logged.
    """
    shape, spec, published = published_shape(), requirements_spec().envelope, claims_spec().published
    nbytes, experts = registered()[SINGLE].size_bytes, FLASH.routed_total
    fewest = round(published.routed_parameters * IQ1_S_BITS / 8)
    others = published.parameters - published.routed_parameters
    rest, most_rest = nbytes - experts, nbytes - fewest
    embedding = FLASH.weights - FLASH.dense - experts
    most_token = round(others * Q8_0_BITS / 8) - embedding + FLASH.routed
    sizes = {"experts": experts, "fewest": fewest, "rest": rest, "most_rest": most_rest, "others": others}
    sizes |= {"token": FLASH.total, "most_token": most_token}
    known = {name: value / GB for name, value in sizes.items()}
    known |= {"bits": 8 * rest / others, "most_bits": 8 * most_rest / others}
    facts = {
        "model": f"{shape.path}-IQ1_S-XL",
        "source": "the published configuration and file size",
        "assumptions": [filled(form, known) for form in spec.assumptions],
        "weights_bytes": nbytes,
        "routed_bytes": fewest,
        "file_bytes": nbytes,
    }
    cache = [_cache_row(shape, n_ctx, spec.published_compute, spec.gpu_compute) for n_ctx in CONTEXTS]
    return _envelope(facts, cache, memory_bytes, flash_attn=False, is_artifact=True)


def _cache_row(
    shape: GGUFHeader, n_ctx: int, compute: Mapping[int, Compute], gpu: Mapping[int, int] = {}
) -> dict[str, Any]:
    window, planned = kv_cache_bytes(shape, n_ctx), compute.get(n_ctx)
    return {
        "n_ctx": n_ctx,
        "kv_bytes": window.total,
        "kv_swa_full_bytes": kv_cache_bytes(shape, n_ctx, swa_full=True).total,
        "exactness": window.exactness,
        "compute_bytes": planned.plain if planned else None,
        "compute_flash_bytes": planned.flash if planned else None,
        "compute_gpu_bytes": gpu.get(n_ctx),
    }


def _envelope(
    facts: Mapping[str, Any],
    cache: list[dict[str, Any]],
    memory_bytes: int,
    flash_attn: bool,
    is_artifact: bool,
) -> dict[str, Any]:
    """What fits where, beside the facts."""
    spec, levels = requirements_spec().envelope, ("minimum", "recommended") if is_artifact else ()
    limits: list[Limit] = [
        ("RAM", "this machine", memory_bytes),
        *(("RAM", f"DFQS 1.0 {level}", spec.ram[level] * GB) for level in levels),
        *(("VRAM", f"DFQS 1.0 {level}", spec.vram[level] * GB) for level in levels),
    ]
    chosen = "compute_flash_bytes" if flash_attn else "compute_bytes"
    flash = "with" if flash_attn else "without"
    fits = [_fit(facts, row, row[chosen], limit, flash) for row in cache for limit in limits]
    return {**facts, "cache": cache, "fits": fits}


def verdict(
    least_bytes: float, most_bytes: float | None, limit_bytes: float, logged_bytes: float | None = None
) -> str:
    """Whether a need, known to lie between two bounds, fits a limit; ``most_bytes`` is None without a bound.

    ``logged_bytes``: the need as somebody logged it; it decides where the bounds do not, and is named.

    >>> verdict(61.9 * GB, 61.9 * GB, 80 * GB), verdict(61.9 * GB, None, 80 * GB)
    ('fits', 'not known')
    >>> verdict(61.9 * GB, None, 60 * GB), verdict(7 * GB, None, 24 * GB, 25 * GB)
    ('does not fit', 'does not fit as logged')
    """
    if least_bytes > limit_bytes:
        return DOES_NOT_FIT
    if most_bytes is None and logged_bytes is not None:
        return (FITS if logged_bytes <= limit_bytes else DOES_NOT_FIT) + AS_LOGGED
    return FITS if most_bytes is not None and most_bytes <= limit_bytes else NOT_KNOWN


def _fit(
    facts: Mapping[str, Any], row: Mapping[str, Any], compute: int | None, at: Limit, flash: str
) -> dict[str, Any]:
    """One context against one limit: everything in that memory, and the least that must lie there."""
    resource, name, limit = at
    cpu, kv = resource == "RAM", row["kv_bytes"]
    gpu = None if cpu else row["compute_gpu_bytes"]
    unsure = 0 if row["exactness"] == "exact" else kv  # a cache that may be smaller
    bounded = cpu and compute is not None and row["exactness"] != "rough"
    beside = kv + (compute or 0) * cpu
    need = facts["weights_bytes"] + beside
    least = beside if cpu else need - facts["routed_bytes"]
    buffer = (
        f", compute buffer as planned for the CPU {flash} flash attention" * bounded
        if cpu
        else ", compute buffer where one was logged"
    )

    def judged(n_bytes: int) -> str:
        logged = n_bytes + gpu if gpu is not None else None
        return verdict(n_bytes - unsure, n_bytes if bounded else None, limit, logged)

    return {
        "resource": resource,
        "limit": name,
        "limit_bytes": limit,
        "n_ctx": row["n_ctx"],
        "need_bytes": need,
        "counted": f"weights, KV cache{buffer}",
        "verdict": judged(need),
        "least_bytes": least,
        "least_verdict": judged(least),
        "least": "weights paged from the disk" if cpu else "routed experts left in RAM",
    }


def envelope_tables(envelope: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """``cache`` by context, in GB or (of a small model) MB; ``fits``: a row a limit, a column a context."""
    unit, scale = ("GB", GB) if envelope["file_bytes"] >= GB else ("MB", 10**6)
    cache, names = pd.DataFrame(envelope["cache"]), requirements_spec().envelope.buffers
    sizes = {f"{new} ({unit})": cache[old].astype(float) / scale for old, new in names.items()}
    return {
        "cache": pd.DataFrame(sizes).set_index(cache["n_ctx"]).dropna(axis="columns", how="all"),
        "fits": _fits_frame(pd.DataFrame(envelope["fits"])),
    }


def _fits_frame(fits: pd.DataFrame) -> pd.DataFrame:
    """Verdicts with contexts as columns; a row for everything in that memory, and one for the least."""
    columns = ["resource", "what", "limit", "n_ctx", "verdict"]
    sizes = fits["limit_bytes"].astype(float) / GB
    fits = fits.assign(limit=fits["limit"] + sizes.map(" ({:.4g} GB)".format, na_action="ignore").fillna(""))
    least = fits.assign(what=fits["least"], verdict=fits["least_verdict"])
    both = pd.concat([fits.assign(what="everything")[columns], least[columns]])
    table = both.pivot_table(index=columns[:3], columns="n_ctx", values="verdict", aggfunc="first")
    rows = both.drop_duplicates(columns[:3]).sort_values("resource", kind="stable")  # else as they were made
    table = table.loc[list(map(tuple, rows[columns[:3]].to_numpy()))]
    return table.rename(columns="{:,} tokens".format).rename_axis(columns=None)
