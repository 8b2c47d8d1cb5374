"""The verdict on a run: six questions that a stranger would ask, each with its answer and its caveat.

The marks are decided here; ``templates/sentences.txt`` has the words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfqs_nb.core.display import plain
from dfqs_nb.report.metrics import BOUNDARY, SCORES, SPEED
from dfqs_nb.report.requirements import MET, NOT_APPLICABLE, NOT_MET, NOT_TESTED
from dfqs_nb.report.template import FEW_QUESTIONS, render, sentence

YES, NO, PARTLY, UNKNOWN = "yes", "no", "in part", "unknown"
SYMBOLS = {YES: "✓", NO: "✗", PARTLY: "~", UNKNOWN: "?", NOT_APPLICABLE: "–"}
MARKS = {MET: YES, NOT_MET: NO, NOT_TESTED: UNKNOWN, NOT_APPLICABLE: NOT_APPLICABLE}  # of a requirement
# By the macro that answers it: the question, the section that has the evidence, and the demand that decides.
QUESTIONS = {
    "sound": ("Is the file sound?", "requirements", "single-file"),
    "runs": ("Does it run here, and how fast?", "metrics", "cpu-constrained"),
    "routing": ("Is routing deterministic?", "requirements", "routing-deterministic"),
    "context": ("How far does the context carry?", "metrics", ""),
    "scores": ("What does it score?", "metrics", ""),
    "demands": ("Which demands of DFQS are met?", "requirements", ""),
}


@dataclass(frozen=True)
class Line:
    """One question: ``mark`` is one of `SYMBOLS`, and ``section`` of the report has the evidence."""

    mark: str
    question: str
    answer: str
    caveat: str
    section: str

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
    speed, lines = details[SPEED], []
    marks = {"context": _carries(details[BOUNDARY]), "scores": _scores(details), "demands": _demands(rows)}
    for name, (question, section, demand) in QUESTIONS.items():
        row = rows.get(demand, {"verdict": NOT_TESTED, "evidence": "not judged in this report"})
        mark = marks.get(name, MARKS[row["verdict"]])
        if name == "runs" and mark == YES and not speed["withheld"] and speed["contended"]:
            mark = PARTLY
        answer, _, caveat = sentence(name, report, row["evidence"]).partition("\n")
        answer, caveat = (text[:1].upper() + text[1:] for text in (answer, caveat))
        lines.append(Line(mark, question, answer, caveat, section))
    name = plain(report["model"]["name"])
    return Verdict(f"{name}, {report['specification']}, {report['tier']} tier", tuple(lines))


def _carries(boundary: Mapping[str, Any]) -> str:
    if boundary["withheld"]:
        return UNKNOWN
    held = boundary.get("right_censored") and not boundary.get("provisional")
    return NO if boundary["status"] == "floor" else YES if held else PARTLY


def _scores(details: Mapping[str, Any]) -> str:
    """A tick means better than guessing; few questions give no cross."""
    marks = set()
    for score in (details[name] for name in SCORES):
        if score["withheld"]:
            marks.add(UNKNOWN)
        elif score["low"] > score["guess_rate"]:
            marks.add(YES)
        else:
            marks.add(NO if score["n"] >= FEW_QUESTIONS else UNKNOWN)
    return marks.pop() if len(marks) == 1 else PARTLY if YES in marks else NO


def _demands(rows: Mapping[str, Mapping[str, Any]]) -> str:
    binding = {row["verdict"] for row in rows.values() if row["level"] in ("SHALL", "MUST", "condition")}
    binding -= {NOT_APPLICABLE}
    if not binding:
        return UNKNOWN
    return NO if NOT_MET in binding else YES if binding == {MET} else PARTLY
