"""What DFQS 1.0 demands and what the documents state: the two tables of ``data/spec/``, as TOML has them."""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from itertools import count
from typing import Any

from dfqs_nb.core.errors import RegistryError
from dfqs_nb.core.paths import data_dir, tilde

GB, GIB = 10**9, 2**30  # the documents write GB; so are their figures read here
CONFIRMED, IN_PART, CONTRADICTED = "confirmed", "confirmed in part", "contradicted"
CONTRADICTS_ITSELF = "contradicts itself"
NOT_TESTABLE, NOT_CHECKABLE = "not testable here", "not checkable"
CLAIM_VERDICTS = (CONFIRMED, IN_PART, CONTRADICTED, CONTRADICTS_ITSELF, NOT_TESTABLE, NOT_CHECKABLE)
Claim = Mapping[str, Any]  # an entry of claims.toml with these fields where it has none of its own
UNSTATED = {"fact": "stated", "test": "equals", "yes": CONFIRMED, "no": CONTRADICTED}
UNSTATED |= dict.fromkeys(("unit", "verdict", "found", "evidence"), "")
FIGURES = ("value", "tolerance", "limit")  # of a claim, None where it states none
REQUIRED = {  # of an entry; a claim may have those above, too
    "requirements": "id level text source how check notebook evidence".split(),
    "claims": "id document section text source".split(),
}


def agrees(claim: Claim, measured: float) -> bool:
    """Whether a number agrees with a figure: within its tolerance, or one unit of its last digit.

    >>> [agrees({"value": 61.6, "tolerance": None}, measured) for measured in (61.54, 61.4)]
    [True, False]
    """
    value, tolerance = claim["value"], claim["tolerance"]
    if tolerance is not None:
        return bool(abs(measured - value) <= tolerance * value)
    return bool(abs(measured - value) < 10.0 ** int(Decimal(str(value)).as_tuple().exponent))


def link(document: Mapping[str, Any], section: str) -> str:
    """The address of a document's section, or of the document where the section has no anchor."""
    anchor = document.get("sections", {}).get(section)
    return f"{document['address']}#{anchor}" if anchor else str(document["address"])


def figure(value: Any, unit: str = "") -> str:
    """A figure as people read it.

    >>> figure(1048576, "tokens"), figure([0.2, 0.5], "tokens/s"), figure(68, "%")
    ('1,048,576 tokens', '0.2 to 0.5 tokens/s', '68 %')
    """
    ends = value if isinstance(value, list) else [value]
    shown = [f"{end:,}" if isinstance(end, int | float) else str(end) for end in ends]
    return f"{' to '.join(shown)} {unit}".strip()


class _Words(string.Formatter):
    def format_field(self, value: Any, form: str) -> str:
        if value is None:
            return "not measured" if form.endswith("f") else "unknown"
        return str(super().format_field(value, form))


def spaced(text: str) -> str:
    """A text with a space before each sign of per cent, as the whole report has it.

    >>> spaced("7.2% of batches, 95 % interval")
    '7.2 % of batches, 95 % interval'
    """
    return re.sub(r"(?<=\d)%", " %", text)


def filled(form: str, values: Mapping[str, Any]) -> str:
    """A sentence of the two tables with its values; what is not known reads so.

    >>> filled("{n:,} bytes, {share:.0%}, {speed:.2f}", {"n": 1000, "share": 0.5, "speed": None})
    '1,000 bytes, 50 %, not measured'
    """
    return spaced(_Words().vformat(form, (), values))


def requirements_spec() -> dict[str, Any]:
    """``requirements.toml``: the demands, the metrics with their types, the hardware envelope.

    A RegistryError where the table is missing, or an entry has a field too many or too few.

    >>> requirements_spec()["envelope"]["ram"]["minimum"]
    80
    """
    return _table("requirements")


def claims_spec() -> dict[str, Any]:
    """``claims.toml``: the statements, each with a ``number`` in its document; facts, documents, links.

    Raises as `requirements_spec` does.
    """
    return _table("claims")


def _table(name: str) -> dict[str, Any]:
    path = data_dir() / "spec" / f"{name}.toml"
    try:
        return _parsed(name, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "restore it with `git checkout data/spec`, or set DFQS_DATA to a folder that has it"
        raise RegistryError(f"cannot be read ({error})", where=tilde(path), hint=hint) from error


@lru_cache(maxsize=4)
def _parsed(name: str, text: str) -> dict[str, Any]:
    table = tomllib.loads(text)
    known = {*REQUIRED[name], *((*UNSTATED, *FIGURES) if name == "claims" else ())}
    for entry in table.get(name, []):
        if wrong := ({*entry} - known) | ({*REQUIRED[name]} - {*entry}):
            raise ValueError(f"{entry.get('id', 'an entry')}: unknown or missing {', '.join(sorted(wrong))}")
    if name == "claims":
        letters = {document: it["letter"] for document, it in table["documents"].items()}
        counts = {letter: count(1) for letter in letters.values()}
        for claim in table["claims"]:
            letter = letters[claim["document"]]
            figures = dict.fromkeys(FIGURES)
            claim |= {**UNSTATED, **figures, **claim, "number": f"{letter}{next(counts[letter])}"}
    else:
        for key, rows in table["envelope"].items():
            if isinstance(rows, dict) and all(map(str.isdigit, rows)):  # contexts, which TOML reads as text
                table["envelope"][key] = {int(n_ctx): row for n_ctx, row in rows.items()}
    return table
