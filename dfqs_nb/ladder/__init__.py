"""Notebook 08: one model in fewer and fewer bits, each rung quantized from one source and measured alike."""

from typing import TYPE_CHECKING

from dfqs_nb.core import lazy

if TYPE_CHECKING:
    from dfqs_nb.ladder import figures, tables
    from dfqs_nb.ladder.imatrix import collect, read_imatrix
    from dfqs_nb.ladder.quantizer import plan, quantize
    from dfqs_nb.ladder.run import RUNGS, Settings, climb, source_of, within_budget

__all__ = ["RUNGS", "Settings", "climb", "collect", "figures", "plan", "quantize", "read_imatrix", "tables"]
__all__ += ["source_of", "within_budget"]

HOMES = dict.fromkeys(("RUNGS", "Settings", "climb", "source_of", "within_budget"), "run")
HOMES |= dict(collect="imatrix", read_imatrix="imatrix", plan="quantizer", quantize="quantizer")
__getattr__ = lazy(__name__, figures="figures", tables="tables", **HOMES)
