"""On a machine with a graphics card: routing and speed from its buffers, beside the processor's.

``python tests/benchmarks/accelerator.py [MODEL...] [--tokens 64] [--layers-in-ram 2]``

Needs a llama-cpp-python that was built for the card (CMAKE_ARGS=-DGGML_CUDA=ON). For each model (by default the
reference model and a small specimen, which it writes and deletes) it loads all layers on the card, and once more with
the routed experts of some layers in memory (`--n-cpu-moe`), records the experts of every token, compares them with
the processor's, times prefill and decode, and prints a table in Markdown. Without a card it runs the same code on the
processor and says so: that is how it is tested.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from specimen import write_specimen

from dfqs_nb.gguf.models import resolve
from dfqs_nb.gguf.placement import EXPERTS
from dfqs_nb.llama import OpenSettings, open_model
from dfqs_nb.llama.build import default_params
from dfqs_nb.llama.timing import measure_speed
from dfqs_nb.routing import open_recorded
from dfqs_nb.routing.recorded import record

TOKENS, DECODE, REPETITIONS = 64, 16, 3


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


def measure(path: Path, n_tokens: int, in_ram: int) -> list[dict[str, Any]]:
    """Processor, card, and card with experts in memory: speed, and how many expert sets differ from the first."""
    settings = OpenSettings(n_ctx=max(256, 2 * n_tokens))
    layers = -1 if has_card() else 0
    ways = {
        "processor": (0, 0),
        "card": (layers, 0),
        f"card, experts of {in_ram} layers in memory": (layers, in_ram),
    }
    tokens = np.random.default_rng(0).integers(3, 400, n_tokens).tolist()
    rows: list[dict[str, Any]] = []
    first: Any = None
    for name, (n_gpu_layers, n_ram) in ways.items():
        at = replace(settings, n_gpu_layers=n_gpu_layers)
        with experts_in_memory(n_ram):
            with open_recorded(path, at) as recorded:
                trace = record(recorded, tokens)
            with open_model(path, at, trial=False) as model:
                prefill, decode = measure_speed(model, n_tokens, DECODE, REPETITIONS)
        sets = np.sort(trace.experts, axis=-1)
        first = sets if first is None else first
        rows.append(
            {
                "model": path.name,
                "way": name if n_gpu_layers or name == "processor" else f"{name} (no card: processor)",
                "prefill, tokens/s": round(prefill["median"], 1),
                "decode, tokens/s": round(decode["median"], 1),
                "expert sets": int(np.prod(sets.shape[:-1])),
                "differ": int((sets != first).any(-1).sum()),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="GGUF files; default: the reference model and a specimen")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--layers-in-ram", type=int, default=2)
    parser.add_argument("--no-specimen", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(model) for model in options.models]
        if not paths:
            paths = [resolve("dfqs-nano-iq1_s-xl")[0]]
            paths += [] if options.no_specimen else [write_specimen(Path(folder) / "specimen.gguf")]
        rows = [row for path in paths for row in measure(path, options.tokens, options.layers_in_ram)]
    print(json.dumps(rows, indent=1))
    print("\n| " + " | ".join(rows[0]) + " |\n|---|---|" + "--:|" * (len(rows[0]) - 2))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
