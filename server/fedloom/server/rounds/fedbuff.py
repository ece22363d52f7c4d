"""Buffered asynchronous aggregation, FedBuff (Nguyen et al., AISTATS 2022, arXiv 2106.06639, algorithm 1).

A client that asks for work trains from the newest state, however long others take. Its update joins the buffer of
the round that is open when it comes, and K updates make the next state: w + 1/K sum_k s_k delta_k for a strategy that
takes the mean, with s_k = 1/sqrt(1 + staleness). The staleness of an update is the number of commits since its start.
The log says which updates each buffer held, so a replay gives the same bytes.

Unlike in the paper, a client has at most one update in a buffer. It is then never more than 1/K of a step, and
one round is never answered with two updates.
"""

import math
from dataclasses import replace

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.strategies.api import Strategy, Update

__all__ = ["check_buffered", "discounted"]


def check_buffered(config: RunConfig, strategy: Strategy) -> None:
    """Refuse a run file whose buffered rounds would not mean what they say.

    Raises:
        ConfigError: The number of updates is missing, clients are over-selected, sums are secure or noised for whole
            clients, or the strategy cannot use a change made from an older state.
    """
    rounds, name = config.rounds, type(strategy).__name__
    if rounds.clients_per_round is None:
        raise ConfigError('rounds.mode = "buffered" needs rounds.clients_per_round, the updates that make a round')
    if rounds.dropout_rate:
        raise ConfigError(
            'rounds.dropout_rate with rounds.mode = "buffered", which waits for nobody in particular; leave it out'
        )
    if config.secure_aggregation.enabled or config.user_level.enabled:
        raise ConfigError(
            'rounds.mode = "buffered" weighs updates by their age, so they can neither be summed unseen nor be covered '
            'by the user-level account; switch secure_aggregation and user_level off or set mode = "synchronous"'
        )
    if getattr(strategy, "rewrites", False) or not getattr(strategy, "linear", False):
        raise ConfigError(
            f"strategy {name} cannot use changes made from an older state: it rewrites its coordinates or is not "
            'linear; set rounds.mode = "synchronous" or choose fedavg, ffa or fedpeft'
        )


def discounted(update: Update, staleness: int) -> Update:
    """The update with its change times 1/sqrt(1 + staleness); its weight stays, so the mean is over all alike."""
    if staleness == 0:
        return update
    factor = 1 / math.sqrt(1 + staleness)
    return replace(update, delta={name: (delta * factor).astype(delta.dtype) for name, delta in update.delta.items()})
