"""The requirements of DFQS 1.0: judged by what a run recorded, each way."""

from __future__ import annotations

import copy

import pytest
from gguf_fixtures import real_size_header

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import REPOSITORY
from dfqs_nb.gguf.header import read_header
from dfqs_nb.report import requirements as conformance
from dfqs_nb.report.envelope import Machine, read_spec
from dfqs_nb.report.requirements import MET, NOT_MET, NOT_TESTED, check_requirements

SHA = "0dc12b40e0e59466e22488ede8dc71875af6be9d5d3de73693a14d0f5fd0159e"
HERE = Machine(32 * 10**9, 30 * 10**9, 100 * 10**9)
SETTINGS = {
    "runtime": "llama-cpp-python 0.3.36",
    "system_info": "CPU : AVX2 = 1",
    "n_ctx": 1024,
    "n_batch": 512,
    "n_ubatch": 512,
    "n_threads": 1,
    "n_threads_batch": 1,
    "n_gpu_layers": 0,
    "seed": 42,
    "flash_attn": False,
    "type_k": "f16",
    "type_v": "f16",
    "use_mmap": True,
    "use_extra_bufts": False,
    "swa_full": False,
}


def run_stages() -> dict:
    """The stages of a nano run, as notebooks 01 to 06 write them."""
    scored = {
        "prompt_set": "nano-code",
        "prompt_set_sha256": "e7d9a2c5" * 8,
        "tier": "nano",
        "sampling": {"temperature": 0.0, "seed": 42},
    } | SETTINGS
    return copy.deepcopy(
        {
            "merge": {
                "conditions": {"model": "dfqs-nano-iq1_s-xl"},
                "tensors": 126,
                "model": {"name": "DFQS-Nano-IQ1_S-XL", "nbytes": 5753024, "sha256": SHA},
            },
            "generate": {
                "conditions": SETTINGS | {"model": SHA},
                "answers": [{"prompt": "What is the capital of France?", "tokens": 14}],
            },
            "routing": {
                "conditions": SETTINGS | {"model": SHA, "n_ctx": 512},
                "verdict": {
                    "passed": True,
                    "routed": True,
                    "n_tokens": 384,
                    "n_layers": 3,
                    "n_runs": 4,
                    "n_choices": 4608,
                    "n_differ": 0,
                    "upper_bound": 0.00065,
                    "logits_equal": 1.0,
                    "same_output": True,
                    "failed_runs": [],
                },
            },
            "long_context": {
                "conditions": SETTINGS
                | {"n_ctx": 1088, "prompt_set": "long-context-nano", "prompt_set_sha256": "5ccc6a30" * 8},
                "model": {"sha256": SHA},
                "tier": "nano",
                "context_stability_curve": [1.0, 0.23],
                "failure_boundary_tokens": 296,
                "curve": [{"length": 64, "n": 15}, {"length": 1024, "n": 15}],
                "boundary": {"tokens": 296, "right_censored": False, "cause": "quality"},
            },
            "scores": {
                "conditions": SETTINGS | {"model": SHA, "nano-code": scored, "nano-reasoning": scored},
                "tier": "nano",
                "cpu_tokens_per_sec": 424.97,
                "scores": [
                    {"name": "reasoning_score", "set": "nano-reasoning", "value": 0.539},
                    {"name": "code_score", "set": "nano-code", "value": 0.578},
                ],
            },
        }
    )


@pytest.fixture(scope="module")
def header(merged_reference):
    return read_header(merged_reference)


def judged(stages: dict, header=None, **options):
    return check_requirements(stages, header, machine=HERE, **options).set_index("id")


def changed(stage: str, *path: str | int, to) -> dict:
    """The run with one value of one stage changed."""
    stages = run_stages()
    at = stages[stage]
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = to
    return stages


def test_the_reference_run_meets_every_shall_should_and_must(header):
    table = judged(run_stages(), header)
    assert (table.loc[table["level"] != "MAY", "verdict"] == MET).all()
    assert table.loc["beyond-64k", "verdict"] == NOT_MET
    assert table.loc["gpu", "verdict"] == NOT_TESTED


def test_each_level_of_the_specification_is_there_and_each_check_is_used():
    listed = read_spec("requirements")["requirements"]
    assert [one["level"] for one in listed if one["level"] == "SHALL"] == ["SHALL"] * 3
    assert {one["level"] for one in listed} == {"SHALL", "SHOULD", "MAY", "MUST"}
    assert {one["check"] for one in listed} == set(conformance.CHECKS)
    assert len({one["id"] for one in listed}) == len(listed)


def test_every_requirement_names_notebooks_that_exist():
    for one in read_spec("requirements")["requirements"]:
        for name in one["notebook"].split(", "):
            assert (REPOSITORY / "notebooks" / name).is_file()


def test_without_stages_nothing_is_tested():
    table = judged({})
    assert set(table["verdict"]) == {NOT_TESTED}
    assert table["evidence"].str.contains("this run has no stage|no context length").all()


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("merge", ["single-file"]),
        ("generate", ["single-file", "cpu-constrained", "llama-cpp", "gpu"]),
        ("routing", ["routing-deterministic", "reproducible"]),
        ("long_context", ["long-context-analysis", "metrics", "identical-conditions"]),
        ("scores", ["metrics", "identical-conditions", "cpu-baseline", "prompt-sets"]),
    ],
)
def test_a_missing_stage_leaves_its_requirements_untested(header, stage, names):
    stages = run_stages()
    del stages[stage]
    table = judged(stages, header)
    assert set(table.loc[names, "verdict"]) == {NOT_TESTED}
    assert table.loc[names, "evidence"].str.contains(stage).all()


