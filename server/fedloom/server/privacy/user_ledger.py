"""The account of user-level privacy: what the rounds of one run cost a whole client, and who may still be asked.

The unit is one client with everything it sends in the run. Neighbours differ by zeroing one client out: it is
asked in the same rounds, and all its updates count as zero. Since the sum has a fixed denominator, its absence
would be the same to it; but who is asked and how many answer is public and not part of the guarantee.

The mechanism is one Gaussian for the whole run. Rounds of fresh noise compose to a single one, and a tree is one
release with its own sensitivity, also when later updates depend on earlier releases (Denisov et al., NeurIPS 2022,
arXiv 2202.08312). Its epsilon at a delta is therefore exact (Balle and Wang, ICML 2018, arXiv 1805.06530, theorem 8).
No amplification is claimed for the choice of clients. Example-level epsilon is another promise, kept by clients
without trusting the coordinator; the two are never added up.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from fedloom.core.config.run import RunConfig, UserLevelSection
from fedloom.core.errors import BudgetError, ConfigError
from fedloom.server.rounds.state import Event, RoundClosed
from fedloom.strategies.api import Strategy
from fedloom.strategies.transforms.tree_noise import sensitivity
from fedloom.strategies.transforms.user_level_dp import UserLevel

__all__ = [
    "check_opening",
    "check_strategy",
    "check_supply",
    "eligible",
    "participations",
    "settled",
    "spent",
    "statement",
]

_STEP = 1e-3
"""Calibrated noise multipliers are multiples of this, rounded up."""


def settled(config: RunConfig) -> UserLevelSection:
    """[user_level] with cohort and noise multiplier filled in, once it is sure that the whole run fits its budget.

    Raises:
        ConfigError: Weights are not uniform, the cohort is unknown, keys contradict each other, or the run would cost
            more than epsilon.
    """
    user = config.user_level
    if not user.enabled:
        return user
    if config.strategy.weighting == "examples":
        raise ConfigError(
            f'user_level.enabled with strategy.weighting = "{config.strategy.weighting}": weights would lift one '
            'client above the clip norm; set strategy.weighting = "uniform"'
        )
    cohort = user.cohort or config.rounds.clients_per_round
    if cohort is None:
        raise ConfigError(
            "user_level.enabled needs a public number to divide by; set user_level.cohort or rounds.clients_per_round"
        )
    if user.delta * cohort >= 1:
        raise ConfigError(f"user_level.delta = {user.delta:g} is no promise to a cohort of {cohort}; set it below 1/m")
    rounds = config.run.rounds
    noise = user.noise_multiplier or _calibrate(user, rounds)
    full = user.model_copy(update={"cohort": cohort, "noise_multiplier": noise})
    if (cost := spent(full, rounds)) > user.epsilon:
        raise ConfigError(
            f"user_level.noise_multiplier = {noise:g} over {rounds} rounds costs one client epsilon {cost:.3f} at "
            f"delta {user.delta:g}, but user_level.epsilon = {user.epsilon:g}; leave the multiplier out or raise one"
        )
    return full


def spent(user: UserLevelSection, rounds: int) -> float:
    """Epsilon of one client after `rounds` committed rounds, at user.delta; the worst client's, by public rules alone.

    Raises:
        ConfigError: The section has no noise multiplier yet; see `settled`.
    """
    # Loads scipy, which a coordinator without user-level privacy need not wait for.
    from dp_accounting import get_epsilon_gaussian

    if user.noise_multiplier is None:
        raise ConfigError("user_level.noise_multiplier is not known yet; complete the run file with `calibrated`")
    moved = _moved(user, rounds)
    return float(get_epsilon_gaussian(user.noise_multiplier / moved, user.delta)) if moved else 0.0


def statement(user: UserLevelSection, rounds: int) -> dict[str, Any] | None:
    """What a report says of `rounds` committed rounds; None without user-level privacy.

    Raises:
        ConfigError: See `spent`.
    """
    if not user.enabled:
        return None
    return {
        "epsilon": spent(user, rounds),
        "delta": user.delta,
        "unit": "one client",
        "adjacency": "zero out one client: its updates or zeros in their place",
        "mechanism": f"{user.mechanism} noise added by a trusted coordinator to the sum of clipped updates",
        "noise_multiplier": user.noise_multiplier,
        "clip_norm": user.clip_norm,
        "target_quantile": user.target_quantile,
        "cohort": user.cohort,
        "max_participations": user.max_participations,
        "rounds": rounds,
        "accountant": "exact Gaussian (Balle and Wang, 2018), dp-accounting; no amplification by sampling",
    }


def check_strategy(user: UserLevelSection, strategy: Strategy) -> None:
    """Refuse a strategy that does not do what the account charges for.

    Raises:
        ConfigError: It is not wrapped, or with other numbers.
    """
    if not user.enabled:
        return
    keys = ("cohort", "clip_norm", "noise_multiplier", "mechanism", "target_quantile", "clip_rate")
    wrong = [key for key in keys if not isinstance(strategy, UserLevel) or getattr(strategy, key) != getattr(user, key)]
    if wrong:
        raise ConfigError(
            f"user_level is enabled, but strategy {type(strategy).__name__} does not carry it out "
            f"({', '.join(wrong)}); complete the run file with `calibrated` and wrap by `build_strategy`"
        )


def check_opening(user: UserLevelSection, committed: int) -> None:
    """Refuse to open a round after which the budget would be exceeded.

    Raises:
        BudgetError: It would.
    """
    if user.enabled and (cost := spent(user, committed + 1)) > user.epsilon:
        raise BudgetError(
            f"round {committed + 1} is not opened: it would bring one client's user-level epsilon to {cost:.3f}, and "
            f"user_level.epsilon = {user.epsilon:g} at delta {user.delta:g}; export the adapter as it is"
        )


def participations(events: Iterable[Event]) -> Counter[str]:
    """Rounds in which each client's update entered the sum, from the log."""
    return Counter(client for event in events if isinstance(event, RoundClosed) for client in event.clients)


