"""A model's chat template, rendered in a child process: ``python -m dfqs_nb.llama``.

A template is code of the file's author. Jinja's sandbox keeps it from our files, and the child's limits on
time, memory and length keep it from stopping this process. The child lives as long as its model is open: to
start one takes longer than a prompt. llama-cpp-python's formatter renders it, with one difference: the prompt
is the same in every run. The clock stands still at `CLOCK`, and random choices repeat.
"""

from __future__ import annotations

import functools
import random
import re
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from dfqs_nb.core import child
from dfqs_nb.core.errors import ModelError

CLOCK = datetime(2026, 1, 1, 12)
SECONDS, START_SECONDS = 10.0, 120.0  # of a prompt, and of the child's start
MAX_CHARACTERS = 1 << 24  # of a rendered chat
MEMORY_BYTES = 1 << 30  # of address space that a template may take
PLAIN = "use a file with a sound chat template; in Python, llama.complete(model, text) needs none"


class ChatTemplate:
    """One model's template, in Jinja, with the texts of its tokens; ``where``: its file, for messages.

    ``dated``: whether it asks for the time; it gets that of `CLOCK`.
    """

    def __init__(self, source: str, bos: str, eos: str, where: Path) -> None:
        self._job = {"question": "render", "source": source, "bos": bos, "eos": eos}
        self.where, self.dated = where, "strftime_now" in source
        self._worker, self._lock = child.Worker("dfqs_nb.llama"), threading.Lock()
        self._started = False
        self._fault = ""  # that of a child that had to be killed: no other prompt waits for that long

    def render(self, question: str, variables: Mapping[str, bool] | None = None) -> str:
        """The text of a chat, up to where the answer begins; see `generate.chat_text`.

        Raises `ModelError`, also when the template exceeds its limits of time, memory and length.
        """
        chat = {"messages": [{"role": "user", "content": question}], **(variables or {})}
        with self._lock:
            answer = {"fault": self._fault}
            try:
                if not self._fault:
                    if not self._started:  # a busy machine needs longer for that than a template may take
                        nothing = {**self._job, "source": "", "chat": {"messages": []}}
                        self._worker.run(nothing, timeout_seconds=START_SECONDS)
                        self._started = True
                    answer = self._worker.run({**self._job, "chat": chat}, timeout_seconds=SECONDS)
            except child.ChildDied as error:
                limit = f"{SECONDS:.0f} seconds" if error.cause == "timeout" else "memory"
                answer["fault"] = self._fault = f"it exceeds its limit of {limit}"
        if (text := answer.get("text")) is None:
            raise ModelError(f"its chat template fails ({answer['fault']})", where=self.where, hint=PLAIN)
        at = 0  # a template may quote the question, or strip its lines: its words must be there, in order
        for word in re.findall(r"\w+", question):
            at = text.find(word, at) + len(word)
            if at < len(word):
                what = "its chat template leaves out the question"
                raise ModelError(what, where=self.where, hint=PLAIN)
        return text

    def close(self) -> None:
        """End the child, if there is one."""
        self._worker.close()


# ---- thinking, in the text that a model writes before its answer ----

MARKS = [(f"<{word}>", f"</{word}>") for word in ("think", "thinking", "thought", "reasoning")]
MARKS += [("[THINK]", "[/THINK]")]


def opens_thinking(prompt: str) -> bool:
    r"""Whether a rendered prompt ends with the mark that begins a thinking, as some templates do.

    >>> opens_thinking("<|Assistant|><think>\n"), opens_thinking("<|Assistant|>")
    (True, False)
    """
    return prompt.rstrip().endswith(tuple(opening for opening, _ in MARKS))


def answer_start(text: str, opened: bool = False) -> int | None:
    """Where the answer begins: behind the last thinking, which the prompt may have opened; None within it.

    >>> answer_start("<think>12?</think>12"), answer_start("It is 12."), answer_start("<think>so maybe")
    (18, 0, None)
    """
    start = max((at + len(end) for _, end in MARKS if (at := text.rfind(end)) >= 0), default=0)
    if any(text.find(opening, start) >= 0 for opening, _ in MARKS):
        return None
    return None if opened and not start else start


# ---- the child's side ----


@functools.cache
def _formatter(source: str, bos: str, eos: str) -> Any:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    child.limit_memory(psutil.Process().memory_info().vms + MEMORY_BYTES)  # behind what the import takes
    formatter: Any = Jinja2ChatFormatter(source, eos_token=eos, bos_token=bos)
    formatter.strftime_now = CLOCK.strftime
    return formatter


def render(job: dict[str, Any]) -> dict[str, str]:
    """Render one chat: the text, or what is wrong."""
    random.seed(0)
    try:
        text = _formatter(job["source"], job["bos"], job["eos"])(**job["chat"]).prompt
    except Exception as error:  # the template is code: it may raise anything; Jinja raises its own errors
        number = getattr(error, "lineno", None)  # of Jinja's syntax errors
        line = f"line {number}: " if number else ""
        return {"fault": (line + (str(error) or type(error).__name__))[:300]}
    if len(text) > MAX_CHARACTERS:
        return {"fault": f"its text exceeds {MAX_CHARACTERS:,} characters"}
    return {"text": text}
