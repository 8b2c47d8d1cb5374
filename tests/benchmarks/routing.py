"""What the routing recorder costs in prefill and decode: the same tokens in turn in one process, without a callback, with
one that answers no to every node, with stops at the routers that copy nothing, and with the recorder.

    python tests/benchmarks/routing.py [MODEL] [--tokens 128] [--rounds 21]

All four models are open at once; each round evaluates the same tokens with each, in another order, and a ratio is the median
of the rounds' ratios: what else runs on the machine slows all. On a busy machine look at the processor's time, which
waiting for others does not count into.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from dfqs_nb.core.paths import data_dir
from dfqs_nb.llama.build import default_params
from dfqs_nb.llama.graph import Watch
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing import RecordedModel, open_recorded
from dfqs_nb.routing.recorder import Recorder

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
        recorded.recorder.arrays()  # reducing the scores counts too
        taken.append(np.array([time.perf_counter(), time.process_time()]) - started)
    return np.array(taken)


class _No(dict):
    """No to every node of the graph."""

    def __missing__(self, address: int) -> bool:
        self[address] = False
        return False


def listened(stack: ExitStack, path: str, settings: OpenSettings, callback) -> RecordedModel:
    """The model with another callback."""
    with default_params(cb_eval=callback):
        model = stack.enter_context(open_model(path, settings))
    return RecordedModel(model, Recorder())  # which llama.cpp does not call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(NANO))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--depth", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    settings = OpenSettings(n_ctx=512, n_threads=arguments.threads)
    no, watch = _No(), Watch()
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(no.__getitem__)
    with ExitStack() as stack:
        models = [
            RecordedModel(stack.enter_context(open_model(arguments.model, settings)), Recorder()),
            listened(stack, arguments.model, settings, ctypes.cast(answer, type(watch.callback))),
            listened(stack, arguments.model, settings, watch.callback),
            stack.enter_context(open_recorded(arguments.model, settings)),
        ]
        n = arguments.depth + arguments.tokens
        tokens = np.random.default_rng(0).integers(0, models[0].model.n_vocab, n).tolist()
        taken = np.zeros((arguments.rounds + 1, len(models), 2, 2))
        for turn in range(arguments.rounds + 1):
            for place in range(len(models)):
                which = (place + turn) % len(models)
                taken[turn, which] = seconds(models[which], tokens, arguments.depth)
    taken = taken[1:]  # the first is a warm-up
    for phase, (what, n_tokens) in enumerate((("prefill", n), ("decode", arguments.tokens))):
        for clock, name in enumerate(("wall clock", "processor")):
            times = taken[:, :, phase, clock]
            each = 1e3 * np.median(times, axis=0) / n_tokens
            ratios = np.median(times / times[:, :1], axis=0)
            rows = zip(("without", "no to all", "stops", "recorder"), each, ratios, strict=True)
            print(
                f"{what:8}{name:11}"
                + "; ".join(f"{name} {ms:.4f} ms ({ratio:.3f})" for name, ms, ratio in rows)
            )
    print(
        f"medians a token of {arguments.rounds} rounds of {n} and {arguments.tokens} tokens, {len(no)} nodes, "
        f"{arguments.threads} thread(s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
