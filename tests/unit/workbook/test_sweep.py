"""Sweeps: tables that are refused, rows that fail alone, sweeps and workers that are killed and go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from test_workbook import write_notebook

from dfqs_nb.core import journal, paths
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf import models as registry
from dfqs_nb.workbook import run as workbook
from dfqs_nb.workbook import sweep
from dfqs_nb.workbook.sweep import read_rows

NANO = "dfqs-nano-iq1_s-xl"
PARAMETERS = (
    'model: str = "dfqs-nano-iq1_s-xl"  # a name\nrun_name: str = "nano"  # folder\nn: int = 1  # a number\n'
    'what: str = "nothing"  # to do\nn_threads: int = 0  # threads\nfresh: bool = False  # again'
)
CELL = """
import json, os, signal, time
from pathlib import Path
outputs = Path(os.environ["DFQS_OUTPUTS"])
folder = outputs / run_name
with (outputs / "starts.txt").open("a") as file:
    file.write(f"{run_name} {os.getpid()} {os.getppid()}\\n")
if what == "fail":
    raise ValueError("asked to fail")
if what == "die":
    os.abort()
if what == "kill worker process":
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(30)
while what == "wait" and not (outputs / "go").exists():
    time.sleep(0.05)
stage = {"stage": "merge", "conditions": {}, "summary": [f"{run_name} {model} {n} {fresh}"]}
(folder / "merge.json").write_text(json.dumps(stage))
"""


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "nb" / "01_try.ipynb", CELL, parameters=PARAMETERS)


def write_table(tmp_path, *lines: str) -> Path:
    path = tmp_path / "models.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def starts(folder: Path) -> list[str]:
    path = folder / "starts.txt"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def pids(folder: Path, run: str) -> list[int]:
    lines = [line.split() for line in (folder / "starts.txt").read_text().splitlines()]
    return [int(word) for name, *both in lines if name == run for word in both]


def run_sweep(table: Path, notebook: Path | None = None, **options) -> pd.DataFrame:
    given = {"scheduler": "", "name": "s", "fresh": False, "tell": lambda line: None, **options}
    notebooks = [notebook] if notebook else workbook.find_notebooks()
    return sweep.sweep(table, notebooks=notebooks, **given).set_index("run")


def until(condition, seconds=60.0, what="it"):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- the table ----


def test_the_example_table_that_is_shipped_is_accepted():
    rows = read_rows(paths.data_dir() / "sweep_example.csv", workbook.find_notebooks())
    assert {row.model for row in rows} <= set(registry.registered()) and len(
        {row.run for row in rows}
    ) == len(rows) >= 2


def test_empty_cells_are_defaults_and_values_have_the_notebooks_types(tmp_path, notebook):
    table = write_table(tmp_path, "model , run,n,fresh", f"{NANO},one,7,true", "", f"{NANO},two,,")
    first, second = read_rows(table, [notebook])
    assert first.parameters == {"n": 7, "fresh": True} and second.parameters == {}
    assert (first.line, second.line) == (2, 4)
    assert first.key != second.key


def test_the_run_is_named_after_the_model_and_a_path_stands_beside_the_table(tmp_path, notebook):
    shard = tmp_path / "models" / "Tiny-Q8_0-00001-of-00002.gguf"
    shard.parent.mkdir()
    shard.write_bytes(b"GGUF")
    table = write_table(tmp_path, "model", "models/Tiny-Q8_0-00001-of-00002.gguf")
    (row,) = read_rows(table, [notebook])
    assert (row.run, row.model) == ("Tiny-Q8_0", str(shard))
    shard.write_bytes(b"GGUF, another")
    (again,) = read_rows(table, [notebook])
    assert again.key != row.key, "another file under the same name is another model"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "the columns are ; .*with a column model"),
        (["model,n"], "has no rows"),
        (["run,n", "a,1"], "the columns are run, n; .*with a column model"),
        (["model;run", "a;b"], r"the columns are model;run; give a CSV file in UTF-8, with commas"),
        (["model,nn", f"{NANO},1"], r"no notebook has a parameter 'nn'; did you mean n\?$"),
        (["model,n,n", f"{NANO},1,2"], "the columns are model, n, n; .*no column twice"),
        (["model,run_name", f"{NANO},a"], "no notebook has a parameter 'run_name'"),
        (["model,n", f"{NANO},many"], "line 2: the parameter n takes a whole number, not 'many'"),
        (["model,n", f"{NANO},1,2"], "line 2: has 3 cells, and the header has 2"),
        (["model,n", ",1"], "line 2: the cell model is empty"),
        (["model", "nowhere.gguf"], "line 2: no model 'nowhere.gguf'"),
        (["model", "x" * 300], "line 2: no model 'xxx"),
        (["model", "hf://owner"], "line 2: "),
        (["model,run", f"{NANO},../up"], "line 2: '../up' is not a run name"),
        (["model", NANO, NANO], f"line 3: has the run name '{NANO}', as line 2"),
        (
            ["model,run", f"{NANO},a", "x.gguf,b", f"{NANO},a"],
            "nothing was run: line 3: no model 'x.gguf'",
        ),
        (["model,run", f'"{NANO},a'], "cannot be read .*a CSV file in UTF-8"),
    ],
)
def test_a_bad_table_is_refused_with_its_lines_before_anything_runs(
    outputs, tmp_path, notebook, lines, message
):
    with pytest.raises(DfqsError, match=message):
        run_sweep(write_table(tmp_path, *lines), notebook)
    assert not outputs.exists()


def test_a_missing_or_binary_table_is_an_error(tmp_path, notebook):
    with pytest.raises(DfqsError, match="no such file"):
        read_rows(tmp_path / "none.csv", [notebook])
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(DfqsError, match="cannot be read .*a CSV file in UTF-8"):
        read_rows(tmp_path / "b.csv", [notebook])


# ---- here ----


def test_rows_run_a_failing_one_fails_alone_and_the_next_sweep_runs_only_that(outputs, tmp_path, notebook):
    table = write_table(
        tmp_path,
        "model,run,n,what",
        f"{NANO},good,7,",
        f"{NANO},dead,,die",
        f"{NANO},shot,,kill worker process",
        "dfqs-nano-q8_0,last,,",
    )
    rows, folder = run_sweep(table, notebook, name=""), outputs / "sweep-models"
    assert rows["status"].to_dict() == {"good": "done", "dead": "failed", "shot": "failed", "last": "done"}
    reasons = rows["reason"]
    assert "the kernel died in cell" in reasons["dead"]
    assert "SIGKILL" in reasons["shot"] and "sweep.log" in reasons["shot"]
    told = json.loads((folder / "good" / "merge.json").read_text())["summary"]
    assert told == [f"good {NANO} 7 False"]
    assert list(pd.read_csv(folder / "sweep.csv")["run"]) == ["good", "dead", "shot", "last"]
    assert "No report counts here" in (folder / "leaderboard.md").read_text()

    write_table(
        tmp_path, "model,run,n,what", f"{NANO},good,7,", f"{NANO},dead,,fail", "dfqs-nano-q8_0,last,,"
    )
    again = run_sweep(table, notebook, name="")
    assert "ValueError: asked to fail" in again["reason"]["dead"]
    assert again["status"].to_dict() == {"good": "done", "dead": "failed", "last": "done"}
    assert starts(folder).count("good") == 1 and starts(folder).count("dead") == 2


@pytest.mark.slow
def test_fresh_and_a_deleted_run_do_a_finished_row_again(outputs, tmp_path, notebook):
    table = write_table(tmp_path, "model,run", f"{NANO},a")
    folder = outputs / "s"
    run_sweep(table, notebook), run_sweep(table, notebook)
    assert starts(folder) == ["a"]
    (folder / "a" / "summary.md").unlink()
    run_sweep(table, notebook)
    assert starts(folder) == ["a"] * 2
    run_sweep(table, notebook, fresh=True)
    assert json.loads((folder / "a" / "merge.json").read_text())["summary"] == [f"a {NANO} 1 True"]
    assert starts(folder) == ["a"] * 3


def test_two_sweeps_in_one_folder_are_refused(outputs, tmp_path, notebook):
    table = write_table(tmp_path, "model,run", f"{NANO},a")
    with workbook.alone(paths.run_dir("s")), pytest.raises(DfqsError, match="another run is at work"):
        run_sweep(table, notebook)


SCRIPT = """
import sys
from pathlib import Path
from dfqs_nb.workbook import sweep
options = {"scheduler": "", "name": "s", "fresh": False, "tell": print}
sweep.sweep(Path(sys.argv[1]), notebooks=[Path(sys.argv[2])], **options)
"""


def test_a_killed_sweep_takes_its_rows_along_and_goes_on_where_it_stopped(outputs, tmp_path, notebook):
    table = write_table(
        tmp_path, "model,run,what", f"{NANO},first,", f"{NANO},second,wait", f"{NANO},third,wait"
    )
    folder = outputs / "s"
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(table), str(notebook)])
    until(lambda: starts(folder) == ["first", "second"], what="two rows")
    own = pids(folder, "second")
    child.send_signal(signal.SIGKILL)
    child.wait()
    until(lambda: not any(map(alive, own)), what="kernels and rows to end with the sweep")
    with (folder / sweep.JOURNAL).open("a") as file:
        file.write('{"conditions": "torn')  # as a kill in the middle of a write leaves it
    (folder / "go").touch()
    rows = run_sweep(table, notebook)
    assert rows["status"].tolist() == ["done"] * 3
    assert starts(folder) == ["first", "second", "second", "third"]


# ---- on a cluster ----


@pytest.fixture(scope="module")
def dask():
    return pytest.importorskip("distributed", reason="pip install -e '.[sweep]'")


@pytest.fixture
def cluster(dask):
    with dask.LocalCluster(
        n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as started:
        yield started


def test_a_worker_that_is_killed_in_the_middle_costs_no_row(outputs, tmp_path, notebook, cluster):
    lines = [f"{NANO},r{number},wait" for number in range(5)]
    table, folder, killed = write_table(tmp_path, "model,run,what", *lines), outputs / "s", []
    overlap: list[int] = []

    def kill_one(line):
        if line == f"r2 ({NANO}) ...":  # three are handed out
            import threading

            def when_all_began():
                until(lambda: len(starts(folder)) == 3, what="three rows")
                worker = psutil.Process(cluster.workers[0].pid)
                rows = psutil.Process(worker.pid).children(recursive=True)
                worker.send_signal(signal.SIGKILL)
                until(lambda: len(starts(folder)) >= 4, what="the lost row to begin again")
                killed.extend([worker.pid, *(one.pid for one in rows)])
                overlap.extend(pid for pid in killed if alive(pid))
                (folder / "go").touch()

            threading.Thread(target=when_all_began).start()

    result = run_sweep(table, notebook, scheduler=cluster.scheduler_address, tell=kill_one)
    assert len(killed) > 2, "the worker, the row's process, its kernel"
    assert not overlap, "the lost row began again only when what it left was gone"
    assert result["status"].tolist() == ["done"] * 5, result["reason"].to_string()
    assert len(starts(folder)) == 6, "five rows, one of them twice"
    assert all((folder / f"r{number}" / "merge.json").exists() for number in range(5))
    rows = [json.loads(line) for line in (folder / sweep.JOURNAL).read_text().splitlines()]
    assert len(rows) == 5
    run_sweep(table, notebook, scheduler=cluster.scheduler_address)
    assert len(starts(folder)) == 6, "what is done is not handed out again"


LOSE_THE_WORKER = """
import psutil
from pathlib import Path
import os
with (Path(os.environ["DFQS_OUTPUTS"]) / "lost.txt").open("a") as file:
    file.write("x")
