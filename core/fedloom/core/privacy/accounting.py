"""Privacy accounting of Poisson-subsampled Gaussian steps, by Google's dp-accounting.

Both sides use it: the coordinator to choose a noise multiplier, each client to decide whether it may take
part. The accountant of record is the privacy loss distribution (PLD), whose pessimistic discretisation
gives an upper bound on epsilon at any grid. Neighbouring data sets differ by adding or removing one example
unless replace-one is asked for.

No amplification is claimed for the choice of clients. The coordinator sees who takes part, so against it there
is none; and whoever sees only the models must still not multiply the two rates: one draw of a client is shared
by all the steps of its round. With 20 full-batch steps a round of noise multiplier 5 over 100 rounds, each
joined with probability 0.1, the product of the rates says epsilon 3.92 at delta 1e-5; composing the rounds as
they are gives 5.74, and a client that the coordinator saw join 10 or all 100 rounds has spent 15.5 or 77.3
(tests/core/privacy/test_accounting.py measures all four). What is charged is what a client really did.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from sys import float_info
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedloom.core.errors import ConfigError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

__all__ = [
    "GRID",
    "REPORT_GRID",
    "Adjacency",
    "Spend",
    "Statement",
    "calibrate",
    "epsilon",
    "most_rounds",
    "rounds_left",
    "statement",
]

GRID = 1e-3
"""Discretisation of the privacy loss while a run is going on; about 60 ms an evaluation."""

REPORT_GRID = 1e-4
"""Discretisation for a final report; ten times finer and never above the coarser value by construction."""

Adjacency = Literal["add or remove one", "replace one"]
"""How neighbouring data sets differ. Replace-one costs more, and is what counts where the size of the data set is
known to the attacker."""

_SIGMA_UNITS = 1000
_SIGMA_RANGE = (0.1, 1000.0)
_LEAST_NOISE = 1e-3
_MOST_MECHANISMS = 48
_STEP_POINTS, _POINTS = 400_000, 4_000_000
_STAGE_STEPS = 10_000


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
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(f"steps {self.steps!r} must be a whole number from 1")


@dataclass(frozen=True)
class Statement:
    """What a report of spent privacy must say to mean anything.

    A guarantee for whole clients is another kind of statement, with another `unit`; the two are never added up.
    """

    epsilon: float
    delta: float
    unit: str
    """What is protected: one row of one client's data."""
    adjacency: Adjacency
    covers: str
    """The uses of the data that are counted."""
    rounds: int
    """Rounds charged: those this client joined, not those of the run."""
    sampling: str
    mechanisms: tuple[Spend, ...]
    """What was done, or with noise bands what it costs as much as: rates, noise multipliers and steps of each."""
    accountant: str
    grid: float
    """Discretisation of the privacy loss that the figure was computed on; a finer one gives no larger figure."""

    def document(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {**asdict(self), "mechanisms": [asdict(spend) for spend in self.mechanisms]}


def epsilon(
    spends: Iterable[Spend], delta: float, grid: float = GRID, *, adjacency: Adjacency = "add or remove one"
) -> float:
    """Epsilon of all `spends` on one data set together, at `delta`: an upper bound, infinite if none can be given.

    Order does not matter, and neither does how the steps of one mechanism are split: equal mechanisms are merged
    before they are composed. Beyond 48 different mechanisms, near ones are merged into their worst, and where the
    losses spread too far for `grid` a grid of 10, 100, ... times it is used; both only raise the figure.

    Raises:
        ConfigError: `delta` is not in (0, 1), or `grid` is not positive and finite.

    >>> epsilon([], 1e-5)
    0.0
    >>> round(epsilon([Spend(0.01, 1.0, 400), Spend(0.01, 1.0, 600)], 1e-5), 2)
    1.83
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta {delta!r} must lie in (0, 1)")
    if not 0 < grid < math.inf:
        raise ConfigError(f"grid {grid!r} must be positive and finite")
    mechanisms = _bounded(_merged(spends))
    if any(each.noise_multiplier < _LEAST_NOISE for each in mechanisms):
        return math.inf  # losses in the hundreds of thousands; double precision ends here
    return _epsilon(mechanisms, delta, _coarsened(mechanisms, grid), adjacency) if mechanisms else 0.0


def calibrate(
    target_epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    grid: float = GRID,
    *,
    prior: Iterable[Spend] = (),
) -> float:
    """The smallest noise multiplier, in steps of 0.001, with which `steps` after `prior` cost at most `target_epsilon`.

    The accountant that will judge the run makes the choice, so that a run that follows its plan to the end
    stays within its target; the finer grid of a report then says no more either.

    Raises:
        ConfigError: A number is out of range, `prior` alone costs the target, or no multiplier up to 1000 is enough.
    """
    if not 0 < target_epsilon < math.inf:
        raise ConfigError(f"epsilon {target_epsilon!r} must be positive and finite")
    before = _merged(prior)
    if before and (gone := epsilon(before, delta, grid)) >= target_epsilon:
        raise ConfigError(
            f"epsilon {target_epsilon} at delta {delta} is spent: {gone:.4f} is charged already; "
            "use other data or raise the budget if you may"
        )
    low, high = (round(bound * _SIGMA_UNITS) for bound in _SIGMA_RANGE)

    def spent(units: int) -> float:
        return epsilon([*before, Spend(sampling_rate, units / _SIGMA_UNITS, steps)], delta, grid)

    if spent(high) > target_epsilon:
        raise ConfigError(
            f"epsilon {target_epsilon} at delta {delta} cannot be reached with rate {sampling_rate} and {steps} steps "
            f"and noise up to {_SIGMA_RANGE[1]:g}; lower train.sampling_rate, train.steps or run.rounds"
        )
    # Double up from the low end first: tiny multipliers are slow to account for and rarely the answer.
    reach = round(0.5 * _SIGMA_UNITS)
    while reach < high and spent(reach) > target_epsilon:
        low, reach = reach, reach * 2
    high = min(reach, high)
    while high - low > 1:
        middle = (low + high) // 2
        if spent(middle) > target_epsilon:
            low = middle
        else:
            high = middle
    return high / _SIGMA_UNITS


def rounds_left(
    prior: Iterable[Spend], each: Spend, budget: float, delta: float, grid: float = GRID, *, most: int = 10_000
) -> int:
    """How many more rounds of `each` fit into `budget` at `delta` after `prior`; `most` when at least so many fit.

    >>> rounds_left([Spend(0.01, 1.0, 500)], Spend(0.01, 1.0, 10), 2.0, 1e-5)
    70
    """
    rate, noise, steps = each.sampling_rate, each.noise_multiplier, each.steps
    return most_rounds(prior, lambda rounds: [Spend(rate, noise, steps * rounds)], budget, delta, grid, most=most)


def most_rounds(
    prior: Iterable[Spend],
    cost: Callable[[int], Iterable[Spend]],
    budget: float,
    delta: float,
    grid: float = GRID,
    *,
    most: int,
) -> int:
    """How many rounds fit into `budget` at `delta` after `prior`, if so many cost `cost(rounds)` together."""
    before = _merged(prior)

    def fits(rounds: int) -> bool:
        return epsilon([*before, *cost(rounds)], delta, grid) <= budget

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def statement(
    spends: Iterable[Spend],
    delta: float,
    grid: float = REPORT_GRID,
    *,
    covers: str = "this run",
    rounds: int | None = None,
    adjacency: Adjacency = "add or remove one",
) -> Statement:
    """The terms and the epsilon of `spends`, of which there is one for each round charged unless `rounds` says.

    Raises:
        ConfigError: `delta` or `grid` is out of range, or there is no finite epsilon at this `delta`.
    """
    charged = tuple(spends)
    spent = epsilon(charged, delta, grid, adjacency=adjacency)
    if not math.isfinite(spent):
        raise ConfigError(f"{len(charged)} rounds have no finite epsilon at delta {delta!r}; report a larger delta")
    mechanisms = _merged(charged)
    return Statement(
        epsilon=spent,
        delta=delta,
        unit="one example",
        adjacency=adjacency,
        covers=covers,
        rounds=len(charged) if rounds is None else rounds,
        sampling="Poisson, each example by itself; no amplification is claimed for the choice of clients",
        mechanisms=mechanisms,
        accountant=f"dp-accounting {version('dp-accounting')}, PLD, pessimistic",
        grid=_coarsened(_bounded(mechanisms), grid),
    )


def _merged(spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """One spend for each mechanism, in an order that is a function of the mechanisms alone."""
    steps: Counter[tuple[float, float]] = Counter()
    for spend in spends:
        steps[spend.sampling_rate, spend.noise_multiplier] += spend.steps
    return tuple(Spend(rate, noise, count) for (rate, noise), count in sorted(steps.items()))


def _bounded(mechanisms: tuple[Spend, ...]) -> tuple[Spend, ...]:
    """At most `_MOST_MECHANISMS` mechanisms that cost no less.

    A higher rate or less noise never costs less, so a group may be charged at its highest rate and least noise.
    The groups are cells of a logarithmic grid that is widened by a tenth until they are few enough.
    """
    groups, width = [(each.sampling_rate, each.noise_multiplier, each.steps) for each in mechanisms], 1e-6
    while len(groups) > _MOST_MECHANISMS:
        cells: dict[tuple[int, int], tuple[float, float, int]] = {}
        for rate, noise, steps in groups:
            cell = (math.ceil(math.log(rate) / width), math.floor(math.log(noise) / width))
            highest, least, count = cells.get(cell, (0.0, math.inf, 0))
            cells[cell] = (max(rate, highest), min(noise, least), count + steps)
        groups, width = list(cells.values()), 1.1 * width
    return _merged(Spend(*group) for group in groups)


def _coarsened(mechanisms: tuple[Spend, ...], grid: float) -> float:
    """`grid` times the least power of ten that keeps time and memory within bounds.

    A power of ten, so that the grids of two callers always divide each other and the finer never says more.
    """
    reach, variance = grid, 0.0
    for rate, noise, steps in _without_sampling_as_one(mechanisms):
        # The largest loss within 10 standard deviations (dp-accounting cuts at exp(-50)), and a bound on the
        # variance of one step's loss: that of the Gaussian, and that of the chi-square divergence at small rates.
        reach = max(reach, (0.5 + 10 * noise) / noise**2)
        variance += steps * min(noise**-2, rate**2 * math.expm1(min(noise**-2, 700.0)))
    # The last term stands for the slack of the Chernoff bound by which dp-accounting sizes a composition.
    width = reach + 20 * math.sqrt(variance) + 5 * variance / reach
    while reach / grid > _STEP_POINTS or width / grid > _POINTS:
        grid *= 10
    return grid


def _without_sampling_as_one(mechanisms: tuple[Spend, ...]) -> list[tuple[float, float, int]]:
    """(rate, noise, steps), where all the steps on the whole data set have become one, which is exact.

    T steps of the Gaussian mechanism with noise sigma are one with sigma / sqrt(T) (Dong, Roth & Su, JRSS-B 2022,
    Corollary 2).
    """
    parts = [(each.sampling_rate, each.noise_multiplier, each.steps) for each in mechanisms if each.sampling_rate < 1]
    whole = sum(each.steps / each.noise_multiplier**2 for each in mechanisms if each.sampling_rate == 1)
    return [*parts, (1.0, 1 / math.sqrt(whole), 1)] if whole else parts


@lru_cache(maxsize=4096)
def _epsilon(mechanisms: tuple[Spend, ...], delta: float, grid: float, adjacency: Adjacency) -> float:
    parts = _without_sampling_as_one(mechanisms)
    if min(noise for _, noise, _ in parts) < _LEAST_NOISE:
        return math.inf  # all the steps on the whole data set together
    # dp-accounting raises a Fourier transform of values up to 1 to the power of the steps, so that delta carries an
    # absolute error of the steps times the precision of a double (measured: 3e-17 a step against long double). It
    # may have either sign: at delta 1e-10 and 100,000 steps epsilon would belong to a delta 3 % higher. So twice
    # as much, and a little for each convolution and each tail of 1e-15 that it cuts, is taken off delta first.
    left = delta - 2 * float_info.epsilon * sum(steps + 1000 for _, _, steps in parts)
    if left <= 0:
        return math.inf
    composed = _composed(mechanisms, grid, adjacency)
    with np.errstate(over="ignore"):  # in the hundreds its search divides by denormal numbers and answers infinity
        found, step = float(composed.get_epsilon_for_delta(left)), 1e-9
    # The search subtracts the grid from the largest loss up to a million times, and its roundings add up to 2e-9.
    while math.isfinite(found) and composed.get_delta_for_epsilon(found) > left:
        found, step = found + step, 2 * step
    return found


@lru_cache(maxsize=4)
def _composed(mechanisms: tuple[Spend, ...], grid: float, adjacency: Adjacency) -> "PrivacyLossDistribution":
    """The privacy loss of everything; kept, since several deltas are asked of it."""
    whole, *rest = (
        _repeated(_step(rate, noise, grid, adjacency), steps)
        for rate, noise, steps in _without_sampling_as_one(mechanisms)
    )
    for each in rest:
        whole = whole.compose(each)
    return whole


def _repeated(once: "PrivacyLossDistribution", steps: int) -> "PrivacyLossDistribution":
    """`once`, that many times; in stages, because dp-accounting raises the number of its points to the steps."""
    if steps <= _STAGE_STEPS:
        return once.self_compose(steps)
    stages, rest = divmod(steps, _STAGE_STEPS)
    whole = _repeated(once.self_compose(_STAGE_STEPS), stages)
    return whole.compose(once.self_compose(rest)) if rest else whole


@lru_cache(maxsize=16)
def _step(rate: float, noise: float, grid: float, adjacency: Adjacency) -> "PrivacyLossDistribution":
    """The privacy loss of one step; kept, since building it takes longer than composing it."""
    # Imported here: loading dp-accounting takes half a second, which commands that never account need not pay.
    from fedloom.core.privacy.gaussian_step import gaussian_step, replace_one_step

    made = gaussian_step if adjacency == "add or remove one" else replace_one_step
    return made(rate, noise, grid)
