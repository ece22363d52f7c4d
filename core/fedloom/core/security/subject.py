"""Who is who on the wire: a role and a name, as the one URI in a certificate's subject alternative names.

The common name of a certificate says nothing here. An invite is not a member yet: its certificate may ask for another
one to be signed, and nothing else.
"""

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedloom.core.errors import ConfigError, IdentityError

__all__ = ["Identity", "MemberRole", "check_name", "fingerprint", "identity_of"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_PREFIX = "urn:fedloom"


class MemberRole(StrEnum):
    """What a certificate is good for."""

    CLIENT = "client"
    """Take part in runs, under its own name."""
    OPERATOR = "operator"
    """See how a run stands, and stop it."""
    OBSERVER = "observer"
    """See how a run stands."""
    INVITE = "invite"
    """Ask once for a certificate of the role that was promised."""


@dataclass(frozen=True)
class Identity:
    """A role and a name."""

    role: MemberRole
    name: str

    @property
    def uri(self) -> str:
        """As it stands in a certificate.

        >>> Identity(MemberRole.CLIENT, "hospital-a").uri
        'urn:fedloom:client:hospital-a'
        """
        return f"{_PREFIX}:{self.role}:{self.name}"


def check_name(name: str) -> str:
    """The name itself, if it is one.

    Raises:
        ConfigError: It is not.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name {name[:80]!r}: 1 to 64 letters, digits, dots, dashes and underscores are allowed, the first a "
            "letter or digit"
        )
    return name


def identity_of(certificate: x509.Certificate) -> Identity:
    """Whom a certificate names.

    Raises:
        IdentityError: It does not name exactly one role and name of ours.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        prefix, role, name = uri.rsplit(":", 2)
        found = Identity(MemberRole(role), check_name(name))
    except (x509.ExtensionNotFound, ValueError, ConfigError) as error:
        raise IdentityError(
            "a certificate without exactly one name of ours; have one made by `fedloom certs`"
        ) from error
    if prefix != _PREFIX:
        raise IdentityError(f"a certificate whose name begins with {prefix[:80]!r}; ours begin with {_PREFIX!r}")
    return found


def fingerprint(certificate: x509.Certificate | bytes) -> str:
    """SHA-256 of a certificate, given parsed or as DER; 64 hexadecimal digits."""
    der = certificate if isinstance(certificate, bytes) else certificate.public_bytes(Encoding.DER)
    return hashlib.sha256(der).hexdigest()
