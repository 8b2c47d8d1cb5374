"""The statements of the documents about the artifact, each held against a fact or a measurement.

``data/spec/claims.toml`` has our paraphrase, the figure with its unit, the fact that it is held against, the
sentence of evidence, and where the fact was published. A statement is added there. `artifact.facts` has the
facts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.errors import RegistryError
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.report.artifact import facts
from dfqs_nb.report.spec import (
    CLAIM_VERDICTS,
    CONFIRMED,
    CONTRADICTED,
    CONTRADICTS_ITSELF,
    GB,
    GIB,
    NOT_TESTABLE,
    Claim,
    claims_spec,
    filled,
)
from dfqs_nb.report.stages import Run

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("number", "id", "document", "section", "claim", "how", "found", "verdict", "evidence", "source")
SUDDEN = 0.5  # of the ability above guessing, lost within one doubling of the context


def check_claims(
    run: Run,
    header: GGUFHeader | None = None,
    *,
    claims: Sequence[Claim] | None = None,
    ask_llama_cpp: bool = True,
) -> pd.DataFrame:
    """Check every statement about the artifact with what this run and the public record have.

    Args:
        run: an empty one checks against the public record alone.
        header: of the model that was run.
        claims: other statements than those of ``data/spec/claims.toml``.
        ask_llama_cpp: have llama.cpp (in a child process) say what it makes of two shards put end to end.

    Returns:
        One row a statement: the columns `COLUMNS`. ``found`` is the fact in short, ``verdict`` one of
        `CLAIM_VERDICTS`, ``evidence`` one sentence, ``source`` where the fact was published.

    Raises:
        RegistryError: a statement names a fact or a test that does not exist.
    """
    import pandas as pd

    known, spec = facts(run, header, ask_llama_cpp=ask_llama_cpp), claims_spec()
    rows = []
    for claim in claims if claims is not None else spec.numbered():
        if claim.fact not in spec.facts or claim.test not in TESTS:
            what = f"{claim.id}: there is no fact {claim.fact!r} with a test {claim.test!r}"
            hint = f"facts: {', '.join(spec.facts)}; tests: {', '.join(TESTS)}"
            raise RegistryError(what, where="data/spec/claims.toml", hint=hint)
        fact, value = spec.facts[claim.fact], known.get(claim.fact)
        texts, verdict = ("not measured", "{why}"), claim.verdict or NOT_TESTABLE
        if value is not None:
            texts = claim.found or fact.found, claim.evidence or fact.evidence
            verdict = claim.verdict or TESTS[claim.test](claim, value, known)
        if verdict == CONTRADICTED and _holds_in_gib(claim, value, known):
            texts, verdict = (texts[0], texts[1] + spec.as_gib), CONTRADICTS_ITSELF
        found, evidence = (filled(text, {**known, "figure": claim.figure}) for text in texts)
        stated = (claim.number, claim.id, claim.document, claim.section, claim.text)
        rows.append((*stated, fact.how, found, verdict, evidence, claim.source))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def counts(table: pd.DataFrame) -> str:
    """How many statements got each verdict, in one sentence.

    >>> import pandas as pd
    >>> counts(pd.DataFrame({"verdict": ["confirmed", "contradicted", "confirmed"]}))
    '3 statements: 2 confirmed, 1 contradicted'
    """
    seen = table["verdict"].value_counts()
    parts = ", ".join(f"{seen[word]} {word}" for word in CLAIM_VERDICTS if word in seen)
    return f"{len(table)} statements: {parts}"


# ---- how a figure is held against a fact: each test gives the verdict ----


def _holds_in_gib(claim: Claim, value: Any, known: Mapping[str, Any]) -> bool:
    """Whether a figure in GB is contradicted as such, and would not be if GiB were meant."""
    if claim.unit != "GB" or claim.verdict:
        return False
    numbers = [number * GB / GIB for number in (value if isinstance(value, list) else [value])]
    fact = numbers if isinstance(value, list) else numbers[0]
    return TESTS[claim.test](claim, fact, known) != CONTRADICTED


def _equals(claim: Claim, value: Any, known: Mapping[str, Any]) -> str:
    """The figure is the fact; of a list, one of it."""
    if isinstance(value, str) or isinstance(claim.value, bool):
        return _is(claim, value, known)
    values = value if isinstance(value, list) else [value]
    return claim.yes if any(claim.agrees(number) for number in values) else claim.no


def _is(claim: Claim, value: Any, known: Mapping[str, Any]) -> str:
    """The figure is exactly the fact."""
    return claim.yes if value == claim.value else claim.no


def _at_most(claim: Claim, value: float, known: Mapping[str, Any]) -> str:
    """The fact is no more than the figure (or than ``limit``)."""
    return claim.yes if value <= (claim.value if claim.limit is None else claim.limit) else claim.no


def _speed(claim: Claim, value: float, known: Mapping[str, Any]) -> str:
    """A range of speeds against the bound of that machine; on a CPU, against what was measured too."""
    if claim.value[0] > value:
        return CONTRADICTED
    measured = known["cpu_tokens_per_sec"] if claim.fact == "bound_cpu" else None
    if measured is None:
        return NOT_TESTABLE
    return CONFIRMED if claim.value[0] <= measured <= claim.value[-1] else CONTRADICTED


def _interval(claim: Claim, value: tuple[float, float, float], known: Mapping[str, Any]) -> str:
    """The figure lies in the measurement's 95 % interval."""
    return CONFIRMED if value[1] <= claim.value <= value[2] else CONTRADICTED


def _reaches(claim: Claim, value: Any, known: Mapping[str, Any]) -> str:
    """Retrieval carries to the context named, and that far was measured."""
    if value.right_censored:
        return CONFIRMED if (known["longest"] or 0) >= claim.value else NOT_TESTABLE
    return CONTRADICTED if value.tokens < claim.value else CONFIRMED


def _gradual(claim: Claim, value: Mapping[str, float], known: Mapping[str, Any]) -> str:
    """The largest fall per octave, by its interval, is some and less than sudden."""
    if value["low"] > SUDDEN:
        return CONTRADICTED
    return CONFIRMED if value["low"] > 0 and value["high"] < SUDDEN else NOT_TESTABLE


TESTS: dict[str, Callable[[Claim, Any, Mapping[str, Any]], str]] = {
    "equals": _equals,
    "is": _is,
    "at most": _at_most,
    "speed": _speed,
    "interval": _interval,
    "status": lambda claim, value, known: value,  # a notebook has judged it already
    "reaches": _reaches,
    "gradual": _gradual,
}
