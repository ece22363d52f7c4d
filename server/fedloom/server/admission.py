"""Who and what is admitted to a run before it has any state: run files and client names."""

from fedloom.proto.codec import codec
from fedloom.proto.errors import ConfigError, ProtocolError
from fedloom.proto.limits import MAX_NAME_LENGTH
from fedloom.proto.messages import PROTOCOL_VERSION
from fedloom.proto.run import RunConfig

__all__ = ["MAX_CLIENTS", "MAX_EXAMPLES", "check_config", "check_join", "check_work"]

MAX_CLIENTS = 10_000
"""Most client names one run admits, the upper end of [data] clients."""

MAX_EXAMPLES = 10**12
"""Most examples one client may declare; more is a typing error or an attack on the weights."""


def check_config(config: RunConfig) -> None:
    """Refuse a run file whose rounds could never close, or whose codecs are unknown.

    Raises:
        ConfigError: A cohort is smaller than the updates a round needs.
        CodecError: A codec is unknown.
    """
    codec(config.wire.upload)
    codec(config.wire.broadcast)
    size = config.rounds.clients_per_round
    if size is not None and size < config.rounds.min_clients:
        raise ConfigError(
            f"rounds.clients_per_round = {size} is below rounds.min_clients = {config.rounds.min_clients}: "
            "no round could ever close; raise the first or lower the second"
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
