"""Reading a header of the real artifact's size: ours, gguf-py's and libggml's, side by side.

``python tests/benchmarks/header.py [runs]``: each reading is a fresh process on one sparse file of 62 GB
(129,280 tokens, 1,328 tensors); its time is taken around the call, and around the whole process; its
memory is the process's peak. Medians are printed, and the ratio to ours. Targets: under 0.2 s and 60 MB.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: a process starts with the peak of the one it was forked from.
MAKE = (
    "import sys; sys.path[:0] = ['tests/support']; import gguf_fixtures as g; g.real_size_header(sys.argv[1])"
)
# Each prints the seconds of the reading itself: from the call to a tensor table and one short value.
READERS = {
    "ours": "from dfqs_nb.gguf.header import read_header as read; show = lambda h: (h.architecture, h.tensors[-1])",
    "ours, all tokens too": "from dfqs_nb.gguf.header import read_header as read\n"
    "show = lambda h: h['tokenizer.ggml.tokens'][-1]",
    "libggml, in a child": "from dfqs_nb.llama.check import parse as read; show = lambda p: p.accepted",
    "gguf.GGUFReader": "from gguf import GGUFReader as read\n"
    "show = lambda r: (r.fields['general.architecture'].contents(), r.tensors[-1].name)",
}
TIMED = "\nimport sys, time; began = time.perf_counter(); show(read(sys.argv[1])); print(time.perf_counter() - began)"


def measure(command: list[str]) -> dict[str, float]:
    """Run one process; its wall seconds, its peak memory in MB, and the seconds that it prints."""
    with tempfile.TemporaryFile("w+") as out:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # it is reaped: Popen must not wait again
        wall = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"{command[-2]!r} ended with {process.returncode}")
        out.seek(0)
        lines = out.read().split()
    unit = 1e6 if sys.platform == "darwin" else 1e6 / 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    call = float(lines[0]) if command[1] == "-c" else float("nan")
    return {"call_s": call, "process_s": wall, "peak_mb": usage.ru_maxrss / unit}


def benchmark(runs: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/artifact.gguf"
        subprocess.run([sys.executable, "-c", MAKE, path], check=True, cwd=ROOT)
        commands = {name: [sys.executable, "-c", code + TIMED, path] for name, code in READERS.items()}
        inspect = [sys.executable, "-m", "dfqs_nb", "inspect"]
        if subprocess.run([*inspect, "--help"], capture_output=True, cwd=ROOT, check=False).returncode == 0:
            commands["dfqs-nb inspect"] = [*inspect, path]
        results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(runs):  # in turn, so that a busy minute is shared by all
            for name, command in commands.items():
                results[name].append(measure(command))
    return {
        name: {key: statistics.median(one[key] for one in rows) for key in rows[0]}
        for name, rows in results.items()
    }


def table(medians: dict[str, dict[str, float]], runs: int) -> str:
    ours = medians["ours"]
    lines = [
        f"median of {runs} runs, {os.cpu_count()} cores, Python {sys.version.split()[0]}",
        "",
        "| reader | call (s) | x ours | process (s) | x ours | peak (MB) | x ours |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in medians.items():
        cells = [
            f"{row[key]:.{digits}f} | {row[key] / ours[key]:.1f}" if row[key] == row[key] else " | "
            for key, digits in (("call_s", 3), ("process_s", 2), ("peak_mb", 0))
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    n_runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    measured = benchmark(n_runs)
    print(table(measured, n_runs))
