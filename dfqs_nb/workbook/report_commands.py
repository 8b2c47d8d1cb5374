"""Commands for what comes of runs: the report, reports side by side, reports ranked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import outputs_dir, run_dir, tilde
from dfqs_nb.workbook.cli import REPORT, app, say
from dfqs_nb.workbook.run import did_you_mean


def run_folder(name: str) -> Path:
    """The folder of a run, by its name under outputs/ or by its path.

    Raises:
        DfqsError: there is none; the message names the runs that exist.
    """
    for folder in (Path(name), outputs_dir() / name):
        if folder.is_dir():
            return folder
    runs = sorted(path.parent.name for path in outputs_dir().glob("*/merge.json"))
    hint = f"{did_you_mean(name, runs)}there are: {', '.join(runs) or 'none yet; make run makes one'}"
    raise DfqsError(f"no run is called {name!r}", where=tilde(outputs_dir()), hint=hint)


@app.command(rich_help_panel=REPORT)
def report(
    run: Annotated[str, typer.Argument(help="A run's name under outputs/, or its folder.")] = "nano",
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing: check the report and the files it stands on.")
    ] = False,
) -> None:
    """Write the DFQS report of a run, or check one.

    Examples: `dfqs-nb report nano`, `dfqs-nb report nano --check`
    """
    from dfqs_nb.core import figures
    from dfqs_nb.report import figures as drawings
    from dfqs_nb.report import metrics, stages, text

    folder = run_folder(run)
    if check:
        checked = metrics.read_report(folder)
        metrics.check_sources(checked, folder)
        say(f"{tilde(folder / metrics.FILE)}: as it was written, with {len(checked['sources'])} files")
        for name in stages.check_beside(folder):
            say(f"{tilde(folder / name)}.json: as it was written")
        return
    made = metrics.build_report(folder)
    figures.save(drawings.report_shares(metrics.shares(made)), folder / "report_shares.png")
    made = metrics.with_figures(made, folder, ["report_shares.png"])
    written = [metrics.write_report(folder, made), *text.write_texts(folder, made)]
    say("\n".join([*[text.NANO] * (made["tier"] == "nano"), *metrics.sentences(made)]))
    say(f"wrote {', '.join(path.name for path in written)} to {tilde(folder)}/")


@app.command(rich_help_panel=REPORT)
def compare(
    reports: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs, or their report.json; the first: baseline.")
    ],
    accept: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Compare although this differs; only chat_template_sha256."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Default: compare-RUN-RUN under outputs/.")
    ] = None,
) -> None:
    """Compare reports made under equal conditions, item by item.

    Example: `dfqs-nb compare nano other-run`
    """
    from dfqs_nb.report import compare as comparing

    places = [name if Path(name).is_file() else str(run_folder(name)) for name in reports]
    comparison = comparing.compare_reports(places, accept=accept or [])
    name = "-".join(["compare", *(run.report["run"] for run in comparison.runs)])
    folder = output or run_dir(name)
    written = comparing.write_comparison(comparison, folder)
    say(comparing.markdown(comparison))
    say(f"wrote {', '.join(path.name for path in written)} to {tilde(folder)}/")


@app.command(rich_help_panel=REPORT)
def leaderboard(
    folder: Annotated[Path | None, typer.Argument(help="Default: outputs/.")] = None,
) -> None:
    """Rank the reports of a folder, within equal conditions.

    Exit status 1: a report cannot be used. Example: `dfqs-nb leaderboard`
    """
    from dfqs_nb.report import leaderboard as boards

    place = folder or outputs_dir()
    table = boards.leaderboard(place)
    written = boards.write_leaderboard(place, table)
    say(boards.markdown(place, table))
    say(f"wrote {', '.join(path.name for path in written)} to {tilde(place)}/")
    raise typer.Exit(int(bool((table["problem"] != "").any())))
