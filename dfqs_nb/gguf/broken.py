"""Broken files made from the reference model, to see how the workbook and llama.cpp diagnose them."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.header import FORMATS, read_header
from dfqs_nb.gguf.shards import ShardSet, open_shards


def reference_shards() -> ShardSet:
    """The embedded reference model: two shards of a real ``deepseek4`` mixture of experts."""
    return open_shards(data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf")


def glue(folder: str | Path) -> Path:
    """A raw concatenation of the reference shards, like the published single file of the real shards."""
    shards = reference_shards()
    path = Path(folder) / f"{shards.name}-glued.gguf"
    path.write_bytes(b"".join(shard.read_bytes() for shard in shards.paths))
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


def collection(folder: Path) -> list[Path]:
    """Files that people take for a model: a sound shard, glued shards, a part, and no model at all."""
    first, second = reference_shards().paths
    body, pointer = first.read_bytes(), "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
    contents = {
        first.name: body,
        "cut-off.gguf": body[: len(body) // 2],
        "empty.gguf": b"",
        "lfs-pointer.gguf": pointer.format("b4e1" * 16, len(body)).encode(),
        "error-page.gguf": b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>",
    }
    for name, content in {**contents, second.name: second.read_bytes()}.items():
        (folder / name).write_bytes(content)
    trailing = Path(shutil.copy(data_dir() / "reference" / "DFQS-Nano-F16.gguf", folder / "trailing.gguf"))
    with trailing.open("ab") as file:
        file.write(bytes(100))
    return [*(folder / name for name in contents), trailing, glue(folder)]
