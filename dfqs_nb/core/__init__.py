"""What everything stands on: errors, paths, files, stages, journals, child processes, machine, display."""

from dfqs_nb.core.display import shown, size, tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.machine import describe
from dfqs_nb.core.paths import data_dir, outputs_dir, tilde
from dfqs_nb.core.stage import Stage

__all__ = ["DfqsError", "Stage", "data_dir", "describe", "outputs_dir", "shown", "size", "tilde", "tqdm"]
