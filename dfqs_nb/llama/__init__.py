"""llama.cpp through llama-cpp-python: ask it about a file, open a model, generate with it, time it.

>>> OpenSettings(n_ctx=1024).n_ctx
1024
"""

from dfqs_nb.llama import check
from dfqs_nb.llama.generate import answer_table, chat, complete, same_tokens_twice, stream_chat
from dfqs_nb.llama.model import open_model, threads_for
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.llama.timing import measure_speed

__all__ = [
    "OpenSettings",
    "answer_table",
    "chat",
    "check",
    "complete",
    "measure_speed",
    "open_model",
    "same_tokens_twice",
    "stream_chat",
    "threads_for",
]
