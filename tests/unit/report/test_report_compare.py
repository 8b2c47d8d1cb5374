"""Reports side by side: what is refused, and whether the tests and intervals say what is so."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from math import comb

import numpy as np
import pandas as pd
import pytest
from report_builder import CONDITIONS, make_run, reseal

from dfqs_nb import stats
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.report import compare as report_compare
from dfqs_nb.report.compare import RETRIEVAL, compare_reports, leaderboard
from dfqs_nb.report.reading import read_answers
from dfqs_nb.workbook import cli

REFUSED = DfqsError
LENGTHS = (64, 128, 256, 512, 1024)


def rows(compared, metric, model=None):
    table = compared.table[compared.table["metric"] == metric]
    return table[table["model"] == model].iloc[0] if model else table


@pytest.fixture
def pair(tmp_path):
    """Two runs under equal conditions; the second is a little better at everything."""
    return [make_run(tmp_path / "one", "One"), make_run(tmp_path / "two", "Two", skill=0.15, seed=3)]


# ---- what comes out ----


def test_two_reports_give_one_table_with_differences_intervals_and_tests(pair):
    compared = compare_reports(pair)
    assert list(compared.table["metric"].unique()) == [
        "reasoning_score",
        "code_score",
        RETRIEVAL,
        "failure_boundary_tokens",
        "cpu_tokens_per_sec",
    ]
    assert list(rows(compared, "code_score")["model"]) == ["One", "Two"]
    for metric in ("reasoning_score", "code_score", RETRIEVAL):
        base, row = rows(compared, metric, "One"), rows(compared, metric, "Two")
        assert row["difference"] == pytest.approx(row["value"] - base["value"])
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
        assert row["low"] <= row["value"] <= row["high"] and row["p"] <= row["p_holm"] <= 1
        assert math.isnan(base["difference"]) and base["reading"] == "baseline"
    tested = compared.table[compared.table["p"].notna()]
    assert stats.holm(list(tested["p"])) == list(tested["p_holm"])


def test_scores_are_compared_as_the_item_level_comparison_does(pair):
    compared = compare_reports(pair)
    items = [pd.read_csv(folder / "score_items.csv", dtype={"id": str}) for folder in pair]
    for name, metric in (("nano-reasoning", "reasoning_score"), ("nano-code", "code_score")):
        a, b = (entry[entry["set"] == name].set_index("id")["correct"] for entry in items)
        row = rows(compared, metric, "Two")
        assert row["p"] == stats.mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))
        stated = json.loads((pair[1] / "report.json").read_text())["metrics"][metric]
        assert row["value"] == pytest.approx(stated)


def test_three_reports_are_all_compared_with_the_first_and_corrected_together(tmp_path, pair):
    third = make_run(tmp_path / "three", "Three", skill=-0.3, seed=5)
    compared = compare_reports([*pair, third])
    assert compared.table["p"].notna().sum() == 6
    assert list(rows(compared, RETRIEVAL)["model"]) == ["One", "Two", "Three"]
    alone = compare_reports([pair[0], third])
    assert rows(compared, RETRIEVAL, "Three")["p"] == rows(alone, RETRIEVAL, "Three")["p"]
    assert rows(compared, RETRIEVAL, "Three")["p_holm"] >= rows(alone, RETRIEVAL, "Three")["p_holm"]


def test_a_run_compared_with_a_copy_of_its_answers_shows_no_difference(tmp_path):
    pair = [make_run(tmp_path / name, "Same", created=f"2026-01-0{n}") for n, name in ((1, "a"), (2, "b"))]
    compared = compare_reports(pair)
    assert list(rows(compared, "code_score")["model"]) == [f"Same ({folder})" for folder in pair]
    tested = compared.table[compared.table["p"].notna()]
    assert (tested["p"] == 1).all() and (tested["difference"] == 0).all()


def test_the_text_says_what_was_found(pair):
    compared = compare_reports(pair)
    text = str(compared)
    assert text.startswith("# One against Two\n\nNano tier: ")
    row = rows(compared, "code_score", "Two")
    assert f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]" in text


def test_a_markdown_table_keeps_its_columns(pair):
    lines = [line for line in str(compare_reports(pair)).splitlines() if line.startswith("|")]
    for _, block in itertools.groupby(lines, key=lambda line: line.count("|")):
        assert len(list(block)) > 3


@pytest.mark.parametrize("name", [r"$\notacommand$", "$x", "\x1b[31m\n# H", "y" * 9000, "%s {x} {{x}}"])
def test_any_name_of_a_model_stands_on_one_line(tmp_path, name):
    make_run(tmp_path / "a", "A")
    make_run(tmp_path / "b", name, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = str(compare_reports([tmp_path / "a", tmp_path / "b"]))
    assert "\x1b" not in text and len([line for line in text.splitlines() if line.startswith("|")]) == 7


# ---- what is refused ----


def test_differing_conditions_are_refused_with_every_field(tmp_path, pair):
    conditions = json.loads(json.dumps(CONDITIONS))
    conditions["scores"]["n_ctx"], conditions["long_context"]["type_k"] = 4096, "q8_0"
    other = make_run(tmp_path / "three", "Three", conditions=conditions)
    with pytest.raises(REFUSED) as caught:
        compare_reports([*pair, other])
    assert "three/report.json: long_context.type_k (f16 and q8_0), scores.n_ctx (1,024 and 4,096)" in str(
        caught.value
    )
    assert "two/report.json" not in str(caught.value) and "max_items" not in str(caught.value)


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_without_a_stage_is_named_with_the_command_that_adds_it(pair, tmp_path, order):
    conditions = {"long_context": CONDITIONS["long_context"]}
    other = make_run(tmp_path / "three", "Three", conditions=conditions)
    with pytest.raises(REFUSED) as caught:
        compare_reports([pair[0], other][::order])
    message = str(caught.value)
    assert message.endswith(
        "three/report.json: has no scores, and others do; `dfqs-nb run 06 07 --run three`"
    )


def test_a_setting_that_differs_everywhere_is_named_once(pair, tmp_path):
    """Each set repeats the settings, so one thread more would read as ten conditions."""
    conditions = json.loads(json.dumps(CONDITIONS))
    for part in (conditions["scores"], conditions["long_context"]):
        part["n_threads"] = 2
    other = make_run(tmp_path / "three", "Three", conditions=conditions)
    with pytest.raises(REFUSED, match=r"three/report.json: n_threads \(1 and 2\); run all again"):
        compare_reports([pair[0], other])


def test_a_report_is_not_compared_with_itself(pair, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(pair[0])
    for same in (pair[0], pair[0] / "report.json", link):
        with pytest.raises(REFUSED, match="the same report is given twice"):
            compare_reports([pair[0], same])


def test_many_runs_are_compared_whatever_their_names_add_up_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    runs = [str(make_run(tmp_path / f"{'long' * 15}-{n}", f"M{n}", seed=n)) for n in range(5)]
    assert cli.main(["compare", *runs]) == 0
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("compare-"))
    assert (folder / "comparison.md").read_text() in capsys.readouterr().out and len(folder.name) < 100


def test_two_runs_that_their_budgets_shortened_are_compared_on_the_questions_of_both(tmp_path):
    runs, conditions = [], json.loads(json.dumps(CONDITIONS))
    for n, reach, seed in ((20, 3, 1), (17, 4, 2)):
        conditions["scores"]["nano-code"]["part"] = f"{n} of 24 questions"
        conditions["long_context"] |= {"n_ctx": 2**reach, "grid": list(LENGTHS[:reach])}
        folder = tmp_path / str(n)
        runs.append(make_run(folder, str(n), conditions=conditions, n_code=n, seed=seed))
    compared = compare_reports(runs)
    items = [pd.read_csv(folder / "score_items.csv", dtype={"id": str}) for folder in runs]
    a, b = (entry[entry["set"] == "nano-code"].set_index("id")["correct"] for entry in items)
    row, a = rows(compared, "code_score", "17"), a[b.index]
    assert row["n"] == 17 and row["difference"] == pytest.approx(b.mean() - a.mean())
    assert row["p"] == stats.mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))
    assert row["reading"].endswith("asked of both: 17 questions, of 20 and 17")
    assert "except for how much was asked" in str(compared)
    assert "asked of both" not in rows(compared, "reasoning_score", "17")["reading"]


def test_two_parts_of_different_sets_are_refused(tmp_path):
    runs, conditions = [], json.loads(json.dumps(CONDITIONS))
    for n in (20, 17):
        conditions["scores"]["nano-code"] |= {"part": f"{n} of 24", "prompt_set_sha256": str(n) * 32}
        runs.append(make_run(tmp_path / str(n), str(n), conditions=conditions, n_code=n))
    with pytest.raises(REFUSED, match="nano-code.prompt_set_sha256") as caught:
        compare_reports(runs)
    assert ".part" not in str(caught.value)


def test_only_a_chat_template_may_differ_and_that_is_said_first(tmp_path):
    conditions = json.loads(json.dumps(CONDITIONS))
    conditions["scores"]["nano-reasoning"]["chat_template_sha256"] = "f" * 64
    pair = [make_run(tmp_path / "one", "One"), make_run(tmp_path / "two", "Two", conditions=conditions)]
    compared = compare_reports(pair)
    assert compared.templates == ["scores.nano-reasoning.chat_template_sha256"]
    assert "through its own chat template" in str(compared).split("\n| ")[0]
    conditions["scores"]["n_ctx"] = 4096
    other = make_run(tmp_path / "three", "Three", conditions=conditions)
    with pytest.raises(DfqsError, match=r"scores.n_ctx \(1,024 and 4,096\)") as caught:
        compare_reports([pair[0], other])
    assert "nano-reasoning" not in str(caught.value)


def test_tiers_never_mix(tmp_path, pair):
    other = make_run(tmp_path / "three", "Three", tier="standard")
    with pytest.raises(REFUSED, match="tiers never mix: .*one.* is nano.*three.* is standard"):
        compare_reports([pair[0], other])


def test_one_report_is_refused(pair):
    with pytest.raises(REFUSED, match="1 report given"):
        compare_reports(pair[:1])


def test_an_edited_report_is_refused(pair):
    path = pair[1] / "report.json"
    path.write_text(path.read_text().replace('"run": "two"', '"run": "three"'))
    with pytest.raises(DfqsError):
        compare_reports(pair)


@pytest.mark.parametrize("name", ["score_items.csv", "long_context_items.csv"])
def test_missing_or_edited_items_are_refused(pair, name):
    path = pair[1] / name
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"False", b"True", 1))
    with pytest.raises(REFUSED, match=f"{name} is not the file that the report was made from"):
        compare_reports(pair)
    path.unlink()
    with pytest.raises(REFUSED, match=rf"the report's items are missing \({name}\)"):
        compare_reports(pair)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "score_items.csv",
            {b"wrong,False": b"correct,True"},
            "its items give reasoning_score value 1, and the report states 0.85",
        ),
        (
            "long_context_items.csv",
            {b"False": b"True"},
            "its items give context_stability_curve value",
        ),
    ],
)
def test_items_that_do_not_give_the_reports_numbers_are_refused(pair, name, changes, message):
    """Even where the report's hashes were made to agree."""
    path = pair[1] / name
    for old, new in changes.items():
        path.write_bytes(path.read_bytes().replace(old, new))
    reseal(pair[1], rehash=True)
    with pytest.raises(REFUSED, match=message):
        compare_reports(pair)


