"""Payload messages written and read without protobuf's copies.

A `Chunk`, or a `SubmitRequest` that carries data, is one bytes field: a tag, a length, the bytes. Writing those
three by hand gives exactly what protobuf would (a test compares them), and a payload is copied once on its way
instead of four times, which is a quarter of the time of a round.
"""

from collections.abc import Iterator

from fedloom.core.errors import ProtocolError
from fedloom.core.limits import CHUNK_BYTES

__all__ = ["CHUNK_FIELD", "DATA_FIELD", "SERVICE", "framed", "frames", "unframed"]

SERVICE = "fedloom.v1.Federation"
"""Full name of the gRPC service."""

CHUNK_FIELD = 1
"""`Chunk.data`."""

DATA_FIELD = 2
"""`SubmitRequest.data`."""

_LENGTH_DELIMITED = 2
_MAX_VARINT_BYTES = 5


def framed(field: int, data: bytes | memoryview) -> bytes:
    """A message whose only field is `field`, of type bytes.

    >>> framed(1, b"ab").hex()
    '0a026162'
    """
    size, prefix = len(data), bytearray([field << 3 | _LENGTH_DELIMITED])
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return b"".join((prefix, data))


def frames(field: int, payload: bytes, offset: int = 0) -> Iterator[bytes]:
    """The messages that carry `payload` from `offset` on, in chunks."""
    view = memoryview(payload)
    for start in range(offset, len(payload), CHUNK_BYTES):
        yield framed(field, view[start : start + CHUNK_BYTES])


def unframed(field: int, message: bytes) -> memoryview:
    """The data of a message made by `framed` or by protobuf.

    Raises:
        ProtocolError: It is another field, has more than one, or its length is not what it says.

    >>> bytes(unframed(1, framed(1, b"ab")))
    b'ab'
    """
    if not message or message[0] != field << 3 | _LENGTH_DELIMITED:
        raise ProtocolError("only payload may follow in this stream; send the header once, then the payload")
    size = 0
    for index, byte in enumerate(message[1 : 1 + _MAX_VARINT_BYTES]):
        size |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            data = memoryview(message)[index + 2 :]
            if len(data) == size:
                return data
            break
    raise ProtocolError(f"a payload message of {len(message)} bytes does not hold the length it announces")
