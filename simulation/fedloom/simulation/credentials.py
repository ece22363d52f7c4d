"""Members of a federation on one machine, enrolled without a coordinator to ask."""

from collections.abc import Iterable
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from fedloom.client.transport.tls import MEMBER_FILE
from fedloom.core.runtime.durable import write_durably
from fedloom.core.security.certificates import CA_FILE, KeyPair, new_key, signing_request
from fedloom.core.security.subject import Identity, MemberRole, fingerprint
from fedloom.server.auth.ca import Authority, create

__all__ = ["certificates", "enrolled"]


def certificates(folder: Path, clients: Iterable[str]) -> dict[str, Path]:
    """Make an authority in `folder/authority`; each client's folder of certificates by its name."""
    create(folder / "authority", [])
    authority = Authority(folder / "authority")
    try:
        return {name: enrolled(authority, Identity(MemberRole.CLIENT, name), folder / name) for name in clients}
    finally:
        authority.close()


def enrolled(authority: Authority, identity: Identity, folder: Path) -> Path:
    """Write what `fedloom certs enrol` would have written, and return the folder."""
    token, key = authority.invite(identity, 1.0), new_key()
    folder.mkdir(0o700, parents=True)
    write_durably(folder / CA_FILE, token.ca.public_bytes(Encoding.PEM))
    certificate = authority.enrol(fingerprint(token.invite.certificate), signing_request(key))
    KeyPair(key, certificate).write(folder / MEMBER_FILE)
    return folder
