"""The runner: order, parameters, failures, summary; stamping; the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from dfqs_nb.core.errors import DfqsError, OutputError
from dfqs_nb.workbook import cli
from dfqs_nb.workbook import run as workbook

PARAMETERS = 'run_name: str = "nano"  # folder under outputs/\nn_ctx: int = 512  # tokens'
STAGE = """
import json, os
from pathlib import Path
folder = Path(os.environ["DFQS_OUTPUTS"]) / run_name
stage = {"stage": NAME, "conditions": {"n_ctx": n_ctx}, "summary": [f"{NAME} saw {n_ctx}"]}
(folder / f"{NAME}.json").write_text(json.dumps(stage))
"""


def write_notebook(path: Path, *sources: str, parameters: str = PARAMETERS) -> Path:
    cells = [
        nbformat.v4.new_markdown_cell("# Try a thing", metadata={"tags": ["badges"]}),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("", metadata={"tags": ["setup"]}),
    ]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    path.parent.mkdir(exist_ok=True)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def texts(path: Path) -> str:
    """Everything that the code cells of an executed notebook printed or returned."""
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(found)


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


@pytest.fixture
def pair(tmp_path):
    """Two notebooks; the second reads what the first wrote, and only the first declares n_ctx."""
    first = write_notebook(
        tmp_path / "nb" / "01_write.ipynb",
        STAGE.replace("NAME", "'merge'"),
        "import sys, os\nprint(sys.executable, os.getcwd())",
    )
    second = write_notebook(
        tmp_path / "nb" / "02_read.ipynb",
        "import json, os\nfrom pathlib import Path\n"
        "folder = Path(os.environ['DFQS_OUTPUTS']) / run_name\n"
        "print('read', json.loads((folder / 'merge.json').read_text())['conditions'])",
        parameters='run_name: str = "nano"  # folder',
    )
    return [first, second]


def test_runs_in_order_with_parameters_and_sums_up(outputs, pair):
    result = workbook.run_workbook("mine", {"n_ctx": 77}, pair)
    assert [item.name for item in result.notebooks] == ["01_write", "02_read"]
    assert "read {'n_ctx': 77}" in texts(outputs / "mine" / "02_read.ipynb")
    assert result.summary == {"merge": ["merge saw 77"]}
    summary = (outputs / "mine" / "summary.md").read_text()
    assert "- merge saw 77" in summary and "[02_read](02_read.ipynb)" in summary and "`merge.json`" in summary
    assert "merge saw 77" in workbook.summary_text(result)


def test_the_kernel_is_this_interpreter_even_beside_a_users_kernel(outputs, pair, tmp_path, monkeypatch):
    """A `python3` kernel of the user's that cannot start must not be taken."""
    spec = tmp_path / "user" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps(
            {"argv": ["/nowhere/python", "{connection_file}"], "display_name": "x", "language": "python"}
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "user"))
    workbook.run_workbook("kernel", {}, pair[:1])
    executable, cwd = texts(outputs / "kernel" / "01_write.ipynb").splitlines()[-1].split()
    assert os.path.samefile(Path(executable).parent, Path(sys.executable).parent)
    assert cwd == str(pair[0].parent)


def test_an_unknown_parameter_fails_and_names_the_known(outputs, pair):
    with pytest.raises(DfqsError, match=r"no notebook has a parameter 'nctx'; known: n_ctx, run_name"):
        workbook.run_workbook("mine", {"nctx": 1}, pair)
    assert not (outputs / "mine").exists()


NO_KERNEL = (
    '{"cells": [{"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": "a = 1", '
    '"outputs": [], "execution_count": null}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
)


@pytest.mark.parametrize("text", ["", "not JSON", NO_KERNEL])
def test_a_file_that_papermill_cannot_run_is_named(outputs, tmp_path, text):
    path = tmp_path / "01_broken.ipynb"
    path.write_text(text)
    with pytest.raises(DfqsError, match="01_broken.ipynb: papermill cannot read it"):
        workbook.run_workbook("mine", {}, [path])


def test_a_failing_cell_is_named_and_earlier_outputs_stay(outputs, pair, tmp_path):
    bad = write_notebook(
        tmp_path / "nb" / "03_fail.ipynb", "print('so far')", "raise ValueError('one\\ntwo')"
    )
    after = write_notebook(tmp_path / "nb" / "04_never.ipynb", "print('never')")
    with pytest.raises(DfqsError) as caught:
        workbook.run_workbook("mine", {}, [*pair, bad, after])
    message = str(caught.value)
    assert message.startswith("03_fail.ipynb: cell In [4] failed: ValueError: two")
    assert str(outputs / "mine" / "03_fail.ipynb") in message
    assert "so far" in texts(outputs / "mine" / "03_fail.ipynb")
    assert (outputs / "mine" / "02_read.ipynb").exists() and (outputs / "mine" / "merge.json").exists()
    assert not (outputs / "mine" / "04_never.ipynb").exists()


