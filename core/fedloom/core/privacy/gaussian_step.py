"""The privacy loss of one Poisson-subsampled Gaussian step, by dp-accounting, with its innermost loop over arrays.

dp-accounting asks at every point of the grid, one Python call at a time, at which output the privacy loss equals it.
That loop is nine tenths of an account on a fine grid. Here the same formula is evaluated for all points at once, in the
same order of operations; bounds, discretisation (Doroshenko et al., "Connect the Dots", PoPETs 2022) and composition
stay dp-accounting's.

Load this module where it is needed: dp-accounting takes half a second to import.
"""

import math

import numpy as np
import numpy.typing as npt
from dp_accounting import NeighboringRelation
from dp_accounting.pld.pld_pmf import PLDPmf, create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

__all__ = ["gaussian_step", "replace_one_step"]


def gaussian_step(rate: float, noise: float, grid: float) -> PrivacyLossDistribution:
    """The privacy loss of one step between data sets of which one has one example more; an upper bound.

    Args:
        rate: Poisson sampling rate in (0, 1].
        noise: Noise standard deviation over the clipping norm.
        grid: Discretisation of the loss.
    """
    remove = _discretised(rate, noise, grid, AdjacencyType.REMOVE)
    if rate == 1.0:
        return PrivacyLossDistribution(remove)  # both directions are alike
    return PrivacyLossDistribution(remove, _discretised(rate, noise, grid, AdjacencyType.ADD))


def replace_one_step(rate: float, noise: float, grid: float) -> PrivacyLossDistribution:
    """The same between data sets of which one example differs, as dp-accounting makes it."""
    relation = NeighboringRelation.REPLACE_ONE
    return from_gaussian_mechanism(
        noise, value_discretization_interval=grid, sampling_prob=rate, neighboring_relation=relation
    )


def _discretised(rate: float, noise: float, grid: float, direction: AdjacencyType) -> PLDPmf:
    loss = GaussianPrivacyLoss(noise, sampling_prob=rate, adjacency_type=direction)
    bounds = loss.connect_dots_bounds()
    lowest, highest = math.floor(bounds.epsilon_lower / grid), math.ceil(bounds.epsilon_upper / grid)
    deltas = _deltas(loss, np.arange(lowest, highest + 1) * grid)
    return create_pmf_pessimistic_connect_dots_fixed_gap(grid, lowest, highest, deltas)


def _deltas(loss: GaussianPrivacyLoss, epsilons: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Hockey-stick divergence at every epsilon: what `loss.get_delta_for_epsilon` gives, bit for bit.

    The divergence is P(X <= x) - exp(epsilon) Q(X <= x) at the output x whose loss is epsilon. Sampling at rate q turns
    a loss l of the Gaussian into log(1 - q + q exp(l)) when an example is removed, and into -log(1 - q + q exp(-l))
    when it is added; beyond log(1 - q), or -log(1 - q), there is no such output.
    """
    rate, added = loss.sampling_prob, loss.adjacency_type is AdjacencyType.ADD
    sign = -1.0 if added else 1.0
    deltas, losses = np.zeros_like(epsilons), epsilons
    inside = np.ones_like(epsilons, bool)
    if rate < 1:
        inside = sign * epsilons > math.log1p(-rate)
        if not added:
            deltas[~inside] = -np.expm1(epsilons[~inside])
        losses = sign * _unsampled(sign * epsilons[inside], rate)
    # The loss of the Gaussian itself is linear in the output.
    outputs = -0.5 - losses * loss.standard_deviation**2
    if added:
        outputs = 1 + outputs
    deltas[inside] = loss.mu_upper_cdf(outputs) - np.exp(epsilons[inside] + loss.mu_lower_log_cdf(outputs))
    return np.clip(deltas, 0, 1)


def _unsampled(losses: npt.NDArray[np.float64], rate: float) -> npt.NDArray[np.float64]:
    """log((exp(loss) - (1 - q)) / q): the loss without sampling that sampling at rate q turns into `loss`.

    In dp-accounting's order of operations, so that every rounding is the same.
    """
    made = np.full_like(losses, -math.inf)
    above = ~np.isclose(losses, math.log(1 - rate), rtol=1e-9, atol=0)
    scaled = losses[above] + np.log(1 / rate)
    with np.errstate(invalid="raise"):  # no figure rather than a wrong one
        made[above] = scaled + np.log1p(-np.exp(np.log(-(1 - 1 / rate)) - scaled))
    made[losses == 0] = np.log(1 / rate + (1 - 1 / rate))
    return made
