"""The gRPC face for who runs a coordinator: how the run stands, and stop. It translates, and decides nothing."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NoReturn

from grpc import aio

from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as pb_grpc
from fedloom.server.auth.gate import Gate
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.servicer import guarded

__all__ = ["Operation"]

_log = logging.getLogger(__name__)


class Operation(pb_grpc.OperationServicer):
    """Answers operators and observers.

    Args:
        coordinator: What is asked about.
        gate: Lets calls in.
        failed: Gets the error when the coordinator cannot read its state any more.
        stop: Called, in the event loop, to stop the server as SIGTERM does.
    """

    def __init__(
        self, coordinator: Coordinator, gate: Gate, failed: "asyncio.Future[NoReturn]", stop: Callable[[], None]
    ) -> None:
        self.gate, self.failed = gate, failed
        self._coordinator = coordinator
        self._stop = stop

    @guarded
    async def Status(self, request: pb.StatusRequest, context: "aio.ServicerContext[Any, Any]") -> pb.StatusReply:
        """See federation.proto."""
        now = await asyncio.to_thread(lambda: self._coordinator.progress)
        return pb.StatusReply(
            run=now.run,
            epoch=self._coordinator.epoch,
            round=now.round,
            rounds=now.rounds,
            open=now.open,
            elapsed_s=now.elapsed_s,
            needed=now.needed,
            short=now.short,
            live=now.live,
            cohort=now.cohort,
            submitted=now.submitted,
            lost=now.lost,
            waiting=now.waiting,
            waiting_s=now.waiting_s,
            refusing=now.refusing,
            over=now.over,
        )

    @guarded
    async def Finish(self, request: pb.FinishRequest, context: "aio.ServicerContext[Any, Any]") -> pb.FinishReply:
        """See federation.proto."""
        caller = self.gate.caller()
        await asyncio.to_thread(self._coordinator.finish)
        _log.warning("told to finish by %s", caller.who)
        self.gate.note("stopped", caller.identity.name if caller.identity else "", f"run finished by {caller.who}")
        return pb.FinishReply()

    @guarded
    async def Stop(self, request: pb.StopRequest, context: "aio.ServicerContext[Any, Any]") -> pb.StopReply:
        """See federation.proto."""
        caller = self.gate.caller()
        _log.warning("told to stop by %s", caller.who)
        self.gate.note("stopped", caller.identity.name if caller.identity else "", f"by {caller.who}")
        self._stop()
        return pb.StopReply()
