"""How two models differ, in files we know and over a server."""

from __future__ import annotations

import shutil

import pytest
from hub_server import HubServer

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf import broken
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.models import outline, resolve
from dfqs_nb.workbook.file_commands import compare

NANO = resolve("dfqs-nano-iq1_s-xl")


def test_a_model_equals_its_merged_file(merged_reference):
    with outline(NANO[0]) as shards, outline(merged_reference) as whole:
        differences, sentence = compare(shards, whole, data=True)
    assert not differences
    assert sentence.startswith("equal: ") and sentence.endswith("bytes of 126 tensors compared")


def test_each_kind_of_difference_is_named(tmp_path, merged_reference):
    changed = broken.with_field(merged_reference, tmp_path / "m.gguf", "deepseek4.expert_used_count", 3)
    with changed.open("r+b") as file:
        file.seek(-40, 2)
        byte = file.read(1)
        file.seek(-40, 2)
        file.write(bytes([byte[0] ^ 1]))
    with outline(merged_reference) as a, outline(changed) as b:
        differences, _ = compare(a, b, data=True)
        last = a.tensors[-1].name
    assert differences == {
        "metadata": ["deepseek4.expert_used_count: UINT32 2 | UINT32 3"],
        "other bytes": [last],
    }
    with outline(NANO[0]) as a, outline("dfqs-nano-q8_0") as b:
        differences, sentence = compare(a, b)
    assert len(differences["other type or shape"]) == 12 and "bytes not compared" in sentence


def test_a_remote_model_is_compared_without_being_stored(merged_reference, tmp_path):
    files = {path.name: path for path in NANO}
    with HubServer({"a/b": files}) as server:
        address = f"{server.endpoint}/a/b/resolve/main/{NANO[0].name}"
        with outline(address) as far, outline(merged_reference) as here:
            assert compare(far, here, data=True)[0] == {}
            copies = sum(path.stat().st_blocks * 512 for path in far.paths)
    assert copies < sum(path.stat().st_size for path in NANO), "only headers lie on the disk"


def test_glued_shards_differ_in_nothing_but_have_no_bytes_to_compare(tmp_path):
    glued = broken.glue(tmp_path)
    shutil.copy(glued, tmp_path / "copy.gguf")
    with outline(glued) as a, outline(NANO[0]) as b:
        assert compare(a, b)[0] == {}
        with pytest.raises(DfqsError, match="dfqs-nb repair"):
            compare(a, b, data=True)


def test_lists_and_long_texts_show_where_they_differ(tmp_path, merged_reference):
    header = read_header(merged_reference)
    raw, tokens = bytearray(merged_reference.read_bytes()), header.fields["tokenizer.ggml.tokens"]
    at = raw.index(b"the", tokens.value_start)
    raw[at : at + 3] = b"THE"
    template = raw.index(b"endfor")
    raw[template : template + 6] = b"ENDFOR"
    (tmp_path / "m.gguf").write_bytes(raw)
    with outline(merged_reference) as a, outline(tmp_path / "m.gguf") as b:
        lines = compare(a, b)[0]["metadata"]
    assert len(lines) == 2
    for line in lines:
        first, second = line.split(" | ")
        assert first.rpartition(": ")[2] != second, line
    assert any("'Ġthe'" in line and "'ĠTHE'" in line for line in lines), lines
    assert any("endfor" in line and "ENDFOR" in line for line in lines), lines
