"""The coordinator's half of a secure sum: a pure state machine over messages, and the unmasking of its result.

See `fedloom.core.secagg` for the steps. Nothing here reads a clock or writes to a disk. Of the masked updates only
their running sum modulo 2^32 is kept, which is as good as random until enough survivors have given their shares.
"""

import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedloom.core.config.run import SecureAggregationSection
from fedloom.core.errors import ProtocolError
from fedloom.core.secagg.fixed_point import Words, words
from fedloom.core.secagg.keys import (
    ADVERT_BYTES,
    SEALED_BYTES,
    SIGNATURE_BYTES,
    Advert,
    Place,
    pair_key,
    seed_digest,
    self_key,
)
from fedloom.core.secagg.masks import add_masks
from fedloom.core.secagg.shamir import SHARE_BYTES, combine, secret_bytes, share_from_bytes
from fedloom.core.secagg.steps import ALL, Step, needed
from fedloom.proto.messages import StepMessage, StepResult

__all__ = ["Exchange", "Unmasking", "unmasked"]

_log = logging.getLogger(__name__)

_PART_BYTES = {
    Step.ADVERTISE: ADVERT_BYTES,
    Step.SHARE: SEALED_BYTES,
    Step.CONFIRM: SIGNATURE_BYTES,
    Step.UNMASK: SHARE_BYTES,
}


@dataclass(frozen=True)
class Unmasking:
    """All that is needed to take the masks off a sum."""

    place: Place
    threshold: int
    adverts: Mapping[str, bytes]
    """What the cohort has advertised, by name; a client's shares are those for x = 1 + its place in sorted order."""
    sharers: tuple[str, ...]
    """Those whose masks may be in the sum."""
    survivors: tuple[str, ...]
    """Those whose updates are."""
    shares: Mapping[str, Mapping[str, bytes]]
    """What each of at least `threshold` survivors has revealed, by peer."""
    total: Words
    """Sum of the masked updates; used up."""


