"""Who and what is admitted to a run: run files, client names, and messages by whom they are from."""

from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, ProtocolError
from fedloom.core.limits import MAX_CLIENTS, MAX_NAME_LENGTH
from fedloom.proto.messages import PROTOCOL_VERSION
from fedloom.server.rounds.fedbuff import check_buffered
from fedloom.server.rounds.membership import Member, Members
from fedloom.server.rounds.update_norm import check_noise
from fedloom.strategies.api import Strategy

__all__ = ["MAX_EXAMPLES", "admitted", "check_config", "check_join", "check_room", "check_work"]

MAX_EXAMPLES = 10**12
"""Most examples one client may declare; more is a typing error or an attack on the weights."""

_LEAST_SUMMED = 3


def check_config(config: RunConfig, strategy: Strategy) -> None:
    """Refuse a run file whose rounds could never close, whose codecs are unknown, or whose secure sums make no sense.

    Raises:
        ConfigError: A cohort is smaller than the updates a round needs, or a round may close with fewer than the
            strategy needs, or it ignores weights that are set, or its clients must take other steps, or it looks at
            noise that is not known. With secure
            aggregation: the strategy needs the updates themselves, weights differ, or cohorts are too small or too
            large.
        CodecError: A codec is unknown.
    """
    for name in config.spec.components["codecs"]:
        codec(name)
    size = config.rounds.clients_per_round
    if size is not None and size < config.rounds.min_clients:
        raise ConfigError(
            f"rounds.clients_per_round = {size} is below rounds.min_clients = {config.rounds.min_clients}: "
            "no round could ever close; raise the first or lower the second"
        )
    if config.rounds.dropout_rate and size is None:
        raise ConfigError(
            "rounds.dropout_rate needs rounds.clients_per_round, the updates wanted; set that or leave the rate out"
        )
    if config.rounds.keep and config.user_level.enabled:
        raise ConfigError(
            f"rounds.keep = {config.rounds.keep} with user_level.enabled = true: the noise is added to the sum, and "
            "updates without any would stay on the disk; leave one of them out"
        )
    if config.rounds.mode == "buffered":
        check_buffered(config, strategy)
    _check_counts(config, strategy)
    if strategy.traits.plain_sgd:
        _check_plain(config)
    if strategy.traits.reads_noise:
        check_noise(config)
    if config.secure_aggregation.enabled:
        _check_secure(config, strategy)
    if config.user_level.enabled and config.federated_evaluation.enabled:
        raise ConfigError(
            "federated_evaluation.enabled = true with user_level.enabled = true: its noise covers one example, not all "
            "of a client's; choose one of them"
        )


def check_join(client: str, protocol: int, declared_examples: int) -> None:
    """Refuse a client that cannot take part in this run.

    Raises:
        ProtocolError: The name is not one, or another protocol version is spoken.
        ConfigError: The client declares more examples than any has.
    """
    if not 0 < len(client) <= MAX_NAME_LENGTH or not client.isprintable() or " " in client:
        raise ProtocolError(
            f"client name {client[:64]!r}: 1 to {MAX_NAME_LENGTH} printable characters without spaces are allowed"
        )
    if protocol != PROTOCOL_VERSION:
        raise ProtocolError(
            f"client {client!r} speaks protocol {protocol}, this coordinator {PROTOCOL_VERSION}; "
            "install the same version of fedloom on both sides"
        )
    if declared_examples > MAX_EXAMPLES:
        raise ConfigError(
            f"client {client!r} declares {declared_examples} examples; at most {MAX_EXAMPLES} are allowed"
        )


def check_room(client: str, members: Members) -> None:
    """Refuse one name too many.

    Raises:
        ProtocolError: The run has as many clients as it admits, and this is not one of them.
    """
    if client not in members and len(members) >= MAX_CLIENTS:
        raise ProtocolError(f"the run has {MAX_CLIENTS} clients already; join under a name already known")


def check_work(config: RunConfig, client: str, declared_examples: int) -> None:
    """Refuse work to a client whose update could not be weighed. Joining to look at the run needs no declaration.

    Raises:
        ConfigError: The run weighs clients by examples and this one has declared none.
    """
    if config.strategy.weighting == "examples" and declared_examples < 1:
        raise ConfigError(
            f"client {client!r} declares no examples, but this run weighs clients by examples; "
            f"set data.declared_examples to 1 to {MAX_EXAMPLES} in the client's policy"
        )


