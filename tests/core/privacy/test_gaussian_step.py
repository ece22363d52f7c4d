"""The privacy loss of one step is dp-accounting's, bit for bit."""

from typing import Any

import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.privacy.gaussian_step import gaussian_step, replace_one_step


def distributions(pld: Any) -> list[tuple[int, float, bytes]]:
    """Of both directions: lowest loss, mass at infinity, and the bits of the other masses."""
    dense = [pmf.to_dense_pmf() for pmf in (pld._pmf_remove, pld._pmf_add)]
    return [(each._lower_loss, each._infinity_mass, np.asarray(each._probs).tobytes()) for each in dense]


@pytest.mark.parametrize(
    ("rate", "noise", "grid"),
    [
        (0.02, 0.595, 1e-3),
        (0.5, 1.3, 1e-4),
        (1.0, 1.3, 1e-3),
        (1e-6, 0.4, 1e-2),
        (1 - 1e-12, 2.0, 1e-3),
        (1 - np.exp(-0.25), 1.0, 0.25),  # a point of the grid lies on the largest loss there is
        (0.1, 30.0, 1e-4),
        (0.3, 0.01, 1.0),
    ],
)
def test_it_is_what_dp_accounting_makes(rate: float, noise: float, grid: float) -> None:
    theirs = from_gaussian_mechanism(noise, value_discretization_interval=grid, sampling_prob=rate)

    assert distributions(gaussian_step(rate, noise, grid)) == distributions(theirs)


# Between 1 - 1e-9 and 1 it is dp-accounting that fails at some noise.
@given(rate=st.floats(1e-9, 1 - 1e-9) | st.just(1.0), noise=st.floats(0.2, 50.0))
def test_it_is_what_dp_accounting_makes_at_any_rate_and_noise(rate: float, noise: float) -> None:
    theirs = from_gaussian_mechanism(noise, value_discretization_interval=0.05, sampling_prob=rate)

    assert distributions(gaussian_step(rate, noise, 0.05)) == distributions(theirs)


def test_replace_one_is_what_dp_accounting_makes() -> None:
    theirs = from_gaussian_mechanism(
        1.1,
        value_discretization_interval=1e-2,
        sampling_prob=0.2,
        neighboring_relation=NeighboringRelation.REPLACE_ONE,
    )

    assert distributions(replace_one_step(0.2, 1.1, 1e-2)) == distributions(theirs)
