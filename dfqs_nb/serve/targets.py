"""The ways of running a model elsewhere, as ``data/deploy/targets.toml`` has them."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir, tilde

if TYPE_CHECKING:
    import pandas as pd

FACTS = ("recipe", "checked_how", "run_here", "loads_deepseek4", "split_files", "since", "limits", "source")


class DeployError(DfqsError):
    """A recipe cannot be written."""


class Target(BaseModel):
    """One way of running, as ``targets.toml`` has it; the comments there say what each field means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    recipe: str
    checked_how: str
    run_here: str
    loads_deepseek4: str
    split_files: str
    since: str
    limits: str
    source: list[str]
    date: str
    files: dict[str, str]
    install: list[str]
    run: list[str]
    manual: list[str] = []
    also: list[str] = []
    stop: list[str] = []
    server: int = 0
    prefix: str = ""
    served_name: str = "{{ name }}"
    single_file: bool = False
    needs_key: bool = False
    least_n_ctx: int = 0
    place: str = ""
    fetch_to: str = ""
    mount: str = ""
    amx: str = ""


@cache
def _tables(path: Path) -> tuple[dict[str, Any], dict[str, Target]]:
    """The parts that commands share, and the targets by name."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        common = table.pop("common")
        return common, {name: Target(name=name, **entry) for name, entry in table.items()}
    except (OSError, ValueError, KeyError, ValidationError) as error:
        hint = "restore it with git, or set DFQS_DATA to a folder that has it"
        raise DeployError(
            f"cannot read the table of targets ({error})", where=tilde(path), hint=hint
        ) from error


def shared() -> dict[str, Any]:
    """The parts of ``[common]``, by name."""
    return _tables(data_dir() / "deploy" / "targets.toml")[0]


def targets() -> dict[str, Target]:
    """The targets by name, in the order of ``data/deploy/targets.toml``.

    >>> len(targets()), targets()["ollama"].server
    (17, 11434)
    """
    return _tables(data_dir() / "deploy" / "targets.toml")[1]


def target_of(name: str) -> Target:
    """The target of this name.

    Raises:
        DeployError: there is none; names the ones there are.
    """
    if name not in targets():
        raise DeployError(f"no target is called {name!r}", hint=f"there are {', '.join(targets())}")
    return targets()[name]


def targets_table() -> pd.DataFrame:
    """One row a target: ``target``, ``title``, then what is known of it, each a text.

    ``run_here`` is what ran, with its version, or "generated, not run".
    """
    import pandas as pd

    table = pd.DataFrame([target.model_dump() for target in targets().values()])
    table = table.rename(columns={"name": "target"})[["target", "title", *FACTS]]
    table["source"] = table["source"].map(" ".join)
    table["run_here"] = table["run_here"].replace("", "generated, not run")
    return table


def list_text() -> str:
    """The targets, one a line: name, title, and what ran here."""
    rows = targets_table().itertuples()
    return "".join(f"{row.target:<22}{row.title:<24}{row.run_here}\n" for row in rows)
