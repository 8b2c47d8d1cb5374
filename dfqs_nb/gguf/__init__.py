"""GGUF files: their headers, the facts in them, shards that belong together, and names of models."""

from typing import TYPE_CHECKING

from dfqs_nb.core import lazy

if TYPE_CHECKING:
    from dfqs_nb.gguf import broken, facts, memory, models, shards
    from dfqs_nb.gguf.facts import model_header
    from dfqs_nb.gguf.models import outline

__all__ = ["broken", "facts", "memory", "model_header", "models", "outline", "shards"]
__getattr__ = lazy(__name__, **{it: it for it in __all__} | {"model_header": "facts", "outline": "models"})
