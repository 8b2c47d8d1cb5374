"""Stages: what a notebook hands on, and the seal over what it wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.errors import StageError

if TYPE_CHECKING:
    pass
from dfqs_nb.core.files import (
    _written,  # NEEDS
    canonical_sha256,  # NEEDS
    sha256_of_file,  # NEEDS
    write_json,  # NEEDS
)

UNSEALED = (".gguf", ".manifest.json", ".ipynb")  # have hashes of their own, or change by being read


def write_stage(
    folder: str | Path, stage: str, *, conditions: dict[str, Any], summary: list[str], **facts: Any
) -> Path:
    """Write ``<stage>.json``, what a notebook hands on, and seal it.

    It holds the conditions, the facts, the few lines that the run's summary prints, the SHA-256 of each file
    of the run that was written since the stage before (``files``), and a SHA-256 of all that (``seal``).
    """
    folder = Path(folder)
    content = {"stage": stage, "conditions": conditions, "summary": summary, **facts}
    content = _numbers(json.loads(json.dumps(content, default=str)))
    content["files"] = {
        path.relative_to(folder.resolve()).as_posix(): sha256_of_file(path)
        for path in _written
        if _sealed(path, folder.resolve())
    }
    _written.clear()
    written = write_json(folder / f"{stage}.json", {**content, "seal": canonical_sha256(content)})
    _written.clear()
    return written


def _numbers(value: Any) -> Any:
    """A JSON value whose NaN and infinities, which are no JSON, became null."""
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sealed(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) and path.is_file() and not path.name.endswith(UNSEALED)


def read_stage(folder: str | Path, stage: str, written_by: str) -> Any:
    """Read the ``<stage>.json`` that an earlier notebook wrote.

    Raises:
        StageError: it is missing or not JSON; the message names the notebook that writes it.
    """
    path = Path(folder) / f"{stage}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError("missing", where=path, hint=f"run {written_by} first") from None
    except ValueError as error:
        raise StageError(f"not JSON ({error})", where=path, hint=f"run {written_by} again") from error
