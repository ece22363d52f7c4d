"""Starts, kills and restarts the processes of one trial, and says whether each ended as it should.

This process loads what is slow to load and then forks: a node loads only what holds failpoints, after they are armed.
Nothing here may use gRPC, whose threads do not survive a fork.
"""

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.core.privacy.accounting import epsilon
from fedloom.core.runtime import failpoints
from tests.chaos.trial import DELTA, SPEND, Trial

__all__ = ["Failure", "Federation", "free_port", "in_parallel", "preload"]

SLOW = (
    "grpc.aio",
    "fedloom.client.policy",
    "fedloom.proto.wire",
    "fedloom.server.validate_config",
    "fedloom.server.privacy.user_ledger",
    "fedloom.strategies.fedavg",
)
"""Modules without failpoints that every node needs."""

_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_PORTS = range(20_000, 30_000)
"""Below those that the system hands out, or a client could be given its coordinator's port while that is down."""


class Failure(AssertionError):
    """A trial did not go as it must."""


def preload() -> None:
    """Load what is slow, once."""
    for name in SLOW:
        importlib.import_module(name)
    functions = (failpoints.failpoint, failpoints.reach)
    early = [name for name, module in sys.modules.items() if any(each in functions for each in _values(module))]
    if set(early) != {failpoints.__name__}:
        raise Failure(f"{early} hold failpoints and are loaded before any is armed; take them out of SLOW")
    epsilon([SPEND], DELTA)  # the accountant warms up for a second


def _values(module: object) -> list[object]:
    return [value for value in vars(module).values() if callable(value) and not isinstance(value, type)]


@dataclass
class Node:
    """One process: the coordinator, or a client by its name."""

    name: str
    pid: int = 0
    arms: list[str] = field(default_factory=list)
    """Failpoints of this process and its successors, one text each; later ones have none."""
    last: str = ""
    """What this process is armed with."""
    excused: bool = False
    """This process may end in any way: it was killed, or is armed."""
    starts: int = 0
    status: int | None = None
    """How it ended, if it has: 0, another exit code, or minus a signal."""
    ended_s: float = 0.0
    """When that was noticed, by the monotonic clock."""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.pid > 0 and self.status is None


