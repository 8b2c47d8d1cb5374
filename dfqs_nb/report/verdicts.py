"""The verdict on a run: six questions that a stranger would ask, each with its answer and its caveat.

The marks are decided here; ``templates/sentences.txt`` has the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dfqs_nb.core.display import plain
from dfqs_nb.report.metrics import BOUNDARY, SCORES, SPEED
from dfqs_nb.report.requirements import MET, NOT_APPLICABLE, NOT_MET, NOT_TESTED, counts
from dfqs_nb.report.template import FEW_QUESTIONS, render, sentence

YES, NO, PARTLY, UNKNOWN = "yes", "no", "in part", "unknown"
SYMBOLS = {YES: "✓", NO: "✗", PARTLY: "~", UNKNOWN: "?", NOT_APPLICABLE: "–"}
MARKS = {MET: YES, NOT_MET: NO, NOT_TESTED: UNKNOWN, NOT_APPLICABLE: NOT_APPLICABLE}  # of a requirement
QUESTIONS = {  # by the macro that answers them: the question, and the section that has the evidence
    "sound": ("Is the file sound?", "requirements"),
    "runs": ("Does it run here, and how fast?", "metrics"),
    "routing": ("Is routing deterministic?", "requirements"),
    "context": ("How far does the context carry?", "metrics"),
    "scores": ("What does it score?", "metrics"),
    "demands": ("Which demands of DFQS are met?", "requirements"),
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
    unknown = {"verdict": NOT_TESTED, "evidence": "not judged in this report"}
    sound, runs, routing = (
        rows.get(name, unknown) for name in ("single-file", "cpu-constrained", "routing-deterministic")
    )
    speed = details[SPEED]
    is_slowed = MARKS[runs["verdict"]] == YES and not speed["withheld"] and speed["contended"]
    answers = {
        "sound": (MARKS[sound["verdict"]], sound["evidence"]),
        "runs": (PARTLY if is_slowed else MARKS[runs["verdict"]], runs["evidence"]),
        "routing": (MARKS[routing["verdict"]], routing["evidence"]),
        "context": (_carries(details[BOUNDARY]), ""),
        "scores": (_scores(details), ""),
        "demands": (_demands(report["conformance"]), counts(pd.DataFrame(report["conformance"]))),
    }
    lines = []
    for name, (question, section) in QUESTIONS.items():
        mark, evidence = answers[name]
        answer, _, caveat = sentence(name, report, evidence).partition("\n")
        begun = (text[:1].upper() + text[1:] for text in (answer, caveat))
        lines.append(Line(mark, question, *begun, section))
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


def _demands(rows: Sequence[Mapping[str, Any]]) -> str:
    binding = {row["verdict"] for row in rows if row["level"] in ("SHALL", "MUST", "condition")}
    binding -= {NOT_APPLICABLE}
    if not binding:
        return UNKNOWN
    return NO if NOT_MET in binding else YES if binding == {MET} else PARTLY
