"""A model of the published shape with random weights, to rehearse the real size without the real file.

``python tests/support/specimen.py OUT [--full-size] [--layers 8] [--concatenated]``

It is deterministic, its weights are finite, and llama.cpp loads and runs it. Its answers are noise. Each
quantized type has a pool of random weights, from which tensors are cut, so writing is as fast as the disk.
The shape is in ``data/deepseek_v4_flash.json``.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from dfqs_nb.core.display import size, tqdm
from dfqs_nb.core.errors import DfqsError, OutputError, SpaceError
from dfqs_nb.core.files import whole_path
from dfqs_nb.core.paths import tilde
from dfqs_nb.gguf.header import TENSOR_TYPES, padded
from dfqs_nb.gguf.memory import published

ARCH = "deepseek4"
SMALL_LAYERS, SMALL_EXPERTS, SMALL_TOKENS = 8, 16, 4096
SPARE_BYTES = 3_000_000_000  # of the disk stay free
ALIGNMENT = 32
POOL_BLOCKS = 131_071  # in the pool of a type; a prime, so that experts do not repeat
CHUNK = 16 << 20
SECOND_SHARD = 0.8  # where the shards part, as the published ones do
# Scales of blocks, by offset: they give weights of about 1/64, as 4,096 inputs call for.
SCALES = {"Q8_0": {0: 2.1e-4}, "IQ1_S": {0: 2e-3}, "Q2_K": {80: 2e-3, 82: 3e-3}}
# Embeddings outweigh what layers add: the token decides which experts a router chooses, all are used alike.
EMBEDDING_SCALE = 0.5
SIZES = {name: (elements, n_bytes) for name, elements, n_bytes in TENSOR_TYPES.values()}


@dataclass(frozen=True)
class Row:
    """A tensor to write; ``shape`` in ggml's order."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        elements, n_bytes = SIZES[self.type]
        return math.prod(self.shape) // elements * n_bytes


@dataclass(frozen=True)
class Shape:
    """Layers, experts a layer, and tokens of the vocabulary."""

    n_layers: int = SMALL_LAYERS
    n_experts: int = SMALL_EXPERTS
    n_tokens: int = SMALL_TOKENS

    @classmethod
    def full(cls, n_layers: int | None = None) -> Shape:
        """The published widths, with all layers unless fewer are asked for."""
        facts = published()
        sizes, ratios = facts["specimen"], facts["keys"]["attention.compress_ratios"]
        return cls(n_layers or len(ratios), sizes["experts"], sizes["tokens"])


def write_specimen(
    output: str | Path, shape: Shape | None = None, *, concatenated: bool = False, progress: bool = True
) -> Path:
    """Write the specimen, whole or not at all: by default a small one of 2 GB; `Shape.full` is 62.7 GB.

    ``concatenated``: as two shards glued together byte for byte, as the artifact was published. An error
    comes before the first byte: the file exists, the disk would have less than 3 GB left, or a wrong number
    of layers.
    """
    output, facts, shape = Path(output), published(), shape or Shape()
    most = len(facts["keys"]["attention.compress_ratios"])
    if not 4 <= shape.n_layers <= most:
        what = f"{shape.n_layers} layers; the published model has {most}"
        raise DfqsError(what, hint="give --layers from 4 on: the first layers are of other kinds")
    if output.exists() or not output.absolute().parent.is_dir():
        what = "exists already" if output.exists() else "its folder does not exist"
        raise OutputError(what, where=tilde(output), hint="give another name")
    rows = list(_rows(facts, shape))
    need, free = sum(row.nbytes for row in rows), shutil.disk_usage(output.absolute().parent).free
    if free - need < SPARE_BYTES:
        what = f"it takes {size(need)}, {size(free)} are free, and {size(SPARE_BYTES)} must stay free"
        raise SpaceError(what, where=tilde(output), hint="give a folder on a larger disk, or fewer --layers")
    cut = next(i for i in range(len(rows)) if sum(row.nbytes for row in rows[: i + 1]) > SECOND_SHARD * need)
    parts = [rows[:cut], rows[cut:]] if concatenated else [rows]
    bar = tqdm(total=need, unit="B", unit_scale=True, desc="specimen", disable=not progress)
    with bar, whole_path(output) as path, path.open("wb") as file:
        for number, part in enumerate(parts):
            split = (number, len(parts), len(rows)) if concatenated else None
            file.write(_header(facts, shape, part, split, path.with_suffix(".header")))
            for row in part:
                for chunk in _data(row, shape.n_experts):
                    file.write(chunk)
                    bar.update(len(chunk))
                file.write(bytes(padded(row.nbytes, ALIGNMENT) - row.nbytes))
    return output


def _rows(facts: dict[str, Any], shape: Shape) -> Iterator[Row]:
    sizes, ratios = facts["specimen"], facts["keys"]["attention.compress_ratios"][: shape.n_layers]
    extents = {"tokens": shape.n_tokens, "experts": shape.n_experts, "used": sizes["used"]}
    places: list[tuple[str, int | None]] = [("model", None)]
    for number, ratio in enumerate(ratios):
        routing = "hash" if number < sizes["hash_layers"] else "scores"
        places += [("layer", number), (routing, number), (str(ratio), number)]
    for part, layer in places:
        for name, (kind, *own) in sizes["tensors"].get(part, {}).items():
            down = "Q2_K" if (layer or 0) < sizes["q2_k_layers"] else "IQ1_S"
            full = name if layer is None else f"blk.{layer}.{name}"
            yield Row(full, down if kind == "down" else kind, tuple(extents.get(it, it) for it in own))


