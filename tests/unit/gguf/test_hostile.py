"""Bad input: each kind has its own error, which says what, where, and what to do; and costs nothing."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from gguf_fixtures import Spec, field, gguf_bytes, header_bytes, small_gguf, text

from dfqs_nb.core.errors import DfqsError, HeaderError, LayoutError
from dfqs_nb.gguf.header import MAX_HEADER_BYTES, check_layout, read_header
from dfqs_nb.llama import check

HUGE = 1 << 61


def array(code: int, count: int, items: bytes = b"") -> bytes:
    """A metadata record "k" of an array that claims ``count`` items."""
    return text("k") + struct.pack("<IIQ", 9, code, count) + items


def tensor(shape: tuple[int, ...], kind: str | int = "F32", **more: object) -> bytes:
    return gguf_bytes([], [Spec("t", kind, shape, data=b"", offset=0, **more)])


# name -> (bytes, what the error says, what its hint says)
HEADERS = {
    "empty": (b"", "an empty file", "download it again"),
    "not a GGUF": (
        b"\x89PNG\r\n\x1a\n" + bytes(60),
        r"not a GGUF file: starts with b'\\x89PNG'",
        "dfqs-nb inspect",
    ),
    "two bytes of a GGUF": (b"GG", "not a GGUF file: starts with b'GG'", "dfqs-nb inspect"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "not a GGUF file: starts with b'vers'",
        "dfqs-nb inspect",
    ),
    "a web page": (
        b"<!DOCTYPE html><html>404</html>",
        "not a GGUF file: starts with b'<!DO'",
        "dfqs-nb inspect",
    ),
    "big-endian": (
        gguf_bytes([field("k", "UINT32", 1, ">")], order=">"),
        "a big-endian GGUF",
        "gguf-convert-endian",
    ),
    "version 1": (gguf_bytes(version=1), "GGUF version 1; llama.cpp reads versions 2 and 3", "convert"),
    "version 4": (gguf_bytes(version=4), "GGUF version 4;", "convert"),
    "more tensors than bytes": (gguf_bytes(n_tensors=HUGE), rf"claims {HUGE:,} tensors", "download it again"),
    "more fields than bytes": (gguf_bytes(n_fields=HUGE), rf"{HUGE:,} metadata fields", "download it"),
    "a negative count": (gguf_bytes(n_tensors=(1 << 64) - 1), r"claims [\d,]+ tensors", "download it again"),
    "a name longer than the file": (
        header_bytes([struct.pack("<Q", HUGE)], n_fields=1) + bytes(64),
        r"the name of metadata field 0 is cut off: it ends after .* has 96 \(at byte 32\)",
        "download it",
    ),
    "a text longer than the file": (
        header_bytes([text("k") + struct.pack("<IQ", 8, HUGE)]) + bytes(64),
        "metadata field 'k' is cut off: it ends after",
        "download it again",
    ),
    "a text of 2^64 - 1 bytes": (
        header_bytes([text("k") + struct.pack("<IQ", 8, (1 << 64) - 1)]) + bytes(64),
        "metadata field 'k' is cut off: it ends after",
        "download it again",
    ),
    "an array longer than the file": (
        header_bytes([array(4, HUGE)]),
        "metadata field 'k' is cut off: it ends after",
        "download",
    ),
    "a tensor's name longer than the file": (
        header_bytes([], [Spec("t"), Spec("u")]).replace(text("u"), struct.pack("<Q", HUGE)),
        "the name of tensor 1 is cut off: it ends after",
        "download it again",
    ),
    "an array of arrays": (header_bytes([array(9, 1, struct.pack("<IQ", 4, 0))]), "unknown value type 9", ""),
    "a value type from nowhere": (
        header_bytes([text("k") + struct.pack("<II", 13, 0)]),
        "unknown value type 13",
        "",
    ),
    "a field twice": (gguf_bytes([field("k", "UINT8", 1), field("k", "UINT8", 2)]), "'k' stands twice", ""),
    "a field without a name": (
        gguf_bytes([field("", "UINT32", 1)]),
        "the name of metadata field 0 is empty",
        "",
    ),
    "a name that is no text": (gguf_bytes([field(b"\xff\xfe", "UINT32", 1)]), "is not UTF-8 text", ""),
    "an alignment of 0": (gguf_bytes([field("general.alignment", "UINT32", 0)]), "not a power of two", ""),
    "an alignment of 24": (gguf_bytes([field("general.alignment", "UINT32", 24)]), "not a power of two", ""),
    "an alignment in 64 bits": (
        gguf_bytes([field("general.alignment", "UINT64", 32)]),
        "not a power of two in a single UINT32",
        "",
    ),
    "a tensor twice": (gguf_bytes([], [Spec("t"), Spec("t")]), "tensor 't' stands twice", ""),
    "a name too long for ggml": (gguf_bytes([], [Spec("t" * 64)]), "longer than 63 bytes", ""),
    "five dimensions": (tensor((1, 1, 1, 1, 1)), "has 5 dimensions", ""),
    "a negative dimension": (
        header_bytes([], [Spec("t", "F32", (-1,), offset=0)]),
        "cannot have the shape",
        "",
    ),
    "a row of half a block": (tensor((16,), "Q8_0"), r"type Q8_0 cannot have the shape \(16,\)", ""),
    "a shape that overflows": (tensor((1 << 40, 1 << 40)), "cannot have the shape", ""),
    "an overflow beside a 0, which aborts llama.cpp": (tensor((3, 0, 1 << 62)), "cannot have the shape", ""),
    "a tensor type from nowhere": (
        header_bytes([], [Spec("t", 99, (32,), offset=0)]),
        "the type 99, which llama.cpp does not know",
        "newer llama.cpp",
    ),
    "a tensor type that llama.cpp dropped": (
        header_bytes([], [Spec("t", 4, (32,), offset=0)]),
        "the type 4, which llama.cpp does not know",
        "",
    ),
    "cut off in a field": (small_gguf()[:100], "cut off|more than", "download it again"),
    "cut off in the tensor table": (
        header_bytes([], [Spec("t"), Spec("u")])[:70],
        "cut off|more than",
        "download it again",
    ),
}

LAYOUTS = {
    "cut off in the data": (
        small_gguf()[:-300],
        r"[\d,]+ bytes short \(has [\d,]+, needs [\d,]+\)",
        "download",
    ),
    "no data at all": (header_bytes([], [Spec("t")]), "32 bytes short", "download it again"),
    "a tensor over another": (
        gguf_bytes([], [Spec("t"), Spec("u", offset=0)]),
        "'u' overlaps",
        "from its source",
    ),
    "a gap": (
        gguf_bytes([], [Spec("t"), Spec("u", offset=64)]),
        r"'u' leaves a gap \(offset 64, expected 32",
        "from its source",
    ),
    "a tensor past the end of the world": (tensor((1 << 60,)), "bytes short", "download it again"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_bad_header_is_refused_with_what_where_and_hint(tmp_path, case):
    raw, what, hint = HEADERS[case]
    assert_refused(tmp_path / "bad.gguf", raw, what, hint, HeaderError)


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_bad_layout_is_refused_with_what_where_and_hint(tmp_path, case):
    raw, what, hint = LAYOUTS[case]
    assert_refused(tmp_path / "bad.gguf", raw, what, hint, LayoutError)


def assert_refused(path: Path, raw: bytes, what: str, hint: str, kind: type[DfqsError]) -> None:
    path.write_bytes(raw)
    with pytest.raises(kind, match=what) as caught:
        check_layout(read_header(path))
    assert caught.value.where == path and str(caught.value).startswith(str(path))
    assert caught.value.hint and hint in caught.value.hint


def test_llama_cpp_refuses_all_of_them_too_but_for_the_known_few(tmp_path):
    """Where we are stricter: text that is no text, and data that ends early (llama.cpp finds that later)."""
    stricter = {
        "a name that is no text",
        "cut off in the data",
        "no data at all",
        "a tensor past the end of the world",
    }
    cases = {**HEADERS, **LAYOUTS}
    for case, (raw, *_) in cases.items():
        (tmp_path / case).write_bytes(raw)
    answers = check.verdicts([tmp_path / case for case in cases], "parse")
    assert {case for case, verdict in zip(cases, answers, strict=True) if verdict.accepted} == stricter
    assert {case: verdict.death for case, verdict in zip(cases, answers, strict=True) if verdict.death} == {
        "an overflow beside a 0, which aborts llama.cpp": "SIGABRT"
    }


@pytest.mark.parametrize(("path", "what"), [("absent.gguf", "No such file"), (".", "is a folder")])
def test_what_cannot_be_opened_is_an_error_of_the_same_family(tmp_path, path, what):
    with pytest.raises(HeaderError, match=what):
        read_header(tmp_path / path)


GREEDY = {  # claims that a 61 GB file has the bytes for, and what the error names
    "tensors": (header_bytes(n_tensors=1 << 31), "tensor '' stands twice"),
    "fields": (header_bytes(n_fields=1 << 32), "the name of metadata field 0 is empty"),
    "a name": (header_bytes([struct.pack("<Q", 1 << 35)], n_fields=1), "the name of metadata field 0 ends"),
    "a text": (header_bytes([text("k") + struct.pack("<IQ", 8, 1 << 35)]), "metadata field 'k' ends after"),
    "numbers": (header_bytes([array(10, 1 << 32)]), "metadata field 'k' ends after"),
    "strings": (header_bytes([array(8, 1 << 32)]), "metadata field 'k' claims"),
}


@pytest.mark.parametrize("case", GREEDY)
def test_counts_that_would_allocate_the_machine_cost_no_memory(tmp_path, case):
    """On a sparse file of 61 GB, so that the claims do not fail on the file's size."""
    path = tmp_path / "greedy.gguf"
    with path.open("wb") as file:
        file.write(GREEDY[case][0])
        file.truncate(61_540_805_344)
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError, match=GREEDY[case][1]):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_largest_header_that_is_read_costs_little_more_than_its_bytes(tmp_path):
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        file.write(header_bytes([array(0, MAX_HEADER_BYTES - 100)]))
        file.truncate(61_540_805_344)
    tracemalloc.start()
    try:
        read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_HEADER_BYTES
    finally:
        tracemalloc.stop()


def test_a_pipe_that_nobody_writes_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", tmp_path):
        with pytest.raises(HeaderError, match="no regular file; name a file"):
            read_header(path)
