"""What llama.cpp logs: its last lines, by level, in place of printing them."""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any

DEBUG, WARNING, ERROR, CONTINUES = 1, 3, 4, 5  # ggml_log_level of ggml.h
MAX_LINES, MAX_LINE = 500, 2000  # that are kept, and their characters: a model's name can have 100,000


class LlamaLog:
    """The last lines that llama.cpp logged."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=MAX_LINES)
        self._open_line, self._level = "", 0
        self._callback: Any = None

    def install(self) -> None:
        """Take llama.cpp's log over (importing llama_cpp sets a callback that prints), and begin anew."""
        import llama_cpp

        self._callback = self._callback or llama_cpp.llama_log_callback(self._receive)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))
        self._lines.clear()

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        self._level = self._level if level == CONTINUES else level
        if self._level > DEBUG:
            *lines, self._open_line = (self._open_line + text.decode("utf-8", "replace")).split("\n")
            self._open_line = self._open_line[:MAX_LINE]
            self._lines.extend((self._level, line[:MAX_LINE]) for line in lines)

    def tail(self, n_lines: int = MAX_LINES, level: int = 0) -> list[str]:
        """The last lines of at least this level (`WARNING`, `ERROR`), oldest first."""
        return [line for line_level, line in self._lines if line_level >= level][-n_lines:]


LOG = LlamaLog()
