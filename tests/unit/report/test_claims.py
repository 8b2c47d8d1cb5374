"""The statements about the artifact: judged about it alone, by its own header where it is there, and able to fail."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import gguf_fixtures
import pytest
from published import FLASH, card_compute
from sealed_run import run_of

from dfqs_nb.core.paths import REPOSITORY
from dfqs_nb.gguf import facts as header_facts
from dfqs_nb.gguf import memory
from dfqs_nb.gguf.broken import with_field
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.models import registered
from dfqs_nb.merge.merge import CONSUME_EXTRA_BYTES
from dfqs_nb.report import claims
from dfqs_nb.report.claims import (
    CLAIM_VERDICTS,
    CONFIRMED,
    CONTRADICTED,
    CONTRADICTS_ITSELF,
    IN_PART,
    NOT_CHECKABLE,
    NOT_TESTABLE,
    check_claims,
    facts,
    figure,
    relation,
)
from dfqs_nb.report.metrics import CONTEXTS
from dfqs_nb.report.reading import Run, checked
from dfqs_nb.report.template import (
    UNSTATED,
    link,
    linked,
    sentence,
    spec_table,
)

SINGLE = registered()["deepseek-v4-flash-iq1_s-xl-single"].files[0]
NOTHING: Run = {}


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


def run_file(sha256: str, nbytes: int = 0) -> Run:
    """A run of which only the model is known."""
    return checked({"merge": {"model": {"name": "some model", "sha256": sha256, "nbytes": nbytes}}})


def own_run(**changes) -> Run:
    """A run whose model no registry knows, so that its header decides what it is."""
    merge = {"model": {"name": "own", "sha256": "1" * 64, "nbytes": 5}}
    return run_of(merge=merge, **changes)


@pytest.fixture(scope="module")
def nano_table(merged_reference):
    return check_claims(run_of(), read_header(merged_reference)).set_index("id")


@pytest.fixture(scope="module")
def own_table(artifact):
    return check_claims(NOTHING, artifact).set_index("id")


def verdict_of(name: str, run: Run = NOTHING, header=None, **changes) -> str:
    """The verdict on one statement, with some of its fields changed."""
    listed = [
        {**statement, **changes} for statement in spec_table("claims")["claims"] if statement["id"] == name
    ]
    table = check_claims(run, header, claims=listed).set_index("id")
    return table.loc[name, "verdict"]


# ---- the table itself ----


def test_every_statement_gets_one_numbered_row_with_a_verdict_evidence_and_a_public_source(nano_table):
    assert list(nano_table.index) == [statement["id"] for statement in spec_table("claims")["claims"]]
    assert nano_table["number"].is_unique and nano_table["number"].str.fullmatch(r"[CDPSB]\d+").all()
    assert set(nano_table["verdict"]) <= set(CLAIM_VERDICTS)
    assert nano_table[["how", "found", "evidence", "source", "section"]].map(len).gt(1).all(axis=None)
    assert set(nano_table["document"]) <= set(spec_table("claims")["documents"])


def test_the_two_documents_have_about_a_hundred_statements(nano_table):
    assert nano_table["document"].isin(["card", "DFQS 1.0"]).sum() >= 100
    listed = spec_table("claims")["claims"]
    assert len({statement["id"] for statement in listed}) == len(listed)


@pytest.mark.parametrize(
    ("name", "needed", "more"),
    [
        (
            "requirements",
            {"id", "level", "text", "source", "how", "check", "needs", "notebook", "evidence"},
            set(),
        ),
        ("claims", {"id", "document", "section", "text", "source"}, {*UNSTATED}),
    ],
)
def test_no_entry_of_the_two_tables_has_a_field_too_many_or_too_few(name, needed, more):
    raw = tomllib.loads((REPOSITORY / "data" / "spec" / f"{name}.toml").read_text(encoding="utf-8"))
    for entry in raw[name]:
        assert needed <= {*entry} <= needed | more, entry["id"]


def test_every_fact_and_every_test_is_used():
    listed = spec_table("claims")["claims"]
    assert {statement["fact"] for statement in listed} == set(spec_table("claims")["facts"])
    assert {statement["test"] for statement in listed} == set(claims.TESTS)


def test_every_fact_of_the_table_is_computed(artifact):
    known = facts(run_of(), artifact)
    assert set(spec_table("claims")["facts"]) <= set(known)


def test_nothing_in_the_table_names_a_path_of_this_machine_or_an_unfilled_format(nano_table):
    text = nano_table.to_csv()
    assert "/home/" not in text and "/tmp" not in text and "{" not in text
    assert "nan" not in text.replace("DFQS-Nano", "").lower()


def test_counts_add_up(nano_table):
    total, each = sentence("claims_counted", nano_table.to_dict("records")).split(" statements: ")
    assert int(total) == len(nano_table) == sum(int(part.split()[0]) for part in each.split(", "))


def test_figures_read_well():
    assert figure([120, 300], "GB") == "120 to 300 GB"


# ---- which model it is ----


def test_the_reference_model_is_the_reference_though_its_architecture_is_the_same(merged_reference):
    header = read_header(merged_reference)
    assert header.architecture == "deepseek4"
    assert relation(header, run_of()) == "reference"
    assert relation(header, NOTHING) == "another"


def test_the_artifact_is_known_by_its_shape_types_and_size(artifact):
    assert relation(artifact, NOTHING) == "artifact"


def test_the_artifact_is_known_by_its_hash_whatever_its_size(artifact):
    smaller = dataclasses.replace(artifact, file_size=artifact.file_size // 2)
    assert relation(smaller, NOTHING) == "model"
    assert relation(smaller, run_file(SINGLE.sha256)) == "artifact"


def test_a_hash_alone_is_not_enough_where_the_header_is_of_another_model(merged_reference):
    assert relation(read_header(merged_reference), run_file(SINGLE.sha256)) == "another"


def test_another_quantization_is_judged_by_its_header_for_shapes_only(artifact):
    smaller = dataclasses.replace(artifact, file_size=artifact.file_size // 2)
    table = check_claims(own_run(), smaller).set_index("id")
    assert "another quantization" in table.loc["top-2", "evidence"]
    assert table.loc["iq1_s", "verdict"] == table.loc["humaneval", "verdict"] == NOT_TESTABLE


def test_a_single_shard_is_not_taken_for_the_model(tmp_path):
    first, _ = gguf_fixtures.real_size_shards(tmp_path / "artifact")
    assert relation(read_header(first), NOTHING) == "another"


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
    assert relation(header, NOTHING) == "artifact"
    assert verdict_of(name, NOTHING, header) == verdict


def test_without_tensors_of_iq1_s_the_quantization_is_contradicted(artifact):
    others = tuple(dataclasses.replace(t, type="Q2_K") if t.type == "IQ1_S" else t for t in artifact.tensors)
    header = dataclasses.replace(artifact, tensors=others)
    assert verdict_of("iq1_s", run_file(SINGLE.sha256, SINGLE.size_bytes), header) == CONTRADICTED


def test_the_header_of_the_run_goes_before_the_record(artifact):
    record = spec_table("claims")["published"]["figures"]
    fewer = dataclasses.replace(artifact, tensors=artifact.tensors[:-1])
    known = facts(run_file(SINGLE.sha256, SINGLE.size_bytes), fewer)
    assert known["all_tensors"] == record["all_tensors"] - 1
    assert known["weights_gb"] == pytest.approx(header_facts.parameters(fewer, in_bytes=True).total / 1e9)
    assert known["kv_8192_gb"] == memory.kv_cache_bytes(artifact, 8192).total / 1e9


def standard_scores(value: float, low: float, high: float, speed: float, n_missing: int = 0) -> dict:
    statement = {
        "name": "code_score",
        "set": "standard-code",
        "value": value,
        "low": low,
        "high": high,
        "n": 164,
        "guess_rate": 0.0,
    }
    return {"tier": "standard", "cpu_tokens_per_sec": speed, "scores": [statement | {"n_missing": n_missing}]}


def test_measurements_of_the_artifact_count_as_evidence(artifact):
    run = own_run(scores=standard_scores(0.66, 0.58, 0.73, 0.4), long_context={"tier": "standard"})
    table = check_claims(run, artifact).set_index("id")
    assert table.loc["humaneval", "verdict"] == CONFIRMED
    assert table.loc["speed-cpu", "verdict"] == CONFIRMED
    assert table.loc["routing-stable", "verdict"] == NOT_TESTABLE
    assert "25 of 1,152" in table.loc["routing-stable", "evidence"]
    assert table.loc["deterministic", "verdict"] == CONFIRMED


@pytest.mark.parametrize(
    ("load", "verdict"), [(True, CONFIRMED), (False, CONTRADICTED), (None, NOT_TESTABLE)]
)
def test_only_a_load_judges_the_demand_about_loads(artifact, load, verdict):
    traced = run_of()["routing"]["verdict"] | {"load_passed": load}
    assert verdict_of("shall-routing", own_run(routing={"verdict": traced}), artifact) == verdict
    assert verdict_of("deterministic", own_run(routing={"verdict": traced}), artifact) == CONFIRMED


def test_a_speed_with_layers_on_a_gpu_judges_no_claim_about_a_cpu(artifact):
    at = {"conditions": run_of()["scores"]["conditions"] | {"n_gpu_layers": -1}}
    run = own_run(scores=standard_scores(0.66, 0.58, 0.73, 0.4) | at)
    assert verdict_of("speed-cpu", run, artifact) == NOT_TESTABLE


def test_measurements_of_the_artifact_can_contradict(artifact):
    run = own_run(scores=standard_scores(0.31, 0.24, 0.38, 6.2))
    table = check_claims(run, artifact).set_index("id")
    assert table.loc["humaneval", "verdict"] == table.loc["speed-cpu", "verdict"] == CONTRADICTED


def test_an_incomplete_or_a_nano_score_of_the_artifact_judges_nothing(artifact):
    assert (
        verdict_of("humaneval", own_run(scores=standard_scores(0.66, 0.58, 0.73, 1, 3)), artifact)
        == NOT_TESTABLE
    )
    assert verdict_of("humaneval", own_run(), artifact) == NOT_TESTABLE


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, CONFIRMED), (0.6, 0.9, CONTRADICTED), (0.3, 0.7, NOT_TESTABLE), (-0.1, 0.1, NOT_TESTABLE)],
)
def test_gradual_is_an_effect_size_with_an_interval(artifact, low, high, verdict):
    fall = {"fall": (low + high) / 2, "low": low, "high": high, "start": 512, "end": 1024}
    assert verdict_of("gradual", own_run(long_context={"largest_fall": fall}), artifact) == verdict


def test_how_far_the_context_carries_is_judged_as_far_as_it_was_measured(artifact):
    assert verdict_of("long-context", own_run(), artifact) == CONTRADICTED
    assert verdict_of("long-context", own_run(), artifact, value=100) == CONFIRMED
    held = run_of()["long_context"]["boundary"] | {"right_censored": True, "status": "right_censored"}
    assert verdict_of("long-context", own_run(long_context={"boundary": held}), artifact) == NOT_TESTABLE


def test_n_gpu_layers_counts_the_output_layer_as_llama_cpp_does(own_table):
    """35 of its 44 are the output layer and the layers 9 to 42: `i_gpu_start` of src/llama-model.cpp."""
    for name in ("offload-3090", "offload-usage"):
        assert own_table.loc[name, "found"] == "42.78 GB", "34 of 43 layers of experts in IQ1_S"
        assert "the last 34 of 43 layers" in own_table.loc[name, "evidence"]


# ---- another model in the run: the public record, and no borrowed measurements ----


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("size-card", CONTRADICTS_ITSELF),
        ("size-dfqs", CONFIRMED),
        ("original-size", CONTRADICTED),
        ("compression-ratio", CONTRADICTED),
        ("storage-reduction", CONTRADICTED),
        ("weights", CONFIRMED),
        ("merged", CONTRADICTED),
        ("sha256", CONFIRMED),
        ("sha-on-request", IN_PART),
        ("loads", CONTRADICTED),
        ("shall-single-file", CONTRADICTED),
        ("32k-without-oom", CONTRADICTED),
        ("gradients", CONTRADICTED),
        ("all-reduce", CONTRADICTED),
        ("top-2", CONTRADICTED),
        ("storage-minimum", CONTRADICTS_ITSELF),
        ("card-storage", CONTRADICTS_ITSELF),
        ("shall-cpu", CONTRADICTED),
        ("cpu-operational", CONTRADICTED),
        ("bench-cpu", NOT_TESTABLE),
        ("ram", CONFIRMED),
        ("ram-minimum", IN_PART),
        ("card-ram", IN_PART),
        ("reconstruction", IN_PART),
        ("packaging", IN_PART),
        ("intermediate-storage", NOT_TESTABLE),
        ("ram-recommended", CONFIRMED),
        ("sub-70", CONTRADICTS_ITSELF),
        ("memory-bound", CONTRADICTS_ITSELF),
        ("dram-bound", "contradicts itself"),
        ("h100-memory-8k", CONTRADICTS_ITSELF),
        ("downloads", NOT_CHECKABLE),
        ("language-python", NOT_CHECKABLE),
    ],
)
def test_the_public_record_decides_what_needs_no_run(nano_table, name, verdict):
    assert nano_table.loc[name, "verdict"] == verdict


def test_no_verdict_is_at_odds_with_its_own_evidence(nano_table):
    """A statement that rests on a file that llama.cpp refuses is not left open, nor confirmed."""
    refused = nano_table[nano_table["evidence"].str.contains("refuses|does not load")]
    assert len(refused) > 12 and set(refused["verdict"]) == {CONTRADICTED, IN_PART}
    assert list(refused.index[refused["verdict"] == IN_PART]) == ["offload-h100", "packaging"]


def test_a_figure_in_gb_that_only_gib_would_save_contradicts_the_documents_and_no_other_does(nano_table):
    """One rule for the whole page: GB is decimal, and a figure that is right in GiB alone is said to be."""
    said = nano_table["evidence"].str.contains("read as GiB")
    assert set(nano_table.index[said]) == {"size-card", "h100-memory-8k", "card-storage", "storage-minimum"}
    assert set(nano_table["verdict"][said]) == {CONTRADICTS_ITSELF}
    assert (
        verdict_of("card-storage", value=55) == CONTRADICTED
        and verdict_of("card-storage", value=61.6) == CONFIRMED
    )


def test_every_section_is_linked_to_its_document():
    spec = spec_table("claims")
    documents = spec["documents"]
    assert {name for document in documents.values() for name in document.get("sections", {})} <= {
        claim["section"] for claim in spec["claims"]
    }
    assert link(documents["card"], "Profiling").endswith("drpersadh/merged.html#profiling")
    assert all(document["address"].startswith("https://") for document in documents.values())


def test_memory_that_suffices_at_short_contexts_only_says_where(nano_table):
    assert "62.3 GB at 8,192 tokens" in nano_table.loc["ram-minimum", "evidence"]
    assert (
        "at 1,048,576 tokens 106.5 GB, or 70.7 GB with flash attention"
        in nano_table.loc["ram-minimum", "evidence"]
    )


def test_every_source_is_a_link_and_no_run_of_another_model_decides_about_the_artifact(nano_table):
    decided = nano_table[nano_table["verdict"].isin([CONFIRMED, IN_PART, CONTRADICTED, CONTRADICTS_ITSELF])]
    assert "none" not in set(decided["source"])
    for name, source in nano_table["source"].items():
        assert source == "none" or "](https://" in str(linked(source, is_html=False)), name
    assert not decided["source"].str.contains("notebook").any()
    assert not decided["evidence"].str.contains("notebook").any()


def test_what_contradicts_itself_names_the_other_place(nano_table):
    """As the report defines it: another place of the documents, or a figure in GB that holds as GiB."""
    rows = nano_table[nano_table["verdict"] == CONTRADICTS_ITSELF]
    places = "the card|The card|DFQS 1.0|hardware envelope|read as GiB"
    assert len(rows) > 7 and rows["evidence"].str.contains(places).all()


def test_a_bound_names_the_bandwidth_that_it_rests_on_and_its_source(nano_table):
    bounds = nano_table[nano_table["found"].str.startswith("at most")]
    cited = bounds["evidence"].str.contains(r"\d GB/s")
    assert len(bounds) > 7 and cited.all()


def test_reads_is_said_of_the_disk_only(nano_table):
    """A token uses weights; it reads those that are not in memory."""
    text = " ".join([*nano_table["evidence"], *nano_table["how"]])
    assert "a token reads" not in text and "reading a token" not in text


def test_the_promise_to_load_names_the_fork(nano_table):
    assert "need a fork" in nano_table.loc["should-llama-cpp", "evidence"]
    assert "llama.cpp names the keys that it misses" in nano_table.loc["fork", "evidence"]


@pytest.mark.parametrize(
    "name", ["README.md", "notebooks/01_merge_shards.ipynb", "notebooks/02_inspect_header.ipynb"]
)
def test_wherever_a_repair_is_promised_the_early_dialect_is_named(name):
    text = " ".join((REPOSITORY / name).read_text(encoding="utf-8").split())
    assert "early dialect" in text.replace("*", "") or "early* dialect" in text


def test_the_reference_models_two_experts_do_not_confirm_top_2(nano_table, merged_reference):
    assert header_facts.experts(read_header(merged_reference)).used == 2
    assert nano_table.loc["top-2", "verdict"] == CONTRADICTED
    assert "published configuration" in nano_table.loc["top-2", "evidence"]


@pytest.mark.parametrize(
    "name", ["humaneval", "routing-stable", "deterministic", "gradual", "iq1_s", "long-context"]
)
def test_measurements_of_another_model_judge_nothing_about_the_artifact(nano_table, name):
    assert nano_table.loc[name, "verdict"] == NOT_TESTABLE
    assert "not the artifact" in nano_table.loc[name, "evidence"]


def test_a_perfect_score_of_the_reference_model_changes_nothing(merged_reference):
    run, header = run_of(scores=standard_scores(0.68, 0.6, 0.75, 0.3)), read_header(merged_reference)
    assert verdict_of("humaneval", run, header) == verdict_of("speed-cpu", run, header) == NOT_TESTABLE


def test_the_public_record_alone_gives_a_full_table():
    table = check_claims(NOTHING)
    assert len(table) == len(spec_table("claims")["claims"])
    assert "the artifact was not run" in set(table["evidence"])


# ---- facts computed here, by a second way ----


def test_the_units_of_the_two_sizes(nano_table):
    assert nano_table.loc["size-card", "found"] == "61,540,805,344 bytes = 61.54 GB = 57.31 GiB"
    assert "61.6 GB and 57.3 GB for one file" in nano_table.loc["size-card", "evidence"]


def test_the_published_counts_are_those_of_the_published_shapes(artifact):
    published, count = spec_table("claims")["published"], header_facts.parameters(artifact)
    stated = [published[f"{name}parameters"] for name in ("", "active_", "routed_")]
    assert [count.total, count.active, count.routed] == stated
    assert published["figures"]["all_tensors"] == len(artifact.tensors)


def sizes() -> dict[str, float]:
    """Bytes by name: of the published file, of what it needs beside it, and of what graphics cards showed."""
    spec, card, shape = (
        spec_table("requirements")["envelope"],
        memory.published()["card_compute"],
        memory.published_shape(),
    )
    nbytes, logs, record = SINGLE.size_bytes, spec["gpu_logs"], spec_table("claims")["published"]
    fewest = int(record["routed_parameters"] * 1.5625 // 8)  # IQ1_S takes 50 bytes for 256 weights
    known = {
        "file": nbytes,
        "two_files": 2 * nbytes,
        "consuming": CONSUME_EXTRA_BYTES,
        "native": record["native_bytes"],
        "weights": FLASH.weights,
        "token": FLASH.total,
        "experts": FLASH.routed_total,
        "fewest": fewest,
        "rest": nbytes - FLASH.routed_total,
        "most_rest": nbytes - fewest,
        "layers_35": fewest * 34 / shape.arch("block_count"),
        "layers_43": FLASH.routed_total,
        "gpu_least": logs["least"],
        "gpu_most": logs["most"],
        "gpu_kv": memory.kv_cache_bytes(shape, logs["context"]).total,
        "card_8192": card["all"]["8192"],
        "card_plain": card["all_without_flash"]["8192"],
        "card_experts": card_compute(shape, logs["context"], "experts_in_memory"),
    }
    for n_ctx in CONTEXTS:
        kv, compute = memory.kv_cache_bytes(shape, n_ctx).total, spec["published_compute"][str(n_ctx)]
        known |= {
            f"kv_{n_ctx}": kv,
            f"kv_{n_ctx}_full": memory.kv_cache_bytes(shape, n_ctx, swa_full=True).total,
            f"compute_{n_ctx}": compute["plain"],
            f"least_{n_ctx}": nbytes + kv,
            f"need_{n_ctx}": nbytes + kv + compute["plain"],
            f"flash_{n_ctx}": nbytes + kv + compute["flash"],
            f"on_card_{n_ctx}": card["weights"] + kv + card_compute(shape, n_ctx),
        }
    return known


def bound(nbytes: float, bytes_per_sec: float) -> float:
    """The most tokens a second where so much of the weights lies on a card, the dense part first.

    The rest lies behind two channels of DDR5-5600 (JEDEC: 89.6 GB/s). An RTX 3090 reads 936 GB/s and an H100
    SXM 3,350 GB/s (NVIDIA's data sheets); 22 of 24 and 76 of 80 GB hold weights.
    """
    weights = FLASH
    share = (nbytes - weights.dense) / (weights.weights - weights.dense)
    there = weights.dense + weights.routed * min(share, 1)
    return 1 / (there / bytes_per_sec + (weights.total - there) / 89.6e9)


def test_each_figure_of_the_public_record_follows_from_what_was_published():
    known, record, card = sizes(), spec_table("claims")["published"], memory.published()["card_compute"]
    shards, shape = registered()["deepseek-v4-flash-iq1_s-xl"], memory.published_shape()
    others = record["parameters"] - record["routed_parameters"]
    bounds = {"cpu": bound(FLASH.weights, 89.6e9), "h100": bound(76e9, 3350e9)}
    bounds |= {"3090": bound(22e9, 936e9), "2x3090": bound(44e9, 936e9)}
    at_least, at_most = (
        known[rest] + known[log] for rest, log in (("rest", "gpu_least"), ("most_rest", "gpu_most"))
    )
    wanted = {f"{name}_gb": nbytes / 1e9 for name, nbytes in known.items()}
    wanted |= {f"{name}_gib": nbytes / 2**30 for name, nbytes in known.items()}
    wanted |= {f"bound_{name}": bound for name, bound in bounds.items()}
    wanted |= {
        "file_bytes": known["file"],
        "fewest_bytes": known["fewest"],
        "needs_gb": [*(wanted[f"need_{n}_gb"] for n in CONTEXTS), wanted["flash_1048576_gb"]],
        "offloaded_gb": [(part + known["gpu_kv"]) / 1e9 for part in (at_least, at_most)],
        "planned_gb": [
            (known[rest] + known["card_experts"] + known["gpu_kv"]) / 1e9 for rest in ("rest", "most_rest")
        ],
        **{
            f"kv_{n}": [
                memory.kv_cache_bytes(shape, n, type_k=kind, type_v=kind, swa_full=full).total / 1e9
                for kind in memory.CACHE_TYPES
                for full in (False, True)
            ]
            for n in (8192, 1048576)
        },
        "native_bits": 8 * record["native_bytes"] / record["parameters"],
        "ratio": record["native_bytes"] / known["file"],
        "saved": 100 * (1 - known["file"] / record["native_bytes"]),
        "dram_share": 100 * 0.5 / bounds["cpu"],
        "card_decode": card["decode_tokens_per_sec"],
        "processor_decode": card["processor_decode_tokens_per_sec"],
        "others_b": others / 1e9,
        "rest_bits": 8 * known["rest"] / others,
        "most_rest_bits": 8 * known["most_rest"] / others,
        "shards_sum": " + ".join(f"{it.size_bytes:,}" for it in shards.files) + f" = {known['file']:,}",
        "merged": shards.size_bytes != known["file"],
        "loads": shards.size_bytes != known["file"],
    }
    read = ("family", "shown_tensors", "all_tensors")  # from a type's name, from an audit, from the shapes
    for name, value in record["figures"].items():
        if name not in read:
            computed = (
                wanted[name] if isinstance(value, str | bool) else pytest.approx(wanted[name], abs=1e-6)
            )
            assert value == computed, name


def test_header_and_public_record_agree_about_the_cache(own_table, nano_table):
    for name in ("kv-8k", "kv-1m"):
        assert own_table.loc[name, "found"] == nano_table.loc[name, "found"]


# ---- every test can give another verdict ----


@pytest.mark.parametrize(
    ("name", "changes", "verdict"),
    [
        ("size-card", {"value": 61.5}, CONFIRMED),
        ("size-card", {"value": 70.0}, CONTRADICTED),
        ("size-dfqs", {"value": 61.8}, CONTRADICTED),
        ("weights", {"value": 61}, CONTRADICTED),
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
        ("ram", {"limit": 50}, CONTRADICTED),
        ("ram-minimum", {"value": 110}, CONFIRMED),
        ("ram-minimum", {"value": 50}, CONTRADICTED),
        ("storage-minimum", {"value": 62}, CONFIRMED),
        ("storage-recommended", {"value": 110}, CONTRADICTED),
        ("storage-recommended", {"value": 120}, CONTRADICTS_ITSELF),
        ("offload-3090", {"limit": 48}, NOT_TESTABLE),
        ("h100-memory-8k", {"value": 64}, NOT_TESTABLE),
        ("speed-h100", {"value": [500, 900]}, CONTRADICTED),
        ("speed-cpu", {"value": [12, 20]}, CONTRADICTED),
        ("dram-bound", {"limit": 1}, CONFIRMED),
    ],
)
def test_another_figure_gets_another_verdict(name, changes, verdict):
    assert verdict_of(name, **changes) == verdict


def test_the_hash_of_the_file_at_hand_is_the_evidence_where_it_is_the_artifact(artifact):
    assert verdict_of("sha256", run_file("1" * 64, SINGLE.size_bytes), artifact) == CONTRADICTED
    assert verdict_of("sha256", run_file(SINGLE.sha256, SINGLE.size_bytes), artifact) == CONFIRMED


def test_a_hash_of_the_reference_model_says_nothing_about_the_artifact(merged_reference):
    assert verdict_of("sha256", run_of(), read_header(merged_reference)) == CONFIRMED


def test_another_model_of_the_same_architecture_is_no_evidence_for_its_keys(tmp_path, merged_reference):
    other = with_field(merged_reference, tmp_path / "other.gguf", "deepseek4.expert_used_count", 1)
    table = check_claims(NOTHING, read_header(other)).set_index("id")
    assert "6 of 256" in table.loc["top-2", "evidence"]
