"""The child process that `check` asks about files: ``python -m dfqs_nb.llama``."""

from dfqs_nb.core import child
from dfqs_nb.llama import check

child.serve(check.work)
