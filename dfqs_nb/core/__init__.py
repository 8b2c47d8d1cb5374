"""What everything stands on: errors, paths, files, stages, journals, child processes, machine, display."""

from typing import TYPE_CHECKING

from dfqs_nb.core.display import facts, say, shown
from dfqs_nb.core.doors import lazy
from dfqs_nb.core.errors import DfqsError

if TYPE_CHECKING:
    from dfqs_nb.core.machine import describe, memory_bandwidth
    from dfqs_nb.core.stage import Stage

__all__ = ["DfqsError", "Stage", "describe", "facts", "memory_bandwidth", "say", "shown"]
__getattr__ = lazy(__name__, Stage="stage", describe="machine", memory_bandwidth="machine")
