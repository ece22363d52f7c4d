"""The gRPC face of the coordinator: it translates, and decides nothing."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from typing import Any, NoReturn, ParamSpec, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from fedloom.core.errors import Overloaded, ProtocolError, StoreError, StrategyError
from fedloom.core.limits import LONG_POLL_S
from fedloom.core.runtime.failpoints import failpoint, reach
from fedloom.proto.frames import SERVICE
from fedloom.proto.messages import StepMessage, UpdateHeader, Wait
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as pb_grpc
from fedloom.proto.wire import RETRY_AFTER, STATUS, answer_to_wire, from_wire, header_from_wire, result_to_wire, to_wire
from fedloom.server.auth.gate import Gate
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.load_shedding import Clients, Lane
from fedloom.server.rpc.long_poll import Polls
from fedloom.server.rpc.streams import Sender, paced, received
from fedloom.server.rpc.uploads import Upload, Uploads

__all__ = ["INTERNAL", "Guarded", "Servicer", "guarded", "handlers", "status_of"]

INTERNAL = "internal error; see the coordinator's log"
"""All that a peer learns of an error that is not about its own message."""

_THREADS = 4
_WAITING = {"call": 1024, "update": 64}
_UNARY: dict[str, tuple[Any, Any]] = {
    "Join": (pb.JoinRequest, pb.JoinReply),
    "Work": (pb.WorkRequest, pb.WorkReply),
    "Exchange": (pb.ExchangeRequest, pb.ExchangeReply),
    "Heartbeat": (pb.HeartbeatRequest, pb.HeartbeatReply),
    "Leave": (pb.LeaveRequest, pb.LeaveReply),
}
_log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Q = TypeVar("Q")
R = TypeVar("R")
Context = aio.ServicerContext[Any, Any]


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status and the text a peer gets for an error; the text of an unexpected one stays here.

    >>> status_of(ProtocolError("round 3 is over"))
    (<StatusCode.FAILED_PRECONDITION: (9, 'failed precondition')>, 'round 3 is over')
    >>> status_of(ValueError("/secret/path"))[1]
    "internal error; see the coordinator's log"
    """
    for kind in type(error).__mro__:
        if kind in STATUS:
            status = grpc.StatusCode[STATUS[kind]]
            return status, INTERNAL if status is grpc.StatusCode.INTERNAL else str(error)
    return grpc.StatusCode.INTERNAL, INTERNAL


class Guarded(Protocol):
    """What serves calls: it has a gate, and a way to say that it can serve no more."""

    gate: Gate
    failed: "asyncio.Future[NoReturn]"


S = TypeVar("S", bound=Guarded)


def guarded(
    handler: Callable[[S, Q, Context], Coroutine[None, None, R]],
) -> Callable[[S, Q, Context], Coroutine[None, None, R]]:
    """The edge of the process: nobody gets in here but through the gate, and no text of an exception gets out.

    Every handler is wrapped in this. gRPC by itself would let everybody in, and send a peer the text of any exception.
    """

    @wraps(handler)
    async def safe(servicer: S, request: Q, context: Context) -> R:
        began_s, code, kind = time.perf_counter(), grpc.StatusCode.CANCELLED, ""
        try:
            with servicer.gate.admitted(handler.__name__, context):
                if request is None:
                    raise ProtocolError("the message cannot be read; send what federation.proto describes")
                if (name := getattr(request, "client", None)) is not None:
                    servicer.gate.check_name(name)
                reply = await handler(servicer, request, context)
            code = grpc.StatusCode.OK
            return reply
        except Exception as error:
            (code, text), kind = status_of(error), type(error).__name__
            if isinstance(error, StoreError | StrategyError) and not servicer.failed.done():
                servicer.failed.set_exception(error)
            if code is grpc.StatusCode.INTERNAL:
                _log.error("%s failed", handler.__name__, exc_info=error)
            else:
                _log.info("%s refused: %s", handler.__name__, error)
            retry_s = error.retry_after_s if isinstance(error, Overloaded) else None
            await context.abort(code, text, () if retry_s is None else ((RETRY_AFTER, str(round(1e3 * retry_s))),))
        finally:
            servicer.gate.answered(handler.__name__, code.name, kind, time.perf_counter() - began_s)

    return safe


