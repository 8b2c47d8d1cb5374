"""The ways of running a model elsewhere, as ``data/deploy`` has them: targets, and templates of their files.

Templates are jinja; each value is quoted as the file's kind needs.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.gguf.memory import binary_size

if TYPE_CHECKING:
    import jinja2
    import pandas as pd

FACTS = ("recipe", "checked_how", "run_here", "loads_deepseek4", "split_files", "since", "limits", "source")


class DeployError(DfqsError):
    """A recipe cannot be written."""


# ---- the targets ----


class Target(BaseModel):
    """One way of running, as ``targets.toml`` has it; the comments there say what each field means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    recipe: str
    checked_how: str
    run_here: str
    loads_deepseek4: str
    split_files: str
    since: str
    limits: str
    source: list[str]
    date: str
    files: dict[str, str]
    install: list[str]
    run: list[str]
    manual: list[str] = []
    also: list[str] = []
    stop: list[str] = []
    server: int = 0
    prefix: str = ""
    served_name: str = "{{ name }}"
    single_file: bool = False
    needs_key: bool = False
    least_n_ctx: int = 0
    place: str = ""
    fetch_to: str = ""
    mount: str = ""
    amx: str = ""


@cache
def _tables(path: Path) -> tuple[dict[str, Any], dict[str, Target]]:
    """The parts that commands and notes share, and the targets by name."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        common = table.pop("common")
        return common, {name: Target(name=name, **entry) for name, entry in table.items()}
    except (OSError, ValueError, KeyError, ValidationError) as error:
        what, hint = f"cannot read the table of targets ({error})", "restore it with git, or set DFQS_DATA"
        raise DeployError(what, where=tilde(path), hint=hint) from error


def shared() -> dict[str, Any]:
    """The parts of ``[common]``, by name."""
    return _tables(data_dir() / "deploy" / "targets.toml")[0]


def targets() -> dict[str, Target]:
    """The targets by name, in the order of ``data/deploy/targets.toml``.

    >>> len(targets()), targets()["ollama"].server
    (17, 11434)
    """
    return _tables(data_dir() / "deploy" / "targets.toml")[1]


def target_of(name: str) -> Target:
    """The target of this name.

    Raises:
        DeployError: there is none; names the ones there are.
    """
    if name not in targets():
        raise DeployError(f"no target is called {name!r}", hint=f"there are {', '.join(targets())}")
    return targets()[name]


def targets_table() -> pd.DataFrame:
    """One row a target: ``target``, ``title``, then what is known of it, each a text.

    ``run_here`` is what ran, with its version, or "generated, not run".
    """
    import pandas as pd

    table = pd.DataFrame([target.model_dump() for target in targets().values()])
    table = table.rename(columns={"name": "target"})[["target", "title", *FACTS]]
    table["source"] = table["source"].map(" ".join)
    return table.replace({"run_here": {"": "generated, not run"}})


def list_text() -> str:
    """The targets, one a line: name, title, and what ran here."""
    rows = targets_table().itertuples()
    return "".join(f"{row.target:<22}{row.title:<24}{row.run_here}\n" for row in rows)


def table_text() -> str:
    """``data/deploy/README.md``: what is known of every target, as Markdown."""
    return filled("{% include 'README.md' %}", {"targets": list(targets().values())}, str)


# ---- templates: each value quoted as the file's kind needs ----


class Ready(str):
    """A text that is quoted already."""


@cache
def _environment(quote: Callable[[Any], str], folder: Path) -> jinja2.Environment:
    """Jinja that puts each value through ``quote``; a name that has no value is an error."""
    import jinja2

    parts = {name: text for name, text in shared().items() if isinstance(text, str)}
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.DictLoader(parts), jinja2.FileSystemLoader(folder)]),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Ready) else quote(value),
        trim_blocks=True,
        keep_trailing_newline=True,
    )  # autoescape is for HTML: `finalize` quotes for each kind of file
    made.filters |= {"json": json.dumps, "bytes": binary_size, "number": "{:,}".format}
    return made


def filled(text: str, values: Mapping[str, Any], quote: Callable[[Any], str]) -> str:
    """A template with its values, each put through ``quote``."""
    return _environment(quote, data_dir() / "deploy" / "templates").from_string(text).render(values)


def for_shell(value: Any) -> str:
    """One word, or several, of a shell's command."""
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
        raise DeployError(f"a Modelfile cannot name {text!r}", hint="rename the folder or the file")
    return text


QUOTES = {"Modelfile": _for_modelfile, "compose.yaml": _for_compose, ".ps1": _for_powershell}
QUOTES |= dict.fromkeys((".json", ".yaml", ".yml", ".py", ".ipynb"), _for_json)


def file_text(template: str, name: str, values: Mapping[str, Any]) -> str:
    """The text of one file of the recipe."""
    quote = QUOTES.get(name) or QUOTES.get(PurePosixPath(name).suffix) or str
    written = filled(f"{{% include {template!r} %}}", values, quote)
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
    return str(nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}))) + "\n"
