"""Notebook 07: the DFQS report of a run, checked, compared and ranked."""

from typing import TYPE_CHECKING

from dfqs_nb.core import lazy

if TYPE_CHECKING:  # every module of this stage needs pandas, which takes a second to import
    from dfqs_nb.report.compare import compare_reports, leaderboard
    from dfqs_nb.report.metrics import build_report
    from dfqs_nb.report.reading import read_report
    from dfqs_nb.report.text import check_run, tables, verdict, write_report

__all__ = ["build_report", "check_run", "compare_reports", "leaderboard", "read_report", "tables", "verdict"]
__all__ += ["write_report"]

FILES = {"build_report": "metrics", "check_run": "text", "write_report": "text", "read_report": "reading"}
FILES |= {"compare_reports": "compare", "leaderboard": "compare", "tables": "text", "verdict": "text"}
__getattr__ = lazy(__name__, **FILES)
