"""Quantization against llama-quantize, against the shipped files it made, and against what it must refuse."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import gguf
import llama_cpp_tools
import numpy as np
import pytest
from gguf_fixtures import linked, split_like_llama

from dfqs_nb.core import files
from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, SpaceError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.facts import class_of
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.ladder import RUNGS, imatrix, quantizer
from dfqs_nb.ladder.imatrix import Entry, ImportanceMatrix
from dfqs_nb.ladder.quantizer import Recipe, Rule, load_recipe, plan, quantize
from dfqs_nb.llama import check

REFERENCE = data_dir() / "reference"
F16 = REFERENCE / "DFQS-Nano-F16.gguf"
RECIPES = data_dir() / "quantize"
HYPER = (re.compile("hc_"), re.compile("_ape\\.weight$"))
ONES = np.ones((1, 32), np.float32), np.ones(1, np.int64)
QUIET = {"progress": False, "n_threads": 1}


def flat_matrix(header) -> ImportanceMatrix:
    """A matrix in which every column of a block weighs the same."""
    entries = {}
    for tensor in header.tensors:
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            n = tensor.shape[2] if len(tensor.shape) > 2 else 1
            entries[tensor.name] = Entry(np.ones((n, tensor.shape[0]), np.float32), np.ones(n, np.int64))
    return ImportanceMatrix(entries, ("words",), chunk_count=7)


def contents(shards: ShardSet) -> dict[str, tuple[str, str]]:
    """Type and hash of each tensor, wherever it lies."""
    hashes = {}
    for header in shards.headers:
        raw = header.path.read_bytes()
        for tensor in header.tensors:
            start = header.data_offset + tensor.offset
            digest = hashlib.sha256(raw[start : start + tensor.nbytes]).hexdigest()
            hashes[tensor.name] = (tensor.type, digest)
    return hashes


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> ImportanceMatrix:
    return flat_matrix(read_header(F16)).save(tmp_path_factory.mktemp("flat") / "m.gguf")


@pytest.fixture(scope="module")
def q8(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("q8") / "q8.gguf"
    quantize(F16, "Q8_0", path, **QUIET)
    return path


# ---- what comes out ----


def test_q8_0_is_byte_for_byte_the_shipped_model_that_llama_quantize_made(q8):
    shipped = open_shards(REFERENCE / "DFQS-Nano-Q8_0-00001-of-00002.gguf")
    assert contents(open_shards(q8)) == contents(shipped)


def test_iq1_s_xl_gives_each_tensor_the_type_of_the_shipped_artifact(flat):
    shipped = open_shards(REFERENCE / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf")
    planned = plan(F16, "IQ1_S-XL", flat)
    assert {t.name: t.type for t in planned.tensors} == {t.name: t.type for t in shipped.tensors}
    assert len(planned.job["entries"]) == int(shipped.headers[0]["quantize.imatrix.entries_count"])


def test_the_dry_run_names_every_tensor_as_it_will_be_and_writes_nothing(q8, tmp_path):
    planned, written = plan(F16, "Q8_0"), read_header(q8)
    assert planned.nbytes == sum(tensor.nbytes for tensor in written.tensors)
    assert planned.by_class()["bytes"].sum() == planned.nbytes
    assert planned.nbytes < q8.stat().st_size < planned.nbytes + read_header(F16).data_offset + 8192
    mixed = quantize(F16, "Q3_K_M", tmp_path / "mixed.gguf", **QUIET)
    assert mixed.tensors == plan(F16, "Q3_K_M").tensors
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.gguf"]


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_every_recipe_keeps_hyper_connections_routers_norms_and_biases(name, flat):
    planned = plan(F16, name, flat)
    before = {tensor.name: tensor.type for tensor in planned.source.tensors}
    for tensor in planned.tensors:
        kept = class_of(tensor.name) in ("hyper-connections", "router", "norms")
        if kept or HYPER[1].search(tensor.name):
            assert tensor.type == before[tensor.name], tensor.name


def test_without_the_recipe_llama_cpp_would_quantize_hyper_connections():
    bare = plan(F16, Recipe("bare", "Q8_0"))
    kept = {tensor.name for tensor in bare.source.tensors if tensor.type == "F32"}
    changed = {
        tensor.name.split(".", 2)[-1]
        for tensor in bare.tensors
        if tensor.name in kept and tensor.type != "F32"
    }
    assert changed >= {"hc_attn_fn.weight", "hc_ffn_fn.weight", "attn_compressor_ape.weight"}


def test_the_header_says_where_the_file_comes_from(tmp_path, flat):
    recipe = Recipe(
        "one tensor",
        "Q8_0",
        keep=HYPER,
        weights="_exps",
        sha256="f" * 64,
        rules=(Rule("blk.3.ffn_gate_exps", "IQ2_XXS"), Rule("exps", "F16"), Rule("^output", "Q6_K")),
    )
    quantize(F16, recipe, tmp_path / "one.gguf", imatrix=flat, **QUIET)
    header, source = read_header(tmp_path / "one.gguf"), read_header(F16)
    assert header["dfqs.recipe"] == "one tensor" and header["dfqs.recipe_sha256"] == "f" * 64
    assert header["dfqs.source_sha256"] == hashlib.sha256(F16.read_bytes()).hexdigest()
    assert (header["quantize.imatrix.file"], header["quantize.imatrix.dataset"]) == ("m.gguf", "words")
    assert (header["quantize.imatrix.entries_count"], header["quantize.imatrix.chunks_count"]) == (12, 7)
    assert {key: header[key] for key in source} == dict(source)
    types = {tensor.name: tensor.type for tensor in header.tensors}
    assert types["blk.3.ffn_gate_exps.weight"] == "IQ2_XXS" and types["blk.2.ffn_gate_exps.weight"] == "F16"
    assert types["output.weight"] == "Q6_K" and types["output_norm.weight"] == "F32"


def test_a_source_of_higher_precision_gives_the_same_tensors(tmp_path, q8):
    """F16 to F32 is exact, so Q8_0 made of either is the same."""
    wide = Recipe("F32", "Q8_0", keep=HYPER, rules=(Rule(".", "F32"),))
    quantize(F16, wide, tmp_path / "f32.gguf", **QUIET)
    quantize(tmp_path / "f32.gguf", "Q8_0", tmp_path / "q8.gguf", **QUIET)
    assert contents(open_shards(tmp_path / "q8.gguf")) == contents(open_shards(q8))


def test_a_rule_of_the_source_s_own_type_changes_no_tensor(tmp_path):
    same = Recipe("F16", "Q8_0", keep=HYPER, rules=(Rule(".", "F16"),))
    quantize(F16, same, tmp_path / "f16.gguf", **QUIET)
    assert contents(open_shards(tmp_path / "f16.gguf")) == contents(open_shards(F16))


def test_a_long_text_is_cut_between_characters(tmp_path):
    long = Recipe("ä" * 100, "Q8_0", keep=HYPER)
    quantize(F16, long, tmp_path / "long.gguf", **QUIET)
    assert read_header(tmp_path / "long.gguf")["dfqs.recipe"] == "ä" * 63


# ---- what is refused, with nothing left behind ----


@pytest.mark.parametrize(
    "recipe, message",
    [
        (Recipe("r", "Q8_0", rules=(Rule("no_such_tensor", "Q4_0"),)), "no tensor matches 'no_such_tensor'"),
        (Recipe("r", "Q8_0", rules=(Rule("_exps", "IQ1_S"),)), "requires an imatrix.*add --calibrate"),
        (load_recipe("IQ2_XXS"), "requires an imatrix"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path, recipe, message):
    with pytest.raises(DfqsError, match=message):
        quantize(F16, recipe, tmp_path / "out.gguf", **QUIET)
    assert not list(tmp_path.iterdir())


def test_an_optional_rule_may_match_nothing():
    planned = plan(F16, Recipe("r", "Q8_0", rules=(Rule("no_such", "Q4_0", optional=True),)))
    assert planned.tensors == plan(F16, Recipe("r", "Q8_0")).tensors


def test_the_importance_matrix_of_another_model_is_refused(flat):
    """Named, with an entry that does not fit; llama.cpp would pass over most of them without a word."""
    others = {f"x.{name}": entry for name, entry in flat.entries.items()}
    with pytest.raises(DfqsError, match=r"of another model: \d+ of \d+ entries, as of x.blk"):
        plan(F16, "IQ1_S-XL", dataclasses.replace(flat, entries=others))
    wider = {name: Entry(np.tile(entry.sums, 2), entry.counts) for name, entry in flat.entries.items()}
    with pytest.raises(DfqsError, match="of another model: .* do not fit this model"):
        plan(F16, "Q4_K_M", ImportanceMatrix(wider))


def test_entries_that_do_not_fit_are_not_used(flat):
    more = dataclasses.replace(flat, entries={**flat.entries, "blk.99.ffn_up_exps.weight": Entry(*ONES)})
    assert plan(F16, "IQ1_S-XL", more).job["entries"] == plan(F16, "IQ1_S-XL", flat).job["entries"]


def test_a_matrix_that_lacks_a_tensor_is_refused_for_the_types_that_need_it(flat, tmp_path):
    kept = {name: entry for name, entry in flat.entries.items() if re.match("blk.[01].", name)}
    fewer = dataclasses.replace(flat, entries=kept).save(tmp_path.parent / "fewer.gguf")
    with pytest.raises(DfqsError, match=r"blk.2.ffn_\w+_exps.weight"):
        quantize(F16, "IQ1_S-XL", tmp_path / "out.gguf", imatrix=fewer, **QUIET)
    assert not list(tmp_path.iterdir())


def test_a_quantized_source_is_refused():
    with pytest.raises(DfqsError, match="is quantized already .Q8_0."):
        plan(REFERENCE / "DFQS-Nano-Q8_0-00001-of-00002.gguf", "Q6_K")


def test_an_existing_output_stays_unless_told_otherwise(tmp_path, q8):
    output = tmp_path / "out.gguf"
    output.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        quantize(F16, "Q8_0", output, **QUIET)
    assert output.read_text() == "precious"
    torn = tmp_path / f"{files._temporary(output)}1a2b3c4d.tmp"
    torn.touch()
    quantize(F16, "Q8_0", output, overwrite=True, **QUIET)
    assert output.read_bytes() == q8.read_bytes()
    assert list(tmp_path.iterdir()) == [output], "what a kill left is removed"
    with pytest.raises(OutputError, match="is no regular file; name a file"):
        quantize(F16, "Q8_0", tmp_path, overwrite=True, **QUIET)
    with pytest.raises(OutputError, match="is one of the files that it would be made from"):
        quantize(F16, "Q8_0", F16, overwrite=True, **QUIET)
    with pytest.raises(OutputError, match="folder does not exist"):
        quantize(F16, "Q8_0", tmp_path / "no" / "out.gguf", **QUIET)


@pytest.mark.parametrize("name", ["model", *("M" * n + ".5-Q8_0" for n in range(70, 89)), "ä" * 40 + ".5"])
def test_the_part_of_a_merge_to_another_name_stays(name, tmp_path):
    precious = {f".{name}.part", f".{name}.journal", f".{name}.gguf.part", f".{name}.gguf.journal"}
    for other in precious:
        (tmp_path / other).write_text("what the shards no longer have")
    (tmp_path / f"{files._temporary(tmp_path / name)}1a2b3c4d.tmp").write_text("left by a kill")

    class Stopped(Exception):
        pass

    def stop(job, **options):
        raise Stopped

    with pytest.raises(Stopped):
        quantize(F16, "Q8_0", tmp_path / name, run=stop, **QUIET)
    assert {path.name for path in tmp_path.iterdir()} == precious


def test_a_disk_without_room_is_refused_before_the_work(tmp_path, monkeypatch, q8):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=q8.stat().st_size - 1))
    with pytest.raises(SpaceError, match=r"needs [\d,]+ bytes and [\d,]+ are free.*free [\d,]+ bytes, or"):
        quantize(F16, "Q8_0", tmp_path / "out.gguf", **QUIET)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_what_was_planned_does_not_appear(tmp_path, monkeypatch):
    other = plan(F16, "Q6_K").tensors
    planned = dataclasses.replace(plan(F16, "Q8_0"), tensors=other)
    monkeypatch.setattr(quantizer, "plan", lambda *arguments: planned)
    with pytest.raises(IntegrityError, match="other types than in its dry run"):
        quantize(F16, "Q8_0", tmp_path / "out.gguf", **QUIET)
    assert not list(tmp_path.iterdir())


def test_what_llama_cpp_cannot_load_is_an_error_with_its_words(tmp_path):
    source = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(source, "deepseek4")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DfqsError, match="key not found in model: deepseek4"):
        quantize(source, Recipe("r", "Q8_0"), tmp_path / "out.gguf", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_a_source_of_another_alignment_is_refused_before_the_work(tmp_path):
    source = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(source, "deepseek4")
    writer.add_custom_alignment(64)
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DfqsError, match="aligned to 64 bytes"):
        quantize(source, Recipe("r", "Q8_0"), tmp_path / "out.gguf", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


# ---- recipes ----


def test_the_shipped_recipes_are_found_by_name_in_any_case():
    assert all(load_recipe(name).name == name for name in RUNGS)
    assert load_recipe("iq1_s-XL") == load_recipe(data_dir() / "quantize" / "iq1_s-xl.toml")
    with pytest.raises(DfqsError, match="no recipe is called 'q1'; there are: .*Q8_0"):
        load_recipe("q1")


@pytest.mark.parametrize(
    "text, message",
    [
        ("name = ", ""),
        ('mix = "Q8_0"', "mix|name"),
        ('name = "a"\nmix = "Q8_0"\nmore = 1', "more"),
        ('name = "a"\nmix = "Q8_0"\nsha256 = "a"', "sha256"),
        ('name = "a"\nmix = "Q8_0"\nkeep = "a"', "keep"),
        ('name = "a"\nmix = "Q8_0"\n[[rules]]\npattern = "a"', "rules.0.type"),
        ('name = "a"\nmix = "Q9_0"', "\\(unknown type 'Q9_0'"),
        ('name = "a"\nmix = "Q8_0"\n[[rules]]\npattern = "a"\ntype = "Q9_K"', "unknown type 'Q9_K'"),
        ('name = "a"\nmix = "Q8_0"\n[[rules]]\npattern = "a"\ntype = "Q8_K"', "unknown type 'Q8_K'"),
        (
            'name = "a"\nmix = "Q8_0"\n[[rules]]\npattern = "("\ntype = "Q4_0"',
            "rules.0.pattern: .* regular expression",
        ),
    ],
)
def test_a_broken_recipe_file_is_refused(tmp_path, text, message):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(DfqsError, match=f"not a recipe .*{message}"):
        load_recipe(path)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_recipe_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match="unknown type 'Q9_0'"):
        Recipe("r", "Q9_0")


# ---- against the tool ----

TOOL = {  # what llama-quantize must be told to follow our recipes
    "Q8_0": [],
    "Q6_K": [],
    "Q4_K_M": ["--exclude-weights", "attn_output_a"],
    "Q3_K_M": ["--exclude-weights", "attn_output_a"],
    "IQ2_XXS": ["--exclude-weights", "attn_output_a", "--tensor-type", "attn_output_a=q8_0"],
    "IQ1_M": ["--exclude-weights", "attn_output_a", "--tensor-type", "attn_output_a=q8_0"],
    "IQ1_S-XL": [
        "--include-weights",
        "exps",
        "--tensor-type",
        r"blk\.0\.ffn_down_exps=q2_k",
        "--tensor-type",
        "exps=iq1_s",
    ],
}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> Path:
    """Importance over a little text; the entries of attn_output_a are in it."""
    how = {"chunk_tokens": 256, "n_chunks": 4, "n_threads": 1}
    path = tmp_path_factory.mktemp("matrix") / "m.gguf"
    return Path(imatrix.collect(F16, "calibration-nano", path, **how).path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOL)
def test_every_tensor_is_byte_for_byte_llama_quantize_s(tmp_path, matrix, name):
    recipe = load_recipe(name)
    ours = tmp_path / "ours.gguf"
    quantize(F16, recipe, ours, imatrix=imatrix.read_imatrix(matrix), progress=False)
    command = [
        llama_cpp_tools.tool("llama-quantize"),
        *(["--imatrix", matrix] if recipe.weights else []),
        "--tensor-type",
        "hc_=f32",
        "--tensor-type",
        "_ape=f32",
        *TOOL[name],
        F16,
        tmp_path / "theirs.gguf",
        recipe.mix,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = open_shards(tmp_path / "theirs.gguf")
    assert contents(open_shards(ours)) == contents(theirs)
    keys = {key: value for key, value in theirs.headers[0].items() if not key.startswith("quantize.imatrix")}
    assert {key: read_header(ours)[key] for key in keys} == keys


def test_shards_are_planned_by_their_links_as_in_a_cache_of_the_hub(tmp_path):
    links = linked(split_like_llama(F16, 64, tmp_path / "f16"), tmp_path)
    planned = plan(links[0], "Q8_0")
    assert len(links) > 1 and planned.nbytes == plan(F16, "Q8_0").nbytes


@pytest.mark.slow
def test_shards_are_quantized_without_a_merge(tmp_path, q8):
    tool = str(llama_cpp_tools.tool("llama-gguf-split"))
    subprocess.run(
        [tool, "--split", "--split-max-tensors", "50", str(F16), str(tmp_path / "part")],
        check=True,
        capture_output=True,
    )
    first = min(tmp_path.glob("part-*"))
    output = tmp_path / "out.gguf"
    quantize(first, "Q8_0", output, **QUIET)
    assert contents(open_shards(output)) == contents(open_shards(q8))
    assert check.parse(output).accepted and "split.count" not in read_header(output)
