"""Signs of life while a client works, and what it hears in return."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedloom.client.session.api import RoundContext
from fedloom.core.errors import FedloomError, IdentityError

if TYPE_CHECKING:
    from fedloom.client.transport.grpc import Connection

__all__ = ["USUAL", "Timing", "heartbeats"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """How long a participant waits, in seconds.

    Attributes:
        heartbeat_s: Between two signs of life while work holds it.
        backoff_s: Bound of the random wait before the first new attempt to reach the coordinator, which doubles with
            every attempt, and the largest that it comes to.
        rest_s: Longest sleep outside the site's hours: the clock may be set meanwhile.
    """

    heartbeat_s: float = 5.0
    backoff_s: tuple[float, float] = (0.25, 5.0)
    rest_s: float = 60.0


USUAL = Timing()


@contextmanager
def heartbeats(
    connection: "Connection", busy: threading.Event, task: Callable[[], RoundContext | None], every_s: float
) -> Iterator[None]:
    """Keep the lease alive from a thread of its own whenever work holds this one, and hear if it is for nothing.

    Args:
        connection: Line to the coordinator.
        busy: Set while work holds the thread that makes calls.
        task: The round that is being trained, which is told what is heard.
        every_s: Seconds between two heartbeats.
    """
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(every_s):
            if not busy.is_set():
                continue
            current = task()  # before the call: what it answers is not about a later one
            try:
                standing = connection.heartbeat()
                if current is not None:
                    current.hear(standing)
            except IdentityError as error:
                log.info("heartbeat: %s", error)
                if current is not None:
                    current.refuse(str(error))
            except FedloomError as error:
                log.info("heartbeat: %s", error)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
