"""What an answer says: in a form that can be compared, and the code in it."""

from __future__ import annotations

import ast
import builtins
import html
import re
import textwrap
import unicodedata
import warnings
import zlib
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import islice

# A fence opens anywhere in a line (models glue it behind words) and closes with the same marks.
FENCE = re.compile(r"(?P<mark>`{3,}|~{3,})[^`~\n]*\n")
CODE_LINE = re.compile(r"[ \t]*(def|async def|class|from|import|@)\b|[ \t]*[A-Za-z_]\w*[ \t]*=[^=]")
FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)  # has to stand first
MOST_DIGITS = 1000  # of a number that is compared as one
MOST_ENDS, MOST_TRIES = 8, 400  # closing fences of a block, and pieces of plain text, that are tried
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


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
    if not number.is_finite() or abs(number.adjusted()) > MOST_DIGITS:
        return text.casefold()
    written = format(number, "f")  # exact: arithmetic would round to 28 digits, and overflow
    return (written.rstrip("0").rstrip(".") if "." in written else written) if number else "0"


def repeats(text: str) -> bool:
    """Whether an answer repeats itself: its last 1,000 characters compress to a third, as no prose does.

    >>> repeats("So the answer is 12. " * 60), repeats("The quick brown fox jumps over the lazy dog.")
    (True, False)
    """
    end = text[-1000:].encode("utf-8", "replace")
    return len(zlib.compress(end, 9)) * 3 < len(end)


def code_in(answer: str, name: str, prompt: str = "") -> str | None:
    r"""The code in a chat's answer that defines ``name``: the last code block that does, else plain text.

    A block may be indented, unclosed, glued to words, fenced by tildes, quoted, or in HTML. A method of a
    class counts (an instance is made where it needs one), and so does a body alone, which is put below
    ``prompt``. None where there is no code.

    >>> code_in("Here:\n~~~python\ndef f(x):\n    return x", "f")
    'def f(x):\n    return x'
    """
    answer = re.sub("\r\n?|[\u2028\u2029]", "\n", answer)
    broken = None
    for text in dict.fromkeys((answer, _undressed(answer))):
        blocks = list(_blocks(text))
        for number, block in reversed(list(enumerate(blocks))):
            defined = _defining(block, name)
            if defined is not None:
                return _with_helpers(defined, blocks[:number])
        plain = _plain_code(text, name)
        if plain is not None:
            return plain
        for block in reversed(blocks or [textwrap.dedent(text.strip("\n"))]):
            if broken is None and re.search(rf"^(async )?def {re.escape(name)}\b", block, flags=re.MULTILINE):
                broken = block  # it is no Python: running it says why
            body = prompt + textwrap.indent(block, "    ")
            if prompt and re.search(r"^(return|yield)\b", block, flags=re.MULTILINE) and _parsed(body)[0]:
                return body
    return broken


def _undressed(answer: str) -> str:
    r"""The text without what pages and terminals put around code: HTML, quotation marks, odd spaces.

    >>> _undressed("> >>> x\u00a0= 1"), _undressed("<pre>1 &lt; 2</pre>")
    ('x = 1', '\n```\n1 < 2\n```\n')
    """
    text = html.unescape(re.sub(r"</?(?:pre|code)\b[^>\n]*>", "\n```\n", answer))
    kinds = {"Zs": " ", "Cf": ""}
    text = "".join(kinds.get(unicodedata.category(character), character) for character in text)
    marks = r"^[ \t]*(?:(?:> ?)+(?!>)(?:(?:>>>|\.\.\.)(?: |$))?|(?:>>>|\.\.\.)(?: |$))"
    return re.sub(marks, "", text, flags=re.MULTILINE)


def _with_helpers(code: str, earlier: list[str]) -> str:
    """The code, and before it the functions, classes and imports of earlier blocks that it needs."""
    helpers, missing = "", _missing(code)
    for block in reversed(earlier):
        for node in reversed(getattr(_parsed(block)[0], "body", ())):
            if isinstance(node, Definition | ast.Import | ast.ImportFrom) and _bound(node) & missing:
                first = min([node, *getattr(node, "decorator_list", ())], key=lambda part: part.lineno)
                text = "\n".join(block.split("\n")[first.lineno - 1 : node.end_lineno]) + "\n"
                helpers, missing = text + helpers, missing | _missing(text)
    return helpers + FUTURE.sub("", code) if helpers else code


def _missing(code: str) -> set[str]:
    """Names that the code uses and nowhere binds."""
    nodes = list(ast.walk(_parsed(code)[0] or ast.Module([], [])))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return used - set[str]().union(*map(_bound, nodes)) - set(dir(builtins))


def _bound(node: ast.AST) -> set[str]:
    """The names that a node gives a meaning."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Name):
        return set() if isinstance(node.ctx, ast.Load) else {node.id}
    return {node.name} if isinstance(node, Definition) else {node.arg} if isinstance(node, ast.arg) else set()


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
    for node in _statements(tree.body if tree else [])[::-1]:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = (inner for target in targets if target for inner in ast.walk(target))
        if name in _bound(node).union(*map(_bound, names)):
            return code
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if name in _bound(method):
                    made = "" if _is_plain(method) else "()"
                    return f"{code}\n\n{name} = {node.name}{made}.{name}"
    return None


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """These statements and those under ``if``, ``try``, ``with`` and loops: they run with the module."""
    waiting, found = body[::-1], []
    while waiting:
        node = waiting.pop()
        found.append(node)
        if not isinstance(node, Definition):
            parts = [getattr(node, part, []) for part in ("body", "orelse", "finalbody")]
            parts += [handler.body for handler in getattr(node, "handlers", ())]
            waiting += [inner for part in parts for inner in part][::-1]
    return found


def _is_plain(method: ast.stmt) -> bool:
    """Whether a function in a class is called without an instance."""
    if not isinstance(method, ast.FunctionDef) or method.decorator_list:
        return False
    return [argument.arg for argument in method.args.args[:1]] != ["self"]


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
