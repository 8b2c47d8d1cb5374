"""The header of a GGUF file: metadata fields, tensor table, data section.

We decode an array (such as 129,280 token strings) when it is asked for, and check each count before we
allocate, so a hostile file costs nothing. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from dfqs_nb.core.errors import HeaderError, LayoutError
from dfqs_nb.core.files import is_file, there_is

# Types of metadata values in the order of their codes, with the struct format of a number.
FORMATS = dict(UINT8="B", INT8="b", UINT16="H", INT16="h", UINT32="I", INT32="i", FLOAT32="f", BOOL="?")
FORMATS |= dict(STRING="", ARRAY="", UINT64="Q", INT64="q", FLOAT64="d")
VALUE_TYPES = dict(enumerate(FORMATS))
# Tensor types: code, name, elements and bytes of a block, by ggml's type traits (gguf-py has 40 for Q8_1).
_TYPES = map(
    str.split,
    """
0 F32 1 4 | 1 F16 1 2 | 2 Q4_0 32 18 | 3 Q4_1 32 20 | 6 Q5_0 32 22 | 7 Q5_1 32 24 | 8 Q8_0 32 34 |
9 Q8_1 32 36 | 10 Q2_K 256 84 | 11 Q3_K 256 110 | 12 Q4_K 256 144 | 13 Q5_K 256 176 | 14 Q6_K 256 210 |
15 Q8_K 256 292 | 16 IQ2_XXS 256 66 | 17 IQ2_XS 256 74 | 18 IQ3_XXS 256 98 | 19 IQ1_S 256 50 |
20 IQ4_NL 32 18 | 21 IQ3_S 256 110 | 22 IQ2_S 256 82 | 23 IQ4_XS 256 136 | 24 I8 1 1 | 25 I16 1 2 |
26 I32 1 4 | 27 I64 1 8 | 28 F64 1 8 | 29 IQ1_M 256 56 | 30 BF16 1 2 | 34 TQ1_0 256 54 | 35 TQ2_0 256 66 |
39 MXFP4 32 17 | 40 NVFP4 64 36 | 41 Q1_0 128 18 | 42 Q2_0 64 18
""".split("|"),
)
TENSOR_TYPES = {int(code): (name, int(n), int(n_bytes)) for code, name, n, n_bytes in _TYPES}

MAGIC, DEFAULT_ALIGNMENT = b"GGUF", 32
MAX_NAME_BYTES, MAX_LAYERS = 63, 512  # GGML_MAX_NAME less its terminating zero, LLAMA_MAX_LAYERS
MAX_HEADER_BYTES = 1 << 28  # real headers stay under 50 MB; a larger claim is a hostile or broken file
MAX_STRINGS = 1 << 22  # in one array: the largest vocabularies and merge lists have under a million
GET_AGAIN = "get the file from its source again"
OTHER_TOOL = "the file was converted by another tool or an older one: convert it again"
CUT_OFF = "the download was cut off (download it again), or it is a part of a file: `dfqs-nb inspect FILE`"
FORK = "a fork (ik_llama.cpp, bitnet.cpp), an old or a newer llama.cpp made it: run it there, or requantize"
OTHER_ORDER = "convert it with gguf-py's gguf-convert-endian"
OTHER_VERSION = "convert the original model again with a current llama.cpp"
FIRST_READ, ARRAY, U64 = 1 << 16, 9, struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Field:
    """A metadata field, not decoded; its places are bytes of the header."""

    type: str  # of its value or items
    count: int | None  # of items; None: no array
    record: tuple[int, int]  # start and end of all of it
    value_start: int  # of the value or the first item


@dataclass(frozen=True, slots=True)
class Tensor:
    """A row of the tensor table."""

    name: str
    shape: tuple[int, ...]  # in ggml's order
    type: str
    type_code: int
    offset: int  # from the start of the data section
    n_elements: int
    nbytes: int  # of data, without padding


@dataclass(frozen=True)
class GGUFHeader(Mapping[str, Any]):
    """A GGUF header as a read-only mapping from field name to value, and its tensor table."""

    path: Path
    start: int  # in the file; 0 except in glued files
    version: int
    alignment: int
    fields: Mapping[str, Any] = field(repr=False)  # a `Field` each; values in a header made by hand
    tensors: tuple[Tensor, ...] = field(repr=False)
    data_offset: int  # in the file
    file_size: int
    raw: bytes = field(repr=False)  # from the magic to the end of the tensor table

    def __getitem__(self, name: str) -> Any:
        """The value of a field: int, float, bool, str, or a list of them."""
        value = self.fields[name]
        return _decode(self.raw, value) if isinstance(value, Field) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    @property
    def architecture(self) -> str:
        """``general.architecture``; empty in a header without it (shards 2 to N)."""
        return self.text("general.architecture")

    def arch(self, key: str, default: Any = None) -> Any:
        """The value of the architecture's own ``key``, as in ``arch("block_count")``."""
        return self.get(f"{self.architecture}.{key}", default)

    def text(self, name: str) -> str:
        """A field's text; empty where it is missing or, as in a hostile file, no text."""
        value = self.get(name)
        return value if isinstance(value, str) else ""

    def counts(self, key: str) -> list[int]:
        """Counts (one, or one a layer) of a field or an architecture's key; empty where it is missing."""
        value = self[key] if key in self.fields else self.arch(key, [])
        values = value if isinstance(value, list) else [value]
        if not all(type(item) is int and item >= 0 for item in values):
            raise HeaderError(f"the key {key} is not a count", where=self.path, hint=OTHER_TOOL)
        return values

    def count(self, key: str, default: int = 0) -> int:
        """A single count, as `counts`; of one for each layer, the largest."""
        return max(self.counts(key), default=default)

    @property
    def n_layers(self) -> int:
        """The architecture's ``block_count``; 0 where it is missing."""
        if (count := self.count("block_count")) > MAX_LAYERS:  # a hostile number fills the memory
            what = f"claims {count:,} layers; llama.cpp takes {MAX_LAYERS}"
            raise HeaderError(what, where=self.path, hint=GET_AGAIN)
        return count

    @property
    def data_end(self) -> int:
        """Where the last tensor's bytes end in the file, without the padding after them."""
        return self.data_offset + max((t.offset + t.nbytes for t in self.tensors), default=0)

    @property
    def end_offset(self) -> int:
        """Where the file ends, as llama.cpp pads it, if it holds only this model."""
        return self.start + padded(self.data_end - self.start, self.alignment)

    def next_start(self, file: Any) -> int | None:
        """The byte where another header follows (with or without padding), as in glued shards, or None."""
        for at in dict.fromkeys((self.data_end, self.end_offset)):
            if at < self.file_size:  # a hostile offset is no place to seek
                file.seek(at)
                if file.read(len(MAGIC)) == MAGIC:
                    return at
        return None


