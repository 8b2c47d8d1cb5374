"""The runner: order, parameters, failures, summary; and its command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from gguf_fixtures import Spec, field, gguf_bytes
from sealed_run import make_run

from dfqs_nb import report
from dfqs_nb.core.errors import DfqsError, OutputError
from dfqs_nb.core.stage import Stage, read_stage
from dfqs_nb.gguf import broken as specimens
from dfqs_nb.merge import merge_model
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
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            parts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(parts)


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
    assert [item.path.stem for item in result.notebooks] == ["01_write", "02_read"]
    assert "read {'n_ctx': 77}" in texts(outputs / "mine" / "02_read.ipynb")
    assert result.summary == {"merge": ["merge saw 77"]}
    summary = (outputs / "mine" / "summary.md").read_text()
    assert "- merge saw 77" in summary and "[02_read](02_read.ipynb)" in summary
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
    assert Path(executable).parent.samefile(Path(sys.executable).parent)
    assert cwd == str(pair[0].parent)


def test_an_unknown_parameter_fails_and_names_the_known(outputs, pair):
    with pytest.raises(DfqsError, match=r"no notebook has a parameter 'nctx'; did you mean n_ctx\?$"):
        workbook.run_workbook("mine", {"nctx": 1}, pair)
    assert not (outputs / "mine").exists()


@pytest.fixture
def executed(monkeypatch):
    """The parameters of each notebook; nothing is executed."""
    seen = []

    def note(path, target, parameters, live):
        seen.append(parameters)
        return workbook.NotebookRun(target, 1.0)

    monkeypatch.setattr(workbook, "_executed", note)
    return seen


def test_a_part_that_runs_again_keeps_the_tier_of_its_run(outputs, pair, executed):
    """Whatever else its parts are given; and the same command goes on, also with the model in it."""
    for given, expected in (
        ({"tier": "standard"}, "standard"), ({}, "standard"), ({"n_ctx": 512}, "standard"), ({}, "standard"),
        ({"model": "dfqs-nano-q8_0"}, "nano"), ({"tier": "standard"}, "standard"),
        ({"model": "dfqs-nano-q8_0"}, "standard"), ({"tier": "nano"}, "nano"), ({}, "nano"),
        ({"model": "hf://owner/repo/another.gguf"}, "standard"),
    ):  # fmt: skip
        told = []
        workbook.run_workbook("mine", given, pair[:1], tell=told.append)
        assert told[0].startswith(f"run mine: {expected} tier"), (given, told)
    kept = json.loads((outputs / "mine" / ".command.json").read_text())
    assert kept["tier"] == "" and kept["options"] == []


def test_a_tier_among_the_parameters_is_the_tier_of_all_notebooks(outputs, pair, executed, capsys):
    """One of notebook 06 alone would mix tiers in one run, and no report is written of that."""
    told = []
    workbook.run_workbook("mine", {"tier": "standard"}, pair[:1], tell=told.append)
    assert "standard tier" in told[0] and "prompt_set=long-context-standard" in told[1]
    assert cli.main(["run", "--tier", "nano", "-p", "tier=standard"]) == 1
    assert "tier is given twice, as an option and with -p" in capsys.readouterr().err


def test_the_same_command_never_erases_a_climbed_ladder(outputs, tmp_path, executed):
    """The run's own model is quantized: a ladder needs the file that was named for it once."""
    parameters = f'{PARAMETERS}\nladder_source: str = ""  # what to climb'
    climb = write_notebook(tmp_path / "nb" / "08_climb.ipynb", parameters=parameters)
    source, told = tmp_path / "F16.gguf", []
    source.write_bytes(b"GGUF")
    model, kinds = tmp_path / "q4.gguf", [field("general.architecture", "STRING", "llama")]
    model.write_bytes(gguf_bytes(kinds, [Spec("output.weight", "Q4_K", (256, 64))]))
    Stage("mine", "merge").finish(conditions={}, summary=[], model={"path": str(model)})

    def run(**given):
        workbook.run_workbook("mine", {"tier": "standard"} | given, [climb], tell=told.append)
        return executed[-1]["ladder_source"] if executed else ""

    assert not run() and "is quantized already" in told[-1]
    assert "not climbed" in read_stage(outputs / "mine", "ladder")["summary"][0]
    assert run(ladder_source=str(source)) == run() == str(source), "the run remembers it"
    assert len(executed) == 2
    Stage("mine", "ladder").finish(conditions={}, summary=["four hours of work"], rungs=[1, 2])
    source.unlink()
    run()
    assert "the ladder that was climbed before stays" in told[-1] and len(executed) == 2
    assert read_stage(outputs / "mine", "ladder")["summary"] == ["four hours of work"]


