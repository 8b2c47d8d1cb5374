"""Notebook 07: the DFQS report of a run, checked, compared and ranked."""

from dfqs_nb.report.compare import compare_reports, leaderboard
from dfqs_nb.report.metrics import build_report
from dfqs_nb.report.reading import read_report
from dfqs_nb.report.text import check_run, tables, verdict, write_report

__all__ = ["build_report", "check_run", "compare_reports", "leaderboard", "read_report", "tables", "verdict"]
__all__ += ["write_report"]
