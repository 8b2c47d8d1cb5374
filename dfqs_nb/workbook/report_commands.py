"""Commands for what comes of runs: the report, reports side by side, reports ranked."""

from __future__ import annotations

from pathlib import Path

import typer
from typer import Argument, Option

from dfqs_nb.core.display import did_you_mean
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import outputs_dir, run_dir, tilde
from dfqs_nb.workbook.app import REPORT, app, say, say_written


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
        say("\n".join([f"{tilde(folder)}/", *(f"  {line}" for line in reports.check_run(folder))]))
        return
    written = reports.write_report(folder, reports.build_report(folder))
    say(str(reports.verdict(reports.read_report(folder))))
    say_written(written, folder)


@app.command(rich_help_panel=REPORT)
def compare(
    reports: list[str] = Argument(
        ..., metavar="RUN...", help="Runs, or their report.json; the baseline first."
    ),
    accept: list[str] | None = Option(None, metavar="FIELD", help="Only chat_template_sha256 may differ."),
    output: Path | None = Option(None, metavar="FOLDER", help="Default: compare-RUN-RUN under outputs/."),
) -> None:
    """Compare reports made under equal conditions, item by item.

    Example: `dfqs-nb compare nano nano2`
    """
    from dfqs_nb import report

    places = [name if Path(name).is_file() else str(run_folder(name)) for name in reports]
    comparison = report.compare_reports(places, accept=accept or [])
    folder = output or run_dir("-".join(["compare", *(run.report["run"] for run in comparison.runs)]))
    written = comparison.write(folder)
    say(str(comparison))
    say_written(written, folder)
    say(f"open {tilde(folder / 'comparison.html')}")


@app.command(rich_help_panel=REPORT)
def leaderboard(folder: Path | None = Argument(None, help="Default: outputs/.")) -> None:
    """Rank the reports of a folder, within equal conditions.

    Exit status 1: a report cannot be used. Example: `dfqs-nb leaderboard`
    """
    from dfqs_nb import report

    ranked = report.leaderboard(folder or outputs_dir())
    say(str(ranked))
    say_written(ranked.write(), ranked.folder)
    say(f"open {tilde(ranked.folder / 'leaderboard.html')}")
    raise typer.Exit(int(ranked.n_problems > 0))
