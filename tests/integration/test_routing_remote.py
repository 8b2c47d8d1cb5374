"""The recorder on devices whose buffers are not in this process's memory: two RPC servers on loopback.

A GPU is the same case for the recorder (it asks the backend for every byte), and needs hardware; this does not.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import llama_cpp_tools
import pytest

HERE = Path(__file__).resolve().parents[1] / "support"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(200):
        assert process.poll() is None, "the RPC server ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the RPC server does not listen")


@pytest.fixture(scope="module")
def build():
    try:
        return llama_cpp_tools.with_rpc()
    except llama_cpp_tools.Unavailable as why:
        pytest.skip(str(why))


@pytest.mark.slow
def test_choices_on_two_remote_devices_are_those_on_the_cpu(build, merged_reference):
    libraries, server = build
    endpoints = []
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
            endpoints.append(f"127.0.0.1:{port}")
        done = subprocess.run(
            [sys.executable, HERE / "record_remote.py", merged_reference, *endpoints],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=HERE.parents[1],
            env={**os.environ, "LLAMA_CPP_LIB_PATH": str(libraries), "PYTHONPATH": str(HERE.parents[1])},
        )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["remote"] == found["tensors_read"] == found["read_on_the_cpu"] > 0
    assert found["same"] == found["choices"] == 200 * 4
    assert found["logit_drift"] < 1e-3
