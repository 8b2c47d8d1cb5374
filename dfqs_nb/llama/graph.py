"""llama.cpp's graph, seen through ctypes: its tensors, a watch on its routers, and the help for a large file.

llama.cpp asks a callback (``cb_eval``) about every node of its graph, and stops behind those that it wants: a
layer's ``ffn_moe_topk`` (of ``build_moe_ffn`` in llama.cpp's src/llama-graph.cpp). How the help works, its
numbers, and what did not pay: docs/paging.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import re
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfqs_nb.core.display import size
from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.machine import advise_read, available_memory, window_bytes
from dfqs_nb.gguf.header import padded
from dfqs_nb.gguf.memory import Layout
from dfqs_nb.gguf.shards import Files, ShardSet, open_shards
from dfqs_nb.llama.settings import OpenSettings, has_gpu_support

_TOPK = b"ffn_moe_topk-"
LINUX = sys.platform == "linux"
MCL_FUTURE, MCL_ONFAULT, CAP_IPC_LOCK = 2, 4, 14  # of Linux
FIRST_USERS = 0xEFFFFFFD  # inode of the system's own user namespace (PROC_USER_INIT_INO)
SPARE_SHARE = 0.05  # of memory that is never locked
WHOLE_SHARE = 0.7  # of a layer's experts chosen, from which on the kernel's own windows waste nothing


class Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h (llama-cpp-python 0.3.36)."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 17),  # and flags
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p * 3),  # and view_offs, data
        ("name", ctypes.c_char * 64),
    ]


@functools.cache
def ggml_function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of llama.cpp's libraries that keeps Python's lock, as a short one may."""
    import llama_cpp.llama_cpp as api

    function = getattr(ctypes.PyDLL(api._lib._name), name)  # libllama, which depends on libggml
    function.restype, function.argtypes = result, arguments
    return function


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while llama.cpp computes: raised in a callback, it ends the graph early."""
    handler, held = signal.getsignal(signal.SIGINT), list[Any]()
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # no exception can come of it here
        return
    signal.signal(signal.SIGINT, lambda *facts: held.append(facts))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])


def read(address: int, kind: type) -> np.ndarray:
    """A tensor's elements, the slowest dimension first, whichever its device and strides."""
    void, number, tensor = ctypes.c_void_p, ctypes.c_size_t, Tensor.from_address(address)
    raw = np.empty(ggml_function("ggml_nbytes", number, void)(address), np.uint8)
    get = ggml_function("ggml_backend_tensor_get", None, void, void, number, number)
    get(address, raw.ctypes.data, 0, raw.nbytes)
    return np.lib.stride_tricks.as_strided(raw.view(kind), tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1])


class Router:
    """One layer's router: the ids that it chose, the tensors to ``read`` for them, and all tensors' names."""

    def __init__(self, address: int) -> None:
        self.ids, self.stopped = Tensor.from_address(address), False
        self.layer = int(self.ids.name.rsplit(b"-", 1)[1])
        source = Tensor.from_address(self.ids.src[0])
        self.hashed = not source.name.startswith(b"ffn_moe_argsort")
        # scored ids are a view of the sorted experts, with gaps: whole rows of these and of scores have none
        self.reads = [self.ids] if self.hashed else [source, Tensor.from_address(source.src[0])]
        self.marks = [(tensor, tensor.name) for tensor in (self.ids, *self.reads)]


_watches: weakref.WeakValueDictionary[Any, Watch] = weakref.WeakValueDictionary()


