"""Keys of a secure sum: who signs for whom, which secrets two clients share, and how shares are sealed.

X25519 (RFC 7748) for agreement, HKDF-SHA256 (RFC 5869) for every key taken from a secret, ChaCha20-Poly1305 (RFC 8439)
for sealing and Ed25519 (RFC 8032) for signatures, all from the `cryptography` package. Every derivation and signature
names its purpose, the run, the coordinator's epoch, the round and the clients it is for, so that nothing made for one
place is of use in another.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedloom.core.errors import PolicyError, ProtocolError
from fedloom.core.secagg.masks import KEY_BYTES
from fedloom.core.secagg.shamir import SHARE_BYTES

__all__ = [
    "ADVERT_BYTES",
    "SEALED_BYTES",
    "SIGNATURE_BYTES",
    "Advert",
    "Place",
    "advertise",
    "check_advert",
    "cohort_digest",
    "confirms",
    "open_shares",
    "pair_key",
    "seal_shares",
    "seed_digest",
    "self_key",
    "sign_survivors",
]

SIGNATURE_BYTES = 64
ADVERT_BYTES = 3 * KEY_BYTES + SIGNATURE_BYTES
SEALED_BYTES = 2 * SHARE_BYTES + 16
"""Length of two shares sealed for one peer, with the tag."""


@dataclass(frozen=True)
class Place:
    """Where a key or a signature belongs."""

    run: str
    epoch: int
    round: int

    def statement(self, purpose: str, *words: str) -> bytes:
        """Bytes that no other purpose, place or words give."""
        content = ["fedloom secagg 1", purpose, self.run, self.epoch, self.round, *words]
        return json.dumps(content, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Advert:
    """What a client shows to its peers at the start of an attempt."""

    mask_key: bytes
    """X25519 public key of the pair masks."""
    share_key: bytes
    """X25519 public key of the sealed shares."""
    seed_digest: bytes
    """SHA-256 of the seed of the client's own mask, by which wrong shares are found out."""
    signature: bytes

    def to_bytes(self) -> bytes:
        """`ADVERT_BYTES` bytes."""
        return self.mask_key + self.share_key + self.seed_digest + self.signature

    @classmethod
    def from_bytes(cls, client: str, data: bytes) -> "Advert":
        """Read what `to_bytes` wrote.

        Raises:
            ProtocolError: It has another length.
        """
        if len(data) != ADVERT_BYTES:
            raise ProtocolError(f"keys of client {client!r} have {len(data)} bytes; {ADVERT_BYTES} are needed")
        ends = [data[start : start + KEY_BYTES] for start in range(0, 3 * KEY_BYTES, KEY_BYTES)]
        return cls(ends[0], ends[1], ends[2], data[3 * KEY_BYTES :])


def advertise(
    identity: Ed25519PrivateKey,
    place: Place,
    client: str,
    mask_key: X25519PrivateKey,
    share_key: X25519PrivateKey,
    seed: bytes,
) -> Advert:
    """The signed public side of a client's fresh keys and seed."""
    publics = mask_key.public_key().public_bytes_raw(), share_key.public_key().public_bytes_raw()
    digest = seed_digest(seed)
    return Advert(*publics, digest, identity.sign(_keys_statement(place, client, *publics, digest)))


def check_advert(advert: Advert, place: Place, client: str, pinned: bytes) -> None:
    """Refuse keys that the owner of the pinned identity key did not sign for this place.

    Args:
        advert: What the coordinator says that `client` sent.
        place: The round under way.
        client: The peer's name.
        pinned: Its Ed25519 public key, 32 bytes, from this client's own policy.

    Raises:
        PolicyError: They were swapped, changed, or made for another run, round or client.
    """
    signed = _keys_statement(place, client, advert.mask_key, advert.share_key, advert.seed_digest)
    try:
        Ed25519PublicKey.from_public_bytes(pinned).verify(advert.signature, signed)
    except (InvalidSignature, ValueError):
        raise PolicyError(
            f"the keys shown for peer {client!r} in round {place.round + 1} are not signed for it by the identity "
            "pinned in this site's policy (secure_aggregation.peers); somebody between may have swapped them, ask the "
            "peer for its `fedloom identity`"
        ) from None


