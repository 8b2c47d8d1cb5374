"""The program ``dfqs-nb`` itself, what its commands print with, and the options that several of them take."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from dfqs_nb.core.display import plain, quoted
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import run_dir, tilde

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
WHOLE, FILES, MEASURE, REPORT = "The workbook", "Files", "Measure a model", "Report"
# What several commands take.
Gguf = Annotated[str, Argument(help="A GGUF file, or any of its shards.")]
Place = Annotated[str, Argument(help="A file, a name of `dfqs-nb models`, hf://..., https://...")]
Context = Annotated[int, Option(help="Tokens of context.")]
Threads = Annotated[int, Option(help="0: chosen for the model.")]
Run = Annotated[str, Option(help="The folder under outputs/. Default: from the model.")]
Fresh = Annotated[bool, Option("--fresh", help="Ignore the results of an earlier run.")]
Limit = Annotated[int | None, Option(min=1, help="Ask only this many questions, evenly from each family.")]
Budget = Annotated[float, Option(min=0, help="Work that does not fit is left out and listed.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an earlier output once the new one is made.")]
KeyVariable = Annotated[
    str, Option(metavar="NAME", help="The environment variable that holds the server's key.")
]
ServerModel = Annotated[str, Option(metavar="NAME", help="Which of the server's models.")]


def say(text: object = "") -> None:
    """Print a text; what steers a terminal, in text from a file or a server, is taken out."""
    print(as_typed(text), flush=True)


def say_table(table: pd.DataFrame, digits: str = ".3f") -> None:
    """Print a frame without its index, its fractions in that format."""
    say(table.to_string(index=False, float_format=f"{{:{digits}}}".format))


def say_written(paths: Iterable[Path], folder: Path) -> None:
    """Print which files lie in a folder now."""
    say(f"wrote {', '.join(path.name for path in paths)} to {tilde(folder)}/")


def as_typed(text: object) -> str:
    """Text for a terminal, in which commands of this program run as pasted, wherever it is installed."""
    return re.sub(r"(?<![\w./-])dfqs-nb(?= [a-z])", lambda _: _program(), plain(text))


@lru_cache(maxsize=1)
def _program() -> str:
    own, here = Path(sys.executable).with_name("dfqs-nb"), Path.cwd()
    if shutil.which("dfqs-nb"):
        return "dfqs-nb"
    if not own.exists():
        return f"{quoted(sys.executable)} -m dfqs_nb"
    return quoted(own.relative_to(here) if own.is_relative_to(here) else own)


def numbers(text: str, option: str, kind: Any = int) -> list[Any]:
    """Numbers with commas between them, of an option; ``kind`` is int or float.

    >>> numbers("1,2", "--threads")
    [1, 2]
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise DfqsError(f"{option} {text!r} is no list of numbers", hint=f"write {option} 1,2,4") from None


def model_run_dir(run: str, model: str, stage: str = "") -> Path:
    """The folder of a run (by default one of the model's name), or of a stage in it; made if missing."""
    from dfqs_nb.workbook.run import default_run_name

    folder = run_dir(run or default_run_name(model)) / stage
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_model(model: str, n_ctx: int, threads: int = 0) -> Any:
    """Open a model with settings that suit it and this machine."""
    from dfqs_nb import llama

    return llama.open_model(model, llama.OpenSettings.of(model, n_ctx=n_ctx, n_threads=threads))


def identity(model: Any) -> str:
    """SHA-256 of an open model: from its manifest, where that is ours and holds, else read anew."""
    from dfqs_nb.merge.merge import earlier_result

    earlier = earlier_result(model.path)
    return earlier.sha256 if earlier else str(model.sha256())
