"""``rpc_servers``: refused where the build has no RPC; and the reference model split over two servers on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import llama_cpp.llama_cpp as api
import llama_cpp_tools
import pytest
from test_routing_remote import free_port, wait_for

from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama.settings import OpenSettings

HERE = Path(__file__).resolve().parents[1] / "support"


def test_the_setting_is_checked_and_a_condition_only_where_it_is_set():
    assert "rpc_servers" not in OpenSettings().as_dict()
    given = OpenSettings(n_gpu_layers=-1, rpc_servers="a:1, b:2")
    assert (
        given.as_dict()["rpc_servers"]
        == ("a:1", "b:2")
        == OpenSettings(n_gpu_layers=2, rpc_servers=["a:1", "b:2"]).rpc_servers
    )
    with pytest.raises(ModelError, match="no layers"):
        OpenSettings(rpc_servers="a:1")
    for wrong in ("a", "a:b", "http://a:1", "a:1;b:2"):
        with pytest.raises(ModelError, match="not an RPC server"):
            OpenSettings(n_gpu_layers=-1, rpc_servers=wrong)


@pytest.mark.skipif(api.llama_supports_rpc(), reason="this build has RPC")
def test_a_build_without_rpc_says_how_to_get_it(merged_reference):
    with pytest.raises(ModelError, match="built without RPC"):
        llama_model.open_model(
            merged_reference, OpenSettings(n_ctx=256, n_gpu_layers=-1, rpc_servers="127.0.0.1:1")
        )


@pytest.mark.slow
def test_a_model_split_over_two_servers_gives_the_same_greedy_tokens(merged_reference):
    try:
        libraries, server = llama_cpp_tools.with_rpc()
    except llama_cpp_tools.Unavailable as why:
        pytest.skip(str(why))
    addresses = []
    with ExitStack() as stack:
        for _ in range(2):
            port = free_port()
            process = stack.enter_context(
                subprocess.Popen(
                    [server, "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            stack.callback(process.kill)
            wait_for(port, process)
            addresses.append(f"127.0.0.1:{port}")
        done = subprocess.run(
            [sys.executable, HERE / "greedy_remote.py", merged_reference, ",".join(addresses)],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            cwd=HERE.parents[1],
            env={**os.environ, "LLAMA_CPP_LIB_PATH": str(libraries), "PYTHONPATH": str(HERE.parents[1])},
        )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["here"]["tokens"] == found["there"]["tokens"]
    assert all(len(tokens) > 1 for tokens in found["here"]["tokens"])
    for address in addresses:
        assert any(address in line for line in found["there"]["buffers"]), found["there"]["buffers"]
    assert found["there"]["conditions"]["rpc_servers"] == addresses and not found["here"]["buffers"]
    assert "no RPC server answers at 127.0.0.1:1" in found["refused"]
