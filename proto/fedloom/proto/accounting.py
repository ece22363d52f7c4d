"""Privacy accounting of Poisson-subsampled Gaussian steps, by Google's dp-accounting.

Both sides use it: the coordinator to choose a noise multiplier, each client to decide whether it may take
part. The accountant of record is the privacy loss distribution (PLD), whose pessimistic discretisation
gives an upper bound on epsilon at any grid. Neighbouring data sets differ by adding or removing one
example. No amplification is claimed for the choice of clients: the coordinator sees who takes part.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from fedloom.proto.errors import ConfigError

__all__ = ["GRID", "REPORT_GRID", "Spend", "calibrate", "epsilon"]

GRID = 1e-3
"""Discretisation of the privacy loss while a run is going on; about 60 ms an evaluation."""

REPORT_GRID = 1e-4
"""Discretisation for a final report; ten times finer and never above the coarser value by construction."""

_SIGMA_STEP = 1e-3
_SIGMA_RANGE = (0.1, 1000.0)


@dataclass(frozen=True)
class Spend:
    """Steps taken on one data set with one mechanism.

    Args:
        sampling_rate: Poisson rate q in (0, 1].
        noise_multiplier: Noise standard deviation over the clipping norm, above 0.
        steps: Number of noisy steps, empty batches included.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        """Refuse what has no finite privacy loss."""
        if not 0 < self.sampling_rate <= 1:
            raise ConfigError(f"sampling rate {self.sampling_rate!r} must lie in (0, 1]")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ConfigError(f"noise multiplier {self.noise_multiplier!r} must be positive and finite")
        if self.steps < 1:
            raise ConfigError(f"steps {self.steps!r} must be at least 1")


def epsilon(spends: Iterable[Spend], delta: float, grid: float = GRID) -> float:
    """Epsilon of all `spends` on one data set together, at `delta`.

    Order does not matter: equal mechanisms are merged before they are composed.

    Raises:
        ConfigError: `delta` is not in (0, 1).

    >>> epsilon([], 1e-5)
    0.0
    >>> round(epsilon([Spend(0.01, 1.0, 400), Spend(0.01, 1.0, 600)], 1e-5), 2)
    1.83
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta {delta!r} must lie in (0, 1)")
    steps: Counter[tuple[float, float]] = Counter()
    for spend in spends:
        steps[spend.sampling_rate, spend.noise_multiplier] += spend.steps
    merged = tuple(Spend(rate, noise, count) for (rate, noise), count in sorted(steps.items()))
    return _epsilon(merged, delta, grid) if merged else 0.0


@lru_cache(maxsize=4096)
def _epsilon(spends: tuple[Spend, ...], delta: float, grid: float) -> float:
    # Imported here: loading dp-accounting takes half a second, which commands that never account need not pay.
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid)
    for spend in spends:
        step = PoissonSampledDpEvent(spend.sampling_rate, GaussianDpEvent(spend.noise_multiplier))
        accountant.compose(step, spend.steps)
    return float(accountant.get_epsilon(delta))


def calibrate(target_epsilon: float, delta: float, sampling_rate: float, steps: int, grid: float = GRID) -> float:
    """The smallest noise multiplier, in steps of 0.001, whose `steps` cost at most `target_epsilon`.

    The accountant that will judge the run makes the choice, so that a run that follows its plan to the end
    stays within its target.

    Raises:
        ConfigError: No multiplier up to 1000 is enough.
    """
    low, high = (round(bound / _SIGMA_STEP) for bound in _SIGMA_RANGE)

    def spent(units: int) -> float:
        return epsilon([Spend(sampling_rate, units * _SIGMA_STEP, steps)], delta, grid)

    if spent(high) > target_epsilon:
        raise ConfigError(
            f"epsilon {target_epsilon} at delta {delta} cannot be reached with rate {sampling_rate} and {steps} steps "
            f"and noise up to {_SIGMA_RANGE[1]:g}; lower train.sampling_rate, train.steps or run.rounds"
        )
    # Double up from the low end first: tiny multipliers are slow to account for and rarely the answer.
    reach = round(0.5 / _SIGMA_STEP)
    while reach < high and spent(reach) > target_epsilon:
        low, reach = reach, reach * 2
    high = min(reach, high)
    while high - low > 1:
        middle = (low + high) // 2
        if spent(middle) > target_epsilon:
            low = middle
        else:
            high = middle
    return high * _SIGMA_STEP
