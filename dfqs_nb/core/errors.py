"""The errors of the workbook: each tells what is wrong, where, and what to do next."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from dfqs_nb.core.display import quoted

LONGEST = 3_000  # characters of what, where or hint


class DfqsError(Exception):
    """A failure that a user can act on: what is wrong, where (a file or URL), and the next step.

    ``FILE`` in a command of the hint stands for ``where``.
    """

    def __init__(self, what: str, *, where: str | Path | None = None, hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        text = what[:LONGEST]
        if where is not None:
            text = f"{str(where)[:LONGEST]}: {text}"
            hint = re.sub(r"(`dfqs-nb \w+) FILE", lambda command: f"{command[1]} {quoted(where)}", hint)
        super().__init__(f"{text}; {hint[:LONGEST]}" if hint else text)

    def _render_traceback_(self) -> list[str]:  # Jupyter shows it in place of 40 lines of our code
        return [f"{type(self).__name__}: {self}", *getattr(self, "__notes__", [])]


def shorten_interrupts(advice: str) -> None:
    """Let Jupyter show an interrupt as one line: its notes, which say what is kept, and ``advice``."""

    def show(shell: Any, kind: type, error: BaseException, traceback: Any, **_: Any) -> None:
        line = "; ".join(["stopped", *getattr(error, "__notes__", []), advice])
        vars(error)["_render_traceback_"] = lambda: [line]
        shell.showtraceback((kind, error, traceback))

    if (ipython := sys.modules.get("IPython")) and (shell := ipython.get_ipython()):
        shell.set_custom_exc((KeyboardInterrupt,), show)


class HeaderError(DfqsError):
    """The bytes of a GGUF header are not what the format allows."""


class LayoutError(DfqsError):
    """The header is readable, but the tensors do not lie in the file as it states."""


class ShardError(DfqsError):
    """A set of shards is incomplete, inconsistent, or of several models."""


class IntegrityError(DfqsError):
    """Bytes differ from their hash, or from a second reading."""


class SpaceError(DfqsError):
    """The disk or the memory is too small."""


class OutputError(DfqsError):
    """An output exists already, or cannot be written."""


class RegistryError(DfqsError):
    """A model's name is unknown, or its files are not available."""


class ModelError(DfqsError):
    """llama.cpp rejects the model, or dies on it."""


class StageError(DfqsError):
    """A notebook needs a file that an earlier notebook writes."""
