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
UNSTATED: Claim = {
    **{"fact": "stated", "test": "equals", "yes": CONFIRMED, "no": CONTRADICTED},
    **dict.fromkeys(("unit", "verdict", "found", "evidence"), ""),
    **dict.fromkeys(("value", "tolerance", "limit")),
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


def filled(form: str, values: Mapping[str, Any]) -> str:
    """A sentence of the two tables with its values; what is not known reads so.

    >>> filled("{n:,} bytes, {share:.0%}, {speed:.2f}", {"n": 1000, "share": 0.5, "speed": None})
    '1,000 bytes, 50 %, not measured'
    """
    return re.sub(r"(?<=\d)%", " %", _Words().vformat(form, (), values))


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
