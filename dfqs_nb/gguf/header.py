"""The header of a GGUF file: metadata fields, tensor table, data section.

We read only the header's bytes, and decode an array (such as 129,280 token strings) when it is asked for.
Every count and length is checked against the bytes that are there before anything is allocated, so a hostile
file costs nothing. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from dfqs_nb.core.errors import HeaderError, LayoutError
from dfqs_nb.core.files import is_file, there_is
from dfqs_nb.gguf.types import FORMATS, TENSOR_TYPES, VALUE_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63  # GGML_MAX_NAME, less its terminating zero
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_HEADER_BYTES = 1 << 28  # real headers stay under 50 MB; a larger claim is a hostile or broken file
MAX_STRINGS = 1 << 22  # in one array: the largest vocabularies and merge lists have under a million

GET_AGAIN = "get the file from its source again"
OTHER_TOOL = "the file was converted by another tool or an older one: convert it again"
WRITTEN_WRONGLY = "the file was written wrongly, or by a fork of llama.cpp with other type numbers"
CUT_OFF = "the download was cut off (download it again), or it is a part of a file: `dfqs-nb inspect FILE`"
FORK = "a fork (ik_llama.cpp, bitnet.cpp), an old or a newer llama.cpp made it: run it there, or requantize"
OTHER_ORDER = "convert it with gguf-py's gguf-convert-endian"
OTHER_VERSION = "convert the original model again with a current llama.cpp"
NO_GGUF = "`dfqs-nb inspect FILE` says what it is"
FIRST_READ, ARRAY = 1 << 16, 9
_U64 = struct.Struct("<Q")


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

    def __contains__(self, name: object) -> bool:
        return name in self.fields  # without decoding it

    @property
    def architecture(self) -> str:
        """``general.architecture``; empty in a header without it (shards 2 to N)."""
        return self.text("general.architecture")

    def arch(self, key: str, default: Any = None) -> Any:
        """The value of the architecture's own ``key``, as in ``arch("block_count")``."""
        return self.get(f"{self.architecture}.{key}", default)

    # In a hostile file a field may have any type, so code that computes reads it through these methods.

    def text(self, name: str) -> str:
        """A field's text; empty where it is missing or no text."""
        value = self.get(name)
        return value if isinstance(value, str) else ""

    def counts(self, key: str) -> list[int]:
        """Counts (one, or one a layer) of a field or of an architecture's own key; empty where it is missing.

        `HeaderError`: it holds something else.
        """
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
        count = self.count("block_count")
        if count > MAX_LAYERS:  # a hostile number fills the memory
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


def read_header(path: str | Path, start: int = 0, *, file: Any = None) -> GGUFHeader:
    """Read the GGUF header that starts at byte ``start`` of the file.

    ``file``: an open binary file to read instead of the one at ``path``, such as a `remote.RemoteFile`.
    `HeaderError`, where llama.cpp could not read it: what is wrong, at which byte, and the next step.
    """
    path = Path(path)
    if not file and there_is(path) and not is_file(path):  # a pipe would never end
        raise HeaderError("is a folder, or no regular file", where=path, hint="name a file")
    try:
        with contextlib.nullcontext(file) if file else path.open("rb", buffering=0) as opened:
            return _parse(_Cursor(path, opened, start))
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> HeaderError:
    """The error for a file that cannot be opened."""
    hint = "check the path and its permissions"
    if re.match("(hf|https?):/", str(path)):
        hint = "that is an address: download the file, and give its path"
    elif isinstance(error, FileNotFoundError):
        hint = "check the path (`dfqs-nb models` lists names, for commands that take a MODEL)"
    return HeaderError(f"cannot be read ({error.strerror})", where=path, hint=hint)


def check_layout(header: GGUFHeader) -> None:
    """Check, as llama.cpp does, that the tensors lie one after another, aligned and inside the file.

    `LayoutError` names the first misplaced tensor, or the missing bytes.
    """
    expected = 0
    for tensor in header.tensors:
        if tensor.offset != expected:
            kind = "overlaps the tensor before it" if tensor.offset < expected else "leaves a gap"
            what = f"tensor {tensor.name!r} {kind} (offset {tensor.offset:,}, expected {expected:,})"
            raise LayoutError(what, where=header.path, hint=f"{WRITTEN_WRONGLY}: {GET_AGAIN}")
        expected = padded(tensor.offset + tensor.nbytes, header.alignment)
    if (missing := header.data_end - header.file_size) > 0:
        what = f"{missing:,} bytes short (has {header.file_size:,}, needs {header.data_end:,})"
        raise LayoutError(what, where=header.path, hint=CUT_OFF)


