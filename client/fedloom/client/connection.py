"""The transport seam: how a client talks to its coordinator."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NoReturn, Protocol, TypeVar

import grpc

from fedloom.proto.address import loopback_host
from fedloom.proto.errors import (
    CodecError,
    ConfigError,
    Overloaded,
    ProtocolError,
    StoreError,
    Unavailable,
    UpdateRejected,
)
from fedloom.proto.frames import CHUNK_FIELD, DATA_FIELD, SERVICE, frames, unframed
from fedloom.proto.limits import HTTP2_FRAME_BYTES, LONG_POLL_S, MAX_MESSAGE_BYTES, TRANSFER_S
from fedloom.proto.messages import PROTOCOL_VERSION, Answer, Joined, UpdateHeader
from fedloom.proto.secagg.steps import StepMessage, StepResult
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as rpc
from fedloom.proto.wire import (
    RETRY_AFTER,
    STATUS,
    answer_from_wire,
    header_to_wire,
    joined_from_wire,
    overloaded,
    result_from_wire,
    step_to_wire,
)

__all__ = ["Connection", "GrpcConnection"]

Reply = TypeVar("Reply")

_RETRIED = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", STATUS[StoreError]})
"""Statuses that may pass by themselves: no line, no time, or a coordinator that is about to be restarted."""

_ERRORS = {STATUS[kind]: kind for kind in (ProtocolError, UpdateRejected, ConfigError)}

_CALL_S = 30.0

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


@dataclass
class _Download:
    """What has come of a payload, hashed while the next chunk is on its way."""

    digest: str
    filled: int = 0
    parts: list[memoryview] = field(default_factory=list)
    found: Any = field(default_factory=hashlib.sha256)

    def take(self, chunk: memoryview) -> None:
        """Add a chunk to the end."""
        self.parts.append(chunk)
        self.filled += len(chunk)
        self.found.update(chunk)


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
        self._unfetched = _Download("")
        self._unsent: UpdateHeader | None = None

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

    def work(self) -> Answer:
        """Ask for work."""
        request = pb.WorkRequest(run=self._run, epoch=self._epoch, client=self._client)
        return answer_from_wire(self._call(self._stub.Work, request, LONG_POLL_S + 10))

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        """Read the payload chunk by chunk, never more than was promised; after a broken call, only the rest.

        Raises:
            Unavailable: The line is gone. What has come is kept until another payload is asked for.
            CodecError: Its length or digest is not the promised one.
        """
        got = self._unfetched if self._unfetched.digest == digest else _Download(digest)
        self._unfetched = _Download("")
        request = pb.FetchRequest(
            run=self._run, epoch=self._epoch, client=self._client, digest=digest, offset=got.filled
        )
        try:
            for message in self._fetch(request, timeout=TRANSFER_S):
                got.take(unframed(CHUNK_FIELD, message))
                if got.filled > size_bytes:
                    raise CodecError(f"coordinator sends more than the {size_bytes} bytes it promised for {digest}")
        except grpc.RpcError as error:
            if error.code().name in _RETRIED:
                self._unfetched = got
            _translate(error, self.address)
        if got.filled != size_bytes or got.found.hexdigest() != digest:
            raise CodecError(f"payload {digest} arrived with {got.filled} of {size_bytes} bytes or with other content")
        return b"".join(got.parts)

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        """Send the header, then the payload in chunks; after a broken call, only what the coordinator lacks.

        Raises:
            Unavailable: The line is gone, or the coordinator has lost what it had.
        """
        # After a broken call nobody here knows what has arrived: ask, by an offset after which nothing is left.
        offset = len(payload) if self._unsent == header else 0
        try:
            reply = self._send(header, payload, offset)
            if offset and reply.missing_bytes:
                offset = len(payload) - min(reply.missing_bytes, len(payload))
                reply = self._send(header, payload, offset)
        except grpc.RpcError as error:
            self._unsent = header if error.code().name in _RETRIED | {STATUS[Overloaded]} else None
            _translate(error, self.address)
        if reply.missing_bytes:
            raise Unavailable(f"coordinator {self.address} has lost part of the update; sending it again")
        self._unsent = None
        return bool(reply.duplicate)

    def _send(self, header: UpdateHeader, payload: bytes, offset: int) -> pb.SubmitReply:
        first = pb.SubmitRequest(header=header_to_wire(header, self._run, self._epoch, offset)).SerializeToString()
        messages = chain((first,), frames(DATA_FIELD, payload, offset))
        reply: pb.SubmitReply = self._submit(messages, timeout=TRANSFER_S)
        return reply

    def exchange(self, message: StepMessage) -> StepResult | None:
        """Send a step of a secure sum and get its result, or None to be asked again."""
        request = step_to_wire(message, self._client, self._run, self._epoch)
        return result_from_wire(self._call(self._stub.Exchange, request, LONG_POLL_S + 10))

    def heartbeat(self) -> None:
        """Say that this client is alive."""
        request = pb.HeartbeatRequest(run=self._run, epoch=self._epoch, client=self._client)
        self._call(self._stub.Heartbeat, request, _CALL_S)

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
    for each in error.trailing_metadata() or ():
        if each.key == RETRY_AFTER:
            raise overloaded(f"coordinator {address} is busy: {details}", str(each.value)) from error
    if status in _RETRIED:
        raise Unavailable(f"coordinator {address} cannot serve this client now ({status}: {details})") from error
    raise _ERRORS.get(status, ProtocolError)(f"coordinator {address} answers {status}: {details}") from error
