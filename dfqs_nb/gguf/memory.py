"""Memory of a run, from the header: weights, KV cache, whether they fit, and where each tensor lies.

The rules of placement are llama.cpp's (``src/llama-model.cpp``, ``common/common.h``). The embedding stays in
memory. With ``-ngl N`` the last N layers (the output counts as one more) are divided among the cards by
``-ts``. A layer's cache lies where the layer lies. ``--n-cpu-moe`` and ``-ot`` keep routed experts in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dfqs_nb.core.display import size
from dfqs_nb.core.errors import DfqsError, HeaderError, SpaceError
from dfqs_nb.core.machine import Memory, available_memory, gpu_memories
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.facts import EXPERTS, class_of, is_tied, weights
from dfqs_nb.gguf.header import OTHER_TOOL, TENSOR_TYPES, GGUFHeader, padded

if TYPE_CHECKING:
    import pandas as pd

# Of the types that llama.cpp takes for a KV cache: bytes and elements of a block.
CACHED = "F32 F16 BF16 Q8_0 Q5_1 Q5_0 Q4_1 Q4_0 IQ4_NL".split()
CACHE_TYPES = {name.lower(): (nbytes, n) for name, n, nbytes in TENSOR_TYPES.values() if name in CACHED}
CSA_RATIO, HCA_RATIO, CELL_PADDING = 4, 128, 256
ADVICE = "lower n_ctx or n_ubatch, set use_mmap=True, swa_full=False, flash_attn=True, or close programs"
HASH_TABLE = "ffn_gate_tid2eid"  # of a layer that routes by token id
USES = ("", "gate_up", "up", "gate", "down")  # of tensors of experts, in the order of build_moe_ffn
OUTPUT, EMBEDDING = -2, -1  # their places behind the layers in the lists of `Sizes`
# Of each card, for the process and its compute buffer. Of DeepSeek-V4-Flash an H100 planned 1.5 GB in all at
# 131,072 tokens with flash attention; without it, these 2 GiB are enough up to 32,768 (docs/real_size.md).
SPARE_BYTES = 2 << 30
# Beside a planned compute buffer: an H100 took up to 0.81 GB more, and experts in memory enlarge the buffer.
DRIVER_BYTES = 1 << 30
RAM = "RAM"


@dataclass(frozen=True)
class KvCacheBytes:
    """Bytes of a context's cache in each layer, and how exact they are."""

    layers: list[int]
    exactness: Literal["exact", "upper bound", "rough"] = "exact"
    note: str = ""

    @property
    def total(self) -> int:
        """Bytes in all layers."""
        return sum(self.layers)


def kv_cache_bytes(
    header: GGUFHeader,
    n_ctx: int,
    n_ubatch: int = 512,
    type_k: str = "f16",
    type_v: str = "f16",
    swa_full: bool = False,  # the library's default is True: every token in sliding-window layers
) -> KvCacheBytes:
    """Bytes of KV cache, as ``src/llama-kv-cache*.cpp`` of 0.3.36 has it. `HeaderError`: a key is missing."""
    if min(n_ctx, n_ubatch) < 1:
        raise ValueError("n_ctx and n_ubatch must be at least 1")
    cells, _ = padded(n_ctx, CELL_PADDING), _stated(header, "block_count")
    if header.architecture == "deepseek4":
        return KvCacheBytes(_deepseek4(header, cells, min(n_ctx, n_ubatch), type_k, swa_full))
    layers = _attention(header, cells, type_k, type_v)
    if header.arch("ssm.state_size") or header.arch("wkv.head_size"):
        counted = "" if 0 in layers else "recurrent layers counted as attention; "
        return KvCacheBytes(layers, "rough", f"{counted}the state of recurrent layers is not counted")
    if header.arch("attention.sliding_window"):
        note = "sliding-window layers counted as if they kept the whole context"
        return KvCacheBytes(layers, "upper bound", note)
    return KvCacheBytes(layers)


