"""Build llama.cpp's model object, and try a file in a child process before this process touches it.

A header that fails an assertion aborts the process that opens it, and a build for another CPU is killed at
the first decode. ``python -m dfqs_nb.llama.probe`` is the process that may die of it: it plans the memory, loads,
decodes, and says on its standard output how far it came.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqs_nb.core.errors import DfqsError, ModelError, SpaceError
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.gguf.memory import KvCacheBytes, MemoryEstimate, check_fits

# ggml_type of the KV cache types, from ggml.h
GGML_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
PROBE_CTX = 256
MAX_CTX = 2**31 - 256
PREFILL_TOKENS = 8
SECONDS_PER_BYTE = 1 / 50e6  # a slow disk
BASE_TIMEOUT_SECONDS = 120.0
DEBUG, CONTINUES = 1, 5  # ggml_log_level of ggml.h


@dataclass(frozen=True)
class OpenSettings:
    """How a model is opened: every field is a condition of what is measured with it.

    Args:
        n_ctx: tokens of context.
        n_batch, n_ubatch: tokens handed over, and computed, at once in prefill.
        n_threads, n_threads_batch: threads in decode and in prefill; None: the usable physical cores.
        n_gpu_layers: layers put on the GPU; -1: all.
        seed: of the sampler; greedy decoding does not use it.
        flash_attn: flash attention; a quantized V cache needs it.
        type_k, type_v: element types of the KV cache.
        use_mmap: map the weights, so that they need not fit in memory.
        use_extra_bufts: repack weights for this CPU; False, because that crashes on CPUs with AMX
            (ggml-org/llama.cpp#20824) and keeps a second copy in memory.
        swa_full: keep all tokens in sliding-window layers; llama.cpp's default True multiplies the cache.
        rpc_servers: ``host:port`` of llama.cpp's RPC servers, as a tuple or with commas: the layers on the
            GPU (``n_gpu_layers``) go there. The protocol knows no key: use hosts that you trust.

    Raises:
        ModelError: a count below its minimum, an unknown cache type, or RPC servers that nothing is put on.
    """

    n_ctx: int = 4096
    n_batch: int = 512
    n_ubatch: int = 512
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int = 0
    seed: int = 42
    flash_attn: bool = False
    type_k: str = "f16"
    type_v: str = "f16"
    use_mmap: bool = True
    use_extra_bufts: bool = False
    swa_full: bool = False
    rpc_servers: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        threads = self.n_threads or usable_cores()
        object.__setattr__(self, "n_threads", threads)
        object.__setattr__(self, "n_threads_batch", self.n_threads_batch or threads)
        for name in ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}", hint="use 1 or more")
        if self.n_ctx > MAX_CTX:
            raise ModelError(f"n_ctx is {self.n_ctx:,}", hint=f"llama.cpp counts to {MAX_CTX:,}")
        for name in ("type_k", "type_v"):
            if getattr(self, name) not in GGML_TYPES:
                raise ModelError(
                    f"{name} is {getattr(self, name)!r}", hint=f"use one of {', '.join(GGML_TYPES)}"
                )
        object.__setattr__(self, "rpc_servers", _addresses(self.rpc_servers))
        if self.rpc_servers and self.n_gpu_layers == 0:
            raise ModelError(
                "RPC servers are given, but no layers for them",
                hint="pass n_gpu_layers: -1 puts all of them there",
            )

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a report's conditions; RPC servers only where there are any."""
        values = dataclasses.asdict(self)
        if not values["rpc_servers"]:
            del values["rpc_servers"]
        return values


def _addresses(servers: Sequence[str] | str) -> tuple[str, ...]:
    """RPC servers as a tuple of ``host:port``.

    >>> _addresses("10.0.0.2:50052, 10.0.0.3:50052")
    ('10.0.0.2:50052', '10.0.0.3:50052')
    """
    parts = servers.split(",") if isinstance(servers, str) else servers
    found = tuple(part.strip() for part in parts if part.strip())
    for address in found:
        if not re.fullmatch(r"[\w.\-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", address):
            raise ModelError(f"{address!r} is not an RPC server", hint="write host:port, several with commas")
    return found


_rpc_added: set[str] = set()


def add_rpc_servers(settings: OpenSettings) -> None:
    """Make the devices of RPC servers known to llama.cpp in this process, once each.

    Raises:
        ModelError: this build of llama.cpp has no RPC, or a server does not answer.
    """
    new = [address for address in settings.rpc_servers if address not in _rpc_added]
    if not new:
        return
    import llama_cpp.llama_cpp as api

    if not api.llama_supports_rpc():
        raise ModelError(
            f"llama-cpp-python {llama_version()} was built without RPC",
            hint='build it with CMAKE_ARGS="-DGGML_RPC=ON", or point LLAMA_CPP_LIB_PATH at such a build',
        )
    for address in new:
        _check_listens(address)
        _register_rpc(api, address)
        _rpc_added.add(address)


def _check_listens(address: str) -> None:
    """llama.cpp ends the process where an RPC server is not there, so look first."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ModelError(
            f"no RPC server answers at {address} ({error.strerror or error})",
            hint="start it there: rpc-server -H HOST -p PORT",
        ) from error


def _register_rpc(api: Any, address: str) -> None:
    """What llama.cpp's own ``--rpc`` does, through the same functions of ggml."""
    void, text = ctypes.c_void_p, ctypes.c_char_p

    def function(name: str, result: Any, *arguments: Any) -> Any:
        found = getattr(api._lib, name)
        found.restype, found.argtypes = result, arguments
        return found

    registry = function("ggml_backend_reg_by_name", void, text)(b"RPC")
    find = function("ggml_backend_reg_get_proc_address", void, void, text)
    server = ctypes.CFUNCTYPE(void, text)(find(registry, b"ggml_backend_rpc_add_server"))(address.encode())
    if not server:
        raise ModelError(
            f"the RPC server at {address} is not taken", hint="use one of the same llama.cpp build"
        )
    function("ggml_backend_register", None, void)(server)


class LlamaLog:
    """The last lines llama.cpp logged in this process; nothing of it is printed."""

    def __init__(self, n_lines: int = 500) -> None:
        self._lines: deque[str] = deque(maxlen=n_lines)
        self._open_line = ""
        self._level = 0
        self._callback: Any = None
        self.echo: int | None = None

    def install(self) -> None:
        """Take llama.cpp's log over (once; importing llama_cpp sets a callback that prints)."""
        if self._callback is None:
            import llama_cpp

            self._callback = llama_cpp.llama_log_callback(self._receive)
            llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        self._level = self._level if level == CONTINUES else level
        if self._level == DEBUG:
            return
        if self.echo is not None:
            os.write(self.echo, text)
        *lines, self._open_line = (self._open_line + text.decode("utf-8", "replace")).split("\n")
        self._lines.extend(lines)

    def clear(self) -> None:
        """Forget the lines so far."""
        self._lines.clear()

    def tail(self, n_lines: int = 12) -> list[str]:
        """The last lines, oldest first."""
        return list(self._lines)[-n_lines:]


LOG = LlamaLog()
_building = threading.RLock()  # a context's parameters are set around its model's


@contextlib.contextmanager
def _default_params(maker: str, fields: dict[str, object]) -> Iterator[None]:
    """Make what ``llama_cpp.<maker>()`` returns carry ``fields``. It is put back, also on errors."""
    import llama_cpp.llama_cpp as api

    original = getattr(api, maker)

    def wrapped() -> Any:
        params = original()
        for name, value in fields.items():
            setattr(params, name, value)
        return params

    with _building:
        setattr(api, maker, wrapped)
        try:
            yield
        finally:
            setattr(api, maker, original)


def default_model_params(**fields: object) -> contextlib.AbstractContextManager[None]:
    """Make llama.cpp's default model parameters carry ``fields`` while a model is built.

    ``llama_cpp.Llama`` does not expose ``use_extra_bufts``.
    """
    return _default_params("llama_model_default_params", fields)


def default_context_params(**fields: object) -> contextlib.AbstractContextManager[None]:
    """The same for the parameters of its context: ``llama_cpp.Llama`` does not expose ``cb_eval``."""
    return _default_params("llama_context_default_params", fields)


def build_llama(path: str | Path, settings: OpenSettings) -> Any:
    """A ``llama_cpp.Llama`` of this file with exactly these settings, opened in this process.

    Raises:
        ModelError: llama.cpp refuses the file. A file that aborts it ends this process: see ``probe``.
    """
    import llama_cpp

    LOG.install()
    LOG.clear()
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
        "swa_full",
    )
    try:
        with default_model_params(use_extra_bufts=settings.use_extra_bufts):
            llama = llama_cpp.Llama(
                model_path=str(path),
                verbose=False,
                type_k=GGML_TYPES[settings.type_k],
                type_v=GGML_TYPES[settings.type_v],
                **{n: getattr(settings, n) for n in names},
            )
    except ValueError as error:
        raise refusal(path, LOG.tail(40)) from error
    llama.set_seed(settings.seed)
    return llama


