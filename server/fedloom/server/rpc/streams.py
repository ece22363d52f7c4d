"""Payloads through a stream, at no less than the slowest rate that is allowed and in bounded memory."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

from fedloom.core.errors import ProtocolError, Unavailable
from fedloom.core.limits import CHUNK_BYTES, MIN_BYTES_PER_S, MIN_CHUNK_BYTES, TRANSFER_GRACE_S, TRANSFER_S
from fedloom.core.runtime.failpoints import reach
from fedloom.proto.frames import CHUNK_FIELD, DATA_FIELD, framed, unframed

__all__ = ["Pace", "Sender", "paced", "received"]

_LARGE_WRITES = 32
_SMALL_CHUNK_BYTES = 64 << 10


class Pace:
    """Until when something has to move. Times are the event loop's, in seconds."""

    def __init__(self, began_s: float) -> None:
        self._began_s, self._moved_s, self.bytes = began_s, began_s, 0

    def move(self, size_bytes: int, now_s: float) -> None:
        """So much has moved."""
        self.bytes, self._moved_s = self.bytes + size_bytes, now_s

    @property
    def end_s(self) -> float:
        """The call ends at this time unless more moves."""
        silent_s, slow_s = self._moved_s + TRANSFER_GRACE_S, TRANSFER_GRACE_S + self.bytes / MIN_BYTES_PER_S
        return min(silent_s, self._began_s + min(slow_s, TRANSFER_S))


@asynccontextmanager
async def paced() -> AsyncIterator[Callable[[int], None]]:
    """A block that ends with an error when too little moves; its value is called with what has moved, in bytes.

    Raises:
        Unavailable: The other side is too slow. Nothing is lost: it may go on in another call.
    """
    loop = asyncio.get_running_loop()
    pace = Pace(loop.time())
    try:
        async with asyncio.timeout_at(pace.end_s) as limit:

            def moved(size_bytes: int) -> None:
                pace.move(size_bytes, loop.time())
                limit.reschedule(pace.end_s)

            yield moved
    except TimeoutError:
        raise Unavailable(
            f"only {pace.bytes} bytes have moved in this call, which is too slow; go on with the rest in another"
        ) from None


async def received(
    stream: AsyncIterator[bytes], missing_bytes: int, keep: Callable[[memoryview], Awaitable[None]]
) -> None:
    """Hand exactly `missing_bytes` of payload to `keep`, piece by piece.

    Raises:
        ProtocolError: The stream ends early, or holds something else, too much of it, or crumbs.
    """
    have = 0
    async for message in stream:
        data = unframed(DATA_FIELD, message)
        have += len(data)
        await keep(data)
        if len(data) < MIN_CHUNK_BYTES and have < missing_bytes:
            raise ProtocolError(
                f"a chunk of {len(data)} bytes; all but the last have at least {MIN_CHUNK_BYTES}, at best {CHUNK_BYTES}"
            )
    if have < missing_bytes:
        raise ProtocolError(f"the payload ended after {have} bytes; {missing_bytes} were to come")


class Sender:
    """Writes payloads to many clients at once.

    gRPC copies what is written until it can be sent, so a chunk is held for every client that reads slowly. When
    many do, chunks become small rather than clients have to wait: nobody who stops reading can stop the others.
    """

    def __init__(self) -> None:
        self._large = 0

    async def send(self, write: Callable[[bytes], Awaitable[None]], payload: bytes, offset: int) -> None:
        """Write the payload's messages from `offset` on.

        Raises:
            Unavailable: The client reads too slowly.
        """
        async with paced() as moved:
            for start, end in self._pieces(len(payload), offset):
                large = end - start > _SMALL_CHUNK_BYTES
                self._large += large
                try:
                    reach("rpc.fetch.chunk")
                    await write(framed(CHUNK_FIELD, memoryview(payload)[start:end]))
                finally:
                    self._large -= large
                moved(end - start)

    def _pieces(self, size_bytes: int, offset: int) -> Iterator[tuple[int, int]]:
        while offset < size_bytes:
            chunk = CHUNK_BYTES if self._large < _LARGE_WRITES else _SMALL_CHUNK_BYTES
            end = min(offset + chunk, size_bytes)
            yield offset, end
            offset = end
