"""Our random-token speeds against llama-bench's, on the same file, threads and build, in turn.

    python tests/benchmarks/speed.py [MODEL] [--depth 512] [--tokens 128] [--rounds 5] [--threads 1]

llama-bench is compiled from the source that llama-cpp-python vendors and linked with the very libraries that it
installed. Each round runs both, first and second swapped every round; the ratio is the median of the rounds'
ratios, because what else runs on the machine slows both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import llama_cpp_tools

from dfqs_nb.core.machine import watched_load
from dfqs_nb.core.paths import data_dir
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama import settings as llama_settings
from dfqs_nb.llama import timing as llama_timing

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"


def theirs(bench: Path, model: str, depth: int, tokens: int, threads: int) -> tuple[float, float]:
    """llama-bench's prefill of ``depth`` tokens and decode of ``tokens`` at that depth, tokens a second."""
    command = [
        str(bench),
        "-m",
        model,
        "-t",
        str(threads),
        "-ngl",
        "0",
        "--repack",
        "0",
        "-fa",
        "0",
        "-r",
        "1",
        "-b",
        "512",
        "-ub",
        "512",
        "-o",
        "json",
    ]
    speeds = []
    for what in (["-p", str(depth), "-n", "0"], ["-p", "0", "-n", str(tokens), "-d", str(depth)]):
        done = subprocess.run([*command, *what], capture_output=True, text=True, check=True)
        speeds.append(json.loads(done.stdout[done.stdout.index("[") :])[0]["avg_ts"])
    return speeds[0], speeds[1]


def ours(model: llama_model.Model, depth: int, tokens: int) -> tuple[float, float]:
    prefill, decode = llama_timing.measure_speed(model, [depth], tokens, repetitions=1)["median"]
    return prefill, decode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(NANO))
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    bench = llama_cpp_tools.tool("llama-bench")
    depth, tokens, threads = arguments.depth, arguments.tokens, arguments.threads
    settings = llama_settings.OpenSettings(n_ctx=depth + tokens, n_threads=threads)
    pairs = []
    with llama_model.open_model(arguments.model, settings) as model, watched_load() as load:
        for turn in range(arguments.rounds):

            def peer() -> tuple[float, float]:
                return theirs(bench, arguments.model, depth, tokens, threads)

            if turn % 2:
                b, a = peer(), ours(model, depth, tokens)
            else:
                a, b = ours(model, depth, tokens), peer()
            pairs.append((a, b))
    print(f"{Path(arguments.model).name}, {threads} thread(s), {arguments.rounds} rounds")
    for phase, name in enumerate((f"prefill of {depth}", f"decode of {tokens} at depth {depth}")):
        one, other = (median(pair[side][phase] for pair in pairs) for side in (0, 1))
        ratios = [a[phase] / b[phase] for a, b in pairs]
        print(
            f"{name}: ours {one:,.1f}, llama-bench {other:,.1f} tokens/s, ratio {median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )
    if load.other_cores is not None:
        print(f"other processes, llama-bench among them, used {load.other_cores:.2f} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
