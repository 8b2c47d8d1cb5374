"""The terminal: how the commands of ``dfqs-nb`` are declared, and how they print."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from dfqs_nb.core.display import plain, quoted
from dfqs_nb.core.paths import tilde

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    name="dfqs-nb",
    help="Merge, inspect, run, score and report GGUF models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PANELS = WHOLE, FILES, MEASURE, REPORT = "The workbook", "Files", "Measure a model", "Report"
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an earlier output once the new one is made.")]


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

    def program(_: re.Match[str]) -> str:
        own = Path(sys.executable).with_name("dfqs-nb")
        here = quoted(own) if own.exists() else f"{quoted(sys.executable)} -m dfqs_nb"
        return "dfqs-nb" if shutil.which("dfqs-nb") else here

    return re.sub(r"(?<![\w./-])dfqs-nb(?= [a-z])", program, plain(text))
