"""A machine like those of Colab and Kaggle, made in a folder: one notebook, old packages, no network.

Its Python sees the packages of the Python that runs the tests. A stand-in for `uv` notes what it is asked, and
"installs" by taking away what hides a newer package. `git clone` takes the public address for a local repository.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import store_notebooks

from dfqs_nb.core.paths import REPOSITORY, public_address

PARTS = ("data", "dfqs_nb", "notebooks", "tools", "pyproject.toml", "requirements.lock", "README.md")
NO_NETWORK = "http://127.0.0.1:9"  # nothing listens on the port of `discard`

UV = """
import json, pathlib, shutil, sys
from packaging.requirements import InvalidRequirement, Requirement

site = pathlib.Path(__file__).parents[1]
with open(site / "uv.log", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
for word in sys.argv[1:]:
    try:
        wanted = Requirement(word)
    except InvalidRequirement:
        continue
    for hidden in site.glob(wanted.name.replace("-", "_") + "-*.dist-info"):
        version = hidden.name.removesuffix(".dist-info").split("-")[1]
        if version not in wanted.specifier:
            shutil.rmtree(hidden)
if "-e" in sys.argv:
    info = site / "dfqs_workbook-1.0.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: dfqs-workbook\\nVersion: 1.0.0\\n")
    (info / "direct_url.json").write_text(json.dumps({"url": pathlib.Path.cwd().as_uri()}))
    (site / "dfqs_workbook.pth").write_text(str(pathlib.Path.cwd()))
"""


def make_repository(folder: Path) -> Path:
    """This checkout as a repository with one commit."""
    for name in PARTS:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "core.compression=0"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


class Machine:
    """One machine with one notebook on it.

    Args:
        folder: empty; everything of the machine lies under it.
        platform: the variable that Colab or Kaggle sets.
        notebook: its name in `notebooks/`.
        old: {package: version} that the machine seems to have.
    """

    def __init__(self, folder: Path, platform: str, notebook: str, old: dict[str, str]) -> None:
        self.work, self.home, self.scratch = folder / "work", folder / "home", folder / "tmp"
        for place in (self.work, self.home, self.scratch):
            place.mkdir()
        text = (REPOSITORY / "notebooks" / notebook).read_text(encoding="utf-8")
        text = store_notebooks.stamped_notebook(text, notebook, public_address())
        (self.work / notebook).write_text(text, encoding="utf-8")
        cells = json.loads(text)["cells"]
        self.cells = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
        self.python = folder / "env" / "bin" / "python"
        (self.site,) = folder.glob("env/lib/python*/site-packages")
        (self.site / "packages.pth").write_text(sysconfig.get_path("purelib"))
        (self.site / "uv").mkdir()
        (self.site / "uv" / "__init__.py").touch()
        (self.site / "uv" / "__main__.py").write_text(UV)
        for name, version in old.items():
            info = self.site / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        self.environment = self._environment(platform)
        self.manager: Any = None
        self.client: Any = None

    def _environment(self, platform: str) -> dict[str, str]:
        ours = ("PIP_", "UV_", "DFQS_", "PYTHONPATH", "COLAB_", "KAGGLE_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return {
            **kept,
            platform: "Interactive",
            "HOME": str(self.home),
            "TMPDIR": str(self.scratch),
            "HTTP_PROXY": NO_NETWORK,
            "HTTPS_PROXY": NO_NETWORK,
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }

    def reaches(self, repository: Path) -> dict[str, str]:
        """The variables with which git takes a repository for the public one."""
        return {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
            "GIT_CONFIG_VALUE_0": public_address(),
        }

    def start(self) -> None:
        """Start a kernel, as when the notebook is opened or its kernel came back."""
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import KernelManager

        spec = self.home / "kernels" / "here"
        spec.mkdir(parents=True, exist_ok=True)
        argv = [
            str(self.python),
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
            "--log-level=CRITICAL",
        ]
        (spec / "kernel.json").write_text(
            json.dumps({"argv": argv, "display_name": "", "language": "python"})
        )
        specs = KernelSpecManager(kernel_dirs=[str(spec.parent)])
        self.manager = KernelManager(kernel_name="here", kernel_spec_manager=specs)
        self.manager.start_kernel(cwd=str(self.work), env=self.environment)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, source: str) -> tuple[str, str]:
        """Execute a cell: ``ok`` or ``error``, and all text that it shows."""
        shown: list[str] = []

        def hook(message: dict[str, Any]) -> None:
            content = message["content"]
            shown.append(content.get("text", "") + "\n".join(content.get("traceback", [])))

        reply = self.client.execute_interactive(source, output_hook=hook, allow_stdin=False, timeout=1800)
        return reply["content"]["status"], "".join(shown)

    def stop(self) -> None:
        """End the kernel."""
        if self.manager:
            self.client.stop_channels()
            self.manager.shutdown_kernel(now=True)

    def asked_of_uv(self) -> list[list[str]]:
        """The arguments of every call of uv so far."""
        log = self.site / "uv.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
