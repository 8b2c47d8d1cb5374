"""The report: what it holds, what it withholds, and every kind of input that it refuses."""

from __future__ import annotations

import copy
import json
import re
import shutil
from html.parser import HTMLParser

import jsonschema
import pytest
from sealed_run import make_run, recorded

from dfqs_nb.core import figures as plots
from dfqs_nb.core import files as core_files
from dfqs_nb.core import stage as core_stage
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.journal import Journal
from dfqs_nb.report import figures as report_figures
from dfqs_nb.report import metrics as report
from dfqs_nb.report import stages as report_files
from dfqs_nb.report import text as report_text
from dfqs_nb.report.stages import ReportError
from dfqs_nb.workbook import cli

METRICS = {
    "reasoning_score": float,
    "code_score": float,
    "context_stability_curve": list,
    "cpu_tokens_per_sec": float,
    "failure_boundary_tokens": int,
}


@pytest.fixture(scope="module")
def run(merged_reference, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "nano", merged_reference)


@pytest.fixture(scope="module")
def made(run):
    return report.build_report(run, ask_llama_cpp=False)


@pytest.fixture
def own(run, tmp_path):
    return shutil.copytree(run, tmp_path / "own")


def resealed(body: dict) -> dict:
    body = {key: value for key, value in body.items() if key != "integrity"}
    return {**body, "integrity": {"sha256": core_files.canonical_sha256(body)}}


# ---- what it holds ----


def test_exactly_the_required_metrics_with_the_types_that_the_specification_names(made):
    assert {name: type(value) for name, value in made["metrics"].items()} == METRICS
    assert all(type(one) is float for one in made["metrics"]["context_stability_curve"])


def test_metrics_are_those_of_the_stages(made):
    scores, context = recorded("scores"), recorded("long_context")
    assert [made["metrics"][one["name"]] for one in scores["scores"]] == [
        one["value"] for one in scores["scores"]
    ]
    assert made["metrics"]["cpu_tokens_per_sec"] == scores["cpu_tokens_per_sec"]
    assert made["metrics"]["failure_boundary_tokens"] == context["boundary"]["tokens"]
    assert made["details"]["context_stability_curve"]["lengths"] == [
        row["length"] for row in context["curve"]
    ]


def test_conditions_hash_ignores_which_model_it_was(run, made, merged_reference, tmp_path):
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


def test_conditions_hash_changes_with_a_setting(made, merged_reference, tmp_path):
    scores = recorded("scores")
    scores["conditions"]["n_threads"] = 2
    other = make_run(tmp_path / "other", merged_reference, scores=scores)
    found = report.build_report(other, ask_llama_cpp=False)
    assert found["conditions_sha256"] != made["conditions_sha256"]
    verdicts = {row["id"]: row["verdict"] for row in found["conformance"]}
    assert verdicts["identical-conditions"] == "not met"


def test_written_report_reads_back_equal_and_follows_the_published_schema(made, own):
    path = report.write_report(own, made)
    assert report.read_report(own) == report.read_report(path) == json.loads(json.dumps(made))
    jsonschema.Draft202012Validator.check_schema(report.schema())
    jsonschema.validate(made, report.schema())


def test_its_sources_are_the_stages_and_their_files(made, own):
    assert {"scores.json", "scores_table.csv", "routing.json"} <= set(made["sources"])
    report.check_sources(made, own)
    (own / "scores_table.csv").write_text("other")
    with pytest.raises(ReportError, match="was changed since the report was written"):
        report.check_sources(made, own)


# ---- what it withholds ----


@pytest.mark.parametrize(
    "stage, metrics",
    [
        ("scores", ["reasoning_score", "code_score", "cpu_tokens_per_sec"]),
        ("long_context", ["context_stability_curve", "failure_boundary_tokens"]),
        ("routing", []),
        ("generate", []),
        ("header", []),
    ],
)
def test_missing_stage_withholds_its_metrics_and_names_its_notebook(
    stage, metrics, merged_reference, tmp_path
):
    found = report.build_report(
        make_run(tmp_path / "r", merged_reference, without=(stage,)), ask_llama_cpp=False
    )
    assert [name for name, value in found["metrics"].items() if value is None] == metrics
    for name in metrics:
        assert report_files.STAGES[stage] in found["details"][name]["withheld"]
    jsonschema.validate(found, report.schema())
    assert report.sentences(found)


