"""What `make run` executed is compared with the stored outputs, so that `make test` need not execute it once more.

nbval starts a kernel for a notebook and compares what the cells print. Here it gets a kernel that repeats what papermill
kept in ``outputs/nano/``: the comparison stays nbval's. That holds only for a run from nothing, of all notebooks, with
their own parameters, which no budget cut, and of the sources as they are now (`executed`); else the notebooks are
executed.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from datetime import datetime
from functools import cache
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import nbval.plugin

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "outputs" / "nano"
SOURCES = ("dfqs_nb", "data", "notebooks", "requirements.lock", "pyproject.toml")
OWN = {"run_name", "budget_minutes"}  # the parameters that every run gets
START_SECONDS = 10.0  # from a run's first file, its lock, to the start of its first notebook


def executed(run: Path = RUN, root: Path = ROOT) -> dict[str, list[Any]]:
    """The code cells of each executed notebook by its file's name; empty where they must be executed again."""
    stored = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not stored or not all((run / path.name).is_file() for path in stored):
        return {}
    notebooks = {path.name: nbformat.read(run / path.name, as_version=4) for path in stored}
    made = [notebook.metadata.get("papermill", {}) for notebook in notebooks.values()]
    given = {name for record in made for name in record.get("parameters", {})}
    if given - OWN or not all(record.get("end_time") and not record.get("exception") for record in made):
        return {}
    stages = [json.loads(path.read_text(encoding="utf-8")) for path in run.glob("*.json")]
    if any(isinstance(stage, dict) and stage.get("left_out") for stage in stages):
        return {}
    begin = datetime.fromisoformat(made[0]["start_time"]).timestamp()
    if _newest(root / name for name in SOURCES) > begin or _oldest(run) < begin - START_SECONDS:
        return {}
    own = {"injected-parameters"}
    return {
        name: [
            cell
            for cell in notebook.cells
            if cell.cell_type == "code" and not own & set(cell.metadata.get("tags", []))
        ]
        for name, notebook in notebooks.items()
    }


def _files(places: Iterable[Path]) -> Iterable[Path]:
    for place in places:
        found = place.rglob("*") if place.is_dir() else [place]
        yield from (path for path in found if path.is_file() and "__pycache__" not in path.parts)


def _newest(places: Iterable[Path]) -> float:
    return max(path.stat().st_mtime for path in _files(places) if ".ipynb_checkpoints" not in path.parts)


def _oldest(folder: Path) -> float:
    """When the first file of a folder was made; a model that it links to is older."""
    return min((path.stat().st_ctime for path in _files([folder]) if not path.is_symlink()), default=0.0)


class Recorded:
    """In place of nbval's `RunningKernel`: the messages of a kernel that executes these cells."""

    def __init__(self, cells: Iterable[Any]) -> None:
        self.cells, self.messages = deque(cells), deque[dict[str, Any]]()

    def execute_cell_input(self, source: str, allow_stdin: bool | None = None) -> str:
        """Queue the messages of the next cell; an error where the run had another one."""
        cell = self.cells.popleft()
        assert cell.source == source, "this cell is not the one that was executed"
        self.messages = deque(map(self._message, cell.outputs))
        self.messages.append({"msg_type": "status", "content": {"execution_state": "idle"}})
        return "recorded"

    @staticmethod
    def _message(output: Any) -> dict[str, Any]:
        content = dict(output)
        return {"msg_type": content.pop("output_type"), "content": content}

    def get_message(self, stream: str, timeout: float | None = None) -> dict[str, Any]:
        """The next message."""
        if not self.messages:
            raise Empty
        return {**self.messages.popleft(), "parent_header": {"msg_id": "recorded"}}

    def await_reply(self, msg_id: str, timeout: float | None = None) -> None:
        """The cell has run."""

    def await_idle(self, msg_id: str, timeout: float | None = None) -> None:
        """The cell has run."""

    def is_alive(self) -> bool:
        """It answers."""
        return True

    def stop(self) -> None:
        """Nothing runs."""


@cache
def _executed_now() -> dict[str, list[Any]]:
    return executed()


def install() -> None:
    """Let nbval take what was executed already."""
    start = nbval.plugin.IPyNbFile.setup

    def setup(self: Any) -> None:
        cells = _executed_now().get(self.path.name)
        if cells is None or self.path.parent != ROOT / "notebooks":
            start(self)
            return
        self.kernel = Recorded(cells)
        self.setup_sanitize_files()

    nbval.plugin.IPyNbFile.setup = setup


def where() -> str:
    """What the notebooks' outputs are compared with, in a sentence for the head of a test run."""
    if _executed_now():
        return f"notebooks: comparing what `make run` executed in {RUN.relative_to(ROOT)}/"
    return "notebooks: executing them"