class Federation:
    """The processes of a trial.

    Args:
        trial: What they do.
        folder: Where they keep everything; made here.
        arms: Failpoints by node name ("server" or a client), for its successive processes.
    """

    def __init__(
        self,
        trial: Trial,
        folder: Path,
        arms: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        self.trial, self.folder = trial, folder
        self.nodes = {name: Node(name, arms=list((arms or {}).get(name, ()))) for name in ("server", *trial.nodes)}
        self.address = f"127.0.0.1:{free_port()}"
        self.restarts: Counter[str] = Counter()
        self.environments: dict[str, Mapping[str, str]] = {}
        """Further variables by node; a node that has some is started as a program of its own."""
        self.down_s = 0.0
        """How long a node that has ended stays away."""

    @property
    def server(self) -> Node:
        """The coordinator."""
        return self.nodes["server"]

    @property
    def clients(self) -> list[Node]:
        """The clients."""
        return [self.nodes[name] for name in self.trial.nodes]

    def start(self, node: Node) -> None:
        """Start a node's next process."""
        text = node.arms.pop(0) if node.arms else ""
        name = "" if node.name == "server" else node.name
        task: dict[str, object] = {"trial": self.trial.to_json(), "address": self.address, "name": name}
        log = self.folder / f"{node.name}.log"
        sys.stdout.flush()
        node.pid = _forked(task, self.folder, log, text, self.environments.get(node.name, {}))
        node.status, node.excused, node.last = None, bool(text), text
        node.starts += 1

    def kill(self, node: Node, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal after which any end is right."""
        self.reap()
        if node.running:
            node.excused = True
            os.kill(node.pid, how)

    def reap(self) -> None:
        """Note who has ended."""
        for node in self.nodes.values():
            if node.running:
                pid, status = os.waitpid(node.pid, os.WNOHANG)
                if pid:
                    node.ended_s = time.monotonic()
                    node.status = os.waitstatus_to_exitcode(status)

    def unreached(self) -> list[str]:
        """Failpoints whose process was never started, or came to its end without having been there."""
        log = self.folder / "hits.log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        counted = {(name, point): int(count) for name, point, count in lines}
        found = [text for node in self.nodes.values() for text in node.arms]
        for node in self.nodes.values():
            point, _, action = node.last.partition("=")
            if (
                node.last
                and node.status == 0
                and counted.get((node.name, point), 0) < int(action.partition("@")[2] or 1)
            ):
                found.append(node.last)
        return found

    def run(self, each_turn: Callable[[], None] = lambda: None, *, limit_s: float = 300.0) -> None:
        """Start everybody and go on until the run is over, restarting whoever ends before it is.

        Raises:
            Failure: A process ended that had no reason to, or it takes too long.
        """
        end_s = time.monotonic() + limit_s
        try:
            for node in self.nodes.values():
                self.start(node)
            while not self.over():
                if time.monotonic() > end_s:
                    raise Failure(f"not over after {limit_s} s\n{self.tails()}")
                each_turn()
                time.sleep(0.01)
        finally:
            self.end()

    def over(self) -> bool:
        """Restart who ended; whether the coordinator and every client that could reach it are done."""
        self.reap()
        for node in self.nodes.values():
            if node.status in (None, 0):
                continue
            if not node.excused or ("=crash" in node.last and node.status != -signal.SIGKILL):
                raise Failure(f"{node.name} ended with {node.status} for no reason\n{self.tails()}")
            away = time.monotonic() - node.ended_s < self.down_s
            if not away and (node is self.server or self.server.status != 0):
                self.restarts[node.name] += 1
                self.start(node)
        if self.server.status != 0:
            return False
        # A client that was down when the coordinator said goodbye has nobody left to ask.
        return all(not client.running or client.starts > 1 for client in self.clients)

    def end(self) -> None:
        """Kill whoever is left."""
        for node in self.nodes.values():
            if node.running:
                os.kill(node.pid, signal.SIGKILL)
                os.kill(node.pid, signal.SIGCONT)
                _, status = os.waitpid(node.pid, 0)
                node.status = os.waitstatus_to_exitcode(status)

    def tails(self) -> str:
        """The last lines of every log."""
        parts = []
        for name in self.nodes:
            log = self.folder / f"{name}.log"
            lines = log.read_text(errors="replace").splitlines()[-25:] if log.exists() else []
            parts.append("\n".join([f"--- {name}", *lines]))
        return "\n".join(parts)


def _forked(task: dict[str, object], folder: Path, log: Path, text: str, environment: Mapping[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if environment:  # a library to be loaded before all others needs a new program
            json_task = json.dumps([task, str(folder)])
            variables = {**os.environ, **environment, failpoints.ENVIRONMENT: text}
            os.execve(sys.executable, [sys.executable, "-m", "tests.chaos.alone", json_task], variables)
        failpoints.arm(text)
        from tests.chaos import node

        status = node.main(task, folder)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def free_port() -> int:
    """A port that no process listens on, and that the system gives to no client."""
    start = int.from_bytes(os.urandom(4), "big")
    for offset in range(len(_PORTS)):
        port = _PORTS[(start + offset) % len(_PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise Failure("no port is free")


def in_parallel(
    tasks: Mapping[str, Callable[[], dict[str, Any]]], folder: Path, workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run tasks in forks of this process, at most `workers` at once; yields name and result as they end.

    A task that raises has the result {"failure": TEXT}.
    """
    waiting, running = dict(tasks), dict[int, str]()
    folder.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and len(running) < workers:
            name = next(iter(waiting))
            task = waiting.pop(name)
            pid = os.fork()
            if pid == 0:
                _answer(task, folder / f"{name}.json")
            running[pid] = name
        pid, _ = os.wait()
        name = running.pop(pid)
        answer = folder / f"{name}.json"
        yield name, json.loads(answer.read_text()) if answer.exists() else {"failure": "its process died"}


def _answer(task: Callable[[], dict[str, Any]], path: Path) -> None:
    try:
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
        try:
            result = task()
        except Exception:
            result = {"failure": traceback.format_exc()}
        path.write_text(json.dumps(result))
    finally:
        os._exit(0)
