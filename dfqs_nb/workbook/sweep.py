"""Run the workbook for many models and settings, from a table, and end in a leaderboard.

Every row is one run of the notebooks in a process of its own, so whatever ends that process fails one row. A
journal keeps what is done; a sweep that is killed goes on with the same command. Rows run on this machine, or
on the workers of a Dask cluster (https://distributed.dask.org) that see the same files.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_any
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb import __version__
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import write_json, write_table
from dfqs_nb.core.journal import Journal, conditions_hash
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.core.paths import run_dir, tilde
from dfqs_nb.gguf import hub
from dfqs_nb.gguf import models as registry
from dfqs_nb.workbook import run as workbook

if TYPE_CHECKING:
    import pandas as pd

JOURNAL = "sweep.jsonl"
FORMAT = {"format": "dfqs-sweep/1"}
ROW_FILE = "sweep_row.json"  # in a run's folder: when and where it ran, and beside which other rows
ATTEMPTS = "sweep_attempts.jsonl"  # in a run's folder: a line when a row begins, and one when it ends
LOG = "sweep.log"
OWN_COLUMNS = ("model", "run")
CONNECT_SECONDS = 20.0  # for a scheduler to answer
NO_WORKER_SECONDS = 60.0  # without a single worker, after which a sweep gives up
GRACE_SECONDS = 15.0  # that a row's process has for ending its kernel
EXIT_ORPHAN = 70


class SweepError(DfqsError):
    """A table of rows that cannot be run, or a cluster that cannot run it."""


# ---- the table ----


@dataclass(frozen=True)
class Row:
    """One run that the table asks for.

    Attributes:
        line: of the file, counted from 1; the header is line 1.
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
        SweepError: with every fault found, each with its line.
    """
    path = Path(path)
    notebooks = list(notebooks) if notebooks is not None else workbook.find_notebooks()
    header, lines = _cells(path)
    types = {
        name: one["inferred_type_name"]
        for notebook in notebooks
        for name, one in workbook.declared_parameters(notebook).items()
    }
    faults = _column_faults(header, types)
    if faults:
        raise _refused(path, faults)
    rows: list[Row] = []
    for line, cells in lines:
        try:
            rows.append(_row(line, _named(header, cells), types, path.parent, notebooks))
        except DfqsError as error:
            faults.append(f"line {line}: {error}")
    faults += _twice(rows)
    if faults:
        raise _refused(path, faults)
    return rows


def _cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each line that is not blank with its number."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except OSError as error:
        raise SweepError(
            f"cannot be read ({error.strerror})",
            where=tilde(path),
            hint="give a CSV file with a column model",
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise SweepError(
            f"not a CSV file in UTF-8 ({error})",
            where=tilde(path),
            hint="save the table as comma-separated values",
        ) from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if len(lines) < 2:
        raise SweepError(
            "has no rows", where=tilde(path), hint="a header with model, then a line for each run"
        )
    return lines[0][1], lines[1:]


def _column_faults(header: Sequence[str], types: Mapping[str, str]) -> list[str]:
    faults = [f"line 1: two columns are called {name!r}" for name, n in Counter(header).items() if n > 1]
    if "model" not in header:
        faults.append("line 1: there is no column 'model'")
    if "run_name" in header:
        faults.append("line 1: the folder's name has the column 'run', not 'run_name'")
    known = {*OWN_COLUMNS, *types} - {"run_name"}
    unknown = [name for name in header if name not in known and name != "run_name"]
    if unknown:
        named = ", ".join(map(repr, unknown))
        faults.append(f"line 1: no notebook has a parameter {named} (known: {', '.join(sorted(known))})")
    return faults


def _named(header: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise SweepError(f"{len(cells)} cells, and the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def _row(
    line: int, cells: dict[str, str], types: Mapping[str, str], base: Path, notebooks: Sequence[Path]
) -> Row:
    model = _model(cells.pop("model"), base)
    run = cells.pop("run", "") or workbook.default_run_name(model)
    if Path(run).name != run or run.startswith("."):
        raise SweepError(f"{run!r} is not a run name", hint="use one plain folder name")
    parameters = {name: workbook.parse_value(name, text, types[name]) for name, text in cells.items() if text}
    parts = {
        "model": model,
        "files": _files(model),
        "run": run,
        "parameters": parameters,
        "notebooks": [one.stem for one in notebooks],
        "version": __version__,
    }
    return Row(line, model, run, parameters, conditions_hash(parts))


def _model(text: str, base: Path) -> str:
    """The model as a run is given it: a path made absolute, everything else as it stands."""
    if not text:
        raise SweepError(
            "the cell model is empty", hint="give a registered name, a path, or an hf:// address"
        )
    if text.startswith("hf://"):
        hub.parse_address(text)
        return text
    known = registry.models()
    if text in known:
        if not known[text].source.startswith("hf://"):
            registry.resolve(text)
        return text
    path = (base / Path(text).expanduser()).resolve()
    lacking = [name for name in registry.siblings(path.name) if not (path.parent / name).exists()]
    if path.exists() and lacking:
        raise SweepError(f"the shards {', '.join(lacking)} of {text!r} are missing")
    if not path.exists():
        raise SweepError(
            f"no model {text!r}: no such file beside the table, and no registered name",
            hint=f"registered: {', '.join(known)}",
        )
    return str(path)


def _files(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a local model's files: another file under the name is another
    model."""
    path = Path(model)
    if not path.is_absolute():
        return []
    paths = (
        sorted(path.glob("*.gguf"))
        if path.is_dir()
        else [path.parent / n for n in registry.siblings(path.name)]
    )
    return [(one.name, (facts := one.stat()).st_size, facts.st_mtime_ns) for one in paths if one.exists()]


