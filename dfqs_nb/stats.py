"""Every interval and every test of the workbook."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    pass


from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


from math import comb
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


LEVEL = 0.95


# The bootstrap's quantiles are taken at 96 %: an isotonic fit is not smooth, so at 95 % its percentile
# interval covered the truth in 92-96 % of simulated runs, and at 96 % in 94-97 % (tests/test_degradation.py).
BOOTSTRAP_LEVEL = 0.96


N_BOOT = 2000


def wilson(successes: Any, n: Any, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval for a share of ``n`` (Wilson 1927, JASA 22:209); (0, 1) where ``n`` is 0.

    >>> low, high = wilson(8, 10)
    >>> round(float(low), 3), round(float(high), 3)
    (0.49, 0.943)
    """
    successes, n = np.asarray(successes, float), np.asarray(n, float)
    z = NormalDist().inv_cdf((1 + level) / 2)
    safe = np.maximum(n, 1)
    share = successes / safe
    centre = (share + z**2 / (2 * safe)) / (1 + z**2 / safe)
    half = z * np.sqrt(share * (1 - share) / safe + z**2 / (4 * safe**2)) / (1 + z**2 / safe)
    low, high = np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
    return np.where(n > 0, low, 0.0), np.where(n > 0, high, 1.0)


def non_increasing(successes: Any, trials: Any) -> np.ndarray:
    """The non-increasing accuracies nearest to these counts, along the last axis (isotonic least squares).

    Each is min over a <= i of max over b >= i of the pooled accuracy from a to b (Barlow et al. 1972, 1.4);
    the same as pooling adjacent violators, but for many rows at once. Every ``trials`` must be positive.

    >>> non_increasing([9, 10, 4], [10, 10, 10]).tolist()
    [0.95, 0.95, 0.4]
    """
    right, n = np.broadcast_arrays(np.asarray(successes, float), np.asarray(trials, float))
    zero = np.zeros((*right.shape[:-1], 1))
    rights, totals = (np.concatenate([zero, np.cumsum(one, -1)], -1) for one in (right, n))
    fit = np.full(right.shape, inf)
    for a in range(right.shape[-1]):
        pooled = (rights[..., a + 1 :] - rights[..., a : a + 1]) / (
            totals[..., a + 1 :] - totals[..., a : a + 1]
        )
        best = np.maximum.accumulate(pooled[..., ::-1], -1)[..., ::-1]
        fit[..., a:] = np.minimum(fit[..., a:], best)
    return fit


def bootstrap_weights(n_haystacks: int, n_boot: int, seed: int) -> np.ndarray:
    """How often each haystack is drawn: ``(n_boot, n_haystacks)``, rows summing to ``n_haystacks``."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(n_haystacks, np.full(n_haystacks, 1 / n_haystacks), n_boot).astype(float)


def expanded_tail(n: int, level: float = BOOTSTRAP_LEVEL) -> float:
    """The tail probability of an expanded percentile interval from ``n`` clusters.

    >>> round(expanded_tail(8), 4), round(expanded_tail(10_000), 4)
    (0.0036, 0.02)
    """
    return NormalDist().cdf(sqrt(n / (n - 1)) * student_quantile((1 - level) / 2, n - 1))


def student_quantile(p: float, df: int) -> float:
    """Student's t quantile by its expansion in 1 / df (Abramowitz & Stegun 26.7.5); to 0.5 % from 4 df on.

    >>> round(student_quantile(0.975, 10), 3)
    2.228
    """
    z = NormalDist().inv_cdf(p)
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * df**4)
    )


LEAST_VALUES = 6  # for an interval: of fewer, a bootstrap's is too narrow to be called one of 95 %


def mean_interval(values: np.ndarray, n_boot: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of independent values by the expanded bootstrap; NaN for fewer than
    ``LEAST_VALUES``.

    >>> mean_interval(np.array([0.1, 0.2, 0.3]))
    (nan, nan)
    """
    n = len(values)
    if n < LEAST_VALUES:
        return float("nan"), float("nan")
    drawn = bootstrap_weights(n, n_boot, seed) @ values / n
    tail = expanded_tail(n, LEVEL)
    return float(np.quantile(drawn, tail)), float(np.quantile(drawn, 1 - tail))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar test (McNemar 1947, Psychometrika 12:153): a fair coin for each discordant
    item.

    >>> mcnemar(0, 0), mcnemar(1, 5), round(mcnemar(0, 10), 6)
    (1.0, 0.21875, 0.001953)
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(comb(n, k) for k in range(fewer + 1)) / 2**n)


def holm(p: Sequence[float]) -> list[float]:
    """P values adjusted for their number (Holm 1979, Scandinavian Journal of Statistics 6:65), in order.

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted
