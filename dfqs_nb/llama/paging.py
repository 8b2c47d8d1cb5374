"""Help for a file larger than memory: dense weights are locked, and a router's choice is read at once.

No result changes. How it works, numbers, and what did not pay: docs/paging.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfqs_nb.core.display import size
from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.machine import advise_read, available_memory, window_bytes
from dfqs_nb.gguf.header import padded
from dfqs_nb.gguf.placement import Layout
from dfqs_nb.gguf.shards import Files, ShardSet, open_shards
from dfqs_nb.llama.graph import Router, Watch, read
from dfqs_nb.llama.settings import OpenSettings, has_gpu_support

LINUX = sys.platform == "linux"
MCL_FUTURE, MCL_ONFAULT, CAP_IPC_LOCK = 2, 4, 14  # of Linux
FIRST_USERS = 0xEFFFFFFD  # inode of the system's own user namespace (PROC_USER_INIT_INO)
SPARE_SHARE = 0.05  # of memory that is never locked
WHOLE_SHARE = 0.7  # of a layer's experts chosen, from which on the kernel's own windows waste nothing


class Paging:
    """The help for one model, while it is open; ``pinned_bytes`` of its dense weights are locked."""

    def __init__(self, shards: ShardSet) -> None:
        self.paths, self.layout = shards.paths, Layout.of(shards.headers)
        self.pinned_bytes, self._parts = 0, list[str]()
        self._files, self._window, self._pins = list[int](), list[int](), list[np.ndarray]()
        self._watch: Watch | None = None

    @classmethod
    def of(cls, model: Files, settings: OpenSettings) -> Paging | None:
        """The help, if asked for, or if weights exceed the free memory; None where it cannot work."""
        copied = settings.use_extra_bufts or not settings.use_mmap  # not read from the mapped file
        if settings.paging == "off" or copied or not LINUX or (settings.n_gpu_layers and has_gpu_support()):
            return None
        shards = open_shards(model)
        fits = shards.nbytes <= available_memory().available_bytes
        return None if fits and settings.paging == "auto" else cls(shards)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Keep llama.cpp's ``MAP_POPULATE`` from reading it all: pages locked on fault are not populated."""
        libc = ctypes.CDLL(None)
        locked = may_lock() is None and libc.mlockall(MCL_FUTURE | MCL_ONFAULT) == 0
        if not locked:
            self._parts.append("opening reads the whole file once (run as root or `ulimit -l unlimited`)")
        try:
            yield
        finally:
            if locked:  # this also unlocks a model that is open already, which then runs as without help
                libc.munlockall()

    def callback(self, current: Any) -> dict[str, Any]:
        """The ``cb_eval`` to build the context with; that of a recorder (``current``) is shared."""
        watch = Watch.behind(current)
        others = watch is None and ctypes.cast(current, ctypes.c_void_p).value
        if others or not self.layout.experts:
            return {}
        self._watch = Watch() if watch is None else watch
        self._watch.listeners.append(self.chosen)
        self._parts.append("routers' choices are read at once")
        return {"cb_eval": self._watch.callback}

    def start(self, buffers: int) -> None:
        """After the load, lock dense weights as memory allows; llama.cpp will use ``buffers`` more bytes."""
        self._files = [os.open(path, os.O_RDONLY) for path in self.paths]
        self._window = [window_bytes(file) for file in self._files]
        memory, limit, total = available_memory(), may_lock(), self.layout.dense_bytes
        used = buffers + self.layout.token_bytes + round(SPARE_SHARE * memory.total_bytes)
        room = max(0, memory.available_bytes - used)
        room = room if limit is None else min(room, limit)
        lock = ctypes.CDLL(None).mlock
        lock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        for file, descriptor in enumerate(self._files):
            mapped = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)  # shares the page cache
            self._pins.append(np.frombuffer(mapped, np.uint8))
            base = self._pins[-1].ctypes.data
            for start, end in sorted((start, end) for at, start, end in self.layout.dense if at == file):
                low = start // mmap.PAGESIZE * mmap.PAGESIZE
                end = min(end, low + room // mmap.PAGESIZE * mmap.PAGESIZE)  # whole pages are locked
                if end > start:
                    advise_read(descriptor, low, end, self._window[file])  # a lock alone reads by windows
                    if lock(base + low, end - low):
                        room = 0  # nor is anything more read in vain
                    else:
                        room -= padded(end - low, mmap.PAGESIZE)
                        self.pinned_bytes += end - start
        locked = f"{size(self.pinned_bytes)} of {size(total)} of dense weights locked in memory"
        hint = " (raise `ulimit -l`, close other programs, or lower n_ctx)"
        parts = "; ".join([*self._parts, locked + hint * (self.pinned_bytes < 0.99 * total)])
        self.sentence = f"paging help is on ({parts}). paging='off' opens without it"

    def close(self) -> None:
        """Give back what is locked and open."""
        if self._watch is not None and self.chosen in self._watch.listeners:
            self._watch.listeners.remove(self.chosen)
        for file in self._files:
            os.close(file)
        self._pins, self._files = [], []

    def before(self, tokens: Sequence[int]) -> None:
        """Read the experts of the layers that route by token, before the tokens are evaluated."""
        if self._watch is None or not self._files:
            return
        if (error := self._watch._error) is not None:
            raise ModelError(f"the paging help failed ({error})", hint="open with paging='off'") from error
        for layer, (file, start, used) in self.layout.tables.items():
            places = [start + 4 * used * token for token in set(tokens)]
            rows = [os.pread(self._files[file], 4 * used, place) for place in places if place >= start]
            ids = np.unique(np.frombuffer(b"".join(rows), np.int32))
            # a token that llama.cpp will refuse reads past the table, and a table can hold anything
            n = max((part.n for part in self.layout.experts.get(layer, ())), default=0)
            self._read(layer, ids[(ids >= 0) & (ids < n)])

    def chosen(self, router: Router) -> None:
        """A router has chosen: read its experts."""
        # in the last layer of a batch that asks for no logits there are no tokens
        if self._files and router.ids.ne[1] and router.layer in self.layout.experts:
            self._read(router.layer, np.unique(read(ctypes.addressof(router.ids), np.int32)))

    def _read(self, layer: int, experts: np.ndarray) -> None:
        """Read these experts in the order of use; most of a layer is left to the kernel."""
        for part in self.layout.experts.get(layer, ()):
            for expert in experts.tolist() if len(experts) <= WHOLE_SHARE * part.n else ():
                start = part.start + expert * part.slice_bytes
                advise_read(self._files[part.file], start, start + part.slice_bytes, self._window[part.file])


def may_lock() -> int | None:
    """Bytes that this process may lock; None: no limit."""
    import resource

    status, users = Path("/proc/self/status").read_text(), Path("/proc/self/ns/user")
    capable = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    # in a rootless container, root has every capability, and the limit holds all the same
    own = users.exists() and users.stat().st_ino != FIRST_USERS
    if capable and int(capable[1], 16) >> CAP_IPC_LOCK & 1 and not own:
        return None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft
