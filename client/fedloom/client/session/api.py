"""What a participant needs of whoever trains: the seam between the protocol and torch."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedloom.core.errors import ProtocolError, SchemaError
from fedloom.core.schema import Array, Schema, Tensors
from fedloom.proto.messages import Assignment, Joined, RoundStatus

__all__ = [
    "CheckCancelled",
    "RoundCancelled",
    "RoundContext",
    "Trained",
    "Training",
    "check_same_run",
    "check_schema",
    "within",
]

log = logging.getLogger(__name__)

CheckCancelled = Callable[[], None]
"""Called between two steps of a training; raises RoundCancelled when it is to stop."""


class RoundCancelled(Exception):
    """Nobody will take the update that is being trained: it is dropped, and no error of ours is to hide that."""


class RoundContext:
    """One round's training, and what the heartbeats hear about it."""

    def __init__(self, round: int) -> None:
        self.round = round
        self._over = ""

    def hear(self, standing: RoundStatus) -> None:
        """Called from the heartbeat thread. A round that is opened again keeps its number and is not over."""
        if standing.oldest > self.round:
            self._over = f"updates are taken from round {standing.oldest + 1} on"

    def refuse(self, why: str) -> None:
        """Called from the heartbeat thread. A client that was put out of the run trains, and spends, no further."""
        self._over = f"nobody takes an update of this client: {why}"

    def check_cancelled(self) -> None:
        """Go on, or raise RoundCancelled."""
        if self._over:
            raise RoundCancelled(self._over)


@dataclass(frozen=True)
class Trained:
    """What a round's training leaves."""

    delta: dict[str, Array]
    """Trained value minus broadcast value, float32, under the upload schema."""
    charge: int | None
    """Number of the ledger's charge; None without privacy."""
    score: tuple[float, ...] = ()
    """What an evaluation releases, see `evaluation.released`; empty where the round has none."""


class Training(Protocol):
    """Does the work of a round."""

    @property
    def schema(self) -> Schema:
        """The adapter's schema as the base model here gives it."""

    @property
    def declared_examples(self) -> int:
        """Number of examples the coordinator is told; 0 declares nothing."""

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        """Do one round's work from `broadcast`, calling `check_cancelled` before every step.

        Raises:
            RoundCancelled: `check_cancelled` says so. What was charged stays charged.
        """

    def release(self, charge: int | None, digest: str) -> None:
        """Note, durably, that the payload with this SHA-256 is about to leave for `Trained.charge`."""

    def drop(self, why: str | None) -> bool:
        """Give up the work that was begun last, if it was charged and not released.

        Args:
            why: What is noted of its charge, durably; None notes nothing, for the work may be done again.

        Returns:
            Whether there is such a charge.
        """


def check_schema(trainer: Training, joined: Joined) -> None:
    """Refuse to train when the base model here does not give the run's schema.

    Raises:
        SchemaError: It gives another one.
    """
    if trainer.schema.digest != joined.schema.digest:
        raise SchemaError(
            f"the run's adapter has {len(joined.schema.tensors)} tensors (schema {joined.schema.digest[:12]}), this "
            f"base model gives {len(trainer.schema.tensors)} (schema {trainer.schema.digest[:12]}); use "
            "the base model and adapter section that the run names"
        )


def within(largest: float, delta: Tensors) -> dict[str, Array]:
    """The change with what is beyond the largest value that its codec carries cut to that.

    A round that has been charged must be answered: refused here, it would be asked for, charged and refused again. What
    is cut has been noised, so this costs no privacy.
    """
    beyond = [name for name, tensor in delta.items() if np.abs(tensor).max() > largest]
    if beyond:
        log.warning("values of %s, such as %r, are beyond %g and cut to it", len(beyond), beyond[0][:64], largest)
    return {name: np.clip(each, -largest, largest) if name in beyond else each for name, each in delta.items()}


def check_same_run(known: Joined, joined: Joined) -> None:
    """Refuse a coordinator that comes back with another run than the one this client checked and prepared for.

    Its name counts too: what a client remembers of its secure sums, it remembers by that name.

    Raises:
        ProtocolError: It is another one.
    """
    if (joined.run, joined.spec, joined.schema) != (known.run, known.spec, known.schema):
        raise ProtocolError("the coordinator changed the run while this client was away; start the client anew")
