"""Certificates on the dashboard: until when each is good, and, for operators, inviting and revoking clients."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedloom.core.errors import ConfigError
from fedloom.core.security.certificates import KeyPair
from fedloom.core.security.subject import Identity, MemberRole
from fedloom.server.auth.ca import SERVER_FILE, Authority
from fedloom.server.auth.certificates import Identities
from fedloom.server.storage.audit_log import Audit

__all__ = ["certificates", "invited", "revoked"]

_INVITE_HOURS = 24.0
_LISTED = 200


def certificates(folder: Path) -> list[dict[str, Any]]:
    """The coordinator's own certificate and the members' that are good, with those first that end first.

    Args:
        folder: The coordinator's folder of certificates.

    Raises:
        IdentityError: The coordinator's own cannot be read.
        StoreError: The list cannot be read.
    """
    own = KeyPair.read(folder / SERVER_FILE).certificate.not_valid_after_utc
    listed = Identities(folder)
    try:
        entries = listed.entries()
    finally:
        listed.close()
    now_s = time.time()
    found = [
        {"name": each.identity.name, "role": each.promised, "state": state, "ends": _ends(each.expires_s)}
        for each in sorted(entries, key=lambda each: each.expires_s)
        if (state := each.state(now_s)) in ("valid", "invited")
    ]
    return [{"name": "", "role": "coordinator", "state": "valid", "ends": own.isoformat()}, *found[:_LISTED]]


def invited(folder: Path, name: str, audit: Audit) -> dict[str, Any]:
    """A join token for a client. Other roles are invited on the coordinator's machine only.

    Raises:
        ConfigError: The name is not one, or is known in another role.
        IdentityError: There is no authority in the folder.
        StoreError: The list cannot be written.
    """
    authority = Authority(folder)
    try:
        token = authority.invite(Identity(MemberRole.CLIENT, name), _INVITE_HOURS).to_text()
    finally:
        authority.close()
    audit.note("invited", name, "by an operator, on the dashboard")
    return {"name": name, "token": token, "hours": _INVITE_HOURS}


def revoked(folder: Path, name: str, audit: Audit) -> dict[str, Any]:
    """Let a client in no more, from now on.

    Raises:
        ConfigError: Nobody of this name was ever invited, or it is no client.
        StoreError: The list cannot be written.
    """
    listed = Identities(folder)
    try:
        roles = {each.promised for each in listed.entries() if each.identity.name == name and not each.revoked}
        if roles - {MemberRole.CLIENT}:
            raise ConfigError(
                f"{name} is no client; revoke it on the coordinator's machine: fedloom certs revoke {name}"
            )
        number = listed.revoke(name)
    finally:
        listed.close()
    audit.note("revoked", name, f"{number} certificates and invites, by an operator, on the dashboard")
    return {"name": name, "revoked": number}


def _ends(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
