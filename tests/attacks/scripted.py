"""A coordinator that follows a script over a real socket and keeps every byte that it is sent, with the time."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from fedloom.proto.frames import CHUNK_FIELD, framed
from fedloom.proto.messages import Answer, Joined, RoundStatus
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as rpc
from fedloom.proto.wire import answer_to_wire, to_wire


@dataclass
class Clock:
    """Seconds that pass when somebody says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Scripted(rpc.FederationServicer):
    """What it says, and what it has heard.

    Of an update's header the digest and the scores are left out, which are the noised numbers' own, and of its payload
    everything but the lengths of the pieces. Heartbeats come when they come; what is in them is kept once.
    """

    joined: Joined
    payload: bytes
    answers: list[Answer]
    clock: Clock
    heard: list[tuple[float, str, bytes, tuple[int, ...]]] = field(default_factory=list)
    beats: set[bytes] = field(default_factory=set)
    beaten: threading.Event = field(default_factory=threading.Event)

    def _hear(self, request: Any, *lengths: int) -> None:
        content = request.SerializeToString(deterministic=True)
        self.heard.append((self.clock.now, type(request).__name__, content, lengths))

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:
        self._hear(request)
        return to_wire(pb.JoinReply, self.joined)

    def Work(self, request: pb.WorkRequest, context: Any) -> pb.WorkReply:
        self._hear(request)
        return answer_to_wire(self.answers.pop(0))

    def Fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.Chunk]:
        self._hear(request)
        assert request.digest == hashlib.sha256(self.payload).hexdigest()
        yield pb.Chunk.FromString(framed(CHUNK_FIELD, self.payload))

    def Submit(self, request_iterator: Iterator[pb.SubmitRequest], context: Any) -> pb.SubmitReply:
        first, *rest = request_iterator
        first.header.ClearField("score")
        assert first.header.digest == hashlib.sha256(b"".join(each.data for each in rest)).hexdigest()
        first.header.ClearField("digest")
        self._hear(first, *(len(each.data) for each in rest))
        return pb.SubmitReply()

    def Exchange(self, request: pb.ExchangeRequest, context: Any) -> pb.ExchangeReply:
        raise AssertionError("no secure sum here")

    def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:
        self.beats.add(request.SerializeToString(deterministic=True))
        self.beaten.set()
        return to_wire(pb.HeartbeatReply, RoundStatus(0, True, 0))

    def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveReply:
        self._hear(request)
        return pb.LeaveReply()


@contextmanager
def listening(scripted: Scripted) -> Iterator[str]:
    """Serve on the loopback interface; the address."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    rpc.add_FederationServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
