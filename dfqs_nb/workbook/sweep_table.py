"""The table of a sweep: one run of the workbook a line, checked whole before anything runs."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfqs_nb import __version__
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.journal import conditions_hash
from dfqs_nb.core.paths import tilde
from dfqs_nb.gguf import models as registry
from dfqs_nb.workbook import run as workbook

OWN_COLUMNS = ("model", "run")


class SweepError(DfqsError):
    """A table of rows that cannot be run, or a cluster that cannot run it."""


@dataclass(frozen=True)
class Row:
    """A run that the table asks for.

    Attributes:
        line: of the file; the header is line 1.
        model: a registered name, an absolute path, or an ``hf://`` address.
        run: the folder's name, unique in the table.
        parameters: of the notebooks, the model apart; only those that differ from their defaults.
        key: of the model, the parameters, the notebooks and this package's version: what "done" refers to.
    """

    line: int
    model: str
    run: str
    parameters: dict[str, Any] = field(hash=False)
    key: str = ""


def read_rows(path: str | Path, notebooks: Sequence[Path] | None = None) -> list[Row]:
    """The rows of a CSV file whose columns are ``model``, ``run`` and parameters of the notebooks.

    ``run`` may be missing or empty: the name then comes from the model. An empty cell is the notebook's
    default. A relative path is looked for beside the CSV file.

    Raises:
        SweepError: with every fault of the table, each with its line.
    """
    path = Path(path)
    notebooks = list(notebooks) if notebooks is not None else workbook.find_notebooks()
    header, lines = _cells(path)
    types = workbook.parameter_types(notebooks)
    faults, rows = _column_faults(header, types), []
    made = {"notebooks": [notebook.stem for notebook in notebooks], "version": __version__}
    for line, cells in [] if faults else lines:
        try:
            rows.append(_row(line, header, cells, types, path.parent, made))
        except DfqsError as error:
            faults.append(f"line {line}: {error}")
    for run, n in Counter(row.run for row in rows).items():
        if n > 1:
            named = ", ".join(str(row.line) for row in rows if row.run == run)
            faults.append(f"lines {named}: all have the run name {run!r}; name each in the column run")
    if faults:
        raise SweepError("nothing was run: " + " | ".join(faults), where=tilde(path))
    return rows


def _cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each line that is not blank with its number."""
    hint = "give a CSV file with a column model"
    if path.exists() and not path.is_file():
        raise SweepError("not a regular file", where=tilde(path), hint=hint)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except OSError as error:
        raise SweepError(f"cannot be read ({error.strerror})", where=tilde(path), hint=hint) from error
    except (UnicodeDecodeError, csv.Error) as error:
        hint = "save the table as comma-separated values"
        raise SweepError(f"not a CSV file in UTF-8 ({error})", where=tilde(path), hint=hint) from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if len(lines) < 2:
        hint = "write a header with model, then a line for each run"
        raise SweepError("has no rows", where=tilde(path), hint=hint)
    return lines[0][1], lines[1:]


def _column_faults(header: Sequence[str], types: Mapping[str, str]) -> list[str]:
    faults = [f"line 1: two columns are called {name!r}" for name, n in Counter(header).items() if n > 1]
    if "model" not in header:
        faults.append("line 1: there is no column 'model'")
    if "run_name" in header:
        faults.append("line 1: the folder's name has the column 'run', not 'run_name'")
    try:
        workbook.check_parameters({*header} - {"run_name"}, {*OWN_COLUMNS, *types} - {"run_name"})
    except DfqsError as error:
        faults.append(f"line 1: {error}")
    return faults


def _row(
    line: int, header: list[str], cells: list[str], types: Mapping[str, str], base: Path, made: dict[str, Any]
) -> Row:
    if len(cells) != len(header):
        raise SweepError(f"{len(cells)} cells, and the header has {len(header)}")
    texts = dict(zip(header, cells, strict=True))
    model = _model(texts.pop("model"), base)
    run = texts.pop("run", "") or workbook.default_run_name(model)
    if Path(run).name != run or run.startswith("."):
        raise SweepError(f"{run!r} is not a run name", hint="use one plain folder name")
    parameters = {name: workbook.parse_value(name, text, types[name]) for name, text in texts.items() if text}
    own = {"model": model, "files": _files(model), "run": run, "parameters": parameters}
    return Row(line, model, run, parameters, conditions_hash({**own, **made}))


def _model(text: str, base: Path) -> str:
    """The model as a run is given it: a path made absolute, everything else as it stands."""
    if not text:
        raise SweepError("the cell model is empty", hint="give a registered name, a path, or hf://...")
    known = registry.registered()
    if text.startswith("hf://"):
        registry.parse_address(text)
        return text
    if text in known:
        if not known[text].source.startswith("hf://"):
            registry.resolve(text)
        return text
    path = (base / Path(text).expanduser()).absolute()  # links stay: a shard's name is the link's
    if not path.exists():
        what = f"no model {text!r}: no such file beside the table, and no registered name"
        raise SweepError(what, hint=f"registered: {', '.join(known)}")
    lacking = [name for name in registry.siblings(path.name) if not (path.parent / name).exists()]
    if lacking:
        raise SweepError(f"the shards {', '.join(lacking)} of {text!r} are missing")
    return str(path)


def _files(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a local model's files: another file of that name is another model."""
    path = Path(model)
    if not path.is_absolute():
        return []
    shards = [path.parent / name for name in registry.siblings(path.name)]
    files = sorted(path.glob("*.gguf")) if path.is_dir() else shards
    return [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
