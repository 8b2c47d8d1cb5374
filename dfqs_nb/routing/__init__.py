"""Routing: record which experts a model chooses, and say when the choice changes (notebook 04).

>>> from dfqs_nb import routing
>>> routing.load_trace("missing.npz")
Traceback (most recent call last):
dfqs_nb.routing.recorder.RoutingError: missing.npz: not a routing trace ...
"""

from typing import TYPE_CHECKING

from dfqs_nb.core.doors import lazy
from dfqs_nb.routing.recorded import RecordedModel, open_recorded
from dfqs_nb.routing.trace import Trace, differences, load_trace, overlaps

if TYPE_CHECKING:
    from dfqs_nb.routing import figures
    from dfqs_nb.routing.experiment import run_experiment

__all__ = ["RecordedModel", "Trace", "differences", "figures", "load_trace", "open_recorded", "overlaps"]
__all__ += ["run_experiment"]

__getattr__ = lazy(__name__, figures="figures", run_experiment="experiment")