def padded(nbytes: int, alignment: int) -> int:
    """``nbytes`` rounded up to a multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment


def read_header(path: str | Path) -> GGUFHeader:
    """Read the header at the start of a GGUF file. `HeaderError`: llama.cpp could not read it."""
    return next(headers_inside(Path(path)))


def headers_inside(path: Path, file: Any = None) -> Iterator[GGUFHeader]:
    """The header of a file, or of one that is open, and those of the shards that are glued behind it."""
    start: int | None = 0
    with nullcontext(file) if file else opened(path) as source:
        while start is not None:
            header = _parse(_Cursor(path, source, start))
            yield header
            start = header.next_start(source)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; `HeaderError`: it is none, or cannot be read."""
    if there_is(path) and not is_file(path):  # a pipe would never end
        raise HeaderError("is a folder, or no regular file", where=path, hint="name a file")
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        hint = "check the path and its permissions"
        if re.match("(hf|https?):/", str(path)):
            hint = "that is an address: download the file, and give its path"
        elif isinstance(error, FileNotFoundError):
            hint = "check the path (`dfqs-nb models` lists names, for commands that take a MODEL)"
        raise HeaderError(f"cannot be read ({error.strerror})", where=path, hint=hint) from error


def check_layout(header: GGUFHeader) -> None:
    """Check, as llama.cpp does, that the tensors lie one after another, aligned and inside the file."""
    expected = 0
    for tensor in header.tensors:
        if tensor.offset != expected:
            kind = "overlaps the tensor before it" if tensor.offset < expected else "leaves a gap"
            what = f"tensor {tensor.name!r} {kind} (offset {tensor.offset:,}, expected {expected:,})"
            hint = "the file was written wrongly, or by a fork of llama.cpp with other type numbers"
            raise LayoutError(what, where=header.path, hint=f"{hint}: {GET_AGAIN}")
        expected = padded(tensor.offset + tensor.nbytes, header.alignment)
    if (missing := header.data_end - header.file_size) > 0:
        what = f"{missing:,} bytes short (has {header.file_size:,}, needs {header.data_end:,})"
        raise LayoutError(what, where=header.path, hint=CUT_OFF)


