"""What a reader may expect of every notebook, checked without running it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import operator
import re
from pathlib import Path

import nbval_close
import pytest
import store_notebooks

from dfqs_nb.core.paths import REPOSITORY, public_address
from dfqs_nb.workbook import run as workbook

PATHS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in PATHS}
VERBS = {"start", "merge", "inspect", "load", "check", "measure", "score", "write", "climb", "serve"}
PARAMETER = re.compile(r"[a-z_][a-z0-9_]*: [\w\[\], |]+ = [^=]+?  # [^=]+")
# IPython reads a line that begins with the name of a magic and a space or colon as that magic
MAGICS = {
    "run",
    "time",
    "store",
    "save",
    "load",
    "edit",
    "page",
    "history",
    "logstart",
    "macro",
    "prun",
    "pip",
    "conda",
    "config",
    "env",
    "cd",
    "ls",
    "cat",
    "alias",
    "matplotlib",
    "precision",
    "debug",
    "reset",
}


def source(cell) -> str:
    return "".join(cell["source"])


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", [])]


def code_cells(notebook) -> list:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def python(cell) -> str:
    """A cell's source with IPython's own lines made into calls, so that `ast` can read it."""
    return re.sub(r"^(\s*)[!%].*$", r"\1pass", source(cell), flags=re.MULTILINE)


@pytest.fixture(params=sorted(NOTEBOOKS), ids=str)
def notebook(request):
    return NOTEBOOKS[request.param]


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def test_the_workbook_is_there_and_numbered_without_gaps():
    assert len(PATHS) >= 3
    assert [int(path.name[:2]) for path in PATHS] == list(range(len(PATHS)))


def test_name_and_title_begin_with_the_same_verb(path):
    number, verb, *rest = path.stem.split("_")
    assert re.fullmatch(r"\d\d", number) and verb in VERBS and rest
    title = source(NOTEBOOKS[path.stem]["cells"][0]).splitlines()[0]
    assert re.match(rf"# ({int(number)}\. )?{verb.capitalize()}\b", title), title
    words = [word for word in re.findall(r"[^\W\d]+", title)[1:] if word.istitle() and word != "Python"]
    assert len(words) <= 1, f"sentence case: {title}"


def test_the_first_cell_has_the_badges_and_the_second_says_what_it_takes(notebook):
    first, second = notebook["cells"][:2]
    assert first["cell_type"] == second["cell_type"] == "markdown"
    assert "badges" in first["metadata"].get("tags", [])
    assert "colab.research.google.com/github/" in source(first) and "kaggle.com/kernels/welcome" in source(
        first
    )
    text = source(second).lower().replace("’", "'")
    assert all(phrase in text for phrase in ("you'll do", "you'll learn", "you'll need")), text
    learn = text[text.index("you'll learn") : text.index("you'll need")]
    assert 3 <= len(re.findall(r"^\s*[-*] ", learn, flags=re.MULTILINE)) <= 5, "three to five payoffs"


def test_parameters_are_one_cell_that_papermill_reads_whole(path):
    cells = tagged(NOTEBOOKS[path.stem], "parameters")
    assert len(cells) == 1
    lines = source(cells[0]).splitlines()
    for line in lines:
        assert PARAMETER.fullmatch(line), f"not `name: type = value  # help`: {line}"
        assert line.count("=") == 1, f"papermill drops a parameter whose line has another '=': {line}"
        assert line.split(":")[0] not in MAGICS, f"IPython would run its magic: {line}"
    declared = workbook.declared_parameters(path)
    assert list(declared) == [line.split(":")[0] for line in lines], "every line is a parameter to papermill"
    assert all(p["help"] and p["inferred_type_name"] != "None" for p in declared.values())
    assert "run_name" in declared, "a notebook hands on files under outputs/<run_name>/"


def test_setup_is_short_stamped_and_right_after_the_parameters(notebook):
    cells = tagged(notebook, "setup")
    assert len(cells) == 1
    assert len(source(cells[0]).splitlines()) <= 12
    assert cells[0]["metadata"]["jupyter"] == {"source_hidden": True}
    assert source(cells[0]) == store_notebooks.setup_cell(public_address()), "run `make stamp`"
    code = code_cells(notebook)
    assert [tagged(notebook, "parameters")[0], cells[0]] == code[:2]


def test_cells_are_small(notebook):
    sizes = []
    for cell in code_cells(notebook):
        lines = source(cell).splitlines()
        sizes.append(len(lines))
        assert len(lines) <= 25, source(cell)
        assert not [line for line in lines if len(line) > 79], source(cell)
    assert sorted(sizes)[len(sizes) // 2] <= 8, "half of the cells are about five lines"


def test_the_notebook_calls_the_package_and_defines_nothing(notebook):
    imported = []
    for cell in code_cells(notebook):
        tree = ast.parse(python(cell))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.While), (
                source(cell)
            )
            if isinstance(node, ast.ImportFrom) and node.module.startswith("dfqs_nb"):
                assert node.module == "dfqs_nb", f"a door has what notebooks need: {node.module}"
                imported += [alias.name for alias in node.names]
    assert 1 <= len(imported) <= 4, imported


def test_what_a_notebook_calls_is_there_and_takes_these_arguments(notebook):
    nodes = [node for cell in code_cells(notebook) for node in ast.walk(ast.parse(python(cell)))]
    doors = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    for node in nodes:
        text = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        door, _, name = text.partition(".")
        if door not in doors or not re.fullmatch(r"\w+(\.\w+)*", name):
            continue
        called = operator.attrgetter(name)(importlib.import_module(f"dfqs_nb.{door}"))
        spread = [*node.args, *(word for word in node.keywords if word.arg is None)]
        if not any(isinstance(part, ast.Starred | ast.keyword) for part in spread):
            inspect.signature(called).bind(*node.args, **{word.arg: word.value for word in node.keywords})


def test_claims_are_asserted_with_a_message(notebook):
    claims = [
        node
        for cell in code_cells(notebook)
        for node in ast.walk(ast.parse(python(cell)))
        if isinstance(node, ast.Assert)
    ]
    assert claims and all(claim.msg is not None for claim in claims)


def test_prose_stands_between_the_code(notebook):
    """Never more than three code cells in a row (parameters, set-up and versions)."""
    run = longest = 0
    for cell in notebook["cells"]:
        run = run + 1 if cell["cell_type"] == "code" else 0
        longest = max(longest, run)
    assert longest <= 3


def test_the_last_cell_closes_and_points_on(notebook):
    last = notebook["cells"][-1]
    assert last["cell_type"] == "markdown" and "Next" in source(last)
    close = "\n".join(
        source(cell) for cell in notebook["cells"][-3:] if cell["cell_type"] == "markdown"
    ).lower()
    assert "not show" in close or "not** show" in close or "not* show" in close, "say what was not shown"


def test_links_to_other_files_lead_somewhere(path):
    for cell in NOTEBOOKS[path.stem]["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\((?!https?://|#|attachment:)([^)#\s]+)", source(cell)):
                assert (path.parent / target).exists(), target


def test_outputs_are_stored_in_order_and_without_errors(notebook):
    cells = [cell for cell in code_cells(notebook) if source(cell).strip()]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), (
        "run `make notebooks`"
    )
    assert sum(bool(cell["outputs"]) for cell in cells) >= 3
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    assert not [out for cell in cells for out in cell["outputs"] if out.get("name") == "stderr"], (
        "warnings shown"
    )


def test_the_file_is_small_and_clean(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 250_000
    notebook = NOTEBOOKS[path.stem]
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}, "run `make notebooks`"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert "application/vnd.jupyter.widget" not in text
    for cell in notebook["cells"]:
        hidden = {"jupyter"} if cell in tagged(notebook, "setup") else set()
        assert set(cell["metadata"]) <= {"tags"} | hidden, cell["metadata"]
        assert "injected-parameters" not in cell["metadata"].get("tags", [])


def test_an_output_that_is_not_compared_says_why(notebook):
    """Few are, and a misspelled tag would compare, or ignore, without anybody noticing."""
    known = {"parameters", "setup", "nbval-ignore-output", "needs-sandbox", *nbval_close.REASONS}
    ignored = tagged(notebook, "nbval-ignore-output")
    for cell in code_cells(notebook):
        tags = set(cell["metadata"].get("tags", []))
        assert not {tag for tag in tags - known if not nbval_close.TAG.fullmatch(tag)}, tags
        assert bool(tags & nbval_close.REASONS) == ("nbval-ignore-output" in tags), source(cell)
    assert len(ignored) <= 4


def test_no_folder_of_a_machine_is_stored(notebook):
    for cell in code_cells(notebook):
        found = re.findall(
            r"(?<![\w.:/])/(?:tmp|home|root|Users|work|private|var)/\S*", json.dumps(cell["outputs"])
        )
        assert not found, found
