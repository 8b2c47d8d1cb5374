"""llama.cpp through llama-cpp-python: ask it about a file, open a model, generate with it, time it.

>>> from dfqs_nb import llama
>>> llama.OpenSettings(n_ctx=1024).n_ctx
1024
"""

from dfqs_nb.llama import check, timing
from dfqs_nb.llama.diagnosis import diagnose
from dfqs_nb.llama.generate import answer_table, chat, complete, stream_chat
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings

__all__ = ["OpenSettings", "answer_table", "chat", "check", "complete", "diagnose"]
__all__ += ["open_model", "stream_chat", "timing"]