def eligible(user: UserLevelSection, taken: Counter[str], clients: Collection[str]) -> Collection[str]:
    """Those of `clients` that may still be asked; `taken` counts the rounds each has been part of."""
    limit = user.max_participations if user.enabled else None
    return clients if limit is None else [client for client in clients if taken[client] < limit]


def check_supply(config: RunConfig, clients: int) -> None:
    """Refuse a run that `clients` clients cannot finish however cohorts are drawn, since each is asked so often only.

    Raises:
        ConfigError: Some draw would leave fewer than rounds.min_clients.
    """
    limit, rounds = config.user_level.max_participations, config.run.rounds
    if not config.user_level.enabled or limit is None or rounds <= limit:
        return
    exhausted = (rounds - 1) * min(config.rounds.clients_per_round or clients, clients) // limit
    if clients - exhausted < config.rounds.min_clients:
        raise ConfigError(
            f"{clients} clients in {limit} rounds each may be too few for {rounds} rounds; raise "
            "user_level.max_participations, lower run.rounds, rounds.clients_per_round or rounds.min_clients"
        )


def _moved(user: UserLevelSection, rounds: int) -> float:
    """L2 sensitivity of everything released in `rounds` rounds, in units of the clip norm."""
    taken = min(rounds, user.max_participations or rounds)
    return sensitivity(rounds, taken) if user.mechanism == "tree" else math.sqrt(taken)


def _calibrate(user: UserLevelSection, rounds: int) -> float:
    """The smallest multiple of 0.001 whose `rounds` rounds cost at most user.epsilon."""
    from dp_accounting import get_sigma_gaussian

    units: int = math.ceil(_moved(user, rounds) * get_sigma_gaussian(user.epsilon, user.delta) / _STEP)
    while spent(user.model_copy(update={"noise_multiplier": units * _STEP}), rounds) > user.epsilon:
        units += 1
    return units * _STEP
