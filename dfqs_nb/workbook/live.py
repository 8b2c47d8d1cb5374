"""What a run is doing now: the notebook, its cell, how long it takes, and signs of life of its processes."""

from __future__ import annotations

import io
import re
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from dfqs_nb.core.display import Activity, duration, plain

ENGINE = "dfqs-live"  # its name in papermill
BAR = 10  # characters
HEARTBEAT_SECONDS = 10.0  # between lines where there is no terminal to redraw one in
REDRAW_SECONDS = 1.0


class Live:
    """One line that follows a notebook's execution; in a log file, a line every ten seconds of a long cell.

    ``budget_minutes`` 0: it has no budget. ``stream`` None: nobody watches.
    """

    def __init__(self, target: Path, budget_minutes: float, stream: IO[str] | None) -> None:
        self.name, self.stream, self.budget = target.stem, stream or io.StringIO(), 60 * budget_minutes
        self.bars, self.titles, self.index = target.with_name(".progress"), list[str](), 0
        self.begun = self.cell_begun = time.monotonic()
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

    @property
    def place(self) -> str:
        """The cell that runs now, by its number and the heading above it."""
        if not self.titles:
            return "starting"
        return f"{self.index + 1}/{len(self.titles)} {self.titles[self.index]}"

    def line(self, width: int = 1000) -> str:
        """What is going on, for how long, what is left of the budget, and what the processes do.

        If that is wider than ``width``, its end is cut, and first of all the notebook's name.
        """
        gone, done = time.monotonic() - self.begun, BAR * self.index // max(1, len(self.titles))
        times, number, title = duration(gone), *self.place.partition(" ")[::2]
        if self.budget:
            left = self.budget - gone
            times += f", {duration(left)} of its budget left" if left > 0 else ", over its budget"
        bars = self.bars.read_text(encoding="utf-8", errors="replace") if self.bars.exists() else ""
        parts = filter(None, [times, title, bars, self.activity.text()])
        line = plain(f" [{'#' * done}{'.' * (BAR - done)}] {number} | {' | '.join(parts)}")
        name = self.name if len(self.name + line) <= width else self.name[:2]
        return (name + line)[:width]

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

            def started(cell: Any, cell_index: int = 0, **more: Any) -> None:
                live.titles, live.index, live.cell_begun = titles, cell_index, time.monotonic()
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
