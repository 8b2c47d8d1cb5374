"""Every interval and every test of the workbook, on scipy's distributions."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
# The bootstrap's quantiles are taken at 96 %: an isotonic fit is not smooth, so at 95 % its percentile
# interval covered the truth in 92-96 % of simulated runs, and at 96 % in 94-97 %.
BOOTSTRAP_LEVEL = 0.96
N_BOOT = 2000
LEAST_VALUES = 6  # with fewer, a bootstrap interval is too narrow


def wilson(successes: Any, n: Any, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Wilson's score interval for a share of ``n`` (Wilson 1927, JASA 22:209); (0, 1) where ``n`` is 0.

    By hand, because it takes whole arrays and scipy's takes one count.

    >>> low, high = wilson(8, 10)
    >>> round(float(low), 3), round(float(high), 3)
    (0.49, 0.943)
    """
    from scipy.special import ndtri

    successes, n = np.asarray(successes, float), np.asarray(n, float)
    z = float(ndtri((1 + level) / 2))
    safe = np.maximum(n, 1)
    share = successes / safe
    centre = (share + z**2 / (2 * safe)) / (1 + z**2 / safe)
    half = z * np.sqrt(share * (1 - share) / safe + z**2 / (4 * safe**2)) / (1 + z**2 / safe)
    # at 0 and at n successes the bounds are exact, despite rounding
    low = np.where(successes > 0, np.clip(centre - half, 0, 1), 0.0)
    high = np.where(successes < safe, np.clip(centre + half, 0, 1), 1.0)
    return np.where(n > 0, low, 0.0), np.where(n > 0, high, 1.0)


def wilson_of_clusters(successes: Any, trials: Any, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Wilson's interval of the share in each column, where the trials of a row (a text) are correlated.

    The number of trials is divided by the design effect, which is the variance between rows over that of
    independent trials, at least 1. It is also divided by the square of t over z, t with a degree of freedom
    fewer than rows (Korn and Graubard 1998, Survey Methodology 24:193). A row without trials was not asked.

    >>> low, high = wilson_of_clusters([[6], [6], [0], [6]], np.full((4, 1), 6))
    >>> [round(float(value), 2) for value in (*low, *high, *wilson(18, 24))]
    [0.13, 0.98, 0.55, 0.88]
    """
    from scipy.special import ndtri, stdtrit

    rows, trials = np.asarray(successes, float), np.asarray(trials, float)
    right, n, n_rows = rows.sum(0), trials.sum(0), (trials > 0).sum(0)
    if trials.max(initial=0) <= 1:
        return wilson(right, n, level)
    share, freedom, tail = right / np.maximum(n, 1), np.maximum(1, n_rows - 1), (1 + level) / 2
    between = ((rows - share * trials) ** 2).sum(0) * n_rows / freedom
    independent = np.where((share > 0) & (share < 1), share * (1 - share) * n, inf)
    design_effect = np.maximum(1, between / independent)
    t_over_z = np.where(n_rows > 1, stdtrit(freedom, tail) / ndtri(tail), inf)
    divisor = np.clip(design_effect * t_over_z**2, 1, np.maximum(1, n))  # at least one trial is left
    return wilson(right / divisor, n / divisor, level)


def ratios_to_first(values: Floats, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """The interval of each value over the first, from the intervals of independent values.

    MOVER-R (Newcombe 2016, Statistical Methods in Medical Research 25:1774), for a / b with a from l to u and
    b from m to v: from (ab - sqrt((ab)^2 - l(2a - l) v(2b - v))) / (v(2b - v)) up to the same with + and u, m
    in place of l, v. NaN for the first value itself, and for all where the first may be 0.

    >>> low, high = ratios_to_first(*np.array([[0.8, 0.4], [0.7, 0.3], [0.9, 0.5]]))
    >>> [round(float(value), 3) for value in (low[1], high[1])]
    [0.367, 0.649]
    """
    first, down, up = (float(it[0]) if len(it) else 0.0 for it in (values, low, high))
    if not 0 < down <= up < 2 * first:
        return np.full(len(values), nan), np.full(len(values), nan)

    def end(own: Floats, other: float, sign: int) -> Floats:
        both, scale = values * first, other * (2 * first - other)
        ratios: Floats = (both + sign * np.sqrt(both**2 - own * (2 * values - own) * scale)) / scale
        return np.append(nan, ratios[1:])

    return end(low, up, -1), end(high, down, 1)


def at_most(n_events: int, n: int) -> float:
    """The exact 95 % upper bound on a rate, one-sided (Clopper and Pearson 1934); 1.0 without trials.

    >>> round(at_most(0, 4), 3), round(at_most(0, 1152), 4), at_most(0, 0)
    (0.527, 0.0026, 1.0)
    """
    from scipy.stats import binomtest

    return float(binomtest(n_events, n).proportion_ci(0.90, method="exact").high) if n else 1.0


def non_increasing(successes: Any, trials: Any) -> Floats:
    """The non-increasing accuracies nearest to these counts, along the last axis (isotonic least squares).

    Each is min over a <= i of max over b >= i of the pooled accuracy from a to b (Barlow et al. 1972, 1.4).
    By hand, because it fits thousands of rows at once and scipy fits one. Every ``trials`` must be positive.

    >>> non_increasing([9, 10, 4], [10, 10, 10]).tolist()
    [0.95, 0.95, 0.4]
    """
    right, n = np.broadcast_arrays(np.asarray(successes, float), np.asarray(trials, float))
    zero = np.zeros((*right.shape[:-1], 1))
    rights, totals = (np.concatenate([zero, np.cumsum(counts, -1)], -1) for counts in (right, n))
    fit = np.full(right.shape, inf)
    for a in range(right.shape[-1]):
        pooled = (rights[..., a + 1 :] - rights[..., a : a + 1]) / (
            totals[..., a + 1 :] - totals[..., a : a + 1]
        )
        best = np.maximum.accumulate(pooled[..., ::-1], -1)[..., ::-1]
        fit[..., a:] = np.minimum(fit[..., a:], best)
    return fit


def bootstrap_weights(n: int, n_boot: int, seed: int) -> Floats:
    """How often each of ``n`` values is drawn: ``(n_boot, n)``, rows summing to ``n``."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(n, np.full(n, 1 / n), n_boot).astype(float)


def expanded_tail(n: int, level: float = BOOTSTRAP_LEVEL) -> float:
    """The tail probability of an expanded percentile interval from ``n`` clusters (Hesterberg 2015).

    >>> round(expanded_tail(8), 4), round(expanded_tail(10_000), 4)
    (0.0036, 0.02)
    """
    from scipy.special import ndtr, stdtrit

    return float(ndtr(sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - level) / 2)))


