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
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, Unpack

from dfqs_nb.core import child
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.settings import GGML_TYPES, OpenSettings
from dfqs_nb.serve.client import Endpoint, connect
from dfqs_nb.serve.wire import Secret, is_loopback

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


class Options(TypedDict, total=False):
    """How a server is run, beside the settings of its model; each may be left out.

    ``n_parallel``: requests at once (slots of llama.cpp's server; the other has one). ``name``: of the model
    to its clients; by default the file's name without its end. ``log``: the file that receives all it
    writes; by default a temporary one, gone at the end. ``host``, ``port``: by default 127.0.0.1, and a free
    port. ``key_variable``: the environment variable with the key that clients must send; by default a random
    key. ``expose``: allow a ``host`` that other machines can reach. ``start_seconds``: the longest wait.
    """

    n_parallel: int
    name: str
    log: str | Path | None
    host: str
    port: int
    key_variable: str
    expose: bool
    start_seconds: float


@dataclass(repr=False)
class LocalServer:
    """A server that runs; in a ``with`` block it is stopped at the end.

    Attributes:
        kind: a key of `KINDS`.
        base_url: for clients of OpenAI's protocol, with ``/v1``.
        model: the name that it serves the model under.
        version: of the package that brings the server, as the server's process loaded it.
        log: everything that it wrote.
        key: that clients must send.
        start_seconds: from the start of the process to its first answer.
    """

    kind: str
    model: str
    log: Path
    settings: OpenSettings
    n_parallel: int
    key: Secret
    process: subprocess.Popen[bytes]
    base_url: str = ""
    version: str = ""
    start_seconds: float = 0.0
    keep_log: bool = True
    _log_start: int = 0  # a log is continued by each run
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
        host, _, port = self.base_url.split("//")[1].split("/")[0].rpartition(":")
        return host.strip("[]"), int(port)

    def connect(self, **options: Any) -> Endpoint:
        """An endpoint for this server; options as ``client.connect``."""
        defaults = {"key": self.key.reveal(), "version": self.version}
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
                file.seek(self._log_start)
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
    kind: str, path: str | Path, settings: OpenSettings | None = None, **options: Unpack[Options]
) -> LocalServer:
    """Start a server for this model; it ends with its ``with`` block, or with this process at the latest.

    Args:
        kind: ``llama-cpp-python`` or ``llama.cpp``.
        path: the GGUF file, or one of its shards.
        settings: how it opens the model; ``n_ctx`` is that of one request.
        options: see `Options`.

    Raises:
        ServerError: the host is not loopback, or the server does not come up in time.
        ModelError: it dies while it starts; the log's last lines are a note of the exception.
    """
    settings, model_path = settings or OpenSettings(), open_shards(path).paths[0]
    host, variable = options.get("host", "127.0.0.1"), options.get("key_variable", "")
    _check(kind, settings, host, options.get("expose", False), variable)
    log, began = options.get("log"), time.perf_counter()
    job: dict[str, Any] = {
        "kind": kind,
        "path": str(Path(model_path).absolute()),
        "settings": settings.as_dict(),
        "name": options.get("name") or Path(model_path).stem,
        "n_parallel": options.get("n_parallel", 1),
        "host": host,
        "port": options.get("port", 0),
        "key": os.environ[variable] if variable else secrets.token_urlsafe(24),
    }
    log_path = Path(log) if log else _temporary_log()
    with log_path.open("ab") as file:
        log_start = file.tell()
        process = child.start(__name__, job, log=file, start_new_session=True)
    server = LocalServer(
        kind,
        job["name"],
        log_path,
        settings,
        job["n_parallel"],
        Secret(job["key"]),
        process,
        keep_log=bool(log),
        _log_start=log_start,
    )
    try:
        _wait(server, model_path, host, began + options.get("start_seconds", START_SECONDS))
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
    failed = [one.exception() for one in starting.values() if one.exception()]
    if failed and failed[0]:
        for one in starting.values():
            if not one.exception():
                one.result().stop()
        raise failed[0]
    return {kind: one.result() for kind, one in starting.items()}


def _check(kind: str, settings: OpenSettings, host: str, expose: bool, key_variable: str) -> None:
    if kind not in KINDS:
        raise ServerError(f"no kind of server is called {kind!r}", hint=f"there are {', '.join(KINDS)}")
    if settings.rpc_servers and kind != "llama-cpp-python":
        raise ServerError("the prebuilt llama.cpp server has no RPC", hint="serve with llama-cpp-python")
    if not expose and not is_loopback(host):
        hint = "use 127.0.0.1, or pass expose=True if that is what you want"
        raise ServerError(f"{host} can be reached from other machines", hint=hint)
    if key_variable and not os.environ.get(key_variable):
        hint = f"export {key_variable} with the key that clients will send"
        raise ServerError(f"the environment variable {key_variable} is not set", hint=hint)


