"""More than the coordinator can take, and for longer: what it turns away, what it still gets done, what it holds."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedloom.client.transport import tls as channel
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.errors import FedloomError, Overloaded
from fedloom.proto.messages import Assignment, Finished
from tests.chaos.driver import Failure
from tests.chaos.kills import Result
from tests.faults_server.serving import Client, served, update

__all__ = ["overload", "soak"]

CAPACITY = 68
"""Updates that the coordinator takes on at a time: those it works on and those that wait."""

_LEASE_S = 3600.0


@dataclass
class _Wave:
    """A cohort that hands in its updates all at once."""

    elapsed_s: float = 0.0
    refusals: int = 0
    waits_s: list[float] = field(default_factory=list)
    """What those who were refused were told."""
    beats_s: list[float] = field(default_factory=list)
    """How long the heartbeats of somebody else took meanwhile."""
    quiet_s: list[float] = field(default_factory=list)
    """And afterwards."""
    peak_mib: float = 0.0


def overload(folder: Path, times: int, slow_disk_s: float) -> Result:
    """As many updates at once as the coordinator takes on, and then several times as many, on a disk that is slow.

    Raises:
        Failure: Somebody was refused without being told when to come back or never got through, or the coordinator
            holds more memory than with a load that fits.
    """
    fitting = _wave(folder / "fitting", CAPACITY, slow_disk_s)
    flooded = _wave(folder / "flooded", times * CAPACITY, slow_disk_s)
    goodput = times * fitting.elapsed_s / flooded.elapsed_s
    figures: Result = {
        "clients": times * CAPACITY,
        "capacity": CAPACITY,
        "refusals": flooded.refusals,
        "longest_wait_told_s": round(max(flooded.waits_s, default=0.0), 2),
        "goodput_of_fitting": round(goodput, 2),
        "slowest_heartbeat_s": round(max(flooded.beats_s), 2),
        "heartbeat_afterwards_s": round(sorted(flooded.quiet_s)[len(flooded.quiet_s) // 2], 4),
        "peak_mib": round(flooded.peak_mib, 1),
        "peak_mib_of_fitting": round(fitting.peak_mib, 1),
    }
    if fitting.refusals or not flooded.refusals or min(flooded.waits_s) <= 0:
        raise Failure(f"what was refused is not what was too much: {figures}")
    if flooded.peak_mib > 1.2 * fitting.peak_mib:
        raise Failure(f"too much to do takes memory: {figures}")
    return figures


def _wave(state: Path, clients: int, slow_disk_s: float) -> _Wave:
    names = [f"client-{number}" for number in range(clients)]
    config = {
        "run": {"name": "wave", "rounds": 1},
        "rounds": {"min_clients": clients, "lease_s": _LEASE_S, "deadline_s": _LEASE_S},
    }
    wave, mutex = _Wave(), threading.Lock()
    start = threading.Barrier(clients + 1)

    def hand_in(line: GrpcConnection, name: str) -> None:
        line.join(name, 0)
        answer = line.work()
        while not isinstance(answer, Assignment):
            answer = line.work()
        header, payload = update(name, answer)
        start.wait()
        while True:
            try:
                if line.submit(header, payload):
                    raise Failure(f"{name}'s update was there before it was taken")
                return
            except Overloaded as error:
                with mutex:
                    wave.refusals += 1
                    wave.waits_s.append(error.retry_after_s or 0.0)
                time.sleep(error.retry_after_s or 0.1)

    with served(state, "bystander", config=config, slow_disk_s=slow_disk_s) as (bystander,), _lines(bystander) as line:
        bystander.join()
        pool = ThreadPoolExecutor(clients)
        handing = [pool.submit(hand_in, line(), name) for name in names]
        start.wait()
        began_s = time.monotonic()
        while not all(each.done() for each in handing):
            wave.beats_s.append(_beat(bystander))
            time.sleep(0.02)
        wave.elapsed_s = time.monotonic() - began_s
        pool.shutdown()
        for each in handing:
            each.result()
        wave.quiet_s = [_beat(bystander) for _ in range(20)]
        wave.peak_mib = bystander.peak_mib()
        if not isinstance(bystander.work(), Finished):
            raise Failure("the round did not close when all updates were in")
    return wave


@contextmanager
def _lines(to: Client) -> "Iterator[Callable[[], GrpcConnection]]":
    """Makes connections, each with a socket of its own as on a machine of its own; closes them at the end."""
    made: list[GrpcConnection] = []
    own = ("grpc.use_local_subchannel_pool", 1)
    if own not in channel._OPTIONS:
        channel._OPTIONS.append(own)

    def line() -> GrpcConnection:
        made.append(GrpcConnection(to.address))
        return made[-1]

    yield line
    for each in made:
        each.close()


def _beat(client: Client) -> float:
    """How long a heartbeat takes."""
    began_s = time.monotonic()
    client.beat()
    return time.monotonic() - began_s


def soak(folder: Path, seconds: float, clients: int = 8, pause_s: float = 0.1) -> Result:
    """Rounds for so long, whose clients also come and go, and send what must be refused.

    Raises:
        Failure: Memory, open files or threads of the coordinator grow with time, see goal R15.
    """
    config = {"run": {"name": "soak", "rounds": 100_000}, "rounds": {"min_clients": clients, "lease_s": 30.0}}
    end_s, samples = time.monotonic() + seconds, list[tuple[float, float, int, int]]()

    def live(name: str, to: Client, lines: Callable[[], GrpcConnection]) -> int:
        done = 0
        while time.monotonic() < end_s:
            line = lines()
            line.join(name, 0)
            for _ in range(50):
                answer = line.work() if time.monotonic() < end_s else None
                if isinstance(answer, Assignment):
                    _take_part(line, name, answer, spoil=done % 7 == 0)
                    done += 1
                    time.sleep(pause_s)
            if time.monotonic() >= end_s:
                line.leave("the time is over")
            line.close()
        return done

    with served(folder / "state", "watcher", config=config, durable=True) as (watcher,), _lines(watcher) as lines:
        with ThreadPoolExecutor(clients) as pool:
            living = [pool.submit(live, f"client-{number}", watcher, lines) for number in range(clients)]
            while time.monotonic() < end_s and not any(each.done() for each in living):
                samples.append((time.monotonic(), *_held(watcher.pid)))
                time.sleep(max(0.2, seconds / 1000))
        rounds = min(each.result() for each in living)
    settled = np.array(samples[len(samples) // 3 :])  # after the time in which caches fill
    slope = float(np.polyfit(settled[:, 0], settled[:, 1], 1)[0]) * 3600
    figures: Result = {
        "seconds": round(seconds),
        "rounds": rounds,
        "mib": round(float(settled[:, 1].mean()), 1),
        "mib_per_hour": round(slope, 2),
        "mib_per_1000_rounds": round(slope / 3600 * seconds / rounds * 1000, 3),
        "files": [int(settled[:, 2].min()), int(settled[:, 2].max())],
        "threads": [int(settled[:, 3].min()), int(settled[:, 3].max())],
    }
    third = len(settled) // 3
    for column, what in ((2, "open files"), (3, "threads")):
        early, late = settled[:third, column], settled[-third:, column]
        if late.min() > early.max():
            raise Failure(f"{what} grow: {figures}")
    return figures


def _take_part(line: GrpcConnection, name: str, assignment: Assignment, *, spoil: bool) -> None:
    """Answer a round as a client does; sometimes with bytes first that are not what their header says."""
    line.fetch(assignment.broadcast_digest, assignment.broadcast_bytes)
    header, payload = update(name, assignment)
    if spoil:
        try:
            line.submit(header, bytes(len(payload)))
        except FedloomError:
            pass
        else:
            raise Failure("a payload that is not what its header says was taken")
    line.submit(header, payload)


def _held(pid: int) -> tuple[float, int, int]:
    """Memory in MiB, open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    rss, threads = (int(status.partition(f"{key}:")[2].split()[0]) for key in ("VmRSS", "Threads"))
    return rss / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir())), threads
