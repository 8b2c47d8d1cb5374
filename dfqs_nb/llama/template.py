"""A model's chat template, rendered in a child process: ``python -m dfqs_nb.llama.template``.

A template is code of the file's author. Jinja's sandbox keeps it from our files, and the child's limits on
time, memory and length keep it from stopping this process. The child lives as long as its model is open: to
start one takes longer than a prompt.

The environment is that of llama-cpp-python's ``Jinja2ChatFormatter``, which follows Hugging Face
Transformers. One difference: it gives the same prompt in every run. The clock stands still at `CLOCK`, random
choices repeat, and an address in memory is a fault.
"""

from __future__ import annotations

import functools
import json
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dfqs_nb.core import child
from dfqs_nb.core.errors import ModelError

CLOCK = datetime(2026, 1, 1, 12)
SECONDS = 10.0
MAX_CHARACTERS = 1 << 24  # of a rendered chat
MEMORY_BYTES = 2 << 30  # of the child's address space
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
            text = self._rendered(chat)
        question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        if not _holds(text, question):
            raise ModelError("its chat template leaves out the question", where=self.where, hint=PLAIN)
        return text

    def _rendered(self, chat: dict[str, Any]) -> str:
        answer = {"fault": self._fault}
        try:
            if not self._fault:
                answer = self._worker.run({**self._job, "chat": chat}, timeout_seconds=SECONDS)
        except child.ChildDied as error:
            limit = f"{SECONDS:.0f} seconds" if error.cause == "timeout" else "memory"
            answer["fault"] = self._fault = f"it exceeds its limit of {limit}"
        if "text" not in answer:
            raise ModelError(f"its chat template fails ({answer['fault']})", where=self.where, hint=PLAIN)
        return answer["text"]

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
def _renderer(source: str, bos: str, eos: str) -> Callable[[dict[str, Any]], str]:
    """A function of the messages and variables that gives the text; Jinja may fail to parse the source."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}`` of Transformers marks the answer for training; here it does nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            parser.stream.skip(1)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        loader=jinja2.BaseLoader(),
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, loopcontrols],
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, **{"ensure_ascii": False, **options}
    )
    template = environment.from_string(source)
    values = {
        "bos_token": bos,
        "eos_token": eos,
        "add_generation_prompt": True,
        "raise_exception": refuse,
        "strftime_now": CLOCK.strftime,
        **dict.fromkeys(("functions", "function_call", "tools", "tool_choice")),
    }

    def render(chat: dict[str, Any]) -> str:
        text = ""
        random.seed(0)
        for piece in template.generate(**values, **chat):
            text += piece
            if len(text) > MAX_CHARACTERS:
                raise ValueError(f"its text exceeds {MAX_CHARACTERS:,} characters")
        if ADDRESS.search(text) and not ADDRESS.search(str(chat["messages"])):
            raise ValueError("its text has an address in memory, which is another in every run")
        return text

    return render


def work(job: dict[str, Any]) -> dict[str, str]:
    """Render one chat: the text, or what is wrong."""
    child.limit_memory(MEMORY_BYTES)
    chat = job.pop("chat")
    try:
        return {"text": _renderer(**job)(chat)}
    except Exception as error:  # the template is code: it may raise anything; Jinja raises its own errors
        number = getattr(error, "lineno", None)  # of Jinja's syntax errors
        line = f"line {number}: " if number else ""
        return {"fault": (line + (str(error) or type(error).__name__))[:300]}


if __name__ == "__main__":
    child.serve(work)
