"""ggml's tensors, seen through ctypes."""

from __future__ import annotations

import ctypes
from typing import Any


class Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h (llama-cpp-python 0.3.36)."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


NAME_OFFSET = Tensor.name.offset


def ggml_function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the libggml that llama.cpp runs on, found through libllama, which depends on it.

    It keeps Python's lock: one so short is not worth handing it over.
    """
    import llama_cpp.llama_cpp as api

    function = getattr(ctypes.PyDLL(api._lib._name), name)
    function.restype, function.argtypes = result, arguments
    return function
