"""Long contexts: how far a model's retrieval carries, and what a context costs (notebook 05)."""

from typing import TYPE_CHECKING

from dfqs_nb.core.doors import lazy

if TYPE_CHECKING:
    from dfqs_nb.context import figures, tasks
    from dfqs_nb.context.boundary import Counts, paired
    from dfqs_nb.context.curve import loss_by_position, measure, read_answers
    from dfqs_nb.context.plan import make_plan, settings_for

__all__ = ["Counts", "figures", "loss_by_position", "make_plan", "measure", "paired", "read_answers"]
__all__ += ["settings_for", "tasks"]

__getattr__ = lazy(
    __name__,
    **dict.fromkeys(("Counts", "paired"), "boundary"),
    **dict.fromkeys(("loss_by_position", "measure", "read_answers"), "curve"),
    **dict.fromkeys(("make_plan", "settings_for"), "plan"),
    figures="figures",
    tasks="tasks",
)
