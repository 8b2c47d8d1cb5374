"""Repair of raw concatenations, and taking files as they come."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf_fixtures import split_like_llama

from dfqs_nb.core.errors import DfqsError, OutputError
from dfqs_nb.gguf import broken as specimens
from dfqs_nb.llama import check
from dfqs_nb.merge import merge_model, merge_once, open_source, repair, verify_model
from dfqs_nb.merge.verify import hash_file, manifest_path

pytestmark = pytest.mark.usefixtures("parser_is_asked_once_a_header")

RECORDED = json.loads((Path(__file__).resolve().parents[2] / "data/merge_hashes.json").read_text())["models"][
    "IQ1_S-XL"
]
MERGED = RECORDED["merged"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def once(model, output, **options):
    return merge_once(open_source(model), output, **options)


@pytest.fixture
def glued(tmp_path: Path) -> Path:
    return specimens.glue(tmp_path)


@pytest.fixture(params=["2", "3", "7"])
def glued_any(request, tmp_path, merged_reference) -> Path:
    (tmp_path / "s").mkdir()
    shards = split_like_llama(
        merged_reference, RECORDED["splits"][request.param]["split_max_tensors"], tmp_path / "s" / "m"
    )
    path = tmp_path / "glued.gguf"
    path.write_bytes(b"".join(shard.read_bytes() for shard in shards))
    return path


def test_repair_gives_the_file_of_a_true_merge(glued_any, tmp_path):
    before = sha256(glued_any)
    result = repair(glued_any, tmp_path / "out.gguf")
    assert result.sha256 == sha256(result.path) == MERGED
    assert sha256(glued_any) == before, "the damaged file is only read"


def test_repair_in_place_gives_the_file_of_a_true_merge(glued_any):
    size = glued_any.stat().st_size
    result = repair(glued_any, in_place=True)
    assert result.path == glued_any and result.sha256 == sha256(glued_any) == MERGED
    assert result.nbytes < size
    assert {p.name for p in glued_any.parent.iterdir()} == {"s", "glued.gguf", manifest_path(glued_any).name}


def test_shards_glued_in_the_wrong_order_are_repaired_too(tmp_path):
    first, second = specimens.reference_shards().paths
    path = tmp_path / "odd.gguf"
    path.write_bytes(second.read_bytes() + first.read_bytes())
    assert repair(path, tmp_path / "out.gguf").sha256 == MERGED


def test_repaired_model_is_proven(glued):
    repair(glued, in_place=True)
    assert (
        "the tensors of its shards"
        in verify_model(glued, against=specimens.reference_shards().paths[0]).compared
    )
    assert check.parse(glued).accepted


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.write_bytes(specimens.reference_shards().paths[0].read_bytes()),
        lambda p: p.write_bytes(b""),
    ],
    ids=["shard", "empty"],
)
def test_what_is_no_concatenation_is_refused(tmp_path, make):
    path = tmp_path / "x.gguf"
    make(path)
    before = path.read_bytes()
    for act in (
        lambda: repair(path, in_place=True),
        lambda: repair(path, tmp_path / "o"),
    ):
        with pytest.raises(DfqsError) as caught:
            act()
        assert caught.value.hint
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_concatenation_that_lacks_its_end_is_refused_and_kept(glued):
    os.truncate(glued, glued.stat().st_size - 1000)
    with pytest.raises(DfqsError, match="short|cut"):
        repair(glued, in_place=True)
    assert glued.exists() and len(list(glued.parent.iterdir())) == 1


def test_the_target_must_be_said_once(glued, tmp_path):
    for options in ({}, {"output": tmp_path / "o", "in_place": True}):
        with pytest.raises(OutputError, match="say where"):
            repair(glued, **options)
    with pytest.raises(OutputError, match="is one of the files"):
        repair(glued, glued, overwrite=True)


def test_merge_once_takes_what_comes(glued, tmp_path, merged_reference):
    first = specimens.reference_shards().paths[0]
    for number, model in enumerate((first, glued)):
        assert once(model, tmp_path / f"{number}.gguf").sha256 == MERGED
    alone = once(merged_reference, tmp_path / "none.gguf")
    assert alone.path == merged_reference and alone.sha256 == MERGED and not (tmp_path / "none.gguf").exists()


def test_a_hash_that_a_merge_computed_is_not_computed_again(tmp_path, monkeypatch):
    made = merge_model(specimens.reference_shards().paths[0], tmp_path / "m.gguf")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (made.path, manifest_path(made.path)):
        shutil.copy2(path, moved)
    hashed: list[Path] = []

    def noted(path: Path, *rest: Any, **options: Any) -> tuple[str, dict[str, str]]:
        hashed.append(path)
        return hash_file(path, *rest, **options)

    monkeypatch.setattr("dfqs_nb.merge.merge.hash_file", noted)
    again = once(made.path, tmp_path / "none.gguf")
    assert again.sha256 == made.sha256 and not hashed
    once(made.path, tmp_path / "none.gguf", fresh=True)
    once(moved / "m.gguf", tmp_path / "none.gguf")
    assert hashed == [made.path, moved / "m.gguf"], "a copy has another inode, whatever its time"


def test_a_source_is_opened_by_what_its_bytes_say(glued):
    pair = specimens.reference_shards().paths
    assert open_source(pair[1]).files == open_source(pair).shards.paths == pair
    assert open_source(glued).files == (glued,) and len(open_source(glued).shards.headers) == 2
    assert [open_source(model).plan.nbytes for model in (pair[1], glued)] == [RECORDED["bytes"]] * 2


def test_merge_once_does_not_do_the_same_work_twice(tmp_path):
    pair = [Path(shutil.copy(path, tmp_path)) for path in specimens.reference_shards().paths]
    output = tmp_path / "out.gguf"
    first = once(pair[0], output)
    again = once(pair[1], output)
    assert again.sha256 == first.sha256 and again.seconds == first.seconds
    made = once(pair[0], output, fresh=True).seconds
    assert made != first.seconds
    os.utime(output, (1, 1))
    touched = once(pair[0], output).seconds
    assert touched != made, "the output was touched"
    os.utime(pair[0], (1, 1))
    assert once(pair[0], output).seconds != touched, "a shard was touched"
