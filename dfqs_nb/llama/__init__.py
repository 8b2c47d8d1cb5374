"""llama.cpp through llama-cpp-python: ask it about a file, open a model, generate with it, time it.

>>> from dfqs_nb import llama
>>> llama.OpenSettings(n_ctx=1024).n_ctx
1024
"""

from typing import TYPE_CHECKING

from dfqs_nb.core.doors import lazy

if TYPE_CHECKING:
    from dfqs_nb.llama import figures
    from dfqs_nb.llama.diagnosis import diagnose
    from dfqs_nb.llama.generate import answer_table, chat, complete, stream_chat
    from dfqs_nb.llama.model import open_model
    from dfqs_nb.llama.settings import OpenSettings
    from dfqs_nb.llama.timing import measure_speed, plan_cost

__all__ = [
    "OpenSettings",
    "answer_table",
    "chat",
    "complete",
    "diagnose",
    "figures",
    "measure_speed",
    "open_model",
    "plan_cost",
    "stream_chat",
]

# all of it: `python -m dfqs_nb.llama.template` wants a module that the package has not imported yet
__getattr__ = lazy(
    __name__,
    figures="figures",
    OpenSettings="settings",
    answer_table="generate",
    chat="generate",
    complete="generate",
    diagnose="diagnosis",
    measure_speed="timing",
    open_model="model",
    plan_cost="timing",
    stream_chat="generate",
)
