"""One list of dependencies: pyproject.toml, environment.yml and requirements.lock say the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import hosted
import install
import needs
import pytest
import store_notebooks
import yaml
from packaging.version import Version

from dfqs_nb import __version__
from dfqs_nb.core.paths import public_address

REPOSITORY = Path(install.REPOSITORY)
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LOCK_TEXT = (REPOSITORY / "requirements.lock").read_text()
LOCK = install.lock_blocks(install.LOCK)
PINS = [
    *PROJECT["dependencies"],
    *(pin for pins in PROJECT["optional-dependencies"].values() for pin in pins),
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("pin", PINS)
def test_each_dependency_is_pinned_exactly_and_the_lock_has_that_version(pin):
    name, version = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)", pin.split(" ;")[0]).groups()
    assert re.match(
        rf"{re.escape(canonical(name))}=={re.escape(version)}( |$)", LOCK[canonical(name)], re.MULTILINE
    )


def test_each_pin_has_its_reason_beside_it():
    text = (REPOSITORY / "pyproject.toml").read_text()
    section = text[text.index("\ndependencies = [") : text.index("[project.urls]")]
    lines = [line.strip() for line in section.splitlines()]
    for number, line in enumerate(lines):
        if re.match(r'"[\w.-]+==', line) and not re.match(r'"[\w.-]+==', lines[number - 1]):
            assert lines[number - 1].startswith("#"), f"{line} has no reason above it"


def test_what_a_hosted_machine_may_keep_is_needed_and_no_newer_than_the_lock():
    oldest, locked = hosted.bounds(), {name: LOCK[name].split("==")[1].split()[0] for name in LOCK}
    direct = {canonical(re.split(r"[\[=]", pin)[0]) for pin in PROJECT["dependencies"]}
    assert set(oldest) <= direct | {"numpy"}, "numpy comes with pandas; the rest are dependencies"
    for name, version in oldest.items():
        assert Version(version) <= Version(locked[name]), name
    pinned = {canonical(re.split(r"[\[=]", pin)[0]) for pin in hosted.requirements() if "==" in pin}
    assert direct - pinned - set(oldest) == {"jupyterlab", "nbval"}, "not needed there"
    assert {"llama-cpp-python", "gguf", "papermill"} <= pinned, "exact, as everywhere"


def test_each_bound_of_a_hosted_machine_has_its_reason_above():
    text = (REPOSITORY / "pyproject.toml").read_text()
    section = text[text.index("[tool.dfqs.hosted.oldest]\n") : text.index("[dependency-groups]")]
    bounds = re.findall(r"((?:#.*\n)+)((?:[\w-]+ = .*\n)+)", section)
    assert sum(lines.count("\n") for _, lines in bounds) == len(hosted.bounds())


def test_every_package_of_the_lock_has_hashes():
    assert len(LOCK) > 100
    for name, lines in LOCK.items():
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", lines)
        assert hashes and len(hashes) == len(set(hashes)), name


def test_the_lock_names_no_index_and_no_url():
    assert not re.search(r"https?://|--index|--find-links|--extra-index|file:", LOCK_TEXT)


def test_what_is_installed_here_is_what_the_lock_says():
    """For this Python and system: the versions that are in use are those that were locked."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    n_installed = 0
    for name, lines in LOCK.items():
        requirement = Requirement(lines.splitlines()[0].rstrip(" \\"))
        if name in install.OPTIONAL or (requirement.marker and not requirement.marker.evaluate()):
            continue
        try:
            assert version(name) in requirement.specifier, (
                f"{name} {version(name)} is installed: {requirement}"
            )
            n_installed += 1
        except PackageNotFoundError:
            pytest.fail(
                f"{requirement} is locked and not installed: run `make test`, not pytest of another Python"
            )
    assert n_installed > 90


def test_environment_yml_brings_python_and_compilers_and_leaves_the_packages_to_the_lock():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    python, *others = environment["dependencies"]
    assert python == f"python {PROJECT['requires-python']}"
    assert others == ["c-compiler", "cxx-compiler", "make"]


def test_python_versions_agree():
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert ((3, int(low)), (3, int(high))) == (needs.OLDEST, needs.TOO_NEW)
    lines = [f"python3.{minor}" for minor in range(int(low), int(high))]
    assert set(lines) == {name for name in needs.PYTHONS if "." in name}
    for minor in range(int(low), int(high)):
        assert f"3.{minor}" in needs.NO_PYTHON
    assert f"--python-version 3.{low}" in (REPOSITORY / "Makefile").read_text()


def test_build_requirements_are_locked_too():
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert set(pyproject["build-system"]["requires"]) <= set(PROJECT["optional-dependencies"]["build"])


def test_version_stands_in_step():
    assert PROJECT["version"] == __version__


# --- the public address ----------------------------------------------------------------------------


def tracked_texts():
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        path = REPOSITORY / name
        if path.is_file() and path.suffix not in (".gguf", ".png", ".gz", ".lock"):
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def without_stamps(name: str, text: str) -> str:
    """A file's text without what `make stamp` writes into it; a stored report's links come from pyproject.toml."""
    if name.startswith("docs/sample_report/"):
        return ""
    if name.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n".join(
            "".join(cell["source"]) for cell in cells if "setup" not in cell["metadata"].get("tags", [])
        )
    return re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)


def test_the_public_address_stands_in_one_place_only():
    slug = public_address().removeprefix("https://github.com/")
    holders = [name for name, text in tracked_texts() if slug in without_stamps(name, text)]
    assert holders == ["pyproject.toml"]
    assert (REPOSITORY / "pyproject.toml").read_text().count(slug) == 1


def test_commands_are_listed_in_one_order_whatever_is_imported_first():
    words = "from dfqs_nb.workbook import %s, cli; print(*cli.program().commands)"
    orders = {
        subprocess.run(
            [sys.executable, "-c", words % name], capture_output=True, text=True, check=True
        ).stdout
        for name in ("file_commands", "run")
    }
    assert len(orders) == 1 and "merge" in orders.pop()


def test_badges_and_setup_cells_are_stamped():
    assert store_notebooks.stamp(check=True) == [], "run `make stamp`"


def test_every_relative_link_of_the_readme_leads_somewhere():
    text = (REPOSITORY / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (REPOSITORY / target).exists(), target
