"""GGUF files: their headers, what these say of a model, shards that belong together, and names of models.

>>> read_header(models.resolve("dfqs-nano-f16")[0]).architecture
'deepseek4'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dfqs_nb.gguf import broken, facts, memory, models, published, shards
from dfqs_nb.gguf.header import check_layout, read_header
from dfqs_nb.gguf.shards import open_shards

if TYPE_CHECKING:
    from dfqs_nb.gguf import figures

__all__ = [
    "broken",
    "check_layout",
    "facts",
    "figures",
    "memory",
    "models",
    "open_shards",
    "published",
    "read_header",
    "shards",
]


def __getattr__(name: str) -> Any:
    """Import the figures when they are used: matplotlib is slow."""
    if name == "figures":
        return import_module(f"{__name__}.figures")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
