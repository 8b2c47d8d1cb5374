"""Routing: record which experts a model chooses, and say when the choice changes (notebook 04).

>>> from dfqs_nb import routing
>>> routing.load_trace("missing.npz")
Traceback (most recent call last):
dfqs_nb.routing.recorder.RoutingError: missing.npz: not a routing trace ...
"""

from typing import Any

from dfqs_nb.routing.compare import by_layer, differences, overlaps
from dfqs_nb.routing.experiment import run_experiment
from dfqs_nb.routing.trace import RecordedModel, Trace, load_trace, open_recorded, record

__all__ = [
    "RecordedModel",
    "Trace",
    "by_layer",
    "differences",
    "figures",
    "load_trace",
    "open_recorded",
    "overlaps",
    "record",
    "run_experiment",
]


def __getattr__(name: str) -> Any:
    if name == "figures":  # brings matplotlib, which only notebooks need
        from importlib import import_module

        return import_module("dfqs_nb.routing.figures")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
