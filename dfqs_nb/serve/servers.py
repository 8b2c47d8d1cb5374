"""Run a local server for a model: llama-cpp-python's own, or llama.cpp's own (from ``xllamacpp``).

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
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import httpx2
from pydantic import SecretStr

from dfqs_nb.core import child
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.build import loaded_facts
from dfqs_nb.llama.settings import GGML_TYPES, OpenSettings
from dfqs_nb.serve.client import Endpoint, connect
from dfqs_nb.serve.wire import EndpointError

KINDS = {"llama-cpp-python": "llama-cpp-python", "llama.cpp": "xllamacpp"}  # kind: the package that brings it
HOST = "127.0.0.1"  # nothing listens beyond this machine
START_SECONDS, STOP_SECONDS, POLL_SECONDS = 300.0, 20.0, 0.05
LOAD_BYTES = 1 << 20  # of the log: the part in which the model is loaded
NO_ORIGIN = "null.invalid"  # a web page's origin that does not exist


@dataclass(repr=False)
class LocalServer(contextlib.AbstractContextManager["LocalServer", None]):
    """A running server; a ``with`` block stops it at its end."""

    kind: str
    model: str
    settings: OpenSettings
    key: SecretStr  # which clients must send
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    log_start: int  # where this run's part of the log begins
    port: int = 0
    version: str = ""  # of the package in the server's process
    start_seconds: float = 0.0

    def __repr__(self) -> str:
        state = "running" if self.alive else "stopped"
        return f"LocalServer({self.kind}, {self.version}, {self.model}, {self.base_url}, {state})"

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
        """Whether it answers: ``/health`` of llama.cpp's, the list of models of the other."""
        path = "health" if self.kind == "llama.cpp" else "v1/models"
        with contextlib.suppress(httpx2.TransportError):
            answer = httpx2.get(f"http://{HOST}:{self.port}/{path}", timeout=10, trust_env=False)
            return answer.status_code in (200, 401)  # 401: it lives, and wants a key
        return False

    @property
    def port_is_free(self) -> bool:
        """Whether nothing listens there any more."""
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) != 0

    def connect(self, **options: Any) -> Endpoint:
        """An endpoint for this server; options as ``client.connect``."""
        known = {"key": self.key.get_secret_value(), "version": self.version}
        endpoint = connect(self.base_url, self.model, **(known | options))
        return replace(endpoint, n_ctx=endpoint.n_ctx or self.settings.n_ctx)

    def log_lines(self) -> list[str]:
        """The first MiB of this run's log, in which the model is loaded."""
        raw = os.pread(self.log.fileno(), LOAD_BYTES, self.log_start)
        return raw.decode("utf-8", "replace").splitlines()

    @cached_property
    def loaded(self) -> dict[str, Any]:
        """How llama.cpp loaded the model, from its own log: what ran, not what was asked for."""
        facts = loaded_facts(self.log_lines())
        return {"version": self.version} | {n: facts[n] for n in ("layers_offloaded", "buffers", "repacked")}

    def stop(self, seconds: float = STOP_SECONDS) -> float:
        """Ask the server to end (SIGTERM), kill it if it does not; the seconds it took. Twice is fine."""
        started = time.perf_counter()
        if self.alive:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        child.end(self.process, grace_seconds=0)
        return time.perf_counter() - started


def start(
    kind: str,
    path: str | Path,
    settings: OpenSettings | None = None,
    *,
    n_parallel: int = 1,
    log: str | Path | None = None,
) -> LocalServer:
    """Start a server for this model; it ends with its ``with`` block, or with this process at the latest.

    Args:
        kind: of `KINDS`.
        path: the GGUF file, or one of its shards.
        settings: how it opens the model; ``n_ctx`` is that of one request.
        n_parallel: requests at once: slots of llama.cpp's server; the other has one.
        log: the file to whose end it writes; by default a temporary one.

    A `ModelError` says how it died while it started; a note has the log's last lines.
    """
    settings, began = settings or OpenSettings(), time.perf_counter()
    if kind not in KINDS:
        raise EndpointError(f"no kind of server is called {kind!r}", hint=f"there are {', '.join(KINDS)}")
    model, key = Path(open_shards(path).paths[0]).absolute(), secrets.token_urlsafe(24)
    job = {"kind": kind, "path": str(model), "name": model.stem, "n_parallel": n_parallel, "key": key}
    if log:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
    file: Any = Path(log).open("a+b") if log else tempfile.TemporaryFile("a+b")  # noqa: SIM115 (it stays open)
    log_start = os.fstat(file.fileno()).st_size
    process = child.start(__name__, job | {"settings": settings.as_dict()}, log=file, start_new_session=True)
    server = LocalServer(kind, model.stem, settings, SecretStr(key), process, file, log_start)
    assert process.stdout is not None
    try:
        with child.killed_after(START_SECONDS, process) as late:
            if line := process.stdout.readline():
                facts = json.loads(line)
                server.port, server.version = facts["port"], f"{KINDS[kind]} {facts['version']}"
                while server.alive and not server.healthy:
                    time.sleep(POLL_SECONDS)
            else:
                process.wait()
        if not server.alive:
            cause = "timeout" if late.is_set() else child.ending(process.returncode)
            raise child.died(cause, model, [], server.log_lines(), doing="while it started as a server")
    except BaseException:
        server.stop(0.5)
        raise
    server.start_seconds = time.perf_counter() - began
    return server


# ---- the child process ----


def _serve_llama_cpp(job: dict[str, Any], settings: OpenSettings) -> None:
    """llama.cpp's C++ server, which works in threads of its own."""
    import xllamacpp

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
    params.verbosity = 4  # llama.cpp's own lines about the model, for `loaded`
    params.api_keys = [job["key"]]
    params.cors_origins = NO_ORIGIN  # no web page reads an answer
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    server = xllamacpp.Server(params)
    child.tell(port=int(server.listening_address.rpartition(":")[2]), version=version("xllamacpp"))
    stopped.wait()
    del server


def _serve_llama_cpp_python(job: dict[str, Any], settings: OpenSettings) -> None:
    """llama-cpp-python's server, with the same parameters as a model in this process.

    By default it ends an answer when another request comes, and lets web pages read it: not here.
    """
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings
    from starlette.middleware.cors import CORSMiddleware

    from dfqs_nb.llama.build import default_params, model_params

    names = ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "n_gpu_layers", "flash_attn")
    model = ModelSettings(
        model=job["path"],
        model_alias=job["name"],
        logits_all=False,
        verbose=True,  # into the log, for `loaded`
        type_k=GGML_TYPES[settings.type_k],
        type_v=GGML_TYPES[settings.type_v],
        **{name: getattr(settings, name) for name in (*names, "use_mmap", "seed")},
    )
    options = ServerSettings(interrupt_requests=False, api_key=job["key"])
    with default_params(model_params(settings), swa_full=settings.swa_full):
        app = create_app(server_settings=options, model_settings=[model])
    app.user_middleware = [layer for layer in app.user_middleware if layer.cls is not CORSMiddleware]
    server = uvicorn.Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=2))
    listener = socket.create_server((HOST, 0), backlog=128)
    child.tell(port=listener.getsockname()[1], version=version("llama-cpp-python"))
    server.run(sockets=[listener])


def _serve(job: dict[str, Any]) -> None:
    run = _serve_llama_cpp if job["kind"] == "llama.cpp" else _serve_llama_cpp_python
    run(job, OpenSettings(**job["settings"]))
    os._exit(0)  # it was told to stop: there is no other job, and a teardown of the runtime may crash


if __name__ == "__main__":
    child.serve(_serve)
