"""Run llama.cpp's own server (from the package ``xllamacpp``) for a model.

The server is a child process (``python -m dfqs_nb.serve.servers``) on a free port of 127.0.0.1. It ends when
it is told to, and when the process that started it dies. Clients need its random key: without a key, any web
page open in a browser could ask it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import httpx2
from pydantic import SecretStr

from dfqs_nb.core import child
from dfqs_nb.gguf.shards import Files, open_shards
from dfqs_nb.llama.build import loaded_facts
from dfqs_nb.llama.settings import GGML_TYPES, OpenSettings
from dfqs_nb.serve.client import Endpoint, connect

HOST = "127.0.0.1"  # nothing listens beyond this machine
START_SECONDS, STOP_SECONDS, POLL_SECONDS = 300.0, 20.0, 0.05
LOAD_BYTES = 1 << 20  # of the log: the part in which the model is loaded
NO_ORIGIN = "null.invalid"  # a web page's origin that does not exist


@dataclass
class LocalServer(contextlib.AbstractContextManager["LocalServer", None]):
    """A running server; a ``with`` block stops it at its end."""

    model: str
    key: SecretStr  # which clients must send
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    port: int = 0
    version: str = ""  # of the package in the server's process

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    @property
    def base_url(self) -> str:
        """For clients of OpenAI's protocol, with ``/v1``."""
        return f"http://{HOST}:{self.port}/v1"

    @property
    def healthy(self) -> bool:
        """Whether its page ``/health`` answers, which needs no key."""
        with contextlib.suppress(httpx2.TransportError):
            return httpx2.get(f"http://{HOST}:{self.port}/health", timeout=10, trust_env=False).is_success
        return False

    @property
    def has_ended(self) -> bool:
        """Whether the process ended when it was asked to, and nothing listens on its port any more."""
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) != 0 and self.process.poll() in (0, -signal.SIGTERM)

    def connect(self, **options: Any) -> Endpoint:
        """An endpoint for this server; options as ``client.connect``."""
        key = self.key.get_secret_value()
        return connect(self.base_url, self.model, key=key, version=self.version, **options)

    def log_lines(self) -> list[str]:
        """The first MiB of the log, in which the model is loaded; the child shares the file's position."""
        return os.pread(self.log.fileno(), LOAD_BYTES, 0).decode("utf-8", "replace").splitlines()

    @cached_property
    def loaded(self) -> dict[str, Any]:
        """How llama.cpp loaded the model, from its own log: what ran, not what was asked for."""
        return {"version": self.version} | loaded_facts(self.log_lines())

    def stop(self, seconds: float = STOP_SECONDS) -> float:
        """Ask the server to end (SIGTERM), kill it if it does not; the seconds it took. Twice is fine."""
        started = time.perf_counter()
        if self.alive:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        child.end(self.process, grace_seconds=0)
        if not self.log.closed:
            _ = self.loaded  # from the log
            self.log.close()
        return time.perf_counter() - started


def start(
    model: Files, settings: OpenSettings, *, n_parallel: int = 1, log: str | Path | None = None
) -> LocalServer:
    """Start a server for this model; it ends with its ``with`` block, or with this process at the latest.

    ``settings``: how it opens the model; ``n_ctx`` is that of one request. ``n_parallel``: its slots, which
    is the number of requests that it works on at once. ``log``: the file for its log, replaced if it exists;
    by default a temporary one. A `ModelError` says how it died while it started; a note has the log's last
    lines.
    """
    path, key = open_shards(model).paths[0].absolute(), secrets.token_urlsafe(24)
    job = {"path": str(path), "name": path.stem, "n_parallel": n_parallel, "key": key}
    if log:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
    file: Any = Path(log).open("w+b") if log else tempfile.TemporaryFile()  # noqa: SIM115 (it stays open)
    process = child.start(__name__, job | {"settings": settings.as_dict()}, log=file, start_new_session=True)
    server = LocalServer(path.stem, SecretStr(key), process, file)
    assert process.stdout is not None
    try:
        with child.killed_after(START_SECONDS, process) as late:
            if line := process.stdout.readline():
                facts = json.loads(line)
                server.port, server.version = facts["port"], f"xllamacpp {facts['version']}"
                while server.alive and not server.healthy:
                    time.sleep(POLL_SECONDS)
            else:
                process.wait()
        if not server.alive:
            cause = "timeout" if late.is_set() else child.ending(process.returncode)
            raise child.died(cause, path, [], server.log_lines(), doing="while it started as a server")
    except BaseException:
        server.stop(0.5)
        raise
    return server


# ---- the child process ----


def _serve(job: dict[str, Any]) -> None:
    """llama.cpp's C++ server, which works in threads of its own."""
    import xllamacpp

    settings = OpenSettings(**job["settings"])
    params, flash = xllamacpp.CommonParams(), xllamacpp.llama_flash_attn_type
    params.model.path, params.model_alias = job["path"], {job["name"]}
    params.hostname, params.port = HOST, 0  # a free one
    params.n_parallel, params.n_ctx = job["n_parallel"], settings.n_ctx * job["n_parallel"]
    for name in ("n_batch", "n_ubatch", "n_gpu_layers", "swa_full"):
        setattr(params, name, getattr(settings, name))
    params.cpuparams.n_threads = settings.n_threads
    params.cpuparams_batch.n_threads = settings.n_threads_batch
    mode = f"LLAMA_LOAD_MODE_{'MMAP' if settings.use_mmap else 'NONE'}"
    params.load_mode = getattr(xllamacpp.llama_load_mode, mode)
    params.cache_type_k = xllamacpp.ggml_type(GGML_TYPES[settings.type_k])
    params.cache_type_v = xllamacpp.ggml_type(GGML_TYPES[settings.type_v])
    attention = f"LLAMA_FLASH_ATTN_TYPE_{'ENABLED' if settings.flash_attn else 'DISABLED'}"
    params.flash_attn_type = getattr(flash, attention)
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    params.no_extra_bufts = not settings.use_extra_bufts
    params.fit_params = params.ui = False  # what is asked for is what runs, and no web page
    params.n_threads_http = 64  # a connection holds one for seconds after its request; clients would wait
    params.verbosity = 4  # llama.cpp's own lines about the model, for `loaded`
    params.api_keys = [job["key"]]
    params.cors_origins = NO_ORIGIN  # no web page reads an answer
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    server = xllamacpp.Server(params)
    child.tell(port=int(server.listening_address.rpartition(":")[2]), version=version("xllamacpp"))
    stopped.wait()
    del server
    os._exit(0)  # it was told to stop: there is no other job, and a teardown of the runtime may crash


if __name__ == "__main__":
    child.serve(_serve)
