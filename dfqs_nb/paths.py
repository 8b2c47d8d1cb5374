"""Where things lie, and how a file is written: whole, or not at all; and how a stage is sealed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.errors import OutputError, StageError

if TYPE_CHECKING:
    import pandas as pd

REPOSITORY = Path(__file__).resolve().parent.parent
UNSEALED = (".gguf", ".manifest.json", ".ipynb")  # have hashes of their own, or change by being read
_written: dict[Path, None] = {}  # by this process, in order, since the last stage was written


def public_address(pyproject: Path = REPOSITORY / "pyproject.toml") -> str:
    """The repository's public address, from the one place where it stands."""
    return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["urls"]["Repository"].rstrip("/")


def data_dir() -> Path:
    """The folder of shipped data: ``$DFQS_DATA``, else ``data/`` of this checkout."""
    return Path(os.environ.get("DFQS_DATA") or REPOSITORY / "data")


def outputs_dir() -> Path:
    """The folder that receives every run: ``$DFQS_OUTPUTS``, else ``outputs/`` of this checkout."""
    return Path(os.environ.get("DFQS_OUTPUTS") or REPOSITORY / "outputs")


def run_dir(run: str) -> Path:
    """The folder ``outputs/<run>/``, made if missing.

    Raises:
        OutputError: the name is not a plain folder name, or the folder cannot be made.
    """
    if not run or Path(run).name != run or run.startswith("."):
        raise OutputError(f"{run!r} is not a run name", hint="use one plain folder name, like 'nano'")
    folder = outputs_dir() / run
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder ({error.strerror})", where=folder,
                          hint="set DFQS_OUTPUTS to a folder you may write") from error
    return folder


def tilde(path: str | Path) -> str:
    """A path as people read it: relative to this checkout, or to the home folder, where it can be.

    >>> tilde(REPOSITORY / "data")
    'data'
    """
    path = Path(path)
    for base, prefix in ((REPOSITORY, ""), (Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base) and base != Path("/"):
            return prefix + path.relative_to(base).as_posix()
    return str(path)


@contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Open a temporary file beside ``path``; it takes that name only when the block ends well.

    The bytes are flushed to the disk before the rename, so a reader (or a crash) sees the old file
    or the new one, never a part.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        encoding = None if "b" in mode else "utf-8"
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        fsync_dir(path.parent)
        stood_on(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync_dir(folder: str | Path) -> None:
    """Make a rename in ``folder`` durable (a no-op where folders cannot be opened)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON, whole or not at all, and return the path."""
    with whole_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
    return Path(path)


def write_table(path: str | Path, table: pd.DataFrame, *, index: bool = True) -> Path:
    """Write a frame as CSV, whole or not at all, and return the path."""
    with whole_file(path) as file:
        table.to_csv(file, index=index, lineterminator="\n")
    return Path(path)


def stood_on(path: str | Path) -> None:
    """Note that this process wrote ``path``, or used what it holds: the next stage's seal covers it."""
    _written[Path(path).resolve()] = None


def write_stage(folder: str | Path, stage: str, *, conditions: dict[str, Any], summary: list[str],
                **facts: Any) -> Path:
    """Write ``<stage>.json``, what a notebook hands on, and seal it.

    It holds the conditions, the facts, the few lines that the run's summary prints, the SHA-256 of each file
    of the run that was written since the stage before (``files``), and a SHA-256 of all that (``seal``).
    """
    folder = Path(folder)
    content = {"stage": stage, "conditions": conditions, "summary": summary, **facts}
    content = _numbers(json.loads(json.dumps(content, default=str)))
    content["files"] = {path.relative_to(folder.resolve()).as_posix(): sha256_of_file(path)
                        for path in _written if _sealed(path, folder.resolve())}
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


def canonical_sha256(value: Any) -> str:
    """SHA-256, in hex, of a JSON value written in one way only: keys sorted, no spaces.

    >>> canonical_sha256({"b": 1, "a": [0.5]}) == canonical_sha256({"a": [0.5], "b": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    """SHA-256, in hex, of a small file's bytes (for models: `verify.sha256_of`, which shows its progress)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
