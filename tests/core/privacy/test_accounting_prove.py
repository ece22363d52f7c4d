"""The accountant of record against three others, on settings drawn from the whole range that a run can ask for.

`FEDLOOM_PROVE=1` checks 1,000 settings, which takes ten minutes of an idle machine; otherwise every seventeenth.
"""

import math
import os
import random
from itertools import product

import numpy as np
import pytest
from dp_accounting import ComposedDpEvent, DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant, RDPAccountant

from fedloom.core.privacy.accounting import GRID, Spend, epsilon

Setting = tuple[tuple[Spend, ...], float]


def every_setting() -> list[Setting]:
    """240 on a grid of rate, noise, steps and delta, and 760 random ones, every third a mixture; always the same."""
    corners = product((0.001, 0.01, 0.1, 0.5, 1.0), (0.6, 1.0, 2.0, 5.0), (1, 10, 100, 1000), (1e-3, 1e-5, 1e-8))
    found: list[Setting] = [((Spend(rate, sigma, steps),), delta) for rate, sigma, steps, delta in corners]
    rng = random.Random(20240607)

    def spread(low: float, high: float) -> float:
        return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}")

    def spend() -> Spend:
        rate = 1.0 if rng.random() < 0.1 else spread(1e-4, 0.9)
        return Spend(rate, spread(0.5, 10.0), round(spread(1, 2000)))

    for index in range(760):
        mixed = tuple(spend() for _ in range(rng.randint(2, 4) if index % 3 == 0 else 1))
        found.append((mixed, spread(1e-9, 1e-2)))
    return found


SETTINGS = every_setting() if os.environ.get("FEDLOOM_PROVE") == "1" else every_setting()[::17]

# Where epsilon is in the hundreds nothing is private, and the others need gigabytes or give up.
MEANINGFUL = 50.0

# What a grid of 1e-3 may add to epsilon: most where steps are many and each loses much less than the grid.
SLACK = 0.1


def events(spends: tuple[Spend, ...]) -> list[DpEvent]:
    """In the given order, with all the full-batch steps as the one Gaussian mechanism that they are.

    Two of them composed on any grid would lie above the exact figure, which ours must not be asked to do.
    """
    found: list[DpEvent] = [
        SelfComposedDpEvent(
            PoissonSampledDpEvent(each.sampling_rate, GaussianDpEvent(each.noise_multiplier)), each.steps
        )
        for each in spends
        if each.sampling_rate < 1
    ]
    whole = sum(each.steps / each.noise_multiplier**2 for each in spends if each.sampling_rate == 1)
    return [*found, GaussianDpEvent(1 / math.sqrt(whole))] if whole else found


def pld(spends: tuple[Spend, ...]) -> PLDAccountant:
    """dp-accounting's own way from events to an account, on a grid twice as fine and in the given order."""
    accountant = PLDAccountant(value_discretization_interval=GRID / 2)
    accountant.compose(ComposedDpEvent(events(spends)))
    return accountant


def rdp(spends: tuple[Spend, ...], delta: float) -> float:
    """Upper bound by Renyi composition (Mironov, Talwar & Zhang, 2019), Opacus's implementation."""
    accountant = RDPAccountant()
    accountant.history = [(each.noise_multiplier, each.sampling_rate, each.steps) for each in spends]
    return max(0.0, float(accountant.get_epsilon(delta)))


def prv(spends: tuple[Spend, ...], delta: float) -> tuple[float, float]:
    """Lower and upper bound by numerical composition (Gopi, Lee & Wutschitz, NeurIPS 2021), Opacus's implementation.

    It shares neither code nor discretisation with dp-accounting.
    """
    accountant = PRVAccountant()
    accountant.history = [(each.noise_multiplier, each.sampling_rate, each.steps) for each in spends]
    composed = accountant._get_dprv(eps_error=0.01, delta_error=delta / 1000)
    low, _, high = composed.compute_epsilon(delta, delta / 1000, 0.01)
    return float(low), float(high)


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.filterwarnings("ignore:Optimal order is the")  # both of Opacus's use Renyi bounds at fixed orders
@pytest.mark.parametrize(("spends", "delta"), SETTINGS)
def test_epsilon_is_never_below_another_accountant(spends: tuple[Spend, ...], delta: float) -> None:
    ours = epsilon(spends, delta)

    finer = pld(spends)
    # Epsilon is not below the reference's exactly when the reference's delta at epsilon is not above delta. Asked this
    # way round because the reference's search for epsilon errs by more than 1e-9 itself.
    assert finer.get_delta(ours + 1e-9) <= delta
    with np.errstate(over="ignore"):  # in its search, where epsilon is in the hundreds
        assert ours <= finer.get_epsilon(delta) + SLACK, "an upper bound, but a useless one"
    bound = rdp(spends, delta)
    assert ours <= bound + GRID
    if bound <= MEANINGFUL and all(spend.sampling_rate < 1 for spend in spends):
        low, high = prv(spends, delta)
        assert low - 1e-9 <= ours <= high + SLACK


def test_there_are_as_many_settings_as_promised() -> None:
    settings = every_setting()

    assert len(settings) == len(set(settings)) >= 1000
    assert sum(len(spends) > 1 for spends, _ in settings) >= 250
    assert len(SETTINGS) >= 58
