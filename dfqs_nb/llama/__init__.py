"""llama.cpp through llama-cpp-python: ask it about a file, open a model, generate with it, time it."""

from typing import TYPE_CHECKING

from dfqs_nb.core import lazy
from dfqs_nb.llama import check
from dfqs_nb.llama.settings import OpenSettings

if TYPE_CHECKING:
    from dfqs_nb.llama import timing
    from dfqs_nb.llama.generate import answer_table, chat
    from dfqs_nb.llama.model import kernels, open_model

__all__ = ["OpenSettings", "answer_table", "chat", "check", "kernels", "open_model", "timing"]

HOMES = dict(answer_table="generate", chat="generate", kernels="model", open_model="model")
__getattr__ = lazy(__name__, timing="timing", **HOMES)
