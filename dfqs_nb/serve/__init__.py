"""Serve the model, check its servers, compare their answers with this process, and deploy it elsewhere.

>>> is_url("http://127.0.0.1:8080/v1"), is_url("model.gguf")
(True, False)
"""

from dfqs_nb.core import lazy
from dfqs_nb.serve.client import check_in_process, connect, is_url

__all__ = ["check_in_process", "checks", "connect", "is_url", "recipes", "servers"]

# a server's process begins here, too, and needs none of the others
__getattr__ = lazy(__name__, checks="checks", recipes="recipes", servers="servers")
