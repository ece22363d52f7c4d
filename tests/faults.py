"""A TCP proxy that misbehaves as told, and an HTTP CONNECT proxy like those that hospitals put before their networks.

It carries real bytes between real sockets from a thread of its own; a test changes its `faults` while it runs.
"""

import asyncio
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

__all__ = ["FaultProxy", "Faults", "fault_proxy"]

T = TypeVar("T")

_PIECE_BYTES = 64 << 10


@dataclass
class Faults:
    """What goes wrong from now on, on old connections and on new ones."""

    latency_s: float = 0.0
    """Every piece waits so long, in both directions."""
    slice_bytes: int = _PIECE_BYTES
    """Longest piece that is passed on at once."""
    blackhole: bool = False
    """Bytes are read and thrown away; nobody is told."""
    refuse: bool = False
    """New connections are reset at once."""
    idle_s: float | None = None
    """A connection over which nothing has gone for so long is closed, as by the proxy of a hospital."""
    cuts_up: "deque[int]" = field(default_factory=deque)
    """Each new connection takes the next number and is reset once so many bytes have gone to the server."""
    cuts_down: "deque[int]" = field(default_factory=deque)
    """The same for bytes to the client."""
    cut_when: Callable[[], bool] = lambda: True
    """A connection whose bytes have gone stays open, and passes nothing on, until this is true."""
    flips_up: "deque[int]" = field(default_factory=deque)
    """Each new connection takes the next number and has one bit of that byte to the server turned over."""


@dataclass(eq=False)
class _Link:
    """One client's connection and the one made for it."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter | None = None
    seen_s: float = 0.0
    tasks: "list[asyncio.Task[None]]" = field(default_factory=list)
    half: bool = False
    released: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Way:
    """One direction of a link."""

    link: _Link
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    cut: int | None
    flip: int | None
    up: bool
    passed: int = 0


class FaultProxy:
    """Listens on a free loopback port. Use it through `fault_proxy`.

    Args:
        upstream: HOST:PORT of the server; None makes it an HTTP CONNECT proxy, which is told by each client.

    Attributes:
        address: HOST:PORT to connect to.
        upstream: May be changed, for connections to come.
        faults: What goes wrong.
        connections: How many connections clients have made.
        targets: Where CONNECT requests have asked to go.
        up_bytes: Bytes that have gone to the server, over all connections.
        down_bytes: Bytes that have gone to clients.
    """

    def __init__(self, upstream: str | None) -> None:
        self.upstream, self.faults = upstream, Faults()
        self.connections, self.up_bytes, self.down_bytes = 0, 0, 0
        self.targets: list[str] = []
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname()[:2])

    def reset(self) -> None:
        """Reset every connection there is."""
        self._do(self._reset_all())

    def half_open(self) -> None:
        """Reset every connection to the server and say nothing to the clients, whose sockets stay open."""
        self._do(self._leave_half())

    def close(self) -> None:
        """Stop listening, reset every connection and end the thread."""
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _accept(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        self.connections += 1
        link = _Link(near, seen_s=self._loop.time())
        self._links.add(link)
        try:
            await self._carry(link, reader)
        except (OSError, asyncio.IncompleteReadError):
            pass  # one of the two is gone, and so is the link
        finally:
            _reset(near)
            if link.far is not None:
                _reset(link.far)
            self._links.discard(link)

    async def _carry(self, link: _Link, reader: asyncio.StreamReader) -> None:
        faults = self.faults
        if faults.refuse:
            return
        target = self.upstream or await self._asked(link, reader)
        host, _, port = target.rpartition(":")
        back, link.far = await asyncio.open_connection(host, int(port))
        up = _Way(link, reader, link.far, _next(faults.cuts_up), _next(faults.flips_up), up=True)
        down = _Way(link, back, link.near, _next(faults.cuts_down), None, up=False)
        link.tasks = [asyncio.create_task(self._pump(way)) for way in (up, down)]
        link.tasks.append(asyncio.create_task(self._watch(link)))
        try:
            await asyncio.wait(link.tasks, return_when=asyncio.FIRST_COMPLETED)
            if link.half:
                await link.released.wait()
        finally:
            for task in link.tasks:
                task.cancel()
            await asyncio.gather(*link.tasks, return_exceptions=True)

    async def _asked(self, link: _Link, reader: asyncio.StreamReader) -> str:
        """The target of a CONNECT request, which is granted."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, target, _ = head.split(" ", 2)
        if method != "CONNECT":
            link.near.write(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n")
            raise ConnectionAbortedError(head)
        self.targets.append(target)
        link.near.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await link.near.drain()
        return target

    async def _pump(self, way: _Way) -> None:
        while data := await way.reader.read(self.faults.slice_bytes):
            faults, start = self.faults, way.passed
            way.link.seen_s = self._loop.time()
            way.passed += len(data)
            if faults.blackhole:
                continue
            if faults.latency_s:
                await asyncio.sleep(faults.latency_s)
            if way.cut is not None and way.passed > way.cut:
                # What has passed can still be lost in buffers: a test knows when its receiver has read it.
                while not self.faults.cut_when():
                    await asyncio.sleep(0.01)
                way.writer.close()
                await way.writer.wait_closed()
                return
            if way.flip is not None and start <= way.flip < way.passed:
                spoilt = bytearray(data)
                spoilt[way.flip - start] ^= 1
                data = bytes(spoilt)
            if way.up:
                self.up_bytes += len(data)
            else:
                self.down_bytes += len(data)
            way.writer.write(data)
            await way.writer.drain()

    async def _watch(self, link: _Link) -> None:
        """Ends when the link has been idle for too long."""
        while True:
            idle_s = self.faults.idle_s
            left_s = 0.05 if idle_s is None else link.seen_s + idle_s - self._loop.time()
            if left_s <= 0:
                return
            await asyncio.sleep(min(left_s, 0.05))

    async def _reset_all(self) -> None:
        for link in self._links:
            link.released.set()
            for task in link.tasks:
                task.cancel()

    async def _leave_half(self) -> None:
        for link in self._links:
            if link.far is not None:
                link.half = True
                _reset(link.far)
            for task in link.tasks:
                task.cancel()

    async def _end(self) -> None:
        self._server.close()
        while self._links:
            await self._reset_all()
            for link in self._links:
                _reset(link.near)
            await asyncio.sleep(0.01)


def _next(numbers: "deque[int]") -> int | None:
    return numbers.popleft() if numbers else None


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, so that the other end knows at once and nothing lingers."""
    sock = writer.get_extra_info("socket")
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextmanager
def fault_proxy(upstream: str | None = None) -> Iterator[FaultProxy]:
    """A proxy for the length of a `with` block; without `upstream`, an HTTP CONNECT proxy."""
    proxy = FaultProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
