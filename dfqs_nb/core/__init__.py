"""What everything stands on: errors, paths, files, stages, journals, child processes, machine, display."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.display import facts, say, shown
from dfqs_nb.core.errors import DfqsError

if TYPE_CHECKING:
    from dfqs_nb.core import figures
    from dfqs_nb.core.machine import describe, machine_line, memory_bandwidth
    from dfqs_nb.core.stage import Stage

__all__ = ["DfqsError", "Stage", "describe", "facts", "figures", "lazy", "machine_line", "memory_bandwidth"]
__all__ += ["say", "shown"]


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


HOMES = dict(Stage="stage", describe="machine", machine_line="machine", memory_bandwidth="machine")
__getattr__ = lazy(__name__, figures="figures", **HOMES)
