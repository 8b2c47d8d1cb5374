"""Doors of packages: names that are imported only when they are used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy(package: str, **homes: str) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562) that imports names on first use, as matplotlib takes a second.

    ``homes``: for each name, the submodule that it is in; a submodule is its own home.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f"{package}.{homes[name]}")
        return module if homes[name] == name else getattr(module, name)

    return find
