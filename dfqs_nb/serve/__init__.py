"""Serve the model, check its servers, compare their answers with this process, and deploy it elsewhere.

>>> is_url("http://127.0.0.1:8080/v1")
True
"""

from typing import TYPE_CHECKING

from dfqs_nb.core.doors import lazy
from dfqs_nb.serve import checks, measure, recipes, servers
from dfqs_nb.serve.client import check_in_process, connect, continuation, is_url

if TYPE_CHECKING:
    from dfqs_nb.serve import figures

__all__ = [
    "check_in_process",
    "checks",
    "connect",
    "continuation",
    "figures",
    "is_url",
    "measure",
    "recipes",
    "servers",
]

__getattr__ = lazy(__name__, figures="figures")
