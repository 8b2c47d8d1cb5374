"""Run a local server for a model: llama-cpp-python's own, or llama.cpp's own (from ``xllamacpp``).

The server is a child process that binds a free port of this machine's loopback itself and reports which. It
ends when it is told to, and also when the process that started it dies. Clients need its key, which is made
for it unless an environment variable has one: without a key, any web page open in a browser could ask it.
``python -m dfqs_nb.serve.servers`` is that child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from pydantic import SecretStr

from dfqs_nb.core import child
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.settings import GGML_TYPES, OpenSettings
from dfqs_nb.serve.client import Endpoint, connect
from dfqs_nb.serve.wire import is_loopback

KINDS = {"llama-cpp-python": "llama-cpp-python", "llama.cpp": "xllamacpp"}  # kind: the package that brings it
START_SECONDS = 300.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.05
LOG_LINES = 15
LOAD_VERBOSITY = 4
LOAD_BYTES = 1 << 20  # of the log, in which the model is loaded
NO_ORIGIN = "null.invalid"  # a web page's origin that does not exist


class ServerError(DfqsError):
    """A local server does not start, or does not stay."""


@dataclass(repr=False)
class LocalServer:
    """A server that runs; in a ``with`` block it is stopped at the end.

    Attributes:
        kind: a key of `KINDS`.
        model: the name that it serves the model under.
        settings: how it opens the model.
        key: that clients must send.
        log: everything that it wrote, this run's from ``log_start``; deleted at the end unless ``keep_log``.
        base_url: for clients of OpenAI's protocol, with ``/v1``.
        version: of the package that brings the server, as the server's process loaded it.
        start_seconds: from the start of the process to its first answer.
    """

    kind: str
    model: str
    settings: OpenSettings
    key: SecretStr
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    keep_log: bool
    base_url: str = ""
    version: str = ""
    start_seconds: float = 0.0
    _loaded: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """In a notebook: what runs where, without folders and process numbers."""
        state = "running" if self.alive else "stopped"
        return f"LocalServer({self.kind}, {self.version}, {self.model}, {self.base_url}, {state})"

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.base_url)
        return parts.hostname or "", parts.port or 0

    def connect(self, **options: Any) -> Endpoint:
        """An endpoint for this server; options as ``client.connect``."""
        defaults = {"key": self.key.get_secret_value(), "version": self.version}
        endpoint = connect(self.base_url, self.model, **{**defaults, **options})
        n_ctx = endpoint.facts.n_ctx or self.settings.n_ctx
        return dataclasses.replace(endpoint, facts=dataclasses.replace(endpoint.facts, n_ctx=n_ctx))

    def log_lines(self, n_lines: int = LOG_LINES) -> list[str]:
        """The last lines of its log that have something in them."""
        lines = self.log.read_text("utf-8", "replace").splitlines() if self.log.exists() else []
        return [line for line in lines if line.strip(" .")][-n_lines:]

    def loaded(self) -> dict[str, Any]:
        """What llama.cpp reports of the loaded model: see `loaded_facts`; ``version`` is the server's."""
        if not self._loaded:
            with self.log.open("rb") as file:
                file.seek(self.log_start)
                text = file.read(LOAD_BYTES).decode("utf-8", "replace")
            self._loaded = {"version": self.version, **loaded_facts(text)}
        return self._loaded

    def stop(self, seconds: float = STOP_SECONDS) -> float:
        """End the server and wait until its process is gone; the seconds it took. Stopping twice is fine.

        It is asked to (SIGTERM), and killed if it has not ended in time. Its port is closed with the process;
        that is not waited for, since another program may take it at once (`port_is_free`).
        """
        started = time.perf_counter()
        if self.alive:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        child.end(self.process, grace_seconds=0)
        if not self.keep_log:
            self.loaded()
            self.log.unlink(missing_ok=True)
        return time.perf_counter() - started


