"""On a machine with a graphics card: routing and speed from its buffers, beside the processor's.

``python tests/benchmarks/accelerator.py [MODEL...] [--ways processor card 2] [--tokens 64] [--json FILE]``

Needs a llama-cpp-python that was built for the card (CMAKE_ARGS=-DGGML_CUDA=ON). For each model (by default the
reference model and a small specimen, which it writes and deletes) it goes these ways: the processor, all layers on the
card, and the card with the routed experts of so many layers in memory (`--n-cpu-moe`). Each way it records twice the
experts of every token, first in a batch and then one by one, compares them with the first way's, times prefill and
decode, and keeps what llama.cpp logs of its buffers. It prints a table in Markdown. Without a card it runs the same code
on the processor and says so: that is how it is tested.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from specimen import write_specimen

from dfqs_nb.gguf.memory import EXPERTS
from dfqs_nb.gguf.models import resolve
from dfqs_nb.llama import OpenSettings
from dfqs_nb.llama.build import default_params
from dfqs_nb.llama.log import LOG
from dfqs_nb.llama.timing import measure_speed
from dfqs_nb.routing.recorder import open_recorded, record

TOKENS, PROMPT, DECODE, REPETITIONS = 64, 64, 16, 3
BUFFER = re.compile(r"(\S+) +(model|KV|state|output|compute) buffer size = +([\d.]+) MiB")


@contextmanager
def experts_in_memory(n_layers: int) -> Iterator[None]:
    """Open models with the routed experts of the first layers in memory, as ``--n-cpu-moe`` does."""
    import llama_cpp.llama_cpp as api

    class Override(ctypes.Structure):
        _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]

    library = api._lib
    memory = library.ggml_backend_cpu_buffer_type
    memory.restype = ctypes.c_void_p
    patterns = [rf"blk\.{i}{EXPERTS}".encode() for i in range(n_layers)]
    rows = (Override * (n_layers + 1))(*(Override(pattern, memory()) for pattern in patterns))
    kind = dict(api.llama_model_params._fields_)["tensor_buft_overrides"]
    pointer = ctypes.cast(rows, kind)
    with default_params({"tensor_buft_overrides": pointer}) if n_layers else nullcontext():
        yield


def has_card() -> bool:
    import llama_cpp

    return bool(llama_cpp.llama_supports_gpu_offload())


def card_mib() -> int | None:
    """MiB in use on the first card, as its driver says; None without the driver's tool."""
    tool = shutil.which("nvidia-smi")
    command = [tool or "", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if tool else None
    return int(done.stdout) if done and done.stdout.strip().isdigit() else None


def buffers() -> dict[str, float]:
    """MiB of each kind of buffer on each device, added up from llama.cpp's log of the last load."""
    sums: dict[str, float] = defaultdict(float)
    for device, kind, mib in BUFFER.findall("\n".join(LOG.tail())):
        sums[f"{device} {kind}"] += float(mib)
    return {name: round(mib, 2) for name, mib in sums.items()}


def measure(path: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way: what differs from the first way, speeds, buffers."""
    n_tokens, settings = (
        options.tokens,
        OpenSettings(n_ctx=options.n_ctx, flash_attn=options.flash_attn, paging="off"),
    )
    tokens = np.random.default_rng(0).integers(3, 400, n_tokens).tolist()
    first: Any = None
    for way in options.ways:
        n_gpu_layers = -1 if has_card() and way != "processor" else 0
        n_ram = int(way) if way.isdigit() else 0
        name = f"card, experts of {way} layers in memory" if n_ram else way
        before, began = card_mib(), time.perf_counter()
        with (
            experts_in_memory(n_ram),
            open_recorded(path, replace(settings, n_gpu_layers=n_gpu_layers), trial=False) as recorded,
        ):
            loading, sizes, after = time.perf_counter() - began, buffers(), card_mib()
            sets, again = (
                np.sort(record(recorded, tokens, n_tokens // 2).experts, axis=-1) for _ in range(2)
            )
            callback = recorded.model.llama.context_params.cb_eval
            recorded.model.llama.context_params.cb_eval = type(callback)()  # time it without the recorder
            recorded.reopen(recorded.model.settings)
            depths = [options.prompt]
            speeds = measure_speed(recorded.model, depths, options.decode, options.repetitions)
            prefill, decode = speeds.to_dict("records")
            recorded.model.llama.context_params.cb_eval = callback
        first = sets if first is None else first
        differ = (sets != first).any(-1)
        yield {
            "model": path.name,
            "way": name if n_gpu_layers or way == "processor" else f"{name} (no card: processor)",
            "load, s": round(loading, 1),
            "prefill, tokens/s": round(prefill["median"], 1),
            "decode, tokens/s": round(decode["median"], 2),
            "expert sets": differ.size,
            "differ from the first way": int(differ.sum()),
            "differ when repeated": int((sets != again).any(-1).sum()),
            "differ by layer": differ.sum(axis=0).tolist(),
            "experts that differ in a set": sorted_differences(sets, first),
            "prefill": prefill,
            "decode": decode,
            "buffers, MiB": sizes,
            "card in use, MiB": [before, after, card_mib()],
        }


def sorted_differences(sets: np.ndarray, first: np.ndarray) -> dict[str, int]:
    """How many sets differ in 0, 1, 2... experts."""
    k = sets.shape[-1]
    same = (sets[..., :, None] == first[..., None, :]).any(-1).sum(-1)
    numbers, counts = np.unique(k - same, return_counts=True)
    return {str(number): int(count) for number, count in zip(numbers, counts, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="GGUF files; default: the reference model and a specimen")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens whose routing is recorded")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="timed tokens of prefill")
    parser.add_argument("--decode", type=int, default=DECODE, help="timed tokens of decode")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--n-ctx", type=int, default=1024)
    parser.add_argument(
        "--ways", nargs="+", default=["processor", "card", "2"], help="a number: layers in memory"
    )
    parser.add_argument("--flash-attn", action="store_true", help="as llama-server does where it can")
    parser.add_argument("--no-specimen", action="store_true")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(model) for model in options.models]
        if not paths:
            paths = [resolve("dfqs-nano-iq1_s-xl")[0]]
            paths += [] if options.no_specimen else [write_specimen(Path(folder) / "specimen.gguf")]
        for path in paths:
            for row in measure(path, options):
                rows.append(row)
                print(json.dumps(row), flush=True)
                if options.json:  # at once: the next way may be too slow
                    options.json.write_text(json.dumps(rows, indent=1))
    shown = [name for name, value in rows[0].items() if not isinstance(value, dict | list)]
    print("\n| " + " | ".join(shown) + " |\n|---|---|" + "--:|" * (len(shown) - 2))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in shown) + " |")


if __name__ == "__main__":
    main()
