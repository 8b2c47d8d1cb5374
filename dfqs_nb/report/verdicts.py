"""The verdict on a run: six questions that a stranger would ask, each with its answer and its caveat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dfqs_nb.core.display import plain, size
from dfqs_nb.report.metrics import boundary_flags, boundary_sentence
from dfqs_nb.report.requirements import MET, NOT_MET, NOT_TESTED

YES, NO, PARTLY, UNKNOWN = "yes", "no", "in part", "unknown"
SYMBOLS = {YES: "✓", NO: "✗", PARTLY: "~", UNKNOWN: "?"}
OF_VERDICT = {MET: YES, NOT_MET: NO, NOT_TESTED: UNKNOWN}


@dataclass(frozen=True)
class Line:
    """One question: ``mark`` is one of `SYMBOLS`; ``answer`` has its interval, ``caveat`` what limits it."""

    mark: str
    question: str
    answer: str
    caveat: str

    @property
    def symbol(self) -> str:
        """The mark as one character."""
        return SYMBOLS[self.mark]


@dataclass(frozen=True)
class Verdict:
    """The lines of a report's verdict, in order."""

    title: str
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        """The verdict for a terminal, or as the summary of a stage."""
        return "\n".join([self.title, *self.summary])

    @property
    def summary(self) -> list[str]:
        """A sentence for each line."""
        return [plain(f"{one.symbol} {one.question} {one.answer}. {one.caveat}") for one in self.lines]


def verdict(report: Mapping[str, Any]) -> Verdict:
    """The verdict on a report that `read_report` or `build_report` gave."""
    rows = {row["id"]: row for row in report["conformance"]}
    lines = [
        _sound(report, rows),
        _runs(report, rows),
        _routing(report, rows),
        _context(report),
        _scores(report),
    ]
    lines.append(_demands(report["conformance"]))
    shown = (replace(one, answer=one.answer[:1].upper() + one.answer[1:]) for one in lines)
    name = plain(report["model"]["name"])
    return Verdict(f"{name}, {report['specification']}, {report['tier']} tier", tuple(shown))


def _of(rows: Mapping[str, Mapping[str, Any]], name: str) -> tuple[str, str]:
    """The mark and the evidence of a requirement."""
    row = rows.get(name, {"verdict": NOT_TESTED, "evidence": "not judged in this report"})
    return OF_VERDICT[row["verdict"]], row["evidence"]


def _sound(report: Mapping[str, Any], rows: Mapping[str, Any]) -> Line:
    mark, evidence = _of(rows, "single-file")
    model = report["model"]
    return Line(
        mark,
        "Is the file sound?",
        evidence,
        f"{size(model['size_bytes'])}, {model['bits_per_weight']:.3g} bits a weight. Quality is judged below",
    )


def _rate(value: float) -> str:
    """Tokens a second: whole from 100 on, else three digits.

    >>> _rate(1170.8), _rate(0.4321)
    ('1,171', '0.432')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"


def _runs(report: Mapping[str, Any], rows: Mapping[str, Any]) -> Line:
    mark, evidence = _of(rows, "cpu-constrained")
    one = report["details"]["cpu_tokens_per_sec"]
    if one["withheld"]:
        return Line(mark, "Does it run here, and how fast?", evidence, f"speed withheld: {one['withheld']}")
    answer = (
        f"{_rate(one['value'])} tokens/s on the CPU at depth {one['depth']:,} ({_rate(one['low'])} to "
        f"{_rate(one['high'])} over {one['n']} repetitions)"
    )
    if one["contended"]:
        return Line(
            PARTLY if mark == YES else mark,
            "Does it run here, and how fast?",
            answer,
            f"Contended: other work slowed the machine meanwhile. {evidence}",
        )
    return Line(mark, "Does it run here, and how fast?", answer, evidence)


def _routing(report: Mapping[str, Any], rows: Mapping[str, Any]) -> Line:
    mark, evidence = _of(rows, "routing-deterministic")
    load = (report["routing"] or {}).get("load_sentence")
    return Line(
        mark,
        "Is routing deterministic?",
        evidence,
        load or "Alone in its batch. Beside other sequences, in another batch size or build it may differ",
    )


def _context(report: Mapping[str, Any]) -> Line:
    question = "How far does the context carry?"
    one = report["details"]["failure_boundary_tokens"]
    if one["withheld"]:
        return Line(UNKNOWN, question, f"withheld: {one['withheld']}", "")
    mark = NO if one.get("status") == "floor" else YES if one.get("right_censored") else PARTLY
    curve = report["details"]["context_stability_curve"]
    keys = f"among {curve['n_keys']} keys" if curve.get("n_keys") else "of keys"
    flags = "; ".join(boundary_flags(one))
    longest = max(curve.get("lengths") or [0])
    caveat = f"Retrieval {keys} in {one.get('n_haystacks', 0)} texts, measured up to {longest:,} tokens"
    return Line(mark, question, boundary_sentence({**one, "provisional": False, "not_monotone": False}),
                f"{caveat}; {flags}" if flags else caveat)  # fmt: skip


def _scores(report: Mapping[str, Any]) -> Line:
    parts, marks, caveats = [], [], []
    for name in ("reasoning_score", "code_score"):
        one, kind = report["details"][name], name.removesuffix("_score")
        if one["withheld"]:
            parts.append(f"{kind} withheld ({one['withheld']})")
            marks.append(UNKNOWN)
            continue
        parts.append(f"{kind} {one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f}, n = {one['n']})")
        marks.append(YES if one["low"] > (one["guess_rate"] or 0) else NO)
        cut = one.get("counts", {}).get("truncated", 0)
        truncated = f", {cut} of {one['n']} truncated" if cut else ""
        caveats.append(f"{one['set']}: guessing gives {one['guess_rate'] or 0:.2f}{truncated}")
    mark = (
        YES if set(marks) == {YES} else UNKNOWN if set(marks) == {UNKNOWN} else PARTLY if YES in marks else NO
    )
    small = ". The nano sets show that the workbook works; they are no measure of a large model"
    caveat = "; ".join(caveats) + (small if report["tier"] == "nano" else "")
    return Line(mark, "What does it score?", "; ".join(parts), f"A tick means better than guessing. {caveat}")


def _demands(rows: Sequence[Mapping[str, Any]]) -> Line:
    import pandas as pd

    from dfqs_nb.report.requirements import counts

    binding = [row for row in rows if row["level"] in ("SHALL", "MUST", "condition")]
    open_ones = [f"{row['id']} {row['verdict']}" for row in rows if row["verdict"] != MET]
    failed = any(row["verdict"] == NOT_MET for row in binding)
    mark = NO if failed else YES if all(row["verdict"] == MET for row in binding) else PARTLY
    if not binding:
        return Line(UNKNOWN, "Which demands of DFQS are met?", "none was judged", "")
    rest = f"Not met or not tested: {', '.join(open_ones)}" if open_ones else "Nothing is open"
    return Line(mark, "Which demands of DFQS are met?", counts(pd.DataFrame(rows)), rest)
