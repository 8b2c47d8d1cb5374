"""llama.cpp's graph, seen through ctypes: its tensors, and a watch on its routers.

llama.cpp asks a callback (``cb_eval``) about every node of its graph, and stops behind those that it wants: a
layer's ``ffn_moe_topk`` (of ``build_moe_ffn`` in llama.cpp's src/llama-graph.cpp).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_TOPK = b"ffn_moe_topk-"


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
    ggml_function("ggml_backend_tensor_get", None, void, void, number, number)(
        address, raw.ctypes.data, 0, raw.nbytes
    )
    return np.lib.stride_tricks.as_strided(raw.view(kind), tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1])


class Router:
    """One layer's router: the node with the ids that it chose, and what must lie where for it to hold."""

    def __init__(self, address: int) -> None:
        self.ids, self.stopped = Tensor.from_address(address), False
        self.layer = int(self.ids.name.rsplit(b"-", 1)[1])
        self.marks = [(self.ids, self.ids.name)]


_watches: weakref.WeakValueDictionary[Any, Watch] = weakref.WeakValueDictionary()


class Watch(dict[int, bool]):
    """Receives every node that llama.cpp evaluates, and calls ``listeners`` when a router has chosen.

    In decode the same graph comes again at the same addresses. So it holds the addresses of nodes that it
    need not stop at: to read all names would take longer than the model. At a graph's first node the names
    that matter are checked; another graph is learned afresh. No exception may pass through llama.cpp: it is
    kept in ``_error``. A subclass has its say at a router and at a graph's begin.
    """

    def __init__(self) -> None:
        import llama_cpp.llama_cpp as api

        self.listeners: list[Callable[[Router], object]] = []
        self._error: BaseException | None = None
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
                if not router.stopped:
                    self._chosen(router)
            elif self._first not in (0, address):  # met for the first time
                if ctypes.string_at(address + Tensor.name.offset, len(_TOPK)) == _TOPK:
                    router = self._routers[address] = self._router(address)
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
            self._error = error
        return router is not None

    def _router(self, address: int) -> Router:
        return Router(address)

    def _begun(self, address: int) -> None: ...

    def _chosen(self, router: Router) -> None:
        for listener in self.listeners:
            listener(router)
