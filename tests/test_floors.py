"""The package's floors, as its docstring lists them: every module has one, and imports from below only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import dfqs_nb

MODULES = {path.stem: path for path in Path(dfqs_nb.__file__).parent.glob("*.py") if not path.stem.startswith("__")}


def floors() -> dict[str, int]:
    """The floor of each module: the line of the docstring that names it, columns set apart by two spaces."""
    found = {}
    for number, line in enumerate(dfqs_nb.__doc__.splitlines()):
        for column in re.split(r"\s{2,}", line.strip()) if line.startswith("    ") else []:
            words = [word.strip() for word in column.split(",")]
            if all(re.fullmatch(r"_?[a-z_]+", word) for word in words):
                stem = words[0].partition("_")[0]
                found |= {stem + word if word.startswith("_") else word: number for word in words}
    return found


def imported(path: Path) -> set[str]:
    """Modules of the package that a module imports when it is imported."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dfqs_nb"):
            inner = node.module.partition(".")[2]
            names |= {inner} if inner else {alias.name for alias in node.names}
    return names & set(MODULES)


def test_every_module_has_a_floor():
    assert set(floors()) & set(MODULES) == set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_from_its_own_floor_or_below(name):
    level = floors()
    assert not [other for other in imported(MODULES[name]) if level[other] > level[name]]
