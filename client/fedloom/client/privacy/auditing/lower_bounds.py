"""What an audit's scores prove: lower bounds on a mechanism's epsilon at a stated confidence.

Scores come in two arms, with and without one example. A bound here is a statement about the mechanism that made
them, whatever it claims; it never says that a mechanism is private, only that it is no more private than so.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from scipy.stats import beta, chi2, norm

__all__ = ["Family", "gaussian_epsilon", "least_separation", "rates"]

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_NODES = 5_000  # of the chi-square law below; its tail of 0.003 then rests on fifteen nodes
_GRID = 1e-3  # of the privacy loss, for the epsilon that is reported
_COARSE_GRID = 5e-3  # while looking for the noise: five times faster, and errs to the mechanism's favour


def least_separation(present: Floats, absent: Floats, confidence: float) -> float:
    """Lower confidence bound on mu, the gap of the two arms' means over their common standard deviation.

    Exact for normal scores: the t statistic of two samples has a noncentral t law whose noncentrality is mu times
    sqrt(n m / (n + m)). A mechanism with that mu is no better than mu-Gaussian DP, as in the audit of
    Nasr et al. (USENIX Security 2023, arXiv 2302.07956), who use the large-sample form.

    Args:
        present: Scores with the example, shape (n,), n at least 2.
        absent: Scores without it, shape (m,), m at least 2.
        confidence: In (0, 1).

    Returns:
        At least 0; infinite when the scores of both arms do not vary and differ.

    >>> rng = np.random.default_rng(0)
    >>> 0.8 < least_separation(rng.normal(1, 1, 2000), rng.normal(0, 1, 2000), 0.99) < 1.0
    True
    """
    degrees = len(present) + len(absent) - 2
    gap = float(present.mean() - absent.mean())
    spread = math.sqrt(float(((present - present.mean()) ** 2).sum() + ((absent - absent.mean()) ** 2).sum()) / degrees)
    if gap <= 0.0:
        return 0.0
    if spread == 0.0:
        return math.inf
    root = math.sqrt(len(present) * len(absent) / (len(present) + len(absent)))
    t = root * gap / spread
    deviation = _deviations(degrees)

    def beyond(noncentrality: float) -> float:
        return float(ndtr(noncentrality - t * deviation).mean()) - (1 - confidence)

    if beyond(0.0) >= 0.0:
        return 0.0
    # At t times the largest deviation, half the mass at least lies beyond.
    return float(brentq(beyond, 0.0, t * deviation[-1], rtol=1e-12)) / root


@lru_cache(maxsize=64)
def _deviations(degrees: int) -> Floats:
    """The law of a pooled standard deviation over the true one, at equal steps of probability.

    With it the noncentral t law is an average; scipy's own does not converge for the separations that a mechanism
    without noise gives.
    """
    return np.asarray(np.sqrt(chi2.ppf((np.arange(_NODES) + 0.5) / _NODES, degrees) / degrees), np.float64)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact epsilon at `delta` of a Gaussian mechanism with sensitivity over noise `mu`, at least 0.

    Source: Balle & Wang (ICML 2018), Theorem 8.

    >>> round(gaussian_epsilon(1.0, 1e-5), 3)
    4.377
    """
    if math.isinf(mu):
        return math.inf

    def excess(epsilon: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))) - delta

    if mu <= 0.0 or excess(0.0) <= 0.0:
        return 0.0
    # The first term alone falls to delta there. For a huge mu the second is lost to rounding, and that is the answer.
    high = mu * mu / 2 - mu * float(norm.ppf(delta))
    return high if excess(high) >= 0.0 else float(brentq(excess, 0.0, high, xtol=1e-12))


