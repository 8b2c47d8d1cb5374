"""Placement, held against what llama.cpp itself plans for the same cards, and against its own `--fit`.

A card is llama.cpp's RPC device on the processor, which claims the memory that we give it: weights and caches lie as on a
graphics card, to the byte. Its compute buffers are the processor's, so those of a real card stay unknown here.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time

import pytest
from gguf_fixtures import real_size_header
from llama_cpp_tools import Unavailable, rpc_backend, tool
from llama_fit import ask, replay, words_of

from dfqs_nb.gguf import memory
from dfqs_nb.gguf.header import read_header

pytestmark = pytest.mark.slow
GB = 1 << 30
ALIGNMENT = 32  # of llama.cpp's buffers on a processor
CONTEXT = 32_768


@pytest.fixture(scope="module")
def programs():
    try:
        return tool("llama-fit"), rpc_backend()
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    return read_header(real_size_header(tmp_path_factory.mktemp("real") / "flash.gguf"))


@pytest.fixture
def cards(programs):
    """Start pretended cards of these sizes; gives the words that put them into a job."""
    program, backend = programs
    servers = []

    def start(sizes: list[int]) -> str:
        words = [f"load={backend}"]
        for nbytes in sizes:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
            environment = os.environ | {"LLAMA_FIT_CARD_BYTES": str(nbytes)}
            command = [str(program), "--serve", str(backend), endpoint]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            servers.append(subprocess.Popen(command, env=environment, **quiet))
            host, port = endpoint.split(":")
            until = time.monotonic() + 20
            while time.monotonic() < until:
                try:
                    socket.create_connection((host, int(port)), 1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            words.append(f"rpc={endpoint}")
        return " ".join(words)

    yield start
    for server in servers:
        server.kill()
        server.wait()


@pytest.mark.parametrize("sizes", [[24], [80], [24, 24], [24, 12], [8]])
def test_our_flags_give_the_bytes_that_llama_cpp_plans(flash, programs, cards, sizes):
    """Weights and cache of every card and of memory, for the flags that `plan` prints."""
    vram = [size * GB for size in sizes]
    placed = memory.place(memory.Sizes(flash), CONTEXT, 128 * GB, vram)
    [answer] = ask(programs[0], flash.path, [cards(vram), f"n_ctx={CONTEXT} {words_of(placed.flags)}"])
    theirs = answer["devices"]
    assert [row["total"] for row in theirs[:-1]] == vram, "the cards are those that we asked for"
    assert [row["model"] for row in theirs] == replay(flash, placed.flags, len(sizes), ALIGNMENT)
    assert [row["context"] for row in theirs] == [device.cache_bytes for device in placed.devices]
    for row, device in zip(theirs, placed.devices, strict=True):
        padding = row["model"] - device.dense_bytes - device.expert_bytes
        assert 0 <= padding < ALIGNMENT * len(flash.tensors)


@pytest.mark.parametrize("sizes", [[24], [48], [80], [24, 24]])
def test_fit_keeps_as_many_experts_in_memory(flash, programs, cards, sizes):
    """`--fit` splits a layer and leaves 1 GiB beside its compute buffer; we keep layers whole and 1 GiB for all."""
    vram = [size * GB for size in sizes]
    placed = memory.place(memory.Sizes(flash), CONTEXT, 128 * GB, vram)
    [answer] = ask(programs[0], flash.path, [cards(vram), f"n_ctx={CONTEXT} fit={vram[0]}"])
    assert answer["status"] == 0
    theirs = sorted(int(n) for pattern, _ in answer["ot"] for n in re.findall(r"blk\\\.(\d+)", pattern))
    on_cards = sum(row["model"] for row in answer["devices"][:-1])
    ours = sum(device.dense_bytes + device.expert_bytes for device in placed.devices[:-1])
    layer = max(memory.Sizes(flash).experts)
    compute = sum(row["compute"] for row in answer["devices"][:-1])
    assert abs(len(theirs) - len(placed.in_ram)) <= len(sizes), (theirs, placed.in_ram)
    assert on_cards - layer * len(sizes) <= ours <= on_cards + compute + layer * len(sizes)


OPEN = """if 1:
    import ctypes, sys
    import llama_cpp.llama_cpp as api
    from dfqs_nb.gguf.broken import reference_shards
    from dfqs_nb.llama.build import build_llama
    from dfqs_nb.llama.graph import ggml_function
    from dfqs_nb.llama.log import LOG
    from dfqs_nb.llama.settings import OpenSettings
    void, text = ctypes.c_void_p, ctypes.c_char_p
    reg = ggml_function("ggml_backend_load", void, text)(sys.argv[1].encode())
    add = ggml_function("ggml_backend_reg_get_proc_address", void, void, text)(reg, b"ggml_backend_rpc_add_server")
    ggml_function("ggml_backend_register", None, void)(ctypes.CFUNCTYPE(void, text)(add)(sys.argv[2].encode()))
    settings = OpenSettings(n_ctx=256, n_threads=1, n_gpu_layers=int(sys.argv[3]))
    build_llama(reference_shards().paths[0], settings).llama.close()
    print(sum("RPC" in line for line in LOG.tail()))
"""


@pytest.mark.parametrize(("n_gpu_layers", "is_used"), [(0, False), (-1, True)])
def test_without_layers_on_a_card_llama_cpp_does_not_touch_it(programs, cards, n_gpu_layers, is_used):
    """A llama.cpp built for a card would make a buffer there and compute large batches in it."""
    words = dict(word.split("=", 1) for word in cards([24 * GB]).split())
    command = [sys.executable, "-c", OPEN, words["load"], words["rpc"], str(n_gpu_layers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (int(done.stdout.splitlines()[-1]) > 0) == is_used
