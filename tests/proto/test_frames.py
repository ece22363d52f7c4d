"""Hand-made payload messages are protobuf's, byte for byte, and nothing else is read as one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import ProtocolError
from fedloom.core.limits import CHUNK_BYTES
from fedloom.proto.frames import CHUNK_FIELD, DATA_FIELD, SERVICE, framed, frames, unframed
from fedloom.proto.v1 import federation_pb2 as pb


@pytest.mark.parametrize("size", [1, 127, 128, 300, 16_383, 16_384, CHUNK_BYTES])
def test_a_frame_is_what_protobuf_writes_and_reads(size: int) -> None:
    data = bytes(index % 251 for index in range(size))

    assert framed(CHUNK_FIELD, data) == pb.Chunk(data=data).SerializeToString()
    assert framed(DATA_FIELD, data) == pb.SubmitRequest(data=data).SerializeToString()
    assert bytes(unframed(CHUNK_FIELD, pb.Chunk(data=data).SerializeToString())) == data
    assert pb.SubmitRequest.FromString(framed(DATA_FIELD, data)).data == data


@given(st.binary(max_size=200))
def test_whatever_is_read_is_what_protobuf_reads(message: bytes) -> None:
    try:
        data = bytes(unframed(CHUNK_FIELD, message))
    except ProtocolError:
        return
    assert pb.Chunk.FromString(message).data == data


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x0a",
        b"\x0a\x05ab",
        b"\x0a\x01abc",
        b"\x0a\xff\xff\xff\xff\xff\xff",
        b"\x12\x02ab",
        framed(CHUNK_FIELD, b"ab") + framed(CHUNK_FIELD, b"cd"),
    ],
)
def test_anything_else_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        unframed(CHUNK_FIELD, message)


@given(st.integers(0, 3 * CHUNK_BYTES), st.integers(0, 3 * CHUNK_BYTES))
def test_frames_put_together_are_the_payload_from_the_offset(size: int, offset: int) -> None:
    payload = bytes(size)
    parts = [bytes(unframed(DATA_FIELD, message)) for message in frames(DATA_FIELD, payload, offset)]

    assert b"".join(parts) == payload[offset:]
    assert all(0 < len(part) <= CHUNK_BYTES for part in parts)


def test_the_service_has_the_name_the_proto_file_gives_it() -> None:
    assert pb.DESCRIPTOR.services_by_name["Federation"].full_name == SERVICE
    assert pb.Chunk.DESCRIPTOR.fields_by_name["data"].number == CHUNK_FIELD
    assert pb.SubmitRequest.DESCRIPTOR.fields_by_name["data"].number == DATA_FIELD