def cohort_digest(place: Place, adverts: Mapping[str, Advert]) -> str:
    """SHA-256 of the whole cohort's keys as one client was shown them."""
    rows = [f"{name} {adverts[name].to_bytes().hex()}" for name in sorted(adverts)]
    return hashlib.sha256(place.statement("cohort", *rows)).hexdigest()


def sign_survivors(identity: Ed25519PrivateKey, place: Place, cohort: str, survivors: Iterable[str]) -> bytes:
    """A client's word that it was told of exactly these survivors of the cohort with this digest."""
    return identity.sign(place.statement("survivors", cohort, *sorted(survivors)))


def confirms(signature: bytes, pinned: bytes, place: Place, cohort: str, survivors: Iterable[str]) -> bool:
    """Whether the owner of the pinned identity key has signed these survivors, see `sign_survivors`."""
    try:
        key = Ed25519PublicKey.from_public_bytes(pinned)
        key.verify(signature, place.statement("survivors", cohort, *sorted(survivors)))
    except (InvalidSignature, ValueError):
        return False
    return True


def seed_digest(seed: bytes) -> bytes:
    """What a client shows of its seed; a seed has 256 bits, so it stays hidden."""
    return hashlib.sha256(b"fedloom secagg 1 seed" + seed).digest()


def self_key(seed: bytes, place: Place, client: str) -> bytes:
    """Key of a client's own mask."""
    return _derived(seed, place.statement("self", client))


def pair_key(mine: X25519PrivateKey, peer: bytes, place: Place, one: str, two: str) -> bytes:
    """Key of the mask that two clients share, the same from both sides.

    Args:
        mine: One side's mask key.
        peer: The other side's public mask key.
        place: The round.
        one: One side's name.
        two: The other's, in any order.

    Raises:
        ProtocolError: The public key is one with which no secret can be agreed.
    """
    return _derived(_agreed(mine, peer), place.statement("mask", *sorted((one, two))))


def seal_shares(mine: X25519PrivateKey, peer: bytes, place: Place, sender: str, receiver: str, shares: bytes) -> bytes:
    """`shares` readable by `receiver` alone, and by it only as from `sender`; `SEALED_BYTES` for two shares.

    The key is used for this one message, so the nonce may be zero.

    Raises:
        ProtocolError: The public key is one with which no secret can be agreed.
    """
    place_of_use = place.statement("share", sender, receiver)
    return ChaCha20Poly1305(_derived(_agreed(mine, peer), place_of_use)).encrypt(bytes(12), shares, place_of_use)


def open_shares(mine: X25519PrivateKey, peer: bytes, place: Place, sender: str, receiver: str, sealed: bytes) -> bytes:
    """Read what `seal_shares` sealed.

    Raises:
        ProtocolError: It was not sealed by that peer for this client and round.
    """
    place_of_use = place.statement("share", sender, receiver)
    try:
        return ChaCha20Poly1305(_derived(_agreed(mine, peer), place_of_use)).decrypt(bytes(12), sealed, place_of_use)
    except InvalidTag:
        raise ProtocolError(
            f"the shares that are said to be from peer {sender!r} were not sealed by it for this client and round"
        ) from None


def _keys_statement(place: Place, client: str, *content: bytes) -> bytes:
    return place.statement("keys", client, *(part.hex() for part in content))


def _agreed(mine: X25519PrivateKey, peer: bytes) -> bytes:
    try:
        return mine.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as error:
        raise ProtocolError(f"public key {peer.hex()[:16]} is not one that a client would make: {error}") from error


def _derived(secret: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)
