"""Where the thinking of a model ends, in the text that it writes before its answer."""

from __future__ import annotations

MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
)


def opens_thinking(prompt: str) -> bool:
    r"""Whether a rendered prompt ends with the mark that begins a thinking, as some templates do.

    >>> opens_thinking("<|Assistant|><think>\n"), opens_thinking("<|Assistant|>")
    (True, False)
    """
    return prompt.rstrip().endswith(tuple(opening for opening, _ in MARKS))


def answer_start(text: str, opened: bool = False) -> int | None:
    """Where the answer begins: behind the last thinking; None while a thinking is open.

    Args:
        opened: the prompt has begun the thinking.

    >>> answer_start("<think>12?</think>12"), answer_start("It is 12."), answer_start("<think>so maybe")
    (18, 0, None)
    """
    start = max((at + len(end) for _, end in MARKS if (at := text.rfind(end)) >= 0), default=0)
    if any(text.find(opening, start) >= 0 for opening, _ in MARKS):
        return None
    return None if opened and not start else start
