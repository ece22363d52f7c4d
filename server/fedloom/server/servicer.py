"""The gRPC face of the coordinator: it translates, and decides nothing."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial, wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from fedloom.proto.errors import ProtocolError, StoreError
from fedloom.proto.failpoints import failpoint, reach
from fedloom.proto.frames import CHUNK_FIELD, DATA_FIELD, SERVICE, frames, unframed
from fedloom.proto.limits import LONG_POLL_S
from fedloom.proto.messages import Wait
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as pb_grpc
from fedloom.proto.wire import (
    STATUS,
    answer_to_wire,
    header_from_wire,
    joined_to_wire,
    result_to_wire,
    step_from_wire,
)
from fedloom.server.coordinator import Coordinator

__all__ = ["INTERNAL", "Servicer", "handlers", "status_of"]

INTERNAL = "internal error; see the coordinator's log"
"""All that a peer learns of an error that is not about its own message."""

_THREADS = 8
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


def _guarded(
    handler: Callable[["Servicer", Q, Context], Coroutine[None, None, R]],
) -> Callable[["Servicer", Q, Context], Coroutine[None, None, R]]:
    """The edge of the process: gRPC would send the text of any exception to the peer, so none gets past here."""

    @wraps(handler)
    async def guarded(servicer: "Servicer", request: Q, context: Context) -> R:
        try:
            return await handler(servicer, request, context)
        except Exception as error:
            code, text = status_of(error)
            if isinstance(error, StoreError) and not servicer.failed.done():
                servicer.failed.set_exception(error)
            if code is grpc.StatusCode.INTERNAL:
                _log.error("%s failed", handler.__name__, exc_info=error)
            else:
                _log.info("%s refused: %s", handler.__name__, error)
            await context.abort(code, text)

    return guarded


class Servicer(pb_grpc.FederationServicer):
    """Carries messages between sockets and a coordinator. Make it inside the event loop that will serve it.

    Args:
        coordinator: What is served; its `wake` hook is taken over.

    Attributes:
        failed: Done, with the error, as soon as the coordinator cannot read or write its state: then it must
            be stopped, for it can answer nobody any more.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="coordinator")
        self._stirred = asyncio.Event()
        self.failed: asyncio.Future[NoReturn] = self._loop.create_future()
        # A poller that died must be noticed before its lease ends, so a waiting poll renews it this often.
        self._renew_s = min(LONG_POLL_S, coordinator.config.rounds.lease_s / 3)
        coordinator.wake = self._wake

    async def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a coordinator call in a thread of the servicer's own, so that no disk or sum stalls the loop."""
        return await self._loop.run_in_executor(self._threads, partial(function, *args, **kwargs))

    async def close(self) -> None:
        """Stop waking anybody, and wait for the calls under way. Call it once the server has stopped."""
        self._coordinator.wake = _nothing
        await asyncio.to_thread(self._threads.shutdown)

    @_guarded
    @failpoint("rpc.join")
    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinReply:
        """See federation.proto."""
        joined = await self.call(self._coordinator.join, request.client, request.protocol, request.declared_examples)
        return joined_to_wire(joined)

    @_guarded
    @failpoint("rpc.work")
    async def Work(self, request: pb.WorkRequest, context: Context) -> pb.WorkReply:
        """See federation.proto."""
        work, asked = self._coordinator.work, (request.client, request.run, request.epoch)
        return answer_to_wire(await self._polled(partial(work, *asked), lambda answer: isinstance(answer, Wait)))

    @_guarded
    async def Exchange(self, request: pb.ExchangeRequest, context: Context) -> pb.ExchangeReply:
        """See federation.proto."""
        exchange, message = self._coordinator.exchange, step_from_wire(request)
        call = partial(exchange, message, request.client, request.run, request.epoch)
        return result_to_wire(await self._polled(call, lambda result: result is None))

    @_guarded
    @failpoint("rpc.fetch")
    async def Fetch(  # type: ignore[override]  # the stubs know only generators, not `context.write`
        self, request: pb.FetchRequest, context: Context
    ) -> None:
        """See federation.proto."""
        client, digest, offset = request.client, request.digest, request.offset
        payload = await self.call(self._coordinator.blob, client, digest, request.run, request.epoch, offset)
        for frame in frames(CHUNK_FIELD, payload, offset):
            reach("rpc.fetch.chunk")
            await context.write(frame)

    @_guarded
    @failpoint("rpc.submit")
    async def Submit(  # type: ignore[override]  # messages come as they are on the wire, see `handlers`
        self, requests: AsyncIterator[bytes], context: Context
    ) -> pb.SubmitReply:
        """See federation.proto."""
        stream = aiter(requests)
        header, run, epoch = header_from_wire(_header(await anext(stream, b"")))
        size_bytes = await self.call(self._coordinator.check_header, header, run, epoch)
        if size_bytes is None:
            return pb.SubmitReply(duplicate=True)
        payload = await _read(stream, size_bytes)
        reach("rpc.submit.read")
        duplicate = await self.call(self._coordinator.submit, header, payload, run, epoch)
        reach("rpc.submit.taken")
        return pb.SubmitReply(duplicate=duplicate)

    @_guarded
    @failpoint("rpc.heartbeat")
    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatReply:
        """See federation.proto."""
        call = self._coordinator.heartbeat
        number, is_open = await self.call(call, request.client, request.run, request.epoch)
        return pb.HeartbeatReply(round=number, open=is_open)

    @_guarded
    @failpoint("rpc.leave")
    async def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveReply:
        """See federation.proto."""
        call = self._coordinator.leave
        await self.call(call, request.client, request.reason, request.run, request.epoch)
        return pb.LeaveReply()

    async def _polled(self, call: Callable[[], T], waits: Callable[[T], bool]) -> T:
        """The first answer with which the caller need not wait, or whatever there is at the end of a long poll."""
        end_s = self._loop.time() + LONG_POLL_S
        while True:
            stirred = self._stirred  # taken before asking: what happens after the answer wakes this very event
            answer = await self.call(call)
            left_s = end_s - self._loop.time()
            if not waits(answer) or left_s <= 0:
                return answer
            with suppress(TimeoutError):
                await asyncio.wait_for(stirred.wait(), min(left_s, self._renew_s))

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._stir)

    def _stir(self) -> None:
        self._stirred.set()
        self._stirred = asyncio.Event()


