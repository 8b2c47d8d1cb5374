"""Jobs for the tests of ``core.child``: ``python -m child_jobs`` does what its job says."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from dfqs_nb.core import child
from dfqs_nb.core.errors import SpaceError


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Add two numbers, or fail in the way that the job names."""
    print("what a library prints is no message")
    child.tell(stage="while adding", pid=os.getpid())
    match job.get("do", "wait"):
        case "add":
            return {"sum": sum(job["numbers"])}
        case "refuse":
            raise SpaceError("too large", where="a.gguf", hint="make room")
        case "abort":
            os.write(2, b"thing.cpp:7: GGML_ASSERT(n > 0) failed\n")
            os.kill(os.getpid(), signal.SIGABRT)
        case "bug":
            return {"never": 1 / 0}
        case "wait":
            time.sleep(60)
    return {}


if __name__ == "__main__":
    child.serve(work)
