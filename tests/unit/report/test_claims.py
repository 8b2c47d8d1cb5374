"""The statements about the artifact: judged about it alone, by its own header where it is there, and able to fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf_fixtures
import pytest

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf import facts as header_facts
from dfqs_nb.gguf.broken import with_field
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.models import registered
from dfqs_nb.report import claims
from dfqs_nb.report.claims import (
    CONFIRMED,
    CONTRADICTED,
    CONTRADICTS_ITSELF,
    NOT_CHECKABLE,
    NOT_TESTABLE,
    Claim,
    artifact_match,
    check_claims,
)

SINGLE = registered()["deepseek-v4-flash-iq1_s-xl-single"].files[0]


@pytest.fixture(scope="module")
def artifact_file(tmp_path_factory) -> Path:
    return gguf_fixtures.real_size_header(tmp_path_factory.mktemp("artifact") / "artifact.gguf")


@pytest.fixture(scope="module")
def artifact(artifact_file):
    return read_header(artifact_file)


def changed(path: Path, folder: Path, key: str, value: int):
    """The artifact's header with one integer of its metadata changed; the file stays sparse."""
    other = folder / "changed.gguf"
    with path.open("rb") as source, other.open("wb") as target:
        target.write(source.read(read_header(path).data_offset))
        target.truncate(path.stat().st_size)
    field = read_header(path).fields[f"deepseek4.{key}"]
    with other.open("r+b") as file:
        file.seek(field.value_start)
        file.write(value.to_bytes(4, "little"))
    return read_header(other)


def run_stages(**parts) -> dict:
    """The stages of a nano run, as the notebooks write them; other ``parts`` replace a stage."""
    stages = {
        "merge": {"model": {"name": "DFQS-Nano-IQ1_S-XL", "nbytes": 5753024, "sha256": "0dc12b40" * 8}},
        "routing": {
            "claims": [
                {"claim": "routing stable", "status": "contradicted", "evidence": "97.66% of expert sets"},
                {"claim": "deterministic execution", "status": "confirmed", "evidence": "0 of 4,608 choices"},
                {
                    "claim": "routing variance grows under extreme token pressure",
                    "status": "not testable here",
                    "evidence": "384 tokens",
                },
            ]
        },
        "long_context": {"curve": curve((64, 1.0), (512, 0.6), (1024, 0.2), n=15)},
        "scores": {
            "tier": "nano",
            "cpu_tokens_per_sec": 425.0,
            "scores": [score("nano-code", 0.58, 0.46, 0.69, 64)],
        },
    }
    return stages | parts


def score(name: str, value: float, low: float, high: float, n: int) -> dict:
    return {
        "name": "code_score",
        "set": name,
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "n_missing": 0,
    }


def curve(*points: tuple[int, float], n: int) -> list[dict]:
    margin = n**-0.5
    return [
        {
            "length": length,
            "accuracy": share,
            "low": max(0, share - margin),
            "high": min(1, share + margin),
            "n": n,
        }
        for length, share in points
    ]


@pytest.fixture(scope="module")
def nano_table(merged_reference):
    return check_claims(run_stages(), read_header(merged_reference)).set_index("id")


@pytest.fixture(scope="module")
def own_table(artifact):
    return check_claims({}, artifact).set_index("id")


def verdict_of(name: str, stages: dict | None = None, header=None, **changes) -> str:
    """The verdict on one statement, with some of its fields changed."""
    listed = [dataclasses.replace(one, **changes) if one.id == name else one for one in claims.load_claims()]
    table = check_claims(stages or {}, header, claims=listed, ask_llama_cpp=False).set_index("id")
    return table.loc[name, "verdict"]


# ---- the table itself ----


def test_every_statement_gets_one_row_with_a_verdict_and_evidence_and_a_public_source(nano_table):
    listed = claims.load_claims()
    assert list(nano_table.index) == [one.id for one in listed]
    assert set(nano_table["verdict"]) <= set(claims.VERDICTS)
    assert nano_table[["how", "found", "evidence", "source"]].map(len).gt(3).all(axis=None)
    assert set(nano_table["document"]) <= set(claims.documents())


def test_ids_are_unique_and_every_check_is_used():
    listed = claims.load_claims()
    assert len({one.id for one in listed}) == len(listed) > 40
    assert {one.check for one in listed} == set(claims.CHECKS)


def test_nothing_in_the_table_names_a_path_of_this_machine(nano_table):
    text = nano_table.to_csv()
    assert "/home/" not in text and "/tmp" not in text and "nan" not in text.replace("DFQS-Nano", "").lower()


