"""What an answer says: in a form that can be compared, and the code in it."""

from __future__ import annotations

import re
import textwrap
import unicodedata
import warnings
from decimal import Decimal, InvalidOperation
from symtable import Function, SymbolTable, symtable

# A fence opens anywhere in a line (models glue it behind words), and closes with the same marks or never.
# Marks are taken as a whole: a model that writes nothing else must not cost a quadratic time.
FENCED = re.compile(r"((?<!`)`{3,}+|(?<!~)~{3,}+)[^`~\n]*\n(.*?)(?:\1|\Z)", re.DOTALL)
CODE_LINE = re.compile(r"[ \t]*(def|async def|class|from|import|@)\b|[ \t]*[A-Za-z_]\w*[ \t]*=[^=]")
LONGEST = 2000  # characters of an answer from which marks are taken; more would take minutes
MOST_DIGITS = 1000  # of a number that is compared as a number
MOST_TRIES = 400  # pieces of plain text that may be code


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

    A block may be indented, unclosed, glued to words, or fenced by tildes, and a method of a class counts.
    None where there is no code.

    >>> code_in("Here:\n~~~python\ndef f(x):\n    return x", "f")
    'def f(x):\n    return x'
    """
    answer = re.sub("\r\n?|[\u2028\u2029]", "\n", answer)
    blocks = [textwrap.dedent(block).strip("\n") for _, block in FENCED.findall(answer)][::-1]
    codes = (_defining(block, name) for block in blocks)
    if code := next(filter(None, codes), None) or _plain_code(answer, name):
        return code
    head = re.compile(rf"^(async )?def {re.escape(name)}\b", re.MULTILINE)
    return next(filter(head.search, blocks or [answer]), None)  # it is no Python: running it says why


def parsed(code: str) -> tuple[SymbolTable | None, int]:
    """The names of a module, or None with the line of the first fault."""
    with warnings.catch_warnings(action="ignore"):  # of the model's code, such as invalid escapes
        try:
            return symtable(code, "<answer>", "exec"), 0
        except SyntaxError as error:
            return None, error.lineno or 1
        except (ValueError, RecursionError, MemoryError):
            return None, 1


def _defining(code: str, name: str) -> str | None:
    """The code, if it is Python that defines the name; a method is taken out of its class."""
    table = parsed(code)[0]
    if table is None:
        return None
    if name in table.get_identifiers() and table.lookup(name).is_local():
        return code
    for owner in table.get_children():
        for method in owner.get_children() if owner.get_type() == "class" else []:
            if method.get_name() == name and isinstance(method, Function):
                made = "()" if method.get_parameters()[:1] == ("self",) else ""
                return f"{code}\n\n{name} = {owner.get_name()}{made}.{name}"
    return None


def _plain_code(answer: str, name: str) -> str | None:
    """Code without fences: from a line that looks like code on, as far as it is Python."""
    lines, tries = answer.split("\n"), MOST_TRIES
    for start in (i for i, line in enumerate(lines) if CODE_LINE.match(line)):
        end = len(lines)
        while end > start and tries:
            text, tries = textwrap.dedent("\n".join(lines[start:end])), tries - 1
            table, fault = parsed(text)
            if table is not None:
                if code := _defining(text, name):
                    return code
                break
            end = min(end, start + fault) - 1  # without the line that is no Python
    return None
