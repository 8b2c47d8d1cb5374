"""What a run is doing now: the notebook, its cell, how long it takes, and signs of life of its processes."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dfqs_nb.core.budget import duration
from dfqs_nb.core.display import plain
from dfqs_nb.core.journal import conditions_hash
from dfqs_nb.core.progress import Activity

ENGINE = "dfqs-live"  # its name in papermill
CONDITIONS = "dfqs_conditions"  # in the metadata of an executed notebook: their hash
BAR = 10  # characters
HEARTBEAT_SECONDS = 10.0  # between lines where there is no terminal to redraw one in
REDRAW_SECONDS = 1.0


class Live:
    """One line that follows a notebook's execution; in a log file, a line every ten seconds of a long cell.

    If an earlier run left the notebook at ``target`` under the same ``conditions``, the times of its cells
    tell how long this run takes. ``budget_minutes`` 0: it has no budget. ``stream`` None: nobody watches.
    """

    def __init__(
        self, target: Path, budget_minutes: float, conditions: Mapping[str, Any], stream: IO[str] | None
    ) -> None:
        self.name, self.stream, self.budget = target.stem, stream or io.StringIO(), 60 * budget_minutes
        self.key, self.bars = conditions_hash(conditions), target.with_name(".progress")
        self.earlier, self.titles = cell_seconds(target, self.key), list[str]()
        self.index, self.begun, self.cell_begun = 0, time.monotonic(), time.monotonic()
        self.activity, self.done, self.drawn = Activity(), threading.Event(), 0

    def __enter__(self) -> Live:
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.done.set()
        self.watcher.join(5)  # else it may draw once more
        if self.drawn:
            self._draw("")
            self.stream.write("\r")
            self.stream.flush()
        self.bars.unlink(missing_ok=True)

    def cell(self, titles: list[str], index: int) -> None:
        """A cell begins."""
        self.titles, self.index, self.cell_begun = titles, index, time.monotonic()

    @property
    def place(self) -> str:
        """The cell that runs now, by its number and the heading above it."""
        if not self.titles:
            return "starting"
        return f"{self.index + 1}/{len(self.titles)} {self.titles[self.index]}"

    def line(self, width: int = 1000) -> str:
        """What is going on, for how long, what is left, and what the processes do.

        If that is wider than ``width``, the heading is cut first, then what the processes do, then the name.
        """
        now, done = time.monotonic(), BAR * self.index // max(1, len(self.titles))
        times = ", ".join(filter(None, [duration(now - self.begun), self._left(now)]))
        bars = self.bars.read_text(encoding="utf-8", errors="replace") if self.bars.exists() else ""
        more = "".join(f" | {part}" for part in (times, bars, self.activity.text()) if part)
        number, _, title = self.place.partition(" ")
        head = f"[{'#' * done}{'.' * (BAR - done)}] {number}"
        name = self.name if len(f"{self.name} {head} | {times}") <= width else self.name[:2]
        title = title[: max(0, width - len(f"{name} {head} {more}"))]
        return plain(f"{name} {head} {title}".rstrip() + more)[:width]

    def _left(self, now: float) -> str:
        """What is left: as long as the cells took last time, or of the budget."""
        if self.titles and len(self.earlier) == len(self.titles):
            here = max(0.0, self.earlier[self.index] - (now - self.cell_begun))
            return f"about {duration(here + sum(self.earlier[self.index + 1 :]))} left, as last time"
        if self.budget:
            left = self.budget - (now - self.begun)
            return f"{duration(left)} of its budget left" if left > 0 else "over its budget"
        return ""

    def _watch(self) -> None:
        terminal = self.stream.isatty()
        while not self.done.wait(REDRAW_SECONDS if terminal else HEARTBEAT_SECONDS):
            if terminal:
                self._draw(self.line(shutil.get_terminal_size().columns - 1))
            elif time.monotonic() - self.cell_begun >= HEARTBEAT_SECONDS:
                print(self.line(), file=self.stream, flush=True)

    def _draw(self, line: str) -> None:
        self.stream.write("\r" + line.ljust(self.drawn))
        self.stream.flush()
        self.drawn = len(line)


def cell_seconds(path: Path, key: str) -> list[float]:
    """How long each cell of a notebook took that ran to its end under the conditions ``key``; else empty."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        seconds = [cell["metadata"]["papermill"]["duration"] for cell in notebook["cells"]]
        return [] if None in seconds or notebook["metadata"][CONDITIONS] != key else seconds
    except (OSError, ValueError, LookupError, TypeError):
        return []  # no notebook, or not one that this program executed


def cell_titles(cells: Sequence[Any]) -> list[str]:
    """The heading above each cell."""
    titles, title = [], ""
    for cell in cells:
        if cell["cell_type"] == "markdown" and (heading := re.search(r"^#+ +(.+)$", cell["source"], re.M)):
            title = heading[1].strip()
        titles.append(title)
    return titles


def use(live: Live) -> str:
    """Register a papermill engine that tells ``live`` which cell runs, and return its name."""
    from papermill.engines import NBClientEngine, papermill_engines

    class Watched(NBClientEngine):  # type: ignore[misc]
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
            titles, begin = cell_titles(nb_man.nb.cells), nb_man.cell_start
            nb_man.nb.metadata[CONDITIONS] = live.key

            def started(cell: Any, cell_index: int = 0, **more: Any) -> None:
                live.cell(titles, cell_index)
                begin(cell, cell_index, **more)

            nb_man.cell_start = started
            try:
                return super().execute_managed_notebook(nb_man, kernel_name, **options)
            except KeyboardInterrupt:  # else papermill marks the cells that never ran as completed
                cell = nb_man.nb.cells[live.index]
                nb_man.cell_exception(cell, cell_index=live.index)
                nb_man.save()
                raise

    papermill_engines.register(ENGINE, Watched)
    return ENGINE
