"""Serve the model, check its servers, ask them what this process is asked, and deploy it elsewhere.

>>> is_url("http://127.0.0.1:8080/v1")
True
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from dfqs_nb.serve import checks, compare, recipes, servers
from dfqs_nb.serve.client import check_in_process, connect, is_url
from dfqs_nb.serve.measure import measure_long_context, score_set

if TYPE_CHECKING:
    from dfqs_nb.serve import figures

__all__ = [
    "check_in_process",
    "checks",
    "compare",
    "connect",
    "figures",
    "is_url",
    "measure_long_context",
    "recipes",
    "score_set",
    "servers",
]


def __getattr__(name: str) -> ModuleType:
    """``figures``, when it is asked for: it needs matplotlib, which takes a second."""
    if name == "figures":
        return import_module("dfqs_nb.serve.figures")
    raise AttributeError(name)