def mean_interval(values: Floats, n_boot: int = N_BOOT, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of independent values, by the expanded bootstrap.

    It is (NaN, NaN) for fewer than `LEAST_VALUES` values.

    >>> mean_interval(np.array([0.1, 0.2, 0.3]))
    (nan, nan)
    """
    n = len(values)
    if n < LEAST_VALUES:
        return float("nan"), float("nan")
    means = bootstrap_weights(n, n_boot, seed) @ values / n
    tail = expanded_tail(n, LEVEL)
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def mcnemar(only_a: int, only_b: int) -> float:
    """P value of the exact two-sided McNemar test (McNemar 1947): a fair coin for each discordant item.

    >>> mcnemar(0, 0), round(mcnemar(1, 5), 5), round(mcnemar(0, 10), 6)
    (1.0, 0.21875, 0.001953)
    """
    from scipy.stats import binomtest

    n = only_a + only_b
    return float(binomtest(only_a, n).pvalue) if n else 1.0


def detectable(n: int, differ: float = 0.2, power: float = 0.8) -> float:
    """The smallest difference of two shares, paired in ``n`` questions, that `mcnemar` finds with this power.

    ``differ``: the share of questions that one of the two alone gets right. 0.0: it finds no difference.

    >>> round(detectable(192), 3), detectable(20)
    (0.092, 0.0)
    """
    from scipy.stats import beta, binom

    n = round(differ * n)
    few = int(binom.ppf((1 - LEVEL) / 2, n, 0.5)) - 1  # the most that the worse one may get right alone
    return float(differ * (1 - 2 * beta.ppf(1 - power, few + 1, n - few))) if few >= 0 else 0.0


def sign_flip(differences: Floats, n_resamples: int = 9999, seed: int = 0) -> float:
    """P value of the two-sided sign-flip test that paired differences have a mean of 0 (Fisher 1935).

    It is exact where 2^n is at most ``n_resamples``; NaN for fewer than two differences.

    >>> sign_flip(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])), sign_flip(np.zeros(8)), sign_flip(np.zeros(1))
    (0.03125, 1.0, nan)
    """
    from scipy.stats import permutation_test

    if len(differences) < 2:
        return float("nan")
    test = permutation_test(
        (differences,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        n_resamples=n_resamples,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """P values adjusted for their number (Holm 1979), in the order given. scipy has no Holm.

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


def paired_bootstrap(
    change: Any, groups: Any = None, n_boot: int = N_BOOT, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a mean change (a value an item, such as b - a), from resampled items.

    ``groups``: the items' groups. Items are then drawn within groups, and the means of groups averaged.

    >>> paired_bootstrap([0.0, 0.0, 0.0])
    (0.0, 0.0)
    """
    draw, change = np.random.default_rng(seed), np.asarray(change, float)
    labels = np.zeros(len(change)) if groups is None else np.asarray(groups)
    means = []
    for label in dict.fromkeys(labels.tolist()):
        members = change[labels == label]
        means.append(members[draw.integers(0, len(members), (n_boot, len(members)))].mean(1))
    low, high = np.quantile(np.mean(means, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
