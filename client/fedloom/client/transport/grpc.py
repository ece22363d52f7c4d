"""The transport seam: how a client talks to its coordinator."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import grpc

from fedloom.client.transport.rate_limit import Bucket
from fedloom.client.transport.tls import distrusted, open_channel, stamp
from fedloom.core.errors import (
    CodecError,
    ConfigError,
    Forbidden,
    IdentityError,
    Overloaded,
    ProtocolError,
    StoreError,
    Unavailable,
    UpdateRejected,
)
from fedloom.core.limits import LONG_POLL_S, TRANSFER_S
from fedloom.core.runtime.failpoints import failpoint, reach
from fedloom.core.text import clean
from fedloom.proto.frames import CHUNK_FIELD, DATA_FIELD, SERVICE, frames, unframed
from fedloom.proto.messages import PROTOCOL_VERSION, Answer, Joined, RoundStatus, StepMessage, StepResult, UpdateHeader
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as rpc
from fedloom.proto.wire import (
    RETRY_AFTER,
    STATUS,
    answer_from_wire,
    from_wire,
    header_to_wire,
    overloaded,
    result_from_wire,
    to_wire,
)

__all__ = ["Connection", "GrpcConnection", "translated"]

Reply = TypeVar("Reply")

_RETRIED = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", STATUS[StoreError]})
"""Statuses that may pass by themselves: no line, no time, or a coordinator that is about to be restarted."""

_ERRORS = {STATUS[kind]: kind for kind in (ProtocolError, UpdateRejected, ConfigError, IdentityError, Forbidden)}

_CALL_S = 30.0


class Connection(Protocol):
    """One client's line to the coordinator. Every call may be repeated with the same effect."""

    def join(self, client: str, declared_examples: int) -> Joined:
        """Learn about the run."""

    def work(self, held: str = "") -> Answer:
        """Ask for work; may block for as long as a long poll. `held`: digest of the adapter that is here, if any."""

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        """The bytes with SHA-256 `digest`, of exactly `size_bytes`."""

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        """Hand in an update; True when exactly it was already there."""

    def exchange(self, message: StepMessage) -> StepResult | None:
        """Send a step of a secure sum and get its result; may block for as long as a long poll, then None."""

    def heartbeat(self) -> RoundStatus:
        """Say that this client is alive, and learn how the run stands."""

    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
        """Say that this client is not to be waited for, and at the end what its held-out rows say of the result."""


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
    """The coordinator at HOST:PORT."""

    def __init__(
        self, address: str, certs: Path | None = None, *, upload: int | None = None, download: int | None = None
    ) -> None:
        """Open a channel; nothing is sent before the first call.

        Args:
            address: HOST:PORT.
            certs: This site's folder of certificates; None is for a coordinator without, on the loopback interface.
            upload: Most bytes of payload sent in a second; None sets no cap.
            download: Most bytes of payload received in a second.

        Raises:
            ConfigError: See `channel.open_channel`.
            IdentityError: See `channel.open_channel`.
        """
        self.address = address
        self._client, self._run, self._epoch = "", "", 0
        self._unfetched = _Download("")
        self._unsent: UpdateHeader | None = None
        self._certs = certs
        self._slow = download is not None
        self._upload, self._download = Bucket(upload), Bucket(download)
        self._open()

    def _open(self) -> None:
        self._stamp = stamp(self._certs)
        self._channel = open_channel(self.address, self._certs, slow=self._slow)
        self._stub = rpc.FederationStub(self._channel)
        # Payloads go around protobuf, see `frames`; None leaves the messages as the bytes they are on the wire.
        self._fetch = self._channel.unary_stream(
            f"/{SERVICE}/Fetch", request_serializer=pb.FetchRequest.SerializeToString, response_deserializer=None
        )
        self._submit = self._channel.stream_unary(
            f"/{SERVICE}/Submit", request_serializer=None, response_deserializer=pb.SubmitReply.FromString
        )

    @failpoint("line.join")
    def join(self, client: str, declared_examples: int) -> Joined:
        """Learn about the run and remember its name and epoch.

        Raises:
            Unavailable: The coordinator cannot be reached.
            IdentityError: It does not prove itself, or does not accept this site's certificate.
            ProtocolError: It refuses this client.
        """
        request = pb.JoinRequest(client=client, protocol=PROTOCOL_VERSION, declared_examples=declared_examples)
        joined = from_wire(Joined, self._call(self._stub.Join, request, _CALL_S))
        self._client, self._run, self._epoch = client, joined.run, joined.epoch
        return joined

    @failpoint("line.work")
    def work(self, held: str = "") -> Answer:
        """Ask for work; with a certificate that was renewed meanwhile, if it was."""
        if self._stamp != stamp(self._certs):
            self._open()  # the old channel is left to the calls that other threads may have on it
        request = pb.WorkRequest(run=self._run, epoch=self._epoch, client=self._client, held=held)
        return answer_from_wire(self._call(self._stub.Work, request, LONG_POLL_S + 10))

    @failpoint("line.fetch")
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
                reach("line.fetch.chunk")
                if got.filled > size_bytes:
                    raise CodecError(f"coordinator sends more than the {size_bytes} bytes it promised for {digest}")
                self._download.take(len(message))
        except grpc.RpcError as error:
            if error.code().name in _RETRIED:
                self._unfetched = got
            _translate(error, self.address)
        if got.filled != size_bytes or got.found.hexdigest() != digest:
            raise CodecError(f"payload {digest} arrived with {got.filled} of {size_bytes} bytes or with other content")
        return b"".join(got.parts)

    @failpoint("line.submit")
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
        def messages() -> Iterator[bytes]:
            first = header_to_wire(header, self._run, self._epoch, offset)
            yield pb.SubmitRequest(header=first).SerializeToString()
            reach("line.submit.header")
            for frame in frames(DATA_FIELD, payload, offset):
                self._upload.take(len(frame))
                yield frame

        reply: pb.SubmitReply = self._submit(messages(), timeout=TRANSFER_S)
        return reply

    def exchange(self, message: StepMessage) -> StepResult | None:
        """Send a step of a secure sum and get its result, or None to be asked again."""
        request = to_wire(pb.ExchangeRequest, message, client=self._client, run=self._run, epoch=self._epoch)
        return result_from_wire(self._call(self._stub.Exchange, request, LONG_POLL_S + 10))

    @failpoint("line.heartbeat")
    def heartbeat(self) -> RoundStatus:
        """Say that this client is alive, and learn how the run stands."""
        request = pb.HeartbeatRequest(run=self._run, epoch=self._epoch, client=self._client)
        return from_wire(RoundStatus, self._call(self._stub.Heartbeat, request, _CALL_S))

    def ping(self, client: str) -> None:
        """Ask, without joining, whether a coordinator is there that knows this client. It changes nothing there.

        Raises:
            Unavailable: The coordinator cannot be reached.
            IdentityError: It does not prove itself, or does not accept this site's certificate.
            ProtocolError: Whoever answers is no coordinator.
        """
        try:
            self._call(self._stub.Heartbeat, pb.HeartbeatRequest(client=client), _CALL_S)
        except ProtocolError as error:
            if f"answers {STATUS[ProtocolError]}:" not in str(error):
                raise
            # It has looked at who asks, and says that a client of that name should join first.

    @failpoint("line.leave")
    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
        """Say goodbye with one line of reason, and at the end with a score of the result."""
        request = pb.LeaveRequest(
            run=self._run, epoch=self._epoch, client=self._client, reason=reason[:500], score=score
        )
        self._call(self._stub.Leave, request, _CALL_S)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _call(self, method: Callable[..., Reply], request: object, timeout_s: float) -> Reply:
        with translated(self.address):
            return method(request, timeout=timeout_s)


@contextmanager
def translated(address: str) -> Iterator[None]:
    """Turn a gRPC failure into one of our errors, by the same table that the coordinator uses."""
    try:
        yield
    except grpc.RpcError as error:
        _translate(error, address)


def _translate(error: grpc.RpcError, address: str) -> NoReturn:
    """A gRPC failure as one of our errors, by the same table that the coordinator uses."""
    status, details = error.code().name, clean(error.details() or "")
    for each in error.trailing_metadata() or ():
        if each.key == RETRY_AFTER:
            raise overloaded(f"coordinator {address} is busy: {details}", str(each.value)) from error
    if status == "UNAVAILABLE" and (unproven := distrusted(address, details)):
        raise unproven from error
    if status in _RETRIED:
        raise Unavailable(f"coordinator {address} cannot serve this client now ({status}: {details})") from error
    raise _ERRORS.get(status, ProtocolError)(f"coordinator {address} answers {status}: {details}") from error
