"""Run a local server for a model: llama-cpp-python's own, or llama.cpp's own (from ``xllamacpp``).

The server is a child process that binds a free port of this machine's loopback itself and says which. It
ends when it is told to, and also when the process that started it dies, however that happens: its standard
input is a pipe that nobody else holds, and it ends when that pipe does. ``python -m dfqs_nb.serve.servers`` is that
child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dfqs_nb.core.child import HINTS, environment
from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.settings import GGML_TYPES, OpenSettings
from dfqs_nb.serve.client import Endpoint, connect

KINDS = {"llama-cpp-python": "llama-cpp-python", "llama.cpp": "xllamacpp"}  # kind: the package that brings it
START_SECONDS = 300.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.05
LOG_LINES = 15


class ServerError(DfqsError):
    """A local server does not start, or does not stay."""


@dataclass(repr=False)
class LocalServer:
    """A server that runs: where it is asked, what it serves, and where it logs.

    Attributes:
        kind: a key of ``KINDS``.
        base_url: for clients of OpenAI's protocol, with ``/v1``.
        model: the name that it serves the model under.
        version: of the package that brings the server.
        log: everything that it wrote.
        start_seconds: from the start of the process to its first answer.
    """

    kind: str
    base_url: str
    model: str
    version: str
    log: Path
    settings: OpenSettings
    n_parallel: int
    key_variable: str
    process: subprocess.Popen[bytes]
    start_seconds: float = 0.0

    def __repr__(self) -> str:
        """In a notebook: what runs where, without folders and process numbers."""
        state = "running" if self.alive else "stopped"
        return f"LocalServer({self.kind}, {self.version}, {self.model}, {self.base_url}, {state})"

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
        """An endpoint for this server; options as ``endpoint.connect``."""
        defaults = {"key_variable": self.key_variable, "version": self.version}
        found = connect(self.base_url, self.model, **{**defaults, **options})
        n_ctx = found.facts.n_ctx or self.settings.n_ctx
        return dataclasses.replace(found, facts=dataclasses.replace(found.facts, n_ctx=n_ctx))

    def log_lines(self, n_lines: int = LOG_LINES) -> list[str]:
        """The last lines of its log that say something."""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return [line for line in lines if line.strip(" .")][-n_lines:]

    def stop(self, seconds: float = STOP_SECONDS) -> float:
        """End the server and wait until its process is gone; the seconds it took. Stopping twice is fine.

        It is asked to (SIGTERM), and killed if it has not ended in time. Its port is closed with the process;
        that is not waited for, since another program may take it at once (``port_is_free``).
        """
        started = time.perf_counter()
        if self.alive:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        if self.alive:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close() if pipe else None
        return time.perf_counter() - started


@contextlib.contextmanager
def serve(
    kind: str,
    path: str | Path,
    settings: OpenSettings | None = None,
    *,
    n_parallel: int = 1,
    name: str = "",
    log: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    key_variable: str = "",
    expose: bool = False,
    start_seconds: float = START_SECONDS,
) -> Iterator[LocalServer]:
    """A server for this model, while the block runs.

    Args:
        kind: ``llama-cpp-python`` or ``llama.cpp``.
        path: the GGUF file, or the first of its shards.
        settings: how it opens the model, as `llama.open_model` would; ``n_ctx`` is that of one request.
        n_parallel: requests at once (slots of llama.cpp's server; the other has one).
        name: of the model to its clients; by default the file's name without its end.
        log: the file that receives all it writes; by default a temporary one, gone at the end.
        port: 0: a free one.
        key_variable: the environment variable with the key that clients must send; empty: none.
        expose: allow a ``host`` that other machines can reach.

    Raises:
        ServerError: the host is not loopback, or the server does not come up in time.
        ModelError: it dies while it starts; the log's last lines are a note of the exception.
    """
    server = start(
        kind,
        path,
        settings,
        n_parallel=n_parallel,
        name=name,
        log=log,
        host=host,
        port=port,
        key_variable=key_variable,
        expose=expose,
        start_seconds=start_seconds,
    )
    try:
        yield server
    finally:
        server.stop()
        if log is None:
            server.log.unlink(missing_ok=True)


def start(
    kind: str,
    path: str | Path,
    settings: OpenSettings | None = None,
    *,
    n_parallel: int = 1,
    name: str = "",
    log: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    key_variable: str = "",
    expose: bool = False,
    start_seconds: float = START_SECONDS,
) -> LocalServer:
    """``serve`` for those who stop it themselves; it ends with this process in any case."""
    settings, model_path = settings or OpenSettings(), open_shards(path).paths[0]
    _check(kind, settings, host, expose, key_variable)
    name, started = name or Path(model_path).stem, time.perf_counter()
    log_path = Path(log) if log else _temporary_log()
    job = {
        "kind": kind,
        "path": os.path.abspath(model_path),
        "settings": settings.as_dict(),
        "name": name,
        "n_parallel": n_parallel,
        "host": host,
        "port": port,
        "key_variable": key_variable,
    }
    with log_path.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dfqs_nb.serve.servers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env=environment(),
            start_new_session=True,
        )
    server = LocalServer(
        kind,
        "",
        name,
        f"{KINDS[kind]} {version(KINDS[kind])}",
        log_path,
        settings,
        n_parallel,
        key_variable,
        process,
    )
    try:
        _send(process, job)
        found = _its_port(server, model_path, started + start_seconds)
        server.base_url = f"http://{f'[{host}]' if ':' in host else host}:{found}/v1"
        _wait_for_answer(server, model_path, started + start_seconds)
    except BaseException:
        server.stop(0.5)
        if log is None:
            log_path.unlink(missing_ok=True)
        raise
    server.start_seconds = time.perf_counter() - started
    return server


def _check(kind: str, settings: OpenSettings, host: str, expose: bool, key_variable: str) -> None:
    if kind not in KINDS:
        raise ServerError(f"no kind of server is called {kind!r}", hint=f"there are {', '.join(KINDS)}")
    if settings.rpc_servers and kind != "llama-cpp-python":
        raise ServerError("the prebuilt llama.cpp server has no RPC", hint="serve with llama-cpp-python")
    if not expose and not is_loopback(host):
        raise ServerError(
            f"{host} can be reached from other machines",
            hint="use 127.0.0.1, or pass expose=True and a key if that is what you want",
        )
    if key_variable and not os.environ.get(key_variable):
        raise ServerError(
            f"the environment variable {key_variable} is not set",
            hint=f"export {key_variable} with the key that clients will send",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host; names count only when they are ``localhost``.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="dfqs-server-", suffix=".log")
    os.close(handle)
    return Path(name)


def _send(process: subprocess.Popen[bytes], job: dict[str, Any]) -> None:
    """Hand the job over; the pipe stays open, because its end is the child's end."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died already: waiting for its port says why
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()


def _its_port(server: LocalServer, path: str | Path, until: float) -> int:
    """The port that the child says it listens on."""
    said, stdout = b"", server.process.stdout
    assert stdout is not None
    while b"\n" not in said:
        _check_alive(server, path)
        if time.perf_counter() > until:
            raise _with_log(
                ServerError(
                    "the server did not come up in time",
                    where=path,
                    hint="a large model needs longer: raise start_seconds",
                ),
                server,
            )
        if select.select([stdout], [], [], POLL_SECONDS)[0]:
            said += os.read(stdout.fileno(), 4096)
    return int(json.loads(said.split(b"\n")[0])["port"])


def _wait_for_answer(server: LocalServer, path: str | Path, until: float) -> None:
    """Poll until it answers as healthy."""
    while not is_healthy(server):
        _check_alive(server, path)
        if time.perf_counter() > until:
            raise _with_log(
                ServerError(
                    "the server listens, but does not become healthy", where=path, hint="read its log"
                ),
                server,
            )
        time.sleep(POLL_SECONDS)


def is_healthy(server: LocalServer) -> bool:
    """Whether the server answers: ``/health`` of llama.cpp's, the list of models of the other."""
    root = server.base_url.removesuffix("/v1")
    request = urllib.request.Request(root + ("/health" if server.kind == "llama.cpp" else "/v1/models"))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        return error.code == 401  # it lives, and wants a key
    except OSError:
        return False


def _check_alive(server: LocalServer, path: str | Path) -> None:
    status = server.process.poll()
    if status is None:
        return
    signal_name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    lines = server.log_lines(1)
    what = f"{server.version} died while it started ({signal_name}){': ' + lines[0].strip() if lines else ''}"
    hint = HINTS.get(signal_name, "read the last lines of its log, below")
    raise _with_log(ModelError(what, where=path, hint=hint), server)


def _with_log(error: DfqsError, server: LocalServer) -> DfqsError:
    error.add_note("the server's last lines:\n  " + "\n  ".join(server.log_lines() or ["(none)"]))
    return error


def port_is_free(host: str, port: int) -> bool:
    """Whether nothing listens there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) != 0


# ---- the child process ----


def main() -> int:
    """Read a job from standard input, serve, and end with standard input or at SIGTERM."""
    job = json.loads(sys.stdin.buffer.readline())
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes into the log
    settings = OpenSettings(**job["settings"])
    key = os.environ[job["key_variable"]] if job["key_variable"] else ""
    run = _serve_llama_cpp if job["kind"] == "llama.cpp" else _serve_llama_cpp_python
    run(job, settings, key, lambda port: os.write(answers, json.dumps({"port": port}).encode() + b"\n"))
    return 0


def _serve_llama_cpp(job: dict[str, Any], settings: OpenSettings, key: str, tell: Any) -> None:
    """llama.cpp's C++ server, which works in threads of its own."""
    import xllamacpp

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = xllamacpp.Server(_llama_cpp_params(job, settings, key))
    tell(int(server.listening_address.rpartition(":")[2]))
    try:
        sys.stdin.buffer.read()
    finally:
        del server


def _llama_cpp_params(job: dict[str, Any], settings: OpenSettings, key: str) -> Any:
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
    params.flash_attn_type = (
        flash.LLAMA_FLASH_ATTN_TYPE_ENABLED if settings.flash_attn else flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    params.no_extra_bufts = not settings.use_extra_bufts
    params.fit_params = params.ui = False  # what is asked for is what runs, and no web page
    params.api_keys = [key] if key else []
    return params


def _serve_llama_cpp_python(job: dict[str, Any], settings: OpenSettings, key: str, tell: Any) -> None:
    """llama-cpp-python's server, with the same parameters as `settings.build_llama`."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            _llama_cpp_python_app(job, settings, key), log_level="info", timeout_graceful_shutdown=2
        )
    )
    family = socket.AF_INET6 if ":" in job["host"] else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((job["host"], job["port"]))
    listener.listen(128)
    threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
    tell(listener.getsockname()[1])
    server.run(sockets=[listener])


def _end_with_stdin(server: Any) -> None:
    """Ask the server to end when the parent is gone, and insist."""
    sys.stdin.buffer.read()
    server.should_exit = True
    time.sleep(STOP_SECONDS / 2)
    os._exit(1)


def _llama_cpp_python_app(job: dict[str, Any], settings: OpenSettings, key: str) -> Any:
    """The app. Its default would cut an answer off when another request comes; ours does not."""
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    from dfqs_nb.llama.settings import add_rpc_servers, default_context_params, default_model_params

    add_rpc_servers(settings)
    names = (
        "n_ctx",
        "n_batch",
        "n_ubatch",
        "n_threads",
        "n_threads_batch",
        "n_gpu_layers",
        "flash_attn",
        "use_mmap",
        "seed",
    )
    model = ModelSettings(
        model=job["path"],
        model_alias=job["name"],
        logits_all=False,
        verbose=False,
        type_k=GGML_TYPES[settings.type_k],
        type_v=GGML_TYPES[settings.type_v],
        **{name: getattr(settings, name) for name in names},
    )
    server = ServerSettings(host=job["host"], port=job["port"], interrupt_requests=False, api_key=key or None)
    with (
        default_model_params(use_extra_bufts=settings.use_extra_bufts),
        default_context_params(swa_full=settings.swa_full),
    ):
        return create_app(server_settings=server, model_settings=[model])


if __name__ == "__main__":
    sys.exit(main())