def test_an_unknown_check_is_refused_by_name():
    with pytest.raises(DfqsError, match="no check is called 'guess'"):
        check_claims({}, claims=[Claim("x", "card", "", "guess", "")])


def test_counts_add_up(nano_table):
    assert claims.counts(nano_table).startswith(f"{len(nano_table)} statements: ")


# ---- which model it is ----


def test_the_reference_model_is_another_model_though_its_architecture_is_the_same(merged_reference):
    header = read_header(merged_reference)
    assert header.architecture == "deepseek4"
    assert artifact_match(header, {}).level == "another"


def test_the_artifact_is_known_by_its_shape_types_and_size(artifact):
    assert artifact_match(artifact, {}).level == "artifact"


def test_the_artifact_is_known_by_its_hash_whatever_its_size(artifact):
    smaller = dataclasses.replace(artifact, file_size=artifact.file_size // 2)
    assert artifact_match(smaller, {}).level == "model"
    assert (
        artifact_match(smaller, {"merge": {"model": {"sha256": SINGLE.sha256}}}).reason
        == "SHA-256 of the file"
    )


def test_a_hash_alone_is_not_enough_where_the_header_is_of_another_model(merged_reference):
    stages = {"merge": {"model": {"sha256": SINGLE.sha256}}}
    assert artifact_match(read_header(merged_reference), stages).level == "another"


def test_another_quantization_is_judged_by_its_header_for_shapes_only(artifact):
    smaller = dataclasses.replace(artifact, file_size=artifact.file_size // 2)
    table = check_claims(run_stages(), smaller, ask_llama_cpp=False).set_index("id")
    assert "another quantization" in table.loc["top-2", "evidence"]
    assert table.loc["iq1_s", "verdict"] == table.loc["humaneval", "verdict"] == NOT_TESTABLE


def test_a_single_shard_is_not_taken_for_the_model(tmp_path):
    first, _ = gguf_fixtures.real_size_shards(tmp_path / "artifact")
    assert artifact_match(read_header(first), {}).level == "another"


# ---- the real artifact's shape: its own header is the evidence, and decides ----


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("top-2", CONTRADICTED),
        ("experts", CONFIRMED),
        ("context", CONFIRMED),
        ("parameters", CONFIRMED),
        ("active-parameters", CONFIRMED),
        ("iq1_s", CONFIRMED),
        ("k-quant", CONTRADICTED),
        ("kv-8k", CONTRADICTED),
        ("kv-1m", CONTRADICTED),
        ("offload-3090", CONTRADICTED),
    ],
)
def test_the_artifacts_own_header_decides(own_table, name, verdict):
    assert own_table.loc[name, "verdict"] == verdict


def test_top_2_is_contradicted_by_the_header_itself(own_table):
    row = own_table.loc["top-2"]
    assert row["found"] == "6 experts a token"
    assert "the file's own header" in row["evidence"]
    assert "with 2 it would be 8.94 billion" in row["evidence"]


@pytest.mark.parametrize(
    ("key", "value", "name", "verdict"),
    [
        ("expert_used_count", 2, "top-2", CONFIRMED),
        ("expert_used_count", 2, "active-parameters", CONTRADICTED),
        ("expert_count", 128, "experts", CONTRADICTED),
        ("context_length", 65536, "context", CONTRADICTED),
    ],
)
def test_a_header_changed_the_other_way_turns_the_verdict(artifact_file, tmp_path, key, value, name, verdict):
    header = changed(artifact_file, tmp_path, key, value)
    assert artifact_match(header, {}).level == "artifact"
    assert verdict_of(name, {}, header) == verdict


def test_without_tensors_of_iq1_s_the_quantization_is_contradicted(artifact):
    others = tuple(dataclasses.replace(t, type="Q2_K") if t.type == "IQ1_S" else t for t in artifact.tensors)
    header = dataclasses.replace(artifact, tensors=others)
    stages = {"merge": {"model": {"sha256": SINGLE.sha256, "nbytes": SINGLE.size_bytes}}}
    assert verdict_of("iq1_s", stages, header) == CONTRADICTED


def test_measurements_of_the_artifact_count_as_evidence(artifact):
    stages = run_stages(
        scores={
            "tier": "standard",
            "cpu_tokens_per_sec": 0.4,
            "scores": [score("standard-code", 0.66, 0.58, 0.73, 164)],
        }
    )
    table = check_claims(stages, artifact, ask_llama_cpp=False).set_index("id")
    assert table.loc["humaneval", "verdict"] == CONFIRMED
    assert table.loc["speed-cpu", "verdict"] == CONFIRMED
    assert table.loc["routing-stable", "verdict"] == CONTRADICTED
    assert table.loc["deterministic", "verdict"] == CONFIRMED


