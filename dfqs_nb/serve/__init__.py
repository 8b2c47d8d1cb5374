"""Serve the model, check its servers, compare their answers with this process, and deploy it elsewhere.

>>> from dfqs_nb.serve import is_url
>>> is_url("http://127.0.0.1:8080/v1"), is_url("model.gguf")
(True, False)
"""

from typing import TYPE_CHECKING

from dfqs_nb.core import lazy

if TYPE_CHECKING:
    from dfqs_nb.serve import checks, recipes, servers
    from dfqs_nb.serve.client import check_in_process, connect, is_url

__all__ = ["check_in_process", "checks", "connect", "is_url", "recipes", "servers"]

# a server's process begins here, too, and needs no table
HOMES = dict.fromkeys(("check_in_process", "connect", "is_url"), "client")
__getattr__ = lazy(__name__, checks="checks", recipes="recipes", servers="servers", **HOMES)