def start(
    kind: str,
    path: str | Path,
    settings: OpenSettings | None = None,
    *,
    n_parallel: int = 1,
    name: str = "",
    log: str | Path | None = None,
    host: str = "127.0.0.1",
    key_variable: str = "",
    start_seconds: float = START_SECONDS,
) -> LocalServer:
    """Start a server for this model; it ends with its ``with`` block, or with this process at the latest.

    Args:
        kind: ``llama-cpp-python`` or ``llama.cpp``.
        path: the GGUF file, or one of its shards.
        settings: how it opens the model; ``n_ctx`` is that of one request.
        n_parallel: requests at once: slots of llama.cpp's server; the other has one.
        name: of the model to its clients; by default the file's name without its end.
        log: the file that receives all it writes; by default a temporary one, gone at the end.
        host: one that only this machine reaches.
        key_variable: the environment variable with the key that clients must send; by default a random key.
        start_seconds: the longest wait.

    Raises:
        ServerError: the host is not loopback, or the server does not come up in time.
        ModelError: it dies while it starts; the log's last lines are a note of the exception.
    """
    settings, began = settings or OpenSettings(), time.perf_counter()
    _check(kind, settings, host, key_variable)
    model_path = Path(open_shards(path).paths[0]).absolute()
    name, key = name or model_path.stem, os.environ.get(key_variable) or secrets.token_urlsafe(24)
    job = {
        "kind": kind,
        "path": str(model_path),
        "settings": settings.as_dict(),
        "name": name,
        "n_parallel": n_parallel,
        "host": host,
        "key": key,
    }
    temporary = partial(tempfile.NamedTemporaryFile, prefix="dfqs-server-", suffix=".log", delete=False)
    with Path(log).open("ab") if log else temporary("ab") as file:
        place, log_start = Path(file.name), file.tell()
        process = child.start(__name__, job, log=file, start_new_session=True)
    server = LocalServer(kind, name, settings, SecretStr(key), process, place, log_start, bool(log))
    try:
        _wait(server, model_path, host, began + start_seconds)
    except BaseException:
        server.stop(0.5)
        raise
    server.start_seconds = time.perf_counter() - began
    return server


def start_all(
    path: str | Path, settings: OpenSettings, folder: str | Path, kinds: Sequence[str] = tuple(KINDS)
) -> dict[str, LocalServer]:
    """A server of each kind, all started at once; each logs into ``folder/<kind>.log``.

    Raises:
        ServerError, ModelError: one does not come up; the others are stopped.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(kinds)) as pool:
        starting = {
            kind: pool.submit(start, kind, path, settings, log=Path(folder) / f"{kind}.log") for kind in kinds
        }
    try:
        return {kind: future.result() for kind, future in starting.items()}
    except BaseException:
        for future in starting.values():
            if not future.exception():
                future.result().stop()
        raise


def _check(kind: str, settings: OpenSettings, host: str, key_variable: str) -> None:
    if kind not in KINDS:
        raise ServerError(f"no kind of server is called {kind!r}", hint=f"there are {', '.join(KINDS)}")
    if not is_loopback(host):
        raise ServerError(f"{host} can be reached from other machines", hint="use 127.0.0.1")
    if key_variable and not os.environ.get(key_variable):
        hint = f"export {key_variable} with the key that clients will send"
        raise ServerError(f"the environment variable {key_variable} is not set", hint=hint)


def _wait(server: LocalServer, path: Path, host: str, until: float) -> None:
    """Wait until the child has named its port, and answers there."""
    raw, stdout = b"", server.process.stdout
    assert stdout is not None
    while not (server.base_url and is_healthy(server)):
        if not server.alive:
            cause = child.ending(server.process.returncode)
            raise child.died(cause, path, [], server.log_lines(200), doing="while it started as a server")
        if time.perf_counter() > until:
            hint = f"a large model needs longer: raise start_seconds. The last lines of {server.log.name}:"
            error = ServerError("the server did not come up in time", where=path, hint=hint)
            error.add_note("its last lines:\n  " + "\n  ".join(server.log_lines() or ["(none)"]))
            raise error
        if server.base_url:
            time.sleep(POLL_SECONDS)
        elif select.select([stdout], [], [], POLL_SECONDS)[0]:
            raw += os.read(stdout.fileno(), 4096)
            if b"\n" in raw:
                facts = json.loads(raw.split(b"\n")[0])
                server.version = f"{KINDS[server.kind]} {facts['version']}"
                server.base_url = f"http://{f'[{host}]' if ':' in host else host}:{facts['port']}/v1"


def is_healthy(server: LocalServer) -> bool:
    """Whether the server answers: ``/health`` of llama.cpp's, the list of models of the other."""
    path = "/health" if server.kind == "llama.cpp" else "/v1/models"
    try:
        answer = httpx2.get(server.base_url.removesuffix("/v1") + path, timeout=10, trust_env=False)
    except httpx2.TransportError:
        return False
    return answer.status_code in (200, 401)  # 401: it lives, and wants a key


