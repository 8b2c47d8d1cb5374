"""Prefill and decode with the routing recorder against the same without it, in turn in one process.

    python tests/benchmarks/routing.py [MODEL] [--tokens 128] [--rounds 21]

Both models are open at once; each round decodes the same tokens with one and then the other, first and second
swapped every round, and the ratio is the median of the rounds' ratios: what else runs on the machine slows both.
On a busy machine look at the processor's time, which waiting for others does not count into.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from dfqs_nb.core.paths import data_dir
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing import open_recorded

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"


def seconds(recorded, tokens, depth: int) -> np.ndarray:
    """Seconds, a row for prefill and one for decode one by one after ``depth`` tokens: on the clock, and of
    the processor."""
    taken = []
    for before, calls in ((0, [tokens]), (depth, [[token] for token in tokens[depth:]])):
        recorded.clear()
        if before:
            recorded.feed(tokens[:before])
        started = np.array([time.perf_counter(), time.process_time()])
        for call in calls:
            recorded.feed(call)
        if recorded.recorder is not None:
            recorded.recorder.arrays()  # reducing the scores counts too
        taken.append(np.array([time.perf_counter(), time.process_time()]) - started)
    return np.array(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(NANO))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--depth", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    settings = OpenSettings(n_ctx=512, n_threads=arguments.threads)
    with (
        open_recorded(arguments.model, settings, listen=False) as plain,
        open_recorded(arguments.model, settings) as heard,
    ):
        n = arguments.depth + arguments.tokens
        tokens = np.random.default_rng(0).integers(0, plain.model.n_vocab, n).tolist()
        pairs = []
        for turn in range(arguments.rounds + 1):
            order = (plain, heard) if turn % 2 else (heard, plain)
            taken = {id(model): seconds(model, tokens, arguments.depth) for model in order}
            pairs.append((taken[id(plain)], taken[id(heard)]))
    pairs = pairs[1:]  # the first is a warm-up
    plain, heard = (np.array(column) for column in zip(*pairs, strict=True))
    for phase, (what, n_tokens) in enumerate((("prefill", n), ("decode", arguments.tokens))):
        for at, clock in enumerate(("wall clock", "processor")):
            times = plain[:, phase, at], heard[:, phase, at]
            without, with_it = (1e3 * np.median(each) / n_tokens for each in times)
            ratio = np.median(times[1] / times[0])
            print(
                f"{what:8} {clock:10} without recorder {without:.4f} ms a token, with {with_it:.4f}: "
                f"ratio {ratio:.3f}"
            )
    print(
        f"medians of {arguments.rounds} paired rounds of {n} and {arguments.tokens} tokens, {arguments.threads} thread(s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
