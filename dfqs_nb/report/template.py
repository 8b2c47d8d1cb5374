"""The templates of ``report/templates/``, filled in with everything escaped, and sources with their links."""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dfqs_nb.core import display
from dfqs_nb.core.paths import public_address
from dfqs_nb.core.stage import NOTEBOOKS
from dfqs_nb.report.spec import claims_spec


@lru_cache(maxsize=2)
def _environment(is_html: bool) -> Environment:
    """Jinja in which everything is escaped: as HTML, or as Markdown."""

    def escaped(value: Any) -> Any:
        if isinstance(value, Markup):
            return value
        text = value if isinstance(value, str) else display.cell(value)
        return display.plain(text) if is_html else display.markdown(text)

    made = Environment(
        loader=PackageLoader("dfqs_nb.report"),
        autoescape=is_html,
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "linked": partial(linked, is_html=is_html),
        "table": lambda frame: Markup(display.markdown_table(frame.map(display.cell))),
        "slug": lambda title: re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"),  # as hubs make anchors
    }
    return made


def render(name: str, **values: Any) -> str:
    """A template of ``report/templates/``, filled in; whatever stands in it is escaped."""
    return _environment(name.endswith(".html")).get_template(name).render(**values)


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
    spec, own = claims_spec(), f"{public_address()}/blob/main"
    named = {document.called: document.address for document in spec.documents.values() if document.called}
    named |= {f"notebook {file[:2]}": f"{own}/notebooks/{file}" for file in NOTEBOOKS.values()}
    named |= {"data/models.toml": f"{own}/data/models.toml", **spec.links}
    forms = [*LINKS, *((rf"\b{re.escape(name)}\b", address) for name, address in named.items())]
    text, made, at = display.plain(text), "", 0
    places = [(*it.span(), it.expand(to)) for form, to in forms for it in re.finditer(form, text)]

    def escaped(part: str) -> str:
        inner = str(escape(part.strip())) if is_html else display.markdown(part)
        return part[: len(part) - len(part.lstrip())] + inner + part[len(part.rstrip()) :] * bool(inner)

    for start, end, address in sorted(places):
        if start >= at:
            words = escaped(text[start:end])
            link = f'<a href="{address}">{words}</a>' if is_html else f"[{words}]({address})"
            made, at = f"{made}{escaped(text[at:start])}{link}", end
    return Markup(made + escaped(text[at:]))
