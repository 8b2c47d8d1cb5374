"""A model's chat template, rendered in a child process: ``python -m dfqs_nb.llama.template``.

A template is code of the file's author. Jinja's sandbox keeps it from our files, and the child's limits on
time, memory and length keep it from stopping this process. The child lives as long as its model is open: to
start one takes longer than a prompt.

llama-cpp-python's formatter renders it, with one difference: the prompt is the same in every run. The clock
stands still at `CLOCK`, random choices repeat, and an address in memory is a fault.
"""

from __future__ import annotations

import functools
import random
import re
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from dfqs_nb.core import child
from dfqs_nb.core.errors import ModelError

CLOCK = datetime(2026, 1, 1, 12)
SECONDS = 10.0
MAX_CHARACTERS = 1 << 24  # of a rendered chat
MEMORY_BYTES = 1 << 30  # of address space that a template may take
ADDRESS = re.compile(r" at 0x[0-9a-f]{4,}")  # in what Python shows of an object
PLAIN = "use a file with a sound chat template; in Python, llama.complete(model, text) needs none"

Message = Mapping[str, str]


class ChatTemplate:
    """One model's template, in Jinja, with the texts of its tokens; ``where``: its file, for messages.

    ``dated``: whether it asks for the time; it gets that of `CLOCK`.
    """

    def __init__(self, source: str, bos: str, eos: str, where: Path) -> None:
        self._job = {"source": source, "bos": bos, "eos": eos}
        self.where, self.dated = where, "strftime_now" in source
        self._worker, self._lock = child.Worker(__name__), threading.Lock()
        self._fault = ""  # that of a child that had to be killed: no other prompt waits for that long

    def render(self, messages: Sequence[Message], variables: Mapping[str, bool] | None = None) -> str:
        """The text of a chat, up to where the answer begins; see `generate.chat_text`.

        Raises `ModelError`, also when the template exceeds its limits of time, memory and length.
        """
        chat = {"messages": [dict(message) for message in messages], **(variables or {})}
        with self._lock:
            answer = {"fault": self._fault}
            try:
                if not self._fault:
                    answer = self._worker.run({**self._job, "chat": chat}, timeout_seconds=SECONDS)
            except child.ChildDied as error:
                limit = f"{SECONDS:.0f} seconds" if error.cause == "timeout" else "memory"
                answer["fault"] = self._fault = f"it exceeds its limit of {limit}"
        if (text := answer.get("text")) is None:
            raise ModelError(f"its chat template fails ({answer['fault']})", where=self.where, hint=PLAIN)
        question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        if not _holds(text, question):
            raise ModelError("its chat template leaves out the question", where=self.where, hint=PLAIN)
        return text

    def close(self) -> None:
        """End the child, if there is one."""
        self._worker.close()


def _holds(text: str, question: str) -> bool:
    """Whether the question's words are in the text, in order; a template may quote it, or strip its lines.

    >>> _holds('["say", "hi"]', 'say "hi"'), _holds("Hello", "What is 2 + 2?")
    (True, False)
    """
    at = 0
    for word in re.findall(r"\w+", question):
        at = text.find(word, at) + len(word)
        if at < len(word):
            return False
    return True


# ---- the child's side ----


@functools.cache
def _formatter(source: str, bos: str, eos: str) -> Any:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    formatter: Any = Jinja2ChatFormatter(source, eos_token=eos, bos_token=bos)
    formatter.strftime_now = CLOCK.strftime
    return formatter


def work(job: dict[str, Any]) -> dict[str, str]:
    """Render one chat: the text, or what is wrong."""
    chat = job.pop("chat")
    random.seed(0)
    try:
        text = _formatter(**job)(**chat).prompt
    except Exception as error:  # the template is code: it may raise anything; Jinja raises its own errors
        number = getattr(error, "lineno", None)  # of Jinja's syntax errors
        line = f"line {number}: " if number else ""
        return {"fault": (line + (str(error) or type(error).__name__))[:300]}
    if len(text) > MAX_CHARACTERS:
        return {"fault": f"its text exceeds {MAX_CHARACTERS:,} characters"}
    if ADDRESS.search(text) and not ADDRESS.search(str(chat["messages"])):
        return {"fault": "its text has an address in memory, which is another in every run"}
    return {"text": text}


if __name__ == "__main__":
    import llama_cpp.llama_chat_format  # noqa: F401  what it takes is not the template's

    child.limit_memory(psutil.Process().memory_info().vms + MEMORY_BYTES)
    child.serve(work)
