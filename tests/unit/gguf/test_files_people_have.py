"""Files as people have them: odd types, odd names, parts of models. Where llama.cpp loads one, so do we."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import psutil
import pytest
from gguf_fixtures import Spec, field, gguf_bytes, header_bytes, linked
from models_apart import Apart
from no_hang import no_hang
from read_chars import read_chars

from conftest import REFERENCE
from dfqs_nb.core import display
from dfqs_nb.core.errors import DfqsError, HeaderError, ModelError, ShardError
from dfqs_nb.gguf import facts, memory
from dfqs_nb.gguf.header import MAX_STRINGS, check_layout, read_header
from dfqs_nb.gguf.models import resolve
from dfqs_nb.gguf.shards import find_shards, open_shards, shard_path
from dfqs_nb.llama.check import loader_verdict
from dfqs_nb.merge import diagnose

LLAMA = [
    field("general.architecture", "STRING", "llama"),
    field("llama.block_count", "UINT32", 1),
    field("llama.context_length", "UINT32", 128),
    field("llama.embedding_length", "UINT32", 32),
    field("llama.attention.head_count", "UINT32", 2),
]
EMBEDDING = Spec("token_embd.weight", "F32", (32, 8))


@pytest.fixture(scope="module")
def nano(merged_reference: Path) -> Apart:
    return Apart.of(merged_reference)


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def split(number: int, *, count: bool = True, total: bool = True) -> list[bytes]:
    """The fields of shard ``number`` (from 0) of two."""
    fields = [field("split.no", "UINT16", number)]
    fields += [field("split.count", "UINT16", 2)] if count else []
    return fields + ([field("split.tensors.count", "INT32", 2)] if total else [])


# ---- what a file is ----


@pytest.mark.parametrize(
    ("role", "fields", "specs"),
    [
        (
            "mmproj",
            [field("general.architecture", "STRING", "clip"), field("general.type", "STRING", "mmproj")],
            [Spec("v.patch_embd.weight", "F32", (16, 16, 3, 8))],
        ),
        (
            "clip",  # as older tools wrote it
            [field("general.architecture", "STRING", "clip"), field("clip.has_vision_encoder", "BOOL", 1)],
            [Spec("v.patch_embd.weight", "F32", (16, 16, 3, 8))],
        ),
        (
            "adapter",
            [*LLAMA, field("general.type", "STRING", "adapter"), field("adapter.type", "STRING", "lora")],
            [Spec("blk.0.attn_q.weight.lora_a", "F32", (32, 4))],
        ),
        (
            "imatrix",
            [field("general.type", "STRING", "imatrix"), field("imatrix.chunk_count", "UINT32", 1)],
            [Spec("blk.0.attn_q.weight.in_sum2", "F32", (32, 1))],
        ),
        (
            "controlvector",
            [field("general.architecture", "STRING", "controlvector")],
            [Spec("direction.1", "F32", (32,))],
        ),
        ("", LLAMA, [EMBEDDING]),
    ],
)
def test_a_file_says_what_it_is(tmp_path, role, fields, specs):
    header = open_shards(write(tmp_path / "x.gguf", gguf_bytes(fields, specs))).as_one
    assert facts.role(header) == (role and f"a file of the type {role!r}")
    if not role:
        facts.require_model(header)
    else:
        with pytest.raises(ModelError, match=f"'{role}', not a language model; name the model"):
            facts.require_model(header)


# ---- fields of other types ----


def test_experts_used_by_layer_are_counted_by_layer(nano, tmp_path):
    """llama.cpp takes one number for each layer, too."""
    whole = write(tmp_path / "one.gguf", nano.bytes())
    same = nano.with_field("deepseek4.expert_used_count", "[UINT32]", [2, 2, 2, 2])
    other = nano.with_field("deepseek4.expert_used_count", "[UINT32]", [2, 2, 2, 1])
    headers = [
        read_header(write(tmp_path / f"{i}.gguf", model.bytes())) for i, model in enumerate((same, other))
    ]
    assert loader_verdict(headers[0].path).accepted
    assert facts.experts(headers[0]) == facts.experts(read_header(whole))
    assert facts.parameters(headers[0]) == facts.parameters(read_header(whole))
    a_layer = facts.parameters(read_header(whole)).routed // 4 // facts.experts(headers[0]).total
    assert facts.parameters(headers[0]).active - facts.parameters(headers[1]).active == pytest.approx(
        a_layer, rel=0.2
    )
    assert facts.experts(headers[1]).used == 2


@pytest.mark.parametrize(
    "kind, value", [("STRING", "two"), ("[UINT16]", [2, 3]), ("[STRING]", ["a"]), ("FLOAT32", 2.5)]
)
@pytest.mark.parametrize("name", ["split.count", "split.no", "split.tensors.count"])
def test_split_fields_of_another_type_are_an_error_of_ours(tmp_path, name, kind, value):
    fields = [record for record in split(0) if name.encode() not in record]
    path = shard_path(tmp_path / "m", 1, 2)
    write(path, gguf_bytes([*LLAMA, *fields, field(name, kind, value)], [EMBEDDING]))
    write(
        shard_path(tmp_path / "m", 2, 2), gguf_bytes(split(1), [Spec("blk.0.ffn_up.weight", "F32", (32, 8))])
    )
    with pytest.raises(DfqsError):
        open_shards(path)


def test_a_hostile_count_of_shards_is_refused_before_they_are_listed(tmp_path):
    """Of named files, and of one file with several headers, which `inspect` and `merge` are given."""
    paths = []
    for number in (0, 1):
        fields = [field("split.no", "UINT16", number), field("split.count", "UINT64", 1 << 40)]
        raw = gguf_bytes([*LLAMA, *fields], [Spec(f"blk.{number}.ffn_up.weight", "F32", (32, 8))])
        paths.append(write(tmp_path / f"{number}.gguf", raw))
    glued = write(tmp_path / "glued.gguf", paths[0].read_bytes() + paths[1].read_bytes())
    with no_hang(5):
        with pytest.raises(ShardError, match="claims to be of 1,099,511,627,776 shards"):
            open_shards(paths)
        assert "claims to be of 1,099,511,627,776 shards" in diagnose(glued).finding


FACTS = (
    facts.experts,
    facts.parameters,
    facts.class_sizes,
    facts.identity,
    facts.architecture,
    lambda header: header.text("tokenizer.chat_template"),
    facts.role,
    lambda header: memory.estimate(header, 512),
    lambda header: repr(display.facts(facts.identity(header) | facts.architecture(header))),
)
ODD = (
    ("STRING", "x"),
    ("[STRING]", ["x"]),
    ("[UINT32]", []),
    ("INT32", -1),
    ("UINT64", (1 << 64) - 1),
    ("FLOAT64", 1e300),
    ("BOOL", 1),
)


def test_no_field_of_another_type_gives_a_traceback(nano, tmp_path):
    """Every field of the model, as seven other types: each fact is computed, or refused in our own words."""
    for name in (*nano.fields, "general.type", "tokenizer.ggml.eot_token_id"):
        for kind, value in ODD:
            changed = nano.with_field(name, kind, value)
            path = write(tmp_path / "odd.gguf", header_bytes(list(changed.fields.values()), changed.specs))
            try:
                header = read_header(path)
            except HeaderError:
                continue
            for fact in FACTS:
                try:
                    fact(header)
                except DfqsError as error:
                    assert error.hint


@pytest.mark.slow
def test_20_000_mutated_headers_give_facts_or_our_own_errors(merged_reference, tmp_path):
    """Bytes of the header changed, moved and repeated at random: no traceback, no hang, no gigabyte."""
    raw = bytearray(read_header(merged_reference).raw + bytes(64))
    draw, path = random.Random(20260519), tmp_path / "x.gguf"
    n_read = 0
    before = psutil.Process().memory_info().rss
    for _ in range(20_000):
        changed = bytearray(raw)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at, n = draw.randrange(24, len(raw)), draw.choice((1, 2, 4, 8))
            other = draw.randrange(len(raw) - n)
            changed[at : at + n] = draw.choice(
                (draw.randbytes(n), raw[other : other + n], b"\xff" * n, bytes(n))
            )
        path.write_bytes(changed)
        with no_hang(), contextlib.suppress(DfqsError):
            header = read_header(path)
            n_read += 1
            for fact in FACTS[:-1]:  # the table for display takes most of the time
                with contextlib.suppress(DfqsError):
                    fact(header)
    assert n_read > 2_000 and psutil.Process().memory_info().rss - before < 1 << 30


def test_a_name_of_100_kilobytes_is_cut_where_it_is_shown(nano, tmp_path):
    header = read_header(
        write(tmp_path / "x.gguf", nano.with_field("general.name", "STRING", "y\x1b" * 50_000).bytes())
    )
    shown = dict(display.facts(facts.identity(header)).rows)["name"]
    assert len(shown) == 200 and "\x1b" not in shown


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc/self/io")
def test_more_texts_than_a_tokenizer_has_are_refused_at_once(tmp_path):
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        file.write(header_bytes([field("k", "[STRING]", [])])[:-8] + (31_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    before = read_chars()
    with pytest.raises(HeaderError, match=f"claims 31,000,000 texts; no tokenizer has over {MAX_STRINGS:,}"):
        read_header(path)
    assert read_chars() - before < 10_000_000, "the texts are refused before they are read"


@pytest.mark.parametrize(
    "code, words",
    [
        (36, "36, which llama.cpp does not know.*bitnet.cpp"),
        (144, "144, which llama.cpp does not know.*ik_llama.cpp"),
    ],
)
def test_types_of_forks_and_removed_types_are_named(tmp_path, code, words):
    path = write(
        tmp_path / "x.gguf", header_bytes(LLAMA, [Spec("blk.0.ffn_down.weight", code, (256, 8), offset=0)])
    )
    with pytest.raises(HeaderError, match=words):
        read_header(path)


def test_a_fork_that_uses_a_type_number_otherwise_is_suspected(tmp_path):
    """42 is Q2_0 in llama.cpp; the fork's blocks are of another size, so the next tensor does not follow."""
    specs = [
        Spec("blk.0.ffn_down.weight", 42, (256, 8), offset=0),
        Spec("blk.0.ffn_norm.weight", "F32", (32,), offset=640),
    ]
    header = read_header(write(tmp_path / "x.gguf", header_bytes(LLAMA, specs) + bytes(768)))
    with pytest.raises(DfqsError, match="a fork of llama.cpp with other type numbers"):
        check_layout(header)


