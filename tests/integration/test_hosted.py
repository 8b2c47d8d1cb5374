"""Each notebook alone on a machine like those of Colab and Kaggle: an empty folder, old packages, no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import hosted
import hosted_machine
import pytest

from dfqs_nb.core.paths import REPOSITORY
from dfqs_nb.workbook import run as workbook

COLAB, KAGGLE = hosted.PLATFORMS
NAMES = [path.name for path in workbook.find_notebooks()]
START, MERGE, INSPECT = NAMES[:3]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    if not shutil.which("git"):
        pytest.skip("no git here")
    return hosted_machine.make_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def machine(tmp_path, request):
    """A machine by (platform, notebook, old packages)."""
    made = hosted_machine.Machine(tmp_path, *request.param)
    yield made
    made.stop()


def set_variables(machine, variables: dict[str, str]) -> None:
    assert machine.run(f"import os; os.environ.update({variables!r})")[0] == "ok"


@pytest.mark.parametrize(
    "machine", [(COLAB, "02_inspect_header.ipynb", {"numpy": "1.20.0", "pandas": "2.2.2"})], indirect=True
)
def test_colab_a_failed_clone_a_restart_and_a_notebook_that_works_alone(machine, repository, tmp_path):
    machine.start()
    parameters, setup, first, second = machine.cells[:4]
    loaded = "import numpy, pandas, matplotlib"  # as Colab's kernel does before the first cell
    machine.run(f"{loaded}\n{parameters}")

    set_variables(machine, machine.reaches(tmp_path / "nowhere"))
    status, text = machine.run(setup)
    assert status == "error" and "On Kaggle: Settings > Internet > On." in text
    assert "Traceback" not in text

    set_variables(machine, machine.reaches(repository))
    status, text = machine.run(setup)
    assert status == "error" and "Traceback" not in text, "later cells must not run"
    assert "Installed numpy" in text and "pandas" not in text and "Run all cells again" in text
    _, asked, *_ = machine.asked_of_uv()
    assert f"numpy>={hosted.bounds()['numpy']}" in asked and not [
        word for word in asked if "jupyterlab" in word
    ]
    deadline = time.monotonic() + 20
    while machine.manager.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not machine.manager.is_alive(), "the kernel ends, for the platform to start it again"

    machine.environment.update(machine.reaches(repository))
    machine.start()
    machine.run(f"{loaded}\n{parameters}")
    calls = len(machine.asked_of_uv())
    for cell in (setup, first, second):
        status, text = machine.run(cell)
        assert status == "ok", text
    assert len(machine.asked_of_uv()) == calls, "nothing is installed twice"
    assert (machine.site / "pandas-2.2.2.dist-info").exists(), "old and sufficient: it stays"
    assert hosted.is_merged(machine.work / "outputs" / "nano" / "merge.json")


@pytest.mark.parametrize(
    "machine", [(KAGGLE, "03_load_and_generate.ipynb", {"matplotlib": "3.8.0"})], indirect=True
)
def test_kaggle_a_model_of_ones_own_from_the_read_only_inputs(machine, repository, tmp_path):
    inputs = tmp_path / "input"
    inputs.mkdir()
    for path in (REPOSITORY / "data" / "reference").glob("DFQS-Nano-Q8_0-*.gguf"):
        shutil.copy(path, inputs)
    before = {path.name: path.read_bytes() for path in inputs.iterdir()}
    shards = sorted(inputs.iterdir())
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4'\n")
    driver.chmod(0o755)
    machine.environment.update(machine.reaches(repository), DFQS_MODEL=str(shards[0]))
    machine.environment["PATH"] = f"{driver.parent}{os.pathsep}{machine.environment['PATH']}"
    machine.start()
    parameters, setup, first = machine.cells[:3]
    machine.run(parameters)
    status, text = machine.run(setup)
    assert status == "ok", text
    assert "in the run DFQS-Nano-Q8_0" in text and "built for the processor only" in text
    status, text = machine.run(first)
    assert status == "ok", text
    assert {path.name: path.read_bytes() for path in inputs.iterdir()} == before
    (run,) = (machine.work / "outputs").iterdir()
    model = Path(json.loads((run / "merge.json").read_text())["model"]["path"])
    assert run.name == "DFQS-Nano-Q8_0" and model.parent == machine.scratch / "dfqs-models"
    assert not list(machine.work.rglob("*.gguf")), "the folder whose 20 GB are kept holds no model"
    assert sorted(path.name for path in machine.work.iterdir()) == ["03_load_and_generate.ipynb", "outputs"]


# --- the other notebooks, by calls -------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What the set-up would run, with outputs in an empty folder and nothing replaced."""
    made: list[list[str]] = []
    monkeypatch.setattr(hosted, "run", lambda arguments, failure, quiet=False: made.append(arguments))
    monkeypatch.setattr(hosted, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    for name in ("DFQS_MODEL", *hosted.PLATFORMS):
        monkeypatch.delenv(name, raising=False)
    return made


def namespace_of(notebook: str) -> dict[str, object]:
    cells = json.loads((REPOSITORY / "notebooks" / notebook).read_text())["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    namespace: dict[str, object] = {}
    exec("".join(cell["source"]), namespace)
    return namespace


@pytest.mark.parametrize("platform", hosted.PLATFORMS)
@pytest.mark.parametrize("notebook", NAMES)
def test_every_notebook_installs_and_then_has_its_model(notebook, platform, calls, monkeypatch):
    monkeypatch.setenv(platform, "Interactive")
    namespace = namespace_of(notebook)
    before = dict(namespace)
    hosted.prepare(namespace)
    assert calls[0] == [str(REPOSITORY / "tools" / "install.py"), "here"]
    merge = [["-m", "dfqs_nb", "run", "01", "--run", "nano"]]
    assert calls[1:] == ([] if notebook in (START, MERGE) else merge)
    assert namespace == before, "the reference model needs no other parameters"


@pytest.mark.parametrize("notebook", NAMES)
def test_every_notebook_takes_the_model_that_dfqs_model_names(notebook, calls, monkeypatch, capsys):
    model = str(REPOSITORY / "data" / "reference" / "DFQS-Nano-F16.gguf")
    monkeypatch.setenv("DFQS_MODEL", model)
    monkeypatch.setenv(KAGGLE, "Batch")
    namespace = namespace_of(notebook)
    hosted.prepare(namespace)
    assert namespace["run_name"] == "DFQS-Nano-F16" and model in capsys.readouterr().out
    assert namespace.get("tier", "nano") == "nano", "a reference model, under its path"
    if notebook == START:
        assert not calls[1:], "it opens no model"
    elif notebook == MERGE:
        assert (namespace["model"], Path(str(namespace["output_dir"])).name) == (model, "dfqs-models")
    else:
        (run,) = calls[1:]
        assert run[3:8] == ["01", "--run", "DFQS-Nano-F16", "--model", model]
        assert run[-1].startswith("output_dir=") and run[-1].endswith("dfqs-models")


def test_a_parameter_that_the_user_changed_wins_over_dfqs_model(calls, monkeypatch):
    monkeypatch.setenv("DFQS_MODEL", "dfqs-nano-q8_0")
    namespace = {**namespace_of(MERGE), "model": "mine.gguf", "run_name": "mine"}
    hosted.prepare(namespace)
    assert (namespace["model"], namespace["run_name"]) == ("mine.gguf", "mine")


def test_another_model_gets_the_settings_of_its_tier_where_the_user_chose_none(calls, monkeypatch, tmp_path):
    model = tmp_path / "mine.gguf"
    shutil.copy(REPOSITORY / "data" / "reference" / "DFQS-Nano-F16.gguf", model)
    monkeypatch.setenv("DFQS_MODEL", str(model))
    chosen = workbook.settings_of(workbook.STANDARD)
    namespace = namespace_of("03_load_and_generate.ipynb")
    hosted.prepare(namespace)
    assert (namespace["n_ctx"], namespace["run_name"]) == (chosen["n_ctx"], "mine")
    namespace = {**namespace_of("03_load_and_generate.ipynb"), "n_ctx": 777}
    hosted.prepare(namespace)
    assert namespace["n_ctx"] == 777


def test_a_kaggle_input_is_never_consumed(calls, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(KAGGLE, "Interactive")
    namespace = {**namespace_of(MERGE), "consume": True, "model": "/kaggle/input/x/model.gguf"}
    hosted.prepare(namespace)
    assert namespace["consume"] is False and "is read-only" in capsys.readouterr().out
    namespace = {**namespace_of(MERGE), "consume": True, "model": str(tmp_path / "model.gguf")}
    hosted.prepare(namespace)
    assert namespace["consume"] is True


def test_notebook_01_runs_again_only_where_its_model_is_gone(calls, tmp_path):
    (tmp_path / "nano").mkdir()
    model = tmp_path / "model.gguf"
    (tmp_path / "nano" / "merge.json").write_text(json.dumps({"model": {"path": str(model)}}))
    hosted.prepare(namespace_of(INSPECT))
    model.touch()
    hosted.prepare(namespace_of(INSPECT))
    assert [call[1] for call in calls] == ["here", "dfqs_nb", "here"]


def test_another_model_under_the_same_run_name_is_prepared_anew(calls, monkeypatch, tmp_path):
    models = [tmp_path / owner / "model.gguf" for owner in ("mine", "theirs")]
    for model in models:
        model.parent.mkdir()
        shutil.copy(REPOSITORY / "data" / "reference" / "DFQS-Nano-F16.gguf", model)
    (tmp_path / "model").mkdir()
    stage = {"conditions": {"model": str(models[0])}, "model": {"path": str(models[0])}}
    (tmp_path / "model" / "merge.json").write_text(json.dumps(stage))
    for model in models:
        monkeypatch.setenv("DFQS_MODEL", str(model))
        hosted.prepare(namespace_of(INSPECT))
    (run,) = [call for call in calls if "dfqs_nb" in call]
    assert run[run.index("--model") + 1] == str(models[1])


def test_a_model_that_cannot_be_had_stops_the_cell(calls, monkeypatch):
    monkeypatch.setenv("DFQS_MODEL", "no-such-model")
    with pytest.raises(hosted.Stop, match="no-such-model"):
        hosted.prepare(namespace_of(INSPECT))


@pytest.mark.parametrize(
    ("layers", "supported", "told"), [(-1, True, ""), (-1, False, "processor only"), (0, False, "")]
)
def test_a_gpu_that_llama_cpp_cannot_use_is_named(layers, supported, told, monkeypatch, capsys):
    monkeypatch.setattr(hosted, "has_gpu", lambda: True)
    done = subprocess.CompletedProcess([], 0 if supported else 1)
    monkeypatch.setattr(hosted.subprocess, "run", lambda *_, **__: done)
    hosted.check_gpu({"n_gpu_layers": layers})
    printed = capsys.readouterr().out
    assert (told in printed) if told else not printed


def test_a_program_that_fails_shows_what_it_printed_and_stops(capsys):
    with pytest.raises(hosted.Stop, match="what to do"):
        hosted.run(["-c", "print('the reason'); raise SystemExit(3)"], "what to do", quiet=True)
    assert capsys.readouterr().out == "the reason\n"
    hosted.run(["-c", "print('noise')"], "what to do", quiet=True)
    assert capsys.readouterr().out == ""


def test_only_replaced_packages_that_are_loaded_cost_a_restart(monkeypatch):
    before = hosted.versions()
    assert hosted.replaced_while_loaded(before, before) == {}
    monkeypatch.setitem(sys.modules, "pytest", pytest)
    monkeypatch.delitem(sys.modules, "nbval", raising=False)
    after = {**before, "pytest": "99", "nbval": "99"}
    assert hosted.replaced_while_loaded(before, after) == {"pytest": "99"}


# --- slow --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine",
    [
        pytest.param((platform, name, {}), id=f"{platform}-{name}")
        for platform in hosted.PLATFORMS
        for name in NAMES
    ],
    indirect=True,
)
def test_the_whole_notebook_runs_alone(machine, repository):
    machine.environment.update(machine.reaches(repository), TQDM_DISABLE="1")
    machine.start()
    for cell in machine.cells:
        status, text = machine.run(cell)
        assert status == "ok", f"{cell}\n\n{text}"


@pytest.mark.slow
def test_the_oldest_packages_that_are_kept_do(tmp_path):
    """Unit tests with exactly the lower bounds of pyproject.toml, and this machine's llama.cpp."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DFQS_OUTPUTS", "PYTHONPATH")
    }
    uv, python = [sys.executable, "-m", "uv"], tmp_path / "env" / "bin" / "python"
    subprocess.run([*uv, "venv", "-q", "--python", sys.executable, tmp_path / "env"], check=True)
    pins = [
        wanted.replace(">=", "==") for wanted in hosted.requirements() if "llama-cpp-python" not in wanted
    ]
    extra = [
        "ipython==7.34.0",
        "ipykernel==6.17.1",
        "diskcache",
        "nbval",
        "nbconvert",
        "hypothesis",
        "pytest",
        "pytest-xdist",
    ]
    subprocess.run([*uv, "pip", "install", "-q", "--python", python, *pins, *extra], check=True)
    (site,) = tmp_path.glob("env/lib/python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).glob("llama_cpp*"):
        (site / path.name).symlink_to(path)
    parts = ["core", "test_stats.py", "gguf", "context", "report", "ladder"]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [*command, *(f"tests/unit/{part}" for part in parts)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
