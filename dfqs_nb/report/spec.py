"""What DFQS 1.0 demands and what the documents state: the two tables of ``data/spec/``, typed."""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from itertools import count
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dfqs_nb.core.errors import RegistryError
from dfqs_nb.core.paths import data_dir, tilde

GB, GIB = 10**9, 2**30  # the documents write GB; so are their figures read here
CONFIRMED, IN_PART, CONTRADICTED = "confirmed", "confirmed in part", "contradicted"
CONTRADICTS_ITSELF = "contradicts itself"
NOT_TESTABLE, NOT_CHECKABLE = "not testable here", "not checkable"
CLAIM_VERDICTS = (CONFIRMED, IN_PART, CONTRADICTED, CONTRADICTS_ITSELF, NOT_TESTABLE, NOT_CHECKABLE)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Requirement(_Entry):
    """One demand: ``level`` as the text says; ``evidence`` has a sentence for each case of its check."""

    id: str
    level: Literal["SHALL", "MUST", "SHOULD", "MAY", "condition"]
    text: str
    source: str
    how: str
    check: str
    notebook: str
    evidence: dict[str, str]


class Compute(_Entry):
    """Compute buffer in bytes, without and with flash attention."""

    plain: int
    flash: int


class Envelope(_Entry):
    """The table of hardware in GB, and what llama.cpp plans for the published shapes by context in tokens."""

    source: str
    ram: dict[str, float]
    vram: dict[str, float]
    published_compute: dict[int, Compute]
    gpu_compute: dict[int, int]
    gpu_logs: dict[Literal["context", "least", "most"], int]
    gpu_source: str
    assumptions: list[str]
    buffers: dict[str, str]


class Requirements(_Entry):
    """``data/spec/requirements.toml``."""

    requirements: list[Requirement]
    metrics: dict[str, Literal["float", "int", "list[float]"]]
    envelope: Envelope


class Fact(_Entry):
    """What statements are held against; ``found`` and ``evidence`` are formats with facts for fields."""

    how: str
    found: str = ""
    evidence: str = ""


class Claim(_Entry):
    """One statement: see ``data/spec/claims.toml``. ``tolerance`` is a share of the figure."""

    id: str
    document: str
    section: str
    text: str
    source: str
    fact: str = "stated"
    test: str = "equals"
    value: Any = None
    unit: str = ""
    tolerance: float | None = None
    limit: float | None = None
    yes: str = CONFIRMED
    no: str = CONTRADICTED
    verdict: str = ""
    found: str = ""
    evidence: str = ""
    number: str = ""

    def agrees(self, measured: float) -> bool:
        """Whether a number agrees with the figure: within its tolerance, or one unit of its last digit.

        >>> claim = Claim(id="x", document="", section="", text="", source="", value=61.6)
        >>> [claim.agrees(measured) for measured in (61.54, 61.4)]
        [True, False]
        """
        if self.tolerance is not None:
            return bool(abs(measured - self.value) <= self.tolerance * self.value)
        return bool(abs(measured - self.value) < 10.0 ** int(Decimal(str(self.value)).as_tuple().exponent))


class Published(_Entry):
    """What others published about the artifact and its model."""

    keys: dict[str, int]
    native_bytes: int
    parameters: int
    active_parameters: int
    routed_parameters: int
    independent_sha256: str
    independent_tensors: int
    all_tensors: int


class Document(_Entry):
    """A document: the letter of its numbers, where it is, its sections' anchors, how sources call it."""

    letter: str
    source: str
    address: str
    called: str = ""
    sections: dict[str, str] = {}

    def link(self, section: str) -> str:
        """The address of a section, or of the document where it has no anchor."""
        anchor = self.sections.get(section)
        return f"{self.address}#{anchor}" if anchor else self.address


class Claims(_Entry):
    """``data/spec/claims.toml``; ``links`` has the addresses of sources that are no repository, by name."""

    as_gib: str
    links: dict[str, str]
    documents: dict[str, Document]
    published: Published
    facts: dict[str, Fact]
    claims: list[Claim]

    def numbered(self) -> list[Claim]:
        """The statements, numbered in the order of each document: C1, C2, ..., D1, ..."""
        counts = {name: count(1) for name in self.documents}
        numbers = (f"{self.documents[it.document].letter}{next(counts[it.document])}" for it in self.claims)
        return [a.model_copy(update={"number": n}) for a, n in zip(self.claims, numbers, strict=True)]


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


def requirements_spec() -> Requirements:
    """The demands; a RegistryError where the table is missing, or has a field of another name or type.

    >>> requirements_spec().envelope.ram["minimum"]
    80.0
    """
    return _table("requirements", Requirements)


def claims_spec() -> Claims:
    """The statements; raises as `requirements_spec` does."""
    return _table("claims", Claims)


T = TypeVar("T", Requirements, Claims)
_read = lru_cache(maxsize=4)(lambda kind, text: kind.model_validate(tomllib.loads(text)))


def _table(name: str, kind: type[T]) -> T:
    path = data_dir() / "spec" / f"{name}.toml"
    try:
        table: T = _read(kind, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        hint = "restore it with `git checkout data/spec`, or set DFQS_DATA to a folder that has it"
        raise RegistryError(f"cannot be read ({reason})", where=tilde(path), hint=hint) from error
    return table
