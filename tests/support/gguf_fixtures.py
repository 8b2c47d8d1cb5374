"""GGUF files made by hand: small ones, hostile ones, one of the real artifact's shape, and shards.

The writer knows nothing of the package under test. Block sizes come from gguf-py, and
`split_like_llama` is held to hashes recorded from llama.cpp's own tool (tests/integration/test_reference_tools.py).
"""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

# Value types of the format, in the order of their codes; ARRAY (9) is written "[UINT8]".
SCALARS = {
    "UINT8": "B",
    "INT8": "b",
    "UINT16": "H",
    "INT16": "h",
    "UINT32": "I",
    "INT32": "i",
    "FLOAT32": "f",
    "BOOL": "B",
    "STRING": "",
    "ARRAY": "",
    "UINT64": "Q",
    "INT64": "q",
    "FLOAT64": "d",
}
CODES = {name: code for code, name in enumerate(SCALARS)}


@dataclass(frozen=True)
class Spec:
    """A tensor to write: ``type`` is a name or a raw code; ``offset`` and ``data`` follow from the rest
    unless they are given."""

    name: str
    type: str | int = "F32"
    shape: tuple[int, ...] = (8,)
    offset: int | None = None
    data: bytes | None = None

    @property
    def code(self) -> int:
        return self.type if isinstance(self.type, int) else GGMLQuantizationType[self.type].value

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.code)]
        return math.prod(self.shape) // block * size

    def bytes(self) -> bytes:
        return random.Random(self.name).randbytes(self.nbytes) if self.data is None else self.data


def text(value: str | bytes, order: str = "<") -> bytes:
    """A string of the format: its length in 8 bytes, then its bytes."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(order + "Q", len(raw)) + raw


def field(name: str | bytes, kind: str, value: Any, order: str = "<") -> bytes:
    """One metadata record; ``kind`` is a scalar type's name, or that name in brackets for an array."""
    head, item = text(name, order), kind.strip("[]")
    if kind.startswith("["):
        values = list(value)
        head += struct.pack(order + "IIQ", CODES["ARRAY"], CODES[item], len(values))
    else:
        values = [value]
        head += struct.pack(order + "I", CODES[item])
    if item == "STRING":
        return head + b"".join(text(one, order) for one in values)
    return head + struct.pack(f"{order}{len(values)}{SCALARS[item]}", *values)


def every_type() -> list[bytes]:
    """Metadata of all the 13 value types, the extremes of each, and arrays of every scalar type."""
    extremes = {
        "BOOL": (0, 1),
        "STRING": ("", "räksmörgås \n"),
        "FLOAT32": (-1.5, float("inf")),
        "FLOAT64": (5e-324, -1e300),
    }
    for kind, form in SCALARS.items():
        if kind not in extremes and form:
            bits, low = 8 * struct.calcsize(form), form.islower()
            extremes[kind] = (-(1 << bits - 1), (1 << bits - 1) - 1) if low else (0, (1 << bits) - 1)
    return [
        record
        for kind, (low, high) in extremes.items()
        for record in (
            field(f"{kind}.low", kind, low),
            field(f"{kind}.high", kind, high),
            field(f"{kind}.array", f"[{kind}]", [low, high, low]),
            field(f"{kind}.none", f"[{kind}]", []),
        )
    ]


def padding(nbytes: int, alignment: int) -> bytes:
    return bytes(-nbytes % alignment)