def handlers(servicer: Servicer) -> "grpc.GenericRpcHandler[Any, Any]":
    """The service's methods as protobuf would generate them, but for payloads, which `frames` reads and writes."""
    methods = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name), request_deserializer=ask.FromString, response_serializer=reply.SerializeToString
        )
        for name, (ask, reply) in _UNARY.items()
    }
    methods["Fetch"] = grpc.unary_stream_rpc_method_handler(
        servicer.Fetch, request_deserializer=pb.FetchRequest.FromString
    )
    methods["Submit"] = grpc.stream_unary_rpc_method_handler(
        servicer.Submit, response_serializer=pb.SubmitReply.SerializeToString
    )
    return grpc.method_handlers_generic_handler(SERVICE, methods)


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


async def _read(stream: AsyncIterator[bytes], size_bytes: int) -> bytes:
    """Exactly `size_bytes` of payload; a byte too many is refused as soon as it is seen.

    Raises:
        ProtocolError: More or less follows, or something that is not payload.
    """
    parts: list[memoryview] = []
    have = 0
    async for message in stream:
        parts.append(unframed(DATA_FIELD, message))
        have += len(parts[-1])
        if have > size_bytes:
            raise ProtocolError(f"at least {have} bytes of payload came; the header announced {size_bytes}")
    if have < size_bytes:
        raise ProtocolError(f"the payload ended after {have} bytes; the header announced {size_bytes}")
    return b"".join(parts)


def _nothing() -> None:
    return None
