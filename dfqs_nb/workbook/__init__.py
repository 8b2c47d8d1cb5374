"""The workbook as a whole: run the notebooks, sweep many models, and the command line."""

from typing import TYPE_CHECKING

from dfqs_nb.core import lazy

if TYPE_CHECKING:
    from dfqs_nb.workbook.run import find_notebooks, overview, parameter_table, run_workbook

__all__ = ["find_notebooks", "overview", "parameter_table", "run_workbook"]
__getattr__ = lazy(__name__, **dict.fromkeys(__all__, "run"))
