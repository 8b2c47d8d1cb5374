"""The verdict on a run: six questions that a stranger would ask, each with its answer and its caveat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from dfqs_nb.core.display import plain, size
from dfqs_nb.report.metrics import BOUNDARY, CURVE, SCORES, SPEED, boundary_flags, boundary_sentence
from dfqs_nb.report.requirements import MET, NOT_MET, NOT_TESTED, counts
from dfqs_nb.report.template import render

YES, NO, PARTLY, UNKNOWN = "yes", "no", "in part", "unknown"
SYMBOLS = {YES: "✓", NO: "✗", PARTLY: "~", UNKNOWN: "?"}
FEW_QUESTIONS = 10  # a score of fewer is no cross
OF_VERDICT = {MET: YES, NOT_MET: NO, NOT_TESTED: UNKNOWN}


@dataclass(frozen=True)
class Line:
    """One question: ``mark`` is one of `SYMBOLS`; ``answer`` has its interval, ``caveat`` what limits it.

    ``section`` of the report has the evidence.
    """

    mark: str
    question: str
    answer: str
    caveat: str
    section: str = "metrics"

    @property
    def symbol(self) -> str:
        """The mark as one character."""
        return SYMBOLS[self.mark]


@dataclass(frozen=True, repr=False)
class Verdict:
    """The lines of a report's verdict, in order."""

    title: str
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        """The verdict for a terminal, or as the summary of a stage."""
        return "\n".join([self.title, *self.summary])

    __repr__ = __str__

    @property
    def summary(self) -> list[str]:
        """A sentence for each line."""
        sentences = (f"{line.symbol} {line.question} {line.answer}. {line.caveat}" for line in self.lines)
        return [plain(text.rstrip()) for text in sentences]

    def _repr_markdown_(self) -> str:
        return render("verdict.md", verdict=self)


def verdict(report: Mapping[str, Any]) -> Verdict:
    """The verdict on a report that `read_report` or `build_report` gave."""
    rows, details = {row["id"]: row for row in report["conformance"]}, report["details"]
    lines = [
        _sound(report["model"], *_of(rows, "single-file")),
        _runs(details[SPEED], *_of(rows, "cpu-constrained")),
        _routing(report["routing"], *_of(rows, "routing-deterministic")),
        _context(details[CURVE], details[BOUNDARY]),
        _scores(details, report["tier"]),
        _demands(report["conformance"]),
    ]
    shown = (replace(line, answer=_begun(line.answer), caveat=_begun(line.caveat)) for line in lines)
    name = plain(report["model"]["name"])
    return Verdict(f"{name}, {report['specification']}, {report['tier']} tier", tuple(shown))


def _begun(text: str) -> str:
    return text[:1].upper() + text[1:]


def _of(rows: Mapping[str, Mapping[str, Any]], name: str) -> tuple[str, str]:
    """The mark and the evidence of a requirement."""
    row = rows.get(name, {"verdict": NOT_TESTED, "evidence": "not judged in this report"})
    return OF_VERDICT[row["verdict"]], row["evidence"]


def _sound(model: Mapping[str, Any], mark: str, evidence: str) -> Line:
    bits = f"{size(model['size_bytes'])}; its tensors take {model['bits_per_weight']:.3g} bits a weight"
    caveat = f"{bits}. How well it answers is another question"
    return Line(mark, "Is the file sound?", evidence, caveat, "requirements")


def _runs(speed: Mapping[str, Any], mark: str, evidence: str) -> Line:
    question = "Does it run here, and how fast?"
    if speed["withheld"]:
        return Line(mark, question, evidence, f"speed withheld: {speed['withheld']}")
    rates = [speed[key] for key in ("value", "low", "high")]
    value, low, high = (f"{rate:,.0f}" if rate >= 100 else f"{rate:,.3g}" for rate in rates)
    n = speed["n"]
    spread = f"median; lowest to highest of {n} repetitions: {low} to {high}" if n > 1 else "one repetition"
    answer = f"{value} tokens/s on the CPU at depth {speed['depth']:,} ({spread})"
    if not speed["contended"]:
        return Line(mark, question, answer, evidence)
    caveat = f"Contended: other work ran meanwhile and may have slowed it. {_begun(evidence)}"
    return Line(PARTLY if mark == YES else mark, question, answer, caveat)