def rates(present: Floats, absent: Floats, confidence: float) -> tuple[float, float]:
    """Bounds on what an attacker with one threshold on the score achieves, both at once at `confidence`.

    The threshold is chosen on the first quarter of each arm and tried on the rest, with Clopper-Pearson intervals.

    Args:
        present: Scores with the example, shape (n,), n at least 8.
        absent: Scores without it, shape (m,), m at least 8.
        confidence: In (0, 1).

    Returns:
        A lower bound on the true positive rate and an upper bound on the false positive rate.
    """
    part = min(len(present), len(absent)) // 4
    miss = (1 - confidence) / 2
    candidates = np.unique(np.concatenate([present[:part], absent[:part]]))
    hits = _least(_counts(present[:part], candidates), part, miss)
    alarms = _most(_counts(absent[:part], candidates), part, miss)
    # How far apart two normal laws would be; any rule is allowed, since the rest is independent of the choice.
    with np.errstate(invalid="ignore"):
        apart = np.nan_to_num(norm.ppf(hits) - norm.ppf(alarms), nan=-np.inf)
    threshold = candidates[[int(np.argmax(apart))]]
    present, absent = present[part:], absent[part:]
    (found,) = _least(_counts(present, threshold), len(present), miss)
    (wrong,) = _most(_counts(absent, threshold), len(absent), miss)
    return float(found), float(wrong)


def _counts(scores: Floats, thresholds: Floats) -> Counts:
    """How many scores reach each threshold."""
    return (len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")).astype(np.int64)


def _least(successes: Counts, trials: int, miss: float) -> Floats:
    """Clopper-Pearson lower bound of a probability."""
    return np.where(successes == 0, 0.0, beta.ppf(miss, np.maximum(successes, 1), trials - successes + 1))


def _most(successes: Counts, trials: int, miss: float) -> Floats:
    """Clopper-Pearson upper bound of a probability."""
    full = successes == trials
    return np.where(full, 1.0, beta.ppf(1 - miss, successes + 1, np.where(full, 1, trials - successes)))


@dataclass(frozen=True)
class Family:
    """Poisson-sampled Gaussian mechanisms that differ in their noise alone.

    A point (true positive rate, false positive rate) that an attacker reaches refutes every member whose whole
    privacy profile does not allow it; the members with less noise remain. That uses all of the curve of epsilon
    against delta, where a bound at one delta needs exp(epsilon) trials.

    Args:
        sampling_rate: Poisson rate q in (0, 1].
        steps: Number of steps composed.
    """

    sampling_rate: float
    steps: int

    def epsilon(self, noise_multiplier: float, delta: float) -> float:
        """Epsilon of one member; asked of dp-accounting here, not of the accountant that is under audit."""
        return float(self._accountant(noise_multiplier, _GRID).get_epsilon(delta))

    def most_noise(self, hits: float, alarms: float, claimed: float) -> float:
        """The most noise with which a member could let an attacker reach `hits` at `alarms`.

        Args:
            hits: Lower bound on the true positive rate.
            alarms: Upper bound on the false positive rate.
            claimed: Noise multiplier to look around, from a third of it to ten times it.

        Returns:
            A noise multiplier, up to 2 % too large; infinite when ten times the claim allows the point, a third of
            the claim when that does not.
        """
        low, high = claimed / 3, claimed * 10
        if self.allows(high, hits, alarms):
            return math.inf
        if self.allows(claimed, hits, alarms):
            low = claimed
        elif self.allows(low, hits, alarms):
            high = claimed
        else:
            return low
        while high / low > 1.02:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.allows(middle, hits, alarms) else (low, middle)
        return high

    def allows(self, noise_multiplier: float, hits: float, alarms: float) -> bool:
        """Whether a member could let an attacker reach `hits` at `alarms`.

        (epsilon, delta)-DP bounds hits by exp(epsilon) alarms + delta, at every point of the profile.
        """
        epsilons = np.linspace(0.0, 20.0, 101)
        deltas = np.array(self._accountant(noise_multiplier, _COARSE_GRID).get_delta(epsilons))
        return bool(hits <= (deltas + np.exp(epsilons) * alarms).min())

    def _accountant(self, noise_multiplier: float, grid: float) -> Any:
        from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant

        accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid)
        step = PoissonSampledDpEvent(self.sampling_rate, GaussianDpEvent(noise_multiplier))
        return accountant.compose(step, self.steps)
