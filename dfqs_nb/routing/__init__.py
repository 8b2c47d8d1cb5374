"""Routing: record which experts a model chooses, and say when the choice changes (notebook 04)."""

from typing import TYPE_CHECKING

from dfqs_nb.core import lazy
from dfqs_nb.routing.recorder import RecordedModel, open_recorded
from dfqs_nb.routing.trace import Trace, differences, load_trace

if TYPE_CHECKING:
    from dfqs_nb.routing.experiment import run_experiment

__all__ = ["RecordedModel", "Trace", "differences", "experts_needed", "figures", "load_trace"]
__all__ += ["open_recorded", "run_experiment"]

__getattr__ = lazy(__name__, experts_needed="verdict", figures="figures", run_experiment="experiment")