def test_partial_score_is_withheld_and_says_how_many_are_missing(merged_reference, tmp_path):
    scores = recorded("scores")["scores"]
    scores[0] |= {"value": None, "low": None, "high": None, "n_missing": 3}
    found = report.build_report(
        make_run(tmp_path / "r", merged_reference, scores={"scores": scores}), ask_llama_cpp=False
    )
    assert found["metrics"]["reasoning_score"] is None and found["metrics"]["code_score"] is not None
    assert found["details"]["reasoning_score"]["withheld"] == "3 of 128 items lack a result"


def test_code_that_was_never_run_is_withheld(merged_reference, tmp_path):
    changed = {"scores": recorded("scores")["scores"][:1], "sandbox": "none"}
    found = report.build_report(
        make_run(tmp_path / "r", merged_reference, scores=changed), ask_llama_cpp=False
    )
    assert "without a sandbox" in found["details"]["code_score"]["withheld"]


def test_nan_is_withheld_not_written(merged_reference, tmp_path):
    changed = {"context_stability_curve": [1.0, float("nan")]}
    found = report.build_report(
        make_run(tmp_path / "r", merged_reference, long_context=changed), ask_llama_cpp=False
    )
    assert found["metrics"]["context_stability_curve"] is None
    assert "NaN" not in json.dumps(found)


def test_speed_on_a_gpu_is_no_cpu_speed(merged_reference, tmp_path):
    conditions = {**recorded("scores")["conditions"], "n_gpu_layers": 9}
    found = report.build_report(
        make_run(tmp_path / "r", merged_reference, scores={"conditions": conditions}), ask_llama_cpp=False
    )
    assert found["details"]["cpu_tokens_per_sec"]["withheld"] == "layers were on a GPU"


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
        ("scores.json", lambda c: c.pop("seal"), "no seal"),
        ("scores.json", lambda c: c.update(stage="header"), "not the stage 'scores'"),
    ],
)
def test_edited_stage_is_refused_by_name(name, change, refusal, own):
    edit(own / name, change)
    with pytest.raises(ReportError, match=refusal) as error:
        report.build_report(own, ask_llama_cpp=False)
    assert name in str(error.value) and "run 0" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"stage": "scores", "x": NaN}', "\x00"])
def test_stage_that_is_cut_or_foreign_is_refused(text, own):
    (own / "scores.json").write_text(text)
    with pytest.raises(ReportError, match=r"scores\.json.*run 06"):
        report.build_report(own, ask_llama_cpp=False)


def test_edited_or_missing_table_is_refused(own):
    (own / "long_context_table.csv").write_text("stage\nbetter\n")
    with pytest.raises(ReportError, match="long_context_table.csv: was changed after long_context.json"):
        report_files.read_stages(own)
    (own / "long_context_table.csv").unlink()
    with pytest.raises(ReportError, match="is missing"):
        report_files.read_stages(own)


def test_stages_of_two_models_are_refused(merged_reference, tmp_path):
    conditions = {**recorded("scores")["conditions"], "model": "b" * 64}
    run = make_run(tmp_path / "r", merged_reference, scores={"conditions": conditions})
    with pytest.raises(ReportError, match="another model"):
        report_files.read_stages(run)


def test_mixed_tiers_are_refused(merged_reference, tmp_path):
    run = make_run(tmp_path / "r", merged_reference, scores={"tier": "standard"})
    with pytest.raises(ReportError, match="long_context is nano, scores is standard"):
        report_files.read_stages(run)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ReportError, match="has no run.*01_merge_shards"):
        report_files.read_stages(tmp_path)


def test_model_that_is_gone_or_another_is_refused(merged_reference, tmp_path):
    model = tmp_path / "m.gguf"
    run = make_run(tmp_path / "r", model)
    with pytest.raises(ReportError, match="is gone"):
        report.build_report(run)
    shutil.copy(merged_reference, model)
    with model.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ReportError, match="not the model of this run"):
        report.build_report(run)


