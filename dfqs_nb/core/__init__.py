"""What everything stands on: errors, paths, files, stages, journals, child processes, machine, display."""

from dfqs_nb.core.display import facts, say, shown
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.machine import describe, memory_bandwidth
from dfqs_nb.core.stage import Stage

__all__ = ["DfqsError", "Stage", "describe", "facts", "memory_bandwidth", "say", "shown"]
