"""Memory against context: what the header and llama.cpp's own plan predict, and what a process really takes.

``python -m dfqs_nb.context.cost`` is the process that is measured: a fresh one, so that nothing an earlier
context left behind counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.child import environment
from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.memory import kv_cache_bytes, weights_bytes
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.check import dry_run
from dfqs_nb.llama.settings import OpenSettings, build_llama

if TYPE_CHECKING:
    import pandas as pd

STATUS = Path("/proc/self/status")
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class PublishedShape:
    """Sizes of a model that is not here, enough of a header for ``memory.kv_cache_bytes``."""

    name: str
    architecture: str
    source: str
    keys: dict[str, Any] = field(repr=False)
    card: dict[str, Any] = field(repr=False)
    path: str = ""

    def arch(self, key: str, default: Any = None) -> Any:
        """As ``GGUFHeader.arch``."""
        return self.keys.get(key, default)

    def counts(self, name: str) -> list[int]:
        """As ``GGUFHeader.counts``."""
        value = self.keys.get(name.removeprefix(f"{self.architecture}."), [])
        return value if isinstance(value, list) else [value]


def published_shape(name: str = "deepseek_v4_flash") -> PublishedShape:
    """The shape that ``data/<name>.json`` holds, with its source.

    >>> published_shape().keys["block_count"]
    43
    """
    return PublishedShape(**json.loads((data_dir() / f"{name}.json").read_text(encoding="utf-8")))


def flash_cache_table(lengths: Sequence[int], n_ubatch: int = 512) -> pd.DataFrame:
    """The cache of DeepSeek-V4-Flash at f16, in bytes, beside what its card says.

    Columns ``n_ctx``, ``swa_window`` (``swa_full=False``), ``swa_full`` and ``card`` (NaN where it is
    silent).
    """
    import pandas as pd

    shape = published_shape()
    card = {int(n): gigabytes * 1e9 for n, gigabytes in shape.card["kv_cache_gigabytes"].items()}
    rows = [
        {"n_ctx": n, "card": card.get(n, float("nan"))}
        | {
            name: kv_cache_bytes(shape, n, n_ubatch, swa_full=full).total  # type: ignore[arg-type]
            for name, full in (("swa_window", False), ("swa_full", True))
        }
        for n in lengths
    ]
    return pd.DataFrame(rows)[["n_ctx", "swa_window", "swa_full", "card"]]


def memory_table(
    path: str | Path, lengths: Sequence[int], settings: OpenSettings, fill_tokens: int = 4096
) -> pd.DataFrame:
    """Predicted and measured bytes for a context of each length, filled with up to ``fill_tokens`` tokens.

    Columns ``n_ctx``; predicted: ``kv_bytes`` (the header's formula), ``kv_planned_bytes`` and
    ``compute_bytes`` (llama.cpp's plan, in which nothing is allocated), ``weights_bytes``,
    ``predicted_bytes`` (cache + buffer); measured in a fresh process for each length: ``anonymous_bytes``
    (what its own memory grew by when the model was opened and its context filled) and ``resident_bytes``
    (everything, the mapped weights included); NaN where the system does not tell. llama.cpp reserves the
    compute buffer for a full context, and pages of it that were never used are not resident.
    """
    import pandas as pd

    shards = open_shards(path)
    rows = []
    for n_ctx in lengths:
        at = replace(settings, n_ctx=n_ctx)
        found = _measure(shards.paths[0], at, fill_tokens)
        kv = kv_cache_bytes(
            shards.headers[0],
            n_ctx,
            min(at.n_batch, at.n_ubatch),
            type_k=at.type_k,
            type_v=at.type_v,
            swa_full=at.swa_full,
        )
        plan = dry_run(shards.paths[0], at)
        rows.append(
            {
                "n_ctx": n_ctx,
                "kv_bytes": kv.total,
                "kv_planned_bytes": plan["kv_bytes"],
                "compute_bytes": plan["compute_bytes"],
                "weights_bytes": weights_bytes(shards.headers),
                "predicted_bytes": kv.total + plan["compute_bytes"],
                **found,
            }
        )
    return pd.DataFrame(rows)


def _measure(path: Path, settings: OpenSettings, fill_tokens: int) -> dict[str, float]:
    job = {"path": str(path), "fill_tokens": fill_tokens, "settings": settings.as_dict()}
    child = subprocess.run(
        [sys.executable, "-m", "dfqs_nb.context.cost"],
        input=json.dumps(job).encode(),
        capture_output=True,
        env=environment(),
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    lines = [line for line in child.stdout.decode().splitlines() if line.startswith("{")]
    if child.returncode or not lines:
        last = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        what = f"the process that is measured died at n_ctx {settings.n_ctx:,} ({' '.join(last)})"
        raise ModelError(what, where=path, hint="lower n_ctx")
    return json.loads(lines[-1])


# ---- the child process ----


def main() -> int:
    """Open the model, fill the context, and say what the process takes."""
    job = json.loads(sys.stdin.read())
    settings = OpenSettings(**job["settings"])
    import llama_cpp  # noqa: F401  its own memory is not the model's

    before = resident()
    llama = build_llama(job["path"], settings)
    llama.eval([1 + i % 100 for i in range(min(settings.n_ctx, job["fill_tokens"]))])
    after = resident()
    found = {"anonymous_bytes": after["RssAnon"] - before["RssAnon"], "resident_bytes": after["VmRSS"]}
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def resident() -> dict[str, float]:
    """Bytes of this process in memory: all, and those that are not a mapped file; NaN off Linux."""
    names = ("VmRSS", "RssAnon")
    if not STATUS.exists():
        return dict.fromkeys(names, float("nan"))
    rows = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {name: int(rows[name].split()[0]) * 1024.0 for name in names}


if __name__ == "__main__":
    sys.exit(main())
