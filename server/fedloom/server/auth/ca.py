"""The certificate authority of one federation: a folder on the coordinator's machine.

Layout::

    ca.pem          certificate of the authority, which everybody trusts
    authority.pem   its private key and certificate
    server.pem      the coordinator's private key and certificate
    identities.db   what the authority has certified, see `identities`

Everything but ca.pem is readable by its owner alone. A coordinator needs authority.pem to enrol members; whoever has
that file still lets nobody in whom `identities.db` does not list.
"""

import datetime as dt
import ipaddress
import time
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom.core.errors import ConfigError, IdentityError
from fedloom.core.runtime.durable import write_durably
from fedloom.core.security.certificates import CA_FILE, KeyPair, Token, key_digest, new_key, read_ca
from fedloom.core.security.subject import Identity, MemberRole, check_name
from fedloom.server.auth.certificates import Identities

__all__ = ["AUTHORITY_FILE", "CLIENT_DAYS", "SERVER_FILE", "Authority", "create"]

AUTHORITY_FILE = "authority.pem"
SERVER_FILE = "server.pem"
CLIENT_DAYS = 30
"""Longest life of a member's certificate. It renews by itself, so a stolen one is worth little for long."""

_CA_DAYS = 3650
_SERVER_DAYS = 90
# Members check these two by their own clock, which may be a day off.
_BACKDATE = dt.timedelta(days=2)
_SKEW = dt.timedelta(hours=1)
_MAX_REQUEST_BYTES = 4096
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def create(folder: Path, hosts: Iterable[str]) -> None:
    """Make an authority and a certificate for its coordinator in an empty or new folder.

    Args:
        folder: Where to; closed to other users.
        hosts: Names and addresses under which clients reach the coordinator; loopback is always among them.

    Raises:
        ConfigError: There is one already, a host is not one, or the disk refuses.
    """
    names = _alternatives(hosts)
    if (folder / AUTHORITY_FILE).exists():
        raise ConfigError(f"{folder} has an authority already; certificates of another one would be worth nothing here")
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        key, now = new_key(), _now()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedloom authority")])
        ca = (
            _builder(subject, subject, key.public_key(), now - _BACKDATE, now + dt.timedelta(days=_CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        pair = KeyPair(key, ca)
        write_durably(folder / CA_FILE, pair.certificate_pem)
        _certify_server(folder, pair, names)
        Identities(folder).close()
        pair.write(folder / AUTHORITY_FILE)  # last: what is half made can be made again
    except OSError as error:
        raise ConfigError(f"cannot write certificates to {folder}: {error}") from error


class Authority:
    """An authority that exists, and its list.

    Raises:
        IdentityError: The folder holds none, or a damaged one.
        StoreError: Its list cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / AUTHORITY_FILE).exists():
            raise IdentityError(f"there is no authority in {folder}; `fedloom certs init` makes one")
        self._pair = KeyPair.read(folder / AUTHORITY_FILE)
        if read_ca(folder) != self._pair.certificate:
            raise IdentityError(f"{folder / CA_FILE} is not the certificate in {AUTHORITY_FILE}; restore both")
        self.identities = Identities(folder)

    def close(self) -> None:
        """Close the list."""
        self.identities.close()

    def invite(self, identity: Identity, hours: float) -> Token:
        """A join token, good once and for `hours`.

        Args:
            identity: Who is invited, in the role that is promised.
            hours: At most `CLIENT_DAYS` long.

        Raises:
            ConfigError: The name is not one, is known in another role, or the time is out of range.
        """
        check_name(identity.name)
        if not 0 < hours <= 24 * CLIENT_DAYS:
            raise ConfigError(f"an invite for {hours:g} hours; above 0 and at most {24 * CLIENT_DAYS} are allowed")
        key = new_key()
        bootstrap = Identity(MemberRole.INVITE, identity.name)
        certificate = self._certify(bootstrap, key.public_key(), dt.timedelta(hours=hours))
        self.identities.invite(identity, certificate, key_digest(key.public_key()))
        return Token(self._pair.certificate, KeyPair(key, certificate))

    def enrol(self, holder: str, request: bytes) -> x509.Certificate:
        """Certify a key, see `Identities.enrol`.

        Args:
            holder: Fingerprint of the certificate that asks.
            request: PKCS #10 as DER.

        Raises:
            IdentityError: The request is not one, is not signed by its own key, or may not be granted.
        """
        key = _requested(request)
        life = dt.timedelta(days=CLIENT_DAYS) - _SKEW
        return self.identities.enrol(holder, key_digest(key), lambda member: self._certify(member, key, life))

    def renew_server(self, hosts: Iterable[str] = ()) -> dt.datetime:
        """Replace the coordinator's key and certificate; one that runs takes them up by itself. Until when they last.

        Args:
            hosts: The names from now on; those of the old certificate if there are none.

        Raises:
            ConfigError: A host is not one, or the disk refuses.
            IdentityError: The old certificate is needed for its names and cannot be read.
        """
        names = list(hosts)
        if names:
            return _certify_server(self.folder, self._pair, _alternatives(names))
        old = KeyPair.read(self.folder / SERVER_FILE).certificate
        kept = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return _certify_server(self.folder, self._pair, list(kept))

    def _certify(self, identity: Identity, key: ec.EllipticCurvePublicKey, life: dt.timedelta) -> x509.Certificate:
        now = _now()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)])
        builder = _builder(subject, self._pair.certificate.subject, key, now - _SKEW, now + life)
        names = [x509.UniformResourceIdentifier(identity.uri)]
        return _leaf(builder, self._pair, names, ExtendedKeyUsageOID.CLIENT_AUTH)


def _certify_server(folder: Path, authority: KeyPair, names: list[x509.GeneralName]) -> dt.datetime:
    key, now = new_key(), _now()
    until = now + dt.timedelta(days=_SERVER_DAYS)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedloom coordinator")])
    builder = _builder(subject, authority.certificate.subject, key.public_key(), now - _BACKDATE, until)
    certificate = _leaf(builder, authority, names, ExtendedKeyUsageOID.SERVER_AUTH)
    KeyPair(key, certificate).write(folder / SERVER_FILE)
    return until


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: dt.datetime, end: dt.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _leaf(
    builder: x509.CertificateBuilder,
    authority: KeyPair,
    names: Iterable[x509.GeneralName],
    purpose: x509.ObjectIdentifier,
) -> x509.Certificate:
    """A certificate that can sign no other, for one side of a connection only."""
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return (
        builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(issuer, critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(hosts: Iterable[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys((*_LOOPBACK, *hosts)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if (
                not host.isascii()
                or not all(part and len(part) < 64 for part in host.split("."))
                or set(host) & set("*:/ ")
            ):
                raise ConfigError(
                    f"host {host[:80]!r} is neither an IP address nor a DNS name; give what clients connect to, "
                    "without a port"
                ) from None
            names.append(x509.DNSName(host))
    return names


def _requested(request: bytes) -> ec.EllipticCurvePublicKey:
    """The public key in a signing request, of which the sender has the private one."""
    refusal = "a signing request must be PKCS #10 in DER for a key on P-256, signed by that key"
    if len(request) > _MAX_REQUEST_BYTES:
        raise IdentityError(refusal)
    try:
        wish = x509.load_der_x509_csr(request)
        key, signed = wish.public_key(), wish.is_signature_valid
    except Exception:  # the parser's own kinds are many, and every one of them is the sender's fault
        raise IdentityError(refusal) from None
    if not signed or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(refusal)
    return key


def _now() -> dt.datetime:
    return dt.datetime.fromtimestamp(int(time.time()), dt.UTC)