def test_two_runs_in_one_folder_are_refused_and_the_first_keeps_its_command(outputs, pair):
    workbook.run_workbook("mine", {"n_ctx": 77}, pair[:1])
    before = (outputs / "mine" / ".command.json").read_text()
    with (
        workbook.alone(outputs / "mine"),
        pytest.raises(DfqsError, match="another run is at work in this folder; wait for it, or"),
    ):
        workbook.run_workbook("mine", {}, pair)
    assert (outputs / "mine" / ".command.json").read_text() == before


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
        DfqsError, match=r"01_die.ipynb: the kernel died in cell 6/6 Try a thing .*its output so far is in"
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
    workbook.run_workbook("mine", {"model": "nb/../nb"}, [show])  # a path that is no name
    assert f"got {tmp_path / 'nb/../nb'}" in texts(outputs / "mine" / "01_show.ipynb")
    workbook.run_workbook("mine", {"model": "outputs"}, [show])
    assert "got outputs\n" in texts(outputs / "mine" / "01_show.ipynb"), "a registry name is not a path"
    (tmp_path / "my.toml").touch()
    workbook.run_workbook("mine", {"model": "Q8_0  my.toml"}, [show])  # as rungs, with a recipe of one's own
    assert f"got Q8_0  {tmp_path / 'my.toml'}" in texts(outputs / "mine" / "01_show.ipynb")


def test_folders_are_looked_for_where_the_user_typed_them(outputs, tmp_path, monkeypatch):
    """Also without a slash or a dot, which tell a path from a registry's name elsewhere."""
    (tmp_path / "merged").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ("texts", "output_dir", "prompt_folder", "matrix_file")
    declared = "\n".join(f'{name}: str = ""  # a place' for name in names)
    show = write_notebook(
        tmp_path / "nb" / "01_show.ipynb", f"print({', '.join(names)})", parameters=declared
    )
    given = {"texts": "mytexts", "output_dir": "merged", "prompt_folder": "", "matrix_file": "~/m"}
    workbook.run_workbook("mine", given, [show])
    said = f"{tmp_path / 'mytexts'} {tmp_path / 'merged'}  {Path('~/m').expanduser()}"
    assert said in texts(outputs / "mine" / "01_show.ipynb")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_a_run_name_cannot_leave_the_outputs(outputs, pair, name):
    with pytest.raises(OutputError):
        workbook.run_workbook(name, {}, pair)


@pytest.mark.parametrize(
    "text, type_name", [("many", "int"), ("1.5", "int"), ("True", "int"), ("x", "float"), ("2", "bool")]
)
def test_a_value_of_another_type_is_refused(text, type_name):
    words = {"int": "a whole number", "float": "a number", "bool": "true or false"}[type_name]
    with pytest.raises(DfqsError, match=f"parameter n takes {words}, not '{text}'$"):
        workbook.parse_parameters({"n": text}, {"n": type_name})


def test_values_have_the_types_that_a_notebook_declares():
    texts = {"n_ctx": "4096", "fresh": "true", "model": "1"}
    types = {"n_ctx": "int", "fresh": "bool", "model": "str"}
    assert workbook.parse_parameters(texts, types) == {"n_ctx": 4096, "fresh": True, "model": "1"}


def test_a_run_is_named_after_its_model():
    named = workbook.default_run_name
    assert (named(None), named("/models/Qwen3-Q8_0-00001-of-00002.gguf")) == ("nano", "Qwen3-Q8_0")


