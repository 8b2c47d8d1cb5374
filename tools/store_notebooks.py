"""Maintain the notebooks: stamp the public address into them, and store their outputs.

python tools/store_notebooks.py stamp [--check]        badges, set-up cells and README, from pyproject.toml
python tools/store_notebooks.py refresh [NOTEBOOK...]   execute in place and store small, clean outputs
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import write_text
from dfqs_nb.core.paths import REPOSITORY, public_address, tilde
from dfqs_nb.workbook.run import KERNEL, PATTERN, QUIET, find_notebooks, kernel_environment, last_line

BRANCH = "main"

SETUP = """\
# On Colab or Kaggle: fetch the workbook, install it, prepare the model.
import os
import sys
if {{"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"}} & set(os.environ):
    home = os.path.expanduser("~/{name}")
    if not os.path.isdir(home):
        !git clone --depth 1 {address} {{home}}
    if not os.path.isdir(home):
        sys.exit("No network? On Kaggle: Settings > Internet > On.")
    sys.path.insert(0, home + "/tools")
    import hosted
    hosted.prepare(globals())"""

BADGES = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{slug}/blob/{branch}/notebooks/{file})\n"
    "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
    "(https://kaggle.com/kernels/welcome?src={address}/blob/{branch}/notebooks/{file})"
)

CLONE = "```sh\ngit clone {address}\ncd {name}\nmake run\n```"


def block(name: str, text: str) -> str:
    """A stamped block of markdown: the markers stay, what is between them is replaced.

    >>> print(block("clone", "text"))
    <!-- clone -->
    text
    <!-- /clone -->
    """
    return f"<!-- {name} -->\n{text}\n<!-- /{name} -->"


def stamp_block(markdown: str, name: str, text: str) -> str:
    """Replace what is between the markers of a block, if the markdown has one."""
    pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
    return re.sub(pattern, lambda match: block(name, text), markdown, flags=re.DOTALL)


def badges(file: str, address: str) -> str:
    """The Colab and Kaggle badges of one notebook."""
    slug = address.removeprefix("https://github.com/")
    return BADGES.format(slug=slug, address=address, branch=BRANCH, file=file)


def setup_cell(address: str) -> str:
    """The source of the cell tagged ``setup``."""
    return SETUP.format(address=address, name=address.rsplit("/", 1)[-1])


def stamped_notebook(text: str, file: str, address: str) -> str:
    """A notebook's text with its badges, its set-up cell (both by their tags) and its drawings renewed."""
    import nbformat

    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "badges" in tags and "<!-- badges -->" not in cell.source:
            cell.source = cell.source.rstrip() + "\n\n" + block("badges", "")
        if "badges" in tags:
            cell.source = stamp_block(cell.source, "badges", badges(file, address))
        if "setup" in tags:
            cell.source = setup_cell(address)
            cell.metadata["jupyter"] = {"source_hidden": True}  # JupyterLab shows a bar that opens it
        if drawings := re.findall(r"\(attachment:([\w-]+\.png)\)", cell.source):
            cell.attachments = {name: {"image/png": _drawing(name)} for name in drawings}
    return notebook_text(notebook)


def _drawing(name: str) -> str:
    """A drawing as Jupyter attaches it, inside the notebook; of its SVG, which JupyterLab does not attach."""
    return base64.b64encode((REPOSITORY / "notebooks" / "diagrams" / name).read_bytes()).decode()


def stamped_readme(text: str, notebooks: Sequence[Path], address: str) -> str:
    """README with its clone commands and its list of notebooks renewed."""
    text = stamp_block(text, "clone", CLONE.format(address=address, name=address.rsplit("/", 1)[-1]))
    rows = ["| Notebook | Open in |", "|---|---|"]
    rows += [
        f"| [{_title(path)}](notebooks/{path.name}) | {badges(path.name, address).replace(chr(10), ' ')} |"
        for path in notebooks
    ]
    return stamp_block(text, "notebooks", "\n".join(rows))


def stamped_facts(text: str) -> str:
    """README with what the workbook itself says: the sample's verdict, costs, commands."""
    from dfqs_nb import report, workbook
    from dfqs_nb.core.display import markdown, markdown_table
    from dfqs_nb.workbook import cli

    if (SAMPLE_FOLDER / "report.json").exists():
        verdict = str(report.verdict(report.read_report(SAMPLE_FOLDER)))
        # the first sentence of each line: the picture above has the rest
        lines = [re.split(r"(?<=[^A-Z])\. ", line)[0] for line in verdict.splitlines()]
        lines += ["", "Where it is: outputs/nano/report.html"]
        joined = [line.replace(" %", "\u00a0%") for line in lines]
        wrapped = [textwrap.fill(line, 110, subsequent_indent="  ").replace("\u00a0", " ") for line in joined]
        text = stamp_block(text, "verdict", "\n".join(["```text", *wrapped, "```"]))
    text = stamp_block(text, "costs", markdown_table(workbook.overview().reset_index()))
    rows = ["| for example | what it does |", "|---|---|"]
    for name, command in cli.program().commands.items():
        help_text = " ".join((command.help or "").split())
        example = re.search(r"`(dfqs-nb [^`]+)`", help_text)
        words = example[1] if example else f"dfqs-nb {name}"
        rows.append(f"| `{words}` | {markdown(help_text.split('. ')[0].rstrip('.'))} |")
    return stamp_block(text, "commands", "\n".join(rows))


