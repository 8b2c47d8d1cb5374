"""The requirements of DFQS 1.0: judged by what a run recorded, each way."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
from gguf_fixtures import Spec, field, gguf_bytes, real_size_header
from sealed_run import recorded

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import REPOSITORY
from dfqs_nb.core.stage import NOTEBOOKS, LeftOut
from dfqs_nb.gguf.broken import reference_shards
from dfqs_nb.gguf.header import read_header
from dfqs_nb.report import requirements
from dfqs_nb.report.metrics import details_of
from dfqs_nb.report.reading import DRAWN_ON, checked
from dfqs_nb.report.requirements import MET, NOT_APPLICABLE, NOT_MET, NOT_TESTED, check_requirements
from dfqs_nb.report.template import sentence, spec_table


def run_stages() -> dict[str, Any]:
    """The stages of a nano run, as notebooks 01 to 06 write them."""
    return {name: copy.deepcopy(recorded(name)) for name in DRAWN_ON}


@pytest.fixture(scope="module")
def header(merged_reference):
    return read_header(merged_reference)


def judged(stages: dict, header=None, metrics: dict | None = None):
    run = checked(stages)
    measured = {name: detail["value"] for name, detail in details_of(run).items()}
    return check_requirements(run, header, metrics or measured).set_index("id")


def changed(stage: str, *path: str | int, to) -> dict:
    """The run with one value of one stage changed."""
    stages = run_stages()
    at = stages[stage]
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = to
    return stages


def without(facts: dict, name: str) -> dict:
    """The facts but one."""
    return {key: value for key, value in facts.items() if key != name}


def point(length: int) -> dict:
    """A length of a curve."""
    return {"length": length, "n": 15, "accuracy": 0.9, "low": 0.7, "high": 1.0}


def test_the_reference_run_meets_every_demand_but_the_long_contexts_that_it_does_not_measure(header):
    table = judged(run_stages(), header)
    assert table.loc["long-context-analysis", "verdict"] == NOT_TESTED
    assert (table[table["level"] != "MAY"].drop("long-context-analysis")["verdict"] == MET).all()
    assert table.loc["beyond-64k", "verdict"] == NOT_MET
    assert table.loc["gpu", "verdict"] == NOT_MET
    counted = sentence("demands_counted", table.to_dict("records"))
    assert counted.endswith("MAY: 0 of 2 used") and counted.count("not met") == 0


def test_each_level_of_the_specification_is_there_and_each_check_is_used():
    listed = spec_table("requirements")["requirements"]
    levels = [row["level"] for row in listed]
    assert levels.count("SHALL") == 4 and set(levels) == {"SHALL", "SHOULD", "MAY", "MUST", "condition"}
    assert {row["check"] for row in listed} == set(requirements.CHECKS)
    assert len({row["id"] for row in listed}) == len(listed)


def test_every_requirement_names_notebooks_that_exist():
    for row in spec_table("requirements")["requirements"]:
        for name in row["notebook"].split(", "):
            assert (REPOSITORY / "notebooks" / name).is_file()


def test_without_stages_nothing_is_tested_and_no_metric_is_reported():
    table = judged({})
    assert table.loc["metrics", "verdict"] == NOT_MET
    assert table.loc["metrics", "evidence"].startswith("withheld: reasoning_score, code_score, ")
    table = table.drop("metrics")
    assert set(table["verdict"]) == {NOT_TESTED}
    assert (
        table["evidence"]
        .str.contains(r"did not run; `dfqs-nb run .*07 --run RUN` makes up for it|header: unknown tokens")
        .all()
    )


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("merge", ["single-file"]),
        ("generate", ["single-file", "cpu-constrained", "llama-cpp", "gpu"]),
        ("routing", ["routing-deterministic", "reproducible"]),
        ("long_context", ["long-context-analysis", "identical-conditions"]),
        ("scores", ["identical-conditions", "cpu-baseline", "prompt-sets"]),
    ],
)
def test_a_missing_stage_leaves_its_requirements_untested(header, stage, names):
    stages = run_stages()
    del stages[stage]
    table = judged(stages, header)
    assert set(table.loc[names, "verdict"]) == {NOT_TESTED}
    assert table.loc[names, "evidence"].str.contains(f"notebook.* {NOTEBOOKS[stage][:2]} ").all()


@pytest.mark.parametrize(
    ("name", "stages", "verdict", "evidence"),
    [
        ("single-file", changed("generate", "conditions", "model", to="0" * 64), NOT_TESTED, "not the file"),
        ("single-file", changed("generate", "answers", to=[{"tokens": 0}]), NOT_MET, "no token"),
        (
            "cpu-constrained",
            changed("generate", "conditions", "n_gpu_layers", to=-1),
            NOT_TESTED,
            "notebook 03 put all layers on a GPU (n_gpu_layers -1), and 3 of 3 prompts got text",
        ),
        ("cpu-constrained", changed("generate", "answers", to=[]), NOT_MET, "no token"),
        ("routing-deterministic", changed("routing", "verdict", "passed", to=False), NOT_MET, "of 12,288"),
        (
            "routing-deterministic",
            changed("routing", "verdict", "failed_runs", to=["decode: died"]),
            NOT_TESTED,
            "decode: died",
        ),
        (
            "routing-deterministic",
            changed("routing", "verdict", "routed", to=False),
            NOT_APPLICABLE,
            "no experts",
        ),
        ("llama-cpp", changed("generate", "conditions", "runtime", to="vLLM 1"), NOT_TESTED, "vLLM"),
        ("long-context-analysis", changed("long_context", "curve", to=[]), NOT_MET, "no length"),
        ("gpu", changed("generate", "conditions", "n_gpu_layers", to=35), MET, "35 layers on a GPU"),
        ("gpu", changed("generate", "conditions", "offloaded_layers", to=0), NOT_MET, "no layer was on a"),
        ("metrics", changed("scores", "scores", 1, "value", to=None), NOT_MET, "withheld: code_score;"),
        ("metrics", changed("scores", "cpu_tokens_per_sec", to=float("nan")), NOT_MET, "cpu_tokens_per_sec"),
        (
            "metrics",
            changed("long_context", "context_stability_curve", to=[1.0, None]),
            NOT_MET,
            "withheld: context_stability_curve;",
        ),
        (
            "identical-conditions",
            changed("scores", "conditions", "n_threads", to=2),
            NOT_MET,
            "n_threads (1 and 2)",
        ),
        ("identical-conditions", changed("scores", "conditions", "type_k", to="q8_0"), NOT_MET, "type_k"),
        ("identical-conditions", changed("scores", "speeds", 0, "n_threads", to=2), NOT_MET, "of the speed"),
        ("identical-conditions", changed("scores", "conditions", "model", to="0" * 64), NOT_MET, "model"),
        (
            "cpu-baseline",
            changed("scores", "conditions", "n_gpu_layers", to=9),
            NOT_TESTED,
            "notebook 06 put 9 layers on a GPU (n_gpu_layers 9)",
        ),
        (
            "cpu-baseline",
            changed("long_context", "conditions", "n_gpu_layers", to=9),
            MET,
            "conditions of the curve",
        ),
        ("runtime", changed("scores", "conditions", "runtime", to="vLLM 1"), NOT_MET, "vLLM 1"),
        (
            "prompt-sets",
            changed("long_context", "conditions", "prompt_set_sha256", to=""),
            NOT_MET,
            "1 of 3 sets",
        ),
        ("reproducible", changed("scores", "conditions", "seed", to=7), NOT_MET, "seeds 42, 7"),
        (
            "reproducible",
            changed("scores", "conditions", "nano-code", "sampling", to={"temperature": 0.7}),
            NOT_MET,
            "temperature of 0.7",
        ),
        ("reproducible", changed("routing", "verdict", "same_output", to=False), NOT_MET, "answers differ"),
    ],
)
def test_each_requirement_is_judged_both_ways(header, name, stages, verdict, evidence):
    row = judged(stages, header).loc[name]
    assert row["verdict"] == verdict
    assert evidence in row["evidence"]


def test_without_a_load_the_demand_on_loads_is_open_and_a_difference_alone_fails_it(header):
    alone = changed("routing", "verdict", "load_passed", to=None)
    row = judged(alone, header).loc["routing-deterministic"]
    assert row["verdict"] == NOT_TESTED and row["evidence"].startswith("no load was measured")
    alone["routing"]["verdict"] |= {"passed": False, "n_differ": 3}
    assert judged(alone, header).loc["routing-deterministic", "verdict"] == NOT_MET


def test_a_dense_header_decides_though_notebook_04_did_not_run(header):
    dense = dataclasses.replace(header, tensors=tuple(t for t in header.tensors if "_exps." not in t.name))
    stages = run_stages()
    del stages["routing"]
    row = judged(stages, dense).loc["routing-deterministic"]
    assert row["verdict"] == NOT_APPLICABLE and "dense" in row["evidence"]
    moved = changed("routing", "verdict", "load_sentence", to="0 of 8 greedy answers change.")
    moved["routing"]["verdict"] |= {"routed": False, "load_passed": None}
    row = judged(moved, dense).loc["routing-deterministic"]
    assert (
        row["verdict"] == NOT_APPLICABLE and "no routing; notebook 04 says: 0 of 8 greedy" in row["evidence"]
    )
    assert not row["evidence"].endswith("."), "sentences that quote it end it"
    assert sentence("demands_counted", judged(stages, dense).to_dict("records")).startswith(
        "SHALL: 3 of 4 met, 1 not applicable"
    )


def test_answers_are_counted_in_tokens_and_what_was_cut_is_named(header):
    evidence = judged(run_stages(), header).loc["cpu-constrained", "evidence"]
    assert evidence.endswith("3 of 3 prompts got text (17, 96, 18 tokens; 1 was cut off at 96 tokens)")
    cut = changed("generate", "answers", to=[{"tokens": 2, "finish_reason": "length"}] * 3)
    cut["generate"]["left_out"] = [LeftOut("2 tokens of an answer in place of 96")._asdict()]
    evidence = judged(cut, header).loc["cpu-constrained", "evidence"]
    assert (
        "3 were cut off at 2 tokens, because the budget allowed only 2 tokens of an answer in place of 96"
        in evidence
    )
    late = [{"tokens": n, "finish_reason": "time"} for n in (5, 0)]
    evidence = judged(changed("generate", "answers", to=late), header).loc["cpu-constrained", "evidence"]
    assert evidence.endswith(
        "1 of 2 prompts got text (5 tokens); the time ran out for 2 answers (1 with text, 1 without)"
    )
    nothing = changed("generate", "answers", to=late[1:])
    assert judged(nothing, header).loc["cpu-constrained", "verdict"] == NOT_TESTED, "no failure of the model"


def test_no_repetition_leaves_reproducibility_untested(header):
    row = judged(changed("routing", "verdict", "n_runs", to=0), header).loc["reproducible"]
    assert row["verdict"] == NOT_TESTED and row["evidence"] == "no repetition ran"


@pytest.mark.parametrize(
    ("longest", "declared", "verdict", "words"),
    [
        (4096, 32768, NOT_TESTED, "measured up to 4,096 tokens only (declared by the header: 32,768)"),
        (
            8192,
            32768,
            MET,
            "measured up to 8,192 tokens (declared by the header: 32,768; named by the paper: 8,192 to",
        ),
        (65536, 65536, MET, "measured up to 65,536 tokens"),
        (2048, 2048, MET, "measured up to 2,048 tokens (declared by the header: 2,048"),  # all that there is
        (4096, None, NOT_TESTED, "declared by the header: unknown"),
    ],
)
def test_the_demand_on_long_contexts_is_judged_by_the_lengths_that_were_measured(
    tmp_path, longest, declared, verdict, words
):
    keys = [field("general.architecture", "STRING", "llama")]
    keys += [field("llama.context_length", "UINT32", declared)] if declared else []
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(keys, [Spec("token_embd.weight", "F32", (64, 64))]))
    stages = changed("long_context", "curve", to=[point(n) for n in (256, longest)])
    row = judged(stages, read_header(tmp_path / "m.gguf")).loc["long-context-analysis"]
    assert row["verdict"] == verdict and words in row["evidence"]
    assert ("was not measured" in row["evidence"]) == (verdict == NOT_TESTED)


def test_context_beyond_64k_is_declared_by_the_real_shape_and_met_only_when_measured(tmp_path):
    flash = read_header(real_size_header(tmp_path / "flash.gguf"))
    row = judged(run_stages(), flash).loc["beyond-64k"]
    assert row["verdict"] == NOT_TESTED and "1,048,576" in row["evidence"]
    far = changed("long_context", "curve", to=[point(131072)])
    assert judged(far, flash).loc["beyond-64k", "verdict"] == MET


def test_one_shard_is_not_a_single_file(tmp_path):
    row = judged(run_stages(), reference_shards().headers[0]).loc["single-file"]
    assert row["verdict"] == NOT_MET and "one of 2 shards" in row["evidence"]


def test_metrics_of_a_report_go_before_those_of_the_stages(header):
    withheld = dict.fromkeys(spec_table("requirements")["metrics"])
    assert judged(run_stages(), header, metrics=withheld).loc["metrics", "verdict"] == NOT_MET


@pytest.mark.parametrize("names", requirements.MEASURED.values())
def test_conditions_of_metrics_that_were_not_measured_are_not_tested(header, names):
    known = {name: 1 for group in requirements.MEASURED.values() for name in group if name not in names}
    known["cpu_tokens_per_sec"] = 1.0  # a speed is no score
    table = judged(run_stages(), header, metrics=dict.fromkeys(spec_table("requirements")["metrics"]) | known)
    rows = table.loc[["identical-conditions", "cpu-baseline", "runtime", "prompt-sets", "reproducible"]]
    assert set(rows["verdict"]) == {NOT_TESTED}
    assert rows["evidence"].str.startswith("not measured: the ").all()


def test_a_setting_that_a_stage_does_not_state_is_not_tested_and_named(header):
    stages = run_stages()
    del stages["scores"]["conditions"]["flash_attn"]
    row = judged(stages, header).loc["identical-conditions"]
    assert row["verdict"] == NOT_TESTED and "does not state flash_attn" in row["evidence"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            changed("long_context", "failure_boundary_tokens", to=296.5),
            "failure_boundary_tokens: .*integer.*",
        ),
        (changed("scores", "scores", 0, "value", to="0.5"), r"scores\[0\].value: .*number.*"),
        (changed("routing", "verdict", to={"passed": True}), "verdict: 'routed' is a required property"),
        (
            changed("routing", "verdict", to=without(recorded("routing")["verdict"], "load_sentence")),
            "verdict: 'load_sentence' is a dependency of 'load_passed'",
        ),
        (changed("generate", "answers", to=[{}]), r"answers\[0\]: 'tokens' is a required property"),
        (changed("routing", "claims", to=[{"status": "x"}]), r"claims\[0\]: 'claim' is a required property"),
    ],
)
def test_a_field_of_another_type_is_an_error_with_its_name_and_notebook_not_a_verdict(stages, message):
    with pytest.raises(DfqsError, match=f"{message}; run 0"):
        checked(stages)


def test_what_is_counted_is_listed(header):
    """Settings by name, planned and added lengths with their answers: a reader can count them again."""
    table = judged(run_stages(), header)
    evidence = table.loc["identical-conditions", "evidence"]
    n, names = re.search(r"share the model and (\d+) settings: (.*?)\. ", evidence).groups()
    assert (
        int(n) == len(names.split(", ")) and "the curve and boundary" in evidence and "the speed" in evidence
    )
    context = recorded("long_context")
    added = context.get("refined") or [point(1448)]
    with_added = changed("long_context", "refined", to=added)
    evidence = judged(with_added, header).loc["long-context-analysis", "evidence"]
    rows = [*context["curve"], *added]
    assert f"{sum(row['n'] for row in rows)} answers at {len(rows)} lengths" in evidence


def test_levels_are_those_of_the_text():
    levels = {row["id"]: row["level"] for row in spec_table("requirements")["requirements"]}
    assert levels["metrics"] == "SHALL" and levels["identical-conditions"] == "MUST"
    assert {levels[name] for name in ("cpu-baseline", "runtime", "prompt-sets")} == {"condition"}


def test_repeated_runs_are_counted_with_their_processes(header):
    stages = changed("routing", "verdict", "load_passed", to=None)
    evidence = judged(stages, header).loc["routing-deterministic", "evidence"]
    assert "in 0 of 36 repetitions (processes: 2; " in evidence and "bound" not in evidence
    evidence = judged(run_stages(), header).loc["routing-deterministic", "evidence"]
    assert evidence.endswith("differ, in 0 of 36 runs (processes: 2)") and evidence.count("bound") == 1


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("routing", "n_ctx", "1024"),
        ("scores", "seed", 1e308),
        ("scores", "nano-reasoning", {"prompt_set": 3}),
        ("scores", "nano-reasoning", {"sampling": {"temperature": "hot"}}),
        ("scores", "nano-code", ["x"]),
        ("long_context", "prompt_set_sha256", None),
    ],
)
def test_a_condition_of_another_type_is_refused_with_its_stage_and_field(stage, key, value):
    with pytest.raises(DfqsError, match="conditions") as caught:
        checked(changed(stage, "conditions", key, to=value))
    assert f"{stage}.json" in str(caught.value) and "\n" not in caught.value.what
