"""What an answer says: in a form that can be compared, and the code in it."""

from __future__ import annotations

import re
import textwrap
import unicodedata
import warnings
from decimal import Decimal, InvalidOperation
from symtable import SymbolTable, symtable

# A fence opens anywhere in a line (models glue it behind words), and closes with the same marks or never.
# Marks are taken as a whole: a model that writes nothing else must not cost a quadratic time.
FENCED = re.compile(r"((?<!`)`{3,}+|(?<!~)~{3,}+)[^`~\n]*\n(.*?)(?:\1|\Z)", re.DOTALL)
CODE_LINE = re.compile(
    r"[ \t]*(def \w+\(|async def |class \w+[:(]|from \S+ import |import \w+$|@\w|\w+[ \t]*=[^=])"
)
LONGEST = 2000  # characters of an answer from which marks are taken; more would take minutes
MOST_DIGITS = 1000  # of a number that is compared as a number
MOST_TRIES = 400  # lines behind plain code that may be no code


def normalised(text: str) -> str:
    """An answer without what does not change it: case, spacing, marks around it, how a number is written.

    >>> normalised(" **1,234.50.** "), normalised("The box  is Red."), normalised("$37/67$")
    ('1234.5', 'the box is red', '37/67')
    """
    text = " ".join(unicodedata.normalize("NFKC", text).replace("−", "-").split())
    if len(text) > LONGEST:
        return text.casefold()
    before = None
    while text != before:
        before = text
        text = re.sub(r"^([*`\"'$]+)(.*)\1$", r"\2", text).strip().rstrip(".").strip()
    plain = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text).removeprefix("$")
    try:
        number = Decimal(plain)
    except InvalidOperation:
        return text.casefold()
    if not number.is_finite() or abs(number.adjusted()) > MOST_DIGITS:
        return text.casefold()
    written = format(number, "f")  # exact: arithmetic would round to 28 digits, and overflow
    return (written.rstrip("0").rstrip(".") if "." in written else written) if number else "0"


def code_in(answer: str, name: str) -> str | None:
    r"""The code in a chat's answer that defines ``name``: the last code block that does, else plain text.

    A block may be indented, unclosed, glued to words, or fenced by tildes. None where there is no code.

    >>> code_in("Here:\n~~~python\ndef f(x):\n    return x", "f")
    'def f(x):\n    return x'
    """
    answer = re.sub("\r\n?|[\u2028\u2029]", "\n", answer)
    blocks = [textwrap.dedent(block).strip("\n") for _, block in FENCED.findall(answer)][::-1]
    head = re.compile(rf"^(async )?def {re.escape(name)}\b", re.MULTILINE)
    codes = blocks or [_plain_code(answer)]
    defining = (code for code in codes if name in _names(code))
    return next(defining, None) or next(filter(head.search, codes), None)  # a fault is seen when it runs


def parsed(code: str) -> tuple[SymbolTable | None, int]:
    """The names of a module, or None with the line of the first fault."""
    with warnings.catch_warnings(action="ignore"):  # of the model's code, such as invalid escapes
        try:
            return symtable(code, "<answer>", "exec"), 0
        except SyntaxError as error:
            return None, error.lineno or 1
        except (ValueError, RecursionError, MemoryError):
            return None, 1


def _names(code: str) -> set[str]:
    """What the code defines, if it is Python."""
    table = parsed(code)[0]
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_local()} if table else set()


def _plain_code(answer: str) -> str:
    """Code without fences: from the first line that looks like code, as far as it is Python."""
    lines = answer.split("\n")
    lines = lines[next((i for i, line in enumerate(lines) if CODE_LINE.match(line)), len(lines)) :]
    for _ in range(MOST_TRIES):
        code = textwrap.dedent("\n".join(lines))
        table, fault = parsed(code)
        if table is not None:
            return code
        lines = lines[: min(fault, len(lines)) - 1]  # without the line that is no Python
    return ""
