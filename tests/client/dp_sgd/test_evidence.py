"""Lower bounds hold as often as they say, and formulas equal what others compute."""

import math

import numpy as np
import pytest
from scipy.stats import binom, nct, norm

from fedloom.client.privacy.auditing.lower_bounds import Family, gaussian_epsilon, least_separation, rates
from fedloom.core.privacy.accounting import Spend, epsilon


@pytest.mark.parametrize(("count", "mu"), [(4, 1.0), (30, 0.5), (30, 3.0), (300, 0.2)])
def test_the_bound_on_the_separation_holds_as_often_as_it_says(count: int, mu: float) -> None:
    rng = np.random.default_rng(0)

    above = sum(
        least_separation(rng.normal(2 * mu, 2.0, count), rng.normal(0, 2.0, count), 0.9) > mu for _ in range(1000)
    )

    # One in ten; 2e-5 is the chance that a right bound fails this test.
    assert binom.ppf(1e-5, 1000, 0.1) <= above <= binom.ppf(1 - 1e-5, 1000, 0.1)


@pytest.mark.parametrize(("count", "gap"), [(5, 0.8), (50, 1.7), (1000, 0.3)])
def test_the_bound_inverts_the_noncentral_t_law(count: int, gap: float) -> None:
    rng = np.random.default_rng(1)
    present, absent = rng.normal(gap, 1, count), rng.normal(0, 1, count)

    mu = least_separation(present, absent, 0.99)

    pooled = math.sqrt((present.var(ddof=1) + absent.var(ddof=1)) / 2)
    t, root = float(present.mean() - absent.mean()) / pooled * math.sqrt(count / 2), math.sqrt(count / 2)
    if mu > 0:
        assert float(nct.sf(t, 2 * count - 2, mu * root)) == pytest.approx(0.01, abs=3e-4)
    else:
        assert float(nct.sf(t, 2 * count - 2, 0.0)) >= 0.01


def test_separations_without_end_or_sign_have_bounds_too() -> None:
    one, zero = np.ones(20), np.zeros(20)
    rng = np.random.default_rng(0)

    assert least_separation(one, zero, 0.99) == math.inf
    assert least_separation(zero, one, 0.99) == 0.0
    assert least_separation(one, one, 0.99) == 0.0
    # As wide apart as a mechanism with a millionth of its noise: one sigma of a deviation is 1 / sqrt(2 * 38).
    assert 0.5e6 < least_separation(rng.normal(1e6, 1, 20), rng.normal(0, 1, 20), 0.99) < 1e6


@pytest.mark.parametrize(("sigma", "delta"), [(0.5, 1e-5), (1.0, 1e-5), (4.0, 1e-6), (20.0, 1e-3)])
def test_the_analytic_epsilon_lies_just_below_the_accountants(sigma: float, delta: float) -> None:
    exact = gaussian_epsilon(1 / sigma, delta)

    assert exact <= epsilon([Spend(1.0, sigma, 1)], delta, 1e-4) <= exact + 3e-4


def test_no_separation_costs_nothing_and_an_infinite_one_everything() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
    assert gaussian_epsilon(1e-6, 1e-5) == 0.0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf
    assert gaussian_epsilon(1e7, 1e-5) == pytest.approx(5e13, rel=1e-5)


def test_both_rates_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(400):
        hits, alarms = rates(rng.normal(1, 1, 200), rng.normal(0, 1, 200), 0.9)
        # With one threshold on N(1, 1) against N(0, 1), a false alarm rate allows this many hits and no more.
        wrong += bool(hits > norm.cdf(norm.ppf(alarms) + 1)) if alarms < 1 else 0

    assert wrong <= binom.ppf(1 - 1e-5, 400, 0.1)


def test_rates_of_scores_that_part_are_the_rule_of_three() -> None:
    hits, alarms = rates(np.ones(400), np.zeros(400), 0.95)

    # 300 of 300 successes: the one-sided bound is 0.025 ** (1 / 300).
    assert hits == pytest.approx(0.025 ** (1 / 300))
    assert alarms == pytest.approx(1 - 0.025 ** (1 / 300))


def test_equal_scores_prove_nothing() -> None:
    hits, alarms = rates(np.zeros(400), np.zeros(400), 0.95)

    assert hits <= alarms
    assert Family(0.1, 5).most_noise(hits, alarms, 1.0) == math.inf


def test_a_point_of_the_exact_trade_off_is_allowed_and_one_above_it_is_not() -> None:
    # One step without sampling: hits = Phi(Phi^-1(alarms) + 1 / sigma) exactly.
    family, alarms = Family(1.0, 1), 0.05
    hits = float(norm.cdf(norm.ppf(alarms) + 1 / 0.8))

    assert family.allows(0.8, hits - 1e-6, alarms)
    assert not family.allows(0.8, hits + 0.01, alarms)
    assert 0.8 <= family.most_noise(hits, alarms, 1.0) <= 0.8 * 1.04
    assert 0.8 <= family.most_noise(hits, alarms, 0.6) <= 0.8 * 1.04
    assert family.most_noise(1.0, 0.0, 1.0) == pytest.approx(1 / 3)


def test_the_familys_epsilon_is_the_accountants() -> None:
    accounted = epsilon([Spend(0.05, 1.1, 20)], 1e-5)

    # The accountant takes a margin for its own rounding; the family does not, or a sound claim would look too small.
    assert accounted - 1e-6 < Family(0.05, 20).epsilon(1.1, 1e-5) <= accounted