@dataclass(frozen=True)
class Probe:
    """What the child process found.

    ``kv_bytes`` and ``compute_bytes`` are llama.cpp's own figures (to 0.01 MiB a buffer) from a run without
    allocation; ``compute_bytes`` counts the buffers in this machine's memory, not a GPU's.
    """

    kv_bytes: int
    compute_bytes: int
    load_seconds: float
    decode_seconds: float
    seconds: float


def probe(paths: Sequence[str | Path], settings: OpenSettings, needs: MemoryEstimate) -> Probe:
    """Plan, load and decode a model (its shards, first one first) in a child process.

    The same files and settings are tried once a session. The child loads with a context of 256 tokens and
    evaluates 9 with one thread (threads that wait for each other crawl on a busy machine). It reads through
    the page cache that this process will use, so a file that fits in memory is read from the disk once;
    llama.cpp reads a larger one through at every load, and then the child's reading comes on top.

    Raises:
        ModelError: llama.cpp refuses the file, dies on it, or computes logits that are not numbers.
        SpaceError: the context's cache and llama.cpp's compute buffer exceed the free memory.
    """
    return _probe_once(tuple(map(_identity, paths)), settings, json.dumps(dataclasses.asdict(needs)))


def _identity(path: str | Path) -> tuple[str, str, int, int]:
    """The path as the user gave it (for messages), the file it leads to, its size and its time of change."""
    stat = os.stat(path)
    return str(path), os.path.realpath(path), stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _probe_once(identity: tuple[tuple[str, str, int, int], ...], settings: OpenSettings, needs: str) -> Probe:
    path, weights_bytes = identity[0][0], json.loads(needs)["weights_bytes"]
    job = json.dumps({"path": path, "settings": settings.as_dict(), "needs": json.loads(needs)})
    started = time.perf_counter()
    timeout = BASE_TIMEOUT_SECONDS + weights_bytes * SECONDS_PER_BYTE
    try:
        child = subprocess.run(
            [sys.executable, "-m", "dfqs_nb.llama.probe"],
            input=job.encode(),
            capture_output=True,
            env=_child_environment(),
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"llama.cpp did not load it within {timeout:,.0f} s",
            where=path,
            hint="the disk is very slow, or the file is on a network: copy it to a local disk",
        ) from error
    seconds = time.perf_counter() - started
    return _read_child(path, child, seconds)