def _deepseek4(header: GGUFHeader, cells: int, n_ubatch: int, type_k: str, swa_full: bool) -> list[int]:
    """One K row a layer and cell, no V; compressed layers add a row for each 4 or 128 tokens, and a state."""
    head_dim = max(_stated(header, "attention.key_length"))
    indexer_dim = max(_stated(header, "attention.indexer.key_length"))
    ratios = _stated(header, "attention.compress_ratios")[: header.n_layers]
    window = cells if swa_full else min(cells, max(_stated(header, "attention.sliding_window")) + n_ubatch)
    csa_rows, hca_rows = (padded(-(-cells // ratio), CELL_PADDING) for ratio in (CSA_RATIO, HCA_RATIO))
    row_bytes, k_and_score = _row_bytes(head_dim, type_k), 2 * 4
    # A state is K and scores in F32 (``llama_dsv4_comp_state`` in src/llama-kv-cache-dsv4.cpp, line 1315): of
    # CSA and its indexer 2 x 4 rows (this window and the last) of two heads, of HCA 128 rows of one.
    csa_state = (2 * CSA_RATIO) * (2 * head_dim + 2 * indexer_dim) * k_and_score
    hca_state = HCA_RATIO * head_dim * k_and_score
    csa = csa_rows * (row_bytes + _row_bytes(indexer_dim, type_k)) + csa_state
    more = {CSA_RATIO: csa, HCA_RATIO: hca_rows * row_bytes + hca_state}
    raw = padded(window, CELL_PADDING) * row_bytes
    return [raw + more.get(ratio, 0) for ratio in ratios + [0] * (header.n_layers - len(ratios))]


def _attention(header: GGUFHeader, cells: int, type_k: str, type_v: str) -> list[int]:
    """Grouped-query attention: a K and a V row for each layer and cell; latent attention keeps K only."""
    heads = _stated(header, "attention.head_count_kv", "attention.head_count")
    heads = heads * header.n_layers if len(heads) == 1 else heads
    if not (head_dim := header.count("attention.key_length")):
        n_heads = _stated(header, "attention.head_count")[0]  # of the first layer, as llama.cpp has it
        head_dim = max(_stated(header, "embedding_length")) // max(1, n_heads)
    value_dim = header.count("attention.value_length") or head_dim
    if header.arch("attention.key_length_mla"):  # latent; 0: llama.cpp's own tools write every key
        value_dim = 0
    return [cells * (_row_bytes(n * head_dim, type_k) + _row_bytes(n * value_dim, type_v)) for n in heads]


def _stated(header: GGUFHeader, *keys: str) -> list[int]:
    """The first of the architecture's keys that the header has: a count, or one for each layer."""
    if values := next(filter(None, map(header.counts, keys)), None):
        return values
    raise HeaderError(f"{header.architecture}.{keys[0]} is missing", where=header.path, hint=OTHER_TOOL)


def _row_bytes(n_elements: int, cache_type: str) -> int:
    if cache_type not in CACHE_TYPES:
        raise ValueError(f"unknown KV cache type {cache_type!r}: use one of {', '.join(CACHE_TYPES)}")
    block_bytes, block = CACHE_TYPES[cache_type]
    return -(-n_elements // block) * block_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """What an open model takes of this memory, in bytes; layers on graphics cards take only of theirs."""

    weights_bytes: int
    weights_resident_bytes: int  # that must lie in memory; others the kernel reads and drops as it needs
    kv: KvCacheBytes
    n_ctx: int
    compute_bytes: int | None = None  # None until llama.cpp is asked: it can exceed the cache
    card_bytes: int = 0  # weights, cache and compute buffers on cards; drivers take some more

    @property
    def must_fit_bytes(self) -> int:
        """Bytes that cannot be paged: resident weights, KV cache, compute buffer."""
        return self.weights_resident_bytes + self.kv.total + (self.compute_bytes or 0)


def estimate(
    header: GGUFHeader, n_ctx: int, n_ubatch: int = 512, *, use_mmap: bool = True, **options: Any
) -> MemoryEstimate:
    """Memory that a model will take; ``options`` and errors of `kv_cache_bytes`."""
    weights, kv = sum(t.nbytes for t in header.tensors), kv_cache_bytes(header, n_ctx, n_ubatch, **options)
    return MemoryEstimate(weights, 0 if use_mmap else weights, kv, n_ctx)


def check_fits(needs: MemoryEstimate, memory: Memory | None = None, where: str | Path | None = None) -> str:
    """A warning if weights will be paged, which is slow; `SpaceError`: what cannot be paged does not fit."""
    memory, on_cards = memory or available_memory(), gpu_memories() if needs.card_bytes else []
    if on_cards and needs.card_bytes > sum(on_cards):
        what = f"{needs.n_ctx:,} tokens and the weights need {size(needs.card_bytes)} on graphics cards, and "
        what += f"{size(sum(on_cards))} are free there"
        raise SpaceError(what, where=where, hint=f"lower n_gpu_layers, or {ADVICE}")
    free, must_fit = memory.available_bytes, needs.must_fit_bytes
    if must_fit > free:
        compute = "not counted" if needs.compute_bytes is None else size(needs.compute_bytes)
        parts = f"weights {size(needs.weights_resident_bytes)}, KV cache {size(needs.kv.total)}"
        what = f"a context of {needs.n_ctx:,} tokens needs {size(must_fit)} ({parts}, compute buffer "
        what += f"{compute}), and {size(free)} are free ({memory.source})"
        raise SpaceError(what, where=where, hint=ADVICE)
    missing = must_fit + needs.weights_bytes - needs.weights_resident_bytes - free
    slow = f"weights of {size(needs.weights_bytes)} and {size(must_fit)} beside them exceed the {size(free)} "
    slow += (
        f"of free memory by {size(missing)}: parts of the file will be read from the disk again and again, "
    )
    return slow + "so expect a fraction of the usual speed" if missing > 0 else ""


def cache_table(header: GGUFHeader, contexts: Sequence[int]) -> pd.DataFrame:
    """KV cache in MiB (f16) by ``n_ctx``, in the columns ``swa_full=False`` and ``swa_full=True``."""
    import pandas as pd

    mib = [[kv_cache_bytes(header, n, swa_full=swa).total / 2**20 for swa in (False, True)] for n in contexts]
    return pd.DataFrame(mib, pd.Index(contexts, name="n_ctx"), ["swa_full=False", "swa_full=True"])


def published() -> dict[str, Any]:
    """What DeepSeek published, and the specimen's shape: ``data/deepseek_v4_flash.json``."""
    return dict(json.loads((data_dir() / "deepseek_v4_flash.json").read_text(encoding="utf-8")))


def published_shape() -> GGUFHeader:
    """The published sizes of DeepSeek-V4-Flash as a header without tensors."""
    fields = {f"deepseek4.{key}": value for key, value in published()["keys"].items()}
    fields["general.architecture"] = "deepseek4"
    return GGUFHeader(Path(published()["name"]), 0, 3, 32, fields, (), 0, 0, b"")


def size_of(text: str) -> int:
    """Bytes of a size as people write it; ``GB`` and ``GiB`` are both 2^30 bytes, as memory is sold."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[KMGT]i?)B?", text.strip(), re.I)):
        raise DfqsError(f"{text!r} is no size", hint="write 64GiB")
    n_bytes = int(float(match[1]) * 1024 ** " KMGT".index(match[2][:1].upper() or " "))
    if n_bytes < 1 << 20:
        raise DfqsError(f"{text!r} is {n_bytes:,} bytes", hint=f"write {match[1]}GiB")
    return n_bytes


class Device(NamedTuple):
    """What lies on a device, in bytes."""

    name: str
    capacity_bytes: int
    dense_bytes: int
    expert_bytes: int
    cache_bytes: int
    compute_bytes: int | None  # None where nobody measured it
    left_bytes: int  # negative in memory where weights are read from the disk again and again
    token_bytes: int  # of weights that a token reads there, on average


class Placement(NamedTuple):
    """A model on a machine."""

    devices: tuple[Device, ...]  # the cards in order, then memory
    n_gpu_layers: int  # on cards; the output counts as one more
    in_ram: tuple[int, ...]  # layers with their dense part on a card and their routed experts in memory
    flags: tuple[str, ...]  # of llama-server or llama-cli
    disk_token_bytes: float  # that a token reads from the disk

    @property
    def ram(self) -> Device:
        """The memory."""
        return self.devices[-1]

    @property
    def works(self) -> bool:
        """Whether memory holds the cache and the compute buffer, which cannot be paged."""
        return self.ram.cache_bytes + (self.ram.compute_bytes or 0) <= self.ram.capacity_bytes

    def bound(self, speeds: Mapping[str, float]) -> tuple[float | None, list[str]]:
        """Tokens a second at most, by bytes a second of GPU, RAM and disk; and which of these are unknown."""
        paged = min(self.disk_token_bytes, self.ram.token_bytes)
        reads = [(device.name.split()[0], float(device.token_bytes)) for device in self.devices[:-1]]
        reads = [(name, n) for name, n in (*reads, (RAM, self.ram.token_bytes - paged), ("disk", paged)) if n]
        unknown = list(dict.fromkeys(name for name, _ in reads if not speeds.get(name)))
        return (None if unknown or not reads else 1 / sum(n / speeds[name] for name, n in reads)), unknown


class Sizes:
    """Bytes by layer of a model, then of output and embedding; ``token``: as a token reads the dense part."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.n_layers, self.tied = header, header.n_layers, is_tied(header)
        self.n_context, rows, count = header.count("context_length"), weights(header), self.n_layers + 2
        self.dense, self.experts, self.token = [0] * count, [0] * count, [0.0] * count
        for row in rows:
            outside = EMBEDDING if class_of(row.tensor.name) == "embedding" else OUTPUT
            at = outside if row.layer < 0 else min(row.layer, self.n_layers)
            (self.experts if row.use else self.dense)[at] += row.tensor.nbytes
            self.token[at] += 0 if row.use else row.token_bytes
        if self.tied:  # llama.cpp loads it once more, for the output, which alone reads all of it
            self.dense[OUTPUT] += self.dense[EMBEDDING]
            self.token[OUTPUT], self.token[EMBEDDING] = self.token[OUTPUT] + self.token[EMBEDDING], 0
        used = sum(row.token_bytes for row in rows if row.use)
        self.used = used / sum(self.experts) if used else 1.0  # of the bytes of experts, by a token

    def caches(self, n_ctx: int) -> list[int]:
        """Bytes of cache of each layer; none for the output and the embedding."""
        layers = kv_cache_bytes(self.header, n_ctx).layers[: self.n_layers]
        return layers + [0] * (self.n_layers + 2 - len(layers))


def place(
    model: Sizes,
    n_ctx: int,
    ram_bytes: int,
    vram_bytes: Sequence[int] = (),
    *,
    compute: Mapping[int, int] | None = None,  # llama.cpp's buffer in memory by context: bytes
    on_card: Mapping[int, int] | None = None,  # and on a card; both lie on straight lines between these
    whole: bool = False,  # experts stay with their layer, as with `-ngl`
) -> Placement:
    """The fastest placement that the sizes allow."""
    # The cards take as many layers (dense part, shared experts, cache) as fit beside `SPARE_BYTES`, or a
    # larger buffer and `DRIVER_BYTES`, then routed experts, from the last layer of each card on.
    import numpy as np

    caches, count = model.caches(n_ctx), model.n_layers + 1
    beside = [model.dense[i] + caches[i] for i in range(count)]
    planned = (np.array(sorted(it.items())).T if it else None for it in (compute, on_card))
    buffer, own_buffer = (None if it is None else int(np.interp(n_ctx, *it)) for it in planned)
    spare = SPARE_BYTES if own_buffer is None else max(SPARE_BYTES, own_buffer + DRIVER_BYTES)

    def device(name: str, room: int, layers: Sequence[int], routed: Sequence[int], buf: int | None) -> Device:
        dense, cache = (sum(sizes[i] for i in layers) for sizes in (model.dense, caches))
        n_bytes = sum(model.experts[i] for i in routed)
        left = room - dense - n_bytes - cache - (buf or 0)
        token = round(sum(model.token[i] for i in layers) + n_bytes * model.used)
        return Device(name, room, dense, n_bytes, cache, buf, left, token)

    cards = _on_cards(beside, model.experts[:count], [max(0, room - spare) for room in vram_bytes], whole)
    in_ram = [i for first, routed, _ in cards for i in range(first, routed) if model.experts[i]]
    own = [(range(first, end), range(routed, end)) for first, routed, end in cards]
    devices = [device(f"GPU {n}", vram_bytes[n], *layers, own_buffer) for n, layers in enumerate(own)]
    start = cards[0][0] if cards else count
    embedding = [count] if start < count or not model.tied else []  # else it is one tensor with the output
    ram = device(RAM, ram_bytes, [*range(start), *embedding], [*range(start), *in_ram], buffer)
    missing = max(0, -ram.left_bytes)
    cold = min(missing, ram.expert_bytes)  # memory keeps the dense part, which every token reads, first
    paged = min(missing - cold + model.used * cold, ram.dense_bytes + model.used * ram.expert_bytes)
    flags = _flags(count, [len(layers) for layers, _ in own], in_ram)
    return Placement((*devices, ram), count - start, tuple(in_ram), flags, paged)


def _on_cards(
    beside: Sequence[int], experts: Sequence[int], rooms: Sequence[int], whole: bool
) -> list[tuple[int, int, int]]:
    """The last layers in consecutive groups: of each card its first, its first with experts, and its end."""
    # Of all that fit, those with the most layers, then most bytes of experts, then rooms filled alike. Found
    # from the last card on: the best that it and those after it do with the layers from each one to the end.
    import numpy as np

    count = len(beside)
    sums, routed = (np.concatenate([[0], np.cumsum(sizes)]) for sizes in (beside, experts))
    first, end = np.arange(count + 1)[:, None], np.arange(count + 1)
    needs, best, uneven = sums - sums[:, None], np.where(end == count, 0, -1), np.zeros(count + 1)
    choices = []
    for room in reversed(rooms):
        left = room - needs
        kept = np.maximum(np.searchsorted(routed, routed - left.clip(0)), first)  # its first with experts
        own = routed - routed[kept]
        fits = (first <= end) & (left >= 0) & (best >= 0) & ((kept == first) | (not whole))
        total = np.where(fits, own + best, -1)
        best, square = total.max(axis=1), (needs + own) ** 2.0 / max(room, 1) + uneven
        chosen = np.where(fits & (total == best[:, None]), square, np.inf).argmin(axis=1)
        uneven = square[end, chosen]
        choices.append((kept[end, chosen], chosen))
    start, groups = int(np.argmax(best >= 0)), []
    for kept, chosen in reversed(choices):
        groups.append((start, int(kept[start]), int(chosen[start])))
        start = groups[-1][2]
    return groups


def _flags(count: int, cards: Sequence[int], in_ram: Sequence[int]) -> tuple[str, ...]:
    """The arguments for so many of ``count`` layers on each card, and routed experts of some in memory."""
    n_gpu = sum(cards)
    flags = ["-ngl", str(max(99, n_gpu) if n_gpu == count else n_gpu), *(["-fa", "on"] if cards else [])]
    if n_gpu and len(cards) > 1:
        flags += ["-ts", ",".join(map(str, cards))]
    if list(in_ram) == list(range(count - n_gpu, count - n_gpu + len(in_ram))):  # of the first layers there
        return (*flags, "--n-cpu-moe", str(in_ram[-1] + 1)) if in_ram else tuple(flags)
    return (*flags, "-ot", rf"blk\.({'|'.join(map(str, in_ram))}){EXPERTS}=CPU")


def largest_context(
    model: Sizes, ram: int, cards: Sequence[int] = (), paged: bool = False, also: int = 256, **options: Any
) -> int:
    """The most tokens that `place` keeps in memory and on cards (``paged``: except weights); 0: none."""
    # tried are steps of 256, or of a 512th of the model's own, and ``also``
    most = model.n_context or 1 << 20
    tried: set[int] = {most, also, *range(256, most, padded(most // 512, 256))}
    for n_ctx in sorted(tried, reverse=True):
        placed = place(model, n_ctx, ram, cards, **options)
        if placed.works if paged else placed.ram.left_bytes >= 0:
            return n_ctx
    return 0


def context_limits(model: Sizes, n_ctx: int, ram: int, cards: Sequence[int], **options: Any) -> list[str]:
    """The largest context in words; if ``n_ctx`` is longer, also the largest that reads from the disk."""
    lines: list[str] = []
    for how, paged in (("no weights", False), ("weights", True)):
        most = largest_context(model, ram, cards, paged, n_ctx, **options)
        tokens = f"{most:,} tokens" if most else "none"
        lines.append(f"largest context with {how} read from the disk: {tokens}")
        if most >= n_ctx:
            break
    return lines


def machines_table(
    model: Sizes, n_ctx: int, machines: Sequence[str], speeds: dict[str, float] | None = None, **options: Any
) -> pd.DataFrame:
    """A row a machine (memory, then each card: ``64GiB + 24GiB``); with ``speeds`` also tokens a second."""
    import pandas as pd

    rows, named = [], list[str]()
    for name in machines:
        ram, *cards = map(size_of, name.split("+"))
        named.append(" + ".join(f"{n_bytes / 2**30:g} GiB" for n_bytes in (ram, *cards)))
        placed = place(model, n_ctx, ram, cards, **options)
        row = {
            "on cards": size(sum(card.dense_bytes + card.expert_bytes for card in placed.devices[:-1])),
            "in RAM": size(placed.ram.dense_bytes + placed.ram.expert_bytes),
            "from disk a token": size(placed.disk_token_bytes),
            "largest unpaged n_ctx": largest_context(model, ram, cards, **options),
            "flags": " ".join(placed.flags),
        }
        rows.append(row if speeds is None else row | {"at most tokens/s": placed.bound(speeds)[0]})
    return pd.DataFrame(rows, pd.Index(named, name="machine"))


class ExpertTensor(NamedTuple):
    """A tensor of ``n`` routed experts: its file, where it starts, and the bytes of one expert."""

    file: int
    start: int
    slice_bytes: int
    n: int


class Layout(NamedTuple):
    """Where a model's weights lie in its files."""

    experts: dict[int, list[ExpertTensor]]  # by layer, in the order of use: those that its router numbers
    dense: list[tuple[int, int, int]]  # (file, start, end) of the tensors that every token reads whole
    tables: dict[int, tuple[int, int, int]]  # by layer that routes by token id: file, start, experts a token
    expert_bytes: int  # of all routed experts, also of those that no router numbers (``_chexps``)
    token_bytes: int  # of the experts that a token uses
    dense_bytes: int  # that every token reads

    @classmethod
    def of(cls, headers: Sequence[GGUFHeader]) -> Layout:
        """From the headers of all shards in order; llama.cpp does not read layers for drafting."""
        count, n_layers = headers[0].count("expert_count"), headers[0].n_layers
        rows = [row for row in weights(*headers) if row.layer < n_layers]
        routed = [row for row in rows if row.use]
        experts, dense, tables = dict[int, list[ExpertTensor]](), [], {}
        for row in sorted(rows, key=lambda row: (USES.index(row.use), row.tensor.name.endswith(".bias"))):
            if row.use and row.tensor.shape[-1] == count:
                part = ExpertTensor(row.file, row.start, row.tensor.nbytes // count, count)
                experts.setdefault(row.layer, []).append(part)
            elif HASH_TABLE in row.tensor.name:
                tables[row.layer] = row.file, row.start, row.tensor.shape[0]
            elif not row.use and row.share == 1:
                dense.append((row.file, row.start, row.start + row.tensor.nbytes))
        n_bytes = sum(row.tensor.nbytes for row in routed), round(sum(row.token_bytes for row in routed))
        return cls(experts, dense, tables, *n_bytes, sum(end - start for _, start, end in dense))
