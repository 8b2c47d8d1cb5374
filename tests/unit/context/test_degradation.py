"""The statistics of the curve against closed forms, a second implementation, and simulated models."""

from __future__ import annotations

import dataclasses
from math import log2, sqrt
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest

from dfqs_nb.context import boundary as degradation
from dfqs_nb.context.boundary import Counts, crossing, quality_boundary
from dfqs_nb.stats import non_increasing, wilson

LENGTHS = np.array([64, 128, 256, 512, 1024])
NORMAL = NormalDist()


def counts_of(successes, trials, lengths=LENGTHS) -> Counts:
    lengths = np.asarray(lengths)
    return Counts(lengths, np.asarray(successes, float), np.asarray(trials, float), lengths <= 512)


def same_answers(accuracy, n_haystacks=10, n_questions=10, lengths=LENGTHS) -> Counts:
    """Every haystack answers with exactly this accuracy."""
    right = np.tile(np.asarray(accuracy) * n_questions, (n_haystacks, 1))
    return counts_of(right, np.full_like(right, n_questions), lengths)


# ---- closed forms and second implementations ----


@pytest.mark.parametrize("right, n", [(0, 10), (1, 10), (8, 10), (10, 10), (81, 263), (15, 148)])
def test_wilson_limits_are_the_roots_of_the_score_equation(right, n):
    """The limits p solve |right/n - p| = z sqrt(p (1 - p) / n): Wilson's own definition."""
    z = NORMAL.inv_cdf(0.975)
    for p in wilson(right, n):
        assert abs(right / n - p) == pytest.approx(z * sqrt(p * (1 - p) / n), abs=1e-7)


def test_wilson_agrees_with_published_values():
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    for right, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert np.round(wilson(right, n), 4).tolist() == pytest.approx([low, high], abs=1e-4)
    assert [float(one) for one in wilson(0, 0)] == [0, 1]


