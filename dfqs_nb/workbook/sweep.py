"""Run the workbook for many models and settings, from a table, and end in a leaderboard.

Every row is one run of the notebooks in a process of its own, so whatever ends that process fails one row. A
journal keeps the finished rows, so the same command resumes a killed sweep. Rows run on this machine, or on
the workers of a Dask cluster (https://distributed.dask.org) that see the same files.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_any
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from dfqs_nb import __version__
from dfqs_nb.core import child
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import write_json, write_table
from dfqs_nb.core.journal import Journal, holds
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.core.paths import run_dir, tilde
from dfqs_nb.workbook import run as workbook
from dfqs_nb.workbook.sweep_table import Row, SweepError, read_rows

if TYPE_CHECKING:
    import pandas as pd

    from dfqs_nb.report.board import Leaderboard

JOURNAL = "sweep.jsonl"
FORMAT = {"format": "dfqs-sweep/1"}
ROW_FILE = "sweep_row.json"  # in a run's folder: when and where it ran, and beside which other rows
LOG = "sweep.log"
CONNECT_SECONDS = 20.0  # for a scheduler to answer
NO_WORKER_SECONDS = 60.0  # without a single worker, after which a sweep gives up
GRACE_SECONDS = 15.0  # that a row's process has for ending its kernel

Answer = dict[str, Any]
ANSWER = {"status": str, "reason": str, "started": float, "ended": float, "host": str, "folder": str}


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Attributes:
        folder: holds a folder for each run, ``sweep.jsonl`` (the journal), ``sweep.csv`` and the leaderboard.
        rows: one row a line of the table; ``status`` is ``done``, ``failed`` or ``not run``, ``beside`` the
            runs that shared its machine for a time, ``now`` whether this sweep ran it.
    """

    folder: Path
    rows: pd.DataFrame
    leaderboard: Leaderboard

    @property
    def n_failed(self) -> int:
        """Rows that are not done."""
        return int((self.rows["status"] != "done").sum())


def sweep(
    table: str | Path,
    *,
    jobs: int | None = None,
    scheduler: str = "",
    name: str = "",
    notebooks: Sequence[Path] | None = None,
    fresh: bool = False,
    started: Callable[[Row], object] = lambda row: None,
    finished: Callable[[Row, Answer], object] = lambda row, answer: None,
) -> SweepResult:
    """Run every row of a table that is not done yet, then rank what there is.

    A row that failed is tried again by the next sweep. A worker that is lost is Dask's to replace: the row
    goes to another, until the scheduler's ``allowed-failures`` (3 by default) are used up.

    Args:
        table: see `sweep_table.read_rows`.
        jobs: rows at once; by default 1 here, and as many as there are workers on a cluster.
        scheduler: the address of a Dask scheduler (``tcp://host:8786``) whose workers have this package and
            see the models and the outputs under the same paths; without it, rows run on this machine.
        name: the folder under ``outputs/`` that receives all (default: ``sweep-`` and the table's name).
        fresh: forget the journal, and hand ``fresh`` on to the notebooks.
        started, finished: called when a row is handed out, and with its answer (see `run_row`).

    Raises:
        SweepError: the table is refused, another sweep works in the folder, or there is no such cluster.
    """
    rows = read_rows(table, notebooks)
    if jobs is not None and jobs < 1:
        raise SweepError(f"{jobs} rows at once", hint="give --jobs 1 or more")
    folder = run_dir(name or f"sweep-{Path(table).stem}").absolute()
    with ExitStack() as stack:
        stack.enter_context(alone(folder))
        journal = Journal(folder / JOURNAL, FORMAT, fresh=fresh, whole=lambda row: holds(row, ANSWER))
        done = {row.key for row in rows if row.key in journal and journal[row.key]["status"] == "done"}
        todo = [row for row in rows if not (row.key in done and (folder / row.run / "summary.md").exists())]
        work = [(row, _job(row, folder, notebooks, fresh)) for row in todo]
        pool, at_once, check = stack.enter_context(_cluster(scheduler) if scheduler and todo else _here(jobs))
        for row, answer in _answers(pool, work, jobs or at_once, started, check):
            journal.add(row.key, run=row.run, model=row.model, parameters=row.parameters, **answer)
            finished(row, answer)
    return _result(rows, {row.key for row in todo}, journal, folder)


