"""Where a model's tensors and cache lie: graphics cards, memory, disk; exact to the tensor.

The rules are llama.cpp's (``src/llama-model.cpp``, ``common/common.h``). The embedding stays in memory. With
``-ngl N`` the last N layers (the output counts as one more) are divided among the cards by ``-ts``. A layer's
cache lies where the layer lies. ``--n-cpu-moe`` and ``-ot`` keep routed experts in memory. A card's compute
buffer is unknown: some of each card is left free for it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dfqs_nb.core.display import size
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.facts import INTEGER_TYPES, class_of, experts, is_tied, layer_of, token_shares
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import kv_cache_bytes

if TYPE_CHECKING:
    import pandas as pd

EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # LLM_FFN_EXPS_REGEX: what --n-cpu-moe keeps in memory
USED_IN_ORDER = ("gate_up", "up", "gate", "down")  # by build_moe_ffn
HASH_TABLE = "ffn_gate_tid2eid"  # of a layer that routes by token id
# Of each card, for its driver (--fit leaves 1 GiB) and compute buffer: of DeepSeek-V4-Flash an H100 planned
# 0.9 GB at 131,072 tokens, and 2.1 GB at 1,048,576.
SPARE_BYTES = 2 << 30
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|[KMGT]i?)B?", re.I)
RAM = "RAM"


def size_of(text: str) -> int:
    """Bytes of a size as people write it; ``GB`` and ``GiB`` are both 2^30 bytes, as memory is sold."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise DfqsError(f"{text!r} is no size", hint="write 64GB")
    power = "KMGT".find(match[2][:1].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * 1024**power)


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
        """At most so many tokens a second, from reading weights alone; and the devices of unknown speed.

        ``speeds``: bytes a second of ``GPU``, ``RAM``, and ``disk`` for what memory lacks. With a device of
        unknown speed there is no bound.
        """
        reads = [(device.name.split()[0], float(device.token_bytes)) for device in self.devices[:-1]]
        paged = min(self.disk_token_bytes, self.ram.token_bytes)
        reads = [(name, n) for name, n in [*reads, (RAM, self.ram.token_bytes - paged), ("disk", paged)] if n]
        unknown = list(dict.fromkeys(name for name, _ in reads if not speeds.get(name)))
        return (None if unknown or not reads else 1 / sum(n / speeds[name] for name, n in reads)), unknown


