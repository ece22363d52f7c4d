"""Who may call what: the one place that lets a call in, and puts it out again when its certificate is revoked.

TLS has already refused who has no certificate of the authority. That is not enough: it knows no roles and no revoked
certificates, and checks nothing once a connection stands. So every call is checked again, against the list, before its
handler runs; and while it runs the list is watched.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from grpc import aio

from fedloom.proto.errors import Forbidden, IdentityError
from fedloom.proto.identity import Identity, MemberRole, fingerprint
from fedloom.server.identities import Entry, Identities

__all__ = ["ALLOWED", "FORBIDDEN", "OTHER_NAME", "UNPROVEN", "Caller", "Gate"]

_MEMBERS = frozenset({MemberRole.CLIENT})
_WATCHERS = frozenset({MemberRole.OPERATOR, MemberRole.OBSERVER})

ALLOWED: dict[str, frozenset[MemberRole]] = {
    "Join": _MEMBERS,
    "Work": _MEMBERS,
    "Fetch": _MEMBERS,
    "Submit": _MEMBERS,
    "Exchange": _MEMBERS,
    "Heartbeat": _MEMBERS,
    "Leave": _MEMBERS,
    "Enroll": frozenset(MemberRole),
    "Status": _WATCHERS,
    "Stop": frozenset({MemberRole.OPERATOR}),
}
"""Roles by the method they may call. A method that is missing here cannot be called by anybody."""

UNPROVEN = "this certificate is not accepted; ask the operator for an invite and enrol again"
FORBIDDEN = "the role of this certificate does not allow this call"
OTHER_NAME = "this certificate does not speak for the client that the message names"
"""All that a refused peer learns. What was wrong with it is in the coordinator's log."""

_WATCH_S = 1.0
_TLS = b"TLSv1.3"
_log = logging.getLogger(__name__)


@dataclass
class Caller:
    """The other end of one call.

    Attributes:
        identity: Who it is; None on a connection without certificates, where it may be anybody.
        fingerprint: Of its certificate; empty without one.
        expires_s: When that ends, in seconds since 1970.
        named: It has said for which client it speaks, and does.
    """

    identity: Identity | None = None
    fingerprint: str = ""
    expires_s: float = float("inf")
    named: bool = False

    def speaks_for(self, client: str) -> None:
        """Check the name in a message against the certificate.

        Raises:
            Forbidden: It is another one's.
        """
        if self.identity is not None and self.identity.name != client:
            _log.warning("refused: %s calls itself %.80r", self.identity.uri, client)
            raise Forbidden(OTHER_NAME)
        self.named = True


class Gate:
    """Lets calls in.

    Args:
        identities: The list of certificates. None is for loopback connections without TLS only: everybody is let in,
            and believed.
    """

    def __init__(self, identities: Identities | None) -> None:
        self._identities = identities
        self._open: dict[asyncio.Task[Any], Caller] = {}
        self._cut: set[asyncio.Task[Any]] = set()

    @contextmanager
    def admitted(self, method: str, context: "aio.ServicerContext[Any, Any]") -> Iterator[Caller]:
        """Run one call inside this block, in its own task.

        Raises:
            IdentityError: The caller is not let in, or was put out while the call ran.
            Forbidden: It may not make this call.
        """
        task, caller = asyncio.current_task(), self._caller(method, context)
        assert task is not None  # a handler is a coroutine
        self._open[task] = caller
        try:
            yield caller
            if caller.identity is not None and ALLOWED[method] is _MEMBERS and not caller.named:
                raise RuntimeError(f"{method} has served {caller.identity.uri} without checking for whom it speaks")
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            task.uncancel()
            raise IdentityError(UNPROVEN) from None
        finally:
            del self._open[task]
            self._cut.discard(task)

    def caller(self) -> Caller:
        """The other end of the call that this task is in."""
        task = asyncio.current_task()
        assert task is not None  # a handler is a coroutine
        return self._open[task]

    async def watch(self) -> None:
        """Put out, within seconds, every call whose certificate is revoked or ends. Runs until it is cancelled.

        Raises:
            StoreError: The list cannot be read; then nobody can say who is revoked, and the server must stop.
        """
        if self._identities is None:
            return
        version = None
        while True:
            seen = await asyncio.to_thread(self._identities.version)
            calls = [(task, caller) for task, caller in self._open.items() if task not in self._cut]
            if seen == version:
                now_s = time.time()
                bad = {caller.fingerprint for _, caller in calls if now_s >= caller.expires_s}
            else:
                bad = await asyncio.to_thread(self._unlisted, {caller.fingerprint for _, caller in calls})
            version = seen
            for task, caller in calls:
                if caller.fingerprint in bad and task in self._open:
                    who = caller.identity.uri if caller.identity else "nobody"
                    _log.warning("put out: %s, certificate %s", who, caller.fingerprint[:16])
                    self._cut.add(task)
                    task.cancel()
            await asyncio.sleep(_WATCH_S)

    def _unlisted(self, fingerprints: set[str]) -> set[str]:
        assert self._identities is not None  # `watch` checks
        return {each for each in fingerprints if _problem(self._identities.find(each))}

    def _caller(self, method: str, context: "aio.ServicerContext[Any, Any]") -> Caller:
        allowed = ALLOWED[method]
        if self._identities is None:
            return Caller()
        about = context.auth_context()
        pem = b"".join(about.get("x509_pem_cert", ()))
        found = fingerprint(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))) if pem else ""
        entry = self._identities.find(found)
        problem = _problem(entry) or _mismatch(entry, about)
        if entry is None or problem:
            _log.warning(
                "%s refused to %s: certificate %s is %s", method, context.peer(), found[:16] or "none", problem
            )
            raise IdentityError(UNPROVEN)
        if entry.identity.role not in allowed:
            _log.warning("%s refused to %s: %s may not call it", method, context.peer(), entry.identity.uri)
            raise Forbidden(FORBIDDEN)
        return Caller(entry.identity, found, entry.expires_s)


def _problem(entry: Entry | None) -> str:
    """Why a certificate is not accepted, by the list; empty if it is."""
    if entry is None:
        return "not on the list"
    state = entry.state(time.time())
    # An invite that was used may ask again for what it got: the answer may have been lost.
    return "" if state in ("valid", "invited", "used") else state


def _mismatch(entry: Entry | None, about: Mapping[str, Iterable[bytes]]) -> str:
    """What the connection says that does not fit the entry; empty if all does."""
    if entry is None or list(about.get("peer_uri", ())) != [entry.identity.uri.encode()]:
        return f"named {about.get('peer_uri')!r}"
    version = list(about.get("ssl_tls_version", ()))
    return "" if version == [_TLS] else f"used over {version!r}, which is not TLS 1.3"