def _temporary_log() -> Path:
    with tempfile.NamedTemporaryFile(prefix="dfqs-server-", suffix=".log", delete=False) as file:
        return Path(file.name)


def _wait(server: LocalServer, path: str | Path, host: str, until: float) -> None:
    """Wait until the child has named its port, and answers there."""
    raw, stdout = b"", server.process.stdout
    assert stdout is not None
    healthy = False
    while not healthy:
        if server.process.poll() is not None:
            _died(server, path)
        if time.perf_counter() > until:
            hint = f"a large model needs longer: raise start_seconds. The last lines of {server.log.name}:"
            lines = "\n  ".join(server.log_lines() or ["(none)"])
            error = ServerError("the server did not come up in time", where=path, hint=hint)
            error.add_note(f"its last lines:\n  {lines}")
            raise error
        if server.base_url:
            healthy = is_healthy(server)
            time.sleep(0 if healthy else POLL_SECONDS)
        elif select.select([stdout], [], [], POLL_SECONDS)[0]:
            raw += os.read(stdout.fileno(), 4096)
            if b"\n" in raw:
                facts = json.loads(raw.split(b"\n")[0])
                server.version = f"{KINDS[server.kind]} {facts['version']}"
                server.base_url = f"http://{f'[{host}]' if ':' in host else host}:{facts['port']}/v1"


def _died(server: LocalServer, path: str | Path) -> None:
    cause = child.ending(server.process.returncode)
    raise child.died(cause, path, [], server.log_lines(200), doing="while it started as a server")


def is_healthy(server: LocalServer) -> bool:
    """Whether the server answers: ``/health`` of llama.cpp's, the list of models of the other."""
    root = server.base_url.removesuffix("/v1")
    request = urllib.request.Request(root + ("/health" if server.kind == "llama.cpp" else "/v1/models"))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        return error.code == 401  # it lives, and wants a key
    except OSError:
        return False


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

    params, n_parallel = xllamacpp.CommonParams(), job["n_parallel"]
    params.model.path, params.model_alias = job["path"], {job["name"]}
    params.port = job["port"]
    if hasattr(params, "hostnames"):  # since some build after b11063
        params.hostnames = [job["host"]]
    else:
        params.hostname = job["host"]
    params.n_parallel, params.n_ctx = n_parallel, settings.n_ctx * n_parallel
    params.n_batch, params.n_ubatch = settings.n_batch, settings.n_ubatch
    params.cpuparams.n_threads = settings.n_threads
    params.cpuparams_batch.n_threads = settings.n_threads_batch
    mode = xllamacpp.llama_load_mode
    params.load_mode = mode.LLAMA_LOAD_MODE_MMAP if settings.use_mmap else mode.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers, params.swa_full = settings.n_gpu_layers, settings.swa_full
    params.cache_type_k = xllamacpp.ggml_type(GGML_TYPES[settings.type_k])
    params.cache_type_v = xllamacpp.ggml_type(GGML_TYPES[settings.type_v])
    flash = xllamacpp.llama_flash_attn_type
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
    """llama-cpp-python's server, with the same parameters as a model in this process."""
    import uvicorn

    app = _llama_cpp_python_app(job, settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=2))
    listener = socket.socket(socket.AF_INET6 if ":" in job["host"] else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((job["host"], job["port"]))
    listener.listen(128)
    tell(listener.getsockname()[1])
    server.run(sockets=[listener])


def _llama_cpp_python_app(job: dict[str, Any], settings: OpenSettings) -> Any:
    """The app, which by default ends an answer when another request comes, and lets web pages read it."""
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings
    from starlette.middleware.cors import CORSMiddleware

    from dfqs_nb.llama.settings import add_rpc_servers, default_context_params, default_model_params

    add_rpc_servers(settings)
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
    options = ServerSettings(host=job["host"], port=job["port"], interrupt_requests=False, api_key=job["key"])
    with (
        default_model_params(use_extra_bufts=settings.use_extra_bufts),
        default_context_params(swa_full=settings.swa_full),
    ):
        app = create_app(server_settings=options, model_settings=[model])
    app.user_middleware = [layer for layer in app.user_middleware if layer.cls is not CORSMiddleware]
    return app


if __name__ == "__main__":
    child.serve(_serve)
