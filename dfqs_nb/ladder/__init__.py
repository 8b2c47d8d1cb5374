"""Notebook 08: one model at ever fewer bits, each rung quantized from the same source and measured alike."""

from typing import TYPE_CHECKING

from dfqs_nb.core.doors import lazy

if TYPE_CHECKING:
    from dfqs_nb.ladder import figures, tables
    from dfqs_nb.ladder.quantizer import plan, quantize
    from dfqs_nb.ladder.run import RUNGS, Settings, climb, collected, within_budget

__all__ = ["RUNGS", "Settings", "climb", "collected", "figures", "plan", "quantize", "tables"]
__all__ += ["within_budget"]

__getattr__ = lazy(
    __name__,
    **dict.fromkeys(("RUNGS", "Settings", "climb", "collected", "within_budget"), "run"),
    **dict.fromkeys(("plan", "quantize"), "quantizer"),
    figures="figures",
    tables="tables",
)
