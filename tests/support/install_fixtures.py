"""What the tests of the install share: programs and wheels made on the spot."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

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


def made_wheel(folder: Path, name: str, version: str) -> Path:
    """A wheel with nothing in it."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """An empty folder as the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("CC", "CXX", "PYTHON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    """A new environment with pip, and with the uv that is installed here."""
    folder = tmp_path_factory.mktemp("env") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    program, module = shutil.which("uv", path=str(Path(sys.executable).parent)), find_spec("uv")
    if not program or not module:
        pytest.skip("no uv beside this Python: run `make test`")
    (folder / "bin" / "uv").symlink_to(program)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "uv").symlink_to(Path(module.origin).parent)
    return folder
