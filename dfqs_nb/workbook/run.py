"""Run the notebooks in order with papermill, stamp them with the public address, refresh their outputs."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import whole_file
from dfqs_nb.core.paths import REPOSITORY, outputs_dir, public_address, run_dir, tilde

NOTEBOOKS = REPOSITORY / "notebooks"
PATTERN = "[0-9][0-9]_*.ipynb"
# the order of a summary; a stage not named here comes last
STAGES = (
    "merge",
    "header",
    "generate",
    "routing",
    "long_context",
    "scores",
    "dfqs_report",
    "ladder",
    "serving",
)
KERNEL = "python3"
QUIET = "--log-level=CRITICAL"  # of the kernel: nothing about its own sockets, or its own shutdown


# --- running ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NotebookRun:
    """One executed notebook: its name without suffix, how long it took, and where it lies."""

    name: str
    seconds: float
    path: Path


@dataclass(frozen=True)
class WorkbookRun:
    """A finished run: its folder, its notebooks in order, and the stages' summary lines."""

    folder: Path
    notebooks: tuple[NotebookRun, ...]
    summary: dict[str, list[str]]


def find_notebooks(names: Iterable[str] = (), folder: Path = NOTEBOOKS) -> list[Path]:
    """The workbook's notebooks in order, or those named (``01``, ``01_merge_shards`` or a path).

    Raises:
        DfqsError: there is none, or a name fits none.
    """
    found = sorted(folder.glob(PATTERN))
    if not found:
        raise DfqsError("no notebooks here", where=folder, hint="run this from a checkout of the workbook")
    wanted = [Path(name).stem for name in names]
    for name in wanted:
        if not any(path.stem == name or path.stem.startswith(f"{name}_") for path in found):
            known = ", ".join(path.stem for path in found)
            raise DfqsError(f"no notebook is called {name!r}", where=folder, hint=f"there are {known}")
    return [
        path
        for path in found
        if not wanted or any(path.stem == n or path.stem.startswith(f"{n}_") for n in wanted)
    ]


def declared_parameters(path: Path) -> dict[str, dict[str, str]]:
    """The parameters of a notebook's cell tagged ``parameters``, as papermill reads them.

    Each value has the keys ``name``, ``inferred_type_name``, ``default`` and ``help``.

    Raises:
        DfqsError: it is not a notebook that papermill can run.
    """
    from papermill import inspect_notebook

    try:
        return inspect_notebook(str(path))
    except ValueError as error:  # no kernelspec, or not a notebook
        raise DfqsError(
            f"papermill cannot read it ({last_line(str(error))})",
            where=path,
            hint="open it in JupyterLab with the kernel Python 3 and save it",
        ) from error


