"""Fill in the templates of recipes: jinja, with each value quoted as the file's kind needs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.paths import data_dir
from dfqs_nb.serve.targets import DeployError, shared, targets

if TYPE_CHECKING:
    import jinja2


class Ready(str):
    """A text that is quoted already."""


@cache
def _environment(quote: Callable[[Any], str], folder: Path) -> jinja2.Environment:
    """Jinja that puts each value through ``quote``; a name that has no value is an error."""
    import jinja2

    parts = {name: text for name, text in shared().items() if isinstance(text, str)}
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.DictLoader(parts), jinja2.FileSystemLoader(folder)]),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Ready) else quote(value),
        trim_blocks=True,
        keep_trailing_newline=True,
    )  # autoescape is for HTML: `finalize` quotes for each kind of file


def filled(text: str, values: Mapping[str, Any], quote: Callable[[Any], str]) -> str:
    """A template with its values, each put through ``quote``."""
    return _environment(quote, data_dir() / "deploy" / "templates").from_string(text).render(values)


def commands(templates: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Shell commands, each value quoted for the shell."""
    return [filled(text, values, _for_shell) for text in templates]


def _for_shell(value: Any) -> str:
    return shlex.join(value) if isinstance(value, list) else shlex.quote(str(value))


def _for_json(value: Any) -> str:
    r"""A literal of JSON, which is one of YAML and of Python too: YAML reads some characters as line ends.

    >>> print(_for_json("a" + chr(0x2028)))
    "a\u2028"
    """
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029\ufeff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _for_compose(value: Any) -> str:
    return _for_json(value).replace("$", "$$")


def _for_powershell(value: Any) -> str:
    r"""A literal of PowerShell, for which typographic quotes end a string as plain ones do.

    >>> print(_for_powershell("it's Ann\u2019s"))
    'it''s Ann’’s'
    """
    doubled = re.sub("['\u2018\u2019\u201a\u201b]", r"\g<0>\g<0>", str(value))
    return str(value) if isinstance(value, int) else f"'{doubled}'"


def _for_modelfile(value: Any) -> str:
    """A value of a Modelfile, which ends with its line.

    Raises:
        DeployError: it has a line break, or blanks around it.
    """
    text = str(value)
    if text != " ".join(text.splitlines()).strip() or not text.isprintable():
        hint = "rename the folder or the file"
        raise DeployError(f"a Modelfile cannot name {text!r}", hint=hint)
    return text


KINDS = {"Modelfile": _for_modelfile, "compose.yaml": _for_compose, ".ps1": _for_powershell}
KINDS |= dict.fromkeys((".json", ".yaml", ".yml", ".py", ".ipynb"), _for_json)


def file_text(template: str, name: str, values: Mapping[str, Any]) -> str:
    """The text of one file of the recipe."""
    text = (data_dir() / "deploy" / "templates" / template).read_text(encoding="utf-8")
    quote = KINDS.get(name) or KINDS.get(PurePosixPath(name).suffix) or str
    written = filled(text, values, quote)
    if name.endswith(".ps1") and not written.isascii():
        return "\ufeff" + written  # without it Windows PowerShell reads another encoding
    return _notebook(written) if name.endswith(".ipynb") else written


def _notebook(text: str) -> str:
    """A notebook of a Python file whose cells begin with ``# %%``."""
    import nbformat

    cells = []
    for number, part in enumerate(re.split(r"^# %%", text, flags=re.MULTILINE)[1:]):
        kind, _, body = part.partition("\n")
        prose = "markdown" in kind
        body = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if prose else body
        make: Any = nbformat.v4.new_markdown_cell if prose else nbformat.v4.new_code_cell
        cells.append(make(body.strip("\n"), id=f"cell-{number}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    written: str = nbformat.writes(book)
    return written + "\n"


def table_text() -> str:
    """``data/deploy/README.md``: what is known of every target, as Markdown."""
    return filled("{% include 'README.md' %}", {"targets": list(targets().values())}, str)
