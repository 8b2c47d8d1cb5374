"""What an answer says: in a form that can be compared, and the code in it."""

from __future__ import annotations

import ast
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import islice

# A fence opens anywhere in a line (models glue it behind words) and closes with the same marks.
FENCE = re.compile(r"(?P<mark>`{3,}|~{3,})[^`~\n]*\n")
CODE_LINE = re.compile(r"[ \t]*(def|async def|class|from|import|@)\b|[ \t]*[A-Za-z_]\w*[ \t]*=[^=]")
MOST_ENDS, MOST_TRIES = 8, 400  # closing fences of a block, and pieces of plain text, that are tried


def normalised(text: str) -> str:
    """An answer without what does not change it: case, spacing, marks around it, how a number is written.

    >>> normalised(" **1,234.50.** "), normalised("The box  is Red."), normalised("$37/67$")
    ('1234.5', 'the box is red', '37/67')
    """
    text = " ".join(unicodedata.normalize("NFKC", text).replace("−", "-").split())
    before = None
    while text != before:
        before = text
        text = re.sub(r"^([*`\"'$]+)(.*)\1$", r"\2", text).strip().rstrip(".").strip()
    plain = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text).removeprefix("$")
    try:
        number = Decimal(plain)
    except InvalidOperation:
        return text.casefold()
    return format(number.normalize() + 0, "f") if number.is_finite() else text.casefold()


def code_in(answer: str, name: str, prompt: str = "") -> str | None:
    r"""The code in a chat's answer that defines ``name``: the last code block that does, else plain text.

    A block may be indented, unclosed, glued to words, or fenced by tildes. A method of a class counts (an
    instance is made), and so does a body alone, which is put below ``prompt``. None where there is no code.

    >>> code_in("Here:\n~~~python\ndef f(x):\n    return x", "f")
    'def f(x):\n    return x'
    """
    answer = answer.replace("\r\n", "\n")
    blocks = list(_blocks(answer))
    for block in reversed(blocks):
        defined = _defining(block, name)
        if defined is not None:
            return defined
    plain = _plain_code(answer, name)
    if plain is not None:
        return plain
    for block in reversed(blocks):
        if re.search(rf"^(async )?def {re.escape(name)}\b", block, flags=re.MULTILINE):
            return block  # it is no Python: running it says why
        body = prompt + textwrap.indent(block, "    ")
        if prompt and re.search(r"^(return|yield)\b", block, flags=re.MULTILINE) and _parsed(body)[0]:
            return body
    return None


def _blocks(answer: str) -> Iterator[str]:
    """Every fenced block; one that its first closing fence leaves broken reaches to a later one."""
    at = 0
    while opening := FENCE.search(answer, at):
        rest = answer[opening.end() :]
        marks = islice(re.finditer(re.escape(opening["mark"]), rest), MOST_ENDS)
        ends = [match.start() for match in marks] or [len(rest)]
        texts = [textwrap.dedent(rest[:end]).strip("\n") for end in ends]
        chosen = next((i for i, text in enumerate(texts) if _parsed(text)[0]), 0)
        yield texts[chosen]
        at = opening.end() + ends[chosen] + len(opening["mark"])


def _parsed(code: str) -> tuple[ast.Module | None, int]:
    """The syntax tree, or None with the line of the first fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model's code, such as invalid escapes
        try:
            return ast.parse(code), 0
        except SyntaxError as error:
            return None, error.lineno or 1
        except (ValueError, RecursionError, MemoryError):
            return None, 1


def _defining(code: str, name: str) -> str | None:
    """The code, if it is Python that defines the name; a method is taken out of its class."""
    tree, _ = _parsed(code)
    for node in tree.body[::-1] if tree else ():
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if name in {getattr(node, "name", ""), *(getattr(target, "id", "") for target in targets)}:
            return code
        if isinstance(node, ast.ClassDef) and name in {getattr(inner, "name", "") for inner in node.body}:
            return f"{code}\n\n{name} = {node.name}().{name}"
    return None


def _plain_code(answer: str, name: str) -> str | None:
    """Code without fences: from a line that looks like code on, as far as it is Python."""
    lines, tries = answer.split("\n"), MOST_TRIES
    for start in (i for i, line in enumerate(lines) if CODE_LINE.match(line)):
        end = len(lines)
        while end > start and tries:
            text, tries = textwrap.dedent("\n".join(lines[start:end])), tries - 1
            tree, fault = _parsed(text)
            if tree is not None:
                code = _defining(text, name)
                if code is not None:
                    return code
                break
            end = min(end, start + fault) - 1  # without the line that is no Python
    return None
