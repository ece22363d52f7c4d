"""Correlated noise within a round: its matrix against the definition, its cost against dp-accounting and exactly."""

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.stats import norm

from fedloom.core.config.run import RunConfig, Spec
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.accounting import Spend, calibrate, epsilon
from fedloom.core.privacy.banded import FRACTION_BITS, MAX_BANDS, Banded, Floats, participation
from fedloom.core.privacy.spends import banded, run_spends, training_spend
from fedloom.server.build import calibrated

SHAPES = [(1, 1, 0.0), (10, 4, 0.0), (7, 7, 0.5), (50, 8, 0.9), (70, MAX_BANDS, 0.99), (9, 2, 0.9999)]


def summing(steps: int, momentum: float) -> Floats:
    """How SGD of this momentum sums a round's gradients: row t is what the values after step t owe each gradient."""
    apart = np.subtract.outer(np.arange(steps), np.arange(steps))
    return np.tril(sum((momentum**power * (apart >= power) for power in range(steps)), np.zeros(apart.shape)))


def errors(strategy: Banded) -> tuple[float, float]:
    """Noise in the sums of a round for draws of deviation 1: root mean square of all, and the last one's."""
    rows = np.linalg.norm(summing(strategy.steps, strategy.momentum) @ np.linalg.inv(strategy.dense()), axis=1)
    return math.sqrt(float((rows**2).mean())), float(rows[-1])


def private(steps: int, rate: float, bands: int, **privacy: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "r", "rounds": 10},
            "model": {"base": "m", "labels": ["a", "b"]},
            "train": {"steps": steps, "sampling_rate": rate},
            "privacy": {"noise_bands": bands, **privacy},
        }
    )


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (12, 0.0), (12, 0.5), (30, 0.9)])
def test_with_all_bands_it_is_the_square_root_of_summing(steps: int, momentum: float) -> None:
    dense = Banded(steps, steps, momentum).dense()
    root = dense / np.diag(dense)  # columns as they were before they were brought to norm 1

    np.testing.assert_allclose(root @ root, summing(steps, momentum), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("steps", "bands", "momentum"), SHAPES)
