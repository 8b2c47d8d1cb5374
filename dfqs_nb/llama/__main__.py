"""The child process that `check` and `ChatTemplate` ask, as a hostile file can abort it."""

from __future__ import annotations

import ctypes
import os
import random
import signal
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import psutil

from dfqs_nb.core import child
from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama.build import build_llama, dry_run, refusal
from dfqs_nb.llama.graph import ggml_function
from dfqs_nb.llama.log import LOG
from dfqs_nb.llama.settings import OpenSettings

CEILING_BYTES = 8 << 30  # of address space: a hostile header asks for more
SMALL_CTX, PREFILL_TOKENS = 256, 8
CLOCK = datetime(2026, 1, 1, 12)  # of a chat template
MAX_CHARACTERS, TEMPLATE_BYTES = 1 << 24, 1 << 30  # of a rendered chat; of address space beside the import


class GgufParams(ctypes.Structure):
    """``struct gguf_init_params`` of gguf.h."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


def parse(job: dict[str, Any]) -> None:
    """Have libggml's parser read the header; raises `ModelError` if it refuses it."""
    child.limit_memory(CEILING_BYTES)
    LOG.install()
    child.tell(stage="in its parser")
    void, table = ctypes.c_void_p, ctypes.c_void_p()  # llama.cpp always asks for the table, without data
    read = ggml_function("gguf_init_from_file", void, ctypes.c_char_p, GgufParams)
    if not (gguf := read(os.fsencode(job["path"]), GgufParams(True, ctypes.pointer(table)))):
        raise refusal(job["path"])
    ggml_function("gguf_free", None, void)(gguf)
    ggml_function("ggml_free", None, void)(table)


def load(job: dict[str, Any]) -> None:
    """Have the loader read headers, tokenizer and tensors, and plan a small context; raises as `parse`."""
    child.limit_memory(CEILING_BYTES)
    LOG.install()  # a library that does not load is no verdict on the file
    child.tell(stage="in its loader")
    dry_run(job["path"], OpenSettings(n_ctx=SMALL_CTX, n_threads=1))


def plan(job: dict[str, Any]) -> dict[str, Any]:
    """What memory do these settings take?"""
    child.tell(stage="while planning its memory")
    return {"plans": [dry_run(job["path"], OpenSettings(**settings)) for settings in job["settings"]]}


def trial(job: dict[str, Any]) -> None:
    """Load with a small context, tell how fast, and evaluate a short prompt and one more token."""
    child.tell(stage="while loading it")
    settings = OpenSettings(**job["settings"])
    small = replace(settings, n_ctx=min(settings.n_ctx, SMALL_CTX), n_threads=1, n_threads_batch=1)
    llama, _, _, loading_speed = build_llama(job["path"], small, verbose=True)
    child.tell(stage="at the first decode", loading_speed=loading_speed)
    n_vocab = llama.n_vocab()
    tokens = [token % n_vocab for token in range(1, PREFILL_TOKENS + 1)]
    for part in (tokens, tokens[:1]):
        llama.eval(part)
        if not np.isfinite(np.ctypeslib.as_array(llama._ctx.get_logits_ith(-1), shape=(n_vocab,))).all():
            what = "the first decode gives logits that are not numbers"
            hint = "the weights are damaged: verify the file's hash, or get it again"
            raise ModelError(what, where=job["path"], hint=hint)


def render(job: dict[str, Any]) -> dict[str, str]:
    """Render one chat by llama-cpp-python's formatter: the text, or the fault. A signal ends it in time."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    random.seed(0)
    child.limit_memory(psutil.Process().memory_info().vms + TEMPLATE_BYTES)
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])
    try:
        formatter: Any = Jinja2ChatFormatter(job["source"], eos_token=job["eos"], bos_token=job["bos"])
        formatter.strftime_now = CLOCK.strftime
        text = formatter(**job["chat"]).prompt
    except Exception as error:  # the template is code: it may raise anything; Jinja raises its own errors
        return {"fault": (str(error) or type(error).__name__)[:300]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if len(text) > MAX_CHARACTERS:
        return {"fault": f"its text exceeds {MAX_CHARACTERS:,} characters"}
    return {"text": text}


QUESTIONS: dict[str, Any] = {each.__name__: each for each in (parse, load, plan, trial, render)}

if __name__ == "__main__":
    child.serve(lambda job: QUESTIONS[job["question"]](job))