def test_a_dead_kernel_is_an_error_with_its_cell(outputs, tmp_path):
    dead = write_notebook(tmp_path / "nb" / "01_die.ipynb", "print('alive')", "import os; os.abort()")
    with pytest.raises(
        DfqsError, match=r"01_die.ipynb: the kernel died in cell 6 .*its output so far lies in"
    ):
        workbook.run_workbook("mine", {}, [dead])
    assert "alive" in texts(outputs / "mine" / "01_die.ipynb")


def test_a_relative_model_file_reaches_the_notebook_as_absolute(outputs, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    show = write_notebook(
        tmp_path / "nb" / "01_show.ipynb",
        "print('got', model)",
        parameters='model: str = "nano"  # name or file',
    )
    workbook.run_workbook("mine", {"model": "m.gguf"}, [show])
    assert f"got {tmp_path / 'm.gguf'}" in texts(outputs / "mine" / "01_show.ipynb")
    workbook.run_workbook("mine", {"model": "outputs"}, [show])
    assert "got outputs\n" in texts(outputs / "mine" / "01_show.ipynb"), "a registry name is not a path"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_a_run_name_cannot_leave_the_outputs(outputs, pair, name):
    with pytest.raises(OutputError):
        workbook.run_workbook(name, {}, pair)


@pytest.mark.parametrize(
    "text, type_name", [("many", "int"), ("1.5", "int"), ("True", "int"), ("x", "float"), ("1", "bool")]
)
def test_a_value_of_another_type_is_refused(text, type_name):
    with pytest.raises(DfqsError, match=f"parameter n takes {type_name}"):
        workbook.parse_value("n", text, type_name)


def test_summary_order_is_that_of_the_stages_and_other_json_is_left_out(tmp_path):
    for stage in ("zeta", "generate", "merge", "header"):
        (tmp_path / f"{stage}.json").write_text(json.dumps({"stage": stage, "summary": [stage]}))
    (tmp_path / "table.json").write_text("[1, 2]")
    assert list(workbook.read_summary(tmp_path)) == ["merge", "header", "generate", "zeta"]
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(DfqsError, match="torn.json: not JSON"):
        workbook.read_summary(tmp_path)


# --- stamping --------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[project.urls]\nRepository = "https://github.com/someone/thing"\n'
    )
    (root / "README.md").write_text(
        "# X\n<!-- clone -->\n<!-- /clone -->\n<!-- notebooks -->\n<!-- /notebooks -->\n"
    )
    write_notebook(root / "notebooks" / "01_try.ipynb", "1 + 1")
    return root


def test_stamp_writes_once_checks_and_follows_the_address(checkout):
    notebook, readme = checkout / "notebooks" / "01_try.ipynb", checkout / "README.md"
    assert workbook.stamp(checkout, check=True) == [notebook, readme]
    assert "someone/thing" not in readme.read_text(), "--check changes nothing"
    assert workbook.stamp(checkout) == [notebook, readme]
    assert workbook.stamp(checkout) == [] == workbook.stamp(checkout, check=True)
    cells = nbformat.read(notebook, as_version=4).cells
    assert cells[0].source.startswith("# Try a thing")
    assert (
        "colab.research.google.com/github/someone/thing/blob/main/notebooks/01_try.ipynb" in cells[0].source
    )
    assert "kaggle.com/kernels/welcome?src=https://github.com/someone/thing/blob" in cells[0].source
    assert "git clone -q --depth 1 https://github.com/someone/thing\n" in cells[2].source
    assert "git clone https://github.com/someone/thing\ncd thing" in readme.read_text()
    assert "[01 Try a thing](notebooks/01_try.ipynb)" in readme.read_text()
    address = (checkout / "pyproject.toml").read_text().replace("someone/thing", "other/place")
    (checkout / "pyproject.toml").write_text(address)
    workbook.stamp(checkout)
    stamped = notebook.read_text() + readme.read_text()
    assert "someone/thing" not in stamped and "other/place" in stamped