@pytest.mark.parametrize(
    ("name", "stages", "verdict", "evidence"),
    [
        ("single-file", changed("generate", "conditions", "model", to="0" * 64), NOT_TESTED, "not the file"),
        ("single-file", changed("generate", "answers", to=[{"tokens": 0}]), NOT_MET, "no token"),
        ("cpu-constrained", changed("generate", "conditions", "n_gpu_layers", to=-1), NOT_TESTED, "GPU"),
        ("cpu-constrained", changed("generate", "answers", to=[]), NOT_MET, "no token"),
        ("routing-deterministic", changed("routing", "verdict", "passed", to=False), NOT_MET, "of 4,608"),
        (
            "routing-deterministic",
            changed("routing", "verdict", "failed_runs", to=["decode: died"]),
            NOT_TESTED,
            "decode: died",
        ),
        (
            "routing-deterministic",
            changed("routing", "verdict", "routed", to=False),
            MET,
            "no routed experts",
        ),
        ("llama-cpp", changed("generate", "conditions", "runtime", to="vLLM 1"), NOT_TESTED, "vLLM"),
        ("long-context-analysis", changed("long_context", "curve", to=[]), NOT_MET, "no length"),
        ("gpu", changed("generate", "conditions", "n_gpu_layers", to=35), MET, "35"),
        ("metrics", changed("scores", "scores", 1, "value", to=None), NOT_MET, "code_score is withheld"),
        ("metrics", changed("scores", "scores", 0, "value", to=1), NOT_MET, "reasoning_score is no float"),
        ("metrics", changed("scores", "cpu_tokens_per_sec", to=float("nan")), NOT_MET, "cpu_tokens_per_sec"),
        ("metrics", changed("long_context", "failure_boundary_tokens", to=296.5), NOT_MET, "is no int"),
        ("metrics", changed("long_context", "context_stability_curve", to=[1, 0]), NOT_MET, "list"),
        (
            "identical-conditions",
            changed("scores", "conditions", "n_threads", to=2),
            NOT_MET,
            "n_threads (1 and 2)",
        ),
        ("identical-conditions", changed("scores", "conditions", "type_k", to="q8_0"), NOT_MET, "type_k"),
        ("identical-conditions", changed("scores", "conditions", "model", to="0" * 64), NOT_MET, "model"),
        ("cpu-baseline", changed("scores", "conditions", "n_gpu_layers", to=9), NOT_MET, "n_gpu_layers 9"),
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
        ("reproducible", changed("scores", "conditions", "seed", to=7), NOT_MET, "seeds 7, 42"),
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


def test_the_lengths_reached_are_stated(header):
    near = judged(run_stages(), header).loc["long-context-analysis", "evidence"]
    assert "64 to 1,024 tokens" in near and "were not reached in the nano tier" in near
    reach = changed("long_context", "curve", to=[{"length": n, "n": 15} for n in (256, 8192, 65536)])
    reach["long_context"]["tier"] = "standard"
    assert "were covered (standard tier)" in judged(reach, header).loc["long-context-analysis", "evidence"]


def test_context_beyond_64k_is_declared_by_the_real_shape_and_met_only_when_measured(tmp_path):
    flash = read_header(real_size_header(tmp_path / "flash.gguf"))
    row = judged(run_stages(), flash).loc["beyond-64k"]
    assert row["verdict"] == NOT_TESTED and "1,048,576" in row["evidence"]
    far = changed("long_context", "curve", to=[{"length": 131072, "n": 15}])
    assert judged(far, flash).loc["beyond-64k", "verdict"] == MET


def test_a_model_larger_than_memory_still_meets_cpu_operation_and_says_that_it_pages(tmp_path):
    flash = read_header(real_size_header(tmp_path / "flash.gguf"))
    row = judged(run_stages(), flash).loc["cpu-constrained"]
    assert row["verdict"] == MET
    assert "of 32.00 GB of memory: weights partly read from the disk" in row["evidence"]


def test_one_shard_is_not_a_single_file(tmp_path):
    from dfqs_nb.gguf.broken import reference_shards

    row = judged(run_stages(), reference_shards().headers[0]).loc["single-file"]
    assert row["verdict"] == NOT_MET and "one of 2 shards" in row["evidence"]


def test_metrics_of_a_report_go_before_those_of_the_stages(header):
    withheld = dict.fromkeys(read_spec("requirements")["metrics"])
    assert judged(run_stages(), header, metrics=withheld).loc["metrics", "verdict"] == NOT_MET


def test_a_stage_that_lacks_a_field_is_not_tested_and_named(header):
    stages = run_stages()
    del stages["scores"]["conditions"]["flash_attn"]
    row = judged(stages, header).loc["identical-conditions"]
    assert row["verdict"] == NOT_TESTED and "flash_attn" in row["evidence"]


def test_an_unknown_check_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(conformance, "CHECKS", {})
    with pytest.raises(DfqsError, match="no check is called 'single_file'"):
        judged({})
