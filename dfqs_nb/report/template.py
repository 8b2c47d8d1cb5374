"""The templates of ``report/templates/``, filled in with everything escaped, and sources with their links."""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dfqs_nb.core import display
from dfqs_nb.core.display import counted
from dfqs_nb.core.paths import public_address
from dfqs_nb.core.stage import NOTEBOOKS
from dfqs_nb.report.reading import rerun
from dfqs_nb.report.spec import CLAIM_VERDICTS, spec_table

FEW_TEXTS = 12  # below, a boundary is provisional
FEW_QUESTIONS = 12  # a score of fewer is no cross, and does not go to the hub


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
    made.globals |= {"FEW_TEXTS": FEW_TEXTS, "FEW_QUESTIONS": FEW_QUESTIONS, "CLAIM_VERDICTS": CLAIM_VERDICTS}
    made.filters |= {
        "counted": counted,
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
