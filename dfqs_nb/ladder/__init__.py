"""Notebook 08: one model at ever fewer bits, each rung quantized from the same source and measured alike.

>>> load_recipe("Q8_0").mix
'Q8_0'
"""

from dfqs_nb.core.doors import lazy
from dfqs_nb.ladder import tables
from dfqs_nb.ladder.budget import within_budget
from dfqs_nb.ladder.measure import Settings, collected
from dfqs_nb.ladder.quantizer import plan, quantize
from dfqs_nb.ladder.recipes import load_recipe
from dfqs_nb.ladder.run import RUNGS, climb

__all__ = [
    "RUNGS",
    "Settings",
    "climb",
    "collected",
    "figures",
    "load_recipe",
    "plan",
    "quantize",
    "tables",
    "within_budget",
]

__getattr__ = lazy(__name__, figures="figures")
