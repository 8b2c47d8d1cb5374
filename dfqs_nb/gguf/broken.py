"""Broken files made from the reference model, to see how the workbook and llama.cpp diagnose them."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.gguf.types import FORMATS

NAME = "DFQS-Nano-IQ1_S-XL"


def reference_shards() -> ShardSet:
    """The embedded reference model: two shards of a real ``deepseek4`` mixture of experts."""
    return open_shards(data_dir() / "reference" / f"{NAME}-00001-of-00002.gguf")


def glue(folder: str | Path) -> Path:
    """A raw concatenation of the reference shards, like the published single file of the real shards."""
    path = Path(folder) / f"{NAME}-glued.gguf"
    path.write_bytes(b"".join(shard.read_bytes() for shard in reference_shards().paths))
    return path


def with_field(path: str | Path, target: str | Path, name: str, value: int) -> Path:
    """A copy of a GGUF file with one integer of its metadata changed."""
    field, raw = read_header(path).fields[name], bytearray(Path(path).read_bytes())
    struct.pack_into(f"<{FORMATS[field.type]}", raw, field.value_start, value)
    Path(target).write_bytes(raw)
    return Path(target)


def too_many_experts(folder: str | Path) -> Path:
    """The reference model with 200 of 16 experts a token in its header: llama.cpp fails an assertion."""
    target = Path(folder) / "broken-on-purpose-00001-of-00002.gguf"
    first, second = reference_shards().paths
    shutil.copyfile(second, target.with_name("broken-on-purpose-00002-of-00002.gguf"))
    return with_field(first, target, "deepseek4.expert_used_count", 200)


def collection(folder: str | Path) -> list[Path]:
    """A file of each kind that people take for a model: sound, glued, cut off, and no model at all."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    first, second = reference_shards().headers
    body, rest = first.path.read_bytes(), second.path.read_bytes()
    at = len(second.raw) - 8  # the offset of its last tensor, the last number of the tensor table
    (offset,) = struct.unpack_from("<Q", rest, at)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
    contents = {
        first.path.name: body,
        "cut-off.gguf": body[: len(body) // 2],
        "cut-in-header.gguf": body[: first.data_offset // 2],
        "trailing.gguf": rest + b"\x00" * 100,
        "overlap.gguf": rest[:at] + struct.pack("<Q", offset - 64) + rest[at + 8 :],
        "empty.gguf": b"",
        "lfs-pointer.gguf": pointer.format("b4e1" * 16, len(body)).encode(),
        "error-page.gguf": b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>",
        "whole.gguf.part1of2": rest[:1_000_000],
        "whole.gguf.part2of2": rest[1_000_000:],
    }
    for name, content in {**contents, second.path.name: rest}.items():
        (folder / name).write_bytes(content)
    sound, *others = (folder / name for name in contents)
    return [sound, glue(folder), *others]
