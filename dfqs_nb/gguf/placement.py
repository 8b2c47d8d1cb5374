"""Where a model's tensors and cache would lie: graphics cards, memory, disk; exact to the tensor.

The rules are llama.cpp's (``src/llama-model.cpp``, ``common/common.h``). The embedding stays in memory. With
``-ngl N`` the last N layers (the output counts as one more) are divided among the cards by ``-ts``. A layer's
cache lies where the layer does. ``--n-cpu-moe`` and ``-ot`` keep routed experts in memory. What a card needs
to compute is known only to a run on it, so it is "unknown" here, and some of each card is left free for it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.display import size
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.facts import INTEGER_TYPES, class_of, experts, layer_of
from dfqs_nb.gguf.header import GGUFHeader, Tensor
from dfqs_nb.gguf.memory import kv_cache_bytes

if TYPE_CHECKING:
    import pandas as pd

EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # LLM_FFN_EXPS_REGEX: what --n-cpu-moe keeps in memory
USED_IN_ORDER = ("gate_up", "up", "gate", "down")  # by build_moe_ffn
HASH_TABLE = "ffn_gate_tid2eid"  # of a layer that routes by token
SPARE_BYTES = 1 << 30  # of each card, for what it computes with: what --fit leaves, too
ALL_LAYERS = 99
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|[KMGT]i?)B?", re.I)
RAM = "RAM"


@dataclass(frozen=True)
class Device:
    """What lies on one device, and what a token of decode reads there; bytes.

    Attributes:
        compute_bytes: None where nobody measured it.
        token_bytes: of weights that a token reads, experts on average.
    """

    name: str
    capacity_bytes: int
    dense_bytes: int
    expert_bytes: int
    cache_bytes: int
    token_bytes: int
    compute_bytes: int | None = None

    @property
    def left_bytes(self) -> int:
        """What is left; negative in memory where weights will be read from the disk again and again."""
        used = self.dense_bytes + self.expert_bytes + self.cache_bytes + (self.compute_bytes or 0)
        return self.capacity_bytes - used


@dataclass(frozen=True)
class Placement:
    """A model on a machine.

    Attributes:
        devices: the cards in order, then memory.
        n_gpu_layers: layers on cards, the output among them; `n_layers` + 1 is all.
        in_ram: layers whose dense part is on a card and whose routed experts are in memory.
        counts: layers on each card.
        pieces: routed experts in memory, the least read first: bytes, and of these read a token.
    """

    n_ctx: int
    n_layers: int
    devices: tuple[Device, ...]
    n_gpu_layers: int
    in_ram: tuple[int, ...]
    counts: tuple[int, ...]
    pieces: tuple[tuple[float, float], ...]

    @property
    def ram(self) -> Device:
        """The memory."""
        return self.devices[-1]

    @property
    def disk_token_bytes(self) -> float:
        """Bytes that a token reads from the disk: memory keeps what every token uses, then hot experts."""
        ram, missing = self.ram, max(0, -self.ram.left_bytes)
        experts = min(missing, ram.expert_bytes)
        read, left = 0.0, float(experts)
        for nbytes, of_these in self.pieces:
            cold = min(left, nbytes)
            read, left = read + of_these * cold / nbytes, left - cold
        return read + min(missing - experts, ram.dense_bytes)

    @property
    def works(self) -> bool:
        """Whether memory holds at least what cannot be paged."""
        return self.ram.cache_bytes + (self.ram.compute_bytes or 0) <= self.ram.capacity_bytes

    @property
    def flags(self) -> tuple[str, ...]:
        """The arguments of llama-server (or llama-cli) that place the model so."""
        if not any(self.counts):
            return ("-ngl", "0")
        every = self.n_gpu_layers > self.n_layers
        first = self.n_layers + 1 - self.n_gpu_layers
        flags = ["-ngl", str(max(ALL_LAYERS, self.n_gpu_layers) if every else self.n_gpu_layers)]
        if len(self.counts) > 1:
            flags += ["-ts", ",".join(map(str, self.counts))]
        if not self.in_ram:
            return tuple(flags)
        if self.in_ram == tuple(range(first, self.in_ram[-1] + 1)):  # with those on no card, the first layers
            return (*flags, "--n-cpu-moe", str(self.in_ram[-1] + 1))
        return (*flags, "-ot", rf"blk\.({'|'.join(map(str, self.in_ram))}){EXPERTS}=CPU")

    def command(self, path: str) -> str:
        """The llama-server command of this placement."""
        words = ["llama-server", "-m", path, "-c", str(self.n_ctx), *self.flags, "-np", "1"]
        return shlex.join(words)

    def tokens_per_sec(self, speeds: Mapping[str, float]) -> float | None:
        """The most tokens a second that reading weights allows; None where a speed that it needs is missing.

        Args:
            speeds: bytes a second by device; ``disk`` for what memory does not hold. A kind's name, such as
                ``GPU``, stands for all of that kind.
        """
        if self.unknown_speeds(speeds):
            return None
        seconds = sum(nbytes / _speed(name, speeds) for name, nbytes in self._token_reads() if nbytes)
        return 1 / seconds if seconds else None

    def unknown_speeds(self, speeds: Mapping[str, float]) -> list[str]:
        """The devices whose speed `tokens_per_sec` needs and does not have."""
        return [name for name, nbytes in self._token_reads() if nbytes and not _speed(name, speeds)]

    def _token_reads(self) -> list[tuple[str, float]]:
        """The bytes that a token reads from each device, and from the disk."""
        paged = min(self.disk_token_bytes, self.ram.token_bytes)
        reads = [(device.name, device.token_bytes) for device in self.devices[:-1]]
        return [*reads, (self.ram.name, self.ram.token_bytes - paged), ("disk", paged)]


def _speed(device: str, speeds: Mapping[str, float]) -> float:
    return speeds.get(device, speeds.get(device.split()[0], 0.0))


def size_of(text: str) -> int:
    """Bytes of a size as people write it; ``GB`` and ``GiB`` are both 2^30 bytes, as memory is sold.

    >>> size_of("64GB"), size_of("1.5 GiB"), size_of("500M")
    (68719476736, 1610612736, 524288000)

    Raises:
        DfqsError: it is no size.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise DfqsError(f"{text!r} is no size", hint="write 64GB")
    power = "KMGT".find(match[2][:1].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * 1024**power)


