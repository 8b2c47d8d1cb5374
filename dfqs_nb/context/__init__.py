"""Long contexts: how far a model's retrieval carries, and what a context costs (notebook 05)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dfqs_nb.context.boundary import Counts, paired
from dfqs_nb.context.cost import memory_table, settings_for
from dfqs_nb.context.curve import Run, measure, read_answers
from dfqs_nb.context.loss import read_held_out
from dfqs_nb.context.plan import make_plan

if TYPE_CHECKING:
    from dfqs_nb.context import figures

__all__ = [
    "Counts",
    "Run",
    "figures",
    "make_plan",
    "measure",
    "memory_table",
    "paired",
    "read_answers",
    "read_held_out",
    "settings_for",
]


def __getattr__(name: str) -> Any:
    """Import the figures when they are used: matplotlib is slow."""
    if name == "figures":
        return import_module(f"{__name__}.figures")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