def crowding(rows: Sequence[Row], jobs: int) -> str:
    """What running ``jobs`` rows at once on this machine does to their timings; empty for one at a time."""
    if min(jobs, len(rows)) < 2:
        return ""
    many = f"{min(jobs, len(rows))} rows at once on {usable_cores()} core(s). Scores do not depend on it."
    return f"{many} Speeds do, and are marked as contended: for speeds, use --jobs 1."


def _job(row: Row, folder: Path, notebooks: Sequence[Path] | None, fresh: bool) -> dict[str, Any]:
    paths = workbook.find_notebooks() if notebooks is None else notebooks
    return {
        "run": row.run,
        "parameters": {"model": row.model, **row.parameters},
        "fresh": fresh,
        "outputs": str(folder),
        "version": __version__,
        "notebooks": [str(Path(path).absolute()) for path in paths],
    }


@contextmanager
def alone(folder: Path, seconds: float = 0.0) -> Iterator[None]:
    """Refuse a second process at work in a folder, after waiting some seconds for it."""
    try:
        with FileLock(folder / ".sweep.lock", timeout=seconds):
            yield
    except Timeout:
        hint = "wait for it, or give --name"
        raise SweepError("another sweep is at work in this folder", where=tilde(folder), hint=hint) from None


# ---- one row, in a process of its own ----


def run_row(job: dict[str, Any]) -> Answer:
    """Run the workbook in a child process and say what became of it.

    Returns ``status`` (``done`` or ``failed``), ``reason``, ``started`` and ``ended`` (seconds of the epoch),
    ``host`` and ``folder``. What the child printed is in ``sweep.log`` of the run's folder.
    """
    folder, begin = Path(job["outputs"]) / job["run"], round(time.time(), 3)
    try:
        if job["version"] != __version__:
            raise SweepError(f"the worker has version {__version__}, the sweep {job['version']}")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("w+b") as log:
            child.run("dfqs_nb.workbook.sweep", job, log=log)
        status, reason = "done", ""
    except child.ChildDied as error:
        status, reason = "failed", f"the row's process died ({error.cause}); see {tilde(folder / LOG)}"
    except (DfqsError, OSError) as error:
        status, reason = "failed", str(error)
    times = {"started": begin, "ended": round(time.time(), 3)}
    return {"status": status, "reason": reason, **times, "host": platform.node(), "folder": str(folder)}


def _work(job: dict[str, Any]) -> None:
    """The row's process: the notebooks, those parameters that they declare, and errors as they come."""
    os.environ["DFQS_OUTPUTS"] = job["outputs"]
    notebooks = [Path(path) for path in job["notebooks"]]
    declared = workbook.parameter_types(notebooks)
    parameters = {n: value for n, value in job["parameters"].items() if n in declared or n != "model"}
    # one that lost its parent needs a moment to end
    with alone(Path(job["outputs"]) / job["run"], GRACE_SECONDS + 5):
        workbook.run_workbook(job["run"], parameters, notebooks, fresh=job["fresh"])


# ---- where rows run ----

Place = tuple[Executor, int, Callable[[], object]]


def _answers(
    pool: Executor,
    work: Sequence[tuple[Row, dict[str, Any]]],
    at_once: int,
    started: Callable[[Row], object],
    check: Callable[[], object],
) -> Iterator[tuple[Row, Answer]]:
    """Hand rows out, ``at_once`` at a time, and give each answer as it comes."""
    waiting = list(reversed(work))
    under_way: dict[Future[Answer], Row] = {}
    while waiting or under_way:
        while waiting and len(under_way) < at_once:
            row, job = waiting.pop()
            started(row)
            under_way[pool.submit(run_row, job)] = row
        for future in wait_for_any(under_way, timeout=2.0, return_when=FIRST_COMPLETED).done:
            yield under_way.pop(future), answer_of(future)
        check()