class Model:
    """What placing needs of a model (of shards: `ShardSet.as_one`): dense and expert parts by layer.

    Args:
        reads: how often a token reads each expert of a layer, where a routing profile tells.
    """

    def __init__(self, header: GGUFHeader, reads: Mapping[int, Sequence[float]] | None = None) -> None:
        self.header, self.n_layers, layout, self.reads = header, header.n_layers, experts(header), reads or {}
        self.used = layout.used / layout.total if layout.total else 1.0
        self.tied = not any(tensor.name == "output.weight" for tensor in header.tensors)
        size = self.n_layers + 1  # the output counts as one more
        self.dense, self.experts, self.token = [0] * size, [0] * size, [0.0] * size
        self.input = self.input_token = 0
        for tensor in header.tensors:
            self._add(tensor)
        self.n_context = self.header.count(f"{self.header.architecture}.context_length")

    def _add(self, tensor: Tensor) -> None:
        kind, layer = class_of(tensor.name), layer_of(tensor.name)
        is_table = tensor.type in INTEGER_TYPES or kind == "embedding"
        read = tensor.nbytes / max(tensor.shape[-1], 1) if is_table else float(tensor.nbytes)
        if layer is None and kind == "embedding":
            self.input += tensor.nbytes
            self.input_token += round(read)
            if not self.tied:
                return
            layer, read = self.n_layers, float(tensor.nbytes)  # llama.cpp loads it once more, for the output
        at = self.n_layers if layer is None else min(layer, self.n_layers)
        is_expert = re.search(EXPERTS, tensor.name) is not None
        (self.experts if is_expert else self.dense)[at] += tensor.nbytes
        self.token[at] += 0.0 if is_expert else read

    def caches(self, n_ctx: int, **types: Any) -> list[int]:
        """Bytes of cache of each layer; none for the output."""
        layers = [sum(parts.values()) for parts in kv_cache_bytes(self.header, n_ctx, **types).layers]
        layers = layers[: self.n_layers]
        return [*layers, *[0] * (self.n_layers + 1 - len(layers))]

    def pieces(self, experts_of: Sequence[int]) -> tuple[tuple[float, float], ...]:
        """The routed experts of these layers, the least read first: bytes, and of these read a token."""
        pieces = []
        for layer in experts_of:
            reads = self.reads.get(layer, [self.used])
            each = self.experts[layer] / len(reads)
            pieces += [(each, each * read) for read in reads if each]
        return tuple(sorted(pieces, key=lambda piece: piece[1] / piece[0]))

    def device(
        self,
        name: str,
        capacity: int,
        layers: Sequence[int],
        experts_of: Sequence[int],
        caches: Sequence[int],
        *,
        extra: int = 0,
        extra_token: int = 0,
        compute: int | None = None,
    ) -> Device:
        """Add up what lies on one device: the dense parts of ``layers``, the experts of ``experts_of``."""
        routed = sum(self.experts[i] for i in experts_of)
        token = sum(self.token[i] for i in layers) + routed * self.used + extra_token
        dense = sum(self.dense[i] for i in layers) + extra
        cache = sum(caches[i] for i in layers)
        return Device(name, capacity, dense, routed, cache, round(token), compute)


