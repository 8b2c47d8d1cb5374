"""`install.py here`: into the Python of Colab and Kaggle, only what is missing there or too old."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import hosted
import install
import needs
import pytest
from install_helpers import NO_PIP_SETTINGS, executable, made_wheel, sha256

pytest_plugins = ["install_fixtures"]
SCRIPT = Path(install.REPOSITORY) / "tools" / "install.py"

HERE = """
import sys
sys.path.insert(0, {tools!r})
import hosted, install
hosted._pyproject = lambda: {pyproject!r}
hosted.is_workbook_installed = lambda: True
install.LOCK = {lock!r}
install.Target(sys.executable, {log!r}).fill_gaps()
"""


def test_a_hosted_machine_keeps_what_is_new_enough_and_gets_the_rest_from_the_lock(target, tmp_path):
    """By uv itself: kept 1.5 (oldest 1.0), old 0.5 (oldest 1.0) and a missing package; the lock has 2.0 of each."""
    (site,) = target.glob("lib/python*/site-packages")
    for name, version in {"dfqskept": "1.5", "dfqsold": "0.5"}.items():
        with zipfile.ZipFile(made_wheel(tmp_path, name, version)) as file:
            file.extractall(site)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    names = ("dfqskept", "dfqsold", "dfqsmissing")
    locked = {name: made_wheel(wheels, name, "2.0") for name in names}
    for name in names:
        made_wheel(wheels, name, "3.0")  # newer than the lock: not taken
    lines = [f"{name}==2.0 \\\n    --hash=sha256:{sha256(path)}\n" for name, path in locked.items()]
    (tmp_path / "lock").write_text("".join(lines))
    pyproject = {
        "project": {"dependencies": [f"{name}==2.0" for name in names]},
        "tool": {"dfqs": {"hosted": {"without": [], "oldest": {"dfqskept": "1.0", "dfqsold": "1.0"}}}},
    }
    code = HERE.format(
        tools=str(SCRIPT.parent), pyproject=pyproject, lock=str(tmp_path / "lock"), log=str(tmp_path / "log")
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    environment |= {**NO_PIP_SETTINGS, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}

    def set_up() -> str:
        command = [str(target / "bin" / "python"), "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert "installing what is missing here" in set_up(), (tmp_path / "log").read_text()
    there = {path.name.removesuffix(".dist-info") for path in site.glob("dfqs*.dist-info")}
    assert there == {"dfqskept-1.5", "dfqsold-2.0", "dfqsmissing-2.0"}
    assert set_up() == "", "nothing is done twice"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What `add_runtime` asks uv for, where the index has no prebuilt llama.cpp."""
    calls: list[tuple[str, list[str], str]] = []

    def uv(self, arguments, what, failed="failed"):
        calls.append((what, arguments, self.environ.get("CMAKE_ARGS", "")))
        if "--only-binary" in arguments and not (tmp_path / "prebuilt").exists():
            raise needs.Stop("none")

    monkeypatch.setattr(install.Target, "uv", uv)
    monkeypatch.setattr(install, "CACHE", str(tmp_path))
    monkeypatch.setattr(hosted, "has_gpu", lambda: False)
    monkeypatch.setattr(hosted, "has_cuda_compiler", lambda: True)
    monkeypatch.setenv("CMAKE_ARGS", "")
    return calls


def add_runtime(tmp_path: Path) -> None:
    install.Target(sys.executable, str(tmp_path / "log")).add_runtime(["llama-cpp-python==0"])


def test_a_prebuilt_llama_cpp_is_taken_where_there_is_one(asked, tmp_path):
    (tmp_path / "prebuilt").touch()
    add_runtime(tmp_path)
    assert [what for what, *_ in asked] == ["looking for a prebuilt llama.cpp"]


def test_without_a_prebuilt_llama_cpp_it_is_built_and_for_the_processor(asked, tmp_path):
    add_runtime(tmp_path)
    _, (what, arguments, options) = asked
    assert what.startswith("building llama.cpp (") and "--no-binary" in arguments and "CUDA" not in options


def test_a_gpu_means_a_build_with_cuda_whose_options_the_user_may_overrule(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(hosted, "has_gpu", lambda: True)
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=off")
    add_runtime(tmp_path)
    ((what, arguments, options),) = asked
    assert "for the GPU" in what and "--only-binary" not in arguments
    assert options.split() == ["-DGGML_CUDA=on", "-DGGML_CUDA=off"], "of two the last one counts"


def test_a_gpu_is_one_that_the_driver_lists(tools):
    assert not hosted.has_gpu()
    executable(tools / "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert not hosted.has_gpu()
    executable(tools / "nvidia-smi", "echo 'GPU 0: Tesla T4 (UUID: GPU-1)'")
    assert hosted.has_gpu()


def test_the_wrong_python_of_a_hosted_machine_is_named(monkeypatch, capsys):
    monkeypatch.setattr(needs, "is_suitable", lambda version: False)
    assert install.main(["here"]) == 1
    assert "but it needs 3.11, 3.12 or 3.13" in capsys.readouterr().err
