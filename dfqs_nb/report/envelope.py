"""The hardware envelope of a model: what its header asks for, beside this machine and beside DFQS 1.0.

Weights by class, KV cache and compute buffer by context, disk by way of merging. Of a graphics card only what
must lie there at least is known: its compute buffer is not the CPU's.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.machine import available_memory
from dfqs_nb.core.paths import outputs_dir
from dfqs_nb.gguf.facts import class_sizes
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import kv_cache_bytes, weights_bytes
from dfqs_nb.gguf.models import registered
from dfqs_nb.gguf.published import published_shape
from dfqs_nb.gguf.reading import FLASH, active_bytes
from dfqs_nb.merge import methods_table
from dfqs_nb.report.spec import GB, Compute, claims_spec, requirements_spec

if TYPE_CHECKING:
    import pandas as pd

    from dfqs_nb.llama.settings import OpenSettings

FITS, DOES_NOT_FIT, NOT_KNOWN = "fits", "does not fit", "not known"
CONTEXTS = (8192, 32768, 131072, 1048576)
SINGLE = "deepseek-v4-flash-iq1_s-xl-single"  # in data/models.toml
IQ1_S_BITS, Q8_0_BITS = 1.5625, 8.5  # a weight, scales included: 50 bytes for 256, 34 for 32
MERGE_MODES = {  # row of `methods_table` by the name shown here
    "merge into a new file": "merge, repair",
    "merge --consume": "merge --consume, repair --in-place",
    "repair --in-place": "merge --consume, repair --in-place",
}
LEVELS = ("minimum", "recommended")


@dataclass(frozen=True)
class Machine:
    """What a machine has, in bytes; ``vram_bytes`` is None where nobody stated it.

    Attributes:
        memory_bytes, available_bytes: memory in all, and what can be had now.
        disk_free_bytes: of the disk that holds the run's folder.
        source: where the limit of memory was read.
    """

    memory_bytes: int
    available_bytes: int
    disk_free_bytes: int
    vram_bytes: int | None = None
    source: str = "given"


def this_machine(folder: str | Path | None = None) -> Machine:
    """This machine's memory, and the free disk under ``folder`` (the outputs' when not given)."""
    folder = Path(folder or outputs_dir())
    while not folder.exists():
        folder = folder.parent
    memory = available_memory()
    free = shutil.disk_usage(folder).free
    return Machine(memory.total_bytes, memory.available_bytes, free, source=memory.source)


def planned_compute(path: str | Path, contexts: Iterable[int], settings: OpenSettings) -> dict[int, Compute]:
    """Compute buffer on the CPU by context, as llama.cpp itself plans it. Nothing is allocated.

    Contexts that llama.cpp refuses are left out.
    """
    from dfqs_nb.llama.check import dry_run

    planned = {}
    for n_ctx in contexts:
        try:
            planned[n_ctx] = Compute(
                **{
                    name: dry_run(path, replace(settings, n_ctx=n_ctx, flash_attn=flash))["compute_bytes"]
                    for name, flash in (("plain", False), ("flash", True))
                }
            )
        except ModelError:
            continue
    return planned


@dataclass(frozen=True)
class _Subject:
    """A model whose envelope is drawn up, from its header or from what was published of it."""

    name: str
    source: str
    shape: Any  # a header, or what has `architecture` and `arch` as one
    weights: list[dict[str, Any]]
    weights_bytes: int
    routed_bytes: int  # at least
    file_bytes: int
    header_bytes: int | None
    token_bytes: tuple[int, int]
    contexts: list[int]
    own_context: int | None
    compute: Mapping[int, Compute]
    gpu_compute: Mapping[int, int] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    is_artifact: bool = False  # only then the specification's table of hardware is about it
    here: bool = True  # its files lie on this disk, so that only the extra counts


def hardware_envelope(
    header: GGUFHeader | Sequence[GGUFHeader],
    machine: Machine | None = None,
    *,
    contexts: Sequence[int] = CONTEXTS,
    compute: Mapping[int, Compute] | None = None,
    flash_attn: bool = False,
    is_artifact: bool = False,
) -> dict[str, Any]:
    """The envelope of the model that this header (or these shards' headers, first one first) describes.

    Args:
        machine: what to hold it against; this machine when not given.
        contexts: lengths in tokens; the model's own is added.
        compute: compute buffer by context, as `planned_compute` gives it; nothing is said to fit without it.
        flash_attn: which of the two compute buffers counts.
        is_artifact: hold it against the hardware table of DFQS 1.0, which is about one file.

    Returns:
        Values that JSON takes: ``model``, ``source``, ``assumptions``, ``settings``, ``machine``, ``weights``
        (rows by class), ``token_bytes`` (least and most that a token reads), ``cache`` (rows by context),
        ``fits`` (rows by limit and context), ``storage`` (rows by mode).

    Raises:
        HeaderError: a key that the KV formula needs is missing.
    """
    headers = [header] if isinstance(header, GGUFHeader) else list(header)
    total: dict[str, dict[str, Any]] = {}
    for row in (row for one in headers for row in class_sizes(one)):
        kept = total.setdefault(row["class"], {"class": row["class"], "bytes": 0, "types": {}})
        kept["bytes"] += row["bytes"]
        kept["types"] |= dict.fromkeys(row["types"].split(", "))
    rows = [{**row, "types": ", ".join(row["types"])} for row in total.values()]
    own, active = headers[0].arch("context_length"), active_bytes(headers)
    subject = _Subject(
        headers[0].get("general.name") or headers[0].path.stem,
        "the header of the file",
        headers[0],
        sorted(rows, key=lambda row: -int(row["bytes"])),
        weights_bytes(headers),
        active.routed_total,
        sum(one.end_offset - one.start for one in headers),
        sum(one.data_offset - one.start for one in headers),
        (active.total, active.total),
        sorted({*contexts, *([int(own)] if own else [])}),
        own,
        compute or {},
        is_artifact=is_artifact,
    )
    return _envelope(subject, machine or this_machine(), flash_attn)


def published_envelope(machine: Machine | None = None, *, flash_attn: bool = False) -> dict[str, Any]:
    """The envelope of DeepSeek-V4-Flash-IQ1_S-XL from what was published of it, without its file.

    As `hardware_envelope`. Its split into experts and the rest is a range, from two assumptions that it
    states. Compute buffer: llama.cpp's plan for a file of these shapes on a CPU.
    """
    shape, spec, facts = published_shape(), requirements_spec().envelope, claims_spec().published
    nbytes = registered()[SINGLE].size_bytes
    least_routed = round(facts.routed_parameters * IQ1_S_BITS / 8)
    most_routed, others = FLASH.routed_total, facts.parameters - facts.routed_parameters
    rest, most_rest = nbytes - most_routed, nbytes - least_routed
    bits = [8 * size / others for size in (rest, most_rest)]
    embedding = FLASH.weights - FLASH.dense - FLASH.routed_total
    at_q8_0 = round((others * Q8_0_BITS / 8) - embedding)
    share = FLASH.routed / FLASH.routed_total
    weights = [
        {
            "class": "routed experts",
            "bytes": most_routed,
            "least_bytes": least_routed,
            "types": "IQ1_S, Q2_K",
        },
        {
            "class": "everything else",
            "bytes": rest,
            "most_bytes": most_rest,
            "types": f"{bits[0]:.1f} to {bits[1]:.1f} bits a weight",
        },
    ]
    assumptions = (
        f"Experts take {least_routed / GB:.2f} GB if all are IQ1_S, and {most_routed / GB:.2f} GB if "
        "ffn_down of the first layers is Q2_K.",
        f"The file's size leaves {rest / GB:.2f} to {most_rest / GB:.2f} GB for the other "
        f"{others / 1e9:.2f} billion weights: {bits[0]:.1f} to {bits[1]:.1f} bits each, so they are not all "
        f"at Q8_0 ({Q8_0_BITS} bits) or higher.",
        f"A token reads {FLASH.total / GB:.1f} GB by the file's size, and up to "
        f"{(at_q8_0 + share * most_routed) / GB:.1f} GB if everything but the experts is at Q8_0; tensors at "
        "F32 add to that.",
    )
    subject = _Subject(
        f"{shape.name}-IQ1_S-XL",
        "the published configuration and file size",
        shape,
        weights,
        nbytes,
        least_routed,
        nbytes,
        None,
        (FLASH.total, round(at_q8_0 + share * most_routed)),
        list(CONTEXTS),
        max(CONTEXTS),
        spec.published_compute,
        spec.gpu_compute,
        assumptions,
        is_artifact=True,
        here=False,
    )
    return _envelope(subject, machine or this_machine(), flash_attn)


def _envelope(subject: _Subject, machine: Machine, flash_attn: bool) -> dict[str, Any]:
    cache = [_cache_row(subject, n_ctx) for n_ctx in subject.contexts]
    chosen = "compute_flash_bytes" if flash_attn else "compute_bytes"
    settings = {
        "flash_attn": flash_attn,
        "n_ubatch": 512,
        "type_k": "f16",
        "type_v": "f16",
        "swa_full": False,
    }
    return {
        "model": subject.name,
        "source": subject.source,
        "assumptions": list(subject.assumptions),
        "settings": settings,
        "machine": asdict(machine),
        "weights_bytes": subject.weights_bytes,
        "routed_bytes": subject.routed_bytes,
        "file_bytes": subject.file_bytes,
        "header_bytes": subject.header_bytes,
        "token_bytes": list(subject.token_bytes),
        "weights": subject.weights,
        "cache": cache,
        "fits": [fit for row in cache for fit in _fits(row, subject, row[chosen], machine)],
        "storage": _storage(subject, machine),
    }


def _cache_row(subject: _Subject, n_ctx: int) -> dict[str, Any]:
    window = kv_cache_bytes(subject.shape, n_ctx)
    planned = subject.compute.get(n_ctx)
    return {
        "n_ctx": n_ctx,
        "kv_bytes": window.total,
        "kv_swa_full_bytes": kv_cache_bytes(subject.shape, n_ctx, swa_full=True).total,
        "exactness": window.exactness,
        "compute_bytes": planned.plain if planned else None,
        "compute_flash_bytes": planned.flash if planned else None,
        "compute_gpu_bytes": subject.gpu_compute.get(n_ctx),
        "within_model": None if not subject.own_context else n_ctx <= subject.own_context,
    }


def verdict(least_bytes: float, most_bytes: float | None, limit_bytes: float | None) -> str:
    """Whether a need, known to lie between two bounds, fits a limit; ``most_bytes`` is None without a bound.

    >>> verdict(61.9 * GB, 61.9 * GB, 80 * GB), verdict(61.9 * GB, 61.9 * GB, 60 * GB), verdict(1, 1, None)
    ('fits', 'does not fit', 'not known')
    >>> verdict(61.9 * GB, None, 80 * GB), verdict(61.9 * GB, None, 60 * GB)
    ('not known', 'does not fit')
    """
    if limit_bytes is None:
        return NOT_KNOWN
    if least_bytes > limit_bytes:
        return DOES_NOT_FIT
    return FITS if most_bytes is not None and most_bytes <= limit_bytes else NOT_KNOWN


def _fits(
    row: Mapping[str, Any], subject: _Subject, compute: int | None, machine: Machine
) -> list[dict[str, Any]]:
    """One context against every limit: everything in that memory, and the least that must lie there."""
    spec, kv = requirements_spec().envelope, row["kv_bytes"]
    unsure = 0 if row["exactness"] == "exact" else kv  # a cache that may be smaller
    on_cpu = compute is not None and row["exactness"] != "rough"
    limits: list[tuple[str, str, float | None]] = [
        ("RAM", "this machine", machine.memory_bytes),
        ("RAM", "this machine, free now", machine.available_bytes),
        ("VRAM", "this machine", machine.vram_bytes),
    ]
    if subject.is_artifact:
        for resource, row_of in (("RAM", spec.ram), ("VRAM", spec.vram)):
            limits += [
                (resource, f"DFQS 1.0 {level}", getattr(row_of, f"{level}_gb") * GB) for level in LEVELS
            ]
    fits = []
    for resource, name, limit in limits:
        cpu = resource == "RAM"
        beside = kv + (compute or 0) * cpu
        need = subject.weights_bytes + beside
        least = beside if cpu else need - subject.routed_bytes
        bounded = on_cpu and cpu
        planned = ", compute buffer as planned for the CPU" if bounded else ""
        fits.append(
            {
                "resource": resource,
                "limit": name,
                "limit_bytes": limit,
                "n_ctx": row["n_ctx"],
                "need_bytes": need,
                "counted": "weights, KV cache"
                + (planned if cpu else "; a GPU's compute buffer is not known"),
                "verdict": verdict(need - unsure, need if bounded else None, limit),
                "least_bytes": least,
                "least_verdict": verdict(least - unsure, least if bounded else None, limit),
                "least": "weights paged from the disk" if cpu else "routed experts left in RAM",
            }
        )
    return fits


def _storage(subject: _Subject, machine: Machine) -> list[dict[str, Any]]:
    """Disk by way of getting one file."""
    model, spec = subject.file_bytes, requirements_spec().envelope.storage
    extra = methods_table(model, subject.header_bytes or 0, {})["extra disk (bytes)"]
    rows = []
    for mode, method in MERGE_MODES.items():
        more = int(extra[method])
        here = more if subject.here else model + more
        row = {
            "mode": mode,
            "extra_bytes": more,
            "total_bytes": model + more,
            "this machine": verdict(here, here, machine.disk_free_bytes),
        }
        if subject.is_artifact:
            for level in LEVELS:
                row[f"DFQS 1.0 {level}"] = verdict(
                    model + more, model + more, getattr(spec, f"{level}_gb") * GB
                )
        rows.append(row)
    return rows


def envelope_tables(envelope: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The envelope as frames to show; sizes in GB (10^9 bytes), of a small model in MB (10^6 bytes).

    ``weights`` by class; ``cache`` by context; ``fits`` one row a limit, one column a context; ``storage`` by
    mode.
    """
    import pandas as pd

    unit, scale = ("GB", GB) if envelope["file_bytes"] >= GB else ("MB", 10**6)
    weights = pd.DataFrame(envelope["weights"])
    weights = weights.assign(**{unit: weights["bytes"] / scale}).set_index("class")[[unit, "types"]]
    cache, names = (
        pd.DataFrame(envelope["cache"]).set_index("n_ctx"),
        {
            "kv_bytes": "KV cache",
            "kv_swa_full_bytes": "KV cache, swa_full",
            "compute_bytes": "compute buffer planned for the CPU",
            "compute_flash_bytes": "the same, flash attention",
            "compute_gpu_bytes": "logged on a GPU",
        },
    )
    sizes = pd.DataFrame({f"{new} ({unit})": cache[old].astype(float) / scale for old, new in names.items()})
    within = cache["within_model"].map({True: "yes", False: "no"}).fillna("not stated")
    storage = pd.DataFrame(envelope["storage"]).set_index("mode")
    for column, name in (("extra_bytes", "extra"), ("total_bytes", "in all")):
        storage.insert(0, f"{name} ({unit})", storage.pop(column) / scale)
    return {
        "weights": weights,
        "cache": sizes.dropna(axis="columns", how="all").assign(**{"within the model's context": within}),
        "fits": _fits_frame(pd.DataFrame(envelope["fits"])),
        "storage": storage,
    }


def _fits_frame(fits: pd.DataFrame) -> pd.DataFrame:
    """Verdicts with contexts as columns; a row for everything in that memory, and one for the least."""
    import pandas as pd

    everything = fits.assign(what="everything")[["resource", "limit", "what", "n_ctx", "verdict"]]
    least = fits.assign(what=fits["least"], verdict=fits["least_verdict"])[everything.columns]
    both = pd.concat([everything, least])
    table = both.pivot(index=["resource", "what", "limit"], columns="n_ctx", values="verdict")
    rows = dict.fromkeys(zip(both["resource"], both["what"], both["limit"], strict=True))  # as they were made
    table = table.loc[sorted(rows, key=lambda row: row[0])]
    return table.rename(columns="{:,} tokens".format).rename_axis(columns=None)
