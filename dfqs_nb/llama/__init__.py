"""llama.cpp through llama-cpp-python: ask it about a file, open a model, generate with it, time it.

>>> from dfqs_nb import llama
>>> llama.OpenSettings(n_ctx=1024).n_ctx
1024
"""

from typing import TYPE_CHECKING

from dfqs_nb.core.doors import lazy

if TYPE_CHECKING:
    from dfqs_nb.llama import check, figures, timing
    from dfqs_nb.llama.diagnosis import diagnose
    from dfqs_nb.llama.generate import answer_table, chat, complete, stream_chat
    from dfqs_nb.llama.model import open_model
    from dfqs_nb.llama.settings import OpenSettings

__all__ = ["OpenSettings", "answer_table", "chat", "check", "complete", "diagnose"]
__all__ += ["figures", "open_model", "stream_chat", "timing"]

# all of it: `python -m dfqs_nb.llama.template` wants a module that the package has not imported yet
__getattr__ = lazy(
    __name__,
    check="check",
    figures="figures",
    OpenSettings="settings",
    answer_table="generate",
    chat="generate",
    complete="generate",
    diagnose="diagnosis",
    open_model="model",
    stream_chat="generate",
    timing="timing",
)
