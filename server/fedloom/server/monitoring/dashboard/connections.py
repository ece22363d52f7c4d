"""The dashboard's connections: who says nothing, or too slowly, is let go, and never keeps others out.

Each connection has so long to finish its TLS handshake, and so long for every whole request, counted from the moment
it came or had its last answer. So many may be open, in all and from one address. Whoever comes when there is no room
takes the place of the connection that has waited longest without asking for anything: silent ones, however many, are
what has to go, and not the next visitor.
"""

import asyncio
import ipaddress
import ssl
from dataclasses import dataclass
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

__all__ = ["Door", "Limits", "Visitor"]


@dataclass(frozen=True)
class Limits:
    """What one visitor, and all of them, may hold."""

    per_address: int = 32
    """Connections of one address, or of one IPv6 network of 64 bits. A proxy in front is one address."""
    in_all: int = 256
    request_s: float = 10.0
    """Seconds for a TLS handshake, and for each request from the last answer to its own last byte."""
    stall_s: float = 30.0
    """Seconds in which a visitor reads nothing of an answer that waits for it."""


class Door:
    """Who is connected. It belongs to one event loop.

    Args:
        limits: How many may be.
        secure: Makes TLS; None serves in the clear.
    """

    def __init__(self, limits: Limits, secure: ssl.SSLContext | None = None) -> None:
        self.limits, self.secure = limits, secure
        self._inside: dict[str, dict[Visitor, None]] = {}  # of each address, in the order in which they came

    def enter(self, visitor: "Visitor") -> bool:
        """Let a visitor in, in another one's place if need be; False if everybody is being answered."""
        theirs = self._inside.get(visitor.address, {})
        if len(theirs) >= self.limits.per_address and not self._make_room(theirs):
            return False
        crowds = sorted(self._inside.values(), key=len, reverse=True)
        if sum(map(len, crowds)) >= self.limits.in_all and not any(self._make_room(crowd) for crowd in crowds):
            return False
        self._inside.setdefault(visitor.address, {})[visitor] = None
        return True

    def leave(self, visitor: "Visitor") -> None:
        """A visitor is gone; saying so twice does no harm."""
        theirs = self._inside.get(visitor.address, {})
        theirs.pop(visitor, None)
        if not theirs:
            self._inside.pop(visitor.address, None)

    def _make_room(self, crowd: dict["Visitor", None]) -> bool:
        for visitor in crowd:
            if not visitor.answering:
                self.leave(visitor)
                visitor.abort()
                return True
        return False


class Visitor(H11Protocol):
    """One connection, within the door's limits. The arguments behind the first are uvicorn's."""

    def __init__(self, door: Door, config: Config, server_state: ServerState, app_state: dict[str, Any], **_: Any):
        super().__init__(config, server_state, app_state)
        self.address = ""
        self._door = door
        self._line: asyncio.Transport | None = None
        self._early = b""
        self._handshake: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    @property
    def answering(self) -> bool:
        """Whether a whole request has come and its answer is not yet made."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def abort(self) -> None:
        """Cut the line at once."""
        if self._line is not None:
            self._line.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Let it in, and encrypt the line if that is wanted."""
        self._line, self.address = transport, _network(transport)
        if not self._door.enter(self):
            self.abort()
            return
        self._expect_request()
        if self._door.secure is None:
            super().connection_made(transport)
        else:
            transport.pause_reading()
            self._handshake = self.loop.create_task(self._encrypt(transport, self._door.secure))

    async def _encrypt(self, line: asyncio.Transport, secure: ssl.SSLContext) -> None:
        wait_s = self._door.limits.request_s
        encrypted = None
        try:
            encrypted = await self.loop.start_tls(line, self, secure, server_side=True, ssl_handshake_timeout=wait_s)
        except OSError:
            pass  # a handshake that fails is the visitor's business
        finally:
            if encrypted is None:  # also where the visitor was gone before its handshake was
                line.abort()
                self._forget()
        if encrypted is not None:
            super().connection_made(encrypted)
            early, self._early = self._early, b""
            if early:
                self.data_received(early)

    def data_received(self, data: bytes) -> None:
        """Once a whole request is there, it is this side's turn."""
        if self.transport is None:  # it came with the end of the handshake
            self._early += data
            return
        super().data_received(data)
        if self.answering and self._deadline is not None:
            self._deadline.cancel()

    def on_response_complete(self) -> None:
        """It is the visitor's turn again; the next request may have come already."""
        super().on_response_complete()
        if not self.answering:
            self._expect_request()

    def pause_writing(self) -> None:
        """The answer waits for the visitor to read."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self._door.limits.stall_s, self.abort)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell uvicorn too, if it has heard of this connection."""
        self._forget()
        if self.transport is not None:
            super().connection_lost(exc)

    def _forget(self) -> None:
        self._door.leave(self)
        for timer in (self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()

    def _expect_request(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(self._door.limits.request_s, self._too_late)

    def _too_late(self) -> None:
        """Let go of it; what is left of its last answer may take as long again."""
        if self._line is not None:
            (self.transport or self._line).close()
            self._deadline = self.loop.call_later(self._door.limits.request_s, self.abort)


def _network(transport: asyncio.Transport) -> str:
    """Where a connection comes from: its IPv4 address, or its IPv6 network, of which one machine has all addresses."""
    peer = transport.get_extra_info("peername")
    try:
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except (TypeError, ValueError, IndexError):
        return str(peer)
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or ipaddress.IPv6Network((int(address) >> 64 << 64, 64)).network_address
    return str(address)
