"""Serve the model, check its servers, compare their answers with this process, and deploy it elsewhere.

>>> is_url("http://127.0.0.1:8080/v1")
True
"""

from typing import TYPE_CHECKING

from dfqs_nb.core.doors import lazy
from dfqs_nb.serve import checks, compare, recipes, servers
from dfqs_nb.serve.client import check_in_process, connect, is_url
from dfqs_nb.serve.measure import score_set
from dfqs_nb.serve.plan import plan_checks

if TYPE_CHECKING:
    from dfqs_nb.serve import figures

__all__ = [
    "check_in_process",
    "checks",
    "compare",
    "connect",
    "figures",
    "is_url",
    "plan_checks",
    "recipes",
    "score_set",
    "servers",
]

__getattr__ = lazy(__name__, figures="figures")