def test_measurements_of_the_artifact_can_contradict(artifact):
    stages = run_stages(
        scores={
            "tier": "standard",
            "cpu_tokens_per_sec": 6.2,
            "scores": [score("standard-code", 0.31, 0.24, 0.38, 164)],
        }
    )
    table = check_claims(stages, artifact, ask_llama_cpp=False).set_index("id")
    assert table.loc["humaneval", "verdict"] == table.loc["speed-cpu", "verdict"] == CONTRADICTED


def test_an_incomplete_or_a_nano_score_of_the_artifact_judges_nothing(artifact):
    partial = score("standard-code", 0.66, 0.58, 0.73, 164) | {"n_missing": 3}
    for scores in ([partial], [score("nano-code", 0.68, 0.6, 0.7, 64)]):
        stages = run_stages(scores={"tier": "nano", "scores": scores})
        assert verdict_of("humaneval", stages, artifact) == NOT_TESTABLE


def test_a_stage_that_lacks_a_field_is_no_evidence(artifact):
    stages = run_stages(scores={"tier": "standard", "scores": [{"set": "standard-code", "value": 0.7}]})
    table = check_claims(stages, artifact, ask_llama_cpp=False).set_index("id")
    assert table.loc["humaneval", "verdict"] == NOT_TESTABLE
    assert "what a stage recorded lacks 'low'" in table.loc["humaneval", "evidence"]
    assert table["evidence"].str.contains("a stage recorded lacks").sum() == 1


def test_gradual_degradation_is_told_from_a_sudden_fall_and_from_none(artifact):
    gentle = curve((4096, 0.9), (8192, 0.8), (16384, 0.7), (32768, 0.6), (65536, 0.5), n=100)
    cliff = curve((4096, 0.9), (8192, 0.9), (16384, 0.2), n=100)
    flat = curve((4096, 0.9), (8192, 0.9), n=100)
    found = [
        verdict_of("gradual", run_stages(long_context={"curve": rows}), artifact)
        for rows in (gentle, cliff, flat)
    ]
    assert found == [CONFIRMED, CONTRADICTED, NOT_TESTABLE]


# ---- another model in the run: the public record, and no borrowed measurements ----


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("size-card", CONTRADICTS_ITSELF),
        ("size-dfqs", CONFIRMED),
        ("original-size", CONTRADICTED),
        ("compression-ratio", CONTRADICTED),
        ("storage-reduction", CONTRADICTED),
        ("merged", CONTRADICTED),
        ("sha256", CONFIRMED),
        ("loads", CONTRADICTED),
        ("top-2", CONTRADICTED),
        ("storage-minimum", CONTRADICTED),
        ("ram", CONFIRMED),
        ("h100-memory-8k", CONTRADICTED),
        ("downloads", NOT_CHECKABLE),
    ],
)
def test_the_public_record_decides_what_needs_no_run(nano_table, name, verdict):
    assert nano_table.loc[name, "verdict"] == verdict


def test_the_reference_models_two_experts_do_not_confirm_top_2(nano_table, merged_reference):
    assert header_facts.experts(read_header(merged_reference)).used == 2
    assert nano_table.loc["top-2", "verdict"] == CONTRADICTED
    assert "published configuration" in nano_table.loc["top-2", "evidence"]


@pytest.mark.parametrize(
    "name", ["humaneval", "speed-cpu", "routing-stable", "deterministic", "gradual", "iq1_s"]
)
def test_measurements_of_another_model_judge_nothing_about_the_artifact(nano_table, name):
    assert nano_table.loc[name, "verdict"] == NOT_TESTABLE
    if name != "iq1_s":
        assert "not the artifact" in nano_table.loc[name, "evidence"]


def test_a_perfect_score_of_the_reference_model_changes_nothing(merged_reference):
    stages = run_stages(
        scores={
            "tier": "standard",
            "cpu_tokens_per_sec": 0.3,
            "scores": [score("standard-code", 0.68, 0.6, 0.75, 164)],
        }
    )
    header = read_header(merged_reference)
    assert verdict_of("humaneval", stages, header) == verdict_of("speed-cpu", stages, header) == NOT_TESTABLE


def test_the_public_record_alone_gives_a_full_table():
    table = check_claims({}, ask_llama_cpp=False)
    assert len(table) == len(claims.load_claims())
    assert "the artifact was not run" in set(table["evidence"])


# ---- facts computed here, by a second way ----