def check_parameters(parameters: Mapping[str, Any], declared: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a parameter that no notebook declares: papermill would only warn, and run without it.

    >>> check_parameters({"n_ctx": 512}, [{"n_ctx": {}, "model": {}}])
    >>> check_parameters({"nctx": 512}, [{"n_ctx": {}, "model": {}}])
    Traceback (most recent call last):
    dfqs_nb.core.errors.DfqsError: no notebook has a parameter 'nctx'; known: model, n_ctx
    """
    known = sorted({name for names in declared for name in names})
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        names = ", ".join(repr(name) for name in unknown)
        raise DfqsError(f"no notebook has a parameter {names}", hint=f"known: {', '.join(known) or 'none'}")


def parse_value(name: str, text: str, type_name: str) -> Any:
    """A parameter's value from the command line, by the type that the notebook declares.

    >>> parse_value("n_ctx", "4096", "int"), parse_value("model", "4096", "str")
    (4096, '4096')
    >>> parse_value("prompts", "['a', 'b']", "list[str]"), parse_value("threads", "None", "int | None")
    (['a', 'b'], None)

    Raises:
        DfqsError: the text is not of that type.
    """
    if type_name == "str":
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    allowed = {"int": int, "float": (int, float), "bool": bool}.get(type_name, object)
    if not isinstance(value, allowed) or (isinstance(value, bool) and type_name in ("int", "float")):
        raise DfqsError(f"parameter {name} takes {type_name}, not {text!r}")
    return value


def parse_parameters(assignments: Iterable[str], notebooks: Iterable[Path]) -> dict[str, Any]:
    """``["n_ctx=4096", ...]`` as values, each of the type that a notebook declares for it."""
    declared = [declared_parameters(path) for path in notebooks]
    texts = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise DfqsError(f"{assignment!r} is not of the form name=value")
        texts[name.strip()] = text
    check_parameters(texts, declared)
    types = {name: p["inferred_type_name"] for names in declared for name, p in names.items()}
    return {name: parse_value(name, text, types[name]) for name, text in texts.items()}


def default_run_name(model: str | None) -> str:
    """The run's folder name when none is given: one folder for a model.

    >>> default_run_name(None), default_run_name("/models/Qwen3-Q8_0-00001-of-00002.gguf")
    ('nano', 'Qwen3-Q8_0')
    """
    if not model:
        return "nano"
    stem = re.sub(r"(-\d{5}-of-\d{5})?(\.gguf)?$", "", model.rstrip("/").rsplit("/", 1)[-1])
    return re.sub(r"[^\w.-]+", "-", stem).strip(".-") or "nano"


def run_workbook(
    run: str = "nano",
    parameters: Mapping[str, Any] | None = None,
    notebooks: Sequence[Path] | None = None,
    fresh: bool = False,
    progress: bool = False,
    started: Callable[[Path], None] = lambda path: None,
    finished: Callable[[NotebookRun], None] = lambda done: None,
) -> WorkbookRun:
    """Execute notebooks in order into ``outputs/<run>/``, and write ``summary.md`` there.

    Args:
        run: the folder's name, handed to every notebook that declares ``run_name`` (IPython takes a
            line that begins with ``run`` for its magic, so a parameter cannot be called that).
        parameters: handed to each notebook that declares them.
        notebooks: which; all of the workbook by default.
        fresh: do again what an earlier run left (handed on as ``fresh``).
        progress: show papermill's bar over cells.
        started, finished: called before and after each notebook.

    Raises:
        DfqsError: no notebook declares a parameter, or a cell fails; what earlier notebooks wrote stays.
    """
    paths = list(notebooks) if notebooks is not None else find_notebooks()
    declared = [declared_parameters(path) for path in paths]
    check_parameters(parameters or {}, declared)
    values = {"run_name": run, **({"fresh": True} if fresh else {}), **_absolute(parameters or {})}
    folder, done = run_dir(run).resolve(), []
    for path, names in zip(paths, declared, strict=True):
        started(path)
        chosen = {name: value for name, value in values.items() if name in names}
        done.append(_execute(path, folder / path.name, chosen, progress))
        finished(done[-1])
    result = WorkbookRun(folder, tuple(done), read_summary(folder))
    with whole_file(folder / "summary.md") as file:
        file.write(summary_markdown(result))
    return result


def _absolute(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Relative paths of existing files made absolute: a notebook runs in another folder than the user."""
    return {
        name: str(Path(value).resolve())
        if isinstance(value, str) and ("/" in value or value.endswith(".gguf")) and Path(value).is_file()
        else value
        for name, value in parameters.items()
    }


def _execute(path: Path, target: Path, parameters: dict[str, Any], progress: bool) -> NotebookRun:
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    begin = time.perf_counter()
    try:
        with kernel_environment():
            execute_notebook(
                path,
                target,
                parameters,
                kernel_name=KERNEL,
                cwd=path.parent,
                progress_bar=progress,
                log_output=False,
                extra_arguments=[QUIET],
            )
    except PapermillExecutionError as error:
        cause = f"{error.ename}: {last_line(error.evalue)}".rstrip(": ")
        raise DfqsError(
            f"cell In [{error.exec_count}] failed: {cause}",
            where=path.name,
            hint=f"its output so far lies in {tilde(target)}",
        ) from error
    except DeadKernelError as error:
        raise DfqsError(
            f"the kernel died in cell {_running_cell(target)} (killed, out of memory, or aborted "
            "by llama.cpp)",
            where=path.name,
            hint=f"its output so far lies in {tilde(target)}",
        ) from error
    return NotebookRun(path.stem, time.perf_counter() - begin, target)


def last_line(text: str) -> str:
    """The last line of an error's text that says anything.

    >>> last_line("first\\nmodel.gguf: truncated\\n\\n")
    'model.gguf: truncated'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _running_cell(path: Path) -> int | str:
    """The number, in the executed notebook, of the last cell that began; papermill notes no failure there."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []
    states = [cell["metadata"].get("papermill", {}).get("status", "pending") for cell in cells]
    return max((number for number, state in enumerate(states, 1) if state != "pending"), default="?")