class _Cursor:
    """Reads forward through a header, keeps its bytes, and never asks for more than there is."""

    def __init__(self, path: Path, file: BinaryIO, start: int) -> None:
        self.path, self.file, self.start, self.size = path, file, start, file.seek(0, 2)
        self.bytes, self.position = bytearray(), 0

    def fail(self, what: str, hint: str = GET_AGAIN) -> HeaderError:
        return HeaderError(f"{what} (at byte {self.start + self.position:,})", where=self.path, hint=hint)

    def claim(self, nbytes: int, what: str) -> None:
        """Refuse a claim of more bytes than the file has left."""
        if nbytes > self.size - self.start - self.position:
            raise self.fail(f"{what}, more than the file has left", CUT_OFF)

    def need(self, end: int) -> None:
        """Read the header's bytes up to ``end``."""
        if end <= len(self.bytes):
            return
        most = self.size - self.start
        if end > most:
            what = f"the header is cut off: it needs {end:,} bytes and the file has {most:,}"
            raise self.fail(what, CUT_OFF)
        if end > MAX_HEADER_BYTES:
            raise self.fail(f"the header claims over {MAX_HEADER_BYTES:,} bytes")
        goal = min(max(end, 2 * len(self.bytes), FIRST_READ), most, MAX_HEADER_BYTES)
        self.file.seek(self.start + len(self.bytes))
        while len(self.bytes) < goal:
            chunk = self.file.read(goal - len(self.bytes))
            if not chunk:
                raise self.fail("the file shrank while it was read", "try again when it is at rest")
            self.bytes += chunk

    def numbers(self, form: str) -> tuple[Any, ...]:
        start, end = self.position, self.position + struct.calcsize("<" + form)
        self.need(end)
        self.position = end
        return struct.unpack_from("<" + form, self.bytes, start)

    def text(self, what: str) -> str:
        (length,) = self.numbers("Q")
        self.claim(length, f"{what} claims {length:,} bytes")
        start, self.position = self.position, self.position + length
        self.need(self.position)
        try:
            return self.bytes[start : self.position].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 text") from error

    def skip_strings(self, count: int, what: str) -> None:
        if count > MAX_STRINGS:
            raise self.fail(f"{what} claims {count:,} texts; no tokenizer has over {MAX_STRINGS:,}")
        position, unpack = self.position, _U64.unpack_from
        while count:
            held = self.bytes
            try:
                while count:
                    position += 8 + unpack(held, position)[0]
                    count -= 1
            except (struct.error, OverflowError):  # the text ends behind the bytes read, or behind any file
                if position + 8 > self.size - self.start:
                    raise self.fail(f"{what} runs past the end of the file", CUT_OFF) from None
                self.need(position + 8)
        self.need(position)
        self.position = position


