"""The actors: how many each node has, where one that died is replaced, and who is free.

Every node of the cluster first gets one actor. When that has made its first step it says how much memory it took and
how much the node has left, and the node gets as many more as fit, up to one for each share of its CPUs. A node with
GPUs gets one for each of them at once. What nodes there are is looked at all the time, so one that goes away is done
without and one that comes is used.
"""

import logging
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from fedloom.client.assets.fetch import ASSETS
from fedloom.client.policy import ComputePolicy
from fedloom.core.config.run import RunConfig, Spec
from fedloom.core.errors import FedloomError
from fedloom.simulation.ray_engine.actor import ASIDE, Footprint, Resident

__all__ = ["Fleet"]

log = logging.getLogger(__name__)

_MOST_DEATHS = 3
"""Actors that may die over one piece of work, or one after the other while they load on a node."""
_LOOK_S, _PING_S = 0.2, 30.0
_ALONE_S = 60.0
"""Seconds without any actor after which that is said."""


@dataclass(eq=False)
class _Actor:
    node: str
    handle: Any
    loaded: Any
    """Reference to what `load` gives."""
    footprint: Any
    ready: bool = False


@dataclass
class _Node:
    cpus: int
    gpus: int
    threads: int
    room: int
    """Actors that its memory has room for, as far as is known."""
    peak: int = 0
    """Memory of one, in bytes; 0 until it is measured."""
    deaths: int = 0
    """Actors that died while they loaded, one after the other."""
    actors: set[_Actor] = field(default_factory=set)

    @property
    def slots(self) -> int:
        return self.gpus or self.cpus // self.threads

    @property
    def wanted(self) -> int:
        return min(self.room, self.slots)


class Fleet:
    """The actors of a run, from entering the block to leaving it.

    Args:
        ray: The module, connected.
        config: A completed run file.
        most: Actors that are of use: the number of clients.
    """

    def __init__(self, ray: Any, config: RunConfig, most: int) -> None:
        self._ray, self._most, self._compute = ray, most, ComputePolicy.of(config.engine)
        self._kind = ray.remote(concurrency_groups={ASIDE: 1})(Resident)
        self._spec = ray.put(_for_any_node(config.spec))
        self._nodes: dict[str, _Node] = {}
        self._free: queue.SimpleQueue[_Actor] = queue.SimpleQueue()
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._fault: FedloomError | None = None
        self._keeper = threading.Thread(target=self._keep, name="ray-fleet", daemon=True)

    def __enter__(self) -> "Fleet":
        """Start the first actor of every node."""
        self._keeper.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all actors, and with them whatever waits for one."""
        self._closed.set()
        self._keeper.join()
        for actor in self._actors:
            self._kill(actor)

    @property
    def size(self) -> int:
        """Actors that have loaded the model."""
        return sum(actor.ready for actor in self._actors)

    def check(self) -> None:
        """Raise what keeps actors from being started.

        Raises:
            FedloomError: They cannot load the model, or die.
        """
        if self._fault is not None:
            raise self._fault

    def call(self, method: str, *arguments: Any) -> Any:
        """Have an actor do a piece of work, and another one if it dies over it.

        Raises:
            FedloomError: What the work raises; or several actors have died over it, or there is none.
        """
        for _ in range(_MOST_DEATHS):
            actor = self._take()
            try:
                result = self._ray.get(getattr(actor.handle, method).remote(*arguments))
            except self._ray.exceptions.RayTaskError as error:
                self._free.put(actor)
                raise _cause(error) from None
            except self._ray.exceptions.RayError as error:
                if self._closed.is_set():
                    break
                log.warning("an actor on node %s is lost, and its work done again elsewhere: %s", actor.node[:8], error)
                self._lose(actor)
                continue
            self._free.put(actor)
            return result
        self._check_open()
        raise FedloomError(
            f"{_MOST_DEATHS} actors have died over the same {method} of client {arguments[0]!r}; if the nodes' memory "
            "does not suffice, lower train.microbatch, or raise engine.threads, which makes fewer actors"
        )

    def _take(self) -> _Actor:
        while True:
            self._check_open()
            self.check()
            with suppress(queue.Empty):
                actor = self._free.get(timeout=_LOOK_S)
                if self._alive(actor):
                    return actor

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise FedloomError("the run has ended")

    def _alive(self, actor: _Actor) -> bool:
        """Whether an actor that has nothing to do is still there: what did not kill it is not to be blamed."""
        try:
            self._ray.get(actor.handle.__ray_ready__.remote(), timeout=_PING_S)
        except self._ray.exceptions.RayError:
            self._lose(actor)
            return False
        return True

    def _lose(self, actor: _Actor) -> None:
        self._kill(actor)  # one that only could not be reached is not to come back
        with self._lock:
            if actor.node in self._nodes:
                self._nodes[actor.node].actors.discard(actor)

    def _kill(self, actor: _Actor) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor.handle)

    @property
    def _actors(self) -> list[_Actor]:
        with self._lock:
            return [actor for node in self._nodes.values() for actor in node.actors]

    def _keep(self) -> None:
        """Look after the nodes until the block is left."""
        last_s = time.monotonic()
        while not self._closed.wait(_LOOK_S):
            try:
                self._look()
            except Exception as error:  # whatever Ray comes to, nobody is to wait for ever
                self._fault = error if isinstance(error, FedloomError) else FedloomError(f"Ray has failed: {error}")
                return
            if self.size:
                last_s = time.monotonic()
            elif time.monotonic() - last_s > _ALONE_S:
                last_s = time.monotonic()
                log.warning("no node of the Ray cluster has given an actor for %.0f s; see `ray status`", _ALONE_S)

    def _look(self) -> None:
        found = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        with self._lock:
            for gone in self._nodes.keys() - found.keys():
                log.warning("node %s has gone away", gone[:8])
                del self._nodes[gone]
            for name in found.keys() - self._nodes.keys():
                self._nodes[name] = self._node(found[name])
            if not any(node.slots for node in self._nodes.values()):
                threads = self._compute.threads or 1
                raise FedloomError(f"no node of the Ray cluster has a GPU or engine.threads = {threads} CPUs; lower it")
            for actor in self._actors:
                self._hear(actor, self._nodes[actor.node])
            left = self._most - len(self._actors)
            for name, node in self._nodes.items():
                for _ in range(min(left, node.wanted - len(node.actors))):
                    node.actors.add(self._start(name, node))
                    left -= 1

    def _node(self, resources: dict[str, float]) -> _Node:
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        gpus = 0 if self._compute.device == "cpu" else gpus
        threads = self._compute.threads or (max(1, cpus // gpus) if gpus else 1)
        return _Node(cpus, gpus, threads, room=gpus or 1)

    def _hear(self, actor: _Actor, node: _Node) -> None:
        """Note that an actor can work, or cannot, and what it says of memory."""
        if not actor.ready and self._done(actor.loaded):
            try:
                there, here = self._ray.get(actor.loaded), version("fedloom")
            except self._ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
            except self._ray.exceptions.RayError as error:
                node.deaths += 1
                node.actors.discard(actor)
                if node.deaths >= _MOST_DEATHS:
                    raise FedloomError(
                        f"{_MOST_DEATHS} actors have died while they loaded the model on node {actor.node[:8]}: {error}"
                    ) from error
                return
            if there != here:
                raise FedloomError(
                    f"node {actor.node[:8]} has fedloom {there}, and this machine has {here}; install the same"
                )
            actor.ready, node.deaths = True, 0
            self._free.put(actor)
        if actor.footprint is not None and self._done(actor.footprint):
            with suppress(self._ray.exceptions.RayError):
                self._measured(node, self._ray.get(actor.footprint))
            actor.footprint = None

    def _measured(self, node: _Node, footprint: Footprint) -> None:
        if node.gpus or node.peak:
            return
        node.peak, node.room = footprint.peak, 1 + footprint.more
        log.info("an actor takes %d MiB and %d MiB are free: %d fit", node.peak >> 20, footprint.free >> 20, node.room)

    def _done(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])

    def _start(self, name: str, node: _Node) -> _Actor:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Ray shows an actor the GPU that it has given it, and no other.
        own = {"device": "cuda" if node.gpus else "cpu", "threads": node.threads}
        reserved = {"num_gpus": 1, "num_cpus": 0} if node.gpus else {"num_cpus": node.threads, "memory": node.peak}
        there = NodeAffinitySchedulingStrategy(name, soft=False)
        handle = self._kind.options(scheduling_strategy=there, max_restarts=0, **reserved).remote(
            self._compute.model_copy(update=own)
        )
        beside = handle.footprint.options(concurrency_group=ASIDE)
        return _Actor(name, handle, handle.load.remote(self._spec), beside.remote())


def _for_any_node(spec: Spec) -> Spec:
    """The run with a base model that other machines find: under its name, or under its whole path."""
    base = spec.model.base
    path = Path(base).expanduser()
    if base in ASSETS or not path.exists():
        return spec
    return spec.model_copy(update={"model": spec.model.model_copy(update={"base": str(path.absolute())})})


def _cause(error: Any) -> Exception:
    """What an actor raised, as it would have been raised here."""
    return error.cause if isinstance(error.cause, Exception) else FedloomError(str(error))
