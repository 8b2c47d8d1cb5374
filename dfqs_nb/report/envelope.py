"""The hardware envelope of a model: what its header asks for, beside this machine and beside DFQS 1.0.

Weights by class, KV cache and compute buffer by context, disk by way of merging. The formulas are those of
`memory`, the disk figures those of `repair`; here they are put side by side and held against limits.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.context.cost import published_shape
from dfqs_nb.core.errors import DfqsError, RegistryError
from dfqs_nb.core.machine import available_memory
from dfqs_nb.core.paths import data_dir, outputs_dir, tilde
from dfqs_nb.gguf.facts import class_sizes
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import kv_cache_bytes, weights_bytes
from dfqs_nb.gguf.models import registered
from dfqs_nb.gguf.reading import FLASH, active_bytes
from dfqs_nb.merge import methods_table

if TYPE_CHECKING:
    import pandas as pd

    from dfqs_nb.llama.settings import OpenSettings

FITS, DOES_NOT_FIT, NOT_KNOWN = "fits", "does not fit", "not known"
CONTEXTS = (8192, 32768, 131072, 1048576)
GB = 10**9  # the specification writes GB; so are its figures read here
MERGE_MODES = {  # row of `repair.methods_table` by the name shown here
    "merge into a new file": "merge, repair",
    "merge --consume": "merge --consume, repair --in-place",
    "repair --in-place": "merge --consume, repair --in-place",
}


def read_spec(name: str) -> dict[str, Any]:
    """The table ``data/spec/<name>.toml``: ``requirements`` or ``claims``.

    Raises:
        RegistryError: it is missing, or not TOML.

    >>> read_spec("requirements")["envelope"]["ram"]["minimum_gb"]
    80
    """
    path = data_dir() / "spec" / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RegistryError(
            f"cannot be read ({error})",
            where=tilde(path),
            hint="restore it with git, or set DFQS_DATA to a folder that has it",
        ) from error


@dataclass(frozen=True)
class Machine:
    """What a machine has, in bytes; ``vram_bytes`` is None where nobody said.

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


def planned_compute(path: str | Path, contexts: Iterable[int], settings: OpenSettings) -> dict[int, dict]:
    """Compute buffer by context as llama.cpp itself plans it, in bytes: ``plain``, and ``flash`` attention.

    Nothing is allocated. Contexts that llama.cpp refuses are left out.
    """
    from dataclasses import replace

    from dfqs_nb.core.errors import ModelError
    from dfqs_nb.llama.check import dry_run

    found: dict[int, dict] = {}
    for n_ctx in contexts:
        try:
            found[n_ctx] = {
                name: dry_run(path, replace(settings, n_ctx=n_ctx, flash_attn=flash))["compute_bytes"]
                for name, flash in (("plain", False), ("flash", True))
            }
        except ModelError:
            continue
    return found


def hardware_envelope(
    header: GGUFHeader | Sequence[GGUFHeader],
    machine: Machine | None = None,
    *,
    contexts: Sequence[int] = CONTEXTS,
    compute: Mapping[int, Mapping[str, int]] | None = None,
    flash_attn: bool = False,
    n_ubatch: int = 512,
) -> dict[str, Any]:
    """The envelope of the model that this header (or these shards' headers, first one first) describes.

    Args:
        machine: what to hold it against; this machine when not given.
        contexts: lengths in tokens; the model's own is added.
        compute: compute buffer by context, as `planned_compute` gives it; nothing is said to fit without it.
        flash_attn: which of the two compute buffers counts.

    Returns:
        Values that JSON takes: ``model``, ``source``, ``settings``, ``machine``, ``weights`` (rows by class),
        ``cache`` (rows by context), ``fits`` (rows by limit and context), ``storage`` (rows by mode).

    Raises:
        HeaderError: a key that the KV formula needs is missing.
    """
    headers = [header] if isinstance(header, GGUFHeader) else list(header)
    sizes = class_sizes(headers[0]) if len(headers) == 1 else _summed(map(class_sizes, headers))
    own = headers[0].arch("context_length")
    weights = [{key: row[key] for key in ("class", "bytes", "types")} for row in sizes]
    whole = {
        "weights_bytes": weights_bytes(headers),
        "routed_bytes": active_bytes(headers).routed_total,
        "file_bytes": sum(one.end_offset - one.start for one in headers),
        "header_bytes": sum(one.data_offset - one.start for one in headers),
    }
    return _envelope(
        headers[0].get("general.name") or headers[0].path.stem,
        "the header of the file",
        headers[0],
        weights,
        whole,
        own,
        machine or this_machine(),
        contexts,
        compute or {},
        flash_attn,
        n_ubatch,
    )


