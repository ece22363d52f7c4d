"""A proxy on the loopback interface that counts what goes through it."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

__all__ = ["Traffic", "counted"]


@dataclass
class Traffic:
    """What has gone through, as time and bytes of each piece."""

    address: str = ""
    """Where clients connect to."""
    up: list[tuple[float, int]] = field(default_factory=list)
    down: list[tuple[float, int]] = field(default_factory=list)

    def of_a_round(self, commits: Sequence[float], clients: int) -> dict[str, float]:
        """Mean bytes of a round and client between the first commit and the last, framing and heartbeats with them."""
        share = clients * (len(commits) - 1)
        return {
            name: sum(size for moment, size in pieces if commits[0] < moment <= commits[-1]) / share
            for name, pieces in (("bytes_up", self.up), ("bytes_down", self.down))
        }


@contextmanager
def counted(address: str) -> Iterator[Traffic]:
    """A proxy to HOST:PORT; clients connect to `Traffic.address`."""
    host, _, port = address.rpartition(":")
    loop, ready, traffic = asyncio.new_event_loop(), threading.Event(), Traffic()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            await asyncio.gather(_pump(reader, far_writer, traffic.up), _pump(far_reader, writer, traffic.down))

    async def serve() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        traffic.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await server.serve_forever()

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        for each in asyncio.all_tasks(loop):
            each.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    task = loop.create_task(serve())
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield traffic
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pieces: list[tuple[float, int]]) -> None:
    try:
        while data := await reader.read(1 << 16):
            pieces.append((time.time(), len(data)))
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