def _parse(cursor: _Cursor) -> GGUFHeader:
    if cursor.size == cursor.start:
        raise cursor.fail("an empty file", "download it again")
    cursor.need(min(len(MAGIC), cursor.size - cursor.start))
    if not cursor.bytes.startswith(MAGIC):
        start = bytes(cursor.bytes[: len(MAGIC)])
        raise cursor.fail(f"not a GGUF file: starts with {start!r}, not {MAGIC!r}", NO_GGUF)
    _, version = cursor.numbers("4sI")
    if version & 0xFFFF == 0:
        what = "a big-endian GGUF, which this machine's llama.cpp does not read"
        raise cursor.fail(what, OTHER_ORDER)
    if version not in VERSIONS:
        raise cursor.fail(f"GGUF version {version}; llama.cpp reads versions 2 and 3", OTHER_VERSION)
    n_tensors, n_fields = cursor.numbers("QQ")
    cursor.claim(n_tensors * 24, f"claims {n_tensors:,} tensors")  # each takes that many bytes, or more
    cursor.claim(n_fields * 13, f"claims {n_fields:,} metadata fields")
    fields, alignment = _read_fields(cursor, n_fields), DEFAULT_ALIGNMENT
    if entry := fields.get("general.alignment"):
        if entry.type != "UINT32" or entry.count is not None:
            raise cursor.fail("general.alignment is not a single UINT32")
        alignment = _decode(cursor.bytes, entry)
        if alignment.bit_count() != 1:
            raise cursor.fail(f"general.alignment is {alignment}, not a power of two")
    tensors = _read_tensors(cursor, n_tensors)
    raw = bytes(memoryview(cursor.bytes)[: cursor.position])
    data = cursor.start + (padded(len(raw), alignment) if n_tensors else len(raw))
    if data > cursor.size:
        raise cursor.fail("the file ends before its data section", CUT_OFF)
    place = (cursor.path, cursor.start, version, alignment)
    return GGUFHeader(*place, MappingProxyType(fields), tensors, data, cursor.size, raw)


def _read_fields(cursor: _Cursor, count: int) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for i in range(count):
        start, name, n = cursor.position, cursor.text(f"the name of metadata field {i}"), None
        what, (kind,) = f"metadata field {name!r}", cursor.numbers("I")
        if not name or name in fields:
            raise cursor.fail(f"{what} stands twice" if name else f"metadata field {i} has no name")
        if kind == ARRAY:
            kind, n = cursor.numbers("IQ")
        if kind not in VALUE_TYPES or kind == ARRAY:
            raise cursor.fail(f"{what} has the unknown value type {kind}")
        form = FORMATS[VALUE_TYPES[kind]]
        values, least = 1 if n is None else n, struct.calcsize("<" + form) or 8
        cursor.claim(values * least, f"{what} claims {values:,} values")
        value_start = cursor.position
        if form:
            cursor.need(value_start + values * least)
            cursor.position += values * least
        else:
            cursor.skip_strings(values, what)
        fields[name] = Field(VALUE_TYPES[kind], n, (start, cursor.position), value_start)
    return fields


def _read_tensors(cursor: _Cursor, count: int) -> tuple[Tensor, ...]:
    tensors: dict[str, Tensor] = {}
    for i in range(count):
        name = cursor.text(f"the name of tensor {i}")
        what, (n_dims,) = f"tensor {name!r}", cursor.numbers("I")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise cursor.fail(f"the name of tensor {i} is longer than {MAX_NAME_BYTES} bytes")
        if name in tensors:
            raise cursor.fail(f"{what} stands twice")
        if n_dims > MAX_DIMENSIONS:
            raise cursor.fail(f"{what} has {n_dims} dimensions; ggml has {MAX_DIMENSIONS}")
        shape = cursor.numbers(f"{n_dims}q") or (1,)
        code, offset = cursor.numbers("IQ")
        if code not in TENSOR_TYPES:
            raise cursor.fail(f"{what} has the type {code}, which llama.cpp does not know", FORK)
        type_name, block, block_bytes = TENSOR_TYPES[code]
        # A dimension of 0 hides no overflow: llama.cpp aborts on the product of the others.
        if min(shape) < 0 or math.prod(max(extent, 1) for extent in shape) >= 1 << 62 or shape[0] % block:
            raise cursor.fail(f"{what} of type {type_name} cannot have the shape {shape}")
        n_elements = math.prod(shape)
        nbytes = n_elements // block * block_bytes
        tensors[name] = Tensor(name, shape, type_name, code, offset, n_elements, nbytes)
    return tuple(tensors.values())


def _decode(raw: bytes | bytearray, entry: Field) -> Any:
    """The value of a field; text that is not UTF-8 gets replacement characters."""
    n, position, form = 1 if entry.count is None else entry.count, entry.value_start, FORMATS[entry.type]
    values = list(struct.unpack_from(f"<{n}{form}", raw, position)) if form else []
    while len(values) < n:
        end = position + 8 + _U64.unpack_from(raw, position)[0]
        values.append(raw[position + 8 : end].decode("utf-8", errors="replace"))
        position = end
    return values[0] if entry.count is None else values