def test_the_units_of_the_two_sizes(nano_table):
    assert nano_table.loc["size-card", "found"] == "61,540,805,344 bytes = 61.54 GB = 57.31 GiB"
    assert "57.3 GB here and 61.6 GB in DFQS 1.0" in nano_table.loc["size-card", "evidence"]


def test_the_published_counts_are_those_of_the_published_shapes(artifact):
    published = claims.read_spec("claims")["published"]
    count = header_facts.parameters(artifact)
    assert (count.total, count.active, count.routed) == tuple(
        published[key] for key in ("parameters", "active_parameters", "routed_parameters")
    )
    assert published["all_tensors"] == len(artifact.tensors)


def test_header_and_public_record_agree_about_the_cache(own_table, nano_table):
    for name in ("kv-8k", "kv-1m"):
        assert own_table.loc[name, "found"] == nano_table.loc[name, "found"]


def test_llama_cpp_itself_refuses_shards_put_end_to_end(nano_table):
    assert nano_table.loc["loads", "found"] == "refused"
    assert "invalid split file name" in nano_table.loc["loads", "evidence"]


# ---- every check can give another verdict ----


@pytest.mark.parametrize(
    ("name", "changes", "verdict"),
    [
        ("size-card", {"value": 61.5}, CONFIRMED),
        ("size-card", {"value": 70.0}, CONTRADICTED),
        ("size-dfqs", {"value": 61.8}, CONTRADICTED),
        ("weights", {"value": 61}, CONFIRMED),
        ("original-size", {"value": 160}, CONFIRMED),
        ("compression-ratio", {"value": 2.6}, CONFIRMED),
        ("storage-reduction", {"value": 61}, CONFIRMED),
        ("parameters", {"value": 671}, CONTRADICTED),
        ("active-parameters", {"value": 37}, CONTRADICTED),
        ("top-2", {"value": 6}, CONFIRMED),
        ("experts", {"value": 128}, CONTRADICTED),
        ("context", {"value": 131072}, CONTRADICTED),
        ("k-quant", {"value": "i-quant"}, CONFIRMED),
        ("sha256", {"value": "0" * 64}, CONTRADICTED),
        ("kv-8k", {"value": 0.106}, CONFIRMED),
        ("kv-1m", {"value": 53}, CONFIRMED),
        ("kv-1m", {"value": 14.5}, CONFIRMED),
        ("ram", {"value": [40, 60]}, CONTRADICTED),
        ("storage-minimum", {"value": 62}, CONFIRMED),
        ("storage-recommended", {"value": 120}, CONTRADICTED),
        ("offload-3090", {"value": 10}, NOT_TESTABLE),
        ("h100-memory-8k", {"value": 64}, NOT_TESTABLE),
        ("speed-h100", {"value": [500, 900]}, CONTRADICTED),
        ("speed-cpu", {"value": [12, 20]}, CONTRADICTED),
    ],
)
def test_another_figure_gets_another_verdict(name, changes, verdict):
    assert verdict_of(name, **changes) == verdict


def test_sizes_that_are_no_sum_of_the_shards_contradict_nothing(monkeypatch):
    known = registered()
    file = dataclasses.replace(SINGLE, size_bytes=SINGLE.size_bytes - 95_000)
    name = "deepseek-v4-flash-iq1_s-xl-single"
    other = known | {name: dataclasses.replace(known[name], files=(file,))}
    monkeypatch.setattr(claims, "models", lambda: other)
    for one in ("merged", "reconstruction", "loads"):
        assert verdict_of(one) == NOT_TESTABLE


def test_the_hash_of_the_file_at_hand_is_the_evidence_where_it_is_the_artifact(artifact):
    model = {"name": "single", "sha256": "1" * 64, "nbytes": SINGLE.size_bytes}
    assert verdict_of("sha256", {"merge": {"model": model}}, artifact) == CONTRADICTED
    assert (
        verdict_of("sha256", {"merge": {"model": model | {"sha256": SINGLE.sha256}}}, artifact) == CONFIRMED
    )


def test_a_hash_of_the_reference_model_says_nothing_about_the_artifact(merged_reference):
    assert verdict_of("sha256", run_stages(), read_header(merged_reference)) == CONFIRMED


def test_another_model_of_the_same_architecture_is_no_evidence_for_its_keys(tmp_path, merged_reference):
    other = with_field(merged_reference, tmp_path / "other.gguf", "deepseek4.expert_used_count", 1)
    assert (
        "6 of 256"
        in check_claims({}, read_header(other), ask_llama_cpp=False).set_index("id").loc["top-2", "evidence"]
    )
