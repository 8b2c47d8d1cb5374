"""Kinds of files, and what a file is that does not begin as a GGUF, by its first 4 KiB."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from dfqs_nb.merge.byte_parts import OPENING_BYTES

AGAIN = "get it from its source again"
Row = tuple[str, str]


class Kind(StrEnum):
    """What a file turned out to be. Kinds differ in what a user does next."""

    SINGLE_FILE = "sound single file"  # use it
    SHARD = "shard"  # merge it with the others
    BYTE_PART = "byte part"  # join it with the others: `dfqs-nb merge` does
    RAW_CONCATENATION = "raw concatenation"  # of all shards of one model: `dfqs-nb repair`
    SEVERAL_MODELS = "several models in one file"  # cut it
    TRAILING_BYTES = "trailing bytes"  # cut them off
    COMPANION = "no language model"  # a LoRA adapter, a projector: use it beside one
    FOREIGN = "for another runtime"  # run it there, or quantize the original again
    UNFINISHED = "unfinished download"  # resume it
    DAMAGED = "damaged"  # download it again
    LFS_POINTER = "Git LFS pointer"  # `git lfs pull`
    DOCUMENT = "document"  # a server's answer: check the address, and what you may download
    OTHER_FORMAT = "another format"  # convert it, or get the GGUF


class Finding(NamedTuple):
    """A diagnosis in the making; ``rows`` is the evidence that it adds."""

    kind: Kind
    finding: str
    step: str
    rows: tuple[Row, ...] = ()


_UNPACK = "unpack it, or get the GGUF of the model"
_CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py, or get the GGUF of the model"
_ANSWER = "a server sent this in place of the model: check the address, and that you may download it"
# The first bytes of other files, what these are, and what to do with them.
_FORMATS = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)", _UNPACK),
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"7z\xbc\xaf", "a 7-Zip archive", _UNPACK),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
    (b"\x80\x02", "a Python pickle (a PyTorch checkpoint?)", _CONVERT),
    (b"lmgg", "a GGML file from before GGUF", _CONVERT),
    (b"tjgg", "a GGJT file from before GGUF", _CONVERT),
    (b"fmgg", "a GGMF file from before GGUF", _CONVERT),
    (b"FUGG", "a GGUF with its bytes swapped in fours", AGAIN),
)


def by_first_bytes(first: bytes, size: int) -> Finding:
    """A file that does not begin with the magic: by its first 4 KiB."""
    if size == 0:
        return Finding(Kind.UNFINISHED, "an empty file", "download it again: nothing arrived")
    if first.startswith(b"version https://git-lfs"):
        length = re.search(rb"^size (\d{1,18})$", first, re.M)
        target = f"{int(length[1]):,} bytes" if length else "an unknown number of bytes"
        finding = f"a Git LFS pointer to the model ({target}), not the model itself"
        step = "run `git lfs pull` in the clone, or download the file from its 'resolve' address"
        return Finding(Kind.LFS_POINTER, finding, step)
    for magic, name, step in _FORMATS:
        if first.startswith(magic):
            return Finding(Kind.OTHER_FORMAT, f"{name}, not a GGUF", step)
    if first[8:10] == b'{"' and int.from_bytes(first[:8], "little") < 1 << 30:
        return Finding(Kind.OTHER_FORMAT, "a safetensors file, not a GGUF", _CONVERT)
    if not first.strip(b"\0"):
        finding = f"zeros: the first {len(first):,} bytes of {size:,} were never written"
        return Finding(Kind.UNFINISHED, finding, "only its room was reserved: resume or repeat the download")
    if text := _text(first):
        return Finding(Kind.DOCUMENT, f"a text or web page saved as a model: {text}", _ANSWER)
    finding = "not a GGUF: it does not begin with these four letters"
    return Finding(Kind.OTHER_FORMAT, finding, "check what you downloaded")


def _text(first: bytes) -> str:
    """What a server sent in place of a model, without its tags; empty when it is no text."""
    text = first.decode("utf-8-sig", "ignore" if len(first) == OPENING_BYTES else "replace").strip()
    if "\ufffd" in text or any(not char.isprintable() and not char.isspace() for char in text):
        return ""
    title = re.search(r"<title[^>]*>(.*?)</title", text, re.I | re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", title[1] if title else text).split())[:200] or text[:80]


def shown_bytes(raw: bytes) -> str:
    r"""Bytes as people read them: hex, and the letters among them.

    >>> shown_bytes(b"GGUF\x03")
    '47 47 55 46 03 (GGUF.)'
    """
    letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in raw)
    return f"{raw.hex(' ')} ({letters})" if raw else "nothing"
