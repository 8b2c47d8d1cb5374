"""Long contexts: how far a model's retrieval carries, and what a context costs (notebook 05)."""

from typing import TYPE_CHECKING

from dfqs_nb.core import lazy

if TYPE_CHECKING:
    from dfqs_nb.context import curve, figures, tasks
    from dfqs_nb.context.boundary import Counts, paired
    from dfqs_nb.context.curve import measure, read_answers
    from dfqs_nb.context.plan import make_plan, settings_for

__all__ = ["Counts", "curve", "figures", "make_plan", "measure", "paired", "read_answers", "settings_for"]
__all__ += ["tasks"]

__getattr__ = lazy(
    __name__,
    **dict.fromkeys(("Counts", "paired"), "boundary"),
    **dict.fromkeys(("curve", "measure", "read_answers"), "curve"),
    **dict.fromkeys(("make_plan", "settings_for"), "plan"),
    **{name: name for name in ("figures", "tasks")},
)