def _routing(routing: Mapping[str, Any] | None, mark: str, evidence: str) -> Line:
    caveat = "Alone in its batch. Beside other sequences, in another batch size or build it may differ"
    if (routing or {}).get("load_passed") is not None:
        elsewhere = "with other settings, in another build or on another machine choices can differ"
        caveat = f"Measured on few texts; {elsewhere}"
    caveat = "" if mark == UNKNOWN else caveat
    return Line(mark, "Is routing deterministic?", evidence, caveat, "requirements")


def _context(curve: Mapping[str, Any], boundary: Mapping[str, Any]) -> Line:
    question = "How far does the context carry?"
    if boundary["withheld"]:
        return Line(UNKNOWN, question, f"withheld: {boundary['withheld']}", "")
    held = boundary.get("right_censored") and not boundary.get("provisional")
    mark = NO if boundary["status"] == "floor" else YES if held else PARTLY
    keys = f"among {curve['n_keys']} keys" if curve.get("n_keys") else "of keys"
    longest = max(curve.get("lengths") or [0])
    texts = f"at least {boundary['n_haystacks']} texts a length"
    measured = f"Retrieval {keys} in {texts}, measured up to {longest:,} tokens"
    if boundary["status"] != "floor" and None in (boundary["low"], boundary["high"]):
        measured += "; an open end of the interval lies beyond the lengths measured"
    answer = boundary_sentence({**boundary, "provisional": False, "not_monotone": False})
    return Line(mark, question, answer, "; ".join([measured, *boundary_flags(boundary)]))


def _scores(details: Mapping[str, Any], tier: str) -> Line:
    parts, caveats, marks = [], [], set()
    for name in SCORES:
        score, kind = details[name], name.removesuffix("_score")
        if score["withheld"]:
            parts.append(f"{kind} withheld ({score['withheld']})")
            marks.add(UNKNOWN)
            continue
        guess, n, cut = score["guess_rate"], score["n"], score.get("truncated")
        parts.append(f"{kind} {score['value']:.2f} ({score['low']:.2f} to {score['high']:.2f}, n = {n})")
        marks.add(YES if score["low"] > guess else NO if n >= FEW_QUESTIONS else UNKNOWN)
        caveats.append(
            f"{score['set']}: guessing gives {guess:.2f}"
            + (f", {cut} of {n} truncated" if cut else "")
            + (f", too few questions to tell ({n})" if n < FEW_QUESTIONS else "")
        )
    mark = marks.pop() if len(marks) == 1 else PARTLY if YES in marks else NO
    small = ". The nano sets show that the workbook works; they are no measure of a large model"
    better = f"Here a tick means better than guessing. {'; '.join(caveats)}"
    caveat = f"{better}{small if tier == 'nano' else ''}" if caveats else ""
    return Line(mark, "What does it score?", "; ".join(parts), caveat)


def _demands(rows: Sequence[Mapping[str, Any]]) -> Line:
    question = "Which demands of DFQS are met?"
    binding = {row["verdict"] for row in rows if row["level"] in ("SHALL", "MUST", "condition")}
    if not binding:
        return Line(UNKNOWN, question, "none was judged", "", "requirements")
    mark = NO if NOT_MET in binding else YES if binding == {MET} else PARTLY
    others = [
        f'"{row["requirement"].rstrip(".")}": {row["verdict"]}' for row in rows if row["verdict"] != MET
    ]
    rest = f"The others: {'; '.join(others)}" if others else "Every one is met"
    return Line(mark, question, counts(pd.DataFrame(rows)), rest, "requirements")
