"""The child process that is measured: a fresh one, so that nothing an earlier context left behind counts.

A module of its own, because ``python -m`` wants one that the package has not imported yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dfqs_nb.core import child
from dfqs_nb.llama.build import build_llama
from dfqs_nb.llama.settings import OpenSettings

STATUS = Path("/proc/self/status")


def fill_context(job: dict[str, Any]) -> dict[str, float]:
    """Open the model, fill its context, and return what the process takes.

    Args:
        job: ``path``, ``settings`` and ``fill_tokens``.
    """
    import llama_cpp  # noqa: F401  its own memory is not the model's

    settings = OpenSettings(**job["settings"])
    child.tell(stage="while loading it")
    before = resident()
    llama = build_llama(job["path"], settings)
    child.tell(stage=f"while filling a context of {settings.n_ctx:,} tokens")
    llama.eval([1 + i % 100 for i in range(min(settings.n_ctx, job["fill_tokens"]))])
    after = resident()
    return {"anonymous_bytes": after["RssAnon"] - before["RssAnon"], "resident_bytes": after["VmRSS"]}


def resident() -> dict[str, float]:
    """Bytes of this process in memory: all, and those that are not a mapped file; NaN off Linux.

    By hand: psutil does not tell anonymous memory apart.
    """
    names = ("VmRSS", "RssAnon")
    if not STATUS.exists():
        return dict.fromkeys(names, float("nan"))
    rows = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {name: int(rows[name].split()[0]) * 1024.0 for name in names}


if __name__ == "__main__":
    child.serve(fill_context)
