"""The workbook as a whole: run the notebooks, sweep many models, and the command line."""

from dfqs_nb.workbook.run import find_notebooks, overview, parameter_table, run_workbook

__all__ = ["find_notebooks", "overview", "parameter_table", "run_workbook"]
