"""A coordinator on a port: the server's options, its clock, and how it starts and stops."""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

from grpc import aio

from fedloom.proto.address import loopback_host
from fedloom.proto.errors import ConfigError
from fedloom.proto.failpoints import reach
from fedloom.proto.limits import HTTP2_FRAME_BYTES, MAX_MESSAGE_BYTES
from fedloom.server.coordinator import Coordinator
from fedloom.server.servicer import Servicer, handlers

__all__ = ["OPTIONS", "serve", "serving"]

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", HTTP2_FRAME_BYTES),
    # Otherwise a second coordinator binds the same port without a word and takes half of the clients.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A client behind a proxy that cuts idle connections may ping every 30 s; a dead one is found within 80 s.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
)
"""Channel options of the server. Compression stays off: payloads are dense, and it is a way in for bombs."""

_STOP_GRACE_S = 1.0
_log = logging.getLogger(__name__)


async def serve(coordinator: Coordinator, listen: str, *, ready: Callable[[str], None], linger_s: float = 10.0) -> None:
    """Serve until the run is over, SIGTERM or SIGINT comes, or the task is cancelled; then stop cleanly.

    Args:
        coordinator: What to serve.
        listen: HOST:PORT on the loopback interface; port 0 takes a free one.
        ready: Called once with the address that was bound.
        linger_s: Longest wait, once the run is over, for clients to fetch the final adapter or to leave.

    Raises:
        ConfigError: The address is not a loopback address, or cannot be bound.
        StoreError: The coordinator's state could not be read or written.
    """
    host = loopback_host(listen)
    servicer = Servicer(coordinator)
    server = aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((handlers(servicer),))
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        await servicer.close()
        raise ConfigError(f"cannot listen on {listen}: {error}; is another coordinator running there?") from error
    reach("serve.bound")
    await server.start()
    try:
        with _stop_signals() as stopped:
            reach("serve.ready")
            ready(f"{host}:{port}")
            await _until_over(coordinator, servicer, stopped, linger_s)
            reach("serve.over")
    finally:
        stopping = asyncio.ensure_future(_stop(server, servicer))
        while not stopping.done():
            with suppress(asyncio.CancelledError):  # it ends soon by itself, and must not be left half done
                await asyncio.shield(stopping)
        stopping.result()


async def _stop(server: aio.Server, servicer: Servicer) -> None:
    await server.stop(_STOP_GRACE_S)
    await servicer.close()
    if servicer.failed.done():
        servicer.failed.result()


@contextmanager
def serving(coordinator: Coordinator, listen: str = "127.0.0.1:0", *, linger_s: float = 10.0) -> Iterator[str]:
    """Serve from a background thread for the length of a `with` block, whose value is the address bound.

    Raises:
        ConfigError: See `serve`; raised on entry.
        StoreError: See `serve`; raised on exit.
    """
    bound: Future[_Bound] = Future()
    ended: Future[None] = Future()
    arguments = (coordinator, listen, linger_s, bound, ended)
    thread = threading.Thread(target=_run, args=arguments, name="fedloom-serve")
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


def _run(coordinator: Coordinator, listen: str, linger_s: float, bound: Future[_Bound], ended: Future[None]) -> None:
    """The background thread: its own event loop, and whatever goes wrong handed to the thread that waits."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(
            serve(coordinator, listen, ready=lambda address: bound.set_result((address, loop, task)), linger_s=linger_s)
        )
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
    pause_s = min(0.5, rounds.lease_s / 4, rounds.deadline_s / 4)
    stop = asyncio.ensure_future(stopped.wait())
    finished_s: float | None = None
    try:
        while True:
            await asyncio.wait((stop, servicer.failed), timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
            if servicer.failed.done():
                return
            if stop.done():
                _log.info("told to stop at round %d", coordinator.progress.round)
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
def _stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set; only the main thread may listen to signals."""
    stopped = asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    loop = asyncio.get_running_loop()
    for each in signals:
        loop.add_signal_handler(each, stopped.set)
    try:
        yield stopped
    finally:
        for each in signals:
            loop.remove_signal_handler(each)
