"""Score a model's reasoning and code on frozen questions, and its speed against what memory allows.

>>> [item_set.name for item_set in ItemSet.of_tier("nano")]
['nano-reasoning', 'nano-code']
"""

from typing import Any

from dfqs_nb.scores import speed
from dfqs_nb.scores.compare import compare_runs
from dfqs_nb.scores.grading import Results, SetRun
from dfqs_nb.scores.item_sets import ItemSet
from dfqs_nb.scores.run import Answerer, Options, score_set
from dfqs_nb.scores.sandbox import find_sandbox

__all__ = [
    "Answerer",
    "ItemSet",
    "Options",
    "Results",
    "SetRun",
    "compare_runs",
    "figures",
    "find_sandbox",
    "score_set",
    "speed",
]


def __getattr__(name: str) -> Any:
    """The figures, imported when they are asked for: matplotlib takes its time."""
    if name == "figures":
        from importlib import import_module

        return import_module("dfqs_nb.scores.figures")
    raise AttributeError(name)
