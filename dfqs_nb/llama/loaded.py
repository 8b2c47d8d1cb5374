"""How llama.cpp loaded a model, from its own log: what ran, not what was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def loaded_facts(log: str) -> dict[str, Any]:
    """What the log of a load states.

    Returns:
        ``layers_offloaded`` to a GPU, like ``0/9``, or ``no GPU support``; ``offloaded_layers``, this as a
        number (None: not logged); ``buffers`` of the weights, like ``CPU_Mapped 5.46 MiB``; and ``repacked``:
        whether weights were copied into another layout for this processor.

    >>> loaded_facts("load_tensors:   CPU_Mapped model buffer size =     5.44 MiB")["layers_offloaded"]
    'no GPU support'
    >>> loaded_facts("load_tensors: offloaded 5/9 layers to GPU")["offloaded_layers"]
    5
    """
    layers = re.search(r"offloaded (\d+)/\d+ layers to GPU", log)
    buffers = [
        f"{name} {size} MiB" for name, size in re.findall(r"(\S+) +model buffer size = +([\d.]+) MiB", log)
    ]
    known = 0 if buffers else None
    return {
        "layers_offloaded": layers[0].split()[1] if layers else "no GPU support" if buffers else "not logged",
        "offloaded_layers": int(layers[1]) if layers else known,
        "buffers": ", ".join(buffers),
        "repacked": any(re.search("REPACK|AMX|KLEIDIAI", name) for name in buffers) if buffers else None,
    }


def planned_bytes(log: Sequence[str]) -> dict[str, int]:
    """Add up llama.cpp's logged buffers: KV cache with its state, and compute buffers in this memory."""
    text = "\n".join(log)
    kv = re.findall(r": size = +([\d.]+) MiB \(| state buffer size = +([\d.]+) MiB", text)
    compute = re.findall(r"(\S+) compute buffer size = +([\d.]+) MiB", text)
    in_memory = [
        size for name, size in compute if name.startswith("CPU") or name.endswith("_Host") or "MTL" in name
    ]
    mebibytes = {"kv_bytes": [a or b for a, b in kv], "compute_bytes": in_memory}
    return {name: round(sum(map(float, sizes)) * 2**20) for name, sizes in mebibytes.items()}
