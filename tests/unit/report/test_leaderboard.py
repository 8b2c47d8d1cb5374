"""Reports ranked: within equal conditions only, and nothing left out in silence."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil

import pandas as pd
import pytest
from nbconvert.filters.markdown_mistune import markdown2html_mistune
from report_builder import CONDITIONS, make_run, reseal

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.report import compare as boards
from dfqs_nb.report.compare import leaderboard


def other_conditions(**changes):
    conditions = json.loads(json.dumps(CONDITIONS))
    conditions["scores"] |= changes
    return conditions


def test_reports_are_ranked_by_score_and_have_their_intervals(tmp_path):
    for name, skill in (("weak", -0.2), ("strong", 0.4), ("middle", 0.1)):
        make_run(tmp_path / name, name.title(), skill=skill)
    table = leaderboard(tmp_path).table
    assert list(table["run"]) == ["strong", "middle", "weak"] and list(table["place"]) == [1, 2, 3]
    shown = re.findall(r"MB \| ([\d.]+) \[([\d.]+), ([\d.]+)\]", str(leaderboard(tmp_path)))
    assert [row[0] for row in shown] == [f"{value:.3f}" for value in table["reasoning_score"]]
    assert all(float(low) < float(value) < float(high) for value, low, high in shown)
    stated = json.loads((tmp_path / "strong" / "report.json").read_text())["metrics"]
    assert table["failure_boundary_tokens"].iloc[0] == stated["failure_boundary_tokens"]


def test_equal_scores_share_a_place(tmp_path):
    make_run(tmp_path / "b", "One", created="2026-01-01")
    make_run(tmp_path / "a", "One", created="2026-01-02")
    make_run(tmp_path / "c", "Worse", skill=-0.4)
    assert list(leaderboard(tmp_path).table["place"]) == [1, 1, 3]


def test_other_conditions_and_tiers_are_sections_of_their_own_with_places_of_their_own(tmp_path):
    make_run(tmp_path / "a", "A")
    make_run(tmp_path / "b", "B", skill=0.4, conditions=other_conditions(n_threads=8))
    make_run(tmp_path / "c", "C", tier="standard")
    make_run(tmp_path / "d", "D", skill=0.2)
    table = leaderboard(tmp_path).table
    sections = table.groupby(["tier", "conditions"], sort=False)
    assert len(sections) == 3 and table["tier"].iloc[0] == "standard"
    assert all(list(group["place"]) == list(range(1, len(group) + 1)) for _, group in sections)
    text = str(leaderboard(tmp_path))
    assert len(re.findall("^## Tier", text, re.M)) == 3
    assert text.count("Do not compare with the sections above, which are of another tier.") == 1
    assert "scores.n_threads (1 there, 8 here)" in text
    assert text.count("is no measure of a large model") == 2, "both nano sections say so"


def test_conditions_that_only_one_section_has_are_named_and_not_printed(tmp_path):
    make_run(tmp_path / "a", "A")
    for name, kept in (("b", {"long_context": CONDITIONS["long_context"]}), ("c", other_conditions(own={}))):
        make_run(tmp_path / name, name.upper(), conditions=kept)
    text = str(leaderboard(tmp_path))
    assert re.search(r"differs in scores \((given there, absent|absent there, given) here\)", text), text
    assert "scores.own (" in text or "scores (" in text
    assert "{'" not in text and max(map(len, text.splitlines())) < 600


def test_a_withheld_score_is_last_without_a_place_and_with_its_reason(tmp_path):
    make_run(tmp_path / "a", "A", skill=-0.4)
    make_run(tmp_path / "b", "B", skill=0.4, withheld={"reasoning_score": "3 of 40 items have a result"})
    table = leaderboard(tmp_path).table
    assert list(table["run"]) == ["a", "b"] and pd.isna(table["place"].iloc[1])
    text = str(leaderboard(tmp_path))
    assert "| withheld |" in text and "- b: reasoning_score withheld: 3 of 40 items have a result" in text


def test_a_report_with_everything_withheld_is_still_listed(tmp_path):
    names = (
        "reasoning_score",
        "code_score",
        "context_stability_curve",
        "failure_boundary_tokens",
        "cpu_tokens_per_sec",
    )
    make_run(tmp_path / "a", "A", withheld=dict.fromkeys(names, "not run"))
    table = leaderboard(tmp_path).table
    text = str(leaderboard(tmp_path))
    assert table["run"].tolist() == ["a"] and text.count("withheld: not run") == 5
    assert text.count("| withheld ") >= 4


def test_a_withheld_curve_beside_a_measured_one_stays_withheld_and_lengths_stay_whole(tmp_path):
    make_run(tmp_path / "a", "A")
    make_run(tmp_path / "b", "B", seed=2, withheld={"context_stability_curve": "no length was finished"})
    make_run(tmp_path / "c", "C", seed=3).joinpath("report.json").write_text("{")  # a row without numbers
    text = str(leaderboard(tmp_path))
    assert " at 1,024 |" in text and "| withheld |" in text and "nan at" not in text


def test_what_cannot_be_read_or_was_edited_is_listed_with_its_reason(tmp_path):
    make_run(tmp_path / "good", "Good")
    for name in ("edited", "torn", "empty", "foreign"):
        make_run(tmp_path / name, name.title())
    edited = tmp_path / "edited" / "report.json"
    edited.write_text(
        re.sub(r'"reasoning_score": 0\.\d+', '"reasoning_score": 0.99', edited.read_text(), count=1)
    )
    torn = tmp_path / "torn" / "report.json"
    torn.write_text(torn.read_text()[:500])
    (tmp_path / "empty" / "report.json").write_text("")
    (tmp_path / "foreign" / "report.json").write_text('{"hello": "world"}')
    table = leaderboard(tmp_path).table
    bad = table[table["problem"] != ""]
    assert list(bad["report"]) == [f"{name}/report.json" for name in ("edited", "empty", "foreign", "torn")]
    assert bad["problem"].str.len().gt(5).all() and bad["place"].isna().all()
    assert list(table[table["problem"] == ""]["run"]) == ["good"]
    text = str(leaderboard(tmp_path))
    assert all(f"- {name}: " in text for name in bad["report"])


def test_reports_in_folders_are_found_and_hidden_ones_are_not(tmp_path):
    make_run(tmp_path / "runs" / "a", "A")
    shutil.copytree(tmp_path / "runs", tmp_path / ".cache" / "runs")
    (tmp_path / "comparison.json").write_text("{}")
    assert list(leaderboard(tmp_path).table["report"]) == ["runs/a/report.json"]


def test_a_boundary_that_was_not_reached_and_a_busy_machine_are_marked(tmp_path):
    make_run(tmp_path / "holds", "Holds", flat=0.99, contended=True)
    make_run(tmp_path / "swept", "Swept", flat=0.0, contended=True)
    table = leaderboard(tmp_path).table
    text = str(leaderboard(tmp_path))
    assert table["contended"].all() and text.count("(contended)") == 2
    assert "| at least 1,024 (not reached) |" in text and "(at chance)" in text


def test_an_empty_folder_gives_an_empty_table_and_a_missing_one_an_error(tmp_path):
    table = leaderboard(tmp_path).table
    assert len(table) == 0 and list(table.columns) == list(boards.BOARD_COLUMNS)
    assert "No report counts here." in str(leaderboard(tmp_path))
    with pytest.raises(DfqsError, match="no such folder"):
        leaderboard(tmp_path / "none")


def test_the_files_hold_the_table(tmp_path):
    make_run(tmp_path / "a", "A|B")
    csv, text = leaderboard(tmp_path).write()
    again = pd.read_csv(csv)
    assert list(again.columns) == list(boards.BOARD_COLUMNS) and again["model"].tolist() == ["A|B"]
    assert "A\\|B" in text.read_text()
    assert len(leaderboard(tmp_path).table) == 1, "its own files are no reports"


# ---- reports of others ----


HOSTILE = "<img src=x onerror=alert(1)> | x |\n\n# H1 ![t](http://127.0.0.1:9/t.png) [c](javascript:alert(1)) \x1b[31m"


def edited(folder, change):
    """A report with a right hash, whatever is in it."""
    path = folder / "report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    reseal(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r["metrics"].update(reasoning_score=0.992), "contradicts itself about reasoning_score"),
        (
            lambda r: (
                r["metrics"].update(code_score=0.99),
                r["details"]["code_score"].update(value=0.99, high=1.0),
            ),
            "its items give code_score value",
        ),
        (lambda r: r["details"]["code_score"].update(low=0.99), "its items give code_score low"),
        (lambda r: r["details"]["code_score"].update(n=0), "$.details.code_score.n"),
        (lambda r: r["details"]["reasoning_score"].update(low=None), "$.details.reasoning_score.low"),
        (lambda r: r["details"]["code_score"].pop("set"), "'set' is a required property"),
        (lambda r: r["details"]["cpu_tokens_per_sec"].pop("depth"), "'depth' is a required property"),
        (
            lambda r: r["details"]["failure_boundary_tokens"].pop("n_haystacks"),
            "'n_haystacks' is a required property",
        ),
        (lambda r: r["metrics"].update(cpu_tokens_per_sec=-1.0), "does not follow the schema"),
        (
            lambda r: [
                r[k].update(failure_boundary_tokens=v)
                for k, v in (
                    ("metrics", 10**17),
                    (
                        "details",
                        r["details"]["failure_boundary_tokens"] | {"value": 10**17, "tokens": 10**17},
                    ),
                )
            ],
            "does not follow the schema at $.metrics.failure_boundary_tokens",
        ),
        (
            lambda r: r["details"]["context_stability_curve"].update(lengths=[64]),
            "contradicts itself about context_stability_curve",
        ),
    ],
)
def test_a_forged_or_contradictory_report_is_listed_with_its_reason_and_the_rest_is_ranked(
    tmp_path, change, problem
):
    make_run(tmp_path / "good", "Good")
    edited(make_run(tmp_path / "forged", "Forged", seed=3), change)
    table = leaderboard(tmp_path).table
    assert list(table["run"].dropna()) == ["good"] and problem in table["problem"].iloc[1]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        '"\\ud800"',
        "\x00",
        "{}",
        "[]",
    ],
    ids=["deep", "NaN", "inf", "big", "surrogate", "zero", "object", "list"],
)
def test_no_file_ends_the_leaderboard(tmp_path, text):
    make_run(tmp_path / "good", "Good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_text(text)
    ranked = leaderboard(tmp_path)
    assert (ranked.table["problem"] != "").sum() == 1 and list(ranked.table["run"].dropna()) == ["good"]
    assert "- bad/report.json: " in str(ranked)


def test_a_fifo_a_link_to_a_folder_and_a_surrogate_name_do_no_harm(tmp_path):
    make_run(tmp_path / "good", "Good")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "report.json")
    (tmp_path / "loop").symlink_to(tmp_path)
    edited(make_run(tmp_path / "odd", "Odd"), lambda r: r["model"].update(name="a\ud800"))
    ranked = leaderboard(tmp_path)
    assert (ranked.table["problem"] != "").sum() == 1 and len(ranked.table) == 3
    str(ranked).encode()
    ranked.write()


def test_names_of_others_stay_names(tmp_path):
    make_run(tmp_path / "good", "Good")
    bad = make_run(tmp_path / "bad", "Bad", seed=3)
    edited(bad, lambda r: (r["model"].update(name=HOSTILE), r.update(run='=HYPERLINK("http://127.0.0.1:9")')))
    ranked = leaderboard(tmp_path)
    csv, text = ranked.write()
    page = markdown2html_mistune(text.read_text())
    assert not [tag for tag in ("<img", "<h1>H1", 'href="javascript', 'href="http') if tag in page]
    assert "\x1b" not in text.read_text() + csv.read_text() + str(ranked)
    assert not re.search(r'(^|,)"?=', csv.read_text(), re.M), "a cell is a formula"


def test_a_report_without_its_answers_does_not_count(tmp_path):
    make_run(tmp_path / "whole", "Whole", skill=-0.3)
    alone = make_run(tmp_path / "alone", "Alone", skill=0.4)
    (alone / "score_items.csv").unlink()
    ranked = leaderboard(tmp_path)
    assert list(ranked.table["run"].dropna()) == ["whole"] and ranked.table["place"].iloc[0] == 1
    assert "- alone/report.json: the report's items are missing (score_items.csv)" in str(ranked)


def test_counts_keep_their_digits_beside_a_report_that_has_none(tmp_path):
    own, bad = make_run(tmp_path / "own", "Own"), tmp_path / "bad" / "report.json"
    report = json.loads((own / "report.json").read_text())
    report["model"]["size_bytes"] = 61_540_123_456
    (own / "report.json").write_text(json.dumps(report))
    reseal(own)
    bad.parent.mkdir()
    bad.write_text("{}")
    leaderboard(tmp_path).write()
    with (tmp_path / "leaderboard.csv").open() as file:
        first, second = csv.DictReader(file)
    boundary = str(report["metrics"]["failure_boundary_tokens"])
    assert (first["size_bytes"], first["failure_boundary_tokens"]) == ("61540123456", boundary)
    assert (second["size_bytes"], second["failure_boundary_tokens"]) == ("", "")


def test_no_number_of_seventeen_digits_is_written(tmp_path):
    make_run(tmp_path / "a", "A")
    csv, text = leaderboard(tmp_path).write()
    assert not re.search(r"\d\.\d{8,}", csv.read_text() + text.read_text())