@contextmanager
def _here(jobs: int | None) -> Iterator[Place]:
    """Rows in processes of this machine; they end with this process."""
    with ThreadPoolExecutor(jobs or 1) as pool:
        try:
            yield pool, 1, lambda: None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            child.end_all()
            raise


@contextmanager
def _cluster(address: str) -> Iterator[Place]:
    """Rows on the workers of a Dask cluster, through its ``concurrent.futures`` interface."""
    try:
        from distributed import Client
    except ImportError:
        hint = "`pip install -e '.[sweep]'`, or leave out --scheduler"
        raise SweepError("running on a cluster needs dask.distributed", hint=hint) from None
    try:
        client = Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, TypeError) as error:
        what = f"no Dask scheduler answers ({workbook.last_line(str(error))})"
        hint = "start one with `dask scheduler`, workers with `dask worker`"
        raise SweepError(what, where=address, hint=hint) from error

    last_seen = time.monotonic()

    def check() -> int:
        """Count the workers."""
        nonlocal last_seen
        n_workers = len(client.scheduler_info(n_workers=-1)["workers"])
        last_seen = time.monotonic() if n_workers else last_seen
        if time.monotonic() - last_seen > NO_WORKER_SECONDS:
            what = f"no worker for {NO_WORKER_SECONDS:.0f} s"
            hint = "start workers; the same command goes on where this one stopped"
            raise SweepError(what, where=address, hint=hint)
        return n_workers

    with client:
        try:
            client.wait_for_workers(1, timeout=NO_WORKER_SECONDS)
        except TimeoutError:
            hint = f"start one: `dask worker {address}`"
            raise SweepError("the scheduler has no worker", where=address, hint=hint) from None
        yield client.get_executor(pure=False, retries=0), check(), check


def answer_of(future: Future[Answer]) -> Answer:
    """What a row's future holds; a lost worker, or a worker without this package, is the row's failure."""
    try:
        answer = future.result()
    except Exception as error:  # whatever a cluster raises, it is one row's
        now, reason = round(time.time(), 3), f"{type(error).__name__}: {workbook.last_line(str(error))}"
        return {"status": "failed", "reason": reason, "started": now, "ended": now, "host": "", "folder": ""}
    if answer["status"] == "done" and not Path(answer["folder"]).is_dir():
        reason = f"done on {answer['host']}, but {answer['folder']} is not visible here"
        return {**answer, "status": "failed", "reason": reason}
    return answer


# ---- what comes of it ----


def beside(answers: Mapping[str, Answer]) -> dict[str, list[str]]:
    """For each run, the other runs that were under way on its host at the same time."""

    def overlap(a: Answer, b: Answer) -> bool:
        return bool(a["host"] == b["host"] and a["started"] < b["ended"] and b["started"] < a["ended"])

    return {
        run: [other for other, b in answers.items() if other != run and overlap(a, b)]
        for run, a in answers.items()
    }


def _result(rows: Sequence[Row], ran_now: set[str], journal: Journal, folder: Path) -> SweepResult:
    import pandas as pd

    from dfqs_nb import report

    answers = {row.run: journal[row.key] for row in rows if row.key in journal}
    shared, records = beside(answers), []
    nothing: Answer = {"status": "not run", "reason": "", "started": 0.0, "ended": 0.0, "host": ""}
    for row in rows:
        answer = answers.get(row.run, nothing)
        record = {
            "line": row.line,
            "run": row.run,
            "model": row.model,
            "status": answer["status"],
            "reason": answer["reason"],
            "seconds": round(answer["ended"] - answer["started"], 1),
            "host": answer["host"],
            "beside": shared.get(row.run, []),
            "now": row.key in ran_now,
        }
        if (folder / row.run).is_dir():
            write_json(folder / row.run / ROW_FILE, record)
        records.append(record | {"beside": " ".join(record["beside"])})
    table = pd.DataFrame(records)
    write_table(folder / "sweep.csv", table, index=False)
    ranked = report.leaderboard(folder)
    ranked.write()
    return SweepResult(folder, table, ranked)


if __name__ == "__main__":
    child.serve(_work)
