"""The prose of the report: tables of ``data/spec/``, templates with everything escaped, links to sources."""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Mapping
from functools import lru_cache, partial
from itertools import count
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dfqs_nb.core import display
from dfqs_nb.core.display import counted
from dfqs_nb.core.errors import RegistryError
from dfqs_nb.core.paths import data_dir, public_address, tilde
from dfqs_nb.core.stage import NOTEBOOKS
from dfqs_nb.report.reading import rerun

GB = 10**9  # the documents write GB; so are their figures read here
# The fields of an entry of claims.toml where it has none of its own.
UNSTATED: dict[str, Any] = {
    **{"fact": "stated", "test": "equals", "yes": "confirmed", "no": "contradicted"},
    **dict.fromkeys(("unit", "verdict", "found", "evidence"), ""),
    **dict.fromkeys(("value", "tolerance", "limit")),
}
FEW_TEXTS = 12  # below, a boundary is provisional
FEW_QUESTIONS = 12  # a score of fewer is no cross, and does not go to the hub


def link(document: Mapping[str, Any], section: str) -> str:
    """The address of a document's section, or of the document where the section has no anchor."""
    anchor = document.get("sections", {}).get(section)
    return f"{document['address']}#{anchor}" if anchor else str(document["address"])


class _Words(string.Formatter):
    def format_field(self, value: Any, form: str) -> str:
        if value is None:
            return "not measured" if form.endswith("f") else "unknown"
        return str(super().format_field(value, form))


def filled(form: str, values: Mapping[str, Any]) -> str:
    """A sentence of the two tables with its values; what is not known reads so.

    >>> filled("{n:,} bytes, {share:.0%}, {speed:.2f}", {"n": 1000, "share": 0.5, "speed": None})
    '1,000 bytes, 50 %, not measured'
    """
    return percent(_Words().vformat(form, (), values))


def percent(text: str) -> str:
    """A text with a space before each percent sign of a number.

    >>> percent("8.9% of 95 %")
    '8.9 % of 95 %'
    """
    return re.sub(r"(?<=\d)%", " %", text)


def spec_table(name: str) -> dict[str, Any]:
    """A table of ``data/spec/``; a RegistryError where it is missing, or is no TOML.

    ``requirements``: the demands, the metrics with their types, the hardware envelope. ``claims``: the
    statements, each with a ``number`` in its document; facts, documents, links.

    >>> spec_table("requirements")["envelope"]["ram"]["minimum"]
    80
    """
    path = data_dir() / "spec" / f"{name}.toml"
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "restore it with `git checkout data/spec`, or set DFQS_DATA to a folder that has it"
        raise RegistryError(f"cannot be read ({error})", where=tilde(path), hint=hint) from error


@lru_cache(maxsize=4)
def _parsed(text: str) -> dict[str, Any]:
    table = tomllib.loads(text)
    counts = {name: count(1) for name in table.get("documents", {})}
    for claim in table.get("claims", []):
        number = f"{table['documents'][claim['document']]['letter']}{next(counts[claim['document']])}"
        claim |= {**UNSTATED, **claim, "number": number}
    return table


@lru_cache(maxsize=3)
def _environment(kind: str) -> Environment:
    """Jinja that escapes everything: as ``html`` or as Markdown (``md``); ``txt`` is left as it is."""
    is_html = kind == "html"

    def escaped(value: Any) -> Any:
        if isinstance(value, Markup) or kind == "txt":
            return value
        return _escaped(value if isinstance(value, str) else display.cell(value), is_html)

    made = Environment(
        loader=PackageLoader("dfqs_nb.report"),
        autoescape=is_html,
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"size": display.size, "sentence": sentence, "rerun": rerun}
    made.globals |= {"FEW_TEXTS": FEW_TEXTS, "FEW_QUESTIONS": FEW_QUESTIONS}
    made.filters |= {
        "counted": counted,
        "percent": percent,
        "begun": lambda text: text[:1].upper() + text[1:],
        "linked": partial(linked, is_html=is_html),
        "table": lambda frame: Markup(display.markdown_table(frame.map(display.cell))),
        "slug": lambda title: re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"),  # as hubs make anchors
    }
    return made


def render(name: str, **values: Any) -> str:
    """A template of ``report/templates/``, filled in; whatever stands in it is escaped."""
    return _environment(name.rpartition(".")[2]).get_template(name).render(**values)


def sentence(macro: str, *values: Any) -> str:
    """What a macro of ``sentences.txt`` makes of some values. It is not escaped yet.

    >>> sentence("interval", 350, None), sentence("bracketed", 0.5, 0.25, None, "{:.2f}")
    ('95 % interval from 350, open above', '0.50 [0.25, open]')
    """
    return str(getattr(_environment("txt").get_template("sentences.txt").module, macro)(*values))


ALONE = r"(?![\w/#.-]| ?(?:PR )?#)"  # no issue of a repository
LINKS = (
    (r"(?<![\w/.-])([\w.-]+/[\w.-]+?)(?: PR)? ?#(\d+)", r"https://github.com/\1/issues/\2"),
    (r"\barXiv:(\d{4}\.\d{4,5})", r"https://arxiv.org/abs/\1"),
    (r"(?<![\w/.-])((?:deepseek-ai|persadian|teamblobfish)/[\w.-]*\w)", r"https://huggingface.co/\1"),
    (rf"(?<![\w/.-])((?:ggml-org|imanu86|arishma108)/[\w.-]*\w){ALONE}", r"https://github.com/\1"),
)


def linked(text: str, is_html: bool) -> Any:
    """A source with links to the places and documents that it names; only addresses made here become links.

    >>> str(linked("ggml-org/llama.cpp#9613 <b>", is_html=True))
    '<a href="https://github.com/ggml-org/llama.cpp/issues/9613">ggml-org/llama.cpp#9613</a> &lt;b&gt;'
    >>> str(linked("arXiv:2404.06654 <b>", is_html=False))
    '[arXiv:2404.06654](https://arxiv.org/abs/2404.06654) &lt;b>'
    """
    spec, own = spec_table("claims"), f"{public_address()}/blob/main"
    named = {it["called"]: it["address"] for it in spec["documents"].values()}
    named |= {f"notebook {file[:2]}": f"{own}/notebooks/{file}" for file in NOTEBOOKS.values()}
    named |= {"data/models.toml": f"{own}/data/models.toml", **spec["links"]}
    forms = [*LINKS, *((rf"\b{re.escape(_escaped(name, is_html))}\b", it) for name, it in named.items())]

    def link(match: re.Match[str]) -> str:
        words = match[0]
        address = next(it.expand(to) for form, to in forms if (it := re.fullmatch(form, words)))
        return f'<a href="{address}">{words}</a>' if is_html else f"[{words}]({address})"

    return Markup(re.sub("|".join(form for form, _ in forms), link, _escaped(text, is_html)))


def _escaped(text: str, is_html: bool) -> str:
    if not is_html:
        return display.markdown(text)
    return Markup(display.CODE.sub(r"<code>\1</code>", str(escape(display.plain(text)))))
