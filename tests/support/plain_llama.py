"""llama-cpp-python used plainly, as its documentation does, in a process of its own: ``python -m plain_llama``.

What may abort ends there and not the test run. On a processor with AMX its default parameters crash at the first
decode (ggml-org/llama.cpp#20824), so there, and only there, it gets ``use_extra_bufts=False``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from dfqs_nb.core import child
from dfqs_nb.core.machine import has_amx
from dfqs_nb.llama.build import default_params

SUPPORT = str(Path(__file__).parent)


def answer(path: Path, prompt: str, max_tokens: int = 40) -> dict[str, Any]:
    """The greedy answer to a chat: ``text``, ``n_prompt`` and ``finish_reason``."""
    return child.run(
        "plain_llama", {"path": str(path), "prompt": prompt, "max_tokens": max_tokens}, where=path
    )


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Open the model and answer the prompt, or decode two tokens where the job has none."""
    import llama_cpp

    safe = default_params({"use_extra_bufts": False}) if has_amx() else contextlib.nullcontext()
    with safe:
        llama = llama_cpp.Llama(job["path"], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    if "prompt" not in job:
        llama.eval([1, 2])
        return {}
    answered = llama.create_chat_completion(
        [{"role": "user", "content": job["prompt"]}],
        temperature=0.0,
        repeat_penalty=1.0,
        max_tokens=job["max_tokens"],
    )
    choice = answered["choices"][0]
    return {
        "text": choice["message"]["content"],
        "n_prompt": answered["usage"]["prompt_tokens"],
        "finish_reason": choice["finish_reason"],
    }


if __name__ == "__main__":
    child.serve(work)