FORGED = [
    ("failure_boundary_tokens", {"value": 60_000, "tokens": 60_000, "low": 60_000}, "tokens"),
    ("failure_boundary_tokens", {"right_censored": True, "high": None}, "high"),
    ("failure_boundary_tokens", {"value": 60_000, "tokens": 60_000, "cause": "oom"}, "tokens"),
    ("failure_boundary_tokens", {"provisional": True}, "provisional"),
    ("context_stability_curve", {"guess_rate": 0.5}, "guess_rate"),
    ("context_stability_curve", {"points": "lower"}, "n"),
]


@pytest.mark.parametrize("metric, change, key", FORGED)
def test_curve_and_boundary_are_counted_again_wherever_a_report_is_read(pair, metric, change, key):
    path = pair[0] / "report.json"
    report = json.loads(path.read_text())
    if change.get("points"):
        change = {"points": [row | {"n": row["n"] - 1} for row in report["details"][metric]["points"]]}
    report["details"][metric] |= change
    report["metrics"][metric] = report["details"][metric]["value"]
    path.write_text(json.dumps(report))
    reseal(pair[0])
    with pytest.raises(REFUSED, match=f"its items give {metric} {key} "):
        compare_reports(pair)
    board = leaderboard(pair[0].parent).table.set_index("report")["problem"]
    assert metric in board["one/report.json"] and not board["two/report.json"]


