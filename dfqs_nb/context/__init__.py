"""Long contexts: how far a model's retrieval carries, and what a context costs (notebook 05)."""

from dfqs_nb.context import curve, tasks
from dfqs_nb.context.boundary import Counts, paired
from dfqs_nb.context.curve import measure
from dfqs_nb.context.plan import make_plan, settings_for
from dfqs_nb.core import lazy

__all__ = ["Counts", "curve", "figures", "make_plan", "measure", "paired", "settings_for", "tasks"]

__getattr__ = lazy(__name__, figures="figures")
