"""The real size, from a raw concatenation to a DFQS report: one command, with what each step takes.

``python tests/benchmarks/rehearsal.py FOLDER [--full-size] [--layers 8] [--budget-minutes 60]``

It writes a specimen (`tests/support/specimen.py --concatenated`) into FOLDER, inspects it, repairs it in place, runs the
notebooks on it within the budget, prints a table in Markdown, and deletes the specimen. Without ``--full-size`` the
specimen has 16 experts a layer and a small vocabulary (2 GB with 8 layers); with it, 62.7 GB.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = "01 02 03 04 05 07"


def step(name: str, *words: str) -> dict[str, Any]:
    """Run ``dfqs-nb``, or a script, with these words; its time, and what it and its children read and wrote."""
    began, program = time.perf_counter(), [] if words[0].endswith(".py") else ["-m", "dfqs_nb"]
    process = subprocess.Popen([sys.executable, *program, *words], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    row = {
        "step": name,
        "seconds": round(time.perf_counter() - began, 1),
        "status": os.waitstatus_to_exitcode(status),
        "read, GB": round(usage.ru_inblock * 512 / 1e9, 1),
        "written, GB": round(usage.ru_oublock * 512 / 1e9, 1),
        "peak memory of a process, MB": round(usage.ru_maxrss / 1024),
    }
    print(row, flush=True)
    return row


def rehearse(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = options.folder / "specimen.gguf"
    size = ["--full-size"] if options.full_size else []
    size += ["--layers", str(options.layers)] if options.layers else []
    more = [word for given in options.parameter for word in ("-p", given)]
    run = [
        *more,
        "--run",
        options.run,
        "--budget-minutes",
        str(options.budget_minutes),
        "--model",
        str(model),
    ]
    try:
        return [
            step("write the specimen", "tests/support/specimen.py", str(model), *size, "--concatenated"),
            step("inspect the concatenation", "inspect", "--quick", str(model)),
            step("repair it in place", "repair", str(model), "--in-place"),
            step("plan", "plan", str(model)),
            step(f"notebooks {options.notebooks}", "run", *options.notebooks.split(), *run),
        ]
    finally:
        for path in options.folder.glob("*specimen.gguf*"):
            path.unlink()


def main() -> None:
    import psutil

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="receives the specimen, and loses it at the end")
    parser.add_argument("--full-size", action="store_true", help="256 experts, 129,280 tokens: 62.7 GB")
    parser.add_argument("--layers", type=int, default=0, help="8, or with --full-size 43")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="of the notebooks")
    parser.add_argument("--notebooks", default=NOTEBOOKS)
    parser.add_argument("-p", "--parameter", action="append", default=[], help="of the notebooks: NAME=VALUE")
    parser.add_argument("--run", default="rehearsal", help="folder under outputs/")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = rehearse(options)
    memory = psutil.virtual_memory().total / 2**30
    print(
        f"\n{date.today()}, {platform.system()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, load now ",
        end="",
    )
    print(
        f"{os.getloadavg()[0]:.0f}: `{' '.join(['python', 'tests/benchmarks/rehearsal.py', *sys.argv[1:]])}`\n"
    )
    print("| " + " | ".join(rows[0]) + " |\n|---|" + "--:|" * (len(rows[0]) - 1))
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:,}" if isinstance(value, (int, float)) else value for value in row.values())
            + " |"
        )
    print(
        f"\npeak of all: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:,.0f} MB in one process"
    )


if __name__ == "__main__":
    main()
