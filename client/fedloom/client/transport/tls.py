"""The client's side of TLS: a channel to a coordinator that proves itself, by a certificate that proves this site."""

import datetime as dt
import re
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedloom.core.errors import IdentityError
from fedloom.core.limits import HTTP2_FRAME_BYTES, MAX_MESSAGE_BYTES
from fedloom.core.security.address import host_of, loopback_host
from fedloom.core.security.certificates import CA_FILE, KeyPair, read_ca
from fedloom.core.security.subject import Identity, identity_of

__all__ = ["MEMBER_FILE", "distrusted", "member", "member_pair", "open_channel", "secure_channel", "stamp"]

MEMBER_FILE = "member.pem"
"""This site's private key and certificate, in its folder of certificates."""

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Lets HTTP/2 read ahead over long links; measured best at 50 ms round trip with the BDP probe left on.
    ("grpc.http2.lookahead_bytes", 16 << 20),
    ("grpc.http2.max_frame_size", HTTP2_FRAME_BYTES),
    # gRPC's own waits grow to two minutes; the participant spaces its attempts itself.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Some proxies cut what is silent for 10 s. Never below the least that a coordinator allows.
    ("grpc.keepalive_time_ms", 8_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]

# Without them a whole adapter is in the window before the first byte is counted. The last of two equal keys counts.
_SLOW = [("grpc.http2.lookahead_bytes", 64 << 10), ("grpc.http2.bdp_probe", 0)]

# What gRPC says of a connection that could not be made (1.85), when it is the certificate that was refused. Lines that
# break, alerts and answers that are no TLS read otherwise: they may pass by themselves.
_UNVERIFIED = re.compile(
    r"CERTIFICATE_VERIFY_FAILED: (?P<why>[^:]*)|Custom verification check failed .*(?P<name>Hostname Verification)"
)
_BAD_TIME = {
    "certificate has expired": "has ended; run `fedloom certs renew` beside it, which a running one takes up by "
    "itself, and look whether the clock here is right",
    "certificate is not yet valid": "has not begun; set the clocks here and there",
}


def open_channel(address: str, certs: Path | None, *, slow: bool = False) -> grpc.Channel:
    """A channel to a coordinator; nothing is sent before the first call.

    Args:
        address: HOST:PORT. The host must be among the names in the coordinator's certificate.
        certs: This site's folder of certificates. None encrypts nothing, and therefore reaches loopback addresses only.
        slow: Whether downloads are capped: gRPC then reads little ahead of whoever takes what has come.

    Raises:
        ConfigError: The address is not HOST:PORT, or there are no certificates and it is not a loopback address.
        IdentityError: The certificates cannot be read, or this site's has ended.
    """
    if certs is None:
        loopback_host(address)
        return grpc.insecure_channel(address, options=_options(slow))
    return secure_channel(address, read_ca(certs), member_pair(certs), slow=slow)


def secure_channel(address: str, ca: x509.Certificate, pair: KeyPair, *, slow: bool = False) -> grpc.Channel:
    """A channel that trusts one authority, and proves itself by one certificate.

    Raises:
        ConfigError: The address is not HOST:PORT.
    """
    host_of(address)
    roots = ca.public_bytes(Encoding.PEM)
    credentials = grpc.ssl_channel_credentials(roots, pair.key_pem, pair.certificate_pem)
    return grpc.secure_channel(address, credentials, options=_options(slow))


def _options(slow: bool) -> list[tuple[str, int]]:
    return [*_OPTIONS, *_SLOW] if slow else _OPTIONS


def member_pair(certs: Path) -> KeyPair:
    """This site's key and certificate.

    Raises:
        IdentityError: They cannot be read, or the certificate has ended.
    """
    pair = KeyPair.read(certs / MEMBER_FILE)
    ends = pair.certificate.not_valid_after_utc
    if ends <= dt.datetime.now(dt.UTC):
        raise IdentityError(
            f"the certificate in {certs / MEMBER_FILE} ended on {ends:%Y-%m-%d %H:%M} UTC; ask the operator for an "
            "invite, and enrol again"
        )
    return pair


def stamp(certs: Path | None) -> tuple[int, int] | None:
    """What changes when this site's certificate is replaced."""
    if certs is None:
        return None
    try:
        about = (certs / MEMBER_FILE).stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def member(certs: Path) -> Identity:
    """Whom this site's certificate names.

    Raises:
        IdentityError: See `member_pair`; or it names nobody.
    """
    return identity_of(member_pair(certs).certificate)


def distrusted(address: str, details: str) -> IdentityError | None:
    """What to do about a coordinator whose certificate this site has refused.

    Args:
        address: HOST:PORT that was called.
        details: What gRPC says of the call that has failed with UNAVAILABLE.

    Returns:
        None if it failed for another reason, and may succeed when it is made again. A certificate that the coordinator
        refuses is such a one: TLS 1.3 tells the client only that the connection is gone.
    """
    found = _UNVERIFIED.search(details)
    if found is None:
        return None
    host, why = host_of(address), found["why"]
    if found["name"]:
        problem = (
            f"does not name {host!r}; call it by a name it has, or run `fedloom certs renew --host {host}` beside it, "
            "with every other name it needs"
        )
    elif why in _BAD_TIME:
        problem = _BAD_TIME[why]
    elif why == "unsupported certificate purpose":
        problem = "is a member's and not a coordinator's; see who answers at that address, and trust nothing it says"
    else:
        problem = (
            f"is not from the authority in {CA_FILE} or the join token, which alone is trusted ({why}); check the "
            "address, or enrol into another folder with a token from this coordinator"
        )
    return IdentityError(f"the certificate of coordinator {address} {problem}")