def _child_environment() -> dict[str, str]:
    """This environment, with the package importable and ggml's stack trace (which starts a debugger) off."""
    roots = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, roots)),
        "GGML_NO_BACKTRACE": "1",
        "PYTHONIOENCODING": "utf-8",
    }


def _read_child(path: str, child: subprocess.CompletedProcess[bytes], seconds: float) -> Probe:
    facts: dict[str, Any] = {}
    for line in child.stdout.decode("utf-8", "replace").splitlines():
        if line.startswith('{"stage"'):
            facts.update(json.loads(line))
    log = child.stderr.decode("utf-8", "replace").splitlines()
    if facts.get("stage") == "failed":
        raise _as_error(facts, log)
    if child.returncode != 0 or facts.get("stage") != "done":
        raise death(path, child.returncode, facts.get("stage", "start"), log)
    return Probe(
        facts["kv_bytes"], facts["compute_bytes"], facts["load_seconds"], facts["decode_seconds"], seconds
    )


def _as_error(facts: dict[str, Any], log: list[str]) -> DfqsError:
    kind = SpaceError if facts["kind"] == "SpaceError" else ModelError
    return _with_log(kind(facts["what"], where=facts["where"], hint=facts["hint"]), log)


def _with_log(error: DfqsError, log: list[str]) -> DfqsError:
    lines = [line for line in log if line.strip(" .")][-12:]
    error.add_note("llama.cpp's last lines:\n  " + "\n  ".join(lines or ["(none)"]))
    return error


