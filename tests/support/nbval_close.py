"""How a notebook's outputs are compared with the stored ones, by the tags of a cell.

Without a tag every character must be the same. Words, verdicts and statuses must be the same in every case.

- ``nbval-close``: a model's numbers, whose last digits and near ties differ between processors: a decimal within 2 %
  or two units of its last digit, a count within 2 % or two; 0 and 100 stay what they are. ``nbval-close-20``: 20 %,
  for lengths between two measured ones and for ends of intervals.
- ``nbval-words``: numbers of a clock or of the machine: any number, or yes for no, may stand in place of another.
- ``needs-sandbox``: compared only where generated code can run, as on the machine that stored the outputs.
- ``nbval-ignore-output``: nothing is compared; a second tag says why: `REASONS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)|\bnan\b|\binf\b")
YES_NO = r"(?<=>)(?:yes|no)(?=<)|(?<=\| )(?:yes|no)(?= \||\n|$)"  # a cell of a table, as HTML and as text
TIMED = re.compile(rf"{NUMBER.pattern}|\b(?:min|s)\b|{YES_NO}")
REASONS = {"because-machine-facts", "because-generated-texts", "because-near-ties"}
TAG = re.compile(r"nbval-(?:words|close(?:-(?P<percent>\d+))?)")


def is_close(one: str, other: str, percent: float = 2) -> bool:
    """Whether two printed numbers are the same but for rounding.

    >>> is_close("0.745", "0.747"), is_close("192", "194"), is_close("0", "1"), is_close("4,608", "4,620")
    (True, True, False, True)
    """
    if one == other or not (re.search(r"\d", one) and re.search(r"\d", other)):
        return one == other
    a, b = (float(text.replace(",", "")) for text in (one, other))
    if 0 in (a, b) or 100 in (a, b):
        return abs(a - b) < 1e-9 or ("." in one and abs(a - b) <= 2 * _last_digit(one))
    return abs(a - b) <= max(percent / 100 * abs(a), 2 * _last_digit(one))


def _last_digit(text: str) -> float:
    digits, _, exponent = text.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def made_equal(ref: str, test: str, tag: str) -> str:
    """The text of a test's run with the stored numbers in place of its own where the tag allows that.

    The text comes back as it is if its words differ, or one number does not pass.
    """
    kind = TAG.fullmatch(tag)
    pattern = TIMED if tag == "nbval-words" else NUMBER
    words = [
        [" ".join(re.sub("-{2,}", "-", part).split()) for part in pattern.split(text)] for text in (ref, test)
    ]
    close = partial(is_close, percent=float(kind["percent"] or 2) if kind else 0)
    if words[0] != words[1] or (
        tag != "nbval-words" and not all(map(close, NUMBER.findall(ref), NUMBER.findall(test)))
    ):
        return test
    return ref


def allow(cell: Any) -> None:
    """Compare a cell of nbval as its tags say; machine paths are left out first, as nbval does."""
    tags = cell.cell.metadata.get("tags", [])
    tag = next((name for name in tags if TAG.fullmatch(name)), "")
    if "needs-sandbox" in tags and not _sandbox_here():
        cell.options["check"] = False
    if not tag:
        return
    compare = cell.compare_outputs

    def compared(test: list[Any], ref: list[Any], skip_compare: Any = None) -> bool:
        if len(test) == len(ref):
            clean = partial(_each_text, change=cell.sanitize)
            ref = [clean(one) for one in ref]
            test = [_equal(clean(one), two, tag) for one, two in zip(test, ref, strict=True)]
        return compare(test, ref, skip_compare)

    cell.compare_outputs = compared


@lru_cache(maxsize=1)
def _sandbox_here() -> bool:
    from dfqs_nb.scores import find_sandbox

    return find_sandbox().safe


def _each_text(output: Any, change: Callable[[str], str]) -> Any:
    if isinstance(output, str):
        return change(output)
    if isinstance(output, Mapping):
        return type(output)({key: _each_text(value, change) for key, value in output.items()})
    return output


def _equal(test: Any, ref: Any, tag: str) -> Any:
    """An output whose texts are `made_equal` to the stored ones."""
    if isinstance(test, str) and isinstance(ref, str):
        return made_equal(ref, test, tag)
    if isinstance(test, Mapping) and isinstance(ref, Mapping):
        return type(test)({key: _equal(value, ref.get(key), tag) for key, value in test.items()})
    return test
