"""The command ``dfqs-nb``: one function for each subcommand, heavy imports inside them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from dfqs_nb import __version__
from dfqs_nb.errors import DfqsError


def add_run(commands: Any) -> None:
    """``dfqs-nb run``: the notebooks in order."""
    parser = commands.add_parser("run", help="execute the notebooks in order into outputs/RUN/")
    parser.add_argument("notebooks", nargs="*", help="some of them, as 01 or 01_merge_shards (default: all)")
    parser.add_argument("--model", help="a name of `dfqs-nb models`, a file, or hf://owner/repo/file")
    parser.add_argument("--run", help="the folder's name under outputs/ (default: nano, or from the model)")
    parser.add_argument("--fresh", action="store_true", help="do again what an earlier run left")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    parser.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> int:
    from dfqs_nb import workbook
    from dfqs_nb.paths import tilde

    paths = workbook.find_notebooks(arguments.notebooks)
    assignments = arguments.parameter + ([f"model={arguments.model}"] if arguments.model else [])
    parameters = workbook.parse_parameters(assignments, paths)
    name = (
        arguments.run
        or parameters.pop("run_name", None)
        or workbook.default_run_name(parameters.get("model"))
    )
    parameters.pop("run_name", None)
    bar = sys.stderr.isatty()
    result = workbook.run_workbook(
        name,
        parameters,
        paths,
        fresh=arguments.fresh,
        progress=bar,
        started=lambda path: print(f"{path.stem} ...", flush=True),
        finished=lambda done: print(f"{done.name}: {done.seconds:.1f} s -> {tilde(done.path)}", flush=True),
    )
    print(f"\n{workbook.summary_text(result)}")
    return 0


def add_stamp(commands: Any) -> None:
    """``dfqs-nb stamp``: the public address, from pyproject.toml into badges and set-up cells."""
    parser = commands.add_parser("stamp", help="write the public address into badges and set-up cells")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if out of date")
    parser.set_defaults(function=stamp)


def stamp(arguments: argparse.Namespace) -> int:
    from dfqs_nb import workbook
    from dfqs_nb.paths import tilde

    changed = workbook.stamp(check=arguments.check)
    for path in changed:
        print(f"{tilde(path)}: {'out of date; run `make stamp`' if arguments.check else 'stamped'}")
    return int(arguments.check and bool(changed))


def add_refresh(commands: Any) -> None:
    """``dfqs-nb refresh``: the notebooks executed in place."""
    parser = commands.add_parser("refresh", help="execute the notebooks in place and store clean outputs")
    parser.add_argument("notebooks", nargs="*", help="some of them, as 01 or 01_merge_shards (default: all)")
    parser.set_defaults(function=refresh)


def refresh(arguments: argparse.Namespace) -> int:
    import tempfile

    from dfqs_nb import workbook

    paths = workbook.find_notebooks(arguments.notebooks)
    with tempfile.TemporaryDirectory(prefix="dfqs-refresh-") as folder:
        outputs = Path(os.environ.get("DFQS_OUTPUTS") or folder)
        workbook.stamp()
        workbook.refresh_notebooks(paths, outputs)
    print(f"stored the outputs of {', '.join(path.stem for path in paths)}")
    return 0


# One line for each subcommand; `add_<name>` makes its parser and sets `function`. Imports of other
# modules stay inside the functions, so that a fast command starts fast.
COMMANDS = (
    add_run,
    add_stamp,
    add_refresh,
)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="dfqs-nb", description="Merge, inspect, run and score GGUF models.")
    top.add_argument("--version", action="version", version=f"dfqs-nb {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; a DfqsError is one line on stderr and exit code 1."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.function(arguments) or 0
    except DfqsError as error:
        print(f"dfqs-nb: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dfqs-nb: interrupted; what was written stays", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
