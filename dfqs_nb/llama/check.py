"""Will llama.cpp accept this file? Ask llama.cpp itself, in a child process (``python -m dfqs_nb.llama``).

A hostile header can abort the child, or ask for all memory: there is a ceiling on its address space while it
answers `parse` and `loader_verdict`. A `trial` also loads the weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dfqs_nb.core import child
from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.files import canonical_sha256
from dfqs_nb.core.paths import outputs_dir
from dfqs_nb.gguf.memory import KvCacheBytes, MemoryEstimate, check_fits
from dfqs_nb.llama import template
from dfqs_nb.llama.build import ERROR, INFO, LOG, build_llama, dry_run, reason_of
from dfqs_nb.llama.graph import ggml_function
from dfqs_nb.llama.settings import OpenSettings, llama_version

MODULE = "dfqs_nb.llama"
CEILING_BYTES = 8 << 30  # of address space: a hostile header asks for more
TIMEOUT_SECONDS = 60.0
TRIAL_SECONDS, TRIAL_SECONDS_PER_BYTE = 120.0, 1 / 50e6  # a slow disk
LONG_SECONDS = 5.0  # a trial that took longer is worth remembering
SMALL_CTX, PREFILL_TOKENS = 256, 8
OF_CONTEXT = {"n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "seed"}  # nothing of the file


@dataclass(frozen=True)
class Verdict:
    """llama.cpp's verdict on one file, by its parser or by its loader."""

    accepted: bool
    reason: str = ""  # why not, without the names of functions and folders
    death: str = ""  # the signal, or "timeout", that ended the process

    @property
    def sentence(self) -> str:
        """The loader's verdict for people."""
        if self.accepted:
            return "llama.cpp's loader takes this file"
        return f"llama.cpp refuses this file: {self.reason}{f' ({self.death})' if self.death else ''}"


def parse(path: str | Path) -> Verdict:
    """Does libggml's parser read the header?"""
    return verdicts([path], "parse")[0]


def loader_verdict(path: str | Path) -> Verdict:
    """Does llama.cpp's loader take headers, tokenizer and tensors, and can a context be planned?"""
    return verdicts([path])[0]


def verdicts(paths: Sequence[str | Path], question: str = "load") -> list[Verdict]:
    """Ask (``load`` or ``parse``) about files, in one process as long as they leave it alive.

    Raises `ModelError` where llama-cpp-python is not installed, or does not run at all.
    """
    answers = list[Verdict]()
    with child.Worker(MODULE) as worker:
        for path in map(Path, paths):
            job = {"question": question, "path": str(path.absolute())}
            try:
                facts = worker.run(job, timeout_seconds=TIMEOUT_SECONDS)
                accepted, log, death = facts["accepted"], facts["log"], ""
            except child.ChildDied as error:
                if not error.messages:
                    what = f"cannot run llama.cpp ({child.telling_line(list(error.log)) or error.cause})"
                    hint = "delete .venv and type `make run`: it installs llama-cpp-python again"
                    raise ModelError(what, hint=hint) from error
                accepted, log, death = False, error.log, error.cause
            folder = f"{path.parent.absolute()}{os.sep}"
            reason = reason_of([line.replace(folder, "") for line in log]) or f"llama.cpp died ({death})"
            answers.append(Verdict(accepted, "" if accepted else reason, death))
    return answers


# ---- a trial ----


def plan_memory(
    path: str | Path, settings: Sequence[OpenSettings], worker: child.Worker | None = None
) -> list[dict[str, int]]:
    """`dry_run` under each of the settings, in a child process, which a header may abort."""
    job = {"question": "plan", "path": str(path), "settings": [each.as_dict() for each in settings]}
    run = worker.run if worker else partial(child.run, MODULE)
    limit = TIMEOUT_SECONDS * (1 + len(settings))
    plans: list[dict[str, int]] = run(job, where=path, timeout_seconds=limit)["plans"]
    return plans


_tried: dict[Any, MemoryEstimate] = {}


