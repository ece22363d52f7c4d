"""Many mechanisms, merged to fewer, never cost less."""

import numpy as np
import pytest

from fedloom.core.privacy.accounting import Spend, epsilon

DELTA = 1e-5


@pytest.mark.parametrize("count", [49, 60, 400])
def test_many_mechanisms_are_charged_for_no_more_noise_than_each_had(count: int) -> None:
    """On the whole data set the exact cost is that of one step; merged to the wrong end the figure falls below it."""
    noises = np.geomspace(4.0, 8.0, count)
    exact = epsilon([Spend(1.0, float((1 / (noises**-2).sum()) ** 0.5), 1)], DELTA)
    rates = np.geomspace(0.01, 0.02, count)

    assert epsilon([Spend(1.0, float(each), 1) for each in noises], DELTA) >= exact
    assert epsilon([Spend(float(each), 1.0, 10) for each in rates], DELTA) >= epsilon(
        [Spend(float(np.median(rates)), 1.0, 10 * count)], DELTA
    )