class Watch(dict[int, bool]):
    """Receives every node that llama.cpp evaluates, and calls ``listeners`` when a router has chosen."""

    # llama.cpp calls ``dict.__getitem__`` with a node's address: of a known node that is False, without a
    # line of Python, which runs only in ``__missing__``. To read all names would take longer than the model.
    # In decode the same graph comes again at the same addresses. At a graph's first node the names that
    # matter are checked; another graph is learned afresh. No exception may pass through llama.cpp: it is kept
    # in ``error``. A subclass has its say at a graph's begin.
    def __init__(self) -> None:
        import llama_cpp.llama_cpp as api

        self.listeners: list[Callable[[Router], object]] = []
        self.error: BaseException | None = None
        # llama.cpp also passes whether it asks or has computed, and user data. A node that we stop at comes
        # exactly twice, so we leave both out: the call is cheaper
        self._function = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(self.__getitem__)
        self.callback = ctypes.cast(self._function, api.ggml_backend_sched_eval_callback)
        self.forget_graph()
        _watches[ctypes.cast(self.callback, ctypes.c_void_p).value] = self

    @staticmethod
    def behind(callback: Any) -> Watch | None:
        """The watch that a context's ``cb_eval`` belongs to; None where it is no watch's."""
        return _watches.get(ctypes.cast(callback, ctypes.c_void_p).value)

    def forget_graph(self) -> None:
        """Forget the known addresses: the context that they lie in is gone."""
        self.clear()
        self._routers: dict[int, Router] = {}
        self._first = 0  # the address of a graph's first node

    def __missing__(self, address: int) -> bool:
        """A router's node, the first node of a graph, or a node that is met for the first time."""
        router = self._routers.get(address)
        try:
            if router is not None:  # first llama.cpp asks whether to stop behind it, then it has stopped
                router.stopped = not router.stopped
                for listener in () if router.stopped else self.listeners:
                    listener(router)
            elif self._first not in (0, address):  # met for the first time
                if ctypes.string_at(address + Tensor.name.offset, len(_TOPK)) == _TOPK:
                    router = self._routers[address] = Router(address)
                    router.stopped = True
                else:
                    self[address] = False
            else:
                marks = (mark for known in self._routers.values() for mark in known.marks)
                if not all(tensor.name == name for tensor, name in marks):
                    self.forget_graph()  # it is another graph, at the place of the one before
                self._first = address
                self._begun(address)
        except Exception as error:
            self.error = error
        return router is not None

    def _begun(self, address: int) -> None: ...


class Paging:
    """Help for a file larger than memory: no result changes. It locks ``pinned_bytes`` of dense weights."""

    def __init__(self, shards: ShardSet) -> None:
        self.paths, self.layout = shards.paths, Layout.of(shards.headers)
        self.pinned_bytes, self._parts = 0, list[str]()
        self._files, self._window, self._pins = list[int](), list[int](), list[np.ndarray]()
        self._watch: Watch | None = None

    @staticmethod
    def unhelped(model: Files, settings: OpenSettings) -> str:
        """Why there is no help; empty: it can work, and is asked for, or weights exceed the free memory."""
        if settings.paging == "off":
            return "off: you set it"
        if settings.paging == "auto" and open_shards(model).nbytes <= available_memory().available_bytes:
            return "off: the model fits in memory"
        copied = settings.use_extra_bufts or not settings.use_mmap  # not read from the mapped file
        impossible = copied or not LINUX or (settings.n_gpu_layers and has_gpu_support())
        return "off: not possible on this system with these settings" if impossible else ""

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
        if (watch is None and ctypes.cast(current, ctypes.c_void_p).value) or not self.layout.experts:
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
        for file, descriptor in enumerate(self._files):
            mapped = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)  # shares the page cache
            self._pins.append(np.frombuffer(mapped, np.uint8))
            base = self._pins[-1].ctypes.data
            for start, end in sorted((start, end) for at, start, end in self.layout.dense if at == file):
                low = start // mmap.PAGESIZE * mmap.PAGESIZE
                end = min(end, low + room // mmap.PAGESIZE * mmap.PAGESIZE)  # whole pages are locked
                if end > start:
                    advise_read(descriptor, low, end, self._window[file])  # a lock alone reads by windows
                    if lock(ctypes.c_void_p(base + low), ctypes.c_size_t(end - low)):
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
        if (error := self._watch.error) is not None:
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