@dataclass
class Exchange:
    """The sum of one round, through as many attempts as it takes.

    Args:
        place: Run, epoch and round.
        section: The run's settings.
        min_clients: Least number of clients in the sum.
        values: Words in an update.

    Attributes:
        attempt: Number of the attempt under way, from 1.
        step: The step that is open; None once the sum can be unmasked.
        members: Those who take part in the open step; in the first step, everybody may.
    """

    place: Place
    section: SecureAggregationSection
    min_clients: int
    values: int
    attempt: int = 1
    step: Step | None = Step.ADVERTISE
    members: frozenset[str] = frozenset()
    _came: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    _closed: dict[Step, dict[str, Mapping[str, bytes]]] = field(default_factory=dict)
    _total: Words = field(default_factory=lambda: np.zeros(0, "<u4"))

    def take(self, client: str, message: StepMessage) -> StepResult | None:
        """A client's message; the result of its step if that is closed, else None.

        Raises:
            ProtocolError: The client or the message does not belong here.
        """
        step = message.step
        if step is Step.ADVERTISE:
            return self._take_keys(client, message)
        if message.attempt != self.attempt:
            return StepResult(self.attempt, {})  # it begins again
        closed = self._closed.get(step)
        if closed is not None and client in closed:
            self._check_same(client, step, closed[client], message.parts)
            return StepResult(self.attempt, self._result(step, client))
        self._check_member(client, step)
        if step is Step.MASK:
            if client not in self._came:
                raise ProtocolError(f"client {client!r} asks for the survivors before its masked update has come")
            return None
        self._check_parts(client, step, message.parts)
        if client in self._came:
            self._check_same(client, step, self._came[client], message.parts)
        self._came[client] = dict(message.parts)
        return None

    def add(self, client: str, attempt: int, payload: bytes) -> bool:
        """Add a masked update to the sum; True when exactly it was there before.

        Raises:
            ProtocolError: It is of another attempt or of no member, it has another length, or another one was there.
        """
        if attempt != self.attempt:
            raise ProtocolError(
                f"masked update of attempt {attempt}; the sum is at attempt {self.attempt}, begin again"
            )
        masked = words(payload, self.section.integers.word)
        if masked.shape != (self.values,):
            raise ProtocolError(f"masked update of {len(masked)} words; {self.values} are needed")
        parts = {ALL: hashlib.sha256(payload).digest()}
        known = self._closed.get(Step.MASK, self._came if self.step is Step.MASK else {}).get(client)
        if known is not None:
            self._check_same(client, Step.MASK, known, parts)
            return True
        self._check_member(client, Step.MASK)
        if not self._came:
            self._total = masked.copy()
        else:
            np.add(self._total, masked, out=self._total)
        self._came[client] = parts
        return False

    def advance(self, waited_for: Collection[str], overdue: bool) -> bool:
        """Close the open step if that is due, or begin again if it can no longer succeed; whether anything changed.

        Args:
            waited_for: The cohort without those that are lost.
            overdue: Whether the step's time is up.
        """
        if self.step is None:
            return False
        expected = set(waited_for) if self.step is Step.ADVERTISE else set(waited_for) & self.members
        missing, need = expected - self._came.keys(), self._need()
        if len(self._came) >= need and (overdue or not missing):
            self._close(self.step)
            return True
        # Nobody who has given shares for one list gives them for another: the last step can only wait.
        hopeless = len(self._came) + len(missing) < need or overdue
        if hopeless and self.step not in (Step.ADVERTISE, Step.UNMASK):
            _log.warning(
                "round %d: %d of the %d clients needed in step %s of the secure sum; it begins anew",
                *(self.place.round + 1, len(self._came), need, self.step.name.lower()),
            )
            self.restart()
            return True
        return False

    def unmasking(self) -> Unmasking | None:
        """What unmasks the sum; None before the last step is closed."""
        if self.step is not None:
            return None
        adverts = {name: parts[ALL] for name, parts in self._closed[Step.ADVERTISE].items()}
        sharers, survivors = (tuple(sorted(self._closed[step])) for step in (Step.SHARE, Step.MASK))
        shares = self._closed[Step.UNMASK]
        return Unmasking(self.place, self._threshold(), adverts, sharers, survivors, shares, self._total)

    def restart(self) -> None:
        """Begin again with the keys that clients send from now on."""
        self.attempt, self.step, self.members = self.attempt + 1, Step.ADVERTISE, frozenset()
        self._came, self._closed, self._total = {}, {}, np.zeros(0, "<u4")

    def _take_keys(self, client: str, message: StepMessage) -> StepResult | None:
        """A client's keys; whoever comes too late waits for the next attempt, or for the round to end."""
        if self.step is Step.ADVERTISE:
            self._check_parts(client, Step.ADVERTISE, message.parts)
            if client not in self._came and len(self._came) >= self.section.max_clients:
                raise ProtocolError(
                    f"the sum of round {message.round + 1} has {self.section.max_clients} clients already"
                )
            self._came[client] = dict(message.parts)
        elif self._closed[Step.ADVERTISE].get(client) == message.parts:
            return StepResult(self.attempt, self._result(Step.ADVERTISE, client))
        return None

    def _close(self, step: Step) -> None:
        self._closed[step] = self._came
        self.members, self._came = frozenset(self._came), {}
        self.step = Step(step + 1) if step < Step.UNMASK else None

    def _result(self, step: Step, client: str) -> dict[str, bytes]:
        """What a client gets from a closed step."""
        came = self._closed[step]
        match step:
            case Step.SHARE:
                return {name: parts[client] for name, parts in came.items() if name != client}
            case Step.MASK:
                return dict.fromkeys(came, b"")
            case Step.UNMASK:
                return {}
        return {name: parts[ALL] for name, parts in came.items()}

    def _threshold(self) -> int:
        return needed(len(self._closed[Step.ADVERTISE]), self.section.threshold)

    def _need(self) -> int:
        """Clients without which the open step cannot be closed."""
        if self.step is Step.ADVERTISE:
            return self.min_clients
        return max(self._threshold(), self.min_clients if self.step in (Step.SHARE, Step.MASK) else 0)

    def _check_member(self, client: str, step: Step) -> None:
        if step is not self.step or client not in self.members:
            raise ProtocolError(
                f"client {client!r} is too late or too early for step {step.name.lower()} of the secure sum of round "
                f"{self.place.round + 1}; it goes on without this update"
            )

    def _check_parts(self, client: str, step: Step, parts: Mapping[str, bytes]) -> None:
        if step is Step.SHARE:
            wanted = self.members - {client}
        elif step is Step.UNMASK:
            wanted = frozenset(self._closed[Step.SHARE])
        else:
            wanted = frozenset({ALL})
        if parts.keys() != wanted or any(len(part) != _PART_BYTES[step] for part in parts.values()):
            raise ProtocolError(
                f"client {client!r} sends {len(parts)} parts in step {step.name.lower()}; {len(wanted)} of "
                f"{_PART_BYTES[step]} bytes are needed"
            )

    @staticmethod
    def _check_same(client: str, step: Step, known: Mapping[str, bytes], parts: Mapping[str, bytes]) -> None:
        if step is Step.MASK and not parts:
            return  # it only asks
        if known != parts:
            raise ProtocolError(
                f"client {client!r} has sent something else in step {step.name.lower()} before; "
                "only the very same bytes may be sent again"
            )


def unmasked(given: Unmasking) -> Words:
    """The sum of the survivors' updates, modulo 2^32; `given.total` is used up.

    Every secret that is put together is compared with what its owner has advertised.

    Raises:
        ProtocolError: Shares of a client do not give its secret: somebody has sent wrong ones.
    """
    adverts = {name: Advert.from_bytes(name, data) for name, data in given.adverts.items()}
    plus: list[bytes] = []
    minus: list[bytes] = []
    for name in given.sharers:
        secret = _secret(given, name)
        if name in given.survivors:
            _check(given, name, seed_digest(secret), adverts[name].seed_digest)
            minus.append(self_key(secret, given.place, name))
            continue
        mine = X25519PrivateKey.from_private_bytes(secret)
        _check(given, name, mine.public_key().public_bytes_raw(), adverts[name].mask_key)
        for survivor in given.survivors:
            key = pair_key(mine, adverts[survivor].mask_key, given.place, name, survivor)
            # The survivor with the lower name has added this mask, the other has subtracted it.
            (minus if survivor < name else plus).append(key)
    add_masks(given.total, plus, minus)
    return given.total


def _secret(given: Unmasking, name: str) -> bytes:
    """The secret of `name` that the survivors have revealed: its seed, or the mask key of one that has dropped out."""
    order = {each: x for x, each in enumerate(sorted(given.adverts), start=1)}
    sharers = sorted(given.shares)[: given.threshold]
    return secret_bytes(combine({order[each]: share_from_bytes(given.shares[each][name]) for each in sharers}))


def _check(given: Unmasking, name: str, found: bytes, advertised: bytes) -> None:
    if found != advertised:
        raise ProtocolError(
            f"the shares of client {name!r} do not give the secret it has advertised: it or one of "
            f"{', '.join(sorted(given.shares))} has sent wrong ones"
        )