def _header(
    facts: dict[str, Any], shape: Shape, rows: Sequence[Row], split: tuple[int, int, int] | None, place: Path
) -> bytes:
    """The header of the model, or of one of its shards, with the padding before the data; by gguf-py."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(place, ARCH)
    if split is None or split[0] == 0:
        _metadata(writer, facts, shape)
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", split[2])
    for row in rows:
        kind, floats = GGMLQuantizationType[row.type], np.dtype(np.float32)
        writer.add_tensor_info(row.name, row.shape[::-1], floats, row.nbytes, kind)
    try:
        writer.write_header_to_file(place)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        raw = place.read_bytes()
    finally:
        place.unlink(missing_ok=True)
    return raw + bytes(padded(len(raw), ALIGNMENT) - len(raw))


def _metadata(writer: Any, facts: dict[str, Any], shape: Shape) -> None:
    sizes = facts["specimen"]
    counts = {"block_count": shape.n_layers, **sizes["counts"], "vocab_size": shape.n_tokens}
    counts |= {"expert_count": shape.n_experts, "expert_used_count": sizes["used"]}
    counts |= {"hash_layer_count": sizes["hash_layers"]}
    writer.add_string("general.name", f"Specimen of the shape of {facts['name']}, random weights")
    writer.add_string("general.type", "model")
    for key, value in counts.items():
        writer.add_uint32(f"{ARCH}.{key}", value)
    for key, value in sizes["floats"].items():
        writer.add_float32(f"{ARCH}.{key}", value)
    writer.add_bool(f"{ARCH}.expert_weights_norm", True)
    writer.add_array(f"{ARCH}.swiglu_clamp_exp", [sizes["swiglu_clamp_exp"]] * shape.n_layers)
    ratios = facts["keys"]["attention.compress_ratios"][: shape.n_layers]
    writer.add_array(f"{ARCH}.attention.compress_ratios", ratios)
    writer.add_uint32("general.quantization_version", 2)
    writer.add_uint32("general.file_type", 24)
    _tokenizer(writer, shape.n_tokens, round(shape.n_tokens * sizes["merges"] / sizes["tokens"]))


def _tokenizer(writer: Any, n_tokens: int, n_merges: int) -> None:
    """A vocabulary of that size: two control tokens, the 256 bytes, and made-up words."""
    from gguf import TokenType

    codes = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2 writes as themselves
    others = [chr(256 + i) for i in range(256 - len(codes))]
    draw, letters = np.random.default_rng(0), np.array(list("abcdefghijklmnopqrstuvwxyzĠ"))
    tokens = dict.fromkeys(["<|begin|>", "<|end|>", *map(chr, codes), *others])
    while len(tokens) < n_tokens:
        tokens["".join(letters[draw.integers(0, len(letters), draw.integers(3, 11))])] = None
    words = list(tokens)[258:]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("joyai-llm")
    writer.add_token_list(list(tokens))
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (n_tokens - 2))
    writer.add_token_merges([f"{word[0]} {word[1:]}" for word in words[:n_merges]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def _data(row: Row, n_experts: int) -> Iterator[bytes]:
    """A tensor's bytes, in pieces; quantized ones are cut from the pool of their type."""
    name, seed = row.name.rpartition("blk.")[2], crc32(row.name.encode())
    if row.type == "I32":  # the experts of each token in a hash layer
        used, n_tokens = row.shape
        tokens: NDArray[np.int64] = np.arange(n_tokens)[:, None]
        step = 2 * (tokens % (n_experts // 2)) + 1  # odd, so it meets no expert twice
        yield ((tokens * 7 + step * np.arange(used)) % n_experts).astype("<i4").tobytes()
    elif "norm" in name or name.endswith("scale.weight"):
        yield np.ones(row.nbytes // 4, "<f4").tobytes()
    elif row.type == "F32":
        draw = np.random.default_rng(seed)
        yield (0.02 * draw.standard_normal(row.nbytes // 4, np.float32)).astype("<f4").tobytes()
    else:
        pool = _pool(row.type, EMBEDDING_SCALE if name == "token_embd.weight" else None)
        at, left = seed % POOL_BLOCKS * SIZES[row.type][1], row.nbytes
        while left:
            piece = pool[at : at + min(left, CHUNK)]
            left, at = left - len(piece), (at + len(piece)) % len(pool)
            yield piece


@cache
def _pool(kind: str, scale: float | None = None) -> bytes:
    """Random blocks of a type, valid and of the size that weights have, or of this scale."""
    blocks = np.random.default_rng(1).integers(0, 256, (POOL_BLOCKS, SIZES[kind][1]), np.uint8)
    for offset, usual in SCALES[kind].items():
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(scale or usual).tobytes(), np.uint8)
    return blocks.tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--full-size", action="store_true", help="all experts and tokens: 62.7 GB for all layers"
    )
    parser.add_argument("--layers", type=int, default=0, help="default: 8, and with --full-size all 43")
    parser.add_argument(
        "--concatenated", action="store_true", help="as two glued shards, like the published file"
    )
    given = parser.parse_args()
    shape = (
        Shape.full(given.layers or None) if given.full_size else Shape(n_layers=given.layers or SMALL_LAYERS)
    )
    path = write_specimen(given.output, shape, concatenated=given.concatenated)
    print(f"{path}: {path.stat().st_size:,} bytes, {shape.n_layers} layers, {shape.n_experts} experts")


if __name__ == "__main__":
    main()