def trial(paths: Sequence[str | Path], settings: OpenSettings, needs: MemoryEstimate) -> MemoryEstimate:
    """Plan, load and decode a model (its shards, first one first) in a child: 9 tokens, in a context of 256.

    The same files and settings are tried once a session. After a long trial, later sessions on this machine
    only plan the memory, as long as the file and llama.cpp are the same.

    Returns the estimate with llama.cpp's own figures. Raises `ModelError` where llama.cpp refuses the file,
    dies on it, or computes logits that are not numbers, and `SpaceError` where cache and compute buffer
    exceed the free memory.
    """
    stats = [(os.path.realpath(path), Path(path).stat()) for path in paths]
    files = tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)
    key = str(paths[0]), files, settings  # messages name the path as it was given
    if key in _tried:
        return _tried[key]
    loads = {name: value for name, value in settings.as_dict().items() if name not in OF_CONTEXT}
    loading = canonical_sha256([files, loads, llama_version(), platform.node()])
    passed = outputs_dir() / ".trials" / loading[:24]  # the mark of a long trial that passed
    with child.Worker(MODULE) as worker:
        plan = plan_memory(paths[0], [settings], worker)[0]
        kv = needs.kv if needs.kv.exactness == "exact" else KvCacheBytes([plan["kv_bytes"]])
        needs = replace(needs, kv=kv, compute_bytes=plan["compute_bytes"])
        check_fits(needs, where=paths[0])
        if not passed.exists():
            started = time.perf_counter()
            job = {"question": "trial", "path": str(paths[0]), "settings": settings.as_dict()}
            limit = TRIAL_SECONDS + needs.weights_bytes * TRIAL_SECONDS_PER_BYTE
            worker.run(job, where=paths[0], timeout_seconds=limit)
            if time.perf_counter() - started > LONG_SECONDS:
                passed.parent.mkdir(parents=True, exist_ok=True)
                passed.touch()
    _tried[key] = needs
    return needs


# ---- the child's side ----


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Answer one question; the child process calls this."""
    answers = {"parse": _parse, "load": _load, "plan": _plan, "trial": _try, "render": template.render}
    return dict(answers[job["question"]](job))


class _GgufParams(ctypes.Structure):
    """``struct gguf_init_params`` of gguf.h."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


def _parse(job: dict[str, Any]) -> dict[str, Any]:
    child.limit_memory(CEILING_BYTES)
    LOG.echo = ERROR
    LOG.install()
    child.tell(stage="in its parser")
    void, table = ctypes.c_void_p, ctypes.c_void_p()  # llama.cpp always asks for the table, without data
    read = ggml_function("gguf_init_from_file", void, ctypes.c_char_p, _GgufParams)
    gguf = read(os.fsencode(job["path"]), _GgufParams(True, ctypes.pointer(table)))
    ggml_function("gguf_free", None, void)(gguf)
    ggml_function("ggml_free", None, void)(table)
    return {"accepted": bool(gguf), "log": LOG.tail(level=ERROR)}


def _load(job: dict[str, Any]) -> dict[str, Any]:
    child.limit_memory(CEILING_BYTES)
    LOG.echo = ERROR
    LOG.install()  # a library that does not load is no verdict on the file
    child.tell(stage="in its loader")
    accepted = False
    with contextlib.suppress(ModelError, MemoryError):
        dry_run(job["path"], OpenSettings(n_ctx=SMALL_CTX, n_threads=1))
        accepted = True
    return {"accepted": accepted, "log": LOG.tail(level=ERROR)}


def _plan(job: dict[str, Any]) -> dict[str, Any]:
    LOG.echo = INFO
    for module in ("llama_cpp._internals", "llama_cpp.llama"):  # an assertion that fails is written there
        vars(import_module(module))["suppress_stdout_stderr"] = lambda disable=True: contextlib.nullcontext()
    child.tell(stage="while planning its memory")
    return {"plans": [dry_run(job["path"], OpenSettings(**settings)) for settings in job["settings"]]}


def _try(job: dict[str, Any]) -> dict[str, Any]:
    """Load with a small context, after `_plan`; evaluate a short prompt and one more token."""
    child.tell(stage="while loading it")
    settings = OpenSettings(**job["settings"])
    small = replace(settings, n_ctx=min(settings.n_ctx, SMALL_CTX), n_threads=1, n_threads_batch=1)
    llama = build_llama(job["path"], small)
    child.tell(stage="at the first decode")
    n_vocab = llama.n_vocab()
    tokens = [token % n_vocab for token in range(1, PREFILL_TOKENS + 1)]
    for part in (tokens, tokens[:1]):
        llama.eval(part)
        logits = np.ctypeslib.as_array(llama._ctx.get_logits_ith(-1), shape=(n_vocab,))
        if not np.isfinite(logits).all():
            what = "the first decode gives logits that are not numbers"
            hint = "the weights are damaged: verify the file's hash, or get it again"
            raise ModelError(what, where=job["path"], hint=hint)
    return {}