def admitted(members: Members, client: str, sent: tuple[str, int], here: tuple[str, int], now_s: float) -> Member:
    """The member behind a message, whose lease begins anew.

    Args:
        members: Who is known.
        client: Who the message says it is from.
        sent: Run and epoch that it is addressed to.
        here: Run and epoch of this coordinator.
        now_s: The coordinator's clock.

    Raises:
        ProtocolError: The run, the epoch or the client is not known here.
    """
    (run, epoch), (this_run, this_epoch) = sent, here
    if run != this_run:
        raise ProtocolError(f"run {run[:64]!r} is not the one served here; join again")
    if epoch != this_epoch:
        raise ProtocolError(f"epoch {epoch} is not the coordinator's, it has restarted: now {this_epoch}; join again")
    if client not in members or not members[client].joined:
        raise ProtocolError(f"client {client[:64]!r} is not known in this epoch; join first")
    members.seen(client, now_s)
    return members[client]


def _check_counts(config: RunConfig, strategy: Strategy) -> None:
    """Refuse rounds that could close with fewer updates than the strategy commits, and weights it does not look at."""
    least = strategy.traits.least_updates
    if config.rounds.min_clients < least:
        raise ConfigError(
            f"rounds.min_clients = {config.rounds.min_clients} with strategy {config.strategy.name!r}, which as "
            f"configured needs {least} updates a round; raise it to {least} or more, or lower what the strategy bears"
        )
    if strategy.traits.unweighted and config.strategy.weighting == "examples":
        raise ConfigError(
            f'strategy.weighting = "{config.strategy.weighting}" with strategy {config.strategy.name!r}, which counts '
            'every client once whatever it declares; set it to "uniform"'
        )


def _check_plain(config: RunConfig) -> None:
    """Refuse local steps other than those of plain SGD."""
    plain = {"optimizer": "sgd", "momentum": 0.0, "smoothing": False, "ema": 0.0, "proximal_mu": 0.0}
    given = {**config.train.model_dump(), **config.train.built().model_dump()}
    for key, value in plain.items():
        if (asked := given.get(key, value)) != value:
            raise ConfigError(
                f"train.{key} = {asked!r} with strategy {config.strategy.name!r}, which takes the mean change of a "
                f"step for a gradient; plain SGD alone has that: set it to {value!r} or choose another strategy, such "
                "as feddyn or fedavg"
            )


def _check_secure(config: RunConfig, strategy: Strategy) -> None:
    """Refuse secure aggregation where a sum is not enough, or would hide nobody."""
    section, rounds = config.secure_aggregation, config.rounds
    if config.user_level.enabled:
        raise ConfigError(
            "user_level.enabled with secure_aggregation.enabled: the coordinator must clip every client's update, and "
            "secure aggregation shows it their sum only; switch one of them off"
        )
    if not strategy.traits.linear:
        bound = " with strategy.norm_bound" if config.strategy.norm_bound is not None else ""
        raise ConfigError(
            f"strategy {config.strategy.name!r}{bound} needs every update by itself, and secure aggregation gives "
            "their sum alone; choose a linear one such as fedavg, ffa or fedsvd, or set secure_aggregation.enabled = "
            "false"
        )
    if config.strategy.weighting == "examples":
        raise ConfigError(
            f'strategy.weighting = "{config.strategy.weighting}" with secure aggregation, which sums updates of equal '
            'weight; set it to "uniform"'
        )
    if rounds.dropout_rate or rounds.max_update_norm is not None:
        raise ConfigError(
            "rounds.dropout_rate and rounds.max_update_norm need updates that come one by one, and secure aggregation "
            "gives only the sum of a whole cohort; leave them out"
        )
    if rounds.min_clients < _LEAST_SUMMED:
        raise ConfigError(
            f"rounds.min_clients = {rounds.min_clients} with secure aggregation: in a sum of two each client knows the "
            f"other's update; at least {_LEAST_SUMMED} are needed"
        )
    section.integers.check(max(rounds.min_clients, rounds.clients_per_round or 0))
