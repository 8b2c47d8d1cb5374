"""What `make run` says on a machine that lacks something; each case is made, not mocked, where it can be."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dfqs_nb import bootstrap
from dfqs_nb.core.paths import REPOSITORY

SCRIPT = REPOSITORY / "dfqs_nb" / "bootstrap.py"
NO_PIP_SETTINGS = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "PIP_RETRIES": "0",
    "PIP_NO_CACHE_DIR": "1",
}


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_python(path: Path, version: str, has_venv: bool = True) -> Path:
    """A `python` that only answers what bootstrap asks: its version, and whether it has venv."""
    return executable(
        path, f'case "$2" in *version_info*) echo {version};; *venv*) exit {0 if has_venv else 1};; esac'
    )


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """An empty folder as the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("CC", "CXX", "PYTHON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(venv: Path, python: str = sys.executable) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python, str(SCRIPT), "install", str(venv)], capture_output=True, text=True, check=False
    )


def test_no_compiler_says_what_to_install_on_each_system(tools, tmp_path):
    (tools / "python3").symlink_to(sys.executable)
    done = install(tmp_path / "venv")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "needs a C and C++ compiler: none of these works: cc, gcc, clang" in done.stderr
    for advice in (
        "apt install build-essential",
        "dnf install gcc gcc-c++",
        "xcode-select --install",
        "conda install -c conda-forge cxx-compiler",
    ):
        assert advice in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_compiler_that_is_only_a_stub_does_not_count(tools):
    for name in ("cc", "gcc", "clang", "c++", "g++", "clang++"):
        executable(tools / name, "echo 'xcode-select: note: No developer tools were found'; exit 1")
    with pytest.raises(bootstrap.Stop, match="needs a C and C\\+\\+ compiler"):
        bootstrap.check_compiler()


def test_a_c_compiler_alone_is_not_enough(tools):
    found = {
        name: shutil.which(name, path=os.defpath + ":/usr/local/bin") for name in ("cc", "as", "ld", "c++")
    }
    if None in found.values():
        pytest.skip("no compiler in the default path")
    for name in ("cc", "as", "ld"):
        (tools / name).symlink_to(found[name])
    with pytest.raises(bootstrap.Stop, match="none of these works: c\\+\\+, g\\+\\+, clang\\+\\+"):
        bootstrap.check_compiler()
    (tools / "c++").symlink_to(found["c++"])
    bootstrap.check_compiler()


@pytest.mark.parametrize("version", ["2.7", "3.8", "3.10", "3.14"])
def test_a_python_too_old_or_too_new_is_named(tools, tmp_path, version):
    fake_python(tools / "python3", version)
    done = install(tmp_path / "venv")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"Python 3.11, 3.12 or 3.13 is needed; here: python3 is {version}." in done.stderr
    assert "conda env create -f environment.yml" in done.stderr


@pytest.mark.parametrize("other", ["python3.11", "python3.12", "python3.13"])
def test_a_suitable_python_beside_an_old_one_is_found(tools, other):
    fake_python(tools / "python3", "3.9")
    fake_python(tools / other, other.removeprefix("python"))
    assert bootstrap.find_python() == other


def test_a_shim_that_does_not_run_is_passed_over(tools):
    """pyenv leaves a `python3.13` on the PATH that only prints an error."""
    fake_python(tools / "python3", "3.9")
    executable(tools / "python3.13", "echo 'pyenv: python3.13: command not found'; exit 127")
    fake_python(tools / "python3.11", "3.11")
    assert bootstrap.find_python() == "python3.11"


def test_the_python_named_by_the_user_is_the_one_judged(tools, tmp_path):
    fake_python(tools / "python3", "3.12")
    old = fake_python(tmp_path / "old", "3.7")
    with pytest.raises(bootstrap.Stop, match=f"here: {old} is 3.7"):
        bootstrap.find_python(str(old))
    with pytest.raises(bootstrap.Stop, match="/nowhere/python is not a Python that runs"):
        bootstrap.find_python("/nowhere/python")