def published_envelope(machine: Machine | None = None, *, flash_attn: bool = False) -> dict[str, Any]:
    """The envelope of DeepSeek-V4-Flash-IQ1_S-XL from what was published of it, without its file.

    As `hardware_envelope`. Weights: the published size of the file, and experts from the shapes of the
    configuration. Compute buffer: llama.cpp's plan for a file of these shapes (``data/spec``).
    """
    shape, spec = published_shape(), read_spec("requirements")["envelope"]
    nbytes = registered()["deepseek-v4-flash-iq1_s-xl-single"].size_bytes
    embedding = FLASH.weights - FLASH.dense - FLASH.routed_total
    weights = [
        {"class": "routed experts", "bytes": FLASH.routed_total, "types": "IQ1_S, Q2_K"},
        {"class": "read for every token", "bytes": FLASH.dense, "types": "Q8_0 or higher"},
        {"class": "embedding", "bytes": embedding, "types": "Q8_0"},
    ]
    planned = {int(n): row for n, row in spec["published_compute"].items()}
    whole = {
        "weights_bytes": FLASH.weights,
        "routed_bytes": FLASH.routed_total,
        "file_bytes": nbytes,
        "header_bytes": None,
    }
    return _envelope(
        f"{shape.name}-IQ1_S-XL",
        "computed from the published configuration and file size",
        shape,
        weights,
        whole,
        max(CONTEXTS),
        machine or this_machine(),
        CONTEXTS,
        planned,
        flash_attn,
        512,
        here=False,
    )


def _envelope(
    name: str,
    source: str,
    shape: Any,
    weights: list[dict],
    whole: dict[str, int | None],
    own: int | None,
    machine: Machine,
    contexts: Sequence[int],
    compute: Mapping[int, Mapping[str, int]],
    flash_attn: bool,
    n_ubatch: int,
    here: bool = True,
) -> dict[str, Any]:
    lengths = sorted({*contexts, *([int(own)] if own else [])})
    cache = [_cache_row(shape, n, own, compute.get(n, {}), n_ubatch) for n in lengths]
    chosen = "compute_flash_bytes" if flash_attn else "compute_bytes"
    limits = read_spec("requirements")["envelope"]
    return {
        "model": name,
        "source": source,
        "settings": {
            "flash_attn": flash_attn,
            "n_ubatch": n_ubatch,
            "type_k": "f16",
            "type_v": "f16",
            "swa_full": False,
        },
        "machine": asdict(machine),
        **whole,
        "weights": weights,
        "cache": cache,
        "fits": [row for one in cache for row in _fits(one, whole, one[chosen], machine, limits)],
        "storage": _storage(whole, machine, limits["storage"], here),
    }


