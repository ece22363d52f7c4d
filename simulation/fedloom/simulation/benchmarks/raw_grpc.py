"""The yardstick of a round: its bytes over bare gRPC streams, one down and one up for each client, and nothing else."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from fedloom.client.transport.tls import open_channel
from fedloom.proto.frames import CHUNK_FIELD, DATA_FIELD, frames
from fedloom.server.auth.tls import server_credentials
from fedloom.server.rpc.server import OPTIONS

__all__ = ["RawExchange", "raw_server"]

_SERVICE = "fedloom.bench.Raw"


class RawExchange:
    """A client's end: takes a payload and sends one, in the same chunks as in a round."""

    def __init__(self, address: str, payload: bytes, certs: Path | None = None) -> None:
        """Open a channel.

        Args:
            address: HOST:PORT of a `raw_server`.
            payload: What goes up.
            certs: The client's folder of certificates, where the server has an authority.
        """
        channel = open_channel(address, certs)
        self._down = channel.unary_stream(f"/{_SERVICE}/Down", request_serializer=None, response_deserializer=None)
        self._up = channel.stream_unary(f"/{_SERVICE}/Up", request_serializer=None, response_deserializer=None)
        self._payload = payload

    def __call__(self) -> None:
        """One exchange; it begins when all clients are there."""
        self.down()
        self.up()

    def down(self) -> None:
        """Take the payload."""
        for _ in self._down(b"", timeout=60):
            pass

    def up(self) -> None:
        """Send one."""
        self._up(frames(DATA_FIELD, self._payload), timeout=60)


class _Server:
    """The other end."""

    def __init__(self, clients: int, size_bytes: int, spans_s: list[float]) -> None:
        self._frames = list(frames(CHUNK_FIELD, bytes(size_bytes)))
        self._clients, self._spans_s, self._began_s = clients, spans_s, 0.0
        self._here = self._done = 0
        self._all_here = asyncio.Barrier(clients)

    async def down(self, request: bytes, context: "aio.ServicerContext[Any, Any]") -> None:
        """Wait for all clients, then write the payload."""
        self._here += 1
        if self._here == self._clients:
            self._here, self._began_s = 0, time.perf_counter()
        await self._all_here.wait()
        for frame in self._frames:
            await context.write(frame)

    async def up(self, requests: AsyncIterator[bytes], context: "aio.ServicerContext[Any, Any]") -> bytes:
        """Read a payload."""
        async for _ in requests:
            pass
        self._done += 1
        if self._done == self._clients:
            self._done = 0
            self._spans_s.append(time.perf_counter() - self._began_s)
        return b""


@contextmanager
def raw_server(clients: int, size_bytes: int, spans_s: list[float], authority: Path | None = None) -> Iterator[str]:
    """Serve exchanges of so many clients from a background thread; the value is the address bound.

    Args:
        clients: An exchange begins when all of them are there.
        size_bytes: Of the payload that goes down.
        spans_s: Gets how long each exchange took, in seconds, until all clients have sent theirs.
        authority: Folder of the certificates that it serves with; None encrypts nothing.
    """
    bound: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        raw, stop = _Server(clients, size_bytes, spans_s), asyncio.Event()
        methods: dict[str, Any] = {
            "Down": grpc.unary_stream_rpc_method_handler(raw.down),
            "Up": grpc.stream_unary_rpc_method_handler(raw.up),
        }
        server = aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
        if authority is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", server_credentials(authority))
        await server.start()
        bound.set_result((f"127.0.0.1:{port}", asyncio.get_running_loop(), stop))
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="raw-grpc", daemon=True)
    thread.start()
    address, loop, stop = bound.result(30)
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
