"""The child process whose memory is measured; apart, as ``python -m`` wants a module not imported yet."""

from __future__ import annotations

from typing import Any

import psutil

from dfqs_nb.core import child
from dfqs_nb.llama.build import build_llama
from dfqs_nb.llama.settings import OpenSettings


def fill_context(job: dict[str, Any]) -> dict[str, float]:
    """Open a model (``path``, ``settings``) and evaluate ``fill_tokens``; bytes that the process takes."""
    import llama_cpp  # noqa: F401  its own memory is not the model's

    settings = OpenSettings(**job["settings"])
    child.tell(stage="while loading it")
    before = _anonymous(psutil.Process().memory_info())
    llama = build_llama(job["path"], settings)
    child.tell(stage=f"while filling a context of {settings.n_ctx:,} tokens")
    llama.eval([1 + i % 100 for i in range(min(settings.n_ctx, job["fill_tokens"]))])
    after = psutil.Process().memory_info()
    return {"anonymous_bytes": _anonymous(after) - before, "resident_bytes": after.rss}


def _anonymous(memory: Any) -> float:
    """Bytes in memory that are not a mapped file; NaN off Linux."""
    return float(memory.rss - memory.shared) if hasattr(memory, "shared") else float("nan")


if __name__ == "__main__":
    child.serve(fill_context)
