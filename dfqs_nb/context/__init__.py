"""Long contexts: how far a model's retrieval carries, and what a context costs (notebook 05)."""

from typing import TYPE_CHECKING

from dfqs_nb.context.boundary import Counts, paired
from dfqs_nb.context.cost import memory_table, settings_for
from dfqs_nb.context.curve import measure, read_answers
from dfqs_nb.context.loss import read_held_out
from dfqs_nb.context.plan import make_plan
from dfqs_nb.core.doors import lazy

if TYPE_CHECKING:
    from dfqs_nb.context import figures, tasks

__all__ = [
    "Counts",
    "figures",
    "make_plan",
    "measure",
    "memory_table",
    "paired",
    "read_answers",
    "read_held_out",
    "settings_for",
    "tasks",
]

__getattr__ = lazy(__name__, figures="figures", tasks="tasks")
