"""A coordinator on a port: the server's options, its clock, and how it starts and stops."""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
from grpc import aio

from fedloom.core.errors import ConfigError, StoreError
from fedloom.core.limits import HTTP2_FRAME_BYTES, MAX_CLIENTS, MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from fedloom.core.runtime.failpoints import reach
from fedloom.core.security.address import host_of, loopback_host
from fedloom.proto.v1 import federation_pb2_grpc as rpc
from fedloom.server.auth.ca import Authority
from fedloom.server.auth.certificates import Identities
from fedloom.server.auth.gate import Gate
from fedloom.server.auth.tls import server_credentials
from fedloom.server.coordinator import Coordinator
from fedloom.server.monitoring.status import Observation
from fedloom.server.rpc.admin import Operation
from fedloom.server.rpc.enrollment import Enrolment
from fedloom.server.rpc.servicer import Servicer, handlers
from fedloom.server.storage.audit_log import Audit

__all__ = ["OPTIONS", "serve", "serving"]

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", HTTP2_FRAME_BYTES),
    ("grpc.http2.lookahead_bytes", 1 << 20),
    # Otherwise a second coordinator binds the same port without a word and takes half of the clients.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 16),
    # All clients ask for work at the same moment when a round closes; from 1,000 on gRPC would drop some at random.
    ("grpc.server.max_pending_requests", MAX_CLIENTS + 2_000),
    ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_CLIENTS),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A client behind a proxy that cuts idle connections pings every 8 s; a dead one is found within 80 s.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # Certificates are checked by TLS when a connection begins only, so none lasts for ever; a call that is under way
    # may last as long as a transfer may.
    ("grpc.max_connection_age_ms", 20 * 60_000),
    ("grpc.max_connection_age_grace_ms", 11 * 60_000),
)
"""Channel options of the server. Compression stays off: payloads are dense, and it is a way in for bombs."""

_STOP_GRACE_S = 1.0
_log = logging.getLogger(__name__)


async def serve(
    coordinator: Coordinator,
    listen: str,
    *,
    ready: Callable[[str], None],
    certs: Path | None = None,
    linger_s: float = 10.0,
    observation: Observation | None = None,
) -> None:
    """Serve until the run is over, somebody says stop, or the task is cancelled; then stop cleanly.

    SIGTERM and SIGINT say stop, and so may an operator.

    Args:
        coordinator: What to serve.
        listen: HOST:PORT; port 0 takes a free one.
        ready: Called once with the address that was bound.
        certs: Folder of certificates, see `authority`: then every connection is TLS with certificates on both sides.
            None serves whoever can connect, without encryption, and therefore on the loopback interface only; nobody
            can enrol or operate there.
        linger_s: Longest wait, once the run is over, for clients to fetch the final adapter or to leave.
        observation: Told of every call, and given the means to stop the server.

    Raises:
        ConfigError: There are no certificates and the address is not a loopback address, or it cannot be bound.
        IdentityError: The certificates cannot be read.
        StoreError: The coordinator's state or the list of certificates could not be read or written.
    """
    (loopback_host if certs is None else host_of)(listen)
    stopped = asyncio.Event()
    with ExitStack() as stack:
        secure = None if certs is None else stack.enter_context(_secured(certs, coordinator.audit))
        servicer = Servicer(coordinator, secure.gate if secure else Gate(None, coordinator.audit.note))
        servicer.gate.say = lambda line: coordinator.say(line)
        if observation is not None:
            servicer.gate.answered = observation.answered
            observation.stop = partial(_stop_soon, asyncio.get_running_loop(), stopped)
            stack.callback(setattr, observation, "stop", None)
        server = aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((handlers(servicer),))
        if secure is not None:
            rpc.add_EnrolmentServicer_to_server(Enrolment(secure.authority, secure.gate, servicer.failed), server)
            operation = Operation(coordinator, secure.gate, servicer.failed, stopped.set)
            rpc.add_OperationServicer_to_server(operation, server)
        try:
            port = server.add_secure_port(listen, secure.credentials) if secure else server.add_insecure_port(listen)
        except RuntimeError as error:
            await servicer.close()
            raise ConfigError(f"cannot listen on {listen}: {error}; is another coordinator running there?") from error
        reach("serve.bound")
        await server.start()
        watching = asyncio.ensure_future(_watch(servicer))
        try:
            with _stop_signals(stopped):
                reach("serve.ready")
                ready(f"{listen.rpartition(':')[0]}:{port}")
                await _until_over(coordinator, servicer, stopped, linger_s)
                reach("serve.over")
        finally:
            watching.cancel()
            stopping = asyncio.ensure_future(_stop(server, servicer, coordinator))
            while not stopping.done():
                with suppress(asyncio.CancelledError):  # it ends soon by itself, and must not be left half done
                    await asyncio.shield(stopping)
            stopping.result()


def _stop_soon(loop: asyncio.AbstractEventLoop, stopped: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop has closed, so the server has stopped
        loop.call_soon_threadsafe(stopped.set)


@dataclass(frozen=True)
class _Secured:
    authority: Authority
    gate: Gate
    credentials: grpc.ServerCredentials


@contextmanager
def _secured(certs: Path, audit: Audit) -> Iterator[_Secured]:
    """What a server with certificates is made of."""
    authority = Authority(certs)
    try:
        # A list of its own for the gate: what enrolment writes is then seen as written by another.
        listed = Identities(certs)
        try:
            yield _Secured(authority, Gate(listed, audit.note), server_credentials(certs))
        finally:
            listed.close()
    finally:
        authority.close()


async def _watch(servicer: Servicer) -> None:
    """Put out who is revoked; if that cannot be known any more, end the server."""
    try:
        await servicer.gate.watch()
    except StoreError as error:
        if not servicer.failed.done():
            servicer.failed.set_exception(error)


async def _stop(server: aio.Server, servicer: Servicer, coordinator: Coordinator) -> None:
    await server.stop(_STOP_GRACE_S)
    await servicer.close()
    if servicer.failed.done():
        servicer.failed.result()
    coordinator.close()


@contextmanager
def serving(
    coordinator: Coordinator,
    listen: str = "127.0.0.1:0",
    *,
    certs: Path | None = None,
    linger_s: float = 10.0,
    observation: Observation | None = None,
) -> Iterator[str]:
    """Serve from a background thread for the length of a `with` block, whose value is the address bound.

    Raises:
        ConfigError: See `serve`; raised on entry.
        IdentityError: See `serve`; raised on entry.
        StoreError: See `serve`; raised on exit.
    """
    bound: Future[_Bound] = Future()
    ended: Future[None] = Future()

    def make(ready: Callable[[str], None]) -> Coroutine[None, None, None]:
        return serve(coordinator, listen, ready=ready, certs=certs, linger_s=linger_s, observation=observation)

    thread = threading.Thread(target=_run, args=(make, bound, ended), name="fedloom-serve")
    thread.start()
    try:
        address, loop, task = bound.result()
        try:
            yield address
        finally:
            with suppress(RuntimeError):  # the run was over and the loop has closed by itself
                loop.call_soon_threadsafe(task.cancel)
    finally:
        thread.join()
    ended.result()


_Bound = tuple[str, asyncio.AbstractEventLoop, "asyncio.Task[None]"]


def _run(
    make: Callable[[Callable[[str], None]], Coroutine[None, None, None]], bound: Future[_Bound], ended: Future[None]
) -> None:
    """The background thread: its own event loop, and whatever goes wrong handed to the thread that waits."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(make(lambda address: bound.set_result((address, loop, task))))
        await task

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        ended.set_result(None)
    except Exception as error:
        (ended if bound.done() else bound).set_exception(error)
    else:
        ended.set_result(None)


async def _until_over(coordinator: Coordinator, servicer: Servicer, stopped: asyncio.Event, linger_s: float) -> None:
    """Tick until the run is over and its clients are served, or somebody says stop."""
    rounds, loop = coordinator.config.rounds, asyncio.get_running_loop()
    if coordinator.config.federated_evaluation.enabled:
        linger_s = max(linger_s, rounds.deadline_s)  # clients score the result before they leave
    pause_s = min(0.5, rounds.lease_s / 4, rounds.deadline_s / 4)
    stop = asyncio.ensure_future(stopped.wait())
    finished_s: float | None = None
    try:
        while True:
            await asyncio.wait((stop, servicer.failed), timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
            if servicer.failed.done():
                return
            if stop.done():
                _log.info("told to stop after %d rounds", coordinator.progress.round)
                return
            reach("serve.tick")
            await servicer.call(coordinator.tick)
            if coordinator.finished:
                finished_s = loop.time() if finished_s is None else finished_s
                if coordinator.over or loop.time() - finished_s >= linger_s:
                    return
    finally:
        stop.cancel()


@contextmanager
def _stop_signals(stopped: asyncio.Event) -> Iterator[None]:
    """Let SIGTERM and SIGINT set an event; only the main thread may listen to signals."""
    signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    loop = asyncio.get_running_loop()
    for each in signals:
        loop.add_signal_handler(each, stopped.set)
    try:
        yield
    finally:
        for each in signals:
            loop.remove_signal_handler(each)
