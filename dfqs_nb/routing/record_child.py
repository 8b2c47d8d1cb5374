"""The child process of an experiment: it records one model under one setting.

A module of its own, because ``python -m`` wants one that the package has not imported yet.
"""

from __future__ import annotations

from typing import Any

from dfqs_nb.core import child
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing.trace import Schedule, open_recorded, record


def record_job(job: dict[str, Any]) -> None:
    """Open the job's model once and record each of its runs into its file.

    Args:
        job: ``path``, ``settings``, ``schedule``, ``tokens``, ``n_output``, ``names`` and ``files``.
    """
    settings, schedule = OpenSettings(**job["settings"]), Schedule(**job["schedule"])
    child.tell(stage="while loading it")
    with open_recorded(job["path"], settings, trial=False) as recorded:
        child.tell(stage="while evaluating the text")
        for name, file in zip(job["names"], job["files"], strict=True):
            trace = record(recorded, job["tokens"], schedule, n_output=job["n_output"])
            trace.conditions["condition"] = name
            trace.save(file)


if __name__ == "__main__":
    child.serve(record_job)
