"""The report that README shows: it follows today's schema, and its scores follow from the answers beside it."""

import re

from store_notebooks import SAMPLE

from dfqs_nb.core.paths import REPOSITORY
from dfqs_nb.report import read_report, verdict
from dfqs_nb.report.reading import read_answers

FOLDER = REPOSITORY / "docs" / "sample_report"


def test_the_sample_follows_the_schema_and_its_scores_are_counted_again():
    again = read_answers(FOLDER)
    assert set(again.scores) == {"reasoning_score", "code_score", "choice_score"} and len(again.context)


def test_the_reference_model_is_neither_lost_nor_perfect_on_the_nano_sets():
    """A set on which every answer is right, or wrong, tells no two models apart."""
    metrics = read_report(FOLDER)["metrics"]
    assert all(0.3 < metrics[name] < 0.9 for name in ("reasoning_score", "code_score"))


def test_the_pages_are_of_this_report_and_of_no_machine():
    report, page = read_report(FOLDER), (FOLDER / "report.html").read_text(encoding="utf-8")
    assert report["integrity"]["sha256"] in page
    assert all(line.question in page for line in verdict(report).lines)
    for name in SAMPLE:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.findall(r"(?<![\w.:/])/(?:tmp|home|root|Users|work|private|var)/", text), name