def test_a_missing_venv_module_is_named(tools):
    fake_python(tools / "python3", "3.12", has_venv=False)
    with pytest.raises(
        bootstrap.Stop, match=r"(?s)venv or ensurepip is missing.*apt install python3.12-venv"
    ):
        bootstrap.find_python()


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.8", "3.10"])
def test_a_real_old_python_runs_the_script_far_enough_to_say_so(version, tmp_path):
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")))
    python = next((name for name in candidates if name and bootstrap.python_version(name)), None)
    if not python:
        pytest.skip(f"no Python {version} here")
    done = subprocess.run(
        [python, str(SCRIPT), "install", str(tmp_path / "venv")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": python},
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{python} is {version}." in done.stderr


def test_a_full_disk_is_seen_before_the_install(tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    bootstrap.check_disk(str(tmp_path), 1)
    with pytest.raises(bootstrap.Stop, match=r"not enough free disk under .* free, about"):
        bootstrap.check_disk(str(tmp_path / "not" / "yet"), real.f_bavail * real.f_frsize + 10**12)


def test_a_folder_with_other_things_is_never_cleared(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(bootstrap.Stop, match="is a folder with other things in it"):
        bootstrap.make_venv(str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


# --- pip, for real, in an environment of its own ---------------------------------------------------


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("env") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return str(folder)


@pytest.fixture
def wheel(tmp_path):
    """A wheel with nothing in it, and its line for a lock file."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    path = folder / "nothing_at_all-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        info = "nothing_at_all-1.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: nothing-at-all\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def lock_line(digest: str) -> dict:
    return {"nothing-at-all": f"nothing-at-all==1.0 \\\n    --hash=sha256:{digest}\n"}


def use(monkeypatch, **settings):
    for name, value in {**NO_PIP_SETTINGS, **settings}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("retries", ["0", "1"])
def test_no_network_says_what_is_needed_and_how_to_do_without(venv, monkeypatch, retries):
    """Nothing listens on the discard port; pip says so only where it tries twice."""
    use(monkeypatch, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES=retries)
    with pytest.raises(
        bootstrap.Stop, match=r"(?s)index cannot be reached.*make wheelhouse.*PIP_NO_INDEX=1"
    ) as caught:
        bootstrap.pip_locked(venv, lock_line("0" * 64), ["nothing-at-all"], "installing")
    assert "install.log" in str(caught.value)
    assert ("or lacks a file" in str(caught.value)) == (retries == "0")


def test_a_wheelhouse_serves_without_network_and_what_it_lacks_is_said(venv, wheel, monkeypatch, tmp_path):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    use(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.parent))
    bootstrap.pip_locked(venv, lock_line(digest), ["nothing-at-all"], "installing")
    assert list(Path(venv).glob("lib/python*/site-packages/nothing_at_all-1.0.dist-info"))
    use(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "bin"))
    with pytest.raises(bootstrap.Stop, match="not in the folder that PIP_FIND_LINKS names"):
        bootstrap.pip_locked(
            venv,
            {"other": lock_line(digest)["nothing-at-all"].replace("nothing-at-all", "other")},
            ["other"],
            "installing",
        )


def test_a_file_with_another_hash_is_not_installed(venv, wheel, monkeypatch):
    use(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.parent))
    subprocess.run([f"{venv}/bin/python", "-m", "pip", "uninstall", "-qy", "nothing-at-all"], check=True)
    with pytest.raises(bootstrap.Stop, match="does not have the hash that requirements.lock records"):
        bootstrap.pip_locked(venv, lock_line("0" * 64), ["nothing-at-all"], "installing")
    assert not list(Path(venv).glob("lib/python*/site-packages/nothing_at_all*"))


@pytest.mark.parametrize(
    "words, cause",
    [
        ("OSError: [Errno 28] No space left on device", "the disk filled up"),
        ("CMake Error: No CMAKE_CXX_COMPILER could be found.", "needs a C and C++ compiler"),
        ("something never seen", "pip failed; its last lines:\n  something never seen"),
    ],
)
def test_pips_words_are_explained(words, cause):
    assert cause in bootstrap.explain(words)


# --- make ------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    return tmp_path


def would_install(checkout: Path) -> bool:
    environ = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "VENV")
    }
    done = subprocess.run(
        ["make", "-n", "venv"], cwd=checkout, env=environ, capture_output=True, text=True, check=True
    )
    return "bootstrap.py" in done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_installs_once_again_after_a_change_and_again_after_a_move(checkout, tmp_path_factory):
    stamp = checkout / ".venv" / ".installed"
    assert would_install(checkout), "nothing installed yet"
    stamp.write_text(f"{checkout}\n")
    assert not would_install(checkout)
    os.utime(checkout / "requirements.lock", (stamp.stat().st_mtime + 5,) * 2)
    assert would_install(checkout), "the lock changed"
    os.utime(checkout / "requirements.lock", (stamp.stat().st_mtime - 5,) * 2)
    moved = tmp_path_factory.mktemp("elsewhere") / "checkout"
    shutil.copytree(checkout, moved)
    assert would_install(moved), "an environment made for another folder"