@contextmanager
def kernel_environment(outputs: Path | None = None) -> Iterator[None]:
    """The environment of a kernel: this interpreter's kernel first, absolute folders, no progress bars.

    A user may have a ``python3`` kernel of another interpreter installed; ``JUPYTER_PATH`` comes
    before it. Bars are for people who watch; in a stored notebook they are noise.
    """
    ours = {
        "JUPYTER_PATH": os.pathsep.join(
            filter(None, [f"{sys.prefix}/share/jupyter", os.environ.get("JUPYTER_PATH")])
        ),
        "DFQS_OUTPUTS": str((outputs or outputs_dir()).resolve()),
        "TQDM_DISABLE": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- the summary -----------------------------------------------------------------------------------


def read_summary(folder: Path) -> dict[str, list[str]]:
    """The ``summary`` lines of every stage file ``<stage>.json`` in a run's folder, in stage order.

    A stage file is an object with ``stage`` (its own name), ``conditions`` and ``summary`` (a list of
    sentences for people); other JSON files are passed over.
    """
    found = {}
    for path in folder.glob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DfqsError(f"not JSON ({error})", where=path, hint="run again with --fresh") from error
        if isinstance(content, dict) and content.get("stage") == path.stem:
            found[path.stem] = [str(line) for line in content.get("summary", [])]
    order = {stage: number for number, stage in enumerate(STAGES)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def summary_markdown(result: WorkbookRun) -> str:
    """What was found, how long each notebook took, and where everything lies."""
    lines = [f"# Run {result.folder.name}", "", "## What was found", ""]
    for stage, sentences in result.summary.items():
        lines += [f"**{stage}**", "", *(f"- {sentence}" for sentence in sentences), ""]
    lines += ["## Notebooks", ""]
    lines += [f"- [{item.name}]({item.path.name}): {item.seconds:.1f} s" for item in result.notebooks]
    lines += ["", "## Files", ""]
    lines += [f"- `{name}` ({size:,} bytes)" for name, size in list_files(result.folder)]
    return "\n".join(lines) + "\n"


def summary_text(result: WorkbookRun) -> str:
    """The same for a terminal."""
    lines = ["What was found"]
    for stage, sentences in result.summary.items():
        lines += [f"  {stage}", *(f"    {sentence}" for sentence in sentences)]
    lines += ["", f"Where it lies: {tilde(result.folder)}/"]
    groups: dict[str, list[str]] = {}
    for name, _ in list_files(result.folder):
        kind = "models" if name.endswith(".manifest.json") else KINDS.get(Path(name).suffix, "other files")
        groups.setdefault("folders" if "/" in name else kind, []).append(name)
    inside = Counter(name.split("/")[0] for name in groups.get("folders", []))
    groups["folders"] = [f"{name}/ ({count} files)" for name, count in inside.items()]
    lines += [
        f"  {kind:<12} {', '.join(groups[kind])}"
        for kind in dict.fromkeys([*KINDS.values(), "folders", "other files"])
        if groups.get(kind)
    ]
    return "\n".join(lines)


KINDS = {
    ".ipynb": "notebooks",
    ".csv": "tables",
    ".png": "figures",
    ".svg": "figures",
    ".json": "stages",
    ".md": "summary",
    ".gguf": "models",
}


def list_files(folder: Path) -> list[tuple[str, int]]:
    """Every file under a folder as (path relative to it, size in bytes), hidden ones left out."""
    return sorted(
        (path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


# --- stamping --------------------------------------------------------------------------------------

BRANCH = "main"

SETUP = """\
# On Colab or Kaggle: fetch the workbook and install it. Elsewhere: nothing.
import os
import sys

if {{"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"}} & set(os.environ):
    if not os.path.isdir("../dfqs_nb"):
        !git clone -q --depth 1 {address}
        %cd -q {name}/notebooks
    %pip install -q -e ..  # builds llama.cpp: ten minutes, once
    sys.path.insert(0, os.path.abspath(".."))"""

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
    """A notebook's text with its badges (cell tagged ``badges``) and its set-up cell (``setup``) renewed."""
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
    return notebook_text(notebook)


def stamped_readme(text: str, notebooks: Sequence[Path], address: str) -> str:
    """README with its clone commands and its list of notebooks renewed."""
    text = stamp_block(text, "clone", CLONE.format(address=address, name=address.rsplit("/", 1)[-1]))
    rows = ["| Notebook | Open in |", "|---|---|"]
    rows += [
        f"| [{_title(path)}](notebooks/{path.name}) | {badges(path.name, address).replace(chr(10), ' ')} |"
        for path in notebooks
    ]
    return stamp_block(text, "notebooks", "\n".join(rows))


def _title(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    match = re.search(r"^# (.+)$", "".join(cells[0]["source"]) if cells else "", flags=re.MULTILINE)
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
            stamped_readme(old, notebooks, address)
            if path == readme
            else stamped_notebook(old, path.name, address)
        )
        if new != old:
            changed.append(path)
            if not check:
                with whole_file(path) as file:
                    file.write(new)
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
            extra_arguments=[QUIET],
            resources={"metadata": {"path": str(path.parent)}},
        )
        try:
            with kernel_environment(outputs):
                client.execute()
        except CellExecutionError as error:
            raise DfqsError(f"{error.ename}: {last_line(error.evalue)}", where=path.name) from error
        with whole_file(path) as file:
            file.write(notebook_text(clean_notebook(notebook, outputs)))


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
            cell.outputs = [_with_plain_paths(output, outputs) for output in merged_streams(cell.outputs)]
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


def merged_streams(outputs: Iterable[Any]) -> list[Any]:
    """Neighbouring pieces of one stream as one output: how print is cut into pieces is chance."""
    merged: list[Any] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output["output_type"] == "stream" == last.get("output_type") and output["name"] == last["name"]:
            last["text"] += output["text"]
        else:
            merged.append(output)
    return merged


def notebook_text(notebook: Any) -> str:
    """A notebook as the text that Jupyter itself would store."""
    import nbformat

    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"