def test_a_boundary_that_the_runtime_set_is_read(tmp_path, pair):
    stopped = make_run(tmp_path / "stopped", "Stopped", flat=0.99, failure=("oom", 2048))
    assert read_answers(stopped).report["metrics"]["failure_boundary_tokens"] == 2048


@pytest.mark.parametrize("change", [{"value": 9e9}, {"high": 9e9}, {"n": 50}, {"values": [9e9]}])
def test_a_speed_follows_from_its_repetitions(pair, change):
    path = pair[0] / "report.json"
    report = json.loads(path.read_text())
    report["details"]["cpu_tokens_per_sec"] |= change
    report["metrics"]["cpu_tokens_per_sec"] = report["details"]["cpu_tokens_per_sec"]["value"]
    path.write_text(json.dumps(report))
    reseal(pair[0])
    with pytest.raises(REFUSED, match="contradicts itself about cpu_tokens_per_sec"):
        compare_reports(pair)


def test_a_report_of_earlier_versions_names_the_command_that_makes_it_readable(pair):
    """Its long-context answers were a journal."""
    path, answers = pair[0] / "report.json", pair[0] / "long_context_items.csv"
    report = json.loads(path.read_text())
    report["items"]["long_context"][0]["file"] = answers.with_suffix(".jsonl").name
    report["sources"] = {item["file"]: "" for group in report["items"].values() for item in group}
    answers.rename(answers.with_suffix(".jsonl"))
    path.write_text(json.dumps(report))
    reseal(pair[0], rehash=True)
    with pytest.raises(REFUSED, match=r"answers .* missing; `dfqs-nb run 05 07 --run one` writes them"):
        compare_reports(pair)


