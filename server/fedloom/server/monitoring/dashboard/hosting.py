"""The dashboard on a port: a thread and an event loop of its own, so that no visitor ever keeps a client waiting."""

import ipaddress
import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn

from fedloom.core.errors import ConfigError
from fedloom.core.security.address import host_of
from fedloom.server.monitoring.dashboard.access import Tokens
from fedloom.server.monitoring.dashboard.app import application
from fedloom.server.monitoring.dashboard.connections import Door, Limits, Visitor
from fedloom.server.monitoring.dashboard.runs import Board

__all__ = ["Hosted", "hosting"]

_STOP_S = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hosted:
    """Where the dashboard is."""

    url: str
    """Without a token."""
    open_to_observers: bool
    """Whoever can connect may look."""
    encrypted: bool


@contextmanager
def hosting(
    board: Board, listen: str, tokens: Tokens, *, pem: Path | None = None, limits: Limits | None = None
) -> Iterator[Hosted]:
    """Serve the dashboard for the length of a `with` block. What goes wrong in it later is logged and stops nobody.

    Args:
        board: What is shown.
        listen: HOST:PORT; port 0 takes a free one.
        tokens: Who shows one has its role. On a loopback address, others may look.
        pem: Key and certificates, for TLS.
        limits: How many may connect, and how long they may say nothing; None is the usual.

    Raises:
        ConfigError: The address cannot be bound, or the key or the certificate cannot be used.
    """
    host, port = host_of(listen), int(listen.rpartition(":")[2])
    is_open = _loopback(host)
    app = application(board, tokens, open_to_observers=is_open, encrypted=pem is not None)
    try:
        door = Door(limits or Limits(), None if pem is None else _secure(pem))
        # uvicorn calls it as it would the class that it asks for.
        visitor = cast("type[Any]", partial(Visitor, door))
        config = uvicorn.Config(
            app,
            http=visitor,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        config.load()
        bound = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"the dashboard cannot listen on {listen}: {error}; give another --dashboard") from error
    with bound:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=_run, args=(server, bound), name="fedloom-dashboard", daemon=True)
        thread.start()
        try:
            shown = f"[{host}]" if ":" in host else host
            scheme = "https" if pem else "http"
            yield Hosted(f"{scheme}://{shown}:{bound.getsockname()[1]}/", is_open, pem is not None)
        finally:
            server.should_exit = True
            thread.join(_STOP_S)


def _run(server: uvicorn.Server, bound: socket.socket) -> None:
    try:
        server.run([bound])
    except Exception:
        _log.exception("the dashboard has stopped; the run goes on without it")


def _secure(pem: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    return context


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
