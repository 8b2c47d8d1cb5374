"""Where a model's tensors and cache lie: graphics cards, memory, disk; exact to the tensor.

The rules are llama.cpp's (``src/llama-model.cpp``, ``common/common.h``). The embedding stays in memory. With
``-ngl N`` the last N layers (the output counts as one more) are divided among the cards by ``-ts``. A layer's
cache lies where the layer lies. ``--n-cpu-moe`` and ``-ot`` keep routed experts in memory.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from dfqs_nb.core.display import size
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.facts import INTEGER_TYPES, class_of, experts, is_tied, layer_of, token_shares
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import kv_cache_bytes

if TYPE_CHECKING:
    import pandas as pd

EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # LLM_FFN_EXPS_REGEX: what --n-cpu-moe keeps in memory
HASH_TABLE = "ffn_gate_tid2eid"  # of a layer that routes by token id
# Of each card, for its driver (--fit leaves 1 GiB) and compute buffer: of DeepSeek-V4-Flash an H100 planned
# 0.9 GB at 131,072 tokens, and 2.1 GB at 1,048,576.
SPARE_BYTES = 2 << 30
RAM = "RAM"


def size_of(text: str) -> int:
    """Bytes of a size as people write it; ``GB`` and ``GiB`` are both 2^30 bytes, as memory is sold."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[KMGT]i?)B?", text.strip(), re.I)):
        raise DfqsError(f"{text!r} is no size", hint="write 64GB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2][:1].upper() or " "))


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


@dataclass(frozen=True)
class Placement:
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


class Model:
    """Bytes by layer of a model, then of output and embedding; ``token``: as a token reads the dense part."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.n_layers, self.tied = header, header.n_layers, is_tied(header)
        self.n_context, layout, count = header.count("context_length"), experts(header), self.n_layers + 2
        self.used = layout.used / layout.total if layout.total else 1.0
        self.dense, self.experts, self.token = [0] * count, [0] * count, [0.0] * count
        for tensor, _, share in token_shares(header):
            layer = layer_of(tensor.name)
            at = self.n_layers if layer is None else min(layer, self.n_layers)
            if layer is None and class_of(tensor.name) == "embedding":
                self.dense[-1] += tensor.nbytes
                if self.tied:  # llama.cpp loads it once more, for the output, which alone reads all of it
                    self.dense[at] += tensor.nbytes
                self.token[at if self.tied else -1] += tensor.nbytes * share
            elif re.search(EXPERTS, tensor.name):
                self.experts[at] += tensor.nbytes
            else:
                self.dense[at] += tensor.nbytes
                self.token[at] += tensor.nbytes * share

    def caches(self, n_ctx: int) -> list[int]:
        """Bytes of cache of each layer; none for the output and the embedding."""
        layers = kv_cache_bytes(self.header, n_ctx).layers[: self.n_layers]
        return layers + [0] * (self.n_layers + 2 - len(layers))


def place(
    model: Model,
    n_ctx: int,
    ram_bytes: int,
    vram_bytes: Sequence[int] = (),
    *,
    compute_bytes: int | None = None,
    whole: bool = False,
) -> Placement:
    """The fastest placement that the sizes allow; ``compute_bytes``: of llama.cpp's buffer in memory.

    The cards take as many layers (dense part, shared experts, cache) as fit beside `SPARE_BYTES`, then routed
    experts, from the last layer of each card on. ``whole``: experts stay with their layer, as with `-ngl`.
    """
    caches, count = model.caches(n_ctx), model.n_layers + 1
    rooms = [max(0, room - SPARE_BYTES) for room in vram_bytes]
    beside = [model.dense[i] + caches[i] for i in range(count)]
    cards = _on_cards([need + whole * model.experts[i] for i, need in enumerate(beside)], rooms)
    n_gpu = sum(map(len, cards))

    def device(name: str, capacity: int, layers: list[int], routed: list[int], compute: int | None) -> Device:
        dense, cache = (sum(sizes[i] for i in layers) for sizes in (model.dense, caches))
        n_bytes = sum(model.experts[i] for i in routed)
        left = capacity - dense - n_bytes - cache - (compute or 0)
        token = round(sum(model.token[i] for i in layers) + n_bytes * model.used)
        return Device(name, capacity, dense, n_bytes, cache, compute, left, token)

    devices, in_ram = [], list[int]()
    for number, layers in enumerate(cards):
        left = rooms[number] - sum(beside[i] for i in layers)
        kept = bisect_right(list(accumulate(model.experts[i] for i in reversed(layers))), left)
        away, routed = layers[: len(layers) - kept], layers[len(layers) - kept :]
        in_ram += [i for i in away if model.experts[i]]
        devices.append(device(f"GPU {number}", vram_bytes[number], layers, routed, None))
    here = list(range(count - n_gpu))
    embedding = [count] if n_gpu or not model.tied else []  # else it is one tensor with the output
    ram = device(RAM, ram_bytes, here + embedding, here + in_ram, compute_bytes)
    missing = max(0, -ram.left_bytes)
    cold = min(missing, ram.expert_bytes)  # memory keeps the dense part, which every token reads, first
    paged = min(missing - cold + model.used * cold, ram.dense_bytes + model.used * ram.expert_bytes)
    return Placement((*devices, ram), n_gpu, tuple(in_ram), _flags(count, cards, in_ram), paged)


def _on_cards(needs: Sequence[int], rooms: Sequence[int]) -> list[list[int]]:
    """The most last layers that fit, in consecutive groups, one a card, in proportion to their room."""
    for first in range(len(needs) if sum(rooms) else 0):
        groups, done = [list[int]() for _ in rooms], 0.0
        ends = [sum(needs[first:]) * end / sum(rooms) for end in accumulate(rooms)]
        for i in range(first, len(needs)):
            groups[bisect_left(ends, done + needs[i] / 2, hi=len(rooms) - 1)].append(i)
            done += needs[i]
        if all(sum(needs[i] for i in group) <= own for group, own in zip(groups, rooms, strict=True)):
            return groups
    return [[] for _ in rooms]


def _flags(count: int, cards: Sequence[Sequence[int]], in_ram: Sequence[int]) -> tuple[str, ...]:
    """The arguments for some of ``count`` layers on each card, and the routed experts of some in memory."""
    if not (n_gpu := sum(map(len, cards))):
        return ("-ngl", "0")
    flags = ["-ngl", str(max(99, n_gpu) if n_gpu == count else n_gpu)]
    if len(cards) > 1:
        flags += ["-ts", ",".join(str(len(layers)) for layers in cards)]
    if list(in_ram) == list(range(count - n_gpu, count - n_gpu + len(in_ram))):  # of the first layers there
        return (*flags, "--n-cpu-moe", str(in_ram[-1] + 1)) if in_ram else tuple(flags)
    return (*flags, "-ot", rf"blk\.({'|'.join(map(str, in_ram))}){EXPERTS}=CPU")


def largest_context(model: Model, ram_bytes: int, vram_bytes: Sequence[int] = (), **options: Any) -> int:
    """The most tokens, in steps of 256, that move no layer off a card and start no paging; 0: none."""
    least, most = place(model, 256, ram_bytes, vram_bytes, **options), model.n_context or 1 << 20

    def too_long(step: int) -> bool:
        now = place(model, 256 * step, ram_bytes, vram_bytes, **options)
        pages = now.ram.left_bytes < 0 <= least.ram.left_bytes
        return not now.works or pages or now.n_gpu_layers != least.n_gpu_layers

    return min(most, 256 * bisect_left(range(1, max(1, most // 256) + 1), True, key=too_long))


def machines_table(
    model: Model, n_ctx: int, machines: Sequence[str], speeds: dict[str, float] | None = None, **options: Any
) -> pd.DataFrame:
    """A row a machine (memory, then each card: ``64GB + 24GB``); with ``speeds`` also tokens a second."""
    import pandas as pd

    rows = []
    for name in machines:
        ram, *cards = map(size_of, name.split("+"))
        placed = place(model, n_ctx, ram, cards, **options)
        row = {
            "on cards": size(sum(card.dense_bytes + card.expert_bytes for card in placed.devices[:-1])),
            "in RAM": size(placed.ram.dense_bytes + placed.ram.expert_bytes),
            "from disk a token": size(placed.disk_token_bytes),
            "largest n_ctx": largest_context(model, ram, cards, **options),
            "flags": " ".join(placed.flags),
        }
        rows.append(row if speeds is None else row | {"at most tokens/s": placed.bound(speeds)[0]})
    return pd.DataFrame(rows, pd.Index(machines, name="machine"))


class Experts(NamedTuple):
    """A tensor of ``n`` routed experts: its file, where it starts, and the bytes of one expert."""

    file: int
    start: int
    slice_bytes: int
    n: int


@dataclass(frozen=True)
class Layout:
    """Where a model's weights lie in its files."""

    experts: dict[int, list[Experts]]  # by layer, in the order in which build_moe_ffn uses them
    dense: list[tuple[int, int, int]]  # (file, start, end) of the tensors that every token reads whole
    tables: dict[int, tuple[int, int, int]]  # by layer that routes by token id: file, start, experts a token
    token_bytes: int  # of the experts that a token uses
    dense_bytes: int  # that every token reads

    @classmethod
    def of(cls, headers: Sequence[GGUFHeader]) -> Layout:
        """From the headers of all shards in order."""
        routing, n_layers, tied = experts(headers[0]), headers[0].n_layers, is_tied(*headers)
        placed = [(i, t, it.data_offset + t.offset) for i, it in enumerate(headers) for t in it.tensors]
        parts: dict[int, dict[tuple[int, bool], Experts]] = {}  # a bias comes after its weight
        dense, tables = [], {}
        for file, tensor, start in placed:
            layer, routed = layer_of(tensor.name), re.search(EXPERTS, tensor.name)
            if layer is not None and layer >= n_layers:
                continue  # layers for drafting, which llama.cpp does not read
            if layer is not None and routed and tensor.shape[-1] == routing.total:
                key = ("gate_up", "up", "gate", "down").index(routed[1]), tensor.name.endswith(".bias")
                part = Experts(file, start, tensor.nbytes // routing.total, routing.total)
                parts.setdefault(layer, {})[key] = part
            elif layer is not None and HASH_TABLE in tensor.name:
                tables[layer] = file, start, tensor.shape[0]
            elif tensor.type not in INTEGER_TYPES and (tied or class_of(tensor.name) != "embedding"):
                dense.append((file, start, start + tensor.nbytes))
        ordered = {layer: [own[place] for place in sorted(own)] for layer, own in parts.items()}
        slices = sum(part.slice_bytes for layer in ordered.values() for part in layer)
        return cls(ordered, dense, tables, routing.used * slices, sum(end - start for _, start, end in dense))
