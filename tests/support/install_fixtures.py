"""Fixtures of the install's tests: a PATH of one's own, and an environment to install into."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


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
