"""Buffered asynchronous aggregation, FedBuff (Nguyen et al., AISTATS 2022, arXiv 2106.06639, algorithm 1).

A client that asks for work trains from the newest state, however long others take. Its update joins the buffer of
the round that is open when it comes, and K updates make the next state: w + 1/K sum_k s_k delta_k for a strategy that
takes the mean, with s_k = 1/sqrt(1 + staleness), see `transforms.buffered`. The staleness of an update is the number of
commits since its start.
The log says which updates each buffer held, so a replay gives the same bytes.

Unlike in the paper, a client has at most one update in a buffer. It is then never more than 1/K of a step, and
one round is never answered with two updates.
"""

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.strategies.api import Strategy
from fedloom.strategies.transforms.buffered import Buffered

__all__ = ["check_buffered"]


def check_buffered(config: RunConfig, strategy: Strategy) -> None:
    """Refuse a run file whose buffered rounds would not mean what they say.

    Raises:
        ConfigError: The number of updates is missing, clients are over-selected, sums are secure or noised for whole
            clients, or nothing discounts what was made from an older state.
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
    if not isinstance(strategy, Buffered):
        raise ConfigError(
            f'rounds.mode = "buffered", but strategy {name} does not discount updates by their age; wrap it by '
            "`build_strategy`"
        )
