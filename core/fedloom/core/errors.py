"""Every error fedloom raises on purpose.

::

    FedloomError
    ├── ConfigError        a run file, policy file or command-line value is wrong
    ├── DataError          private or held-out data is missing or malformed
    ├── ModelError         the base model is missing, altered or unsupported
    ├── SchemaError        tensors do not fit the agreed schema
    ├── CodecError         payload bytes do not decode under the agreed codec
    ├── UpdateRejected     a well-formed update that must not be folded (NaN, Inf)
    ├── PolicyError        the client's own policy refuses what the server asked
    │   └── BudgetError    the privacy budget of the data set would be exceeded
    ├── LedgerError        the privacy ledger cannot be trusted or opened
    ├── ProtocolError      a message that does not fit the state of the run
    ├── IdentityError      who the other side is, or this one, is not proven
    │   └── Forbidden      it is proven, and may not do this
    ├── Unavailable        the other side cannot be reached
    │   └── Overloaded     it can, and says when to come back
    ├── StrategyError      a strategy, often another package's, fails or breaks its interface
    └── StoreError         the coordinator's state cannot be read or written

A message says what was received, what is allowed and what to do about it.
"""

__all__ = [
    "BudgetError",
    "CodecError",
    "ConfigError",
    "DataError",
    "FedloomError",
    "Forbidden",
    "IdentityError",
    "LedgerError",
    "ModelError",
    "Overloaded",
    "PolicyError",
    "ProtocolError",
    "SchemaError",
    "StoreError",
    "StrategyError",
    "Unavailable",
    "UpdateRejected",
]


class FedloomError(Exception):
    """Root of the tree; catch it to handle anything fedloom raises on purpose."""


class ConfigError(FedloomError):
    """A run file, policy file or command-line value is wrong."""


class DataError(FedloomError):
    """Private or held-out data is missing or malformed."""


class ModelError(FedloomError):
    """The base model is missing, altered or unsupported."""


class SchemaError(FedloomError):
    """Tensors do not fit the agreed schema."""


class CodecError(FedloomError):
    """Payload bytes do not decode under the agreed codec."""


class UpdateRejected(FedloomError):
    """A well-formed update that must not be folded into the adapter."""


class PolicyError(FedloomError):
    """The client's own policy refuses what the server asked."""


class BudgetError(PolicyError):
    """The privacy budget of the data set would be exceeded."""


class LedgerError(FedloomError):
    """The privacy ledger cannot be trusted or opened."""


class ProtocolError(FedloomError):
    """A message that does not fit the state of the run."""


class IdentityError(FedloomError):
    """Who the other side is, or this one, is not proven."""


class Forbidden(IdentityError):
    """Who the other side is, is proven, and it may not do this."""


class Unavailable(FedloomError):
    """The other side cannot be reached."""


class Overloaded(Unavailable):
    """The other side has too much to do and says when to come back.

    Args:
        text: What is too much.
        retry_after_s: Seconds to wait before asking again.
    """

    def __init__(self, text: str, retry_after_s: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class StrategyError(FedloomError):
    """A strategy, often another package's, fails or breaks its interface."""


class StoreError(FedloomError):
    """The coordinator's state cannot be read or written."""
