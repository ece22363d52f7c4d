"""Who may call what: the one place that lets a call in, and puts it out again when its certificate is revoked.

TLS has already refused who has no certificate of the authority. That is not enough: it knows no roles and no revoked
certificates, and checks nothing once a connection stands. So every call is checked again, against the list, before its
handler runs; and while it runs the list is watched.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from grpc import aio

from fedloom.core.errors import Forbidden, IdentityError
from fedloom.core.security.subject import Identity, MemberRole, fingerprint
from fedloom.server.auth.certificates import Entry, Identities
from fedloom.server.rounds.duplicates import Doubles
from fedloom.server.storage.audit_log import AuditKind

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
    "Finish": frozenset({MemberRole.OPERATOR}),
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
        peer: Its connection, as gRPC names it.
    """

    identity: Identity | None = None
    fingerprint: str = ""
    expires_s: float = float("inf")
    named: bool = False
    peer: str = ""

    @property
    def who(self) -> str:
        """Role and name, for a log."""
        return self.identity.uri if self.identity else "somebody"


class Gate:
    """Lets calls in.

    Args:
        identities: The list of certificates. None is for loopback connections without TLS only: everybody is let in,
            and believed.
        note: Writes into the audit log who was refused or put out: kind, name as far as known, and why.
        answered: Told of every call that is over: method, gRPC status, class of the error or "", and seconds.

    Attributes:
        say: Called with a line for people.
    """

    def __init__(
        self,
        identities: Identities | None,
        note: Callable[[AuditKind, str, str], None],
        answered: Callable[[str, str, str, float], None] = lambda method, status, error, seconds: None,
    ) -> None:
        self._identities, self.note, self.answered = identities, note, answered
        self.say: Callable[[str], None] = lambda line: None
        self._doubles = Doubles()
        self._open: dict[asyncio.Task[Any], Caller] = {}
        self._cut: set[asyncio.Task[Any]] = set()

    @contextmanager
    def admitted(self, method: str, context: "aio.ServicerContext[Any, Any]") -> Iterator[None]:
        """Run one call inside this block, in its own task.

        Raises:
            IdentityError: The caller is not let in, or was put out while the call ran.
            Forbidden: It may not make this call.
        """
        task, caller = asyncio.current_task(), self._caller(method, context)
        assert task is not None  # a handler is a coroutine
        self._open[task] = caller
        try:
            yield
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

    def check_name(self, client: str) -> None:
        """Check the name in a message of this task's call against the certificate.

        Raises:
            Forbidden: It is another one's.
        """
        caller = self.caller()
        if caller.identity is not None and caller.identity.name != client:
            self._refuse(caller.identity.name, f"{caller.who} calls itself {client!r:.80}")
            raise Forbidden(OTHER_NAME)
        caller.named = True
        if both := self._doubles.heard(client, caller.peer):
            where = " and ".join(unquote(each.partition(":")[2]) for each in sorted(both))
            line = (
                f"two processes call themselves {client!r:.80}, at {where}: each is taken for the other, and only one "
                "counts in a round; stop one, or give it a name and an invite of its own"
            )
            _log.warning("%s", line)
            self.note("doubled", client, line)
            self.say(line)

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
                    detail = f"{caller.who} put out of a call, certificate {caller.fingerprint[:16]}"
                    _log.warning("%s", detail)
                    self.note("revoked", caller.identity.name if caller.identity else "", detail)
                    self._cut.add(task)
                    task.cancel()
            await asyncio.sleep(_WATCH_S)

    def _unlisted(self, fingerprints: set[str]) -> set[str]:
        assert self._identities is not None  # `watch` checks
        return {each for each in fingerprints if _problem(self._identities.find(each))}

    def _caller(self, method: str, context: "aio.ServicerContext[Any, Any]") -> Caller:
        allowed = ALLOWED[method]
        if self._identities is None:
            return Caller(peer=context.peer())
        about = context.auth_context()
        pem = b"".join(about.get("x509_pem_cert", ()))
        found = fingerprint(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))) if pem else ""
        entry = self._identities.find(found)
        problem = _problem(entry) or _mismatch(entry, about)
        if entry is None or problem:
            name = entry.identity.name if entry else ""
            self._refuse(name, f"{method} refused to {context.peer()}: certificate {found[:16] or 'none'} is {problem}")
            raise IdentityError(UNPROVEN)
        if entry.identity.role not in allowed:
            detail = f"{method} refused to {context.peer()}: {entry.identity.uri} may not call it"
            self._refuse(entry.identity.name, detail)
            raise Forbidden(FORBIDDEN)
        return Caller(entry.identity, found, entry.expires_s, peer=context.peer())

    def _refuse(self, name: str, detail: str) -> None:
        _log.warning("%s", detail)
        self.note("refused", name, detail)


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
