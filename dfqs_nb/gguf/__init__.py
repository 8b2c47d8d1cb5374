"""GGUF files: their headers, the facts in them, shards that belong together, and names of models.

>>> read_header(models.resolve("dfqs-nano-f16")[0]).architecture
'deepseek4'
"""

from typing import TYPE_CHECKING

from dfqs_nb.core.doors import lazy
from dfqs_nb.gguf import broken, facts, memory, models, placement, published, shards
from dfqs_nb.gguf.header import check_layout, read_header

if TYPE_CHECKING:
    from dfqs_nb.gguf import figures

__all__ = [
    "broken",
    "check_layout",
    "facts",
    "figures",
    "memory",
    "models",
    "placement",
    "published",
    "read_header",
    "shards",
]

__getattr__ = lazy(__name__, figures="figures")