def _summed(tables: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Tables of classes added up over shards, largest class first."""
    total: dict[str, dict[str, Any]] = {}
    for row in (row for table in tables for row in table):
        kept = total.setdefault(row["class"], {"class": row["class"], "bytes": 0, "types": ""})
        kept["bytes"] += row["bytes"]
        kinds = dict.fromkeys([*filter(None, kept["types"].split(", ")), *row["types"].split(", ")])
        kept["types"] = ", ".join(kinds)
    return sorted(total.values(), key=lambda row: -row["bytes"])


def _cache_row(
    shape: Any, n_ctx: int, own: int | None, compute: Mapping[str, int], n_ubatch: int
) -> dict[str, Any]:
    window = kv_cache_bytes(shape, n_ctx, n_ubatch)
    return {
        "n_ctx": n_ctx,
        "kv_bytes": window.total,
        "kv_swa_full_bytes": kv_cache_bytes(shape, n_ctx, n_ubatch, swa_full=True).total,
        "exactness": window.exactness,
        "compute_bytes": compute.get("plain"),
        "compute_flash_bytes": compute.get("flash"),
        "within_model": None if not own else n_ctx <= int(own),
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
    row: dict[str, Any],
    whole: Mapping[str, int | None],
    compute: int | None,
    machine: Machine,
    spec: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One context against every limit: everything in that memory, and the least that must lie there."""
    beside = row["kv_bytes"] + (compute or 0)
    everything = whole["weights_bytes"] + beside
    unsure = 0 if row["exactness"] == "exact" else row["kv_bytes"]  # a cache that may be smaller
    bounded = compute is not None and row["exactness"] != "rough"
    counted = "weights, KV cache" + ("" if compute is None else ", compute buffer as planned for the CPU")
    ram, vram = "weights paged from the disk", "routed experts left in RAM"
    limits = [
        ("RAM", "this machine", machine.memory_bytes, beside, ram),
        ("RAM", "this machine, free now", machine.available_bytes, beside, ram),
        *(
            ("RAM", f"DFQS 1.0 {level}", spec["ram"][f"{level}_gb"] * GB, beside, ram)
            for level in ("minimum", "recommended")
        ),
        ("VRAM", "this machine", machine.vram_bytes, everything - whole["routed_bytes"], vram),
        *(
            (
                "VRAM",
                f"DFQS 1.0 {level}",
                spec["vram"][f"{level}_gb"] * GB,
                everything - whole["routed_bytes"],
                vram,
            )
            for level in ("minimum", "recommended")
        ),
    ]
    return [
        {
            "resource": resource,
            "limit": name,
            "limit_bytes": limit,
            "n_ctx": row["n_ctx"],
            "need_bytes": everything,
            "counted": counted,
            "verdict": verdict(everything - unsure, everything if bounded else None, limit),
            "least_bytes": least,
            "least_verdict": verdict(least - unsure, least if bounded else None, limit),
            "least": means,
        }
        for resource, name, limit, least, means in limits
    ]


def _storage(
    whole: Mapping[str, int | None], machine: Machine, spec: Mapping[str, int], here: bool
) -> list[dict[str, Any]]:
    """Disk by way of getting one file; ``here``: the sources lie on this disk, so only the extra counts."""
    model, header = whole["file_bytes"], whole["header_bytes"] or 0
    extra = methods_table(model, header, {})["extra disk (bytes)"]
    rows = []
    for mode, method in MERGE_MODES.items():
        more = int(extra[method])
        rows.append(
            {
                "mode": mode,
                "extra_bytes": more,
                "total_bytes": model + more,
                "this machine": _room(more if here else model + more, machine.disk_free_bytes),
                **{
                    f"DFQS 1.0 {level}": _room(model + more, spec[f"{level}_gb"] * GB)
                    for level in ("minimum", "recommended")
                },
            }
        )
    return rows


def _room(need_bytes: int, limit_bytes: int) -> str:
    return verdict(need_bytes, need_bytes, limit_bytes)


def envelope_tables(envelope: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The envelope as frames to show; sizes in GB (10^9 bytes), of a small model in MB (10^6 bytes).

    ``weights`` by class; ``cache`` by context; ``fits`` one row a limit, one column a context, with what is
    judged in its index; ``storage`` by mode.

    Raises:
        DfqsError: it is not what `hardware_envelope` returned.
    """
    import pandas as pd

    try:
        weights, cache, fits, storage = (
            pd.DataFrame(envelope[key]) for key in ("weights", "cache", "fits", "storage")
        )
        unit, scale = ("GB", GB) if envelope["file_bytes"] >= GB else ("MB", 10**6)
        weights = weights.assign(**{unit: weights["bytes"] / scale}).set_index("class")[[unit, "types"]]
        cache = _cache_frame(cache, unit, scale)
        disk = storage.assign(
            **{
                f"extra ({unit})": storage["extra_bytes"] / scale,
                f"in all ({unit})": storage["total_bytes"] / scale,
            }
        )
        disk = disk.drop(columns=["extra_bytes", "total_bytes"]).set_index("mode")
    except (KeyError, TypeError) as error:
        raise DfqsError(
            f"not a hardware envelope ({error})", hint="pass what hardware_envelope returned"
        ) from error
    return {"weights": weights, "cache": cache, "fits": _fits_frame(fits), "storage": disk}


def _cache_frame(cache: pd.DataFrame, unit: str, scale: int) -> pd.DataFrame:
    import pandas as pd

    names = {
        "kv_bytes": "KV cache",
        "kv_swa_full_bytes": "KV cache, swa_full",
        "compute_bytes": "compute buffer",
        "compute_flash_bytes": "compute buffer, flash attention",
    }
    rows = cache.set_index("n_ctx")
    table = pd.DataFrame({f"{new} ({unit})": rows[old].astype(float) / scale for old, new in names.items()})
    within = rows["within_model"].map({True: "yes", False: "no"}).fillna("not stated")
    return table.assign(**{"within the model's context": within})


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
