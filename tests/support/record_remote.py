"""Record the routing of a model on the CPU and on RPC devices, and print how they compare, as JSON.

    LLAMA_CPP_LIB_PATH=BUILD_WITH_RPC python tests/support/record_remote.py MODEL HOST:PORT [HOST:PORT ...]

A process of its own: which build of llama.cpp is loaded is decided when ``llama_cpp`` is imported.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp.llama_cpp as api
import numpy as np

from dfqs_nb import routing
from dfqs_nb.llama.settings import OpenSettings

N_PREFILL, N_DECODE = 150, 50
BUFFER = 8  # offset of ggml_tensor.buffer


def function(name: str, result, *arguments):
    found = getattr(api._lib, name)
    found.restype, found.argtypes = result, arguments
    return found


def add_servers(endpoints: list[str]) -> None:
    void, text = ctypes.c_void_p, ctypes.c_char_p
    rpc = function("ggml_backend_reg_by_name", void, text)(b"RPC")
    address = function("ggml_backend_reg_get_proc_address", void, void, text)(
        rpc, b"ggml_backend_rpc_add_server"
    )
    add, register = ctypes.CFUNCTYPE(void, text)(address), function("ggml_backend_register", None, void)
    for endpoint in endpoints:
        register(add(endpoint.encode()))


def record(path: str, n_gpu_layers: int) -> tuple[dict, np.ndarray, int, int]:
    """The trace's arrays, the last logits, and how many tensors were read: in all, and outside this memory."""
    is_host = function("ggml_backend_buffer_is_host", ctypes.c_bool, ctypes.c_void_p)
    settings = OpenSettings(n_ctx=512, n_threads=1, n_gpu_layers=n_gpu_layers)
    with routing.open_recorded(path, settings) as opened:
        reads, copy = [], opened.recorder._copy

        def counted(tensor, *rest):
            reads.append(is_host(ctypes.c_void_p.from_address(tensor + BUFFER)))
            copy(tensor, *rest)

        opened.recorder._copy = counted
        tokens = np.random.default_rng(0).integers(0, opened.model.n_vocab, N_PREFILL + N_DECODE).tolist()
        opened.feed(tokens[:N_PREFILL])
        for token in tokens[N_PREFILL:]:
            logits = opened.feed([token]).copy()
        return opened.recorder.arrays(), logits, len(reads), reads.count(False)


def main() -> int:
    path, *endpoints = sys.argv[1:]
    here, logits, n_here, outside = record(path, 0)
    if outside:
        raise SystemExit("the run on the CPU read tensors that are not in memory")
    add_servers(endpoints)
    there, remote_logits, n_there, n_remote = record(path, -1)
    same = (np.sort(here["experts"], -1) == np.sort(there["experts"], -1)).all(-1)
    print(
        json.dumps(
            {
                "choices": int(same.size),
                "same": int(same.sum()),
                "tensors_read": n_there,
                "remote": n_remote,
                "read_on_the_cpu": n_here,
                "margin_drift": float(np.nanmax(np.abs(here["margin"] - there["margin"]))),
                "logit_drift": float(np.abs(logits - remote_logits).max()),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