# ---- names and sets ----


def pair(folder: Path, first: list[bytes], second: list[bytes]) -> Path:
    """Two shards of a model with one tensor each."""
    path = write(shard_path(folder / "m", 1, 2), gguf_bytes(first, [EMBEDDING]))
    write(shard_path(folder / "m", 2, 2), gguf_bytes(second, [Spec("blk.0.ffn_up.weight", "F32", (32, 8))]))
    return path


@pytest.mark.parametrize("given", [1, 2])
def test_only_shard_1_need_carry_the_metadata(tmp_path, given):
    pair(tmp_path, [*LLAMA, *split(0)], split(1, count=False, total=False))
    assert len(open_shards(shard_path(tmp_path / "m", given, 2)).tensors) == 2


def test_only_shard_1_need_carry_the_alignment(tmp_path):
    first = gguf_bytes(
        [*LLAMA, *split(0), field("general.alignment", "UINT32", 64)], [EMBEDDING], alignment=64
    )
    path = write(shard_path(tmp_path / "m", 1, 2), first)
    write(
        shard_path(tmp_path / "m", 2, 2), gguf_bytes(split(1), [Spec("blk.0.ffn_up.weight", "F32", (32, 8))])
    )
    assert [header.alignment for header in open_shards(path).headers] == [64, 32]