def test_multiple_choice_is_counted_again(pair):
    path, (low, high), name = pair[0] / "report.json", map(float, stats.wilson(12, 20)), "some-choices"
    rows = pd.DataFrame({"set": name, "id": range(20), "family": "a", "length": "short", "guess": 0.25})
    rows["grade"] = ["correct"] * 12 + ["wrong"] * 8
    answers = pd.read_csv(pair[0] / "score_items.csv")
    pd.concat([answers, rows]).to_csv(pair[0] / "score_items.csv", index=False)
    report = json.loads(path.read_text())
    report["items"]["choices"] = [{"file": "score_items.csv"}]
    right = {"set": name, "value": 0.6, "low": low, "high": high, "n": 20, "guess_rate": 0.25}
    for change in ({}, {"value": 0.65}, {"n": 21}, {"high": 0.9}, {"set": "another"}):
        report["details"]["reasoning_score"]["choices"] = right | change
        path.write_text(json.dumps(report))
        reseal(pair[0], rehash=True)
        if change:
            with pytest.raises(DfqsError, match="its items give choice_score"):
                read_answers(path)
        else:
            assert read_answers(path).scores["choice_score"].score.value == 0.6


def test_a_guess_rate_that_is_no_number_is_refused(pair):
    path = pair[1] / "score_items.csv"
    items = pd.read_csv(path, dtype=str, keep_default_na=False)
    items.assign(guess="much").to_csv(path, index=False)
    reseal(pair[1], rehash=True)
    with pytest.raises(REFUSED, match="cannot be read"):
        compare_reports(pair)


def test_different_questions_are_refused(tmp_path, pair):
    other = make_run(tmp_path / "three", "Three", n_code=20)
    with pytest.raises(REFUSED, match="did not answer the same items"):
        compare_reports([pair[0], other])


# ---- what is not compared ----


