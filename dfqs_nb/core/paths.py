"""Where things lie: the checkout, its data, and the outputs of a run."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from dfqs_nb.core.errors import OutputError

REPOSITORY = Path(__file__).resolve().parents[2]


def public_address(pyproject: Path = REPOSITORY / "pyproject.toml") -> str:
    """The repository's public address, which stands in pyproject.toml only."""
    import tomllib

    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["Repository"]).rstrip("/")


def data_dir() -> Path:
    """The folder of shipped data: ``$DFQS_DATA``, else ``data/`` of this checkout."""
    return Path(os.environ.get("DFQS_DATA") or REPOSITORY / "data")


def outputs_dir() -> Path:
    """The folder that receives every run: ``$DFQS_OUTPUTS``, else ``outputs/`` of this checkout."""
    return Path(os.environ.get("DFQS_OUTPUTS") or REPOSITORY / "outputs")


def run_dir(run: str) -> Path:
    """The folder ``outputs/<run>/``, made if missing; the name is one plain folder name."""
    if not run or Path(run).name != run or run.startswith("."):
        raise OutputError(f"{run!r} is not a run name", hint="use one plain folder name, like 'nano'")
    folder = outputs_dir() / run
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        hint = "set DFQS_OUTPUTS to a folder you may write"
        what = f"cannot write into this folder ({error.strerror})"
        raise OutputError(what, where=folder, hint=hint) from error
    return folder


def tilde(path: str | Path) -> str:
    """A path for people: relative to this checkout, the current or the home folder, if it is inside."""
    path = Path(path)
    for base, prefix in ((REPOSITORY, ""), (Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base) and base != Path("/"):
            return prefix + path.relative_to(base).as_posix()
    return str(path)
