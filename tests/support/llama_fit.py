"""llama.cpp's own plan of a model's memory by device, in bytes, and its `--fit`, through a small program.

The program (`llama_fit.cpp`) calls the functions that llama-server and llama-fit-params call. It reads no weights.
"""

from __future__ import annotations

import bisect
import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dfqs_nb.gguf.facts import layer_of
from dfqs_nb.gguf.header import GGUFHeader, padded
from dfqs_nb.gguf.memory import EXPERTS


def ask(
    program: str | Path, model: str | Path, jobs: Iterable[str], seconds: float = 600
) -> list[dict[str, Any]]:
    """The answers to these jobs, in order; see the head of `llama_fit.cpp`."""
    done = subprocess.run(
        [str(program), str(model)],
        input="".join(f"{job}\n" for job in jobs),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr[-2000:]
    return answers


def words_of(flags: Sequence[str]) -> str:
    """A placement's flags as words of a job."""
    words = dict(zip(flags[::2], flags[1::2], strict=True))
    job = [f"ngl={words['-ngl']}"]
    job += [f"ts={words['-ts']}"] if "-ts" in words else []
    return " ".join(job + [f"ot={pattern}" for pattern in patterns_of(flags)])


def patterns_of(flags: Sequence[str]) -> list[str]:
    """The tensors that these flags keep in memory, as patterns."""
    words = dict(zip(flags[::2], flags[1::2], strict=True))
    patterns = [rf"blk\.{i}{EXPERTS}" for i in range(int(words.get("--n-cpu-moe", 0)))]
    return patterns + ([words["-ot"].removesuffix("=CPU")] if "-ot" in words else [])


def replay(header: GGUFHeader, flags: Sequence[str], n_devices: int, alignment: int = 1) -> list[int]:
    """Bytes of weights on each card and in memory, by llama.cpp's own rules applied to a command line.

    ``load_tensors`` of src/llama-model.cpp and the overrides of common/arg.cpp, tensor by tensor. A buffer pads
    each tensor to its ``alignment``: 128 bytes for CUDA, 32 for a processor.
    """
    words = dict(zip(flags[::2], flags[1::2], strict=True))
    n_layers, n_gpu, patterns = header.n_layers, int(words["-ngl"]), patterns_of(flags)
    shares = [float(part) for part in words.get("-ts", "1").split(",")][:n_devices]
    splits = [sum(shares[: i + 1]) / sum(shares) for i in range(len(shares))]
    start, active = max(n_layers + 1 - n_gpu, 0), min(n_gpu, n_layers + 1)
    held = [0] * (n_devices + 1)
    for tensor in header.tensors:
        layer = layer_of(tensor.name)
        at = n_layers if layer is None else layer
        device = -1
        if tensor.name != "token_embd.weight" and n_devices and start <= at < start + active:
            device = bisect.bisect_right(splits, (at - start) / active)
        if any(re.search(pattern, tensor.name) for pattern in patterns):
            device = -1
        held[device] += padded(tensor.nbytes, alignment)
    return held
