"""Help for a file larger than memory: read what a token needs before it is asked for, and nothing else.

The kernel reads a whole window around each missing page, and evicts weights that every token needs to make
room for it. Here the dense weights are locked into memory, and each router's choice is read as soon as it is
known. No result changes. How it works, numbers, and what did not pay: docs/paging.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfqs_nb.core.bandwidth import advise_read, window_bytes
from dfqs_nb.core.display import size
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.machine import available_memory
from dfqs_nb.gguf.placement import Layout
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.llama.graph import Router, Watch, ggml_function
from dfqs_nb.llama.settings import OpenSettings, has_gpu_support

LINUX = sys.platform == "linux"
PAGE = 4096
MCL_FUTURE, MCL_ONFAULT, MAP_FAILED = 2, 4, -1  # of Linux
CAP_IPC_LOCK = 14
FIRST_USERS = 0xEFFFFFFD  # inode of the system's own user namespace (PROC_USER_INIT_INO)
SPARE_SHARE = 0.05  # of memory that is never locked
WHOLE_SHARE = 0.7  # of a layer's experts chosen, from which on the kernel's own windows waste nothing


class Paging:
    """The help for one model, while it is open.

    ``parts``: what is on, for people. ``lost``: a sentence for each part that the system does not allow, with
    how to allow it. ``pinned_bytes``: of dense weights locked into memory.
    """

    def __init__(self, shards: ShardSet, settings: OpenSettings) -> None:
        self.paths, self.n_gpu_layers = shards.paths, settings.n_gpu_layers if has_gpu_support() else 0
        self.layout = Layout.of(shards.headers, self.n_gpu_layers)
        self._mapped = not (settings.use_extra_bufts or self.n_gpu_layers)  # not copied while it is read
        self.parts, self.lost, self.pinned_bytes = list[str](), list[str](), 0
        self._files, self._window = list[int](), list[int]()
        self._pins, self._locked = list[tuple[int, int]](), list[tuple[int, int]]()
        self._watch: Watch | None = None
        void, number = ctypes.c_void_p, ctypes.c_size_t
        self._copy = ggml_function("ggml_backend_tensor_get", None, void, void, number, number)

    @property
    def sentence(self) -> str:
        """What is on and what is lost, for people."""
        if not self.parts:
            return f"paging help is off: {'; '.join(self.lost)}"
        lost = "".join(f"; without: {text}" for text in self.lost)
        return f"paging help is on ({'; '.join(self.parts)}){lost}. paging='off' opens without it"

    # ---- around the load ----

    @classmethod
    def of(cls, path: str | Path, settings: OpenSettings) -> Paging | None:
        """The help for a model to be loaded, if asked for, or if its weights exceed the free memory."""
        on_card = settings.n_gpu_layers == -1 and has_gpu_support()
        if settings.paging == "off" or not settings.use_mmap or on_card:
            return None
        try:
            shards = open_shards(path)
        except DfqsError:
            return None  # llama.cpp tells what is wrong with it
        fits = shards.nbytes <= available_memory().available_bytes
        return None if fits and settings.paging == "auto" else cls(shards, settings)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Keep llama.cpp's ``MAP_POPULATE`` from reading it all: pages locked on fault are not populated."""
        # weights that are copied to a card, or repacked, would all be locked while they are read
        may = LINUX and self._mapped and may_lock() is None
        locked = may and _libc("mlockall", MCL_FUTURE | MCL_ONFAULT) == 0
        if self._mapped and not locked:
            self.lost.append("opening reads the whole file once (run as root, or with `ulimit -l unlimited`)")
        try:
            yield
        finally:
            if locked:
                _libc("munlockall")
                for address, length in (place for other in _started for place in other._locked):
                    _libc("mlock", address, length)  # of models that are open already

    def callback(self, current: Any) -> dict[str, Any]:
        """The ``cb_eval`` to build the context with; that of a recorder (``current``) is shared."""
        if not self.layout.experts or not LINUX:
            return {}
        watch = Watch.behind(current)
        others = watch is None and ctypes.cast(current, ctypes.c_void_p).value
        if others or self.n_gpu_layers:
            why = "another callback listens to the graph" if others else "a stop at each router slows the GPU"
            self.lost.append(f"experts are read when they are needed: {why}")
            return {}
        self._watch = watch or Watch()
        self._watch.listeners.append(self.chosen)
        self.parts.append("routers' choices are read at once")
        return {"cb_eval": self._watch.callback}

    def start(self, buffers: int) -> None:
        """After the load, lock the dense weights, and leave room for so many bytes of llama.cpp's buffers."""
        if not LINUX:
            self.lost = [f"{sys.platform} is not Linux"]
            return
        _started.add(self)
        self._files = [os.open(path, os.O_RDONLY) for path in self.paths]
        self._window = [window_bytes(file) for file in self._files]
        memory = available_memory()
        room = memory.available_bytes - buffers - round(SPARE_SHARE * memory.total_bytes)
        self._pin(room - self.layout.token_bytes)

    def close(self) -> None:
        """Give back what is locked and open."""
        if self._watch is not None and self.chosen in self._watch.listeners:
            self._watch.listeners.remove(self.chosen)
        for address, length in self._pins:
            _libc("munmap", address, length)
        for file in self._files:
            os.close(file)
        self._pins, self._locked, self._files = [], [], []

    def _pin(self, budget: int) -> None:
        """Lock dense weights, from the first on, as far as the budget and the system allow."""
        limit, total = may_lock(), self.layout.dense_bytes
        room = max(0, budget if limit is None else min(budget, limit))
        for file, descriptor in enumerate(self._files):
            length = os.fstat(descriptor).st_size
            base = _libc("mmap", 0, length, 1, 1, descriptor, 0)  # PROT_READ, MAP_SHARED
            if base == MAP_FAILED:
                continue
            self._pins.append((base, length))
            for start, end in sorted((start, end) for at, start, end in self.layout.dense if at == file):
                low, end = start // PAGE * PAGE, min(end, start + room - self.pinned_bytes)
                if end > start:
                    advise_read(descriptor, low, end, self._window[file])  # a lock alone reads by windows
                    if _libc("mlock", base + low, end - low) == 0:
                        self._locked.append((base + low, end - low))
                        self.pinned_bytes += end - start
        self.parts.append(f"{size(self.pinned_bytes)} of {size(total)} of dense weights locked in memory")
        if self.pinned_bytes < 0.99 * total:
            why = "close other programs, or lower n_ctx"
            if limit is not None and limit == room:
                why = f"`ulimit -l` allows {size(limit)}: raise it"
            self.lost.append(f"{size(total - self.pinned_bytes)} of dense weights may be read again ({why})")

    # ---- while tokens are evaluated ----

    def before(self, tokens: Sequence[int]) -> None:
        """Read the experts of the layers that route by token, before the tokens are evaluated."""
        if self._watch is None or not self._files:
            return
        if (error := self._watch._error) is not None:
            what = f"the paging help failed ({error})"
            raise ModelError(what, hint="open the model with paging='off'") from error
        for layer, (file, start, used) in self.layout.tables.items():
            places = [start + 4 * used * token for token in set(tokens)]
            rows = [os.pread(self._files[file], 4 * used, place) for place in places if place >= start]
            ids = np.unique(np.frombuffer(b"".join(rows), np.int32))
            # a token that llama.cpp will refuse reads past the table, and a table can hold anything
            n = max((part.n for part in self.layout.experts.get(layer, ())), default=0)
            self._read(layer, ids[(ids >= 0) & (ids < n)])

    def chosen(self, router: Router) -> None:
        """A router has chosen: read its experts."""
        ids, n = router.ids, router.ids.shape[1]
        if not self._files or not n or router.layer not in self.layout.experts:
            return  # n is 0 in the last layer of a batch that asks for no logits
        step = ids.row_bytes if n == 1 else ids.steps[1]
        nbytes = (n - 1) * step + ids.row_bytes
        raw = np.zeros(-(-n * step // 4), np.int32)
        self._copy(ids.address, raw.ctypes.data, 0, nbytes)
        rows = raw[: n * step // 4].reshape(n, -1)[:, : ids.shape[0]]
        self._read(router.layer, np.unique(rows))

    def _read(self, layer: int, experts: np.ndarray) -> None:
        """Read these experts in the order of use; most of a layer is left to the kernel."""
        parts = self.layout.experts.get(layer, ())
        if not parts or not len(experts) or len(experts) > WHOLE_SHARE * parts[0].n:
            return
        cuts = np.flatnonzero(np.diff(experts) != 1) + 1
        groups = [(int(group[0]), int(group[-1]) + 1) for group in np.split(experts, cuts)]
        for part in parts:
            for first, last in groups:
                start, end = part.start + first * part.slice_bytes, part.start + last * part.slice_bytes
                advise_read(self._files[part.file], start, end, self._window[part.file])


_started: weakref.WeakSet[Paging] = weakref.WeakSet()


# ---- what the system allows, and where things are ----


def may_lock() -> int | None:
    """Bytes that this process may lock; None: no limit.

    The root of a user namespace (rootless containers) has every capability, and the limit holds all the same.
    """
    import resource

    status, users = Path("/proc/self/status").read_text(), Path("/proc/self/ns/user")
    capable = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    own = users.exists() and users.stat().st_ino != FIRST_USERS
    if capable and int(capable[1], 16) >> CAP_IPC_LOCK & 1 and not own:
        return None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _libc(name: str, *arguments: int) -> int:
    """Call a function of the C library; its result."""
    function, number, wide = getattr(ctypes.CDLL(None), name), ctypes.c_int, ctypes.c_size_t
    function.restype = ctypes.c_ssize_t if name == "mmap" else number
    function.argtypes = [wide if at < 2 or name == "mmap" else number for at in range(len(arguments))]
    result: int = function(*arguments)
    return result