def test_the_verdict_stands_once_in_a_summary_and_the_end_of_a_run_names_a_place(tmp_path):
    lines = {"merge": ["one file"], "dfqs_report": ["? Is the file sound? Yes"]}
    result = workbook.WorkbookRun(tmp_path, [], lines, "A model\n? Is the file sound? Yes")
    assert workbook.summary_markdown(result).count("Is the file sound?") == 1
    shown = workbook.summary_text(result).splitlines()
    assert shown[-1] == f"Where it is: {tmp_path}/report.html" and shown[-2] == ""
    assert not any(line.startswith("open ") for line in shown)


def test_summary_order_is_that_of_the_stages_and_other_json_is_left_out(tmp_path):
    for stage in ("generate", "merge", "header"):
        (tmp_path / f"{stage}.json").write_text(json.dumps({"stage": stage, "summary": [stage]}))
    (tmp_path / "table.json").write_text("[1, 2]")
    assert list(workbook.read_summary(tmp_path)) == ["merge", "header", "generate"]
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(DfqsError, match="scores.json: cannot be read .*run 06_score"):
        workbook.read_summary(tmp_path)


# --- the command line ------------------------------------------------------------------------------


def test_command_line_runs_types_values_and_prints_the_summary(outputs, pair, monkeypatch, capsys):
    monkeypatch.setattr(workbook, "find_notebooks", lambda names=(): pair)
    assert cli.main(["run", "--run", "mine", "-p", "n_ctx=99"]) == 0
    printed = capsys.readouterr().out
    assert "merge saw 99" in printed and "Where it is" in printed and "02_read: " in printed
    assert cli.main(["run", "--run", "mine", "-p", "n_ctx = 98"]) == 0
    assert "merge saw 98" in capsys.readouterr().out
    assert cli.main(["run", "-p", "n_ctx=many"]) == 1
    error = capsys.readouterr().err
    assert error == "dfqs-nb: the parameter n_ctx takes a whole number, not 'many'\n"


def test_the_parameter_budget_minutes_is_the_budget_of_the_whole_run(outputs, tmp_path, monkeypatch, capsys):
    parameters = 'run_name: str = "nano"  # folder\nbudget_minutes: float = 60.0  # limit'
    name = "05_measure_long_context.ipynb"
    paths = [write_notebook(tmp_path / "nb" / name, "print('has', budget_minutes)", parameters=parameters)]
    monkeypatch.setattr(workbook, "find_notebooks", lambda names=(): paths)
    (outputs / "mine").mkdir(parents=True)
    (outputs / "mine" / "merge.json").write_text('{"stage": "merge"}')
    assert cli.main(["run", "--run", "mine", "-p", "budget_minutes=5"]) == 0
    assert "run mine: nano tier, 1 notebook, at most about 5 min" in capsys.readouterr().out
    unbound = [write_notebook(tmp_path / "nb" / "01_try.ipynb", "1")]
    workbook.run_workbook("mine", notebooks=unbound, tell=print)
    assert "run mine: nano tier, 1 notebook\n" in capsys.readouterr().out, "01 obeys no budget"
    assert "has 5.0" in texts(outputs / "mine" / name)
    for none in (["-p", "budget_minutes=0"], ["--budget-minutes", "0"], ["-p", "budget_minutes=nan"]):
        assert cli.main(["run", "--run", "mine", *none]) == 1
        assert "give a run 1 minute or more" in capsys.readouterr().err
    assert cli.main(["run", "--run", "mine", "-p", "budget_minutes=3", "--budget-minutes", "4"]) == 1
    assert "budget_minutes is given twice, as an option and with -p" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["", "my.gguf"])
def test_a_part_of_a_run_that_nobody_began_is_refused_before_anything_is_made(outputs, capsys, model):
    (outputs / "SmolLM2").mkdir(parents=True)
    (outputs / "SmolLM2" / "merge.json").touch()
    assert cli.main(["run", "02", "06", "--run", "SmolLM", *(["--model", model] if model else [])]) == 1
    error = capsys.readouterr().err
    assert "no run is called 'SmolLM'; did you mean SmolLM2? there are: SmolLM2; to begin it: " in error
    assert f"dfqs-nb run 01 02 06 --run SmolLM --model {model or 'MODEL'}`" in error
    assert cli.main(["run", "7"]) == 1 and "dfqs-nb run 01 07 --run nano`" in capsys.readouterr().err
    assert [path.name for path in outputs.iterdir()] == ["SmolLM2"]
    (outputs / "empty").mkdir()
    assert cli.main(["run", "02", "--run", "empty"]) == 1
    assert "empty: notebook 01 did not run here; to begin it: `" in capsys.readouterr().err


@pytest.fixture
def begun(outputs):
    """A finished run of the reference model, without a report."""
    (outputs / "mine").mkdir(parents=True)
    model = outputs / "mine" / "DFQS-Nano-IQ1_S-XL.gguf"
    merge_model(specimens.reference_shards().paths[0], model)
    return make_run(outputs / "mine", model)


def test_after_a_part_of_a_run_the_verdict_is_of_what_lies_there_now(begun):
    folder = begun
    report.write_report(folder, before := report.build_report(folder, ask_llama_cpp=False))
    done = [workbook.NotebookRun(folder / "03_load_and_generate.ipynb")]
    (folder / "scores.json").unlink()
    result = workbook._summed_up(folder, done)
    assert "notebook 06 did not run" in result.verdict and "notebook 06 did not" not in f"{before}"
    assert "notebook 06 did not run" in (folder / "report.md").read_text()
    (folder / "header_table.csv").write_text("edited")
    shown = workbook.summary_text(workbook._summed_up(folder, done))
    assert "the report is older than this; a new one cannot be written: " in shown and "? Is" not in shown
    assert "run 02_inspect_header.ipynb again" in shown


def test_a_report_says_that_a_run_is_at_work_and_its_file_names_its_run(begun, capsys):
    assert cli.main(["report", "mine"]) == 0 and "at work" not in capsys.readouterr().out
    with workbook.alone(begun):
        assert cli.main(["report", str(begun / "report.json")]) == 0
    assert capsys.readouterr().out.startswith("a run is at work in this folder: what it has not finished")


@pytest.mark.parametrize(
    ("model", "says"),
    [("bad.gguf", "is no model: "), ("gone.gguf", "no such file"), ("dfqs-nano", "did you mean dfqs-nano-")]
    + [("hf://owner/repo", "not the address of a GGUF")],
)
def test_what_is_no_model_is_refused_before_anything_is_made(
    outputs, tmp_path, monkeypatch, capsys, model, says
):
    (tmp_path / "bad.gguf").write_text("<html>not found</html>")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--model", model]) == 1
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.count("\n") == 1 and not shown.out and not outputs.exists()


def test_a_shard_is_a_model_and_one_that_a_merge_deleted_names_the_merge(tmp_path):
    shards, folder = (
        [shutil.copy(it, tmp_path) for it in specimens.reference_shards().paths],
        tmp_path / "run",
    )
    workbook.check_model(str(shards[0]), folder)
    assert not folder.exists()
    folder.mkdir()
    merge_model(shards[0], folder / "DFQS-Nano-IQ1_S-XL.gguf", consume=True)
    with pytest.raises(DfqsError, match="was merged and then deleted"):
        workbook.check_model(str(shards[0]), folder)


def test_an_unknown_notebook_is_named_with_those_that_exist(tmp_path, pair):
    assert workbook.find_notebooks(["02"], pair[0].parent) == [pair[1]]
    assert workbook.find_notebooks(["2"], pair[0].parent) == [pair[1]]
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
        "import sys, dfqs_nb.workbook.cli as c; c.main(['--version']); print(sorted({'pandas', 'papermill', 'numpy', 'gguf', "
        "'llama_cpp', 'matplotlib', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=workbook.REPOSITORY
    )
    assert done.stdout.split("\n")[1] == "[]"


def test_a_notebook_after_the_report_cannot_take_the_verdict_away(outputs, tmp_path):
    live = workbook.Live(tmp_path, 0.0, None)
    broken = write_notebook(tmp_path / "nb" / "09_serve_and_deploy.ipynb", "1 / 0")
    target = outputs / "mine" / broken.name
    target.parent.mkdir(parents=True)
    with pytest.raises(DfqsError, match="ZeroDivisionError"):
        workbook._executed(broken, target, {}, live)
    target.with_name("report.json").write_text("{}")
    done = workbook._executed(broken, target, {}, live)
    assert done.failed and "ZeroDivisionError" in done.left_out
