"""Intervals and tests: against printed tables, closed forms, and what they promise."""

from __future__ import annotations

from math import comb
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import beta, binom

from dfqs_nb.stats import at_most, detectable, expanded_tail, holm, mcnemar, mean_interval, wilson


@pytest.mark.parametrize("n, expected", [(10, 0.2589), (20, 0.1391), (100, 0.0295), (1152, 0.0026)])
def test_no_success_bounds_the_rate_as_the_closed_form_says(n, expected):
    assert at_most(0, n) == pytest.approx(1 - 0.05 ** (1 / n)) == pytest.approx(expected, abs=5e-5)


def test_wilson_takes_arrays_and_nothing_tells_nothing():
    low, high = wilson([0, 5, 0], [0, 10, 10])
    assert low.tolist()[0] == 0 and high.tolist()[0] == 1
    assert high[2] == pytest.approx(1.959964**2 / (10 + 1.959964**2))


@pytest.mark.parametrize("right, n", [(0, 10), (1, 10), (8, 10), (10, 10), (81, 263), (15, 148)])
def test_wilson_limits_are_the_roots_of_the_score_equation(right, n):
    """The limits p solve |right/n - p| = z sqrt(p (1 - p) / n): Wilson's own definition."""
    z = NormalDist().inv_cdf(0.975)
    for p in wilson(right, n):
        assert abs(right / n - p) == pytest.approx(z * (p * (1 - p) / n) ** 0.5, abs=1e-7)


def test_wilson_agrees_with_published_values():
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    for right, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert np.round(wilson(right, n), 4).tolist() == pytest.approx([low, high], abs=1e-4)


# Two-sided 95 % intervals as R's binom.test(x, n) prints them
@pytest.mark.parametrize(("x", "n"), [(1, 10), (5, 10), (682, 925)])
def test_an_upper_bound_is_a_quantile_of_the_beta_distribution(x, n):
    """Clopper and Pearson's bound, by the other textbook form."""
    assert at_most(x, n) == pytest.approx(beta.ppf(0.95, x + 1, n - x))
    assert at_most(n, n) == 1


@pytest.mark.parametrize("a, b", [(0, 1), (3, 9), (10, 2), (6, 6)])
def test_mcnemar_is_a_fair_coin(a, b):
    n, fewer = a + b, min(a, b)
    assert mcnemar(a, b) == pytest.approx(min(1, 2 * sum(comb(n, k) for k in range(fewer + 1)) / 2**n))


@pytest.mark.parametrize("n", [30, 96, 192, 1000])
def test_the_detectable_difference_has_its_power_by_the_test_itself(n):
    differ = round(0.2 * n)
    found = [few for few in range(differ + 1) if mcnemar(few, differ - few) <= 0.05]
    share = (1 - detectable(n) / 0.2) / 2
    assert binom.pmf(found, differ, share).sum() == pytest.approx(0.8, abs=1e-3)
    assert not detectable(20), "of 4 questions that differ, none can show anything"


def test_holm_never_lets_a_larger_p_overtake():
    assert holm([0.01, 0.02, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([]) == []


def test_the_expanded_interval_is_wider_for_few_clusters_and_exact_for_many():
    tails = [expanded_tail(n, 0.95) for n in (6, 12, 24, 10_000)]
    assert tails == sorted(tails) and tails[-1] == pytest.approx(0.025, rel=1e-3)


def test_the_interval_of_a_mean_covers_it():
    draw = np.random.default_rng(1)
    hits = 0
    for seed in range(300):
        low, high = mean_interval(draw.normal(0.3, 1.0, 12), n_boot=500, seed=seed)
        hits += low <= 0.3 <= high
    assert 0.92 <= hits / 300 <= 0.98