def test_it_is_that_root_cut_to_bands_with_columns_of_norm_one(steps: int, bands: int, momentum: float) -> None:
    # The series of (1 - z)^(-1/2), and the same in m z, by their binomial coefficients.
    root = np.array([math.comb(2 * power, power) / 4.0**power for power in range(bands)])
    series = np.polynomial.polynomial.polymul(root, root * momentum ** np.arange(bands))[:bands]
    expected = np.zeros((steps, steps))
    for back, coefficient in enumerate(series):
        expected += np.diag(np.full(steps - back, coefficient), -back)
    expected /= np.linalg.norm(expected, axis=0)

    np.testing.assert_allclose(Banded(steps, bands, momentum).dense(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("bands", [1, 2, 3, 7, 32, MAX_BANDS])
def test_no_column_is_longer_than_one_and_none_much_shorter(bands: int, momentum: float) -> None:
    """In whole numbers, without any rounding."""
    steps = bands + 9
    squares = [0] * steps
    for step in range(steps):
        for back, weight in enumerate(Banded(steps, bands, momentum).row(step)):
            squares[step - back] += weight**2

    assert max(squares) <= 1 << 2 * FRACTION_BITS
    assert min(squares) >= 0.999 * (1 << 2 * FRACTION_BITS)


@pytest.mark.parametrize(("steps", "bands", "momentum"), SHAPES)
def test_contributions_of_one_turn_to_the_next_do_not_meet(steps: int, bands: int, momentum: float) -> None:
    """The theorem's condition: steps that are b apart touch different rows of C x."""
    touched = (Banded(steps, bands, momentum).dense() != 0).astype(int)
    for group in range(bands):
        assert touched[:, group::bands].sum(1).max(initial=0) <= 1


@pytest.mark.parametrize(("steps", "bands", "momentum"), SHAPES)
def test_the_spread_is_that_of_the_inverse(steps: int, bands: int, momentum: float) -> None:
    strategy = Banded(steps, bands, momentum)

    np.testing.assert_allclose(strategy.spread(), np.linalg.norm(np.linalg.inv(strategy.dense()), axis=1), rtol=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("steps", "bands"), [(5, 2), (5, 4), (10, 4), (50, 4), (50, 8)])
def test_at_equal_noise_sums_have_less_of_it_than_with_independent_noise(
    steps: int, bands: int, momentum: float
) -> None:
    correlated, fresh = errors(Banded(steps, bands, momentum)), errors(Banded(steps, 1, momentum))

    assert correlated[0] < 0.95 * fresh[0]
    assert correlated[1] < 0.9 * fresh[1]


@pytest.mark.parametrize(
    ("target", "rate", "steps", "bands", "mean", "last"),
    [
        (6.0, 0.02, 5, 2, 0.96, 0.88),
        (6.0, 0.02, 10, 4, 0.91, 0.79),
        (6.0, 0.1, 10, 4, 1.23, 1.07),
        (1.0, 0.02, 10, 4, 1.24, 1.07),
    ],
)
def test_at_equal_epsilon_it_wins_and_loses_where_the_page_says(
    target: float, rate: float, steps: int, bands: int, mean: float, last: float
) -> None:
    """Ten rounds: the noise in a round's sums over that of independent noise, each calibrated to the same epsilon."""

    def noise(bands: int) -> tuple[float, float]:
        charged, turns = participation(rate, steps, bands)
        sigma = calibrate(target, 1e-5, charged, 10 * turns)
        average, final = errors(Banded(steps, bands))
        return sigma * average, sigma * final

    found = np.array(noise(bands)) / np.array(noise(1))

    np.testing.assert_allclose(found, [mean, last], atol=0.006)


@pytest.mark.parametrize(("steps", "rate", "bands"), [(10, 0.02, 4), (10, 0.1, 10), (7, 0.3, 3), (12, 0.05, 1)])
def test_a_round_is_charged_as_the_theorem_says(steps: int, rate: float, bands: int) -> None:
    config = private(steps, rate, bands, noise_multiplier=1.3)
    event = SelfComposedDpEvent(PoissonSampledDpEvent(bands * rate, GaussianDpEvent(1.3)), math.ceil(steps / bands))
    oracle = PLDAccountant(value_discretization_interval=1e-3).compose(event, 6)

    assert epsilon(run_spends(config, 6), 1e-5) == pytest.approx(oracle.get_epsilon(1e-5), abs=2e-3)


def test_the_noise_is_chosen_for_what_is_charged() -> None:
    run = calibrated(private(10, 0.02, 4, epsilon=6.0, delta=1e-5))

    assert run.privacy.noise_multiplier == calibrate(6.0, 1e-5, 0.08, 30)
    assert epsilon(run_spends(run, 10), 1e-5) <= 6.0


def test_what_is_charged_covers_two_steps_exactly_and_forgetting_the_bands_does_not() -> None:
    """One value, two steps, two bands: the divergence of what is released by integration over the plane.

    The example of the first group is in the first sample with probability 2 q, and moves both releases.
    """
    rate, sigma, delta = 0.25, 0.7, 1e-3
    axis = np.linspace(-6, 7, 1301)
    first, second = np.meshgrid(axis, axis, indexing="ij")
    column = Banded(2, 2).dense()[:, 0]
    absent = norm.pdf(first, 0, sigma) * norm.pdf(second, 0, sigma)
    there = norm.pdf(first, column[0], sigma) * norm.pdf(second, column[1], sigma)
    present = (1 - 2 * rate) * absent + 2 * rate * there

    def exact(spends: list[Spend]) -> float:
        """The delta that the releases really have at the epsilon that these spends claim."""
        claimed = math.exp(epsilon(spends, delta))
        area = (axis[1] - axis[0]) ** 2
        return float(max(np.maximum(one - claimed * other, 0).sum() * area for one, other in _both(present, absent)))

    assert 0.97 * delta < exact([training_spend(private(2, rate, 2, noise_multiplier=sigma))]) <= delta
    assert exact([Spend(rate, sigma, 1)]) > 1.5 * delta, "an account at the rate of a single step"
    assert exact([Spend(2 * rate, 1.1 * sigma, 1)]) > 1.5 * delta, "or of more noise than there is"


def _both(one: Floats, other: Floats) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    return (one, other), (other, one)


def test_runs_without_bands_are_told_as_before() -> None:
    plain = private(3, 0.1, 1, noise_multiplier=1.0)

    assert "noise_bands" not in plain.spec.model_dump_json()
    assert "noise_bands" in private(3, 0.1, 2, noise_multiplier=1.0).spec.model_dump_json()
    assert banded(plain) is None
    assert Spec.from_json(private(3, 0.1, 2, noise_multiplier=1.0).spec.model_dump_json()).privacy.noise_bands == 2


@pytest.mark.parametrize(
    ("steps", "rate", "bands", "privacy", "message"),
    [
        (3, 0.1, 4, {}, r"noise_bands = 4 is more than the train\.steps = 3 of a round; set at most 3"),
        (10, 0.3, 4, {}, r"4 times train\.sampling_rate = 0\.3, which is above 1; set at most 3"),
        (10, 0.1, 4, {"enabled": False}, r"privacy\.enabled = false, where clients add no noise; leave .* out"),
        (100, 0.01, 65, {}, r"privacy\.noise_bands: Input should be less than or equal to 64"),
        (100, 0.01, 0, {}, r"privacy\.noise_bands: Input should be greater than or equal to 1"),
    ],
)
def test_bands_that_a_round_has_not_are_refused(
    steps: int, rate: float, bands: int, privacy: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**private(steps, rate, 1).model_dump() | {"privacy": {"noise_bands": bands, **privacy}})


def test_a_matrix_with_more_bands_than_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 noise bands over 4 steps; 1 to 4 are allowed"):
        Banded(4, 5)