@pytest.mark.parametrize(
    "stale",
    [
        {},
        {"split.count": 0, "split.no": 3},
        {"split.count": 1, "split.tensors.count": 999},
    ],
    ids=str,
)
def test_a_whole_model_may_have_a_shards_name_and_old_split_fields(nano, tmp_path, stale):
    for name, value in stale.items():
        nano = nano.with_field(name, "INT32" if "tensors" in name else "UINT16", value)
    path = write(tmp_path / "m-00001-of-00002.gguf", nano.bytes())
    assert loader_verdict(path).accepted
    assert open_shards(path).paths == (path,)


def test_shards_of_a_recipe_by_layer_are_one_model(tmp_path):
    """Experts of the first layers in one type, of the others in another, cut between them."""
    blocks = [
        [Spec(f"blk.{n}.ffn_{part}_exps.weight", kind, (32, 8, 2)) for part in ("up", "down") for n in layers]
        for layers, kind in (((0, 1), "Q8_0"), ((2, 3), "Q4_0"))
    ]
    total = field("split.tensors.count", "INT32", 8)
    path = write(
        shard_path(tmp_path / "m", 1, 2), gguf_bytes([*LLAMA, *split(0, total=False), total], blocks[0])
    )
    write(shard_path(tmp_path / "m", 2, 2), gguf_bytes([*split(1, total=False), total], blocks[1]))
    assert len(open_shards(path).tensors) == 8


def test_links_of_the_hubs_cache_keep_their_names(tmp_path):
    links = linked((shard_path(REFERENCE / "DFQS-Nano-IQ1_S-XL", number, 2) for number in (1, 2)), tmp_path)
    assert resolve(links[0]) == (links[0],)
    assert open_shards(links[1]).paths == tuple(links)


def test_upper_case_names_of_shards_are_refused_with_the_name_that_llama_cpp_wants(tmp_path):
    path = pair(tmp_path, [*LLAMA, *split(0)], split(1)).rename(tmp_path / "m-00001-of-00002.GGUF")
    with pytest.raises(ShardError, match="rename it to 'm-00001-of-00002.gguf'"):
        find_shards(read_header(path))


def test_a_second_download_of_a_shard_is_told_from_the_first(tmp_path):
    first = pair(tmp_path, [*LLAMA, *split(0)], split(1))
    copy = tmp_path / "m-00001-of-00002 (1).gguf"
    copy.write_bytes(first.read_bytes())
    with pytest.raises(ShardError, match=r"'m-00001-of-00002.gguf' is there: name that"):
        find_shards(read_header(copy))
    first.unlink()
    with pytest.raises(ShardError, match=r"name all 2: .*, or rename it to 'm-00001-of-00002.gguf'"):
        find_shards(read_header(copy))


def test_a_single_file_may_end_in_upper_case(nano, tmp_path):
    path = write(tmp_path / "m.GGUF", nano.bytes())
    assert loader_verdict(path).accepted and open_shards(path).paths == (path,)


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="names there are Unicode")
def test_a_name_outside_the_encoding_is_no_obstacle(nano, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le.gguf"))
    path.write_bytes(nano.bytes())
    assert open_shards(path).paths == (path,)
    assert loader_verdict(path).accepted
    path.write_bytes(b"")
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    assert "empty file" in str(caught.value)
