"""How often the intervals of notebook 05 hold the truth, on simulated models.

    python tests/benchmarks/boundary_coverage.py [--runs 500] [--accuracy]

Each shape is an accuracy p(length). Texts differ: a fifth of an answer's variance belongs to its text. The
measurement is the package's own: planned lengths 256 to 8,192, twice the texts at the shortest, one round of
refinement, 6 keys (guess rate 1/6). The truth is the length at which p first falls below
g + 0.85 (p(256) - g). A run counts as covered when that length lies in its interval, ends included.

``--accuracy``: the intervals of an accuracy at one length instead, with texts that differ more or less.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from math import inf, log2, sqrt
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
from scipy.special import ndtri

from dfqs_nb.context.boundary import Counts, octaves, search_lengths
from dfqs_nb.stats import ratios_to_first, wilson, wilson_of_clusters

KEYS, RHO = 6, 0.2
GUESS = 1 / KEYS
GRID = octaves(256, 8192)
TEXTS = (6, 12, 24)
A_0 = 0.95
ACCURACIES = (0.5, 0.7, 0.85, 0.95, 1.0)
Accuracy = Callable[[float], float]


def through(*points: tuple[int, float]) -> Accuracy:
    """Linear in log2(length) between these points."""
    lengths, values = zip(*points, strict=True)
    return lambda length: float(np.interp(log2(length), np.log2(lengths), values))


SHAPES: dict[str, Accuracy] = {
    "gentle": lambda length: GUESS + (0.97 - GUESS) / (1 + np.exp(1.7 * (log2(length) - 11))),
    "slow linear": through((256, 0.95), (8192, 0.45)),
    "plateau, then drop": through((256, 0.9), (1500, 0.9), (3000, 0.35), (8192, 0.3)),
    "step at 1,450": lambda length: 0.9 if length < 1450 else 0.3,
    "step at 1,100": lambda length: 0.9 if length < 1100 else 0.3,
    "small step at 1,900": lambda length: 0.9 if length < 1900 else 0.6,
    "dip with recovery": through(
        (256, 0.9), (512, 0.9), (1024, 0.55), (2048, 0.88), (4096, 0.85), (8192, 0.3)
    ),
    "low a_0": through((256, 0.45), (1024, 0.42), (4096, 0.25), (8192, 0.2)),
    "never fails": lambda length: 0.85,
}


def true_boundary(p: Accuracy) -> float:
    """The first length at which ``p`` is below its own threshold, to a ten-thousandth of an octave."""
    threshold = GUESS + 0.85 * (p(256) - GUESS)
    lengths = 2 ** np.arange(8, 13.00005, 1e-4)
    return next((float(length) for length in lengths if p(length) < threshold - 1e-12), inf)


def answers(p: float, rho: float, n_texts: int, draw: np.random.Generator) -> np.ndarray:
    """Right answers of each text; ``rho`` of the variance behind an answer belongs to its text."""
    ease = draw.standard_normal((n_texts, 1)) * sqrt(rho)
    noise = draw.standard_normal((n_texts, KEYS)) * sqrt(1 - rho)
    return (ease + noise < ndtri(p)).sum(1)


def of_accuracy(p: float, rho: float, n_texts: int, runs: int, seed: int = 20261127) -> dict[str, object]:
    """A row of the table of ``--accuracy``: coverage and mean width of the accuracy's interval, and of others.

    ``curve``: coverage of the curve's interval at this accuracy, where that at the shortest length is `A_0`.
    """
    draw = np.random.default_rng([seed, n_texts, round(100 * rho), round(100 * p)])
    right = np.array([answers(p, rho, n_texts, draw) for _ in range(runs)]).T
    trials = np.full_like(right, KEYS)
    low, high = wilson_of_clusters(right, trials)
    plain_low, plain_high = wilson(right.sum(0), trials.sum(0))
    shortest = np.array([answers(A_0, rho, 2 * n_texts, draw) for _ in range(runs)]).T
    baseline = shortest.mean(0) / KEYS, *wilson_of_clusters(shortest, np.full_like(shortest, KEYS))
    truth, held = (p - GUESS) / (A_0 - GUESS), 0
    for run, own in enumerate(zip(right.mean(0) / KEYS, low, high, strict=True)):
        pairs = (np.array([first[run], value]) - GUESS for first, value in zip(baseline, own, strict=True))
        (_, least), (_, most) = ratios_to_first(*pairs)
        held += bool(least <= truth <= most)
    return {
        "accuracy": p,
        "rho": rho,
        "texts": n_texts,
        "covered": f"{np.mean((low <= p) & (p <= high)):.3f}",
        "mean width": f"{np.mean(high - low):.2f}",
        "curve": f"{held / runs:.3f}",
        "plain Wilson": f"{np.mean((plain_low <= p) & (p <= plain_high)):.3f}",
        "its width": f"{np.mean(plain_high - plain_low):.2f}",
    }


class Simulation:
    """A model that answers with probability ``p(length)``; each text is harder or easier than others."""

    def __init__(self, p: Accuracy, n_texts: int, draw: np.random.Generator) -> None:
        self.p, self.n_texts, self.draw = p, n_texts, draw
        self.right: dict[int, np.ndarray] = {}
        self.planned: dict[int, bool] = {}

    def measure(self, length: int, planned: bool) -> Counts:
        """Ask ``KEYS`` questions of each text of one length, and return all counts so far."""
        n = 2 * self.n_texts if length == GRID[0] else self.n_texts
        self.right[length] = answers(self.p(length), RHO, n, self.draw)
        self.planned[length] = planned
        return self.measured_counts()

    def measured_counts(self) -> Counts:
        """The counts of all lengths so far."""
        lengths = sorted(self.right)
        right = np.zeros((2 * self.n_texts, len(lengths)))
        trials = np.zeros_like(right)
        for column, asked in enumerate(lengths):
            values = self.right[asked]
            right[: len(values), column], trials[: len(values), column] = values, KEYS
        planned_columns = np.array([self.planned[asked] for asked in lengths])
        return Counts(np.array(lengths), right, trials, planned_columns, GUESS)


def simulate(shape: str, n_texts: int, runs: int, n_boot: int = 400, seed: int = 20261126) -> pd.DataFrame:
    """One row a run: ``tokens``, ``low``, ``high``, ``first``, ``status``, ``not_monotone``, ``covered``."""
    truth, rows = true_boundary(SHAPES[shape]), []
    draw = np.random.default_rng([seed, n_texts, *shape.encode()])
    for run in range(runs):
        counts = search_lengths(Simulation(SHAPES[shape], n_texts, draw).measure, GRID)
        found = counts.boundary(n_boot=n_boot, seed=run)
        high = inf if found.high is None else found.high
        low = found.low or 0
        rows.append(
            {
                "tokens": inf if found.right_censored else found.tokens,
                "octaves": log2(min(high, 2 * GRID[-1]) / max(1, low)),
                "status": found.status,
                "not_monotone": found.not_monotone,
                "covered": low <= truth <= high or (truth == inf and high == inf),
            }
        )
    return pd.DataFrame(rows)


def summary(shape: str, n_texts: int, runs: int) -> dict[str, object]:
    """A row of the table. Runs at the floor state no interval, and do not count."""
    frame, truth = simulate(shape, n_texts, runs), true_boundary(SHAPES[shape])
    stated = frame[frame["status"] != "floor"]
    return {
        "shape": shape,
        "true boundary": f"{truth:,.0f}" if truth < inf else "none",
        "texts": n_texts,
        "covered": f"{stated['covered'].mean():.3f}",
        "median boundary": f"{stated['tokens'].median():,.0f}".replace("inf", "not reached"),
        "median width (octaves)": f"{stated['octaves'].median():.1f}",
        "not_monotone": f"{stated['not_monotone'].mean():.3f}",
        "floor": f"{1 - len(stated) / len(frame):.3f}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--shape", choices=SHAPES, help="only this one")
    parser.add_argument("--accuracy", action="store_true", help="the intervals of an accuracy instead")
    arguments = parser.parse_args()
    if arguments.accuracy:
        cases = [(p, rho, n) for n in (12, 24) for rho in (0.0, 0.2, 0.5) for p in ACCURACIES]
        rows = [of_accuracy(*case, arguments.runs) for case in cases]
    else:
        shapes = [arguments.shape] if arguments.shape else list(SHAPES)
        rows = [summary(shape, n, arguments.runs) for shape in shapes for n in TEXTS]
    print("| " + " | ".join(rows[0]) + " |")
    print("|---|" + "--:|" * (len(rows[0]) - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