def test_edited_report_is_refused_on_reading(made, own):
    path = report.write_report(own, made)
    edit(path, lambda c: c["metrics"].update(code_score=1.0))
    with pytest.raises(ReportError, match="edited after it was written"):
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
    with pytest.raises(ReportError, match=f"schema at .*{where}"):
        report.write_report(own, resealed(wrong))
    assert not (own / report.FILE).exists()


def test_conditions_that_do_not_have_their_hash_are_refused(made, own):
    wrong = copy.deepcopy(made)
    wrong["conditions"]["scores"]["n_threads"] = 64
    with pytest.raises(ReportError, match="conditions do not have the hash"):
        report.write_report(own, resealed(wrong))


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"model": 1}'])
def test_foreign_report_is_refused(text, tmp_path):
    (tmp_path / report.FILE).write_text(text)
    with pytest.raises(ReportError):
        report.read_report(tmp_path)


def test_no_report_is_refused_with_what_to_run(tmp_path):
    with pytest.raises(ReportError, match="there is no report.*07_write_dfqs_report"):
        report.read_report(tmp_path)


# ---- the texts ----


@pytest.fixture(scope="module")
def texts(made, run, tmp_path_factory):
    folder = shutil.copytree(run, tmp_path_factory.mktemp("texts") / "nano")
    plots.save(report_figures.report_shares(report.shares(made)), folder / "report_shares.png")
    full = report.with_figures(made, folder, ["report_shares.png"])
    report.write_report(folder, full)
    return {
        path.name: path.read_text() for path in report_text.write_texts(folder, report.read_report(folder))
    }


def test_nano_tier_says_so_on_the_first_line(texts):
    assert "Nano tier" in texts["report.md"].splitlines()[0]
    assert "Nano tier" in texts["model-index.yml"].splitlines()[0]
    assert (
        re.sub(r"<[^>]+>|\s+", " ", texts["report.html"].split("<body>")[1]).strip().startswith("Nano tier")
    )


def test_standard_tier_does_not(made):
    assert report_text.markdown({**made, "tier": "standard"}).startswith("# DFQS report")


def test_markdown_has_every_requirement_and_statement(made, texts):
    for row in (*made["conformance"], *made["claims"]):
        assert row["verdict"] in texts["report.md"]
    assert texts["report.md"].count("\n| ") > len(made["conformance"]) + len(made["claims"])
    for name in METRICS:
        assert f"| {name} | " in texts["report.md"]


def test_the_hub_parses_the_model_index(made, texts):
    from huggingface_hub import ModelCard

    card = ModelCard(f"---\n{texts['model-index.yml']}---\n\n{texts['report.md']}")
    assert card.data.model_name == made["model"]["name"]
    found = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert found == {name: made["metrics"][name] for name in METRICS if name != "context_stability_curve"}
    sets = {one.metric_name: one.dataset_name for one in card.data.eval_results}
    assert sets["code_score"].endswith("nano-code") and sets["reasoning_score"].endswith("nano-reasoning")


class Fetched(HTMLParser):
    """What a page would fetch, and whether it holds code."""

    def __init__(self):
        super().__init__()
        self.fetched, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") and value]


def test_page_is_one_file_without_scripts_that_fetches_nothing(texts):
    page = Fetched()
    page.feed(texts["report.html"])
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert page.fetched and all(one.startswith("data:image/png;base64,") for one in page.fetched)
    assert "url(" not in texts["report.html"] and "In [" not in texts["report.html"]


def test_figure_outside_the_hashes_is_not_shown(made, run):
    assert "![" not in report_text.markdown(made, ["somewhere_else.png"])
    with pytest.raises(ReportError, match="figure is missing"):
        report_text.page("![x](report_shares.png)", run, "t")


def test_markup_in_a_model_name_does_not_reach_the_page(made, tmp_path):
    evil = copy.deepcopy(made)
    evil["model"]["name"] = "<script>alert(1)</script>"
    page = report_text.page(report_text.markdown(evil), tmp_path, evil["model"]["name"])
    assert "<script" not in page