class Model:
    """What `place` needs of a model: bytes by layer of its dense part and of its routed experts.

    Behind the layers come the output and the embedding. ``token``: of the dense part, as a token reads it.
    """

    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.n_layers, self.tied = header, header.n_layers, is_tied(header)
        layout = experts(header)
        self.used = layout.used / layout.total if layout.total else 1.0
        self.n_context = header.count("context_length")
        count = self.n_layers + 2
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
    """The fastest placement that the sizes allow.

    The cards take as many layers (dense part, shared experts, cache) as fit beside `SPARE_BYTES`, then routed
    experts, from the last layer of each card on; memory takes the rest.
    ``compute_bytes``: of llama.cpp's compute buffer in memory. ``whole``: keep a layer's routed experts with
    the layer, for programs that only know `-ngl`.
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
        left, kept = rooms[number] - sum(beside[i] for i in layers), list[int]()
        for i in reversed(layers):
            if model.experts[i] > left:
                break
            left -= model.experts[i]
            kept.append(i)
        in_ram += [i for i in layers if i not in kept and model.experts[i]]
        devices.append(device(f"GPU {number}", vram_bytes[number], layers, kept, None))
    here = list(range(count - n_gpu))
    embedding = [count] if n_gpu or not model.tied else []  # else it is one tensor with the output
    ram = device(RAM, ram_bytes, here + embedding, here + in_ram, compute_bytes)
    missing = max(0, -ram.left_bytes)
    cold = min(missing, ram.expert_bytes)  # memory keeps the dense part, which every token reads, first
    paged = min(missing - cold + model.used * cold, ram.dense_bytes + model.used * ram.expert_bytes)
    flags = _flags(count, list(map(len, cards)), in_ram)
    return Placement((*devices, ram), n_gpu, tuple(in_ram), flags, paged)


def _on_cards(needs: Sequence[int], rooms: Sequence[int]) -> list[list[int]]:
    """The most last layers that fit, in consecutive groups, one a card, in proportion to their room."""
    for first in range(len(needs) if sum(rooms) else 0):
        groups: list[list[int]] = [[] for _ in rooms]
        total, done, card = sum(needs[first:]), 0.0, 0
        for i, need in enumerate(needs[first:], first):
            while done + need / 2 > total * sum(rooms[: card + 1]) / sum(rooms) and card < len(rooms) - 1:
                card += 1
            groups[card].append(i)
            done += need
        if all(sum(needs[i] for i in group) <= own for group, own in zip(groups, rooms, strict=True)):
            return groups
    return [[] for _ in rooms]


def _flags(count: int, counts: Sequence[int], in_ram: Sequence[int]) -> tuple[str, ...]:
    """The arguments for ``counts`` of ``count`` layers on each card, and routed experts in memory."""
    if not (n_gpu := sum(counts)):
        return ("-ngl", "0")
    flags = ["-ngl", str(max(99, n_gpu) if n_gpu == count else n_gpu)]
    if len(counts) > 1:
        flags += ["-ts", ",".join(map(str, counts))]
    if list(in_ram) == list(range(count - n_gpu, count - n_gpu + len(in_ram))):  # of the first layers there
        return (*flags, "--n-cpu-moe", str(in_ram[-1] + 1)) if in_ram else tuple(flags)
    return (*flags, "-ot", rf"blk\.({'|'.join(map(str, in_ram))}){EXPERTS}=CPU")


def largest_context(model: Model, ram_bytes: int, vram_bytes: Sequence[int] = (), **options: Any) -> int:
    """The most tokens, in steps of 256, that move no layer off a card and start no paging; 0: not even 256.

    Where weights page even at 256 tokens: the most that memory holds beside them. ``options``: of `place`.
    """
    least, most = place(model, 256, ram_bytes, vram_bytes, **options), model.n_context or 1 << 20

    def too_long(step: int) -> bool:
        now = place(model, 256 * step, ram_bytes, vram_bytes, **options)
        pages = now.ram.left_bytes < 0 <= least.ram.left_bytes
        return not now.works or pages or now.n_gpu_layers != least.n_gpu_layers

    return min(most, 256 * bisect_left(range(1, max(1, most // 256) + 1), True, key=too_long))


def table(placement: Placement) -> pd.DataFrame:
    """One row a device; sizes as text, because a card's compute buffer can be unknown."""
    import pandas as pd

    columns = ["dense", "routed experts", "cache", "compute", "left", "read a token"]
    rows = {
        device.name: ["unknown" if nbytes is None else size(nbytes) for nbytes in device[2:]]
        for device in placement.devices
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("device")


def machines_table(
    model: Model,
    n_ctx: int,
    machines: Sequence[str],
    speeds: Mapping[str, float] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """A row a machine (memory, then each card: ``64GB + 24GB``); with ``speeds`` also tokens a second."""
    import pandas as pd

    rows = {}
    for name in machines:
        ram, *cards = map(size_of, name.split("+"))
        placed = place(model, n_ctx, ram, cards, **options)
        rows[name] = {
            "on cards": size(sum(card.dense_bytes + card.expert_bytes for card in placed.devices[:-1])),
            "in RAM": size(placed.ram.dense_bytes + placed.ram.expert_bytes),
            "from disk a token": size(placed.disk_token_bytes),
            "largest n_ctx": largest_context(model, ram, cards, **options),
            "flags": " ".join(placed.flags),
            **({} if speeds is None else {"at most tokens/s": placed.bound(speeds)[0]}),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("machine")


class Experts(NamedTuple):
    """A tensor of ``n`` routed experts: its file, where it starts, and the bytes of one expert."""

    file: int
    start: int
    slice_bytes: int
    n: int


@dataclass(frozen=True)
class Layout:
    """Where a model's weights lie in its files."""

    experts: dict[int, list[Experts]]  # by layer, in the order in which llama.cpp uses them
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
                part = Experts(file, start, tensor.nbytes // routing.total, routing.total)
                key = USED_IN_ORDER.index(routed[1]), tensor.name.endswith(".bias")
                parts.setdefault(layer, {})[key] = part
            elif layer is not None and HASH_TABLE in tensor.name:
                tables[layer] = file, start, tensor.shape[0]
            elif tensor.type not in INTEGER_TYPES and (tied or class_of(tensor.name) != "embedding"):
                dense.append((file, start, start + tensor.nbytes))
        ordered = {layer: [own[place] for place in sorted(own)] for layer, own in parts.items()}
        slices = sum(part.slice_bytes for layer in ordered.values() for part in layer)
        dense_bytes = sum(end - start for _, start, end in dense)
        return cls(ordered, dense, tables, routing.used * slices, dense_bytes)