DEATH_HINTS = {
    "SIGABRT": "its header is not what this llama.cpp expects: inspect it (02_inspect_header), get it again, "
    "or update llama-cpp-python",
    "SIGFPE": "this build of llama.cpp cannot open this model: take another one (b11549 died on deepseek4 "
    "files here, b11063 did not)",
    "SIGILL": "llama-cpp-python was built for another CPU: install it again on this machine",
    "SIGSEGV": "the file is damaged, or this llama.cpp does not suit this CPU: verify its hash, then install "
    "llama-cpp-python again on this machine",
    "SIGBUS": "the file shrank or its disk failed while it was read: verify its hash",
    "SIGKILL": "the system killed it, most likely for memory: lower n_ctx or close other programs",
}
STAGES = {
    "start": "at start",
    "plan": "while planning its memory",
    "load": "while loading it",
    "decode": "at the first decode",
}


def death(path: str | Path, returncode: int, stage: str, log: list[str]) -> ModelError:
    """The error for a child that died: the signal, the stage, and the assertion or last line it wrote."""
    name = signal.Signals(-returncode).name if returncode < 0 else f"exit status {returncode}"
    cause = _telling_line(log)
    what = f"llama.cpp died {STAGES.get(stage, stage)} ({name}){': ' + cause if cause else ''}"
    hint = DEATH_HINTS.get(name, "see the last lines that llama.cpp wrote, below")
    return _with_log(ModelError(what, where=path, hint=hint), log)


def _telling_line(log: list[str]) -> str:
    """The line that says why: an assertion, a C++ exception, or an error; without the build's folders."""
    for pattern in (r"GGML_ASSERT|GGML_ABORT|fatal error", r"what\(\):", r"[Ee]rror"):
        found = [line for line in log if re.search(pattern, line)]
        if found:
            return re.sub(r"\S*/([\w.-]+\.(?:cpp|c|cu|h|m):\d+)", r"\1", found[0]).strip()
    return log[-1].strip() if log else ""


def refusal(path: str | Path, log: list[str]) -> ModelError:
    """The error for a file that llama.cpp declines in an orderly way, from what it logged."""
    text = "\n".join(log)
    unknown = re.search(r"unknown model architecture: '([^']*)'", text)
    if unknown:
        return ModelError(
            f"this llama.cpp (llama-cpp-python {llama_version()}) does not know the architecture "
            f"{unknown[1]!r}",
            where=path,
            hint="update llama-cpp-python, or convert the model again",
        )
    reasons = re.findall(r"(?:error loading model: |failed to initialize the context: )(.+)", text)
    reason = reasons[0].strip() if reasons else _telling_line(log) or "no reason given"
    error = ModelError(f"llama.cpp refuses it: {reason}", where=path, hint=_refusal_hint(reason))
    return _with_log(error, log)


def _refusal_hint(reason: str) -> str:
    for word, hint in (
        ("key not found", "the file is in another dialect of its architecture: get a newer conversion"),
        ("split", "keep all shards under their own names in one folder, or merge them (01_merge_shards)"),
        ("not within the file bounds", "the file is cut off: resume or repeat the download"),
        ("quantized V cache", "pass flash_attn=True, or type_v='f16'"),
        (
            "tensor",
            "the file does not hold the tensors its header promises: get it again, or merge its shards",
        ),
    ):
        if word in reason:
            return hint
    return "inspect its header (02_inspect_header), or update llama-cpp-python"


def llama_version() -> str:
    """The version of llama-cpp-python, which pins the llama.cpp inside."""
    import llama_cpp

    return llama_cpp.__version__


# ---- the child process ----


def main() -> int:
    """Read a job from standard input, run it, and write one JSON object a stage; return the exit status."""
    job = json.loads(sys.stdin.read())
    settings, path = OpenSettings(**job["settings"]), job["path"]
    try:
        _report(stage="plan")
        planned = dry_run(path, settings)
        _report(stage="load", **planned)
        _check_memory(path, job["needs"], planned)
        _try(path, settings)
    except DfqsError as error:
        where = None if error.where is None else str(error.where)
        _report(stage="failed", kind=type(error).__name__, what=error.what, where=where, hint=error.hint)
    return 0


