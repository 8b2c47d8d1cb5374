"""The report: what it holds, what it withholds, and every kind of input that it refuses."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from nbconvert.filters.markdown_mistune import markdown2html_mistune
from sealed_run import make_run, recorded, with_answers

from dfqs_nb import report
from dfqs_nb.core import files as core_files
from dfqs_nb.core.errors import DfqsError, StageError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.core.stage import NOTEBOOKS, Stage
from dfqs_nb.report import metrics, reading, text
from dfqs_nb.report.template import spec_table
from dfqs_nb.scores import item_sets
from dfqs_nb.workbook import cli
from dfqs_nb.workbook import run as workbook

SCHEMA = core_files.read_json(data_dir() / "spec" / "report.schema.json")
METRICS = {
    "reasoning_score": float,
    "code_score": float,
    "context_stability_curve": list,
    "cpu_tokens_per_sec": float,
    "failure_boundary_tokens": int,
}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\n# H1\n![t](http://127.0.0.1:9/t.png) [c](javascript:a) \x1b[31m'


def markdown(body: dict, folder: Path) -> str:
    return text.texts(body, folder)["report.md"]


def page_of(body: dict, folder: Path) -> str:
    return text.texts(body, folder)["report.html"]


@pytest.fixture(scope="module")
def run(merged_reference, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "nano", merged_reference)


@pytest.fixture(scope="module")
def made(run):
    return report.build_report(run, ask_llama_cpp=False)


@pytest.fixture(scope="module")
def written(merged_reference, tmp_path_factory):
    """A run with answers, and its report in all its files."""
    folder = with_answers(tmp_path_factory.mktemp("written") / "nano", merged_reference)
    report.write_report(folder, report.build_report(folder, ask_llama_cpp=False))
    return folder


@pytest.fixture
def own(run, tmp_path):
    return shutil.copytree(run, tmp_path / "own")


def test_a_condition_of_many_digits_keeps_its_hash(merged_reference, tmp_path):
    conditions = recorded("scores")["conditions"] | {"rope_freq_scale": 1 / 3}
    folder = make_run(tmp_path / "run", merged_reference, scores={"conditions": conditions})
    reading.check_report(report.build_report(folder, ask_llama_cpp=False), folder)


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "nano")


def store(folder: Path, body: dict) -> Path:
    """Write ``report.json`` after the checks that every report passes."""
    reading.check_report(body, folder / reading.FILE)
    return core_files.write_json(folder / reading.FILE, body)


def resealed(body: dict) -> dict:
    body = {key: value for key, value in body.items() if key != "integrity"}
    return {**body, "integrity": {"sha256": core_files.canonical_sha256(body)}}


# ---- what it holds ----


def test_exactly_the_required_metrics_with_the_types_that_the_specification_names(made):
    assert {name: type(value) for name, value in made["metrics"].items()} == METRICS
    assert all(type(entry) is float for entry in made["metrics"]["context_stability_curve"])


def test_metrics_are_those_of_the_stages(made):
    scores, context = recorded("scores"), recorded("long_context")
    assert [made["metrics"][score["name"]] for score in scores["scores"]] == pytest.approx(
        [score["value"] for score in scores["scores"]], rel=1e-9
    )
    assert made["metrics"]["cpu_tokens_per_sec"] == pytest.approx(scores["cpu_tokens_per_sec"], rel=1e-9)
    assert made["metrics"]["failure_boundary_tokens"] == context["boundary"]["tokens"]
    assert made["details"]["context_stability_curve"]["lengths"] == [
        row["length"] for row in context["curve"]
    ]


def test_conditions_hash_ignores_which_model_it_was(made, merged_reference, tmp_path):
    changed = {
        name: {"conditions": {**recorded(name)["conditions"], "model": "a" * 64}}
        for name in ("header", "generate", "routing", "scores")
    }
    for name in ("merge", "long_context"):
        changed[name] = {"model": {**recorded(name)["model"], "sha256": "a" * 64}}
    other = report.build_report(
        make_run(tmp_path / "other", merged_reference, **changed), ask_llama_cpp=False
    )
    assert other["model"]["sha256"] == "a" * 64
    assert other["conditions_sha256"] == made["conditions_sha256"]


def test_a_report_of_another_model_has_none_of_the_artifacts_statements_or_hardware(
    merged_reference, tmp_path
):
    changed = {
        name: {"conditions": {**recorded(name)["conditions"], "model": "a" * 64}}
        for name in ("header", "generate", "routing", "scores")
    }
    for name in ("merge", "long_context"):
        changed[name] = {"model": {**recorded(name)["model"], "sha256": "a" * 64}}
    folder = make_run(tmp_path / "other", merged_reference, **changed)
    other = report.build_report(folder, ask_llama_cpp=False)
    assert other["claims"] == []
    assert "DFQS" not in str(other["hardware_envelope"]["rows"])
    for written in (markdown(other, folder), page_of(other, folder)):
        own = written.replace(
            spec_table("claims")["documents"]["DFQS 1.0"]["address"], "where the specification is"
        )
        assert "DeepSeek-V4-Flash" not in own and "Flash-IQ1_S" not in own


def test_the_reference_models_report_is_marked_as_a_demonstration(made, run):
    assert len(made["claims"]) > 100 and made["model"]["relation_to_artifact"] == "reference"
    assert "A demonstration" in page_of(made, run) and "A demonstration" in markdown(made, run)


def test_conditions_hash_changes_with_a_setting(made, merged_reference, tmp_path):
    scores = recorded("scores")
    scores["conditions"]["n_threads"] = 2
    built = report.build_report(
        make_run(tmp_path / "other", merged_reference, scores=scores), ask_llama_cpp=False
    )
    assert built["conditions_sha256"] != made["conditions_sha256"]
    verdicts = {row["id"]: row["verdict"] for row in built["conformance"]}
    assert verdicts["identical-conditions"] == "not met"


def test_written_report_reads_back_equal_and_follows_the_published_schema(made, own):
    path = store(own, made)
    assert report.read_report(own) == report.read_report(path) == json.loads(json.dumps(made))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(made, SCHEMA)


# ---- what it withholds ----


@pytest.mark.parametrize(
    "stage, names",
    [
        ("scores", ["reasoning_score", "code_score", "cpu_tokens_per_sec"]),
        ("long_context", ["context_stability_curve", "failure_boundary_tokens"]),
        ("routing", []),
        ("generate", []),
        ("header", []),
    ],
)
def test_missing_stage_withholds_its_metrics_and_names_its_notebook(stage, names, merged_reference, tmp_path):
    folder = make_run(tmp_path / "r", merged_reference, without=(stage,))
    built = report.build_report(folder, ask_llama_cpp=False)
    assert [name for name, value in built["metrics"].items() if value is None] == names
    for name in names:
        assert built["details"][name]["withheld"].startswith(
            f"notebook {NOTEBOOKS[stage][:2]} did not run; `dfqs"
        )
    jsonschema.validate(built, SCHEMA)
    verdict = report.verdict(built)
    assert len(verdict.lines) == 6 and page_of(built, folder)
    assert not [sentence for sentence in verdict.summary if sentence != sentence.rstrip()]
    answers = {line.question: line for line in verdict.lines}
    if stage == "scores":
        assert not answers["What does it score?"].caveat, "a tick is explained where there is none"
    if stage == "routing":
        assert not answers["Is routing deterministic?"].caveat, "it limits an answer that is not there"


def test_partial_score_is_withheld_and_says_how_many_are_missing(merged_reference, tmp_path):
    scores = recorded("scores")["scores"]
    scores[0] |= {"value": None, "low": None, "high": None, "n_missing": 3}
    folder = make_run(tmp_path / "r", merged_reference, scores={"scores": scores})
    built = report.build_report(folder, ask_llama_cpp=False)
    assert built["metrics"]["reasoning_score"] is None and built["metrics"]["code_score"] is not None
    assert built["details"]["reasoning_score"]["withheld"] == "3 of 192 questions lack a result"
    parts = recorded("scores")["conditions"]
    parts[scores[0]["set"]] = parts[scores[0]["set"]] | {"part": "0 of 120 questions"}
    folder = make_run(tmp_path / "p", merged_reference, scores={"scores": scores, "conditions": parts})
    built = report.build_report(folder, ask_llama_cpp=False)
    assert built["details"]["reasoning_score"]["withheld"] == "only 0 of 120 questions answered"


@pytest.mark.parametrize("tier", item_sets.TIERS)
def test_the_sets_that_a_tier_asks_are_those_of_its_metrics(tier):
    for name in item_sets.TIERS[tier][:2]:
        kind = item_sets.ItemSet.load(name).kind
        score = {"name": f"{kind}_score", "set": name, "value": 0.5, "low": 0.1, "high": 0.9, "n": 2}
        assert metrics._score({"tier": tier, "scores": [score]}, score["name"])["value"] == 0.5


def test_code_that_was_never_run_is_withheld(merged_reference, tmp_path):
    changed = {"scores": recorded("scores")["scores"][:1], "sandbox": "none"}
    folder = make_run(tmp_path / "r", merged_reference, scores=changed)
    built = report.build_report(folder, ask_llama_cpp=False)
    assert "without a sandbox" in built["details"]["code_score"]["withheld"]


def test_nan_is_withheld_not_written(merged_reference, tmp_path):
    changed = {"context_stability_curve": [1.0, float("nan")]}
    folder = make_run(tmp_path / "r", merged_reference, long_context=changed)
    built = report.build_report(folder, ask_llama_cpp=False)
    assert built["metrics"]["context_stability_curve"] is None
    assert "NaN" not in json.dumps(built)


def on_a_card(folder: Path, model: Path, *without: str) -> dict:
    """A report on a run whose every notebook put all layers on a GPU."""
    names = ("generate", "routing", "long_context", "scores")
    at = {name: {**recorded(name)["conditions"], "n_gpu_layers": -1, "offloaded_layers": 5} for name in names}
    changed: dict = {name: {"conditions": conditions} for name, conditions in at.items()}
    changed["generate"]["speed"] = [row | {"contended": False} for row in recorded("generate")["speed"]]
    return report.build_report(make_run(folder, model, without=without, **changed), ask_llama_cpp=False)


@pytest.mark.parametrize("without", [(), ("scores",)])
def test_a_run_on_a_card_is_a_tick_with_its_speed_and_says_how_the_cpus_is_measured(
    merged_reference, tmp_path, without
):
    built = on_a_card(tmp_path / "card", merged_reference, *without)
    command = "`dfqs-nb run 03 04 05 06 07 --run card -p n_gpu_layers=0`"
    detail = built["details"]["cpu_tokens_per_sec"]
    assert detail["value"] is None and detail["n"] == 0 and "utilisation" not in detail
    assert detail["withheld"].startswith(f"all layers were on a GPU; {command} measures all on the CPU")
    line = line_of(built, "Does it run")
    assert line.mark == "yes" and " tokens/s with all layers on a GPU at depth " in line.answer
    assert "a speed of the CPU, which this run does not have" in line.caveat and command in line.caveat
    assert "may have been" not in line.caveat and "?" not in line.symbol
    name, *arguments = command.strip("`").removeprefix("dfqs-nb ").split()
    assert cli.program().commands[name].make_context(name, arguments)


def test_the_command_for_the_cpu_has_the_runs_other_options_and_its_layers_once():
    options = ["-p", "n_gpu_layers=2", "-p", "n_ctx=512", "--tier", "nano"]
    command = {"run": "half", "model": "m.gguf", "options": options, "budget_minutes": 4.0}
    again = "-p n_ctx=512 --tier nano -p n_gpu_layers=0 --budget-minutes 4`"
    assert reading.on_cpu(command).startswith(f"`dfqs-nb run 03 04 05 06 07 --run half {again} measures")


def test_the_verdict_on_demands_names_what_is_missing_and_no_larger_budget_where_time_was_not_the_reason(
    merged_reference, tmp_path
):
    caveat = line_of(on_a_card(tmp_path / "card", merged_reference, "scores"), "Which demands").caveat
    assert "larger budget" not in caveat
    assert "not met, because this run did not measure reasoning_score, code_score, cpu_tokens" in caveat
    commands = re.findall(r"`dfqs-nb ([^`]+)`", caveat)
    assert commands == ["run 06 07 --run card", "run 03 04 05 06 07 --run card -p n_gpu_layers=0"]


def test_one_withheld_metric_and_three_get_the_same_verdict(merged_reference, tmp_path):
    for without in ((), ("scores",)):
        built = on_a_card(tmp_path / str(len(without)), merged_reference, *without)
        rows = {row["id"]: row for row in built["conformance"]}
        assert rows["metrics"]["verdict"] == "not met" and rows["metrics"]["evidence"].startswith(
            "withheld: "
        )
        assert rows["cpu-baseline"]["verdict"] == "not tested"
        assert "was measured with" not in rows["cpu-baseline"]["evidence"]


# ---- what it refuses ----


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name, change, refusal",
    [
        ("scores.json", lambda c: c["scores"][0].update(value=0.99), "edited after it was written"),
        (
            "long_context.json",
            lambda c: c.update(failure_boundary_tokens=65536),
            "edited after it was written",
        ),
        ("routing.json", lambda c: c["verdict"].update(passed=False), "edited after it was written"),
        ("scores.json", lambda c: c.pop("seal"), "edited after it was written"),
        ("scores.json", lambda c: c.update(stage="header"), "not the stage 'scores'"),
    ],
)
def test_edited_stage_is_refused_by_name(name, change, refusal, own):
    edit(own / name, change)
    with pytest.raises(StageError, match=refusal) as error:
        report.build_report(own, ask_llama_cpp=False)
    assert name in str(error.value) and "run 0" in str(error.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", '{"stage": "scores", "x": NaN}', "\x00", "[" * 100_000], ids=str
)
def test_stage_that_is_cut_or_foreign_is_refused(content, own):
    (own / "scores.json").write_text(content)
    with pytest.raises(StageError, match=r"scores\.json.*run 06"):
        report.build_report(own, ask_llama_cpp=False)


def test_edited_or_missing_table_is_refused(own):
    (own / "long_context_table.csv").write_text("stage\nbetter\n")
    with pytest.raises(
        StageError, match="long_context_table.csv: is missing, or was changed after long_context.json"
    ):
        reading.read_run(own)
    (own / "long_context_table.csv").unlink()
    with pytest.raises(StageError, match="is missing"):
        reading.read_run(own)


def test_stages_of_two_models_are_refused(merged_reference, tmp_path):
    conditions = {**recorded("scores")["conditions"], "model": "b" * 64}
    folder = make_run(tmp_path / "r", merged_reference, scores={"conditions": conditions})
    with pytest.raises(DfqsError, match="another model"):
        reading.read_run(folder)


def test_mixed_tiers_are_refused(merged_reference, tmp_path):
    folder = make_run(tmp_path / "r", merged_reference, scores={"tier": "standard"})
    with pytest.raises(DfqsError, match="long_context is nano, scores is standard"):
        reading.read_run(folder)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(DfqsError, match="has no run.*`dfqs-nb run --run .* --model MODEL`"):
        reading.read_run(tmp_path)


def test_model_that_is_gone_or_another_is_refused(merged_reference, tmp_path):
    model = tmp_path / "m.gguf"
    folder = make_run(tmp_path / "r", model)
    with pytest.raises(DfqsError, match="is gone"):
        report.build_report(folder)
    shutil.copy(merged_reference, model)
    with model.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DfqsError, match="not the model of this run"):
        report.build_report(folder)


def test_edited_report_is_refused_on_reading(made, own):
    path = store(own, made)
    edit(path, lambda c: c["metrics"].update(code_score=1.0))
    with pytest.raises(DfqsError, match="edited after it was written"):
        report.read_report(own)


@pytest.mark.parametrize(
    "change, where",
    [
        (lambda c: c["metrics"].pop("code_score"), "metrics"),
        (lambda c: c["metrics"].update(elegance=1.0), "metrics"),
        (lambda c: c["metrics"].update(failure_boundary_tokens=296.5), "failure_boundary_tokens"),
        (lambda c: c["metrics"].update(context_stability_curve=0.5), "context_stability_curve"),
        (lambda c: c.update(tier="best"), "tier"),
        (lambda c: c["details"]["code_score"].update(withheld="a reason beside a value"), "code_score"),
        (lambda c: c["details"]["code_score"].update(value=None), "code_score"),
        (lambda c: c["conformance"][0].update(verdict="surely"), "conformance"),
        (lambda c: c.pop("sources"), r"\$"),
        (lambda c: c.update(schema="other/2"), "schema"),
    ],
)
def test_report_against_the_schema_is_refused_even_with_a_right_hash(change, where, made, own):
    wrong = copy.deepcopy(made)
    change(wrong)
    with pytest.raises(DfqsError, match=f"schema at .*{where}"):
        store(own, resealed(wrong))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["metrics"].update(code_score=1.0),
        lambda c: c["details"]["context_stability_curve"].update(lengths=[64]),
        lambda c: c["details"]["failure_boundary_tokens"].update(tokens=1_000_000),
    ],
)
def test_a_report_that_contradicts_itself_is_refused_even_with_a_right_hash(change, made, own):
    wrong = copy.deepcopy(made)
    change(wrong)
    with pytest.raises(DfqsError, match="contradicts itself"):
        store(own, resealed(wrong))


def test_conditions_that_do_not_have_their_hash_are_refused(made, own):
    wrong = copy.deepcopy(made)
    wrong["conditions"]["scores"]["n_threads"] = 64
    with pytest.raises(DfqsError, match="conditions do not have the hash"):
        store(own, resealed(wrong))


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"model": 1}'])
def test_foreign_report_is_refused(content, tmp_path):
    (tmp_path / reading.FILE).write_text(content)
    with pytest.raises(DfqsError):
        report.read_report(tmp_path)


def test_no_report_is_refused_with_what_to_run(tmp_path):
    with pytest.raises(DfqsError, match="there is no report.*07_write_dfqs_report"):
        report.read_report(tmp_path)


# ---- the verdict ----


def test_the_verdict_answers_six_questions_with_intervals_and_caveats(made, run):
    lines = report.verdict(made).lines
    assert [line.question.split()[0] for line in lines] == ["Is", "Does", "Is", "How", "What", "Which"]
    assert all(
        line.answer and line.caveat and line.mark in ("yes", "no", "in part", "unknown") for line in lines
    )
    by = {line.question: line for line in lines}
    for shown in (str(report.verdict(made)), report.verdict(made)._repr_markdown_(), markdown(made, run)):
        verdict_lines = [line for line in shown.splitlines() if any(question in line for question in by)]
        assert len(verdict_lines) >= 6 and not re.search(r'\.[A-Z"]|\.\.', "".join(verdict_lines)), shown
    carries = by["How far does the context carry?"]
    assert "from 512, open above" in carries.answer and "measured up to 2,048 tokens" in carries.caveat
    assert {line.section for line in lines} == {"metrics", "requirements"}
    assert "Reasoning 0.74 (0.68 to 0.80, n = 192; guessing 0.32)" in by["What does it score?"].answer


def test_the_verdict_is_no_better_than_its_evidence(merged_reference, tmp_path):
    routing = recorded("routing")["verdict"] | {"passed": False, "n_differ": 7}
    boundary = recorded("long_context")["boundary"] | {
        "status": "floor",
        "tokens": 0,
        "low": None,
        "high": None,
    }
    changed = {
        "routing": {"verdict": routing},
        "long_context": {"boundary": boundary, "failure_boundary_tokens": 0},
        "generate": {"answers": []},
    }
    folder = make_run(tmp_path / "r", merged_reference, **changed)
    lines = report.verdict(report.build_report(folder, ask_llama_cpp=False)).lines
    assert [line.mark for line in lines] == ["no", "no", "no", "no", "yes", "no"]
    assert lines[1].answer == "No token was generated on the CPU.", "a cross begins with its reason"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"provisional": True, "n_haystacks": 6}, "provisional: 6 texts, fewer than 12"),
        ({"not_monotone": True, "first_crossing": 181}, "not monotone.*first crossing at 181"),
        ({"right_censored": True, "status": "right_censored", "high": None}, "or more, .*open above"),
        ({"status": "floor", "tokens": 0}, "no better than guessing"),
    ],
)
def test_flags_of_the_boundary_stand_wherever_it_stands(merged_reference, tmp_path, changes, words):
    boundary = recorded("long_context")["boundary"] | changes
    changed = {"boundary": boundary, "failure_boundary_tokens": boundary["tokens"]}
    folder = make_run(tmp_path / "r", merged_reference, long_context=changed)
    built = report.build_report(folder, ask_llama_cpp=False)
    hub = text.hub_form(built)
    is_bound = bool(changes.get("provisional") or changes.get("right_censored"))
    assert ("failure_boundary_tokens" in hub) == (not is_bound)
    if changes.get("right_censored"):
        own = [built["details"]["failure_boundary_tokens"], *built["conformance"]]
        assert own[0]["right_censored"] and own[0]["value"] == own[0]["tokens"]
        (row,) = (row["evidence"] for row in built["conformance"] if row["id"] == "metrics")
        for place in (row, markdown(built, folder).split("## The five metrics")[1]):
            assert f"at least {own[0]['tokens']:,} (not reached)" in place
    for place in (markdown(built, folder), str(report.verdict(built)), *([] if is_bound else [hub])):
        assert re.search(words, " ".join(place.split()), re.I), place


@pytest.mark.parametrize(
    ("declared", "told", "changes", "mark"),
    [
        (65536, 0, {}, "in part"),  # longer ones were not measured
        (600, 0, {}, "yes"),
        (65536, 600, {}, "yes"),
        (65536, 4096, {}, "in part"),  # the budget cut it
        (None, 0, {}, "in part"),
        (600, 0, {"provisional": True}, "in part"),
        (600, 0, {"right_censored": False, "status": "measured"}, "in part"),
        (600, 0, {"status": "floor", "right_censored": False}, "no"),
    ],
)
def test_a_context_that_carries_has_a_tick_only_where_the_whole_of_it_was_measured(
    made, declared, told, changes, mark
):
    """As much was measured in each case: to 512 tokens. How the run was started last has no part in it."""
    body = copy.deepcopy(made)
    body["model"]["context_length"], body["command"]["options"] = declared, ["-p", "longest=512"]
    body["details"]["context_stability_curve"] |= {"lengths": [256, 512], "longest": told}
    held = {"right_censored": True, "status": "right_censored", "high": None, "provisional": False}
    body["details"]["failure_boundary_tokens"] |= held | changes
    assert line_of(body, "How far").mark == mark


def test_the_default_length_of_the_nano_tier_is_nothing_that_anybody_asked_for(made):
    (path,) = workbook.find_notebooks(["05"])
    tier, longest = text.NANO_LONGEST
    assert workbook.declared_parameters(path)["longest"]["default"] == str(longest)
    body = copy.deepcopy(made)
    body["details"]["context_stability_curve"] |= {"lengths": [256, longest], "longest": longest}
    body["details"]["failure_boundary_tokens"] |= {"right_censored": True, "status": "right_censored"}
    for own, mark in ((tier, "in part"), ("standard", "yes")):
        assert line_of({**body, "tier": own}, "How far").mark == mark


# ---- the texts ----


def test_the_tier_follows_the_model_where_no_stage_has_one(merged_reference, tmp_path):
    """Without notebooks 05 and 06 a report of another model is no nano report."""
    without = ("scores", "long_context")
    shipped = make_run(tmp_path / "shipped", merged_reference, without=without)
    assert report.build_report(shipped, ask_llama_cpp=False)["tier"] == "nano"
    own = {
        name: {"conditions": {**recorded(name)["conditions"], "model": "a" * 64}}
        for name in ("header", "generate", "routing")
    }
    own["merge"] = {"model": {**recorded("merge")["model"], "sha256": "a" * 64}}
    folder = make_run(tmp_path / "own", merged_reference, without=without, **own)
    made = report.build_report(folder, ask_llama_cpp=False)
    assert made["tier"] == "standard" and "Nano tier" not in markdown(made, folder)


def test_each_guess_rate_is_named_and_each_length_is_shown(made, run):
    content = markdown(made, run)
    for whose in ("of nano-reasoning 0.317", "of nano-code 0.000", "of retrieval 0.167"):
        assert f"guess rate {whose}" in content
    curve = made["details"]["context_stability_curve"]
    assert text.retrieval(curve)["n"].tolist() == [row["n"] for row in curve["points"]]


def test_the_prediction_of_paging_stands_beside_the_measurement(made, run, merged_reference, tmp_path):
    paging = {
        "forecast: read from disk a token, with help": "900 MB, 2.00 s of it",
        "measured: seconds a token": "2.5 s, 2.1 s of it waiting",
    }
    folder = make_run(tmp_path / "r", merged_reference, generate={"paging": paging})
    paged = report.build_report(folder, ask_llama_cpp=False)
    for content in (markdown(paged, folder), page_of(paged, folder)):
        assert "forecast: read from disk a token, with help" in content and "at short contexts" in content
        assert all(value in content for value in paging.values())
    assert "predicted and measured" not in markdown(made, run)


def test_markdown_has_no_escaped_arrows_and_no_time_of_a_program(copied):
    stage = Stage(copied, "ladder")
    stage.finish(conditions={}, summary=["F16 -> Q8_0"])
    report.write_report(copied, report.read_report(copied))
    content = (copied / "report.md").read_text()
    assert "F16 -> Q8_0" in content and re.search(r"run nano, \d{4}-\d\d-\d\d, \d\d:\d\d UTC", content)


def test_a_version_stands_once_in_the_appendix(made, run):
    appendix = markdown(made, run).split("## Appendix: where it ran")[1]
    named = re.findall(r"^\| ([^|]+) \|", appendix, re.M)
    assert len(named) == len(set(named)) and "gguf" in named


def test_sections_sources_and_statements_are_linked(made, run):
    content = markdown(made, run)
    assert content.count("](#the-five-metrics)**") == 3
    assert "[card, Profiling](https://arishma108.github.io/drpersadh/merged.html#profiling)" in content
    assert "[paper](https://arishma108.github.io/drpersadh/dfqs.html), section 6.2, with MUST" in content


def test_nano_tier_says_so_on_the_first_line(written):
    assert "Nano tier" in (written / "report.md").read_text().splitlines()[0]
    assert "Nano tier" in (written / "model-index.yml").read_text().splitlines()[0]
    body = (written / "report.html").read_text().split("<body>")[1]
    assert "Nano tier" in body[:600]


def test_standard_tier_does_not(made, run):
    assert "Nano tier" not in markdown({**made, "tier": "standard"}, run)


def test_the_texts_open_with_the_verdict_and_have_every_requirement_and_statement(written):
    own = report.read_report(written)
    for name in ("report.md", "report.html"):
        content = (written / name).read_text()
        assert content.index("Which demands of DFQS are met?") < content.rindex("The five metrics")
        shown = report.tables(own)
        assert all(word in content for name in ("requirements", "claims") for word in shown[name]["verdict"])
    page = (written / "report.html").read_text()
    assert all(f'id="claim-{row["id"]}"' in page for row in own["claims"])
    rows = [line for line in (written / "report.md").read_text().splitlines() if line.startswith("| C")]
    assert len(rows) == sum(row["number"].startswith("C") for row in own["claims"])


def test_the_hub_parses_its_form(written):
    from huggingface_hub import ModelCard

    own = report.read_report(written)
    card = ModelCard(
        f"---\n{(written / 'model-index.yml').read_text()}---\n\n{(written / 'report.md').read_text()}"
    )
    assert card.data.model_name == own["model"]["name"]
    built = {entry.metric_name: entry.metric_value for entry in card.data.eval_results}
    wanted = {name: value for name, value in own["metrics"].items() if name != "context_stability_curve"}
    assert built == pytest.approx(wanted, rel=1e-5)
    sets = {entry.metric_name: entry.dataset_name for entry in card.data.eval_results}
    assert sets["code_score"].endswith("nano-code") and sets["reasoning_score"].endswith("nano-reasoning")
    speed = next(entry for entry in card.data.eval_results if entry.metric_name == "cpu_tokens_per_sec")
    assert speed.dataset_args["contended"] is True


class Parsed(HTMLParser):
    """What a page would fetch, where it links to, and its tags."""

    def __init__(self):
        super().__init__()
        self.fetched, self.links, self.tags, self.ids, self.handlers = [], [], [], set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name == "src" and value]
        self.links += [value for name, value in attributes if name == "href" and value]
        self.ids |= {value for name, value in attributes if name == "id"}
        self.handlers += [name for name, _ in attributes if name.startswith("on")]


def parsed(content: str) -> Parsed:
    page = Parsed()
    page.feed(content)
    return page


def test_page_is_one_file_without_scripts_that_fetches_nothing(written):
    content = (written / "report.html").read_text()
    page = parsed(content)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags) and not page.handlers
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.fetched)
    assert "default-src 'none'" in content and "url(" not in content
    anchors = {entry[1:] for entry in page.links if entry.startswith("#")}
    assert anchors and anchors <= page.ids
    rest = [entry for entry in page.links if not entry.startswith("#")]
    hosts = (
        "https://github.com/",
        "https://arxiv.org/",
        "https://huggingface.co/",
        "https://arishma108.github.io/",
        "https://www.nvidia.com/",
        "https://www.jedec.org/",
    )
    assert len(rest) > 20 and all(entry.startswith(hosts) for entry in rest)


def test_every_image_has_words_and_the_page_bends_to_small_dark_and_paper(written):
    content = (written / "report.html").read_text()
    assert all(alt for alt in re.findall(r'<img alt="([^"]*)"', content))
    assert (
        "prefers-color-scheme: dark" in content
        and "max-width: 700px" in content
        and "@media print" in content
    )


def test_no_number_of_seventeen_digits_is_shown(written):
    for name in ("report.md", "model-index.yml", "dfqs_report.json"):
        assert not re.search(r"\d\.\d{8,}", (written / name).read_text()), name
    page = re.sub(r"base64,[^\"]+", "", (written / "report.html").read_text())
    assert not re.search(r"\d\.\d{8,}", page) and "T1" not in page.split("<main>")[0]
    assert not re.search(r"\.0*[1-9]\d{10,}", (written / "report.json").read_text())
    assert not re.search(
        r"\d\.\d{8,}", " ".join(json.loads((written / "dfqs_report.json").read_text())["summary"])
    )


def test_every_verdict_on_what_fits_has_a_mark(made, run):
    page = page_of(made, run)
    words = {word for row in made["hardware_envelope"]["rows"] for word in row["fits"].values()}
    assert words and all(re.search(rf'class="mark \w+">. {word}<', page) for word in words)


def test_a_figure_that_is_missing_is_said(made, run):
    shown = {**made, "sources": {**made["sources"], "context_curve.png": "0" * 64}}
    with pytest.raises(DfqsError, match="figure is missing"):
        page_of(shown, run)


def test_a_report_that_cannot_be_drawn_leaves_the_one_before_as_it_was(copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    body = report.read_report(copied) | {"created": "2020-01-01T00:00:00+00:00"}
    body["sources"] = body["sources"] | {"context_curve.png": "0" * 64}
    with pytest.raises(DfqsError, match="the figure is missing"):
        report.write_report(copied, resealed(body))
    assert before == {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}


def test_a_run_of_one_notebook_counts_what_was_not_tested_and_limits_no_answer_that_is_not_there(
    merged_reference, tmp_path
):
    without = ("header", "generate", "routing", "long_context", "scores")
    folder = make_run(tmp_path / "r", merged_reference, without=without)
    built = report.build_report(folder, ask_llama_cpp=False)
    assert "How well" not in line_of(built, "Is the file").caveat
    caveat = line_of(built, "Which demands").caveat
    assert "; 10 are not tested" in caveat and caveat.count('"') == 2 and len(caveat) < 500


def test_names_of_others_run_no_script_and_make_no_headings_images_or_links(made, run):
    evil = copy.deepcopy(made)
    evil["model"] |= {"name": HOSTILE, "architecture": HOSTILE, "tensor_types": HOSTILE}
    evil["run"] = HOSTILE
    evil["machine"]["processor"] = HOSTILE
    evil["hardware_envelope"]["note"] = HOSTILE
    evil["conformance"][0]["evidence"] = HOSTILE
    evil["claims"][0]["source"] = HOSTILE
    page = page_of(evil, run)
    clean = parsed(page)
    assert not {"script", "h4"} & set(clean.tags) and not clean.handlers and "\x1b" not in page
    assert not clean.fetched and not [
        entry for entry in clean.links if "javascript" in entry or "127.0.0.1" in entry
    ]
    assert clean.tags.count("h1") == 1
    shown = markdown2html_mistune(markdown(evil, run))
    assert not [
        tag for tag in ("<script", "<img src=x", 'javascript:a"', '127.0.0.1:9/t.png"') if tag in shown
    ]
    assert "\x1b" not in markdown(evil, run) and parsed(shown).tags.count("h1") == 1
    assert "\x1b" not in text.hub_form(evil) and "\x1b" not in str(report.verdict(evil))


def test_nothing_measured_gives_no_model_index(merged_reference, tmp_path):
    folder = make_run(tmp_path / "r", merged_reference, without=("scores", "long_context"))
    built = report.build_report(folder, ask_llama_cpp=False)
    assert text.hub_form(built) == ""
    (folder / "model-index.yml").write_text("an earlier report's")
    names = {path.name for path in report.write_report(folder, built)}
    assert {"report.md", "report.html", "report.json"} <= names and "model-index.yml" not in names
    assert not (folder / "model-index.yml").exists(), (
        "one of an earlier report would state what this withholds"
    )


def test_the_machine_is_the_one_that_was_timed_wherever_the_report_is_written(merged_reference, tmp_path):
    timed = {"system": "Plan 9", "processor": "another", "usable cores": 1, "memory (GiB)": "8.0, 4.0 free"}
    line = "Measured on another: 1 core, 8.0 GiB of memory, Plan 9, no layer on a GPU"
    for number, (stage, *without) in {"06": ["scores"], "03": ["generate", "scores"]}.items():
        folder = make_run(tmp_path / number, merged_reference, without=without, **{stage: {"machine": timed}})
        built = report.build_report(folder, ask_llama_cpp=False)
        wanted = timed | {"on a GPU": "no layer", "recorded by": f"notebook {number}"}
        assert built["machine"] == wanted
        for shown in (str(report.verdict(built)), markdown(built, folder), page_of(built, folder)):
            assert shown.split("Is the file sound?")[0].count(line) == 1
    bare = make_run(tmp_path / "bare", merged_reference, without=("scores",))
    built = report.build_report(bare, ask_llama_cpp=False)
    assert built["machine"]["usable cores"] >= 1 and "No notebook recorded where" in markdown(built, bare)


def test_layers_on_a_card_stand_with_its_name_where_it_ran(merged_reference, tmp_path):
    built = on_a_card(tmp_path / "card", merged_reference)
    assert report.verdict(built).place.endswith("all layers on a GPU")
    built["machine"]["graphics cards"] = "NVIDIA H100"
    assert report.verdict(built).place.endswith("all layers on a GPU (NVIDIA H100)")


def test_a_report_that_states_nothing_of_its_machine_is_shown(made, run):
    """Reports of earlier versions stay readable."""
    for machine in ({}, dict.fromkeys(("processor", "usable cores", "memory (GiB)", "system"))):
        words = "Measured on an unknown processor: unknown cores, unknown GiB of memory, an unknown system"
        assert words in " ".join(markdown({**made, "machine": machine}, run).split())


def test_a_report_is_checked_by_reading_each_file_once_or_twice(copied, monkeypatch):
    read, own = [], core_files.sha256_of_file
    for module in (text, reading, sys.modules["dfqs_nb.core.stage"]):
        monkeypatch.setattr(module, "sha256_of_file", lambda path: read.append(path.name) or own(path))
    assert report.check_run(copied)
    answers = {"score_items.csv", "long_context_items.csv"}
    assert {name for name in read if read.count(name) > 1} <= answers


# ---- seals and checks ----


def test_check_counts_again_and_names_what_it_checked(copied, capsys):
    assert cli.main(["report", str(copied), "--check"]) == 0
    out = capsys.readouterr().out
    assert (
        "counted again from the answers: reasoning_score, code_score, context_stability_curve, "
        "failure_boundary_tokens\n" in out
    )
    assert "scores.json: as it was written" in out and "dfqs_report.json: as it was written" in out


@pytest.mark.parametrize(
    "name",
    [
        "report.html", "report.md", "report.json", "model-index.yml", "scores.json", "score_items.csv",
        "long_context_items.csv", "ladder.json", "ladder_table.csv", "serving_table.csv", "dfqs_report.json",
    ],
)  # fmt: skip
def test_a_change_of_any_file_is_noticed(copied, name, capsys):
    for beside in ("ladder", "serving"):
        stage = Stage(copied, beside)
        core_files.write_text(stage.path(f"{beside}_table.csv"), "1\n")
        stage.finish(conditions={}, summary=[f"{beside} found"])
    report.write_report(copied, report.read_report(copied))
    assert cli.main(["report", str(copied), "--check"]) == 0
    path = copied / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert cli.main(["report", str(copied), "--check"]) == 1
    assert re.search("run|again", capsys.readouterr().err)
    path.unlink()
    assert cli.main(["report", str(copied), "--check"]) == 1


def test_what_ladder_and_serving_found_is_shown(copied):
    stage = Stage(copied, "ladder")
    stage.finish(conditions={}, summary=["Q4 loses <b>nothing</b>"])
    report.write_report(copied, report.read_report(copied))
    assert "Q4 loses &lt;b&gt;nothing&lt;/b&gt;" in (copied / "report.html").read_text()
    source = {"name": "other*F16.gguf", "is_original": False}
    stage.finish(conditions={}, summary=["long"], shown=[{"rung": "<Q4>"}], notes=["one step"], source=source)
    report.write_report(copied, report.read_report(copied))
    page, text = ((copied / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "&lt;Q4&gt;" in page and "one step" in page and "long</li>" not in page
    assert r"other\*F16.gguf, which does not have the name" in text
    assert report.check_run(copied)


@pytest.mark.parametrize("wrong", [{"summary": 5}, {"left_out": "x"}, {"left_out": [1]}])
def test_a_stage_beside_the_metrics_with_fields_of_another_type_is_refused(copied, wrong):
    """Whoever hands a run on can seal anything."""
    content = {"stage": "ladder", "files": {}} | wrong
    core_files.write_json(copied / "ladder.json", content | {"seal": core_files.canonical_sha256(content)})
    body = report.read_report(copied)
    for reader in (report.check_run, lambda folder: report.write_report(folder, body)):
        with pytest.raises(DfqsError, match=r"ladder.json: (summary|left_out).*run 08_"):
            reader(copied)


def test_a_text_of_a_report_that_is_gone_or_no_text_is_refused(copied):
    for change in (lambda path: path.write_bytes(b"\xff"), lambda path: path.unlink()):
        report.write_report(copied, report.read_report(copied))
        change(copied / "report.md")
        with pytest.raises(DfqsError, match=r"report.md"):
            report.check_run(copied)


def test_twelve_lines_of_forgery_are_refused(copied):
    """Hashes and seals made right again: the answers do not give the number."""
    body = json.loads((copied / "report.json").read_text())
    body["metrics"]["reasoning_score"] = body["details"]["reasoning_score"]["value"] = 0.992
    body["details"]["reasoning_score"] |= {"low": 0.97, "high": 1.0}
    report.write_report(copied, resealed(body))
    with pytest.raises(DfqsError, match="its items give reasoning_score value"):
        report.check_run(copied)


# ---- a report that anybody may have written, and a reader who knows nothing of this package ----


OPEN = ("conditions", "sources", "machine", "versions", "routing")  # whatever stands in these is shown


def places(value, path=()):
    """Every place of a report; of a list, and of what is open, only the first entry."""
    yield path
    inner = list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, item in (
        inner[:1] if isinstance(value, list) or path[:1] in [(name,) for name in OPEN] else inner
    ):
        yield from places(item, (*path, key))


def test_a_report_with_a_right_hash_and_any_field_gone_or_of_another_type_is_read_or_refused_by_name(
    made, run
):
    """Nothing ends in a KeyError: the schema names the field, or the texts do without it."""
    small = json.loads(json.dumps(made))
    for part in (small, small["hardware_envelope"]):
        part |= {key: value[:2] for key, value in part.items() if isinstance(value, list)}
    changes, refused = itertools.cycle(("gone", None, [], {}, "words")), 0
    for path in [path for path in places(small) if path and path[0] != "integrity"]:
        forged, change = json.loads(json.dumps(small)), next(changes)
        at = forged
        for step in path[:-1]:
            at = at[step]
        if change == "gone":
            del at[path[-1]]
        else:
            at[path[-1]] = change
        digest = core_files.canonical_sha256(forged.get("conditions"))
        forged = resealed({**forged, "conditions_sha256": digest})
        try:
            reading.check_report(forged, run)
            report.verdict(forged), markdown(forged, run)
        except DfqsError as error:
            assert "schema at $" in str(error) or "contradicts itself" in str(error), path
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda body: body["hardware_envelope"].update(model={}), "$.hardware_envelope"),
        (lambda body: body["claims"][0].update(document="a blog"), "$.claims[0].document"),
        (lambda body: body.update(conformance=[]), "$.conformance"),
    ],
)
def test_a_forged_report_is_refused_by_the_name_of_the_field(copied, change, named, capsys):
    body = json.loads((copied / "report.json").read_text())
    change(body)
    core_files.write_json(copied / "report.json", resealed(body))
    assert cli.main(["report", str(copied), "--check"]) == 1
    error = capsys.readouterr().err
    assert named in " ".join(error.split()) and "unexpected" not in error


def test_a_reader_finds_units_terms_and_no_name_of_the_programs_own(written):
    own, content = report.read_report(written), (written / "report.md").read_text()
    page = (written / "report.html").read_text()
    words = re.findall(r"^- \*\*(.+?)\*\*:", content.split("## Glossary")[1].split("## Appendix")[0], re.M)
    assert "KV cache" in words and all(f"<dt>{word}</dt>" in page for word in words)
    assert "kB, MB and GB are 10^3, 10^6 and 10^9 bytes" in content
    verdict, ids = content.split("## The five metrics")[0], {row["id"] for row in own["conformance"]}
    assert not [name for name in ids if "-" in name and name in verdict]
    prose = re.sub(r"\]\([^)]*\)|`[^`]*`", "", content)
    assert not re.findall(r"\d%", prose) and re.search(r"\d %", prose)


def test_a_speed_says_what_its_range_is_and_a_boundary_at_how_many_lengths(made):
    shown, detail = report.tables(made)["metrics"]["value"], made["details"]["context_stability_curve"]
    assert "lowest to highest of" in shown["cpu_tokens_per_sec"]
    assert "lowest to highest of" in report.verdict(made).lines[1].answer
    n = sum(row["n"] for row in detail["points"])
    assert f"{n} answers at {len(detail['points'])} lengths" in shown["failure_boundary_tokens"]


# ---- what a newcomer read wrongly ----


def line_of(body: dict, question: str) -> text.Line:
    return next(line for line in report.verdict(body).lines if line.question.startswith(question))


def test_a_contended_speed_is_no_headline_and_the_command_that_repeats_it_runs_as_pasted(made):
    alone = copy.deepcopy(made)
    del alone["details"]["cpu_tokens_per_sec"]["notebook_03"]
    line = line_of(alone, "Does it run")
    assert made["details"]["cpu_tokens_per_sec"]["contended"] and line.mark == "in part"
    assert line.answer.startswith("It runs, but how fast is not known: contended, it decoded ")
    (command,) = re.findall(r"`dfqs-nb ([^`]+)`", line.caveat)
    name, *arguments = command.split()
    assert [name, *arguments] == ["run", "06", "07", "--run", made["run"]]
    assert cli.program().commands[name].make_context(name, arguments)
    quiet = alone
    quiet["details"]["cpu_tokens_per_sec"]["contended"] = False
    line = line_of(quiet, "Does it run")
    assert line.mark == "yes" and line.answer[0].isdigit() and "dfqs-nb" not in line.caveat


def test_a_contended_speed_gives_way_to_a_quiet_one_of_notebook_03(merged_reference, tmp_path):
    for is_busy in (False, True):
        rows = [row | {"contended": is_busy} for row in recorded("generate")["speed"]]
        folder = make_run(tmp_path / str(is_busy), merged_reference, generate={"speed": rows})
        built = report.build_report(folder, ask_llama_cpp=False)
        line, detail = line_of(built, "Does it run"), built["details"]["cpu_tokens_per_sec"]
        assert detail["contended"] and detail["value"] and ("notebook_03" in detail) is not is_busy
        assert line.mark == ("in part" if is_busy else "yes") and ("is not known" in line.answer) is is_busy
        assert ("notebook 03 timed" in markdown(built, folder)) is not is_busy
        assert "`dfqs-nb run 06 07 " in line.caveat
    folder = make_run(
        tmp_path / "quiet",
        merged_reference,
        generate={"speed": [row | {"contended": False} for row in rows]},
        scores={"speeds": [row | {"contended": False} for row in recorded("scores")["speeds"]]},
    )
    built = report.build_report(folder, ask_llama_cpp=False)
    detail = built["details"]["cpu_tokens_per_sec"]
    assert "notebook_03" not in detail and "notebook 03 timed" in markdown(built, folder), "both are given"
    assert "notebook 03" not in line_of(built, "Does it run").answer


def test_a_value_of_the_curve_that_is_cut_at_1_does_not_look_certain(made):
    """The intervals are not cut: of 24 questions nobody knows that all are right."""
    low = copy.deepcopy(made)
    points = [(256, 15, 0.625, 0.427, 0.788), (512, 19, 0.792, 0.595, 0.908)]
    points = [
        dict(zip(("length", "correct", "accuracy", "low", "high"), it, strict=True), n=24, texts=4)
        for it in points
    ]
    points[1] |= {"curve": 1.0, "curve_low": 0.84, "curve_high": 1.79}
    value = [1.0, 1.0]
    low["details"]["context_stability_curve"] |= {"lengths": [256, 512], "points": points, "value": value}
    shown = report.tables(low)["metrics"].loc["context_stability_curve", "value"]
    assert "1.00 at 256 (accuracy 0.62 [0.43 to 0.79], 24 answers in 4 texts)" in shown
    table = text.retrieval(low["details"]["context_stability_curve"])
    assert table["curve [95 % interval]"].tolist() == ["", "1.00 [0.84 to 1.79]"]
    assert "1.00 at 512 [0.84 to 1.79] (accuracy 0.79 [0.59 to 0.91], 24 answers in 4 texts)" in shown


def test_the_accuracy_that_the_curve_is_relative_to_and_how_far_was_measured_stand_in_the_verdict(made):
    line, first = line_of(made, "How far"), made["details"]["context_stability_curve"]["points"][0]
    assert f"Relative to an accuracy of {first['accuracy']:.2f} ({first['low']:.2f} to " in line.caveat
    assert f", {first['n']} answers) at {first['length']} tokens" in line.caveat
    longest = max(made["details"]["context_stability_curve"]["lengths"])
    assert f"measured up to {longest:,} tokens. The header declares 65,536 tokens" in line.caveat


@pytest.mark.parametrize(("right", "mark"), [(0.9, "in part"), (0.25, "no")])
def test_multiple_choice_stands_in_the_verdict_and_counts_where_writing_fails(
    merged_reference, tmp_path, right, mark
):
    """A base model may write no answer in the form that is asked for, and still know it."""
    nothing = {"value": 0.01, "low": 0.0, "high": 0.05}
    scores = [score | nothing | {"guess_rate": 0.1} for score in recorded("scores")["scores"]]
    choices = scores[0] | {"name": "choice_score", "set": "nano-reasoning-choices", "guess_rate": 0.25}
    choices |= {"n": 80, "value": right, "low": right - 0.1, "high": right + 0.1}
    conditions = recorded("scores")["conditions"]
    conditions |= {choices["set"]: conditions["nano-reasoning"]}
    changed = {"scores": [choices, *scores], "conditions": conditions}
    folder = make_run(tmp_path / "r", merged_reference, scores=changed)
    line = line_of(report.build_report(folder, ask_llama_cpp=False), "What does it score")
    assert line.mark == mark and f"multiple choice {right:.2f} (" in line.answer
    assert "n = 80; guessing 0.25)" in line.answer


def test_a_tick_is_explained_only_where_one_stands(made):
    assert "a tick means" in line_of(made, "What does it score").caveat.lower()
    few = copy.deepcopy(made)
    for name in ("reasoning_score", "code_score"):
        few["details"][name] |= {"n": 2, "value": 0.0, "low": 0.0, "high": 0.66}
    line = line_of(few, "What does it score")
    assert line.mark == "unknown" and "tick" not in line.caveat and "Too few questions" in line.caveat


def test_a_score_that_cannot_be_guessed_stands_without_a_mark(made):
    """One right program of 96 would be a tick, as any is better than none."""
    body = copy.deepcopy(made)
    body["details"]["code_score"] |= {"n": 96, "value": 1 / 96, "low": 0.0018, "high": 0.057, "guess_rate": 0}
    guessed = {"n": 96, "value": 0.1, "low": 0.05, "high": 0.18, "guess_rate": 0.1}
    body["details"]["reasoning_score"] |= guessed
    line = line_of(body, "What does it score")
    assert line.mark == "no" and "code 0.01 (0.00 to 0.06, n = 96)" in line.answer
    assert "nano-code cannot be guessed and has no part in the mark" in line.caveat
    body["details"]["reasoning_score"] |= {"value": 0.5, "low": 0.4, "high": 0.6}
    assert line_of(body, "What does it score").mark == "yes"
