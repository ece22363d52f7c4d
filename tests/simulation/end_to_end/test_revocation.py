"""Who is put out, when, and how; and who may look at a run and stop it."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from fedloom.client.transport import admin as operator
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.client.transport.tls import MEMBER_FILE, member, open_channel
from fedloom.core.codecs import codec
from fedloom.core.errors import Forbidden, IdentityError, StoreError, Unavailable
from fedloom.core.limits import CHUNK_BYTES
from fedloom.core.security.certificates import CA_FILE, KeyPair
from fedloom.core.security.subject import Identity, MemberRole
from fedloom.proto.messages import Assignment, UpdateHeader, upload_schema
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.wire import header_to_wire
from fedloom.server.auth.ca import Authority
from fedloom.server.auth.certificates import Identities
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc import server as serve_module
from fedloom.server.rpc.server import serving
from fedloom.simulation.credentials import enrolled

ANN, BEN = Identity(MemberRole.CLIENT, "ann"), Identity(MemberRole.CLIENT, "ben")
Connect = Callable[[Path], GrpcConnection]
BothAsk = Callable[[GrpcConnection], Assignment]
ShortLived = Callable[[Path, float], Path]
WAIT_S = 30.0
"""Far below a long poll, and far above what anything here takes."""


def begin(
    kind: str,
    made: Coordinator,
    both_ask: BothAsk,
    connection: GrpcConnection,
    channel: grpc.Channel,
    stop: threading.Event,
) -> Any:
    """Start a call of Ann's that would last; on return its handler is at work."""
    working = threading.Event()

    def seen(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            working.set()
            return function(*arguments)

        return call

    joined = connection.join("ann", 0)
    to: dict[str, Any] = {"run": joined.run, "epoch": joined.epoch, "client": "ann"}
    assignment = None if kind == "poll" else both_ask(connection)

    def start(name: str, parts: Iterable[Message]) -> Any:
        method = channel.stream_stream(f"/fedloom.v1.Federation/{name}", lambda part: part.SerializeToString(), None)
        return method(iter(parts), timeout=WAIT_S)

    if assignment is None:
        made.work = seen(made.work)  # type: ignore[method-assign]
        call = start("Work", [pb.WorkRequest(**to)])
    elif kind == "download":
        call = start("Fetch", [pb.FetchRequest(**to, digest=assignment.broadcast_digest)])
        next(call)
        working.set()
    else:
        made.check_header = seen(made.check_header)  # type: ignore[method-assign]
        schema = upload_schema(joined.schema, assignment)
        size = codec("fp32").encoded_size(schema)
        header = UpdateHeader("ann", assignment.round, schema.digest, "fp32", size, "0" * 64)

        def parts() -> Iterator[Message]:
            yield pb.SubmitRequest(header=header_to_wire(header, joined.run, joined.epoch))
            yield pb.SubmitRequest(data=bytes(CHUNK_BYTES))
            stop.wait(2 * WAIT_S)

        call = start("Submit", parts())
    assert working.wait(WAIT_S)
    return call


def narrow_channel(address: str, mine: Path) -> grpc.Channel:
    """A channel that lets little be sent ahead, so that a download that nobody reads stays under way."""
    pair = KeyPair.read(mine / MEMBER_FILE)
    credentials = grpc.ssl_channel_credentials((mine / CA_FILE).read_bytes(), pair.key_pem, pair.certificate_pem)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    return grpc.secure_channel(address, credentials, options=options)


def drained(call: Any) -> tuple[grpc.StatusCode, int]:
    """How a call ended, and how many bytes came."""
    size = 0
    try:
        for message in call:
            size += len(message)
    except grpc.RpcError:
        pass
    return call.code(), size


@pytest.mark.parametrize("kind", ["poll", "download", "upload"])
def test_a_revoked_member_is_put_out_of_what_it_is_in(
    kind: str,
    authority: Authority,
    made: Coordinator,
    both_ask: BothAsk,
    address: str,
    tmp_path: Path,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine, theirs = (enrolled(authority, each, tmp_path / each.name) for each in (ANN, BEN))
    stop = threading.Event()
    with narrow_channel(address, mine) as channel:
        call = begin(kind, made, both_ask, connect(mine), channel, stop)
        authority.identities.revoke("ann")
        for _ in range(int(WAIT_S / 0.05)):
            if "put out of a call" in caplog.text:
                break
            time.sleep(0.05)

        code, size = drained(call)

        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert size < 16 << 20, "half of the adapter"
        # The connection still stands, but nothing more is answered on it.
        again = channel.unary_unary("/fedloom.v1.Federation/Join", pb.JoinRequest.SerializeToString, None)
        with pytest.raises(grpc.RpcError) as caught:
            again(pb.JoinRequest(client="ann", protocol=1), timeout=WAIT_S)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        stop.set()
    connect(theirs).join("ben", 0)
    with pytest.raises(IdentityError, match="UNAUTHENTICATED"):
        connect(mine).join("ann", 0)


def test_a_call_does_not_outlast_its_certificate(
    short_lived: ShortLived, made: Coordinator, both_ask: BothAsk, address: str, tmp_path: Path, connect: Connect
) -> None:
    mine = short_lived(tmp_path / "ann", 5.0)
    with open_channel(address, mine) as channel:
        call = begin("poll", made, both_ask, connect(mine), channel, threading.Event())

        assert drained(call)[0] is grpc.StatusCode.UNAUTHENTICATED


def _noting(function: Callable[..., Any], ended: threading.Event) -> Callable[..., Any]:
    async def call(*arguments: Any) -> None:
        try:
            await function(*arguments)
        finally:
            ended.set()

    return call


def test_a_list_that_cannot_be_read_any_more_ends_the_server(
    authority: Authority, made: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = threading.Event()

    def version(self: Identities) -> int:
        if broken.is_set():
            raise StoreError("disk gone")
        return 0

    monkeypatch.setattr(Identities, "version", version)
    ended = threading.Event()

    def serve() -> None:
        with serving(made, certs=authority.folder):
            broken.set()
            ended.wait(WAIT_S)

    monkeypatch.setattr(serve_module, "_until_over", _noting(serve_module._until_over, ended))
    with pytest.raises(StoreError, match="disk gone"):
        serve()
    assert ended.is_set()


def test_an_operator_sees_and_stops_a_run_and_an_observer_only_sees(
    authority: Authority, made: Coordinator, both_ask: BothAsk, tmp_path: Path
) -> None:
    op = enrolled(authority, Identity(MemberRole.OPERATOR, "op"), tmp_path / "op")
    eye = enrolled(authority, Identity(MemberRole.OBSERVER, "eye"), tmp_path / "eye")
    mine = enrolled(authority, ANN, tmp_path / "ann")
    assert member(op) == Identity(MemberRole.OPERATOR, "op")
    with serving(made, certs=authority.folder) as address:
        with closing(GrpcConnection(address, mine)) as connection:
            both_ask(connection)

        for each in (op, eye):
            now = operator.status(address, each)
            assert (now.round, now.rounds, now.open, now.needed, now.epoch) == (0, 1, True, 2, made.epoch)
            assert (list(now.live), list(now.cohort)) == (["ann", "ben"], ["ann", "ben"])
        for each in (eye, mine):
            with pytest.raises(Forbidden):
                operator.stop(address, each)
        operator.status(address, op)

        operator.stop(address, op)

        def until_it_is_gone() -> None:
            for _ in range(200):
                operator.status(address, op)
                time.sleep(0.05)

        with pytest.raises(Unavailable):
            until_it_is_gone()


def test_nobody_operates_or_enrols_without_certificates(made: Coordinator) -> None:
    with serving(made, linger_s=0.0) as address, grpc.insecure_channel(address) as channel:
        for path in ("Operation/Status", "Operation/Stop", "Enrolment/Enroll"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/fedloom.v1.{path}", None, None)(b"", timeout=WAIT_S)
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