def test_the_setup_cell_fetches_and_installs_on_colab_and_does_nothing_elsewhere(tmp_path, monkeypatch):
    """Run the stamped cell in a kernel: git clones a local repository, pip only resolves (dry run)."""
    origin = tmp_path / "thing"
    (origin / "notebooks").mkdir(parents=True)
    (origin / "dfqs_nb").mkdir()
    (origin / "dfqs_nb" / "__init__.py").write_text("")
    (origin / "notebooks" / "x.ipynb").write_text("{}")
    (origin / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "thing"\nversion = "1"\n'
        '[tool.setuptools]\npackages = ["dfqs_nb"]\n'
    )
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(origin)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    source = workbook.setup_cell(f"file://{origin}")
    assert len(source.splitlines()) <= 12
    show = "import os, importlib.util as u\nprint('at', os.getcwd(), u.find_spec('dfqs_nb').origin)"
    for variable, inside in (("COLAB_RELEASE_TAG", True), ("NOT_HOSTED", False)):
        place = tmp_path / variable
        report = tmp_path / f"{variable}.json"
        notebook = write_notebook(place / "01_setup.ipynb", source, show, parameters="")
        monkeypatch.setenv("DFQS_OUTPUTS", str(place / "outputs"))
        with monkeypatch.context() as hosted:
            for name, value in {
                variable: "1",
                "PIP_DRY_RUN": "1",
                "PIP_NO_BUILD_ISOLATION": "0",
                "PIP_NO_INDEX": "1",
                "PIP_REPORT": str(report),
            }.items():
                hosted.setenv(name, value)
            workbook.run_workbook("mine", {}, [notebook])
        printed = texts(place / "outputs" / "mine" / "01_setup.ipynb")
        assert (place / "thing" / "notebooks").is_dir() == inside
        assert (f"at {place}/thing/notebooks {place}/thing/dfqs_nb/__init__.py" in printed) == inside
        planned = json.loads(report.read_text())["install"] if inside else report.exists() and "pip ran"
        assert ([item["metadata"]["name"] for item in planned] == ["thing"]) if inside else not planned


# --- stored outputs --------------------------------------------------------------------------------


def test_refresh_stores_outputs_without_traces_of_the_machine(tmp_path):
    path = write_notebook(
        tmp_path / "nb" / "01_show.ipynb",
        "print('a')\nimport sys\nsys.stdout.flush()\nprint('b')",
        "from dfqs_nb.core.display import tqdm\nfor _ in tqdm(range(3)): pass\n42",
        "import os\nfrom pathlib import Path\nPath(os.environ['DFQS_OUTPUTS']) / run_name",
    )
    workbook.refresh_notebooks([path], tmp_path / "outputs")
    first = path.read_text()
    notebook = json.loads(first)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    outputs = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [output["text"] for output in outputs[-3]] == [["a\n", "b\n"]], "one stream, however it was cut"
    assert [output["output_type"] for output in outputs[-2]] == ["execute_result"], "no progress bar"
    assert outputs[-1][0]["data"]["text/plain"] == ["PosixPath('outputs/nano')"]
    assert not any(set(cell["metadata"]) - {"tags"} for cell in notebook["cells"])
    workbook.refresh_notebooks([path], tmp_path / "outputs")
    assert path.read_text() == first


def test_refresh_leaves_a_notebook_that_fails_as_it_was(tmp_path):
    path = write_notebook(tmp_path / "nb" / "01_fail.ipynb", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(DfqsError, match="01_fail.ipynb: ZeroDivisionError: division by zero"):
        workbook.refresh_notebooks([path], tmp_path / "outputs")
    assert path.read_bytes() == before


# --- the command line ------------------------------------------------------------------------------


def test_command_line_runs_types_values_and_prints_the_summary(outputs, pair, monkeypatch, capsys):
    monkeypatch.setattr(workbook, "find_notebooks", lambda names=(): pair)
    assert cli.main(["run", "--run", "mine", "-p", "n_ctx=99"]) == 0
    printed = capsys.readouterr().out
    assert "merge saw 99" in printed and "Where it lies" in printed and "02_read: " in printed
    assert cli.main(["run", "-p", "n_ctx=many"]) == 1
    error = capsys.readouterr().err
    assert error == "dfqs-nb: parameter n_ctx takes int, not 'many'\n"


def test_an_unknown_notebook_is_named_with_those_that_exist(tmp_path, pair):
    assert workbook.find_notebooks(["02"], pair[0].parent) == [pair[1]]
    with pytest.raises(DfqsError, match="no notebook is called '07'; .*"):
        try:
            workbook.find_notebooks(["07"], pair[0].parent)
        except DfqsError as error:
            assert "01_write, 02_read" in str(error)
            raise DfqsError(error.what, hint=error.hint) from error


def test_a_user_error_is_one_line_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "dfqs_nb", "run", "-p", "x"],
        capture_output=True,
        text=True,
        cwd=workbook.REPOSITORY,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("dfqs-nb: ")


def test_starting_the_command_line_imports_nothing_heavy():
    code = (
        "import sys, dfqs_nb.workbook.cli as c; c.parser(); print(sorted({'pandas', 'papermill', 'numpy', 'gguf', "
        "'llama_cpp', 'matplotlib', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=workbook.REPOSITORY
    )
    assert done.stdout.strip() == "[]"