def place(
    model: Model,
    n_ctx: int,
    ram_bytes: int,
    vram_bytes: Sequence[int] = (),
    *,
    spare_bytes: int = SPARE_BYTES,
    compute_bytes: int | None = None,
    whole: bool = False,
    **types: Any,
) -> Placement:
    """The fastest placement that the sizes allow.

    As many layers on the cards as their dense parts, shared experts and cache fit, ``spare_bytes`` left on
    each. Then routed experts, from the last layer of each card on, while there is room. The rest in memory.

    Args:
        n_ctx: tokens of context.
        ram_bytes: memory to use.
        vram_bytes: of each card.
        compute_bytes: of llama.cpp's compute buffer in memory, as it plans it for the CPU; None: unknown.
        whole: keep a layer's routed experts with the layer, as programs do that know `-ngl` only.
        types: of `memory.kv_cache_bytes`.

    Raises:
        HeaderError: a key that the cache's formula needs is missing.
    """
    caches = model.caches(n_ctx, **types)
    rooms = [max(0, room - spare_bytes) for room in vram_bytes]
    needs = [model.dense[i] + caches[i] + whole * model.experts[i] for i in range(model.n_layers + 1)]
    count = model.n_layers + 1
    n_gpu, cards = next(
        (n, cards)
        for n in range(count if sum(rooms) else 0, -1, -1)
        if (cards := _divided(needs, range(count - n, count), rooms)) is not None
    )
    devices, in_ram = [], []
    for number, (layers, room) in enumerate(zip(cards, rooms, strict=True)):
        left = room - sum(model.dense[i] + caches[i] for i in layers)
        kept: list[int] = []
        for i in reversed(layers):
            if model.experts[i] > left:
                break
            left -= model.experts[i]
            kept.append(i)
        in_ram += [i for i in layers if i not in kept and model.experts[i]]
        devices.append(model.device(f"GPU {number}", vram_bytes[number], layers, kept, caches))
    here = range(count - n_gpu)
    memory = {"extra": model.input, "extra_token": model.input_token, "compute": compute_bytes}
    if model.tied and n_gpu == 0:
        memory["extra"] = 0  # embedding and output are one tensor there
    ram = model.device(RAM, ram_bytes, here, [*here, *in_ram], caches, **memory)  # type: ignore[arg-type]
    counts = tuple(map(len, cards))
    pieces = model.pieces([*here, *in_ram])
    return Placement(n_ctx, model.n_layers, (*devices, ram), n_gpu, tuple(in_ram), counts, pieces)


def _divided(needs: Sequence[int], layers: Sequence[int], rooms: Sequence[int]) -> list[list[int]] | None:
    """The layers in consecutive groups, one a card, in proportion to their room; None if one does not fit."""
    groups: list[list[int]] = [[] for _ in rooms]
    total, room, done, card = sum(needs[i] for i in layers), sum(rooms), 0.0, 0
    for i in layers:
        while card < len(rooms) - 1 and done + needs[i] / 2 > total * sum(rooms[: card + 1]) / room:
            card += 1
        groups[card].append(i)
        done += needs[i]
    if any(sum(needs[i] for i in group) > own for group, own in zip(groups, rooms, strict=True)):
        return None
    return groups


