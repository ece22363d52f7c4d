"""The process of a site's resident trainer: one socket, one message at a time, until nobody needs it any more."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fedloom.client.policy import Policy
from fedloom.client.session.send_times import Pace
from fedloom.core.errors import FedloomError
from fedloom.core.runtime.durable import make_folder
from fedloom.flower.messages import Reply, Request, from_head
from fedloom.flower.resident_trainer import Resident
from fedloom.flower.unix_socket import listening, receive, send, socket_path
from fedloom.proto.message_codec import to_json
from fedloom.proto.messages import REFUSED

__all__ = ["run", "serve"]

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_MESSAGE_S = 60.0
"""Longest pause within a message: its sender is on this machine and has all of it."""


def run(policy: Policy, idle_s: float, parent: int | None) -> bool:
    """Listen for the site's Flower processes until the supernode is gone or nobody has asked for a while.

    Args:
        policy: The site's policy.
        idle_s: Seconds without a message after which the process ends.
        parent: Process that this one ends with; None is for nobody.

    Returns:
        False when another process listens for this site already.

    Raises:
        ConfigError: The state folder's path is too long for a socket.
    """
    from fedloom.client.privacy.ledger.account import outbox_folder
    from fedloom.client.session.outbox import kept
    from fedloom.client.session.prepare import prepare

    path = socket_path(policy)
    make_folder(path.parent)
    with _alone(path.with_name("node.lock")) as first:
        if not first:
            return False
        outbox, name = outbox_folder(policy), policy.client.name
        resident = Resident(
            policy,
            lambda joined: prepare(
                policy, joined.spec, run=joined.run, owing=kept(outbox, joined.run, name) is not None
            ),
            outbox,
            Pace(),
        )
        with closing(listening(path)) as server, closing(resident):
            log.info("%s: listening at %s", name, path)
            serve(server, resident, idle_s, lambda: parent is not None and not _alive(parent))
        path.unlink(missing_ok=True)
    return True


def serve(server: socket.socket, resident: Resident, idle_s: float, ended: Callable[[], bool]) -> None:
    """Answer one message after the other, until none has come for `idle_s` seconds or `ended` says so."""
    server.settimeout(min(_LOOK_S, idle_s))
    last = time.monotonic()
    while not ended() and time.monotonic() - last < idle_s:
        try:
            line, _ = server.accept()
        except TimeoutError:
            continue
        with closing(line):
            line.settimeout(_MESSAGE_S)
            try:
                _answer(line, resident)
            except (OSError, FedloomError) as error:
                # Whoever asked is gone; what was made for it is kept and goes out with the next message.
                log.info("a message was not answered: %s", error)
        last = time.monotonic()


def _answer(line: socket.socket, resident: Resident) -> None:
    head, payload = receive(line)
    try:
        request = from_head(Request, head)
    except FedloomError as error:
        log.warning("a request is refused: %s", error)
        send(line, to_json(Reply("", refusal=REFUSED)), b"")
        return
    reply, update = resident.answer(request, payload)
    send(line, to_json(reply), update)


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether this process is the only one in the block; the system releases the lock of one that is killed."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