def test_nothing_measured_gives_no_model_index(merged_reference, tmp_path):
    run = make_run(tmp_path / "r", merged_reference, without=("scores", "long_context"))
    found = report.build_report(run, ask_llama_cpp=False)
    with pytest.raises(ReportError, match="nothing for a model card"):
        report_text.model_index(found)
    report.write_report(run, found)
    assert [path.name for path in report_text.write_texts(run, found)] == ["report.md", "report.html"]


def test_model_index_of_an_earlier_report_does_not_outlive_its_metrics(made, merged_reference, tmp_path):
    run = make_run(tmp_path / "r", merged_reference, without=("scores", "long_context"))
    (run / "model-index.yml").write_text("an earlier report's")
    report_text.write_texts(run, report.build_report(run, ask_llama_cpp=False))
    assert not (run / "model-index.yml").exists()


def test_the_machine_is_the_one_that_was_timed_wherever_the_report_is_written(merged_reference, tmp_path):
    timed = {"system": "Plan 9", "processor": "another"}
    run = make_run(tmp_path / "r", merged_reference, scores={"machine": timed})
    assert report.build_report(run, ask_llama_cpp=False)["machine"] == timed
    bare = make_run(tmp_path / "bare", merged_reference, without=("scores",))
    assert report.build_report(bare, ask_llama_cpp=False)["machine"]["usable cores"] >= 1


# ---- the seal ----


@pytest.mark.parametrize("backwards", [False, True])
def test_the_edit_that_is_shown_is_the_same_in_whatever_order_a_folder_lists_its_files(
    own, backwards, monkeypatch
):
    """Notebook 07 prints it, and its stored output is compared; what is large beside the run is not copied."""
    (own / "ladder").mkdir()
    (own / "ladder" / "reference.npy").write_bytes(b"large")
    listed, copied, copy_file = type(own).glob, [], shutil.copyfile
    monkeypatch.setattr(type(own), "glob", lambda self, what: sorted(listed(self, what), reverse=backwards))
    monkeypatch.setattr(
        shutil, "copyfile", lambda a, b, **more: copied.append(a.name) or copy_file(a, b, **more)
    )
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    assert report_files.refusal_of_an_edit(own) == "scores.json was edited after it was written"
    assert copied == ["scores_table.csv"]
    assert before == {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}


def test_check_looks_at_the_stages_beside_the_report_too(own, made, capsys):
    report.write_report(own, made)
    for name in report_files.BESIDE:
        with core_files.whole_file(own / f"{name}_table.csv") as file:
            file.write("1")
        core_stage.write_stage(own, name, conditions={}, summary=[])
    assert cli.main(["report", str(own), "--check"]) == 0
    assert "ladder.json: as it was written" in capsys.readouterr().out
    (own / "serving_table.csv").write_text("2")
    assert cli.main(["report", str(own), "--check"]) == 1
    assert "09_serve_and_deploy.ipynb" in capsys.readouterr().err
    edited = json.loads((own / "ladder.json").read_text()) | {"tier": "standard"}
    (own / "ladder.json").write_text(json.dumps(edited))
    with pytest.raises(ReportError, match="was edited"):
        report_files.check_beside(own)


def test_seal_covers_files_written_since_the_stage_before(tmp_path):
    with core_files.whole_file(tmp_path / "a.csv") as file:
        file.write("1")
    core_stage.write_stage(tmp_path, "one", conditions={}, summary=[])
    Journal(tmp_path / "b.jsonl", {}).add("x", value=1)
    core_stage.write_stage(tmp_path, "two", conditions={}, summary=[])
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (list(first["files"]), list(second["files"])) == (["a.csv"], ["b.jsonl"])


def test_resumed_journal_is_sealed_though_nothing_was_added(tmp_path):
    Journal(tmp_path / "b.jsonl", {}).add("x", value=1)
    core_stage.write_stage(tmp_path, "one", conditions={}, summary=[])
    Journal(tmp_path / "b.jsonl", {})
    core_stage.write_stage(tmp_path, "one", conditions={}, summary=[])
    assert list(json.loads((tmp_path / "one.json").read_text())["files"]) == ["b.jsonl"]


def test_report_errors_are_the_package_s_own():
    assert issubclass(ReportError, DfqsError)