def _title(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    match = re.search(
        r"^# (?:\d+\. )?(.+)$", "".join(cells[0]["source"]) if cells else "", flags=re.MULTILINE
    )
    return f"{path.stem[:2]} {match.group(1)}" if match else path.stem


def stamp(root: Path = REPOSITORY, check: bool = False) -> list[Path]:
    """Write the public address into badges and set-up cells; return the files that were out of date.

    Args:
        root: the checkout, with pyproject.toml, README.md and notebooks/.
        check: change nothing.
    """
    address = public_address(root / "pyproject.toml")
    notebooks, readme = sorted((root / "notebooks").glob(PATTERN)), root / "README.md"
    changed = []
    for path in [*notebooks, *([readme] if readme.exists() else [])]:
        old = path.read_text(encoding="utf-8")
        new = (
            stamped_facts(stamped_readme(old, notebooks, address))
            if path == readme
            else stamped_notebook(old, path.name, address)
        )
        if new != old:
            changed.append(path)
            if not check:
                write_text(path, new)
    return changed


# --- stored outputs --------------------------------------------------------------------------------


def refresh_notebooks(notebooks: Sequence[Path], outputs: Path) -> None:
    """Execute notebooks in place, in order, and store small, clean outputs.

    Args:
        notebooks: which, in order; a later one may read what an earlier one wrote.
        outputs: the folder that the notebooks write under.

    Raises:
        DfqsError: a cell fails; that notebook and those after it are left as they were.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook,
            kernel_name=KERNEL,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=[QUIET],
            resources={"metadata": {"path": str(path.parent)}},
        )
        try:
            with kernel_environment(outputs):
                client.execute()
        except CellExecutionError as error:
            raise DfqsError(f"{error.ename}: {last_line(error.evalue)}", where=path.name) from error
        write_text(path, notebook_text(clean_notebook(notebook, outputs)))


SAMPLE_FOLDER = REPOSITORY / "docs" / "sample_report"
ANSWERS = ("score_items.csv", "long_context_items.csv")
SAMPLE = ("report.json", "report.md", "report.html", *ANSWERS)


def store_sample(run: Path, sample: Path = SAMPLE_FOLDER) -> None:
    """Keep the report of a run as the sample that README shows, with the answers behind its scores."""
    from dfqs_nb import report

    report.write_report(run, report.read_report(run))  # again: notebooks 08 and 09 ran after it was written
    sample.mkdir(parents=True, exist_ok=True)
    drawn = re.findall(r"\]\((\w+\.png)\)", (run / "report.md").read_text(encoding="utf-8"))
    for name in (*SAMPLE, *drawn):
        shutil.copyfile(run / name, sample / name)


def clean_notebook(notebook: Any, outputs: Path) -> Any:
    """Strip what differs from run to run or machine to machine; returns the same object.

    Goes: widget state and views, papermill's and execution time stamps, the interpreter's version, and
    the name of the folder that this execution wrote under (it reads ``outputs/``).
    """
    notebook.metadata.clear()
    notebook.metadata.update(
        kernelspec={"display_name": "Python 3", "language": "python", "name": KERNEL},
        language_info={"name": "python"},
    )
    for cell in notebook.cells:
        for name in ("execution", "papermill", "ExecuteTime"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs = [_with_plain_paths(output, outputs) for output in cell.outputs]
            for output in cell.outputs:
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return notebook


def _with_plain_paths(value: Any, outputs: Path) -> Any:
    """An output with ``outputs/`` for the folder that this execution wrote under, wherever text says it."""
    if isinstance(value, str):
        return value.replace(f"{outputs.resolve()}/", "outputs/").replace(str(outputs.resolve()), "outputs")
    if isinstance(value, dict):
        return type(value)({key: _with_plain_paths(item, outputs) for key, item in value.items()})
    return [_with_plain_paths(item, outputs) for item in value] if isinstance(value, list) else value


def notebook_text(notebook: Any) -> str:
    """A notebook as the text that Jupyter itself would store."""
    import nbformat

    text: str = nbformat.writes(notebook, version=4)
    return text.rstrip("\n") + "\n"


def main(argv: list[str] | None = None) -> int:
    """Stamp or refresh; 1 if something is out of date or a notebook fails."""
    parser = argparse.ArgumentParser(description="Maintain the notebooks.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("stamp").add_argument("--check", action="store_true", help="change nothing")
    verbs.add_parser("refresh").add_argument(
        "notebooks", nargs="*", help="01 or 01_merge_shards; default: all"
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.verb == "stamp":
            changed = stamp(check=arguments.check)
            for path in changed:
                print(f"{tilde(path)}: {'out of date; run `make stamp`' if arguments.check else 'stamped'}")
            return int(arguments.check and bool(changed))
        with tempfile.TemporaryDirectory(prefix="dfqs-refresh-") as folder:
            stamp()
            outputs = Path(os.environ.get("DFQS_OUTPUTS") or folder)
            refresh_notebooks(find_notebooks(arguments.notebooks), outputs)
            if not arguments.notebooks:
                store_sample(outputs / "nano")
                stamp()
    except DfqsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
