"""A stage: what one notebook reads, writes, seals and hands on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dfqs_nb.core.display import counted, markdown
from dfqs_nb.core.errors import StageError, shorten_interrupts
from dfqs_nb.core.files import canonical_sha256, is_file, read_json, sha256_of_file, write_json, write_table
from dfqs_nb.core.journal import remembered
from dfqs_nb.core.paths import run_dir, tilde

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Image, Markdown
    from matplotlib.axes import Axes

NOTEBOOKS = {
    "merge": "01_merge_shards.ipynb",
    "header": "02_inspect_header.ipynb",
    "generate": "03_load_and_generate.ipynb",
    "routing": "04_check_routing_determinism.ipynb",
    "long_context": "05_measure_long_context.ipynb",
    "scores": "06_score_reasoning_and_code.ipynb",
    "dfqs_report": "07_write_dfqs_report.ipynb",
    "ladder": "08_climb_the_quantization_ladder.ipynb",
    "serving": "09_serve_and_deploy.ipynb",
}
# What a second run of a notebook does not do again, where its parameter `fresh` is false.
KEPT = dict.fromkeys(("long_context", "scores", "serving"), "answers") | {"ladder": "rungs"}
KEPT |= {"routing": "recorded runs"}
COMMAND = ".command.json"  # in a run's folder: how it was started, for the commands that its report names
# Models and manifests have hashes of their own; a notebook changes when somebody opens it.
UNSEALED = (".gguf", ".manifest.json", ".ipynb")


class LeftOut(NamedTuple):
    """Something that was not measured: ``why``, where it is not the budget alone, and what it ``needs``."""

    what: str
    why: str = ""
    needs: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.what, self.why, self.needs and f"it needs {self.needs}")))


class Stage:
    """The folder ``outputs/<run>/`` as one notebook sees it.

    The seal covers whatever is written through the stage. The list of files is kept on disk until `finish`,
    so the seal still covers them all after a kernel restart. ``run_name``: a plain folder name under the
    outputs, which is made; or a run's folder, as a ``Path``. ``name``: a key of `NOTEBOOKS`.
    ``budget_minutes``: that the stage may take from now on; 0: no limit.
    """

    def __init__(self, run_name: str | Path, name: str, budget_minutes: float = 0.0) -> None:
        if budget_minutes < 0:
            hint = "give budget_minutes=0 for no limit, or more"
            raise StageError(f"the parameter budget_minutes is {budget_minutes:g}", hint=hint)
        self.budget_seconds, self.left_out = 60 * budget_minutes or math.inf, list[LeftOut]()
        self._started = time.monotonic()
        self.name, self.folder = name, run_name if isinstance(run_name, Path) else run_dir(run_name)
        self._record = self.folder / f".{name}.files"
        record = self._record.read_text(encoding="utf-8") if self._record.exists() else ""
        self._files = dict.fromkeys(record.splitlines())
        kept = f" to go on: whole {KEPT[name]} are kept; `fresh = True` begins anew" if name in KEPT else ""
        shorten_interrupts(f"run all cells again{kept}")

    @property
    def seconds_left(self) -> float:
        """Seconds left of the budget; infinite without one."""
        return max(0.0, self._started + self.budget_seconds - time.monotonic())

    def leave_out(self, missing: Iterable[LeftOut | str]) -> None:
        """Note what the budget (or the context) did not allow; the stage file and its summary list it."""
        rows = (LeftOut(it) if isinstance(it, str) else it for it in missing)
        self.left_out = list(dict.fromkeys([*self.left_out, *rows]))

    def plan(
        self, conditions: Mapping[str, Any], make: Callable[[], Mapping[str, Any]], *, fresh: bool = False
    ) -> dict[str, Any]:
        """The plan that ``make`` returns, kept on disk, so that a resumed run measures the same things.

        It is made again for other ``conditions``, and when the budget is more than twice as large as before.
        """
        note = self.folder / f".{self.name}.plan.json"
        limit = None if self.budget_seconds == math.inf else self.budget_seconds
        kept = remembered(note, conditions, lambda: {"budget_seconds": limit, "plan": make()}, fresh=fresh)
        # a little more budget must not change what is measured: no earlier answer would count
        if (before := kept["budget_seconds"]) is not None and self.budget_seconds > 2 * before:
            return self.plan(conditions, make, fresh=True)
        return dict(kept["plan"])

    def path(self, name: str) -> Path:
        """The path of a file that other code writes; the seal covers it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.add(path)

    def add(self, path: str | Path) -> Path:
        """Cover a file of the run's folder with this stage's seal, and return its path."""
        name = Path(path).resolve().relative_to(self.folder.resolve()).as_posix()
        if name not in self._files:
            self._files[name] = None
            with self._record.open("a", encoding="utf-8") as record:
                record.write(name + "\n")
        return Path(path)

    def table(self, name: str, table: pd.DataFrame, *, index: bool = False) -> Path:
        """Write a frame as ``<name>.csv`` and seal it."""
        return write_table(self.path(f"{name}.csv"), table, index=index)

    def figure(self, name: str, ax: Axes | str) -> Image | Markdown:
        """Save the figure of ``ax`` as ``<name>.png`` and ``.svg``, close it, and return it for display.

        Its title is read aloud where nobody sees it. A text in place of a figure says why there is nothing to
        draw, and is returned for display.
        """
        from IPython.display import Image, Markdown

        if isinstance(ax, str):
            return Markdown(markdown(ax))
        from matplotlib.pyplot import close

        from dfqs_nb.core.figures import save

        for suffix in ("svg", "png"):
            save(ax, path := self.path(f"{name}.{suffix}"))
        close(ax.figure.canvas.figure)
        return Image(path.read_bytes(), metadata={"alt": ax.get_title(loc="left") or ax.get_title()})

    def positive(self, **counts: float) -> None:
        """Reject parameters below 1, with a StageError, before anything is loaded."""
        for name, value in counts.items():
            if value < 1:
                raise StageError(f"the parameter {name} is {value:g}", hint=f"give {name}=1 or more")

    @cached_property
    def model(self) -> dict[str, Any]:
        """The model that notebook 01 handed on: ``name``, ``path``, ``nbytes`` and ``sha256``."""
        return dict(read_stage(self.folder, "merge")["model"])

    def finish(self, *, conditions: Mapping[str, Any], summary: list[str], **facts: Any) -> Path:
        """Write ``<stage>.json`` for the next notebooks, the report and (``summary``) the end of a run.

        It also holds the SHA-256 of each file that the stage wrote, and one of its own content, the ``seal``.
        It catches accidents, not forgers.
        """
        missing = [f"not measured in full: {'; '.join(map(str, self.left_out))}"] if self.left_out else []
        content = {"stage": self.name, "conditions": conditions, "summary": [*summary, *missing], **facts}
        if self.budget_seconds < math.inf:
            seconds = round(time.monotonic() - self._started, 1)
            content["budget"] = {"seconds": self.budget_seconds, "used_seconds": seconds}
            content["left_out"] = [row._asdict() for row in self.left_out]
        # JSON has no NaN and no infinity: null
        content = json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)
        content["files"] = {
            name: sha256_of_file(self.folder / name)
            for name in self._files
            if not name.endswith(UNSEALED) and (self.folder / name).is_file()
        }
        path = write_json(self.folder / f"{self.name}.json", {**content, "seal": canonical_sha256(content)})
        self._record.unlink(missing_ok=True)  # of the disk alone: who finishes again seals the same files
        return path


