"""The program ``dfqs-nb``: the workbook as a whole, its reports, and the one place where every error ends.

`file_commands` handles files, `model_commands` measures a model. Other packages are imported inside the
functions, so that a fast command starts fast.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable
from contextlib import suppress
from copy import copy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from dfqs_nb import __version__
from dfqs_nb.core.display import did_you_mean, plain, quoted
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import write_text
from dfqs_nb.core.paths import outputs_dir, run_dir, tilde

if TYPE_CHECKING:
    import pandas as pd

LOG, INTERRUPTED = "dfqs-nb-error.log", 130
USAGE: Any = typer.BadParameter.__base__  # of the click that this typer stands on, its own or the installed
app = typer.Typer(
    name="dfqs-nb",
    help="Merge, inspect, run, score and report GGUF models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
WHOLE, FILES, MEASURE, REPORT = "The workbook", "Files", "Measure a model", "Report"
# What several commands take.
Gguf = Annotated[str, Argument(help="A GGUF file, or any of its shards.")]
Context = Annotated[int, Option(help="Tokens of context.")]
Threads = Annotated[int, Option(help="0: chosen for the model.")]
Run = Annotated[str, Option(help="The folder under outputs/. Default: from the model.")]
Fresh = Annotated[bool, Option("--fresh", help="Ignore the results of an earlier run.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an earlier output once the new one is made.")]
KeyVariable = Annotated[str, Option(metavar="NAME", help="Environment variable with the server's key.")]
ServerModel = Annotated[str, Option(metavar="NAME", help="Which of the server's models.")]


def say(*lines: object) -> None:
    """Print lines; what steers a terminal, in text from a file or a server, is taken out."""
    for line in lines:
        print(as_typed(line), flush=True)


def say_table(table: pd.DataFrame, digits: str = ".3f") -> None:
    """Print a frame without its index, its fractions in that format; nothing for one without rows."""
    if len(table):
        say(table.to_string(index=False, float_format=f"{{:{digits}}}".format))


def say_written(paths: Iterable[Path], folder: Path) -> None:
    """Print which files lie in a folder now."""
    say(f"wrote {', '.join(path.name for path in paths)} to {tilde(folder)}/")


def as_typed(text: object) -> str:
    """Text for a terminal, in which commands of this program run as pasted, wherever it is installed."""
    return re.sub(r"(?<![\w./-])dfqs-nb(?= [a-z])", lambda _: _program(), plain(text))


@lru_cache(maxsize=1)
def _program() -> str:
    own = Path(sys.executable).with_name("dfqs-nb")
    if shutil.which("dfqs-nb"):
        return "dfqs-nb"
    return quoted(own) if own.exists() else f"{quoted(sys.executable)} -m dfqs_nb"


@app.callback()
def _top(version: bool = Option(False, "--version", help="Print the version.")) -> None:
    pass


@app.command(rich_help_panel=WHOLE)
def run(
    notebooks: list[str] = Argument(None, help="Notebooks to run, as 01 or 01_merge_shards. Default: all."),
    model: str = Option("", help="A name of `dfqs-nb models`, a file, or hf://owner/repo/file."),
    run: str = Option("", help="The folder under outputs/. Default: nano, or the model's name."),
    fresh: Fresh = False,
    tier: str = Option("", help="nano or standard. Default: nano for the reference model, else standard."),
    budget_minutes: float = Option(60.0, help="Of the whole run; long measurements are shortened."),
    parameter: list[str] = Option([], "-p", "--parameter", metavar="NAME=VALUE", help="For the notebooks."),
) -> None:
    """Run the notebooks in order into outputs/RUN/.

    Examples: `dfqs-nb run`, `dfqs-nb run 01 02 --model model.gguf`, `dfqs-nb run -p n_ctx=4096`
    """
    from dfqs_nb.workbook import run as workbook

    paths = workbook.find_notebooks(notebooks or [])
    if odd := [assignment for assignment in parameter if "=" not in assignment]:
        raise DfqsError(f"{odd[0]!r} is not of the form name=value", hint="write -p n_ctx=4096")
    texts = {name.strip(): text for name, _, text in (given.partition("=") for given in parameter)}
    texts |= {"model": model} if model else {}
    values = workbook.parse_parameters(texts, workbook.parameter_types(paths))
    name = values.pop("run_name", "")
    name = run or name or workbook.default_run_name(values.get("model"))
    if "model" in values and any(path.stem.startswith("01") for path in paths):
        workbook.check_model(values["model"], Path(values.get("output_dir") or outputs_dir() / name))
    result = workbook.run_workbook(name, values, paths, fresh, sys.stderr, tier, budget_minutes, say)
    say(f"\n{workbook.summary_text(result)}")
    raise typer.Exit(int(any(notebook.failed for notebook in result.notebooks)))


@app.command(rich_help_panel=WHOLE)
def models() -> None:
    """List the models known by name."""
    from dfqs_nb.gguf import models as registry

    for model in registry.registered().values():
        facts = f"{len(model.files)} file(s), {round(model.size_bytes / 1e9, 3):,} GB, {model.licence}"
        say(f"{model.name}\n    {model.title}\n    {facts}, {model.source}\n    {model.note}")


@app.command(rich_help_panel=WHOLE)
def sweep(
    table: Path = Argument(..., metavar="MODELS.CSV", help="Columns: model, run, any notebook parameter."),
    scheduler: str = Option("", metavar="tcp://HOST:8786", help="A Dask cluster that sees these files."),
    name: str = Option("", help="The folder under outputs/. Default: sweep- and the table's name."),
    notebook: list[str] = Option([], metavar="NN", help="Only these notebooks. Default: all."),
    fresh: Fresh = False,
) -> None:
    """Run the workbook for each row of a table, and rank the reports.

    If a sweep is killed, the same command resumes it. Example: `dfqs-nb sweep data/sweep_example.csv`
    """
    from dfqs_nb.workbook import sweep as sweeps
    from dfqs_nb.workbook.run import find_notebooks

    options: dict[str, Any] = {"scheduler": scheduler, "name": name, "fresh": fresh}
    rows = sweeps.sweep(table, notebooks=find_notebooks(notebook), tell=say, **options)
    say_table(rows[["line", "run", "status", "seconds", "reason"]], ".1f")
    n_done = int((rows["status"] == "done").sum())
    say(f"{n_done} of {len(rows)} rows done")
    raise typer.Exit(int(n_done < len(rows)))


def run_folder(name: str) -> Path:
    """The folder of a run, by its name under outputs/ or its path; else a `DfqsError` that names the runs."""
    for folder in (Path(name), outputs_dir() / name):
        if folder.is_dir():
            return folder
    runs = sorted(path.parent.name for path in outputs_dir().glob("*/merge.json"))
    hint = f"{did_you_mean(name, runs)}there are: {', '.join(runs) or 'none yet; `make run` makes one'}"
    raise DfqsError(f"no run is called {name!r}", where=tilde(outputs_dir()), hint=hint)


@app.command(rich_help_panel=REPORT)
def report(
    run: str = Argument("nano", help="A run's name under outputs/, or its folder."),
    check: bool = Option(False, "--check", help="Write nothing; check the report and the files behind it."),
) -> None:
    """Write the DFQS report of a run, or check one.

    Examples: `dfqs-nb report nano`, `dfqs-nb report nano --check`
    """
    from dfqs_nb import report as reports

    folder = run_folder(run)
    if check:
        say(f"{tilde(folder)}/", *(f"  {line}" for line in reports.check_run(folder)))
        return
    written = reports.write_report(folder, reports.build_report(folder))
    say(reports.verdict(reports.read_report(folder)))
    say_written(written, folder)


@app.command(rich_help_panel=REPORT)
def compare(
    runs: list[str] = Argument(..., metavar="RUN...", help="Runs or report.json files; baseline first."),
) -> None:
    """Compare reports made under equal conditions, item by item.

    Example: `dfqs-nb compare nano nano2`
    """
    from dfqs_nb import report

    places = [name if Path(name).is_file() else str(run_folder(name)) for name in runs]
    comparison = report.compare_reports(places)
    folder = run_dir("-".join(["compare", *(run.report["run"] for run in comparison.runs)]))
    say(comparison)
    say_written([write_text(folder / "comparison.md", str(comparison))], folder)


@app.command(rich_help_panel=REPORT)
def leaderboard(folder: Path | None = Argument(None, help="Default: outputs/.")) -> None:
    """Rank the reports of a folder, within equal conditions.

    Exit status 1: a report cannot be used. Example: `dfqs-nb leaderboard`
    """
    from dfqs_nb import report

    ranked = report.leaderboard(folder or outputs_dir())
    say(ranked)
    say_written(ranked.write(), ranked.folder)
    raise typer.Exit(int((ranked.table["problem"] != "").any()))


def program(typed: str = "") -> Any:
    """The program with every command in it, or with just the one that was typed, which starts sooner."""
    from dfqs_nb.workbook import file_commands, model_commands  # noqa: F401 (they register)

    part = copy(app)
    named = [it for it in app.registered_commands if it.callback and it.callback.__name__ == typed]
    part.registered_commands = named or app.registered_commands
    return typer.main.get_command(part)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    1: an error, as one line on standard error; 2: the command line is wrong; 130: interrupted. An unexpected
    error is one line too, and its traceback goes to a log.
    """
    gc.set_threshold(100_000)  # a command is short: its garbage is collected rarely,
    atexit.register(gc.disable)  # and not when it ends
    warnings.formatwarning = lambda message, *place, **more: f"dfqs-nb: {plain(message)}\n"
    words = argv if argv is not None else sys.argv[1:]
    if "--version" in words[:1]:
        say(f"dfqs-nb {__version__}")
        return 0
    try:
        status = program(*words[:1])(words, prog_name="dfqs-nb", standalone_mode=False)
        if status == INTERRUPTED:  # a newer typer makes this status of an interrupt
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except typer.Exit as leave:
        return leave.exit_code
    except USAGE as error:
        error.show()
        return 2
    except DfqsError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; what was written stays, and the same command resumes it", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error, OSError) and (place := error.filename2 or error.filename):
            return _fail(f"{tilde(str(place))}: cannot be read or written ({error.strerror})")
        what = f"unexpected {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        log = Path(tempfile.gettempdir(), LOG)
        with suppress(OSError), log.open("a", encoding="utf-8", errors="replace") as file:  # a full disk
            file.write(traceback.format_exc())
            what += f"; its place in the code is in {log}"
        return _fail(what)


def _fail(message: str, status: int = 1) -> int:
    print(f"dfqs-nb: {as_typed(message)}", file=sys.stderr)
    return status