def port_is_free(host: str, port: int) -> bool:
    """Whether nothing listens there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) != 0


def loaded_facts(log: str) -> dict[str, Any]:
    """How llama.cpp loaded a model, from its own log: what ran, not what was asked for.

    Returns:
        ``layers_offloaded`` to a GPU, like ``0/9``, or ``no GPU support``; ``buffers`` of the weights, like
        ``CPU_Mapped 5.46 MiB``; and ``repacked``: whether weights were copied into another layout for this
        processor.

    >>> loaded_facts("load_tensors:   CPU_Mapped model buffer size =     5.44 MiB")
    {'layers_offloaded': 'no GPU support', 'buffers': 'CPU_Mapped 5.44 MiB', 'repacked': False}
    """
    layers = re.search(r"offloaded (\d+/\d+) layers to GPU", log)
    buffers = [
        f"{name} {size} MiB" for name, size in re.findall(r"(\S+) +model buffer size = +([\d.]+) MiB", log)
    ]
    return {
        "layers_offloaded": layers[1] if layers else "no GPU support" if buffers else "not logged",
        "buffers": ", ".join(buffers),
        "repacked": any(re.search("REPACK|AMX|KLEIDIAI", name) for name in buffers),
    }


# ---- the child process ----


def _serve(job: dict[str, Any]) -> None:
    settings = OpenSettings(**job["settings"])
    run = _serve_llama_cpp if job["kind"] == "llama.cpp" else _serve_llama_cpp_python
    run(job, settings, lambda port: child.tell(port=port, version=version(KINDS[job["kind"]])))


def _serve_llama_cpp(job: dict[str, Any], settings: OpenSettings, tell: Callable[[int], None]) -> None:
    """llama.cpp's C++ server, which works in threads of its own."""
    import xllamacpp

    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    server = xllamacpp.Server(_llama_cpp_params(job, settings))
    tell(int(server.listening_address.rpartition(":")[2]))
    stopped.wait()
    del server


def _llama_cpp_params(job: dict[str, Any], settings: OpenSettings) -> Any:
    import xllamacpp

    params, mode, flash = xllamacpp.CommonParams(), xllamacpp.llama_load_mode, xllamacpp.llama_flash_attn_type
    params.model.path, params.model_alias = job["path"], {job["name"]}
    if hasattr(params, "hostnames"):  # since some build after b11063
        params.hostnames = [job["host"]]
    else:
        params.hostname = job["host"]
    params.port = 0  # a free one
    params.n_parallel, params.n_ctx = job["n_parallel"], settings.n_ctx * job["n_parallel"]
    for name in ("n_batch", "n_ubatch", "n_gpu_layers", "swa_full"):
        setattr(params, name, getattr(settings, name))
    params.cpuparams.n_threads = settings.n_threads
    params.cpuparams_batch.n_threads = settings.n_threads_batch
    params.load_mode = mode.LLAMA_LOAD_MODE_MMAP if settings.use_mmap else mode.LLAMA_LOAD_MODE_NONE
    params.cache_type_k = xllamacpp.ggml_type(GGML_TYPES[settings.type_k])
    params.cache_type_v = xllamacpp.ggml_type(GGML_TYPES[settings.type_v])
    enabled, disabled = flash.LLAMA_FLASH_ATTN_TYPE_ENABLED, flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.flash_attn_type = enabled if settings.flash_attn else disabled
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    params.no_extra_bufts = not settings.use_extra_bufts
    params.fit_params = params.ui = False  # what is asked for is what runs, and no web page
    params.verbosity = LOAD_VERBOSITY  # llama.cpp's own lines about the model, for `loaded_facts`
    params.api_keys = [job["key"]]
    params.cors_origins = NO_ORIGIN  # no web page reads an answer
    return params


def _serve_llama_cpp_python(job: dict[str, Any], settings: OpenSettings, tell: Callable[[int], None]) -> None:
    """llama-cpp-python's server, with the same parameters as a model in this process.

    By default it ends an answer when another request comes, and lets web pages read it: not here.
    """
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings
    from starlette.middleware.cors import CORSMiddleware

    from dfqs_nb.llama.settings import default_context_params, default_model_params

    names = ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "n_gpu_layers", "flash_attn")
    model = ModelSettings(
        model=job["path"],
        model_alias=job["name"],
        logits_all=False,
        verbose=True,  # into the log, for `loaded_facts`
        type_k=GGML_TYPES[settings.type_k],
        type_v=GGML_TYPES[settings.type_v],
        **{name: getattr(settings, name) for name in (*names, "use_mmap", "seed")},
    )
    options = ServerSettings(interrupt_requests=False, api_key=job["key"])
    with (
        default_model_params(use_extra_bufts=settings.use_extra_bufts),
        default_context_params(swa_full=settings.swa_full),
    ):
        app = create_app(server_settings=options, model_settings=[model])
    app.user_middleware = [layer for layer in app.user_middleware if layer.cls is not CORSMiddleware]
    server = uvicorn.Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=2))
    family = socket.AF_INET6 if ":" in job["host"] else socket.AF_INET
    listener = socket.create_server((job["host"], 0), family=family, backlog=128)
    tell(listener.getsockname()[1])
    server.run(sockets=[listener])


if __name__ == "__main__":
    child.serve(_serve)