psutil.Process().parent().parent().kill()
"""


@pytest.mark.slow
def test_a_row_that_loses_every_worker_fails_in_the_end_and_the_others_are_done(outputs, tmp_path, cluster):
    """kernel -> the row's process -> the worker: a row that takes its worker's memory would do the same."""
    bad = write_notebook(
        tmp_path / "nb" / "01_try.ipynb",
        f"if what == 'lose':{LOSE_THE_WORKER.replace(chr(10), chr(10) + '    ')}",
        parameters=PARAMETERS,
    )
    table = write_table(tmp_path, "model,run,what", f"{NANO},a,", f"{NANO},b,lose", f"{NANO},c,")
    rows = run_sweep(table, bad, scheduler=cluster.scheduler_address)
    assert rows["status"].to_dict() == {"a": "done", "b": "failed", "c": "done"}
    assert "KilledWorker" in rows["reason"]["b"]
    assert 1 < len((outputs / "s" / "lost.txt").read_text()) <= 5, "tried again, and not for ever"


def test_no_scheduler_at_the_address_is_an_error_with_the_next_step(
    outputs, tmp_path, notebook, dask, monkeypatch
):
    monkeypatch.setattr(sweep, "CONNECT_SECONDS", 0.5)
    table = write_table(tmp_path, "model,run", f"{NANO},a")
    with pytest.raises(DfqsError, match="no Dask scheduler answers.*dask scheduler"):
        run_sweep(table, notebook, scheduler="tcp://127.0.0.1:9")
    with pytest.raises(DfqsError, match="no Dask scheduler answers"):
        run_sweep(table, notebook, scheduler="not an address://")


def test_without_distributed_the_extra_is_named(outputs, tmp_path, notebook, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(DfqsError, match=r"needs dask.distributed; .pip install -e '.\[sweep\]'"):
        run_sweep(write_table(tmp_path, "model,run", f"{NANO},a"), notebook, scheduler="tcp://x:1")


def test_outputs_that_this_machine_cannot_see_fail_the_row():
    class Future:
        def result(self):
            return {"status": "done", "reason": "", "host": "far", "folder": "/nowhere/at/all"}

    answer = sweep.answer_of(Future())
    assert answer["status"] == "failed" and "not visible here" in answer["reason"]


# ---- the real workbook ----


@pytest.mark.slow
def test_the_real_workbook_is_swept_and_ends_in_a_leaderboard(outputs, tmp_path):
    table = write_table(
        tmp_path,
        "model,run,max_items,longest,n_haystacks,n_tokens",
        f"{NANO},iq1,8,256,3,96",
        "dfqs-nano-q8_0,q8,8,256,3,96",
    )
    rows, folder = run_sweep(table), outputs / "s"
    assert rows["status"].tolist() == ["done"] * 2, rows["reason"].to_string()
    ranked = pd.read_csv(folder / "leaderboard.csv", keep_default_na=False)
    assert set(ranked["run"]) == {"iq1", "q8"} and (ranked["problem"] == "").all()
    assert ranked["conditions"].nunique() == 1
    for run in ("iq1", "q8"):
        assert workbook.read_summary(folder / run).keys() >= {"merge", "scores"}
    assert len(journal.Journal(folder / sweep.JOURNAL, sweep.FORMAT).rows()) == 2
    assert (folder / "leaderboard.md").exists()
