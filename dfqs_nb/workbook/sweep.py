"""Run the workbook for many models and settings, from a table, and end in a leaderboard.

Each row runs the notebooks in a process of its own, so a crash fails one row. A journal keeps what is done,
so the same command resumes a killed sweep. Rows run here one by one, or on the workers of a Dask cluster.
"""

from __future__ import annotations

import csv
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any, NamedTuple

from dfqs_nb import __version__
from dfqs_nb.core import child
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import is_file, write_table
from dfqs_nb.core.journal import Journal, conditions_hash
from dfqs_nb.core.paths import run_dir, tilde
from dfqs_nb.gguf import models as registry
from dfqs_nb.workbook import run as workbook

JOURNAL, FORMAT = "sweep.jsonl", {"format": "dfqs-sweep/2"}
CONNECT_SECONDS, NO_WORKER_SECONDS = 20.0, 60.0  # for a scheduler to answer; without a single worker
Answer = dict[str, Any]
Tell = Callable[[str], object]


class Row(NamedTuple):
    """A line of the table: one run. ``key`` hashes all that its result depends on."""

    line: int
    model: str
    run: str
    parameters: dict[str, Any]
    key: str


def read_rows(path: Path, notebooks: list[Path]) -> list[Row]:
    """The rows of a CSV file whose columns are ``model``, ``run`` and parameters of the notebooks.

    Without ``run`` the name comes from the model. An empty cell is the notebook's default. A relative path is
    looked for beside the CSV file. `DfqsError`: what is wrong, and in which line.
    """
    hint = "give a CSV file in UTF-8, with commas: a header with a column model, no column twice, a row a run"
    if not path.is_file():
        raise DfqsError("no such file, or not a regular file", where=tilde(path), hint=hint)
    types = {name: kind for name, kind in workbook.parameter_types(notebooks).items() if name != "run_name"}
    rows, line = list[Row](), 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            if "model" not in header or len(set(header)) < len(header):
                raise DfqsError(f"the columns are {', '.join(header)}", hint=hint)
            for cells in filter(any, reader):
                line = reader.line_num
                if len(cells) != len(header):
                    raise DfqsError(f"has {len(cells)} cells, and the header has {len(header)}")
                texts = dict(zip(header, map(str.strip, cells), strict=True))
                rows.append(_row(line, texts, path.parent, types, notebooks))
                if twin := next((row.line for row in rows[:-1] if row.run == rows[-1].run), 0):
                    what = f"has the run name {rows[-1].run!r}, as line {twin}"
                    raise DfqsError(what, hint="fill the column run")
            if not rows:
                raise DfqsError("has no rows", hint=hint)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DfqsError(f"cannot be read ({error})", where=tilde(path), hint=hint) from error
    except DfqsError as error:
        what = f"nothing was run: line {line}: {error.what}"
        raise DfqsError(what, where=tilde(path), hint=error.hint) from None
    return rows


def _row(line: int, texts: dict[str, str], base: Path, types: dict[str, str], notebooks: list[Path]) -> Row:
    """A row; its model is a name, an address, or an absolute path. Another file is another model."""
    model, known, stat = texts.pop("model"), registry.registered(), None
    if model not in known and not (model.startswith("hf://") and registry.parse_address(model)):
        path = (base / Path(model).expanduser()).absolute()  # links stay: a shard's name is the link's
        if not model or not is_file(path):
            what = f"no model {model!r} beside the table, and no registered name"
            raise DfqsError(what if model else "the cell model is empty", hint=f"known: {', '.join(known)}")
        model, stat = str(path), path.stat()
    run = texts.pop("run", "") or workbook.default_run_name(model)
    if Path(run).name != run or run.startswith("."):
        raise DfqsError(f"{run!r} is not a run name", hint="use one plain folder name")
    values = workbook.parse_parameters({name: text for name, text in texts.items() if text}, types)
    made: dict[str, Any] = {"model": model, "file": stat and (stat.st_size, stat.st_mtime_ns), "run": run}
    made["parameters"] = values
    made |= {"notebooks": [notebook.stem for notebook in notebooks], "version": __version__}
    return Row(line, model, run, values, conditions_hash(made))


def sweep(table: Path, *, scheduler: str, name: str, notebooks: list[Path], fresh: bool, tell: Tell) -> Any:
    """Run every row of a table (`read_rows`) that is not done yet, rank the reports, and return the rows.

    The frame has ``line``, ``run``, ``model``, ``status`` (``done``, ``failed``, ``not run``), ``reason``,
    ``host`` and ``seconds``. The workers of ``scheduler`` (Dask) must see the same files under the same
    paths; without one, rows run here.
    """
    import pandas as pd

    from dfqs_nb import report

    rows = read_rows(table, notebooks)
    folder = run_dir(name or f"sweep-{table.stem}").absolute()
    job: Answer = {"fresh": fresh, "outputs": str(folder), "notebooks": list(map(str, notebooks))}
    with workbook.alone(folder):
        journal = Journal(folder / JOURNAL, FORMAT, fresh=fresh, fields={"status": str})
        done = {row["id"] for row in journal.rows() if row["status"] == "done"}
        todo = [row for row in rows if not (row.key in done and (folder / row.run / "summary.md").exists())]
        answered = _on_cluster(scheduler, todo, job, tell) if scheduler and todo else _here(todo, job, tell)
        for row, answer in answered:
            journal.add(row.key, run=row.run, model=row.model, parameters=row.parameters, **answer)
            tell(f"{row.run}: {answer['status']} {answer['reason']}".rstrip())
    nothing: Answer = {"status": "not run", "reason": "", "host": "", "seconds": 0.0}
    answers = {row["id"]: row for row in journal.rows()}
    told = pd.DataFrame([answers.get(row.key, nothing) for row in rows], columns=list(nothing))
    ranked = pd.DataFrame(rows)[["line", "run", "model"]].join(told)
    write_table(folder / "sweep.csv", ranked, index=False)
    report.leaderboard(folder).write()
    tell(f"wrote sweep.csv, leaderboard.csv and leaderboard.md to {tilde(folder)}/")
    return ranked


def _here(todo: Sequence[Row], job: Answer, tell: Tell) -> Iterator[tuple[Row, Answer]]:
    for row in todo:
        tell(f"{row.run} ({row.model}) ...")
        yield row, run_row({**job, **row._asdict()})


def run_row(job: Answer) -> Answer:
    """Run the workbook in a child process, whose output goes to ``sweep.log``; what became of it."""
    folder, begin, reason = Path(job["outputs"]) / job["run"], time.monotonic(), ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "sweep.log").open("w+b") as log:
            child.run("dfqs_nb.workbook.sweep", job, log=log)
    except child.ChildDied as error:
        reason = f"the row's process died ({error.cause}); see {tilde(folder)}/sweep.log"
    except (DfqsError, OSError) as error:
        reason = str(error)
    answer = {"status": "failed" if reason else "done", "reason": reason, "host": platform.node()}
    return answer | {"seconds": round(time.monotonic() - begin, 1), "folder": str(folder)}


def _work(job: Answer) -> None:
    """The row's process: run the notebooks, with the parameters that they declare."""
    os.environ["DFQS_OUTPUTS"] = job["outputs"]
    notebooks = [Path(path) for path in job["notebooks"]]
    parameters = {"model": job["model"], **job["parameters"]}
    with workbook.alone(Path(job["outputs"]) / job["run"], 20.0):
        pass  # the process of a row whose sweep was killed needs some seconds to end
    workbook.run_workbook(job["run"], parameters, notebooks, fresh=job["fresh"])


def _on_cluster(address: str, todo: Sequence[Row], job: Answer, tell: Tell) -> Iterator[tuple[Row, Answer]]:
    """Rows on the workers of a Dask cluster, through its ``concurrent.futures`` interface."""
    try:
        from distributed import Client

        client = Client(address, timeout=CONNECT_SECONDS)
    except ImportError:
        raise DfqsError("a cluster needs dask.distributed", hint="`pip install -e '.[sweep]'`") from None
    except (OSError, ValueError, TypeError) as error:
        raise DfqsError("no Dask scheduler answers", where=address, hint="start `dask scheduler`") from error
    under_way = dict[Future[Answer], Row]()
    with client:
        pool = client.get_executor(pure=False, retries=0)
        for row in todo:
            tell(f"{row.run} ({row.model}) ...")
            under_way[pool.submit(run_row, {**job, **row._asdict()})] = row
        while under_way:
            try:
                client.wait_for_workers(1, timeout=NO_WORKER_SECONDS)  # returns at once where there is one
            except TimeoutError:
                hint = f"start `dask worker {address}`; then the same command resumes the sweep"
                raise DfqsError("the scheduler has no worker", where=address, hint=hint) from None
            for future in wait(under_way, timeout=2.0, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(future), answer_of(future)


def answer_of(future: Future[Answer]) -> Answer:
    """A row's answer; a lost worker, or a worker without this package, is the row's failure."""
    try:
        answer = future.result()
    except Exception as error:  # whatever a cluster raises, it is one row's
        return {"status": "failed", "reason": f"{type(error).__name__}: {workbook.last_line(str(error))}"}
    if answer["status"] == "done" and not Path(answer["folder"]).is_dir():
        reason = f"{answer['folder']} on {answer['host']} is not visible here"
        answer |= {"status": "failed", "reason": reason}
    return answer


if __name__ == "__main__":
    child.serve(_work)
