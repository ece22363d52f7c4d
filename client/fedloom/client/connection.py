"""The transport seam: how a client talks to its coordinator."""

import hashlib
from collections.abc import Callable, Iterator
from typing import NoReturn, Protocol, TypeVar

import grpc

from fedloom.proto.address import loopback_host
from fedloom.proto.errors import CodecError, ConfigError, ProtocolError, StoreError, Unavailable, UpdateRejected
from fedloom.proto.failpoints import failpoint, reach
from fedloom.proto.frames import CHUNK_FIELD, DATA_FIELD, SERVICE, frames, unframed
from fedloom.proto.limits import HTTP2_FRAME_BYTES, LONG_POLL_S, MAX_MESSAGE_BYTES
from fedloom.proto.messages import PROTOCOL_VERSION, Answer, Joined, UpdateHeader
from fedloom.proto.secagg.steps import StepMessage, StepResult
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as rpc
from fedloom.proto.wire import (
    STATUS,
    answer_from_wire,
    header_to_wire,
    joined_from_wire,
    result_from_wire,
    step_to_wire,
)

__all__ = ["Connection", "GrpcConnection"]

Reply = TypeVar("Reply")

_RETRIED = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", STATUS[StoreError]})
"""Statuses that may pass by themselves: no line, no time, or a coordinator that is about to be restarted."""

_ERRORS = {STATUS[kind]: kind for kind in (ProtocolError, UpdateRejected, ConfigError)}

_CALL_S = 30.0
_TRANSFER_S = 600.0

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Lets HTTP/2 read ahead over long links; measured best at 50 ms round trip with the BDP probe left on.
    ("grpc.http2.lookahead_bytes", 16 << 20),
    ("grpc.http2.max_frame_size", HTTP2_FRAME_BYTES),
    # gRPC's own waits grow to two minutes; the participant spaces its attempts itself.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]


class Connection(Protocol):
    """One client's line to the coordinator. Every call may be repeated with the same effect."""

    def join(self, client: str, declared_examples: int) -> Joined:
        """Learn about the run."""

    def work(self) -> Answer:
        """Ask for work; may block for as long as a long poll."""

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        """The bytes with SHA-256 `digest`, of exactly `size_bytes`."""

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        """Hand in an update; True when exactly it was already there."""

    def exchange(self, message: StepMessage) -> StepResult | None:
        """Send a step of a secure sum and get its result; may block for as long as a long poll, then None."""

    def heartbeat(self) -> None:
        """Say that this client is alive."""

    def leave(self, reason: str) -> None:
        """Say that this client is not to be waited for."""


class GrpcConnection:
    """The coordinator at HOST:PORT. Loopback only until the channel is encrypted."""

    def __init__(self, address: str) -> None:
        """Open a channel; nothing is sent before the first call.

        Raises:
            ConfigError: The address is not HOST:PORT on the loopback interface.
        """
        loopback_host(address)
        self.address = address
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = rpc.FederationStub(self._channel)
        # Payloads go around protobuf, see `frames`; None leaves the messages as the bytes they are on the wire.
        self._fetch = self._channel.unary_stream(
            f"/{SERVICE}/Fetch", request_serializer=pb.FetchRequest.SerializeToString, response_deserializer=None
        )
        self._submit = self._channel.stream_unary(
            f"/{SERVICE}/Submit", request_serializer=None, response_deserializer=pb.SubmitReply.FromString
        )
        self._client, self._run, self._epoch = "", "", 0

    @failpoint("line.join")
    def join(self, client: str, declared_examples: int) -> Joined:
        """Learn about the run and remember its name and epoch.

        Raises:
            Unavailable: The coordinator cannot be reached.
            ProtocolError: It refuses this client.
        """
        request = pb.JoinRequest(client=client, protocol=PROTOCOL_VERSION, declared_examples=declared_examples)
        joined = joined_from_wire(self._call(self._stub.Join, request, _CALL_S))
        self._client, self._run, self._epoch = client, joined.run, joined.epoch
        return joined

    @failpoint("line.work")
    def work(self) -> Answer:
        """Ask for work."""
        request = pb.WorkRequest(run=self._run, epoch=self._epoch, client=self._client)
        return answer_from_wire(self._call(self._stub.Work, request, LONG_POLL_S + 10))

    @failpoint("line.fetch")
    def fetch(self, digest: str, size_bytes: int) -> bytes:
        """Read the payload chunk by chunk, and never more than was promised.

        Raises:
            CodecError: Its length or digest is not the promised one.
        """
        parts: list[memoryview] = []
        filled, found = 0, hashlib.sha256()
        request = pb.FetchRequest(run=self._run, epoch=self._epoch, client=self._client, digest=digest, offset=0)
        try:
            for message in self._fetch(request, timeout=_TRANSFER_S):
                parts.append(unframed(CHUNK_FIELD, message))
                filled += len(parts[-1])
                reach("line.fetch.chunk")
                found.update(parts[-1])  # while the next chunk is on its way
                if filled > size_bytes:
                    raise CodecError(f"coordinator sends more than the {size_bytes} bytes it promised for {digest}")
        except grpc.RpcError as error:
            _translate(error, self.address)
        if filled != size_bytes or found.hexdigest() != digest:
            raise CodecError(f"payload {digest} arrived with {filled} of {size_bytes} bytes or with other content")
        return b"".join(parts)

    @failpoint("line.submit")
    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        """Send the header, then the payload in chunks."""

        def messages() -> Iterator[bytes]:
            yield pb.SubmitRequest(header=header_to_wire(header, self._run, self._epoch)).SerializeToString()
            reach("line.submit.header")
            yield from frames(DATA_FIELD, payload)

        try:
            return bool(self._submit(messages(), timeout=_TRANSFER_S).duplicate)
        except grpc.RpcError as error:
            _translate(error, self.address)

    def exchange(self, message: StepMessage) -> StepResult | None:
        """Send a step of a secure sum and get its result, or None to be asked again."""
        request = step_to_wire(message, self._client, self._run, self._epoch)
        return result_from_wire(self._call(self._stub.Exchange, request, LONG_POLL_S + 10))

    @failpoint("line.heartbeat")
    def heartbeat(self) -> None:
        """Say that this client is alive."""
        request = pb.HeartbeatRequest(run=self._run, epoch=self._epoch, client=self._client)
        self._call(self._stub.Heartbeat, request, _CALL_S)

    @failpoint("line.leave")
    def leave(self, reason: str) -> None:
        """Say goodbye with one line of reason."""
        request = pb.LeaveRequest(run=self._run, epoch=self._epoch, client=self._client, reason=reason[:500])
        self._call(self._stub.Leave, request, _CALL_S)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _call(self, method: Callable[..., Reply], request: object, timeout_s: float) -> Reply:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            _translate(error, self.address)


def _translate(error: grpc.RpcError, address: str) -> NoReturn:
    """A gRPC failure as one of our errors, by the same table that the coordinator uses."""
    status, details = error.code().name, error.details() or ""
    if status in _RETRIED:
        raise Unavailable(f"coordinator {address} cannot serve this client now ({status}: {details})") from error
    raise _ERRORS.get(status, ProtocolError)(f"coordinator {address} answers {status}: {details}") from error