def header_bytes(
    fields: Sequence[bytes] = (),
    tensors: Sequence[Spec] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    order: str = "<",
    alignment: int = 32,
    n_fields: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A header and the padding after it; the counts may lie, ``order=">"`` is big-endian."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(fields) if n_fields is None else n_fields)
    raw = magic + struct.pack(order + "IQQ", version, *counts) + b"".join(fields)
    offset = 0
    for spec in tensors:
        at = offset if spec.offset is None else spec.offset
        raw += text(spec.name, order) + struct.pack(
            f"{order}I{len(spec.shape)}qIQ", len(spec.shape), *spec.shape, spec.code, at
        )
        if spec.offset is None:
            offset += spec.nbytes + -spec.nbytes % alignment
    return raw + (padding(len(raw), alignment) if tensors else b"")


def gguf_bytes(
    fields: Sequence[bytes] = (), tensors: Sequence[Spec] = (), *, alignment: int = 32, **header: Any
) -> bytes:
    """A whole small file: header, then each tensor's data, padded (see `header_bytes`)."""
    raw = header_bytes(fields, tensors, alignment=alignment, **header)
    return raw + b"".join(spec.bytes() + padding(spec.nbytes, alignment) for spec in tensors)


def small_gguf() -> bytes:
    """A valid file of about 2 kB: every value type, and tensors of plain and block types."""
    return gguf_bytes(
        every_type(),
        [
            Spec("a.weight", "F32", (4, 3)),
            Spec("b.weight", "Q8_0", (64, 2)),
            Spec("c.bias", "F16", (5,)),
            Spec("d.weight", "IQ1_S", (256, 1, 2)),
            Spec("e.table", "I32", (2, 3, 1, 2)),
        ],
    )


def split_like_llama(path: str | Path, n_tensors_per_shard: int, out_prefix: str | Path) -> list[Path]:
    """Write the shards that ``llama-gguf-split --split --split-max-tensors N`` writes, byte for byte.

    The first shard holds all metadata; every shard ends it with the three ``split.*`` fields, in the order
    in which the tool leaves them.
    """
    from dfqs_nb.gguf.header import read_header

    header = read_header(path)
    kept = [
        header.raw[slice(*one.record)] for name, one in header.fields.items() if not name.startswith("split.")
    ]
    groups = [
        header.tensors[i : i + n_tensors_per_shard]
        for i in range(0, len(header.tensors), n_tensors_per_shard)
    ]
    blob, paths = Path(path).read_bytes(), []
    for number, group in enumerate(groups):
        fields = kept if number == 0 else []
        specs = [
            Spec(t.name, t.type_code, t.shape, data=blob[header.data_offset + t.offset :][: t.nbytes])
            for t in group
        ]
        paths.append(Path(f"{out_prefix}-{number + 1:05}-of-{len(groups):05}.gguf"))
        paths[-1].write_bytes(
            gguf_bytes([*fields, *split_fields(number, len(groups), len(header.tensors))], specs)
        )
    return paths


def linked(paths: Iterable[Path], folder: Path) -> list[Path]:
    """The files as a cache of the hub holds them: links with their names, to copies that are named otherwise."""
    links = []
    for name in ("blobs", "snapshot"):
        (folder / name).mkdir()
    for number, path in enumerate(paths, 1):
        shutil.copy(path, folder / "blobs" / f"c0ffee{number}")
        links.append(folder / "snapshot" / path.name)
        links[-1].symlink_to(f"../blobs/c0ffee{number}")
    return links


def split_fields(number: int, count: int, n_tensors: int) -> list[bytes]:
    return [
        field("split.no", "UINT16", number),
        field("split.tensors.count", "INT32", n_tensors),
        field("split.count", "UINT16", count),
    ]


# The real artifact's shape: DeepSeek-V4-Flash from its published config and llama.cpp's loader
# (src/models/deepseek4.cpp), 43 layers, 1,328 tensors, 129,280 tokens, 127,741 merges.

SHAPE = json.loads((Path(__file__).parents[2] / "data/deepseek_v4_flash.json").read_text())
REAL_TENSORS, REAL_TOKENS, REAL_MERGES = 1328, SHAPE["specimen"]["tokens"], SHAPE["specimen"]["merges"]
REAL_SHARD_BYTES = 49_952_658_368  # the published first shard
RATIOS = SHAPE["keys"]["attention.compress_ratios"]


def real_size_tensors(n_tensors: int = REAL_TENSORS) -> list[Spec]:
    """The tensor table of the artifact (fewer or more rows on request, for other published counts)."""
    specs = list(_rows("model"))
    for layer, ratio in enumerate(RATIOS):
        routing = "hash" if layer < SHAPE["specimen"]["hash_layers"] else "scores"
        specs += [spec for part in ("layer", routing, str(ratio)) for spec in _rows(part, layer)]
    specs += [Spec(f"extra.{i}.weight", "F32", (4096,)) for i in range(n_tensors - len(specs))]
    return specs[:n_tensors]


def _rows(part: str, layer: int = -1) -> Iterator[Spec]:
    sizes = SHAPE["specimen"]
    for name, (kind, *shape) in sizes["tensors"].get(part, {}).items():
        kind = {"down": "Q2_K" if layer < sizes["q2_k_layers"] else "IQ1_S"}.get(kind, kind)
        extents = tuple(sizes.get(extent, extent) for extent in shape)
        yield Spec(name if layer < 0 else f"blk.{layer}.{name}", kind, extents)


def real_size_fields() -> list[bytes]:
    """The artifact's metadata: every key that llama.cpp's loader requires, and a tokenizer of its size."""
    sizes = SHAPE["specimen"]
    integers = {
        "block_count": len(RATIOS),
        **sizes["counts"],
        "vocab_size": REAL_TOKENS,
        "expert_count": sizes["experts"],
        "expert_used_count": sizes["used"],
        "hash_layer_count": sizes["hash_layers"],
    }
    return [
        field("general.architecture", "STRING", "deepseek4"),
        field("general.name", "STRING", "DeepSeek-V4-Flash"),
        field("general.type", "STRING", "model"),
        *(field(f"deepseek4.{key}", "UINT32", value) for key, value in integers.items()),
        *(field(f"deepseek4.{key}", "FLOAT32", value) for key, value in sizes["floats"].items()),
        field("deepseek4.expert_weights_norm", "BOOL", 1),
        field("deepseek4.swiglu_clamp_exp", "[FLOAT32]", [sizes["swiglu_clamp_exp"]] * len(RATIOS)),
        field("deepseek4.attention.compress_ratios", "[INT32]", RATIOS),
        *_tokenizer(),
    ]


def _tokenizer() -> list[bytes]:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzĠ"
    drawn: dict[str, None] = {}  # llama.cpp's loader aborts where two tokens have one text
    while len(drawn) < REAL_TOKENS:
        drawn["".join(draw.choices(letters, k=draw.randint(2, 10)))] = None
    pieces = list(drawn)
    merges = [f"{piece[:1]} {piece[1:]}" for piece in pieces[:REAL_MERGES]]
    return [
        field("tokenizer.ggml.model", "STRING", "gpt2"),
        field("tokenizer.ggml.pre", "STRING", "joyai-llm"),
        field("tokenizer.ggml.tokens", "[STRING]", pieces),
        field("tokenizer.ggml.token_type", "[INT32]", [1] * REAL_TOKENS),
        field("tokenizer.ggml.merges", "[STRING]", merges),
        field("tokenizer.ggml.bos_token_id", "UINT32", 0),
        field("tokenizer.ggml.eos_token_id", "UINT32", 1),
        field(
            "tokenizer.chat_template", "STRING", "{% for m in messages %}{{ m.content }}{% endfor %}" * 100
        ),
        field("general.quantization_version", "UINT32", 2),
        field("general.file_type", "UINT32", 24),
    ]


def real_size_header(
    path: str | Path, *, n_tensors: int = REAL_TENSORS, sparse_size: int | None = None
) -> Path:
    """Write a sparse file of the artifact's shape: about 62 GB by its size, 4 MB on the disk.

    ``sparse_size`` cuts it off (or lengthens it) to that many bytes.
    """
    path, specs = Path(path), real_size_tensors(n_tensors)
    raw = header_bytes(real_size_fields(), specs)
    return _sparse(path, raw, specs, sparse_size)


def llama_header(
    path: str | Path, n_layers: int, width: int, inner: int, heads: int, n_experts: int = 0
) -> Path:
    """Write a sparse file of a Llama at Q6_K (8 KV heads, 131,072 tokens), dense or of so many experts, 2 used."""
    path, heads_kv, quant, rows = Path(path), 8, "Q6_K", REAL_TOKENS
    counts = {"block_count": n_layers, "context_length": 131072, "embedding_length": width}
    counts |= {
        "feed_forward_length": inner,
        "attention.head_count": heads,
        "attention.head_count_kv": heads_kv,
    }
    counts |= {"rope.dimension_count": width // heads}
    counts |= {"expert_count": n_experts, "expert_used_count": 2} if n_experts else {}
    fields = [field("general.architecture", "STRING", "llama"), *_tokenizer()]
    fields += [field(f"llama.{name}", "UINT32", n) for name, n in counts.items()]
    fields += [field("llama.attention.layer_norm_rms_epsilon", "FLOAT32", 1e-5)]
    specs = [Spec("token_embd.weight", quant, (width, rows)), Spec("output_norm.weight", "F32", (width,))]
    specs += [Spec("output.weight", quant, (width, rows))]
    kv, which, many = (
        width // heads * heads_kv,
        "_exps" if n_experts else "",
        (n_experts,) if n_experts else (),
    )
    shapes = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (width, kv)}
    shapes |= {"attn_v": (width, kv), "attn_output": (width, width)}
    shapes |= {"ffn_gate_inp": (width, n_experts)} if n_experts else {}
    shapes |= {f"ffn_{part}{which}": (width, inner, *many) for part in ("gate", "up")}
    shapes |= {f"ffn_down{which}": (inner, width, *many)}
    for layer in range(n_layers):
        for name, shape in shapes.items():
            kind = "F32" if "norm" in name or "inp" in name else quant
            specs.append(Spec(f"blk.{layer}.{name}.weight", kind, shape))
    return _sparse(path, header_bytes(fields, specs), specs, None)


def real_size_shards(
    prefix: str | Path, *, n_tensors: int = REAL_TENSORS, first_shard_bytes: int = REAL_SHARD_BYTES
) -> list[Path]:
    """The same model as two sparse shards, the first no larger than the published one."""
    specs = real_size_tensors(n_tensors)
    fields, taken, cut = real_size_fields(), 0, len(specs)
    budget = first_shard_bytes - len(header_bytes(fields, specs))
    for i, spec in enumerate(specs):
        taken += spec.nbytes + -spec.nbytes % 32
        if taken > budget:
            cut = i
            break
    paths = []
    for number, group in enumerate((specs[:cut], specs[cut:])):
        own = [*(fields if number == 0 else ()), *split_fields(number, 2, len(specs))]
        paths.append(
            _sparse(Path(f"{prefix}-{number + 1:05}-of-00002.gguf"), header_bytes(own, group), group, None)
        )
    return paths


def _sparse(path: Path, raw: bytes, specs: Sequence[Spec], size: int | None) -> Path:
    whole = len(raw) + sum(spec.nbytes + -spec.nbytes % 32 for spec in specs)
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(whole if size is None else size)
    return path
