"""The coordinator's rounds over the nodes of another framework: who is there, what each is asked, what it answers.

Every decision is the coordinator's own, as over gRPC: cohorts, deadlines, checks, the fold in the order of client names
and the log. This loop only makes for each node the calls that a client would make.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from fedloom.core.errors import ConfigError, FedloomError, ProtocolError, StoreError, StrategyError
from fedloom.core.text import clean
from fedloom.flower.messages import Reply, Request, from_head
from fedloom.proto.message_codec import to_json
from fedloom.proto.messages import Assignment, Joined
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.local import LocalConnection

__all__ = ["Answered", "Nodes", "coordinate"]

log = logging.getLogger(__name__)

_PAUSE_S = 0.2
_END_S = 60.0
_MOST_TRIES = 3
"""How often a site may fail at one message, or its update be refused, before it is left alone."""


@dataclass(frozen=True)
class Answered:
    """What came back for a message."""

    message: str
    head: bytes
    payload: bytes
    error: str = ""
    """What the framework says when it could not deliver; there is no head then."""


class Nodes(Protocol):
    """The nodes of another framework."""

    def online(self) -> Collection[int]:
        """Nodes that can be asked now."""

    def ask(self, node: int, head: bytes, payload: bytes, *, work: bool) -> str:
        """Send a request to one node; the message's name."""

    def answers(self, messages: Collection[str]) -> Iterable[Answered]:
        """The answers that have come to these messages; each comes once."""


class _Site:
    """One node and what is under way there."""

    def __init__(self, node: int) -> None:
        self.node = node
        self.client = self.held = ""
        self.line: LocalConnection | None = None
        self.message: str | None = None
        self.tries = 0
        self.dismissed = False
        self.behind: _Site | None = None
        self._asked: tuple[Request, bytes] | None = None

    def ask(self, nodes: Nodes, request: Request, payload: bytes = b"") -> None:
        """Send a request; another one than before begins to count its failures anew."""
        if self._asked is None or self._asked[0] != request:
            self.tries = 0
        self._asked = request, payload
        self.message = nodes.ask(self.node, to_json(request), payload, work=request.assignment is not None)


def coordinate(
    coordinator: Coordinator,
    joined: Joined,
    nodes: Nodes,
    *,
    pause: Callable[[], None] = lambda: time.sleep(_PAUSE_S),
) -> None:
    """Run the rounds to the end.

    Args:
        coordinator: Open on its state; a run that was begun goes on.
        joined: What every client is told about the run.
        nodes: The other framework's nodes.
        pause: Waits between two looks.

    Raises:
        StoreError: The state cannot be written.
        StrategyError: The strategy fails.
    """
    sites: dict[int, _Site] = {}
    while not coordinator.finished:
        coordinator.tick()
        _follow(sites, nodes.online())
        asked = {site.message: site for site in sites.values() if site.message is not None}
        for answered in nodes.answers(list(asked)):
            site = asked[answered.message]
            site.message = None
            _take(sites, site, answered, coordinator)
        for site in sites.values():
            _next(site, sites.values(), joined, nodes)
        pause()
    _end(sites, joined, nodes, pause)
    coordinator.close()


def _follow(sites: dict[int, _Site], online: Collection[int]) -> None:
    """Who has come, and who is gone: a node that comes back is asked from the beginning."""
    for node in sites.keys() - set(online):
        site = sites.pop(node)
        if site.line is not None and not site.dismissed:
            site.line.leave("offline")
    for node in set(online) - sites.keys():
        sites[node] = _Site(node)


def _next(site: _Site, present: Collection[_Site], joined: Joined, nodes: Nodes) -> None:
    """Ask a site that has nothing to do; keep the lease of one that has."""
    if site.behind is not None and (site.behind.dismissed or site.behind not in present):
        site.behind = None
    if site.dismissed or site.behind is not None:
        return
    if site.line is None:
        if site.message is None:
            site.ask(nodes, Request(joined))
        return
    if site.message is not None:
        site.line.heartbeat()
        return
    held = "" if site.tries else site.held  # what has failed may have cost it its adapter
    try:
        answer = site.line.work(held)
    except ConfigError as error:
        _dismiss(site, str(error))
        return
    if isinstance(answer, Assignment):
        site.ask(nodes, Request(joined, answer), _payload(site.line, answer, held))


def _payload(line: LocalConnection, asked: Assignment, held: str) -> bytes:
    """What a site with the adapter `held` has to get for an assignment."""
    if asked.adapter and asked.adapter == held:
        return b""
    wanted = [(link.digest, link.bytes) for link in asked.links] or [(asked.broadcast_digest, asked.broadcast_bytes)]
    return b"".join(line.fetch(*each) for each in wanted)


def _take(sites: dict[int, _Site], site: _Site, answered: Answered, coordinator: Coordinator) -> None:
    """What a site has answered: who it is, or an update."""
    if answered.error:
        _failed(site, answered.error)
        return
    try:
        reply = from_head(Reply, answered.head)
        if reply.refusal:
            _dismiss(site, f"refused: {reply.refusal}")
        elif site.line is None:
            _welcome(sites, site, reply, coordinator)
        else:
            site.held = reply.held
            _submit(site, reply, answered.payload)
    except (StoreError, StrategyError):
        raise  # the coordinator must stop
    except FedloomError as error:
        _failed(site, str(error))


def _welcome(sites: dict[int, _Site], site: _Site, reply: Reply, coordinator: Coordinator) -> None:
    """Let a site take part under the name that its policy gives it."""
    for other in sites.values():
        if other.client == reply.client and other is not site and not other.dismissed:
            # A site that was started anew is a new node, and the old one is seen to be gone only later.
            log.warning("node %d waits: node %d is client %r already", site.node, other.node, reply.client)
            site.behind = other
            return
    line = LocalConnection(coordinator)
    line.join(reply.client, reply.declared_examples)
    site.client, site.line = reply.client, line
    log.info("node %d is client %r", site.node, reply.client)


def _submit(site: _Site, reply: Reply, payload: bytes) -> None:
    """Hand an update in, under the name of the site that sent it."""
    assert site.line is not None  # it was asked for work
    if reply.header is None or reply.header.client != site.client:
        raise ProtocolError(f"node {site.node} answers an assignment of {site.client!r} without an update of it")
    site.line.submit(reply.header, payload)


def _failed(site: _Site, reason: str) -> None:
    """The same message goes out again, if it is still wanted; the site answers it with the same bytes."""
    site.tries += 1
    log.warning("node %d (%s): %s", site.node, site.client or "not known yet", clean(reason))
    if site.tries >= _MOST_TRIES:
        _dismiss(site, f"failed {site.tries} times")


def _dismiss(site: _Site, reason: str) -> None:
    """Do not ask this node again before it has been away."""
    log.warning("node %d (%s) is left out: %s", site.node, site.client or "not known yet", clean(reason))
    site.dismissed = True
    if site.line is not None:
        site.line.leave(reason)


def _end(sites: dict[int, _Site], joined: Joined, nodes: Nodes, pause: Callable[[], None]) -> None:
    """Tell every site that the run is over, so that it forgets what it would have to send again."""
    waiting = {
        nodes.ask(site.node, to_json(Request(joined, over=True)), b"", work=False)
        for site in sites.values()
        if site.line is not None
    }
    deadline = time.monotonic() + _END_S
    while waiting and time.monotonic() < deadline:
        pause()
        waiting -= {answered.message for answered in nodes.answers(list(waiting))}