class _Cursor:
    """Reads forward through a header, keeps its bytes, and never asks for more than there is."""

    def __init__(self, path: Path, file: BinaryIO, start: int) -> None:
        self.path, self.file, self.start, self.size = path, file, start, file.seek(0, 2)
        self.inside = ""  # the field or tensor that is read
        self.most, self.bytes, self.position = self.size - start, bytearray(), 0
        file.seek(start)

    def fail(self, what: str, hint: str = GET_AGAIN) -> HeaderError:
        what = f"{self.inside} {what} (at byte {self.start + self.position:,})".lstrip()
        return HeaderError(what, where=self.path, hint=hint)

    def need(self, end: int) -> None:
        """Read the header's bytes up to ``end``."""
        if end <= len(self.bytes):
            return
        if end > self.most:
            what = f"is cut off: it ends after {end:,} bytes and the file has {self.most:,}"
            raise self.fail(what if self.inside else f"the header {what}", CUT_OFF)
        if end > MAX_HEADER_BYTES:
            raise self.fail(f"ends after {end:,} bytes; no header has over {MAX_HEADER_BYTES:,}")
        goal = min(max(end, 2 * len(self.bytes), FIRST_READ), self.most, MAX_HEADER_BYTES)
        while len(self.bytes) < goal:
            if not (chunk := self.file.read(goal - len(self.bytes))):
                raise self.fail("ends early: the file shrank meanwhile", "try again when it is at rest")
            self.bytes += chunk

    def skip(self, n_bytes: int) -> int:
        """Go over bytes, and return where they begin."""
        start, end = self.position, self.position + n_bytes
        self.need(end)
        self.position = end
        return start

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack_from("<" + form, self.bytes, self.skip(struct.calcsize("<" + form)))

    def text(self) -> str:
        start = self.skip(*self.numbers("Q"))
        try:
            return str(self.bytes[start : self.position], "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("is not UTF-8 text") from error

    def skip_strings(self, count: int) -> None:
        if count > MAX_STRINGS:
            raise self.fail(f"claims {count:,} texts; no tokenizer has over {MAX_STRINGS:,}")
        position, held, unpack = self.position, self.bytes, U64.unpack_from
        for _ in range(count):  # of a large vocabulary the slowest lines of all
            try:
                position += 8 + unpack(held, position)[0]
            except (struct.error, OverflowError):  # it ends behind the bytes read, or behind any file
                self.need(position + 8)
                position += 8 + unpack(held, position)[0]
        self.need(position)
        self.position = position


def _parse(cursor: _Cursor) -> GGUFHeader:
    if not cursor.most:
        raise cursor.fail("an empty file", "download it again")
    cursor.need(min(len(MAGIC), cursor.most))
    if (start := bytes(cursor.bytes[: len(MAGIC)])) != MAGIC:
        what = f"not a GGUF file: starts with {start!r}, not {MAGIC!r}"
        raise cursor.fail(what, "`dfqs-nb inspect FILE` says what it is")
    _, version = cursor.numbers("4sI")
    if version & 0xFFFF == 0:
        raise cursor.fail("a big-endian GGUF, which this machine's llama.cpp does not read", OTHER_ORDER)
    if version not in (2, 3):
        raise cursor.fail(f"GGUF version {version}; llama.cpp reads versions 2 and 3", OTHER_VERSION)
    n_tensors, n_fields = cursor.numbers("QQ")
    if n_tensors * 24 + n_fields * 13 > cursor.most:  # each takes that many bytes, or more
        what = f"claims {n_tensors:,} tensors and {n_fields:,} metadata fields, more than the file has left"
        raise cursor.fail(what, CUT_OFF)
    fields, alignment = _read_fields(cursor, n_fields), DEFAULT_ALIGNMENT
    if entry := fields.get("general.alignment"):
        cursor.inside = "general.alignment"
        is_one = entry.type == "UINT32" and entry.count is None
        if not is_one or (alignment := _decode(cursor.bytes, entry)).bit_count() != 1:
            raise cursor.fail("is not a power of two in a single UINT32")
    tensors, cursor.inside = _read_tensors(cursor, n_tensors), ""
    raw = bytes(memoryview(cursor.bytes)[: cursor.position])
    data = cursor.start + (padded(len(raw), alignment) if n_tensors else len(raw))
    if data > cursor.size:
        raise cursor.fail("the file ends before its data section", CUT_OFF)
    return GGUFHeader(cursor.path, cursor.start, version, alignment, fields, tensors, data, cursor.size, raw)


def _read_fields(cursor: _Cursor, count: int) -> Mapping[str, Field]:
    fields: dict[str, Field] = {}
    for i in range(count):
        cursor.inside = f"the name of metadata field {i}"
        start, name, n = cursor.position, cursor.text(), None
        if not name:
            raise cursor.fail("is empty")
        cursor.inside = f"metadata field {name!r:.80}"
        if name in fields:
            raise cursor.fail("stands twice")
        (kind,) = cursor.numbers("I")
        if kind == ARRAY:
            kind, n = cursor.numbers("IQ")
        if kind not in VALUE_TYPES or kind == ARRAY:
            raise cursor.fail(f"has the unknown value type {kind}")
        form, values, value_start = FORMATS[VALUE_TYPES[kind]], 1 if n is None else n, cursor.position
        if form:
            cursor.skip(values * struct.calcsize("<" + form))
        else:
            cursor.skip_strings(values)
        fields[name] = Field(VALUE_TYPES[kind], n, (start, cursor.position), value_start)
    return MappingProxyType(fields)


def _read_tensors(cursor: _Cursor, count: int) -> tuple[Tensor, ...]:
    tensors: dict[str, Tensor] = {}
    for i in range(count):
        cursor.inside = f"the name of tensor {i}"
        name = cursor.text()
        if len(name.encode()) > MAX_NAME_BYTES:
            raise cursor.fail(f"is longer than {MAX_NAME_BYTES} bytes")
        cursor.inside = f"tensor {name!r}"
        if name in tensors:
            raise cursor.fail("stands twice")
        (n_dims,) = cursor.numbers("I")
        if n_dims > 4:
            raise cursor.fail(f"has {n_dims} dimensions; ggml has 4")
        shape = cursor.numbers(f"{n_dims}q") or (1,)
        code, offset = cursor.numbers("IQ")
        if code not in TENSOR_TYPES:
            raise cursor.fail(f"has the type {code}, which llama.cpp does not know", FORK)
        type_name, block, block_bytes = TENSOR_TYPES[code]
        # A dimension of 0 hides no overflow: llama.cpp aborts on the product of the others.
        if min(shape) < 0 or math.prod(max(extent, 1) for extent in shape) >= 1 << 62 or shape[0] % block:
            raise cursor.fail(f"of type {type_name} cannot have the shape {shape}")
        n = math.prod(shape)
        tensors[name] = Tensor(name, shape, type_name, code, offset, n, n // block * block_bytes)
    return tuple(tensors.values())


def _decode(raw: bytes | bytearray, entry: Field) -> Any:
    """The value of a field; text that is not UTF-8 gets replacement characters."""
    n, position, form = 1 if entry.count is None else entry.count, entry.value_start, FORMATS[entry.type]
    values = list(struct.unpack_from(f"<{n}{form}", raw, position)) if form else []
    while len(values) < n:
        end = position + 8 + U64.unpack_from(raw, position)[0]
        values.append(raw[position + 8 : end].decode("utf-8", errors="replace"))
        position = end
    return values[0] if entry.count is None else values