def _report(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def dry_run(path: str | Path, settings: OpenSettings) -> dict[str, int]:
    """Bytes of KV cache and compute buffer that llama.cpp itself plans; nothing is allocated or loaded.

    Uses ``no_alloc`` of ``llama_model_params``: llama.cpp reads the header, builds the graph, adds up.

    Raises:
        ModelError: llama.cpp refuses the file or these settings.
    """
    import llama_cpp.llama_cpp as api

    LOG.install()
    LOG.clear()
    add_rpc_servers(settings)
    with contextlib.ExitStack() as stack:
        model = api.llama_model_load_from_file(os.fsencode(path), _plan_model_params(settings))
        if not model:
            raise refusal(path, LOG.tail(40))
        stack.callback(api.llama_model_free, model)
        context = api.llama_init_from_model(model, _plan_context_params(settings))
        if not context:
            raise refusal(path, LOG.tail(40))
        stack.callback(api.llama_free, context)
        return planned_bytes(LOG.tail(500))


def _plan_model_params(settings: OpenSettings) -> Any:
    import llama_cpp.llama_cpp as api

    params = api.llama_model_default_params()
    params.no_alloc, params.use_extra_bufts = True, settings.use_extra_bufts
    params.load_mode = api.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = 0x7FFFFFFF if settings.n_gpu_layers == -1 else settings.n_gpu_layers
    return params


def _plan_context_params(settings: OpenSettings) -> Any:
    import llama_cpp.llama_cpp as api

    params = api.llama_context_default_params()
    params.n_ctx, params.swa_full = settings.n_ctx, settings.swa_full
    params.n_batch = min(settings.n_ctx, settings.n_batch)
    params.n_ubatch = min(params.n_batch, settings.n_ubatch)
    params.n_threads, params.n_threads_batch = settings.n_threads, settings.n_threads_batch
    params.type_k, params.type_v = GGML_TYPES[settings.type_k], GGML_TYPES[settings.type_v]
    params.flash_attn_type = (
        api.LLAMA_FLASH_ATTN_TYPE_ENABLED if settings.flash_attn else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    return params


def planned_bytes(log: list[str]) -> dict[str, int]:
    """Add up llama.cpp's logged buffers: KV cache with its state, and compute buffers in this memory."""
    text = "\n".join(log)
    kv = re.findall(r": size = +([\d.]+) MiB \(| state buffer size = +([\d.]+) MiB", text)
    compute = re.findall(r"(\S+) compute buffer size = +([\d.]+) MiB", text)
    host = [
        size for name, size in compute if name.startswith("CPU") or name.endswith("_Host") or "MTL" in name
    ]
    return {"kv_bytes": _mib([a or b for a, b in kv]), "compute_bytes": _mib(host)}


def _mib(sizes: list[str]) -> int:
    return round(sum(map(float, sizes)) * 2**20)


def _check_memory(path: str, needs: dict[str, Any], planned: dict[str, int]) -> None:
    kv = KvCacheBytes(**needs.pop("kv"))
    if kv.exactness != "exact":
        kv = KvCacheBytes({"planned by llama.cpp": planned["kv_bytes"]})
    check_fits(MemoryEstimate(kv=kv, **needs).with_compute(planned["compute_bytes"]), where=path)


def _try(path: str, settings: OpenSettings) -> None:
    """Load with a small context, evaluate a short prompt and one more token, and report."""
    _disable_suppression()
    small = dataclasses.replace(
        settings, n_ctx=min(settings.n_ctx, PROBE_CTX), n_threads=1, n_threads_batch=1
    )
    started = time.perf_counter()
    llama = build_llama(path, small)
    loaded = time.perf_counter()
    _report(stage="decode", load_seconds=loaded - started)
    tokens = [token % llama.n_vocab() for token in range(1, PREFILL_TOKENS + 1)]
    for part in (tokens, tokens[:1]):
        llama.eval(part)
        if not _finite(llama):
            raise ModelError(
                "the first decode gives logits that are not numbers",
                where=path,
                hint="the weights are damaged: verify the file's hash, or get it again",
            )
    _report(stage="done", decode_seconds=time.perf_counter() - loaded)


def _finite(llama: Any) -> bool:
    logits = llama._ctx.get_logits_ith(-1)
    return all(math.isfinite(logits[i]) for i in range(llama.n_vocab()))


def _disable_suppression() -> None:
    """Keep standard error open while llama_cpp loads: an assertion that fails is written there."""
    import llama_cpp._internals as internals
    import llama_cpp.llama as module

    for place in (internals, module):
        place.suppress_stdout_stderr = lambda disable=True: contextlib.nullcontext()


if __name__ == "__main__":
    LOG.echo = 2
    sys.exit(main())