def _twice(rows: Sequence[Row]) -> list[str]:
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(row.run, []).append(row.line)
    return [
        f"lines {', '.join(map(str, lines))}: all have the run name {run!r}; name each in the column run"
        for run, lines in found.items()
        if len(lines) > 1
    ]


def _refused(path: Path, faults: Sequence[str]) -> SweepError:
    return SweepError("nothing was run: " + " | ".join(faults), where=tilde(path))


# ---- the sweep ----


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Attributes:
        folder: holds a folder for each run, ``sweep.jsonl`` (the journal), ``sweep.csv`` and the leaderboard.
        rows: one row a line of the table: ``line``, ``run``, ``model``, ``status`` (``done``, ``failed`` or
            ``not run``), ``reason``, ``seconds``, ``host``, ``beside`` (runs that shared its machine for a
            time) and ``now`` (whether this sweep ran it, or an earlier one).
        leaderboard: see ``leaderboard.leaderboard``.
    """

    folder: Path
    rows: pd.DataFrame
    leaderboard: pd.DataFrame

    @property
    def n_failed(self) -> int:
        """Rows that are not done."""
        return int((self.rows["status"] != "done").sum())


Finished = Callable[[Row, dict[str, Any]], None]


def sweep(
    table: str | Path,
    *,
    jobs: int | None = None,
    scheduler: str | None = None,
    name: str | None = None,
    notebooks: Sequence[Path] | None = None,
    fresh: bool = False,
    started: Callable[[Row], None] = lambda row: None,
    finished: Finished = lambda row, answer: None,
) -> SweepResult:
    """Run every row of a table that is not done yet, then rank what there is.

    Args:
        table: see ``read_rows``.
        jobs: rows at once; by default 1 here, and as many as there are workers on a cluster.
        scheduler: the address of a Dask scheduler (``tcp://host:8786``) whose workers have this package and
            see the models and the outputs under the same paths; without it, rows run on this machine.
        name: the folder under ``outputs/`` that receives all (default: ``sweep-`` and the table's name).
        notebooks: which; all of the workbook by default.
        fresh: forget the journal, and hand ``fresh`` on to the notebooks.
        started, finished: called when a row is handed out, and with its answer (see ``run_row``).

    A row that failed is tried again by the next sweep. A worker that is lost is Dask's to replace: the row
    goes to another, until the scheduler's ``allowed-failures`` (3 by default) are used up.

    Raises:
        SweepError: the table is refused, another sweep works in the folder, or there is no such cluster.
    """
    rows = read_rows(table, notebooks)
    if jobs is not None and jobs < 1:
        raise SweepError(f"{jobs} rows at once", hint="give --jobs 1 or more")
    folder = run_dir(name or f"sweep-{Path(table).stem}").resolve()
    with _alone(folder):
        journal = Journal(folder / JOURNAL, FORMAT, fresh=fresh)
        todo = [row for row in rows if not _is_done(row, journal, folder)]
        work = [(row, _job(row, folder, notebooks, fresh)) for row in todo]
        answers = (
            _on_cluster(work, scheduler, jobs, started) if scheduler else _here(work, jobs or 1, started)
        )
        for row, answer in answers:
            journal.add(row.key, run=row.run, model=row.model, parameters=row.parameters, **answer)
            finished(row, answer)
        return _result(rows, {row.key for row in todo}, journal, folder)


def _is_done(row: Row, journal: Journal, folder: Path) -> bool:
    done = row.key in journal and journal[row.key]["status"] == "done"
    return done and (folder / row.run / "summary.md").exists()


def _job(row: Row, folder: Path, notebooks: Sequence[Path] | None, fresh: bool) -> dict[str, Any]:
    paths = None if notebooks is None else [str(Path(one).resolve()) for one in notebooks]
    return {
        "run": row.run,
        "parameters": {"model": row.model, **row.parameters},
        "fresh": fresh,
        "outputs": str(folder),
        "version": __version__,
        "notebooks": paths,
    }


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse a second sweep in the same folder; no wait."""
    with (folder / ".sweep.lock").open("a") as file:
        if not _lock(file, 0.0):
            raise SweepError(
                "another sweep is at work in this folder",
                where=tilde(folder),
                hint="wait for it, or give --name",
            )
        yield


def _lock(file: Any, seconds: float) -> bool:
    """Lock a file within some seconds; True where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    limit = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= limit:
                return False
            time.sleep(0.1)


# ---- one row, in a process of its own ----


def run_row(job: dict[str, Any], running: set[subprocess.Popen] | None = None) -> dict[str, Any]:
    """Run the workbook in a child process and say what became of it.

    Returns ``status`` (``done`` or ``failed``), ``reason``, ``started`` and ``ended`` (seconds of the epoch),
    ``host`` and ``folder``. What the child printed is in ``sweep.log`` of the run's folder.
    """
    begin, folder = round(time.time(), 3), Path(job["outputs"]) / job["run"]
    if job["version"] != __version__:
        found = {
            "status": "failed",
            "reason": f"the worker has version {__version__}, the sweep {job['version']}",
        }
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _note(folder, started=begin, host=platform.node())
            found = _child_answer(job, folder, running if running is not None else set())
            _note(folder, started=begin, ended=round(time.time(), 3))
        except OSError as error:
            found = {"status": "failed", "reason": f"{folder}: {error.strerror or error}"}
    return {
        **found,
        "started": begin,
        "ended": round(time.time(), 3),
        "host": platform.node(),
        "folder": str(folder),
    }


def _note(folder: Path, **row: Any) -> None:
    with (folder / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _child_answer(job: dict[str, Any], folder: Path, running: set[subprocess.Popen]) -> dict[str, Any]:
    command = [sys.executable, "-m", "dfqs_nb.workbook.sweep"]
    with (folder / LOG).open("wb") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
        running.add(child)
        try:
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.write(json.dumps(job).encode() + b"\n")
                child.stdin.flush()  # and left open: the child ends when it closes
            except BrokenPipeError:
                pass  # the child is gone; its exit status says how
            text = child.stdout.read()
            code = child.wait()
        finally:
            end(child)
            running.discard(child)
    try:
        return json.loads(text)
    except ValueError:
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return {"status": "failed", "reason": f"the row's process died ({how}); see {tilde(folder / LOG)}"}


def end(child: subprocess.Popen) -> None:
    """End a row's process by closing its input, which also ends its kernel; by force if that takes long."""
    if child.stdin is not None and not child.stdin.closed:
        try:
            child.stdin.close()
        except BrokenPipeError:
            pass
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _child() -> None:
    """The row's process: a job on standard input, its answer on standard output, all else into the log."""
    out = os.dup(1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["DFQS_OUTPUTS"] = job["outputs"]
    try:
        answer = _run_job(job)
    except DfqsError as error:
        answer = {"status": "failed", "reason": str(error)}
    except Exception as error:  # the row failed, whatever it was; the log has the traceback
        traceback.print_exc()
        answer = {"status": "failed", "reason": f"{type(error).__name__}: {workbook.last_line(str(error))}"}
    os.write(out, json.dumps(answer).encode())


def _run_job(job: dict[str, Any]) -> dict[str, Any]:
    notebooks = None if job["notebooks"] is None else [Path(one) for one in job["notebooks"]]
    declared = {
        name for path in notebooks or workbook.find_notebooks() for name in workbook.declared_parameters(path)
    }
    parameters = {
        name: value for name, value in job["parameters"].items() if name in declared or name != "model"
    }
    with (Path(job["outputs"]) / job["run"] / ".sweep.lock").open("a") as file:
        if not _lock(file, GRACE_SECONDS + 5):  # one that lost its parent needs a moment to end
            raise SweepError("another process still works in the run's folder", where=tilde(job["run"]))
        workbook.run_workbook(job["run"], parameters, notebooks, fresh=job["fresh"])
    return {"status": "done", "reason": ""}


def _end_with_parent() -> None:
    """Wait until the parent closes our input (or dies), then end the kernel and this process."""
    import psutil

    while sys.stdin.buffer.read(1 << 10):
        pass
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass
    os._exit(EXIT_ORPHAN)


# ---- where rows run ----

Work = Sequence[tuple[Row, dict[str, Any]]]
Answers = Iterator[tuple[Row, dict[str, Any]]]


def _here(work: Work, jobs: int, started: Callable[[Row], None]) -> Answers:
    """Rows in processes of this machine, ``jobs`` at once; whatever ends the sweep ends them too."""
    running: set[subprocess.Popen] = set()
    with ThreadPoolExecutor(jobs) as pool:
        waiting, under_way = list(reversed(work)), {}
        try:
            while waiting or under_way:
                while waiting and len(under_way) < jobs:
                    row, job = waiting.pop()
                    started(row)
                    under_way[pool.submit(run_row, job, running)] = row
                for future in wait_for_any(under_way, return_when=FIRST_COMPLETED).done:
                    yield under_way.pop(future), future.result()
        finally:
            for child in list(running):
                end(child)


def _on_cluster(work: Work, address: str, jobs: int | None, started: Callable[[Row], None]) -> Answers:
    """Rows on the workers of a Dask cluster, ``jobs`` at once."""
    if not work:
        return
    with _client(address) as client:
        n_workers = _wait_for_workers(client, address)
        waiting, under_way, last_seen = list(reversed(work)), {}, time.monotonic()
        try:
            while waiting or under_way:
                while waiting and len(under_way) < (jobs or n_workers):
                    row, job = waiting.pop()
                    started(row)
                    under_way[client.submit(run_row, job, pure=False, retries=0)] = row
                for future in _some_done(under_way):
                    yield under_way.pop(future), _answer_of(future)
                last_seen = time.monotonic() if _count_workers(client) else last_seen
                if time.monotonic() - last_seen > NO_WORKER_SECONDS:
                    raise SweepError(
                        f"no worker for {NO_WORKER_SECONDS:.0f} s",
                        where=address,
                        hint="start workers; the same command goes on where this one stopped",
                    )
        finally:
            client.cancel(list(under_way), force=True)


@contextmanager
def _client(address: str) -> Iterator[Any]:
    try:
        from distributed import Client
    except ImportError:
        raise SweepError(
            "running on a cluster needs dask.distributed",
            hint="pip install -e '.[sweep]', or leave out --scheduler",
        ) from None
    try:
        client = Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, TypeError) as error:
        raise SweepError(
            f"no Dask scheduler answers ({workbook.last_line(str(error))})",
            where=address,
            hint="start one with `dask scheduler`, workers with `dask worker`",
        ) from error
    with client:
        yield client


def _wait_for_workers(client: Any, address: str) -> int:
    try:
        client.wait_for_workers(1, timeout=NO_WORKER_SECONDS)
    except TimeoutError:
        raise SweepError(
            "the scheduler has no worker", where=address, hint=f"dask worker {address}"
        ) from None
    return _count_workers(client)


def _count_workers(client: Any) -> int:
    return len(client.scheduler_info(n_workers=-1)["workers"])


def _some_done(under_way: Mapping[Any, Row], seconds: float = 2.0) -> list[Any]:
    from distributed import wait

    try:
        wait(list(under_way), timeout=seconds, return_when="FIRST_COMPLETED")
    except TimeoutError:
        pass
    return [future for future in under_way if future.done()]


def _answer_of(future: Any) -> dict[str, Any]:
    """What a row's future holds; a lost worker, or a worker without this package, is the row's failure."""
    if future.status == "finished":
        answer = future.result()
        if answer["status"] == "done" and not Path(answer["folder"]).is_dir():
            reason = f"done on {answer['host']}, but {answer['folder']} is not visible here"
            return {**answer, "status": "failed", "reason": reason}
        return answer
    now = round(time.time(), 3)
    reason = "the cluster cancelled it or was shut down"
    if future.status == "error":
        error = future.exception()
        reason = f"{type(error).__name__}: {workbook.last_line(str(error))}"
    return {"status": "failed", "reason": reason, "started": now, "ended": now, "host": "", "folder": ""}


# ---- what comes of it ----


def threads_wanted(rows: Sequence[Row], jobs: int) -> int:
    """Threads that the ``jobs`` most demanding rows may use at once on this machine.

    A row without ``n_threads`` takes what notebooks take by default: one for a small local model, else all
    cores.
    """
    return sum(sorted((_threads(row) for row in rows), reverse=True)[:jobs])


def _threads(row: Row) -> int:
    from dfqs_nb.llama.model import threads_for

    if row.parameters.get("n_threads"):
        return int(row.parameters["n_threads"])
    try:
        known = registry.models()
        local = row.model not in known or not known[row.model].source.startswith("hf://")
        return (
            threads_for(registry.resolve(row.model)[0])
            if local and "://" not in row.model
            else usable_cores()
        )
    except DfqsError:
        return usable_cores()


def crowding(rows: Sequence[Row], jobs: int) -> str:
    """What running ``jobs`` rows at once on this machine does to their timings; empty for one at a time."""
    jobs = min(jobs, len(rows))
    if jobs < 2:
        return ""
    wanted, cores = threads_wanted(rows, jobs), usable_cores()
    many = f"{wanted} threads for {cores} core(s)" if wanted > cores else f"{wanted} of {cores} cores in use"
    return (
        f"{jobs} rows at once: {many}. Scores do not depend on it; speeds do, and are marked as contended "
        f"where rows ran beside each other. For speeds, use --jobs 1."
    )


@dataclass(frozen=True)
class Attempt:
    """A time (seconds of the epoch) in which a row was under way on a host; ``whole``: it came to its end."""

    host: str
    started: float
    ended: float
    whole: bool

    def overlaps(self, other: Attempt) -> bool:
        """Whether the two shared a host for a time."""
        return self.host == other.host and self.started < other.ended and other.started < self.ended


def attempts(folder: Path, given_up: float) -> list[Attempt]:
    """Every attempt at a row. One that was lost lasted at most to the next, or until the row was given up."""
    path, begun, ends = folder / ATTEMPTS, {}, {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill: that attempt is not known
        (ends if "ended" in row else begun)[row["started"]] = row.get("ended", row.get("host"))
    times = sorted(begun)
    return [
        Attempt(begun[at], at, ends.get(at, after), at in ends)
        for at, after in zip(times, [*times[1:], max(given_up, *times)] if times else [], strict=True)
    ]


def beside(found: Mapping[str, Sequence[Attempt]]) -> dict[str, list[str]]:
    """For each run, the other runs of which an attempt shared its host while its last whole attempt ran."""
    last = {run: [one for one in tried if one.whole][-1:] for run, tried in found.items()}
    return {
        run: [
            other
            for other, tried in found.items()
            if other != run and any(mine.overlaps(one) for mine in last[run] for one in tried)
        ]
        for run in found
    }


def _result(rows: Sequence[Row], ran_now: set[str], journal: Journal, folder: Path) -> SweepResult:
    import pandas as pd

    from dfqs_nb.report import leaderboard

    answers = {row.run: journal[row.key] for row in rows if row.key in journal}
    tried = {run: attempts(folder / run, one["ended"]) for run, one in answers.items()}
    shared, records = beside(tried), []
    for row in rows:
        found = answers.get(row.run, {"status": "not run", "reason": ""})
        seconds = round(found.get("ended", 0.0) - found.get("started", 0.0), 1)
        records.append(
            {
                "line": row.line,
                "run": row.run,
                "model": row.model,
                "status": found["status"],
                "reason": found["reason"],
                "seconds": seconds,
                "host": found.get("host", ""),
                "beside": " ".join(shared.get(row.run, [])),
                "now": row.key in ran_now,
            }
        )
        if (folder / row.run).is_dir():
            write_json(folder / row.run / ROW_FILE, {**records[-1], "beside": shared.get(row.run, [])})
    table = pd.DataFrame(records)
    write_table(folder / "sweep.csv", table, index=False)
    ranked = leaderboard.leaderboard(folder)
    leaderboard.write_leaderboard(folder, ranked)
    return SweepResult(folder, table, ranked)


if __name__ == "__main__":
    _child()