def largest_context(model: Model, ram_bytes: int, vram_bytes: Sequence[int] = (), **options: Any) -> int:
    """The most tokens, in steps of 256, with which no layer leaves a card, and memory holds what it must.

    Where weights page even at 256 tokens: the most that memory holds beside paged weights. 0: not even 256.
    """
    least = place(model, 256, ram_bytes, vram_bytes, **options)

    def same(n_ctx: int) -> bool:
        now = place(model, n_ctx, ram_bytes, vram_bytes, **options)
        pages = now.ram.left_bytes < 0 <= least.ram.left_bytes
        return now.works and not pages and now.n_gpu_layers == least.n_gpu_layers

    low, high = 0, max(1, (model.n_context or 1 << 20) // 256)
    if same(high * 256):
        return min(high * 256, model.n_context or high * 256)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if same(middle * 256) else (low, middle)
    return low * 256


def table(placement: Placement) -> pd.DataFrame:
    """One row a device; sizes as text, because a card's compute buffer is unknown."""
    import pandas as pd

    rows = [
        {
            "device": device.name,
            "dense": size(device.dense_bytes),
            "routed experts": size(device.expert_bytes),
            "cache": size(device.cache_bytes),
            "compute": "unknown" if device.compute_bytes is None else size(device.compute_bytes),
            "left": size(device.left_bytes),
            "read a token": size(device.token_bytes),
        }
        for device in placement.devices
    ]
    return pd.DataFrame(rows).set_index("device")


def machines_table(
    model: Model,
    n_ctx: int,
    machines: Sequence[str],
    speeds: Mapping[str, float] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The same model on several machines, one row each.

    Columns: ``on cards``, ``in RAM``, ``from disk a token`` (sizes as text), ``largest
    n_ctx`` (0: none), ``flags``; with ``speeds``, ``at most tokens/s`` (NaN
    where one that counts is missing).

    Args:
        machines: memory, then each card: ``64GB + 24GB + 24GB``.
        speeds: of `Placement.tokens_per_sec`.
        options: of `place`.
    """
    import pandas as pd

    rows = []
    for name in machines:
        ram, *cards = map(size_of, name.split("+"))
        placed = place(model, n_ctx, ram, cards, **options)
        on_cards = sum(device.dense_bytes + device.expert_bytes for device in placed.devices[:-1])
        row = {
            "machine": name,
            "on cards": size(on_cards),
            "in RAM": size(placed.ram.dense_bytes + placed.ram.expert_bytes),
            "from disk a token": size(placed.disk_token_bytes),
            "largest n_ctx": largest_context(model, ram, cards, **options),
            "flags": " ".join(placed.flags),
        }
        if speeds is not None:
            row["at most tokens/s"] = placed.tokens_per_sec(speeds)
        rows.append(row)
    return pd.DataFrame(rows).set_index("machine")


# ---- in the file ----


@dataclass(frozen=True)
class Experts:
    """One tensor of routed experts: its file, where it starts, and bytes of one of its ``n`` experts."""

    file: int
    start: int
    slice_bytes: int
    n: int

    @property
    def end(self) -> int:
        """Behind the last expert."""
        return self.start + self.slice_bytes * self.n


@dataclass(frozen=True)
class Layout:
    """Where a model's weights lie in its files.

    Attributes:
        experts: by layer, its tensors of experts in the order in which llama.cpp uses them.
        dense: ``(file, start, end)`` of the tensors that every token reads whole.
        tables: by layer that routes by token: file, start, and experts a token.
        token_bytes: of the experts that a token uses.
    """

    experts: dict[int, list[Experts]]
    dense: list[tuple[int, int, int]]
    tables: dict[int, tuple[int, int, int]]
    token_bytes: int

    @classmethod
    def of(cls, headers: Sequence[GGUFHeader], n_gpu_layers: int = 0) -> Layout:
        """From the headers of all shards, first one first; without the dense weights that a GPU holds."""
        routing, n_layers = experts(headers[0]), headers[0].n_layers
        tied = not any(tensor.name == "output.weight" for header in headers for tensor in header.tensors)
        parts: dict[int, list[tuple[int, Experts]]] = {}
        dense, tables = [], {}
        for file, header in enumerate(headers):
            for tensor in header.tensors:
                layer, start = layer_of(tensor.name), header.data_offset + tensor.offset
                if layer is not None and layer >= n_layers:
                    continue  # for drafting: llama.cpp leaves them
                routed = re.search(EXPERTS, tensor.name)
                if layer is not None and routed and tensor.shape[-1] == routing.total:
                    part = Experts(file, start, tensor.nbytes // routing.total, routing.total)
                    parts.setdefault(layer, []).append((USED_IN_ORDER.index(routed[1]), part))
                elif layer is not None and HASH_TABLE in tensor.name:
                    tables[layer] = file, start, tensor.shape[0]
                elif (n_layers if layer is None else layer) > n_layers - n_gpu_layers:
                    continue  # copied to the card; the output counts as one more layer
                elif tensor.type not in INTEGER_TYPES and (tied or class_of(tensor.name) != "embedding"):
                    dense.append((file, start, start + tensor.nbytes))
        ordered = {n: [part for _, part in sorted(own, key=itemgetter(0))] for n, own in parts.items()}
        slices = sum(part.slice_bytes for layer in ordered.values() for part in layer)
        return cls(ordered, dense, tables, routing.used * slices)

    @property
    def dense_bytes(self) -> int:
        """Bytes that every token reads."""
        return sum(end - start for _, start, end in self.dense)

    @property
    def layer_bytes(self) -> int:
        """Bytes of all experts of the largest layer."""
        layers = (sum(part.end - part.start for part in parts) for parts in self.experts.values())
        return max(layers, default=0)
