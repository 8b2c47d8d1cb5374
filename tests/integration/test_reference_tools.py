"""The records of tests/data against the tools they came from, and our merge against the tool on odd shards."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import llama_cpp_tools
import pytest
import record_references as records
from gguf_fixtures import Spec, every_type, field, gguf_bytes, split_fields

from dfqs_nb.gguf.header import read_header
from dfqs_nb.llama import check
from dfqs_nb.merge import merge_model

MERGES = records.read("merge_hashes.json")


def test_the_records_are_of_the_locked_version():
    version = llama_cpp_tools.locked()[0]
    assert MERGES["llama_cpp_python"] == version
    assert records.read("vocabulary_digests.json")["llama_cpp_python"] == version


@pytest.mark.slow
@pytest.mark.parametrize("name", records.QUANTIZATIONS)
def test_the_tool_gives_the_recorded_hashes_again(tmp_path, name):
    assert records.merge_record(name, tmp_path) == MERGES["models"][name]


@pytest.mark.slow
@pytest.mark.parametrize("name", records.read("vocabulary_digests.json")["files"])
def test_gguf_py_reads_the_recorded_vocabularies_again(name):
    path = llama_cpp_tools.source() / "models" / name
    assert records.vocabulary_record(path) == records.read("vocabulary_digests.json")["files"][name]


@pytest.mark.slow
def test_the_tools_run():
    for name in llama_cpp_tools.ONE_FILE:
        assert os.access(llama_cpp_tools.tool(name), os.X_OK)


ONE, TWO = Spec("one", "F32", (3,)), Spec("two", "Q8_0", (32, 2))
NUMBER, TENSORS, COUNT = split_fields(0, 2, 2)
ARCH = field("general.architecture", "STRING", "llama")


def shard(*fields: bytes, tensors: list[Spec] | None = None, **header: Any) -> bytes:
    return gguf_bytes([ARCH, *fields], [ONE] if tensors is None else tensors, **header)


ODD = {  # first shards that the tool reads, but would not write like this
    "split fields first": gguf_bytes([COUNT, NUMBER, TENSORS, ARCH], [ONE]),
    "split fields between": shard(COUNT, TENSORS, field("a", "INT8", -1), NUMBER, *every_type()),
    "no tensor in it": shard(*every_type(), *split_fields(0, 2, 1), tensors=[]),
    "version 2": shard(*split_fields(0, 2, 2), version=2),
    "trailing dimensions of 1": shard(*split_fields(0, 2, 2), tensors=[Spec("one", "F32", (3, 1, 1, 1))]),
    "no dimension": shard(*split_fields(0, 2, 2), tensors=[Spec("one", "F32", ())]),
    "an alignment of 32, said": shard(field("general.alignment", "UINT32", 32), *split_fields(0, 2, 2)),
}
LOSSY = {  # what the tool does not carry over as it is, and we do
    "a bool of 2": shard(field("b", "BOOL", 2), *split_fields(0, 2, 2)),
    "text with a zero byte": shard(field("t", "STRING", "a\0b"), *split_fields(0, 2, 2)),
    "an alignment of 64": shard(
        field("general.alignment", "UINT32", 64), *split_fields(0, 2, 2), alignment=64
    ),
}


def merge_both(folder: Path, first: bytes) -> tuple[Path, Path, Path]:
    """The first shard, and what we and the tool make of it and a second one."""
    paths = [folder / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    paths[0].write_bytes(first)
    header = read_header(paths[0])
    alignment = {"alignment": header.alignment}
    extra = [field("general.alignment", "UINT32", 64)] if header.alignment == 64 else []
    n_tensors = len(header.tensors) + 1
    paths[1].write_bytes(gguf_bytes([*extra, *split_fields(1, 2, n_tensors)], [TWO], **alignment))
    tool = str(llama_cpp_tools.tool("llama-gguf-split"))
    subprocess.run(
        [tool, "--merge", str(paths[0]), str(folder / "theirs.gguf")], check=True, capture_output=True
    )
    return paths[0], merge_model(paths[0], folder / "ours.gguf").path, folder / "theirs.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("case", ODD)
def test_odd_shards_merge_as_the_tool_merges_them(tmp_path, case):
    _, ours, theirs = merge_both(tmp_path, ODD[case])
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("case", LOSSY)
def test_where_the_tool_loses_something_we_keep_it(tmp_path, case):
    """The known differences: if one of these fails, the tool has changed and the list is to be cut."""
    source, ours, theirs = merge_both(tmp_path, LOSSY[case])
    assert ours.read_bytes() != theirs.read_bytes()
    kept = {
        name: read_header(source).raw[slice(*one.record)]
        for name, one in read_header(source).fields.items()
        if name != "split.count"
    }
    merged = read_header(ours)
    assert {name: merged.raw[slice(*merged.fields[name].record)] for name in kept} == kept
    assert check.parse(ours).accepted
    assert check.parse(theirs).accepted == (case != "an alignment of 64")
