"""Long contexts: how far a model's retrieval carries, and what a context costs (notebook 05)."""

from dfqs_nb.context import curve, tasks
from dfqs_nb.context.boundary import Counts, paired
from dfqs_nb.context.curve import measure, read_answers
from dfqs_nb.context.plan import make_plan, settings_for
from dfqs_nb.core import lazy

__all__ = ["Counts", "curve", "figures", "make_plan", "measure", "paired", "read_answers", "settings_for"]
__all__ += ["tasks"]

__getattr__ = lazy(__name__, figures="figures")