@dataclass(frozen=True)
class Fitted:
    """A plan cut to a time limit: its numbers, its seconds and those uncut, a sentence for each cut."""

    values: dict[str, int]
    seconds: float
    full_seconds: float
    left_out: tuple[str, ...] = ()


def fit(
    plan: Mapping[str, int],
    cuts: Sequence[Mapping[str, int]],
    cost: Callable[[dict[str, int]], float],
    seconds: float,
    names: Mapping[str, str] | None = None,
) -> Fitted:
    """Cut a plan step by step until it takes at most these seconds; after the last cut it may take more.

    ``cuts``, in order: each holds upper limits of some numbers. ``cost``: the seconds that such numbers take.
    ``names``: of the numbers, for people.
    """
    values, names = dict(plan), names or {}
    for cut in ({}, *cuts):
        values |= {name: min(value, values[name]) for name, value in cut.items()}
        if cost(values) <= seconds:
            break
    left_out = tuple(
        f"{counted(value, names.get(name, name))} in place of {plan[name]:,}"
        for name, value in values.items()
        if value < plan[name]
    )
    return Fitted(values, cost(values), cost(dict(plan)), left_out)


def read_stage(folder: str | Path, stage: str, *, sealed: bool = False) -> dict[str, Any]:
    """Read the ``<stage>.json`` that an earlier notebook wrote; ``sealed``: check its seal, too.

    A `StageError` that it is missing, damaged or edited names the notebook to run.
    """
    path, again = Path(folder) / f"{stage}.json", f"run {NOTEBOOKS[stage]} again"
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise StageError("missing", where=tilde(path), hint=f"run {NOTEBOOKS[stage]} first") from None
    except (OSError, ValueError) as error:
        raise StageError(f"cannot be read ({error})", where=tilde(path), hint=again) from error
    if not isinstance(content, dict) or content.get("stage") != stage:
        raise StageError(f"not the stage {stage!r}", where=tilde(path), hint=again)
    if not sealed:
        return content
    unsealed, files = {key: value for key, value in content.items() if key != "seal"}, content.get("files")
    if canonical_sha256(unsealed) != content.get("seal") or not isinstance(files, dict):
        raise StageError("was edited after it was written", where=tilde(path), hint=again)
    for name, then in files.items():
        if not is_file(file := path.parent / name) or sha256_of_file(file) != then:
            what = f"is missing, or was changed after {path.name} was written"
            raise StageError(what, where=tilde(file), hint=again)
    return content