class Servicer(pb_grpc.FederationServicer):
    """Carries messages between sockets and a coordinator. Make it inside the event loop that will serve it.

    Args:
        coordinator: What is served; its hooks `wake` and `run_commit` are taken over.
        gate: Lets calls in.

    Attributes:
        failed: Done, with the error, as soon as the coordinator cannot read or write its state: then it must
            be stopped, for it can answer nobody any more.
    """

    def __init__(self, coordinator: Coordinator, gate: Gate) -> None:
        self.gate = gate
        self._coordinator = coordinator
        self._loop = asyncio.get_running_loop()
        # Updates take long, and must not keep a heartbeat waiting.
        self._calls, self._updates = (Lane(name, _THREADS, waiting) for name, waiting in _WAITING.items())
        self._clients, self._sender = Clients(), Sender()
        self._uploads = Uploads(coordinator.folder / "uploads")
        self.failed: asyncio.Future[NoReturn] = self._loop.create_future()
        # A poller that died must be noticed before its lease ends, so waiting polls renew theirs this often.
        renew_s = min(LONG_POLL_S, coordinator.config.rounds.lease_s / 3)
        self._polls = Polls(self._calls, coordinator.heartbeat, renew_s)
        self._committing = ThreadPoolExecutor(1, thread_name_prefix="commit")
        coordinator.wake, coordinator.run_commit = self._wake, self._commit

    async def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call of the coordinator's own, which is never refused, off the loop."""
        return await self._calls.run(partial(function, *args, **kwargs), always=True)

    async def _surely(self, function: Callable[P, None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """The same, to the end: when a line breaks, gRPC may cancel a handler while it is cleaning up already."""
        await asyncio.shield(self.call(function, *args, **kwargs))

    async def close(self) -> None:
        """Stop waking anybody, and wait for the calls under way. Call it once the server has stopped."""
        self._coordinator.wake, self._coordinator.run_commit = _nothing, _at_once
        self._polls.close()
        for lane in (self._calls, self._updates):
            await asyncio.to_thread(lane.close)
        await asyncio.to_thread(self._committing.shutdown)
        if self._coordinator.finished:
            await asyncio.to_thread(self._uploads.clear)

    @guarded
    @failpoint("rpc.join")
    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinReply:
        """See federation.proto."""
        asked = request.client, request.protocol, request.declared_examples
        with self._clients.call(request.client):
            return to_wire(pb.JoinReply, await self._calls.run(partial(self._coordinator.join, *asked)))

    @guarded
    @failpoint("rpc.work")
    async def Work(self, request: pb.WorkRequest, context: Context) -> pb.WorkReply:
        """See federation.proto."""
        asked = request.client, request.run, request.epoch
        work = partial(self._coordinator.work, *asked, request.held)
        with self._clients.call(request.client):
            return answer_to_wire(await self._polls.poll(asked, work, lambda answer: isinstance(answer, Wait), Wait))

    @guarded
    async def Exchange(self, request: pb.ExchangeRequest, context: Context) -> pb.ExchangeReply:
        """See federation.proto."""
        asked = request.client, request.run, request.epoch
        exchange = partial(self._coordinator.exchange, from_wire(StepMessage, request), *asked)
        with self._clients.call(request.client):
            return result_to_wire(await self._polls.poll(asked, exchange, lambda result: result is None))

    @guarded
    @failpoint("rpc.fetch")
    async def Fetch(  # type: ignore[override]  # the stubs know only generators, not `context.write`
        self, request: pb.FetchRequest, context: Context
    ) -> None:
        """See federation.proto."""
        client, digest, offset = request.client, request.digest, request.offset
        asked = client, digest, request.run, request.epoch, offset
        with self._clients.call(client):
            payload = await self._calls.run(partial(self._coordinator.blob, *asked))
            await self._sender.send(context.write, payload, offset)

    @guarded
    @failpoint("rpc.submit")
    async def Submit(  # type: ignore[override]  # messages come as they are on the wire, see `handlers`
        self, requests: AsyncIterator[bytes], context: Context
    ) -> pb.SubmitReply:
        """See federation.proto."""
        stream = aiter(requests)
        async with paced():
            first = _header(await anext(stream, b""))
        header, run, epoch = header_from_wire(first)
        self.gate.check_name(header.client)
        with self._clients.call(header.client):
            size_bytes = await self._calls.run(partial(self._coordinator.check_header, header, run, epoch))
            if size_bytes is None:
                return pb.SubmitReply(duplicate=True)
            upload, turn = await self.call(self._uploads.take, header, size_bytes, first.offset)
            missing_bytes = size_bytes - upload.received
            if first.offset != upload.received:
                return pb.SubmitReply(missing_bytes=missing_bytes)
            await self._receive(stream, upload, turn)
            reach("rpc.submit.read")
            reply = await self._accept(header, run, epoch, upload, turn)
            reach("rpc.submit.taken")
            return reply

    @guarded
    @failpoint("rpc.heartbeat")
    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatReply:
        """See federation.proto."""
        asked = request.client, request.run, request.epoch
        with self._clients.call(request.client):
            return to_wire(pb.HeartbeatReply, await self._calls.run(partial(self._coordinator.heartbeat, *asked)))

    @guarded
    @failpoint("rpc.leave")
    async def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveReply:
        """See federation.proto."""
        asked = request.client, request.reason, request.run, request.epoch, tuple(request.score)
        with self._clients.call(request.client):
            await self._calls.run(partial(self._coordinator.leave, *asked))
        return pb.LeaveReply()

    async def _receive(self, stream: AsyncIterator[bytes], upload: Upload, turn: int) -> None:
        """Read what is missing of an upload; if the call breaks, what has come is kept for the next one."""

        async def keep(data: memoryview) -> None:
            if self._uploads.fits(upload, len(data)):
                self._uploads.add(upload, turn, data)
            else:
                await self.call(self._uploads.add, upload, turn, data)
            moved(len(data))

        try:
            async with paced() as moved:
                await received(stream, upload.size_bytes - upload.received, keep)
        except BaseException:
            await self._surely(self._uploads.park, upload, turn)
            raise

    async def _accept(self, header: UpdateHeader, run: str, epoch: int, upload: Upload, turn: int) -> pb.SubmitReply:
        """Hand a whole upload to the coordinator. Only one that is refused for now is kept."""

        def submit() -> bool:
            return self._coordinator.submit(header, self._uploads.payload(upload, turn), run, epoch)

        try:
            duplicate = await self._updates.run(submit)
        except (Overloaded, asyncio.CancelledError):
            await self._surely(self._uploads.park, upload, turn)
            raise
        except BaseException:
            await self._surely(self._uploads.drop, header.client)
            raise
        await self._surely(self._uploads.drop, header.client)
        return pb.SubmitReply(duplicate=duplicate)

    def _commit(self, commit: Callable[[], None]) -> None:
        """Commit a round in a thread of its own; whatever that fails with ends the server."""

        def fail(error: BaseException) -> None:
            if not self.failed.done():
                self.failed.set_exception(error)

        def surely() -> None:
            try:
                commit()
            except BaseException as error:
                _log.error("a round could not be committed", exc_info=error)
                self._loop.call_soon_threadsafe(fail, error)

        self._committing.submit(surely)

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._polls.stir)


def handlers(servicer: Servicer) -> "grpc.GenericRpcHandler[Any, Any]":
    """The service's methods as protobuf would generate them, but for payloads, which `frames` reads and writes."""
    methods = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name), request_deserializer=_reader(ask), response_serializer=reply.SerializeToString
        )
        for name, (ask, reply) in _UNARY.items()
    }
    methods["Fetch"] = grpc.unary_stream_rpc_method_handler(
        servicer.Fetch, request_deserializer=_reader(pb.FetchRequest)
    )
    methods["Submit"] = grpc.stream_unary_rpc_method_handler(
        servicer.Submit, response_serializer=pb.SubmitReply.SerializeToString
    )
    return grpc.method_handlers_generic_handler(SERVICE, methods)


def _reader(kind: Any) -> Callable[[bytes], Any]:
    """A message of this kind; None for bytes that are none, of which gRPC would tell the peer in its own words."""

    def read(message: bytes) -> Any:
        try:
            return kind.FromString(message)
        except DecodeError:
            return None

    return read


def _header(message: bytes) -> pb.UpdateHeader:
    """The header that an upload starts with.

    Raises:
        ProtocolError: Something else comes first.
    """
    try:
        first = pb.SubmitRequest.FromString(message)
    except DecodeError as error:
        raise ProtocolError("an update's first message cannot be read; send its header first") from error
    if first.WhichOneof("part") != "header":
        raise ProtocolError("an update starts with its header; send that first, then the payload")
    return first.header


def _nothing() -> None:
    return None


def _at_once(commit: Callable[[], None]) -> None:
    commit()