def test_a_withheld_metric_is_said_and_the_others_are_compared(tmp_path, pair):
    other = make_run(tmp_path / "three", "Three", withheld={"code_score": "no sandbox on this machine"})
    compared = compare_reports([pair[0], other])
    row = rows(compared, "code_score", "Three")
    assert row["reading"] == "not compared: Three withholds it (no sandbox on this machine)"
    assert math.isnan(row["p"]) and "withheld" in str(compared)
    assert rows(compared, "reasoning_score", "Three")["p"] <= 1
    row = rows(compare_reports([other, pair[0]]), "code_score", "One")
    stated = json.loads((pair[0] / "report.json").read_text())["metrics"]["code_score"]
    assert row["value"] == stated and math.isnan(row["difference"]), "its own value is shown all the same"


@pytest.mark.parametrize(
    "metric", ["context_stability_curve", "failure_boundary_tokens", "cpu_tokens_per_sec"]
)
def test_any_metric_may_be_withheld_on_either_side(tmp_path, pair, metric):
    other = make_run(tmp_path / "three", "Three", withheld={metric: "not run"})
    for reports in ([pair[0], other], [other, pair[0]]):
        compared = compare_reports(reports)
        assert "not compared: " in "".join(compared.table["reading"]) and "not run" in str(compared)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"contended": True}, "the machine was busy when Three was timed"),
        ({"machine": {"processor": "another"}}, "measured on different machines (processor: "),
        ({"machine": {"usable cores": 64}}, "measured on different machines (usable cores: "),
    ],
)
def test_speeds_are_compared_only_where_they_are_of_one_kind(tmp_path, pair, change, reason):
    other = make_run(tmp_path / "three", "Three", **change)
    row = rows(compare_reports([pair[0], other]), "cpu_tokens_per_sec", "Three")
    assert row["reading"].startswith(f"not compared: {reason}") and math.isnan(row["difference"])
    row = rows(compare_reports(pair), "cpu_tokens_per_sec", "Two")
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]


def test_questions_with_other_answers_are_not_paired(tmp_path, pair):
    """Tokenizers of their own give texts of their own; only equal keys with equal answers are one question."""
    other = make_run(tmp_path / "three", "Three", expected="another {}")
    compared = compare_reports([pair[0], other])
    assert (
        rows(compared, RETRIEVAL, "Three")["reading"]
        == "not compared: the two were asked no question in common"
    )


# ---- the statistics ----


def contexts(change):
    """Two frames of answers in which haystack i differs by change[i] questions of 8."""
    both = ([], [])
    for haystack, delta in enumerate(change):
        for number in range(8):
            right = (number < 4, number < 4 + delta)
            for frame, correct in zip(both, right, strict=True):
                frame.append(
                    {"haystack": haystack, "length": 64, "question": f"q{number}", "correct": correct}
                )
    return tuple(pd.DataFrame(frame) for frame in both)


def test_the_flip_test_is_the_exact_sign_test_where_all_differences_are_alike():
    a, b = contexts([1, 1, 1, 1, 1, 1, -1, 0, 0])
    n, fewer = 7, 1
    assert report_compare.flip_test(a, b) == pytest.approx(
        2 * sum(comb(n, k) for k in range(fewer + 1)) / 2**n
    )
    assert report_compare.flip_test(a, a) == 1
    many = contexts([1] * 20)
    assert report_compare.flip_test(*many) < 1e-4


def test_the_flip_test_rejects_no_more_often_than_it_should():
    draw, rejected = np.random.default_rng(7), 0
    for _ in range(400):
        change = draw.integers(-2, 3, 10)
        rejected += report_compare.flip_test(*contexts(change)) < 0.05
    assert rejected / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_a_boundary_stands_beside_the_other_with_what_qualifies_it(tmp_path, pair):
    """Not reached, at chance, stopped by the runtime: no number goes without it."""
    held, lost = (make_run(tmp_path / n, n.title(), flat=f) for n, f in (("held", 0.98), ("lost", 0.0)))
    stopped = make_run(tmp_path / "stopped", "Stopped", flat=0.99, failure=("oom", 2048))
    compared = compare_reports([pair[0], held, lost, stopped])
    assert "(at chance)" in str(compared)
    assert (
        "2,048" in str(compared)
        and "(oom)" in str(compared)
        and "at least 1,024 (not reached)" in str(compared)
    )


def test_the_hash_of_items_is_of_their_bytes(pair):
    report = json.loads((pair[0] / "report.json").read_text())
    for group in report["items"].values():
        for entry in group:
            assert hashlib.sha256((pair[0] / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
