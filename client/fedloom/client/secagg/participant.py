"""The client's half of a secure sum. See `fedloom.core.secagg` for the steps and what they protect from.

The keys of an attempt exist in this process's memory alone. A client that restarts has lost them: it can reveal
nothing of that attempt any more, and takes part again only with new keys, if the round begins anew.
"""

import hashlib
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedloom.client.policy import Policy, SecureAggregationPolicy
from fedloom.client.secagg.identity_key import load_identity
from fedloom.client.secagg.unmasked import remember
from fedloom.client.session.terms import Terms, binding
from fedloom.core.config.run import SecureAggregationSection, Spec
from fedloom.core.errors import PolicyError, ProtocolError
from fedloom.core.secagg.fixed_point import words
from fedloom.core.secagg.keys import (
    Advert,
    Place,
    advertise,
    check_advert,
    cohort_digest,
    confirms,
    open_shares,
    pair_key,
    seal_shares,
    self_key,
    sign_survivors,
)
from fedloom.core.secagg.masks import KEY_BYTES, add_masks
from fedloom.core.secagg.shamir import SHARE_BYTES, share_to_bytes, split
from fedloom.core.secagg.steps import ALL, MASKED, Step, needed
from fedloom.proto.messages import Assignment, Joined, StepMessage, StepResult, UpdateHeader

if TYPE_CHECKING:
    from fedloom.client.transport.grpc import Connection

__all__ = ["Attempt", "Delivery", "Member", "check_assignment", "membership"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """Who this client is in every sum of a run, and what it insists on."""

    name: str
    identity: Ed25519PrivateKey
    folder: Path
    """State folder; what was revealed is remembered there."""
    policy: SecureAggregationPolicy
    section: SecureAggregationSection


def membership(policy: Policy, spec: Spec, terms: Terms | None) -> Member:
    """This site as a member.

    Args:
        policy: The site's policy.
        spec: The run.
        terms: Those of the update; what the policy was then binds too.

    Raises:
        ConfigError: Its identity key cannot be read.
    """
    client = policy.client
    bound = binding(policy.secure_aggregation, terms)
    return Member(client.name, load_identity(client.state), client.state, bound, spec.secure_aggregation)


def check_assignment(spec: Spec, assignment: Assignment) -> None:
    """Refuse to hand an update in openly where the run has promised a secure sum, and the reverse.

    Raises:
        PolicyError: The assignment's codec is not what the run says.
    """
    if (assignment.upload_codec == MASKED) is not spec.secure_aggregation.enabled:
        raise PolicyError(
            f"the coordinator asks for an update in {assignment.upload_codec!r}, but the run it described has "
            f"secure_aggregation.enabled = {str(spec.secure_aggregation.enabled).lower()}; nothing is sent"
        )


class Attempt:
    """One attempt at one sum, with keys of its own. The calls come in the order of the steps, each once.

    Args:
        member: This client.
        place: Run, epoch and round.
        update: The update as words, not masked, see `FixedPoint.encode`.
        digest: Its SHA-256, hex.

    Attributes:
        message: What to send next.
        masked: The masked update as long as it has to be sent; it goes before `message`.
    """

    def __init__(self, member: Member, place: Place, update: bytes, digest: str) -> None:
        self._member, self._place, self._update, self._digest = member, place, update, digest
        self._mask_key, self._share_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = secrets.token_bytes(KEY_BYTES)
        self._advert = advertise(
            member.identity, place, member.name, self._mask_key, self._share_key, self._seed
        ).to_bytes()
        self._adverts: dict[str, Advert] = {}
        self._shares: dict[str, bytes] = {}
        self._survivors: frozenset[str] | None = None
        self.masked: bytes | None = None
        self.message = StepMessage(place.round, Step.ADVERTISE, {ALL: self._advert})

    @property
    def threshold(self) -> int:
        """The number t of the cohort that has advertised."""
        return needed(len(self._adverts), self._member.section.threshold)

    def follow(self, result: StepResult) -> bool:
        """Take a step's result and get the next message ready; True when there is none.

        Raises:
            PolicyError: The result is not one in which this client may go on.
            ProtocolError: The result makes no sense.
        """
        match self.message.step:
            case Step.ADVERTISE:
                self._next(Step.SHARE, self.share(result.parts), result.attempt)
            case Step.SHARE:
                self.masked = self.mask(result.parts)
                self._next(Step.MASK, {}, result.attempt)
            case Step.MASK:
                self._next(Step.CONFIRM, {ALL: self.confirm(frozenset(result.parts))}, result.attempt)
            case Step.CONFIRM:
                self._next(Step.UNMASK, self.unmask(result.parts), result.attempt)
            case Step.UNMASK:
                return True
        return False

    def share(self, parts: Mapping[str, bytes]) -> dict[str, bytes]:
        """Check everybody's keys, and seal a share of this client's mask key and of its seed for each peer.

        Raises:
            PolicyError: A peer is not pinned, or its keys are not signed by it; the cohort is too small or too large.
            ProtocolError: The keys are malformed, or this client's own are not among them.
        """
        me, place = self._member.name, self._place
        self._check_size(len(parts), "cohort")
        if parts.get(me) != self._advert:
            raise ProtocolError("the coordinator shows the cohort other keys for this client than it has sent")
        self._adverts = {name: Advert.from_bytes(name, parts[name]) for name in sorted(parts)}
        for name in self._peers(self._adverts):
            check_advert(self._adverts[name], place, name, self._pinned(name))
        threshold, count = self.threshold, len(self._adverts)
        seeds = split(int.from_bytes(self._seed, "big"), threshold, count)
        keys = split(int.from_bytes(self._mask_key.private_bytes_raw(), "big"), threshold, count)
        plain = {
            name: share_to_bytes(seed) + share_to_bytes(key)
            for name, seed, key in zip(self._adverts, seeds, keys, strict=True)
        }
        self._shares[me] = plain[me]
        return {
            name: seal_shares(self._share_key, self._adverts[name].share_key, place, me, name, plain[name])
            for name in self._peers(self._adverts)
        }

    def mask(self, parts: Mapping[str, bytes]) -> bytes:
        """Open the shares that peers have sealed for this client, and mask the update against those peers.

        Raises:
            PolicyError: Too few peers are left.
            ProtocolError: Shares are not from a member of the cohort, or not sealed by it.
        """
        me, place = self._member.name, self._place
        if strangers := sorted(parts.keys() - self._adverts.keys() | parts.keys() & {me}):
            raise ProtocolError(f"shares from {strangers[0]!r}, who is no peer in this cohort")
        self._check_left(len(parts) + 1)
        for name, sealed in parts.items():
            peer = self._adverts[name].share_key
            self._shares[name] = open_shares(self._share_key, peer, place, name, me, sealed)
        total = words(self._update, self._member.section.integers.word).copy()
        plus, minus = [self_key(self._seed, place, me)], list[bytes]()
        for name in parts:
            key = pair_key(self._mask_key, self._adverts[name].mask_key, place, me, name)
            (plus if me < name else minus).append(key)
        add_masks(total, plus, minus)
        return total.tobytes()

    def confirm(self, survivors: frozenset[str]) -> bytes:
        """Sign the list of those whose masked updates have arrived.

        Raises:
            PolicyError: Too few have survived, or another list was signed in this attempt before.
            ProtocolError: The list is not of peers that have shared, or lacks this client.
        """
        if self._survivors not in (None, survivors):
            raise PolicyError("the coordinator names other survivors than before; shares are given for one list only")
        if not survivors <= self._shares.keys() or self._member.name not in survivors:
            raise ProtocolError(f"survivors {sorted(survivors)} are not this client and peers that have shared")
        self._check_left(len(survivors))
        self._survivors = survivors
        cohort = cohort_digest(self._place, self._adverts)
        return sign_survivors(self._member.identity, self._place, cohort, survivors)

    def unmask(self, parts: Mapping[str, bytes]) -> dict[str, bytes]:
        """One share of every peer that has shared: a survivor's seed, or the mask key of one that has dropped out.

        Raises:
            PolicyError: Fewer than t survivors have signed the same list, or another list was unmasked in this round.
            LedgerError: What is revealed cannot be written down first.
        """
        survivors, place = self._survivors, self._place
        assert survivors is not None  # only what was confirmed is unmasked
        cohort = cohort_digest(place, self._adverts)
        agreed = 1  # this client itself
        for name in survivors & parts.keys() - {self._member.name}:
            if agreed == self.threshold:
                break
            agreed += confirms(parts[name], self._pinned(name), place, cohort, survivors)
        if agreed < self.threshold:
            raise PolicyError(
                f"{agreed} of the cohort have signed the survivors that this client was told; "
                f"{self.threshold} are needed, so the coordinator may have told others a different list"
            )
        remember(self._member.folder, place.run, place.round, self._digest, survivors)
        return {
            name: share[:SHARE_BYTES] if name in survivors else share[SHARE_BYTES:]
            for name, share in self._shares.items()
        }

    def _next(self, step: Step, parts: Mapping[str, bytes], attempt: int) -> None:
        self.message = StepMessage(self._place.round, step, parts, attempt)

    def _peers(self, names: Mapping[str, object]) -> list[str]:
        return [name for name in names if name != self._member.name]

    def _pinned(self, name: str) -> bytes:
        if name == self._member.name:
            return self._member.identity.public_key().public_bytes_raw()
        known = self._member.policy.peers.get(name)
        if known is None:
            raise PolicyError(
                f"peer {name!r} is in the cohort but not in this site's policy, or was not when this update was made; "
                "add the key that its `fedloom identity` prints to secure_aggregation.peers if you know it, before the "
                "next round"
            )
        return bytes.fromhex(known)

    def _check_size(self, clients: int, what: str) -> None:
        least, most = self._member.policy.min_clients, self._member.section.max_clients
        if not least <= clients <= most:
            raise PolicyError(
                f"the {what} has {clients} clients; this site's policy needs at least {least} "
                f"(secure_aggregation.min_clients) and the run's step allows {most}"
            )

    def _check_left(self, clients: int) -> None:
        self._check_size(clients, "sum")
        if clients < self.threshold:
            raise PolicyError(f"{clients} of {len(self._adverts)} clients are left; {self.threshold} are needed")


class Delivery:
    """A finished update on its way into a sum, through as many attempts as it takes.

    Args:
        member: This client.
        header: Addresses the update, with the digest of `update`; that of what is sent and the attempt are filled in
            when it is masked.
        update: The update as words, not masked.
    """

    def __init__(self, member: Member, header: UpdateHeader, update: bytes) -> None:
        self._member, self._header, self._update = member, header, update
        self._place: Place | None = None
        self._attempt: Attempt | None = None

    def advance(self, connection: "Connection", joined: Joined) -> bool:
        """Go as far as the others let it; True when nothing is left to do, False to be called again.

        After a failure of the line the next call goes on with the same bytes. When the coordinator has restarted, or
        refuses the attempt, it goes on with new keys.

        Raises:
            Unavailable: The coordinator cannot be reached.
            ProtocolError: It does not take this update in this state.
            PolicyError: It asks for what this site does not allow.
        """
        try:
            while True:
                attempt = self._current(joined)
                if attempt.masked is not None:
                    connection.submit(self._addressed(attempt, attempt.masked), attempt.masked)
                    attempt.masked = None
                result = connection.exchange(attempt.message)
                if result is None:
                    return False
                if attempt.message.step is not Step.ADVERTISE and result.attempt != attempt.message.attempt:
                    _log.info("round %d: the secure sum begins anew", self._header.round + 1)
                    self._attempt = None
                elif attempt.follow(result):
                    return True
        except ProtocolError:
            self._attempt = None
            raise

    def _current(self, joined: Joined) -> Attempt:
        place = Place(joined.run, joined.epoch, self._header.round)
        if self._place is not None and self._place.run != place.run:
            # What was revealed is remembered by run: the same update must not count as another's.
            raise ProtocolError(f"the update was made for run {self._place.run[:8]}, not for {place.run[:8]}; drop it")
        if self._attempt is None or place != self._place:
            self._place, self._attempt = place, Attempt(self._member, place, self._update, self._header.digest)
        return self._attempt

    def _addressed(self, attempt: Attempt, masked: bytes) -> UpdateHeader:
        return replace(self._header, digest=hashlib.sha256(masked).hexdigest(), attempt=attempt.message.attempt)
