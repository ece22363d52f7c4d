"""How a site gets its certificate, and a new one before that ends. Its private key is made here and stays here."""

import datetime as dt
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fedloom.client.transport.grpc import translated
from fedloom.client.transport.tls import MEMBER_FILE, member_pair, secure_channel
from fedloom.core.errors import ConfigError, FedloomError, IdentityError
from fedloom.core.runtime.durable import write_durably
from fedloom.core.security.certificates import (
    CA_FILE,
    KeyPair,
    Token,
    key_pem,
    load_key,
    new_key,
    read_ca,
    signing_request,
)
from fedloom.core.security.subject import Identity, identity_of
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as rpc

__all__ = ["due", "enrol", "renew", "renewing"]

_PENDING = "pending.key"
_CALL_S = 30.0
_LOOK_S = 3600.0
_log = logging.getLogger(__name__)


def enrol(token: Token, address: str, certs: Path) -> Identity:
    """Make a key, have it certified with a join token, and keep both in a folder of certificates.

    Cut off anywhere, it can be called again: it goes on with the same key, and so gets the same certificate.

    Args:
        token: From the operator, by a way that nobody else can read.
        address: HOST:PORT of the coordinator.
        certs: Folder to write to; closed to other users.

    Returns:
        Whom the certificate names.

    Raises:
        ConfigError: The folder has a certificate already or cannot be written.
        IdentityError: The coordinator refuses, does not prove itself, or answers with another certificate.
        Unavailable: It cannot be reached.
    """
    if (certs / MEMBER_FILE).exists():
        raise ConfigError(
            f"{certs} has a certificate already; renew it with `fedloom certs renew`, or enrol into another folder"
        )
    try:
        certs.mkdir(0o700, parents=True, exist_ok=True)
        write_durably(certs / CA_FILE, token.ca.public_bytes(Encoding.PEM))
    except OSError as error:
        raise ConfigError(f"cannot write certificates to {certs}: {error}") from error
    return _certified(token.ca, token.invite, address, certs)


def renew(address: str, certs: Path) -> Identity:
    """Have a new key certified by the certificate in use, and replace both.

    Raises:
        IdentityError: The certificate cannot be read or has ended, or the coordinator refuses or does not prove itself.
        Unavailable: The coordinator cannot be reached.
    """
    return _certified(read_ca(certs), member_pair(certs), address, certs)


def due(certs: Path) -> bool:
    """Whether less than a third of the certificate's life is left.

    Raises:
        IdentityError: See `channel.member_pair`.
    """
    certificate = member_pair(certs).certificate
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return end - dt.datetime.now(dt.UTC) < (end - start) / 3


@contextmanager
def renewing(address: str, certs: Path) -> Iterator[None]:
    """Renew the certificate whenever that is due, from a thread, for the length of a `with` block."""
    stop = threading.Event()

    def look() -> None:
        while True:
            try:
                if due(certs):
                    _log.info("renewed the certificate of %s", renew(address, certs).uri)
            except FedloomError as error:
                _log.warning("the certificate is not renewed: %s", error)
            if stop.wait(_LOOK_S):
                return

    thread = threading.Thread(target=look, name="renewal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_CALL_S)


def _certified(ca: x509.Certificate, holder: KeyPair, address: str, certs: Path) -> Identity:
    """Ask for a certificate and write it."""
    key = _pending(certs)
    channel = secure_channel(address, ca, holder)
    try:
        request = pb.EnrollRequest(signing_request=signing_request(key))
        with translated(address):
            reply = rpc.EnrolmentStub(channel).Enroll(request, timeout=_CALL_S)
    finally:
        channel.close()
    try:
        certificate = x509.load_der_x509_certificate(reply.certificate)
        certificate.verify_directly_issued_by(ca)
        pair, found = KeyPair(key, certificate), identity_of(certificate)
    except (ValueError, TypeError, InvalidSignature, IdentityError) as error:
        raise IdentityError(
            f"coordinator {address} answers with a certificate that is not the one asked for"
        ) from error
    pair.write(certs / MEMBER_FILE)
    with suppress(FileNotFoundError):
        (certs / _PENDING).unlink()
    return found


def _pending(certs: Path) -> ec.EllipticCurvePrivateKey:
    """The key that waits for its certificate; on the disk before anybody is asked, so that asking can be repeated."""
    path = certs / _PENDING
    try:
        if path.exists():
            return load_key(path.read_bytes())
        key = new_key()
        write_durably(path, key_pem(key))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    except ValueError as error:
        raise IdentityError(f"{path} is damaged: {error}; remove it and enrol with another token") from error
    return key
