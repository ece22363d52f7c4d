"""Keys and certificates as files, and the join token. A private key never leaves the machine that made it.

A key and its certificate are one PEM file, so that replacing both is one rename: no reader ever sees a new key beside
an old certificate.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
    load_pem_private_key,
)

from fedloom.core.errors import ConfigError, IdentityError
from fedloom.core.runtime.durable import write_durably

__all__ = [
    "CA_FILE",
    "KeyPair",
    "Token",
    "key_digest",
    "key_pem",
    "load_key",
    "new_key",
    "read_ca",
    "signing_request",
]

CA_FILE = "ca.pem"
"""The authority's certificate, in every folder of certificates."""

_TOKEN = "fedloom-join-1"
_CHECK_DIGITS = 16
_END = b"-----END PRIVATE KEY-----\n"


@dataclass(frozen=True)
class KeyPair:
    """A private key and the certificate of its public half."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def __post_init__(self) -> None:
        """Raise IdentityError when the two do not belong together."""
        if self.key.public_key() != self.certificate.public_key():
            raise IdentityError("a private key and a certificate of another key; restore both from the same file")

    def __repr__(self) -> str:
        """Without the key: this ends up in tracebacks and logs."""
        return f"KeyPair({self.certificate.subject.rfc4514_string()})"

    @property
    def key_pem(self) -> bytes:
        """The private key, unencrypted."""
        return key_pem(self.key)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(Encoding.PEM)

    def write(self, path: Path) -> None:
        """Write both into one file that only its owner can read, whole or not at all.

        Raises:
            ConfigError: The disk refuses.
        """
        try:
            write_durably(path, self.key_pem, self.certificate_pem)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error}") from error

    @classmethod
    def read(cls, path: Path) -> "KeyPair":
        """What `write` wrote.

        Raises:
            IdentityError: The file is missing or damaged, or others may read it.
        """
        key, _, certificate = _read_private(path).partition(_END)
        try:
            return cls(load_key(key + _END), x509.load_pem_x509_certificate(certificate))
        except (ValueError, IdentityError) as error:
            raise IdentityError(f"{path} is damaged: {error}; restore it from a backup or enrol again") from error


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM, unencrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """A private key from PEM.

    Raises:
        ValueError: It is none, or not of the one kind in use.
    """
    return _p256(load_pem_private_key(pem, None))


def new_key() -> ec.EllipticCurvePrivateKey:
    """A new private key on P-256: what every TLS stack takes, gRPC's included, which does not take Ed25519."""
    return ec.generate_private_key(ec.SECP256R1())


def signing_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The wish to have a key certified, PKCS #10 as DER. It names nobody: the authority knows whom it has invited."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


def key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key, hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def read_ca(folder: Path) -> x509.Certificate:
    """The authority that a folder of certificates trusts.

    Raises:
        IdentityError: The file is missing or damaged.
    """
    path = folder / CA_FILE
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"{path} cannot be read: {error}; a coordinator makes it with `fedloom certs init`, others with "
            "`fedloom certs enrol`"
        ) from error


@dataclass(frozen=True, repr=False)
class Token:
    """A join token: whom to trust, and a certificate with its key that may ask once for another one."""

    ca: x509.Certificate
    invite: KeyPair

    def to_text(self) -> str:
        """One line without spaces. Whoever has it can join in the invited one's place: it is a secret until used."""
        parts = (
            self.ca.public_bytes(Encoding.DER),
            self.invite.certificate.public_bytes(Encoding.DER),
            self.invite.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        )
        body = ".".join(base64.urlsafe_b64encode(part).decode("ascii") for part in parts)
        return f"{_TOKEN}.{body}.{_check(body)}"

    @classmethod
    def from_text(cls, text: str) -> "Token":
        """What `to_text` gave. Whether anybody accepts it is for the coordinator to say.

        Raises:
            ConfigError: It is not a whole token. The text of the error has nothing of the token in it.
        """
        try:
            name, *parts, check = text.strip().split(".")
            if name != _TOKEN or check != _check(".".join(parts)):
                raise ValueError(name)
            ca, certificate, key = (base64.b64decode(part, altchars="-_", validate=True) for part in parts)
            pair = KeyPair(_p256(load_der_private_key(key, None)), x509.load_der_x509_certificate(certificate))
            return cls(x509.load_der_x509_certificate(ca), pair)
        except (ValueError, binascii.Error, IdentityError):
            raise ConfigError(
                f"this is not a whole join token; copy the one line that `fedloom certs invite` wrote, from {_TOKEN} on"
            ) from None


def _check(body: str) -> str:
    """Digits that tell a token cut short from one that is refused."""
    return hashlib.sha256(body.encode()).hexdigest()[:_CHECK_DIGITS]


def _p256(key: object) -> ec.EllipticCurvePrivateKey:
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("not a private key on P-256")
    return key


def _read_private(path: Path) -> bytes:
    """A file that only its owner may read.

    Raises:
        IdentityError: It cannot be read, or others may.
    """
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror}; enrol with `fedloom certs enrol`") from error
    if mode & 0o077:
        raise IdentityError(f"{path} may be read by others (mode {mode & 0o777:o}); run `chmod 600` on it")
    return content