def pool_adjacent_violators(successes, trials) -> list[float]:
    blocks: list[list[float]] = []
    for right, n in zip(successes, trials, strict=True):
        blocks.append([right, n, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] < blocks[-1][0] / blocks[-1][1]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    return [right / n for right, n, width in blocks for _ in range(width)]


def test_isotonic_fit_equals_pooling_adjacent_violators():
    draw = np.random.default_rng(0)
    trials = draw.integers(1, 30, (300, 9))
    successes = draw.integers(0, trials + 1)
    fits = non_increasing(successes, trials)
    for row, right, n in zip(fits, successes, trials, strict=True):
        assert row == pytest.approx(pool_adjacent_violators(right, n))


def test_crossing_is_interpolated_in_log2():
    assert crossing([100, 400], [1.0, 0.0], 0.5) == pytest.approx(200)
    assert crossing([100, 400], [1.0, 0.0], 0.25) == pytest.approx(100 * 4**0.75)
    assert crossing([100, 200, 400], [0.9, 0.9, 0.9], 0.9) == np.inf
    assert float(crossing([100, 200], [0.2, 0.1], 0.5)) == pytest.approx(100)


# ---- the boundary ----


def test_boundary_of_a_known_curve():
    """a_0 = (1 + 1 + 1 + 0.6) / 4 = 0.9; 0.85 of it is 0.765, between 1.0 at 256 and 0.6 at 512."""
    found = quality_boundary(same_answers([1, 1, 1, 0.6, 0.1]))
    assert found.a_0 == pytest.approx(0.9) and found.threshold == pytest.approx(0.765)
    assert found.tokens == round(256 * 2 ** ((1 - 0.765) / 0.4))
    assert (found.low, found.high, found.cause, found.status) == (
        found.tokens,
        found.tokens,
        "quality",
        "measured",
    )


def test_a_guess_rate_moves_the_threshold():
    found = quality_boundary(same_answers([1, 1, 1, 1, 0.5]), guess_rate=0.5)
    assert found.threshold == pytest.approx(0.5 + 0.85 * 0.5)


def test_a_model_that_never_fails_is_right_censored():
    found = quality_boundary(same_answers([1, 1, 0.9, 1, 1]))
    assert found.right_censored and found.status == "right_censored" and found.cause is None
    assert (found.tokens, found.high) == (1024, None)
    assert "holds" in found.sentence


def test_a_model_at_chance_has_no_boundary_but_a_floor():
    found = quality_boundary(same_answers([0.5, 0.5, 0.4, 0.5, 0.5]), guess_rate=0.5)
    assert (found.status, found.tokens, found.right_censored) == ("floor", 0, False)
    assert quality_boundary(same_answers([0, 0, 0, 0, 0])).status == "floor"


def test_one_haystack_gives_an_open_interval():
    found = quality_boundary(same_answers([1, 1, 1, 0.6, 0.1], n_haystacks=1))
    assert found.high is None and found.low == 0


def test_haystacks_asked_at_other_lengths_are_drawn_with_the_rest():
    """The first haystacks were not asked between the octaves: no draw of them alone may divide by zero."""
    counts = same_answers([1, 1, 0.9, 0.6, 0.1], n_haystacks=4)
    successes, trials = counts.successes.copy(), counts.trials.copy()
    successes[:3, 2] = trials[:3, 2] = 0
    found = quality_boundary(dataclasses.replace(counts, successes=successes, trials=trials))
    assert 128 < found.low <= found.tokens <= found.high < 1024


@pytest.mark.parametrize(
    "length, cause, tokens", [(2048, "quality", 362), (300, "oom", 300), (None, "quality", 362)]
)
def test_the_smaller_of_quality_and_runtime_failure(length, cause, tokens):
    measured = dataclasses.replace(quality_boundary(same_answers([1, 1, 1, 0.6, 0.1])), tokens=362)
    found = degradation.with_runtime_failure(measured, length, "oom" if length else None)
    assert (found.cause, found.tokens) == (cause, tokens)


def test_curve_is_clipped_and_carries_raw_counts():
    table = degradation.curve_table(same_answers([1, 1, 0.8, 0.8, 0.09], n_questions=100))
    assert table["curve"].between(0, 1).all() and table["curve"].iloc[-1] == pytest.approx(0.1)
    assert table["n"].tolist() == [1000] * 5 and (table["low"] < table["accuracy"])[2:].all()


def test_paired_difference_needs_the_same_questions():
    keys = [(h, 256, q) for h in range(6) for q in range(5)]
    frame = pd.DataFrame(keys, columns=["haystack", "length", "question"])
    better = frame.assign(correct=True)
    worse = frame.assign(correct=frame["question"] > 1).iloc[:-5]
    row = degradation.paired(better, worse).iloc[0]
    assert (row["n"], row["only_this"], row["only_baseline"]) == (25, 10, 0)
    assert row["difference"] == pytest.approx(0.4) and row["low"] == row["high"] == pytest.approx(0.4)


# ---- which lengths ----


class Stub:
    """A model that answers with probability p(length); haystacks differ (``rho`` of the variance is theirs)."""

    def __init__(self, p, n_haystacks, n_questions, rho, draw):
        self.p, self.shape, self.draw, self.rho = p, (n_haystacks, n_questions), draw, rho
        self.of_haystack = draw.standard_normal((n_haystacks, 1)) * sqrt(rho)
        self.seen: dict[int, tuple[np.ndarray, bool]] = {}

    def measure(self, length: int, planned: bool) -> Counts:
        noise = self.draw.standard_normal(self.shape) * sqrt(1 - self.rho)
        right = self.of_haystack + noise < NORMAL.inv_cdf(min(max(self.p(length), 1e-12), 1 - 1e-12))
        self.seen[length] = (right.sum(1), planned)
        lengths = np.array(sorted(self.seen))
        successes = np.stack([self.seen[one][0] for one in lengths], 1).astype(float)
        planned_columns = np.array([self.seen[one][1] for one in lengths])
        return Counts(
            lengths,
            successes,
            np.full(successes.shape, self.shape[1], float),
            planned_columns & (lengths <= 512),
        )


def logistic(slope: float, middle: float, top: float):
    return lambda length: top / (1 + np.exp(slope * 1.7 * (log2(length) - middle)))


def reference_model(length: float) -> float:
    """The pass-key accuracies that the reference model's own card publishes."""
    tokens, accuracy = [57, 140, 294, 418, 622, 888, 1334], [0.999, 0.975, 0.875, 0.725, 0.35, 0.25, 0.2]
    return float(np.interp(log2(length), np.log2(tokens), accuracy))


SCENARIOS = {  # p(length), haystacks, questions each, share of variance between haystacks
    "gentle, 20 x 1": (logistic(1, 9.2, 1), 20, 1, 0.0),
    "gentle, 12 x 6": (logistic(1, 9.2, 1), 12, 6, 0.2),
    "steep, 20 x 1": (logistic(3, 9.7, 0.97), 20, 1, 0.0),
    "steep, 8 x 8": (logistic(3, 9.7, 0.97), 8, 8, 0.2),
    "slow, 20 x 1": (logistic(0.7, 10.5, 0.95), 20, 1, 0.0),
    "slow, 16 x 6": (logistic(0.7, 10.5, 0.95), 16, 6, 0.2),
    "far, 20 x 1": (logistic(1.5, 11, 1), 20, 1, 0.0),
    "far, 12 x 6": (logistic(1.5, 11, 1), 12, 6, 0.2),
    "reference, 16 x 1": (reference_model, 16, 1, 0.0),
}


def true_boundary(p, grid) -> float:
    """Where p itself falls to 0.85 of its mean over the reference lengths, by bisection."""
    threshold = 0.85 * np.mean([p(length) for length in grid if length <= 512])
    low, high = 6.0, 15.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if p(2**middle) >= threshold else (low, middle)
    return 2**low


def simulate(name: str, runs: int, n_boot: int = 400, seed: int = 20261122) -> pd.DataFrame:
    p, n_haystacks, n_questions, rho = SCENARIOS[name]
    draw, grid = np.random.default_rng(seed), degradation.octaves(64, 8192)
    rows = []
    for run in range(runs):
        stub = Stub(p, n_haystacks, n_questions, rho, draw)
        found = quality_boundary(degradation.search_lengths(stub.measure, grid), n_boot=n_boot, seed=run)
        rows.append((found.tokens, found.low, found.high or np.inf, len(stub.seen)))
    return pd.DataFrame(rows, columns=["tokens", "low", "high", "n_lengths"]).assign(
        truth=true_boundary(p, grid)
    )


def summary(runs: pd.DataFrame) -> dict[str, float]:
    covered = (runs["low"] <= runs["truth"]) & (runs["truth"] <= runs["high"])
    error = (runs["tokens"] / runs["truth"] - 1).abs()
    return {
        "coverage": covered.mean(),
        "median error": error.median(),
        "bias": runs["tokens"].median() / runs["truth"].iloc[0] - 1,
    }


@pytest.mark.parametrize("name", ["reference, 16 x 1", "far, 12 x 6"])
def test_interval_covers_a_known_boundary_in_500_simulated_runs(name):
    found = summary(simulate(name, 500))
    assert 0.93 <= found["coverage"] <= 0.97, found
    assert found["median error"] < 0.15, found


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_interval_covers_known_boundaries_of_every_shape(name):
    """2000 runs each, for which the standard error of a coverage of 95 % is 0.5 %."""
    found = summary(simulate(name, 2000))
    assert 0.92 <= found["coverage"] <= 0.98, found
    assert found["median error"] < 0.2 and abs(found["bias"]) < 0.1, found


def grown(name: str, runs: int, n_boot: int = 400) -> pd.DataFrame:
    """As ``simulate``, for haystacks that grow, half as many questions at the lengths added in passing."""
    p, n_haystacks, n_questions, rho = SCENARIOS[name]
    draw, grid, rows = np.random.default_rng(4), degradation.octaves(256, 16384), []
    for run in range(runs):
        of_haystack, seen = draw.standard_normal(n_haystacks) * sqrt(rho), {}

        def measure(haystack, length, planned, of_haystack=of_haystack, seen=seen):
            n = n_questions if planned else max(1, n_questions // 2)
            noise = of_haystack[haystack] + draw.standard_normal(n) * sqrt(1 - rho)
            seen[haystack, length] = (
                (noise < NORMAL.inv_cdf(min(max(p(length), 1e-12), 1 - 1e-12))).sum(),
                n,
            )
            lengths = sorted({one for _, one in seen})
            cells = np.array(
                [[seen.get((h, one), (0, 0)) for one in lengths] for h in range(haystack + 1)], float
            )
            short = np.array([one in grid and one <= 512 for one in lengths])
            return Counts(np.array(lengths), cells[..., 0], cells[..., 1], short)

        found = quality_boundary(
            degradation.search_haystacks(measure, grid, n_haystacks), n_boot=n_boot, seed=run
        )
        rows.append((found.tokens, found.low, found.high or np.inf, len(seen)))
    return pd.DataFrame(rows, columns=["tokens", "low", "high", "n_cells"]).assign(
        truth=true_boundary(p, grid)
    )


def test_interval_covers_a_known_boundary_for_haystacks_that_grow():
    found = summary(grown("gentle, 12 x 6", 500))
    assert 0.93 <= found["coverage"] <= 0.97, found
    assert found["median error"] < 0.15, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["steep, 8 x 8", "slow, 16 x 6", "far, 12 x 6"])
def test_interval_for_haystacks_that_grow_covers_boundaries_of_every_shape(name):
    """Fewer lengths are added than to texts made for their length, so a steep fall is placed less finely."""
    found = summary(grown(name, 1000))
    assert 0.9 <= found["coverage"] <= 0.98, found
    assert found["median error"] < 0.15, found


def test_search_stops_early_and_returns_to_the_crossing():
    stub = Stub(logistic(3, 9, 1), 20, 5, 0.0, np.random.default_rng(1))
    counts = degradation.search_lengths(stub.measure, degradation.octaves(64, 2**20))
    assert max(stub.seen) == 1024, "512 and 1024 fail beyond doubt, which is enough"
    assert [length for length, (_, planned) in stub.seen.items() if not planned][:3] == [181, 362, 724]
    assert counts.lengths.tolist() == sorted(stub.seen)


def test_search_ends_where_the_runtime_fails():
    stub = Stub(lambda _length: 1.0, 4, 4, 0.0, np.random.default_rng(1))
    counts = degradation.search_lengths(
        lambda length, planned: stub.measure(length, planned) if length < 1000 else None,
        [256, 512, 1024, 2048],
    )
    assert counts.lengths.tolist() == [256, 512]
    assert quality_boundary(counts).right_censored


def test_search_is_the_same_when_repeated_from_stored_counts():
    stub = Stub(reference_model, 16, 1, 0.0, np.random.default_rng(5))
    first = degradation.search_lengths(stub.measure, degradation.octaves(64, 4096))
    order, stored = list(stub.seen), dict(stub.seen)
    again = Stub(reference_model, 16, 1, 0.0, np.random.default_rng(99))

    def replay(length, planned):
        again.seen[length] = stored[length]
        lengths = np.array(sorted(again.seen))
        return dataclasses.replace(
            first,
            lengths=lengths,
            successes=np.stack([stored[n][0] for n in lengths], 1).astype(float),
            trials=np.ones((16, len(lengths))),
            reference=np.array([stored[n][1] for n in lengths]) & (lengths <= 512),
        )

    degradation.search_lengths(replay, degradation.octaves(64, 4096))
    assert list(again.seen) == order
